"""The cost of one run of a compiled program, loops multiplied: FLOPs, bytes of main memory, estimated cycles."""

import math
import re
from typing import NamedTuple

import numpy as np

from halonet_jax.costs import hlo

# These name existing values, or are control flow, whose bodies are counted separately.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all",
    "opt-barrier", "partition-id", "replica-id",
}  # fmt: skip
_SLICES = ("slice", "dynamic-slice", "gather", "slice-start")
_CALLS = re.compile(r"\bcalls=%?([\w.-]+)")
_KERNEL_FLOPS = re.compile(r'"cost_estimate":\{[^}]*"flops":"(\d+)"')
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Cost(NamedTuple):
    """The cost of one run on one device.

    Attributes:
        flops: two for each multiply-add of matrix products and convolutions, except those with padding; plus
            `kernel_flops`. Work of the vector unit (softmax, norms, optimizer) is not counted.
        bytes: read from and written to main memory, including the padding of tiled layouts. An array in on-chip memory
            costs nothing. A slice and an update in place cost the slice's size.
        cycles: sum of the TPU backend's estimates; 0 on a CPU. The backend has no estimate for collectives, gathers,
            scatters, max pooling's gradient, Pallas kernels, and copies between main and on-chip memory, which run in
            parallel.
        kernel_flops: FLOPs of Pallas kernels, as the kernels state them. They include products of masked lanes.
    """

    flops: int
    bytes: int
    cycles: int
    kernel_flops: int


def cost(module: hlo.Module) -> Cost:
    """Returns the cost of one run of a program.

    Args:
        module: the program, from `hlo.parse`.
    """
    return by_part(module, {})["other"]


def by_part(module: hlo.Module, parts: dict[str, str]) -> dict[str, Cost]:
    """Returns the cost of each part of a program. The parts add up to `cost`.

    An instruction belongs to the part whose scope its name holds. The name of a fusion is that of one of its instructions.

    Args:
        module: the program, from `hlo.parse`.
        parts: for each part a name of `jax.named_scope`, of a Flax module or of its method. Of several that fit, the first
            counts.

    Returns:
        The cost of each part, and of "other".
    """
    sums = {part: np.zeros(4, int) for part in (*parts, "other")}
    scopes = {part: re.compile(rf"\b{re.escape(scope)}\b") for part, scope in parts.items()}
    fused = _fused(module)
    for name, times in hlo.executions(module).items():
        computation = module.computations[name]
        for instruction in computation.values():
            found = _OP_NAME.search(instruction.attributes)
            fitting = (part for part, scope in scopes.items() if found and scope.search(found.group(1)))
            kernel = _KERNEL_FLOPS.search(instruction.attributes) if instruction.opcode == "custom-call" else None
            kernel_flops = int(kernel.group(1)) if kernel else 0
            size = cycles = 0
            if name not in fused:
                size = _bytes(module, instruction, computation)
                estimate = _CYCLES.search(instruction.attributes)
                cycles = int(estimate.group(1)) if estimate else 0
            numbers = (_flops(instruction, computation) + kernel_flops, size, cycles, kernel_flops)
            sums[next(fitting, "other")] += times * np.array(numbers)
    return {part: Cost(*total.tolist()) for part, total in sums.items()}


def _fused(module):
    """Returns the computations that run inside one instruction. Their arrays are not in main memory."""
    return {
        called
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode in ("fusion", "custom-call", "async-start")
        for called in _CALLS.findall(instruction.attributes)
    }


def _body(module, instruction):
    return module.computations[_CALLS.search(instruction.attributes).group(1)]


def _root(computation):
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _flops(instruction, computation):
    if instruction.opcode == "dot":
        left = hlo.arrays(computation[instruction.operands[0]].shape)[0].dims
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes).group(1)
        depth = math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
        return 2 * depth * math.prod(hlo.arrays(instruction.shape)[0].dims)
    return _convolution_flops(instruction, computation) if instruction.opcode == "convolution" else 0


