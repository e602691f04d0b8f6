"""Reads what XLA compiled, from its text (`compiled.as_text()`): instructions, loops, and what travels between devices.

The compiler's own `cost_analysis` counts the body of a loop once, however often it runs, and says nothing of collectives.
Here whatever a loop holds is multiplied by its trip count. Shapes in the text are those of one device.
"""

import collections
import math
import re
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\([^\n]*\) -> [^\n]*)?\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = ")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """All collectives of one kind that one run of the program executes, seen from one device.

    Attributes:
        kind: one of `COLLECTIVES`.
        count: executions.
        bytes: payload without padding, summed over executions: of the results for all-gather, of the operands for the others.
    """

    kind: str
    count: int
    bytes: int


class Array(NamedTuple):
    """One array's shape, as XLA writes it: `bf16[8,64,64]{2,1,0:T(8,128)(2,1)S(1)}`."""

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    tiling: str  # "T(8,128)(2,1)", "" on a CPU
    memory: int  # 0: the device's main memory; on a TPU, 1 is VMEM, the on-chip memory

    @property
    def bytes(self) -> int:
        return -(-math.prod(self.dims) * _bits(self.dtype) // 8)

    @property
    def padded_bytes(self) -> int:
        """As it lies in memory: a TPU pads the minor dimensions to whole tiles."""
        tile = re.match(r"T\(([\d,]*)\)", self.tiling)
        if not tile or not self.dims or not tile.group(1):
            return self.bytes
        tile = [int(size) for size in tile.group(1).split(",")]
        dims = [self.dims[axis] for axis in reversed(self.minor_to_major)]  # major to minor
        dims = [1] * (len(tile) - len(dims)) + dims
        rounded = [-(-size // unit) * unit for size, unit in zip(dims[-len(tile) :], tile)]
        return -(-math.prod(dims[: -len(tile)] + rounded) * _bits(self.dtype) // 8)


class Instruction(NamedTuple):
    name: str
    shape: str  # of the result; tuples as "(…, …)"
    opcode: str
    operands: tuple[str, ...]  # names
    literal: str  # what stands between the parentheses
    attributes: str
    is_root: bool


class Module(NamedTuple):
    """A program: its computations, each a dict of instructions by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


def parse(text: str) -> Module:
    """Parses a compiled module's text.

    Raises:
        ValueError: where the text holds no entry computation.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None:
            if match := _COMPUTATION.match(line):
                current = computations.setdefault(match.group(2), {})
                entry = match.group(2) if match.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif match := _INSTRUCTION.match(line):
            instruction = _instruction(match, re.sub(r"/\*.*?\*/", "", line[match.end() :]))
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError(f"no ENTRY computation in a text of {len(text)} characters; give what compiled.as_text() returns")
    return Module(computations, entry)


def _instruction(match, rest):
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    literal = rest[len(opcode) + 1 : end]
    operands = tuple(re.findall(r"%([\w.-]+)", literal)) if opcode not in ("constant", "parameter") else ()
    return Instruction(match.group(2), shape, opcode, operands, literal, rest[end + 1 :], bool(match.group(1)))


def _closing(text, start):
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _bits(dtype):
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)  # bf16, s32, f8e4m3fn; token and opaque hold nothing
    return int(digits.group()) if digits else 0


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape, those of nested tuples in order."""
    found = []
    for dtype, dims, order, layout in _SHAPE.findall(shape):
        numbers = lambda text: tuple(int(x) for x in text.split(",") if x)
        memory = re.search(r"S\((\d+)\)", layout)
        tiling = re.match(r"(?:T(?:\([\d,]*\))+)?", layout).group()
        found.append(Array(dtype, numbers(dims), numbers(order), tiling, int(memory.group(1)) if memory else 0))
    return found


def trip_count(module: Module, loop: Instruction, computation: dict[str, Instruction]) -> int | None:
    """How often a `while` runs: as the compiler notes it, or from `counter < constant` in the condition; None: unknown.

    Counters of `lax.scan`, `map` and `fori_loop` step by one.
    """
    if known := _KNOWN_TRIPS.search(loop.attributes):
        return int(known.group(1))
    condition = module.computations[re.search(r"condition=%?([\w.-]+)", loop.attributes).group(1)]
    root = next(instruction for instruction in condition.values() if instruction.is_root)
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    counter, limit = (condition[name] for name in root.operands)
    if limit.opcode != "constant" or counter.opcode != "get-tuple-element":
        return None
    start = computation.get(loop.operands[0])
    index = int(re.search(r"index=(\d+)", counter.attributes).group(1))
    if start is not None and start.opcode == "tuple":
        start = computation[start.operands[index]]
        while start.opcode in ("copy", "bitcast", "convert"):
            start = computation[start.operands[0]]
    first = int(start.literal) if start is not None and start.opcode == "constant" else 0
    return max(0, int(limit.literal) - first)


def executions(module: Module) -> dict[str, int]:
    """How often each computation runs in one run of the program, fusions' and loops' bodies included.

    Every branch of a conditional counts as taken. A loop of unknown trip count counts once; see `unknown_loops`. What a reduce
    applies to its elements is left out.
    """
    times = collections.Counter({module.entry: 1})
    for name in _callers_first(module):
        for instruction in module.computations[name].values():
            repeats = 1
            if instruction.opcode == "while":
                repeats = trip_count(module, instruction, module.computations[name])
                repeats = 1 if repeats is None else repeats
            for called in _called(instruction):
                times[called] += times[name] * repeats
    return dict(times)


def unknown_loops(module: Module) -> list[str]:
    """Names of the loops whose trip count the text does not tell."""
    return [
        instruction.name
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode == "while" and trip_count(module, instruction, computation) is None
    ]


def _called(instruction):
    if instruction.opcode not in ("while", "conditional", "call", "fusion", "custom-call", "async-start"):
        return []
    branches = _BRANCHES.search(instruction.attributes)
    return _CALLED.findall(instruction.attributes) + (re.findall(r"%?([\w.-]+)", branches.group(1)) if branches else [])


def _callers_first(module):
    order, seen = [], set()

    def visit(name):
        seen.add(name)
        for instruction in module.computations[name].values():
            for called in _called(instruction):
                if called not in seen:
                    visit(called)
        order.append(name)

    visit(module.entry)
    return reversed(order)


def collectives(hlo_text: str) -> list[Collective]:
    """The collectives that one run of a compiled program executes, one entry per kind, sorted by kind; see `Collective`.

    Loop bodies are multiplied by their trip counts, an asynchronous pair of start and done counts once, and a collective of
    several arrays is one collective.
    """
    module = parse(hlo_text)
    count, size = collections.Counter(), collections.Counter()
    times = executions(module)
    started = _started(module)
    for name in times:
        computation = module.computations[name]
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES and started.get(_channel(instruction), name) == name:
                count[kind] += times[name]
                size[kind] += times[name] * _payload(kind, instruction, computation)
    return [Collective(kind, count[kind], size[kind]) for kind in sorted(count) if count[kind]]


def _started(module):
    """TPU starts some collectives in one fusion and goes on with them in others that repeat them: {channel: where it starts}."""
    return {
        _channel(instruction): name
        for name, computation in module.computations.items()
        if any('"AsyncCollectiveStart"' in instruction.attributes for instruction in computation.values())
        for instruction in computation.values()
        if instruction.opcode in COLLECTIVES
    }


def _channel(instruction):
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    return (instruction.opcode, channel.group(1)) if channel else None


def _payload(kind, instruction, computation):
    if kind != "all-gather":
        return sum(array.bytes for name in instruction.operands for array in arrays(computation[name].shape))
    results = arrays(instruction.shape)
    if instruction.opcode.endswith("-start"):  # its tuple holds the operands first
        results = results[len(instruction.operands) : 2 * len(instruction.operands)]
    return sum(array.bytes for array in results)
