"""Parses the text of a compiled program (`compiled.as_text()`): instructions, loops and collectives.

The compiler's own `cost_analysis` counts the body of a loop once, however often it runs, and leaves out collectives.
Here the contents of a loop are multiplied by its trip count. Shapes in the text are those of one device.
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
    """All collectives of one kind in one run of the program, seen from one device.

    Attributes:
        kind: one of `COLLECTIVES`.
        count: number of executions.
        bytes: payload without padding, summed over the executions. The payload of an all-gather is its results, that of
            the others is their operands.
    """

    kind: str
    count: int
    bytes: int


class Array(NamedTuple):
    """One array's shape. XLA writes it as `bf16[8,64,64]{2,1,0:T(8,128)(2,1)S(1)}`.

    Attributes:
        dtype: XLA's name, such as "bf16".
        dims: the size of each axis.
        minor_to_major: the axes, the one that is contiguous in memory first.
        tiling: such as "T(8,128)(2,1)"; "" on a CPU.
        memory: 0 is the device's main memory. On a TPU, 1 is VMEM, the on-chip memory.
    """

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    tiling: str
    memory: int

    @property
    def bytes(self) -> int:
        """Size without padding."""
        return -(-math.prod(self.dims) * _bits(self.dtype) // 8)

    @property
    def padded_bytes(self) -> int:
        """Size in memory: a TPU pads the minor dimensions to whole tiles."""
        tile = re.match(r"T\(([\d,]*)\)", self.tiling)
        if not tile or not self.dims or not tile.group(1):
            return self.bytes
        tile = [int(size) for size in tile.group(1).split(",")]
        dims = [self.dims[axis] for axis in reversed(self.minor_to_major)]  # major to minor
        dims = [1] * (len(tile) - len(dims)) + dims
        rounded = [-(-size // unit) * unit for size, unit in zip(dims[-len(tile) :], tile)]
        return -(-math.prod(dims[: -len(tile)] + rounded) * _bits(self.dtype) // 8)


class Instruction(NamedTuple):
    """One instruction of a computation.

    Attributes:
        name: unique within the computation.
        shape: of the result, as XLA writes it; tuples as "(…, …)".
        opcode: such as "dot" or "fusion".
        operands: names of the instructions that it takes.
        literal: the text between the parentheses, such as a constant's value.
        attributes: the text after the parentheses.
        is_root: whether its result is the computation's.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool


class Module(NamedTuple):
    """A program.

    Attributes:
        computations: each computation's instructions by name, in order.
        entry: name of the computation at which the program starts.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str


def parse(text: str) -> Module:
    """Parses a compiled module's text.

    Args:
        text: what `compiled.as_text()` returns.

    Raises:
        ValueError: the text holds no entry computation, or its parentheses do not match.
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
    """Returns the arrays of a shape in order, those of nested tuples included.

    Args:
        shape: as XLA writes it.
    """
    found = []
    for dtype, dims, order, layout in _SHAPE.findall(shape):
        numbers = lambda text: tuple(int(x) for x in text.split(",") if x)
        memory = re.search(r"S\((\d+)\)", layout)
        tiling = re.match(r"(?:T(?:\([\d,]*\))+)?", layout).group()
        found.append(Array(dtype, numbers(dims), numbers(order), tiling, int(memory.group(1)) if memory else 0))
    return found


def trip_count(module: Module, loop: Instruction, computation: dict[str, Instruction]) -> int | None:
    """Returns how often the body of a `while` runs, or None if the text does not tell.

    The count is the compiler's note, or follows from `counter < constant` in the condition. The counters of `lax.scan`,
    `map` and `fori_loop` step by one.

    Args:
        module: the program.
        loop: the `while`.
        computation: the computation that holds it.
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
    """Returns how often each computation runs in one run of the program, by name.

    Bodies of fusions and loops are included. Every branch of a conditional counts as taken. A loop of unknown trip
    count counts once; see `unknown_loops`. The functions that a reduce applies to its elements are left out.

    Args:
        module: the program.
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
    """Returns the names of the loops whose trip count the text does not tell.

    Args:
        module: the program.
    """
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
    """Returns the collectives of one run of a compiled program, one entry per kind, sorted by kind.

    Loop bodies are multiplied by their trip counts. An asynchronous pair of start and done counts once, and so does a
    collective of several arrays.

    Args:
        hlo_text: what `compiled.as_text()` returns.

    Raises:
        ValueError: the text is not that of a program, see `parse`.
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
    """Maps the channels of collectives to the fusion that starts them. On TPU, later fusions repeat them."""
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