def _convolution_flops(instruction, computation):
    """Counts FLOPs without those on padding.

    TPU also writes matrix products as convolutions, with batch axes as dilated spatial axes. Most of their positions
    are empty.
    """
    left, right = (hlo.arrays(computation[name].shape)[0].dims for name in instruction.operands)
    out = hlo.arrays(instruction.shape)[0].dims
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    left, right, out = (dict(zip(names, dims)) for names, dims in zip(labels, (left, right, out)))
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(item.split("=") for item in window.group(1).split()) if window else {}
    positions = 1
    for i, axis in enumerate(sorted(axis for axis in out if axis.isdigit())):
        pick = lambda key, default, i=i: window[key].split("x")[i] if key in window else default
        low = int(pick("pad", "0_0").split("_")[0])
        stride, spread, gap = (int(pick(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        at = np.arange(out[axis])[:, None] * stride + np.arange(right[axis]) * gap - low
        positions *= int(((at % spread == 0) & (at >= 0) & (at // spread < left[axis])).sum())
    # The kernel's input features already are those of one feature group.
    return 2 * positions * left["b"] // int(groups.group(1) if groups else 1) * out["f"] * right["i"]


def _bytes(module, instruction, computation):
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done") or "AllocateBuffer" in instruction.attributes:
        return 0
    if instruction.opcode == "custom-call" and re.search(r'target="\w*(Bitcast|Assume)', instruction.attributes):
        return 0
    if instruction.opcode.endswith("-start"):
        return _started_bytes(module, instruction, computation)
    reads = sum(
        _read(module, instruction, index, hlo.arrays(computation[name].shape))
        for index, name in enumerate(instruction.operands)
    )
    return reads + _written(module, instruction, computation)


def _started_bytes(module, instruction, computation):
    """Counts the bytes of an asynchronous copy, slice or collective. Its tuple holds operands, result and handles."""
    kind = instruction.opcode.removesuffix("-start")
    if kind == "async":  # the work is in a computation of its own
        kind = _root(_body(module, instruction)).opcode
    results = hlo.arrays(instruction.shape)
    operands = [array for name in instruction.operands for array in hlo.arrays(computation[name].shape)]
    if kind == "copy":  # (target, source, handle)
        return _in_main_memory(results[:1] + operands)
    if kind == "slice":  # ((source), target, handle)
        target = results[len(operands)]
        return _in_main_memory([target]) + (target.padded_bytes if operands[0].memory == 0 else 0)
    return _in_main_memory(operands) + _in_main_memory(results[len(operands) : 2 * len(operands)])


def _in_main_memory(arrays):
    return sum(array.padded_bytes for array in arrays if array.memory == 0)


def _read(module, instruction, index, arrays):
    """Returns the bytes that an instruction reads of its operand `index`."""
    if not _in_main_memory(arrays):
        return 0
    if instruction.opcode in _SLICES and index == 0:
        return sum(array.padded_bytes for array in hlo.arrays(instruction.shape))
    if instruction.opcode == "dynamic-update-slice" and index == 0:
        return 0
    if instruction.opcode != "fusion":
        return _in_main_memory(arrays)
    body = _body(module, instruction)
    parameter = next(i.name for i in body.values() if i.opcode == "parameter" and int(i.literal) == index)
    return min(_in_main_memory(arrays), _read_in_fusion(module, body, parameter, arrays))


def _read_in_fusion(module, body, name, arrays):
    total = 0
    for user in body.values():
        for index, operand in enumerate(user.operands):
            if operand == name:
                if user.opcode == "bitcast":
                    total += _read_in_fusion(module, body, user.name, arrays)
                else:
                    total += _read(module, user, index, arrays)
    return total


def _written(module, instruction, computation):
    results = hlo.arrays(instruction.shape)
    if not _in_main_memory(results):
        return 0
    values = [instruction]
    if instruction.opcode == "fusion":
        computation = _body(module, instruction)
        root = _root(computation)
        values = [computation[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(values) != len(results):
        return _in_main_memory(results)
    total = 0
    for value, result in zip(values, results):
        while value.opcode == "bitcast":
            value = computation[value.operands[0]]
        if value.opcode == "dynamic-update-slice":
            total += hlo.arrays(computation[value.operands[1]].shape)[0].padded_bytes if result.memory == 0 else 0
        elif value.opcode == "fusion":
            total += min(_in_main_memory([result]), _written(module, value, computation) or _in_main_memory([result]))
        else:
            total += _in_main_memory([result])
    return total
