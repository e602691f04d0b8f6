"""Halo attention fused for TPU: the layouts and calls around the kernels of `tpu_kernels`.

XLA lays out queries, keys and values by columns of blocks, and the relative tables by lanes. If blocks fill sublanes,
as 8 and 16 do, and divide the map, the layout of pixels is a change of view. The kernels do the rest. The backward pass
keeps the inputs of the kernel and the log-sum-exp of each query.
"""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from halonet_jax.ops import tpu_kernels as kernels
from halonet_jax.ops.geometry import make_axes
from halonet_jax.ops.platforms import device, per_device
from halonet_jax.ops.tpu_kernels import LANES, SUBLANES, Plan

# On-chip memory that kernels may take where no TPU is known, neither the mesh's nor this machine's: what the smallest
# of v5e, v5p and v6e has.
VMEM_BYTES = 64 * 2**20


def attend(
    q, k, v, rel_rows, rel_cols, *, block_size, halo_size, stride, centered, masked, logits_scale, adjacent=False, interpret=True
):  # fmt: skip
    """Attends by kernels. On platforms other than TPU they are interpreted: correct, but slow.

    Args:
        q, k, v, rel_rows, rel_cols, block_size, halo_size, stride, centered, masked, logits_scale, adjacent: as of
            `reference.attend`.
        interpret: False: the result is zeros on platforms other than TPU, for callers that do not use it there.

    Returns:
        As `reference.attend`.

    Raises:
        ValueError: `unsupported` gives a reason.
    """
    options = dict(
        block_size=block_size, halo_size=halo_size, stride=stride, centered=centered, masked=masked, adjacent=adjacent
    )
    reason = unsupported(q, k, v, **options)
    if reason:
        raise ValueError(f'implementation="pallas" cannot do this: {reason}; use "auto"')
    if interpret and device().platform != "tpu":
        warnings.warn('implementation="pallas" is interpreted on this device, which is slow; use "auto"', stacklevel=3)
    plan = make_plan(q, k, v, **options, logits_scale=logits_scale)
    tables = jnp.stack([
        _lay_table(plan, rel_rows, plan.rows, 0),
        _lay_table(plan, rel_cols, plan.cols, plan.channels - rel_cols.shape[1]),
    ])  # fmt: skip
    inputs = _lay_queries(plan, q), _lay_pixels(plan, k), _lay_pixels(plan, _group_values(plan, v)), tables
    out = _attend(plan, interpret, *(x.astype(plan.dtype) for x in inputs))
    return _unlay_out(plan, out, q.shape).astype(v.dtype)


def unsupported(q, k, v, *, block_size, halo_size, stride=1, centered=False, masked=True, adjacent=False) -> str | None:
    """Returns why the kernels cannot attend like this, or None if they can.

    The TPU is the one of the mesh that is set, which this machine need not have. Without a mesh it is this machine's
    TPU. On a machine without TPU it may be any from v5e on; set a mesh to export for an older one.

    Args:
        q, k, v: arrays, or anything with their shapes and dtypes, as of `halo_attention`.
        block_size, halo_size, stride, centered, masked, adjacent: as of `reference.attend`.
    """
    chip = pltpu.get_tpu_info() if pltpu.is_tpu_device() else None  # none for interpreted kernels
    if chip and chip.generation < 4:
        return f"kernels with bfloat16 products do not compile for {device().device_kind}"
    heads, channels = k.shape[3:]
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}, not float32 or bfloat16"
    if block_size % stride:
        stride = 1
    options = dict(
        block_size=block_size, halo_size=halo_size, stride=stride, centered=centered, masked=masked, adjacent=adjacent
    )
    if centered and adjacent and stride > 1:
        return "windows centred on strided queries need tables by pixels, not by queries"
    _, cols = make_axes(k.shape, **options)
    if cols.halo > cols.block:
        return f"halo_size={halo_size} is more than block_size={block_size}, so that windows reach beyond the next block"
    if heads * channels > LANES and LANES % channels:
        return f"{channels} channels per head neither divide {LANES} nor fit in there with all {heads} heads"
    plan = make_plan(q, k, v, **options, logits_scale=1.0)
    if plan.heads * plan.channels > LANES and plan.key_lanes != LANES:
        return f"{heads} heads of {channels} channels do not fill whole registers of {LANES} lanes"
    needed, there = vmem_estimate(plan, backward=True), chip.vmem_capacity_bytes if chip else VMEM_BYTES
    if needed > there:
        return f"the backward pass would take {needed / 2**20:.0f} MiB of on-chip memory, of {there / 2**20:.0f}"
    return None


def make_plan(q, k, v, *, logits_scale, **options) -> Plan:
    """Chooses how heads are grouped and blocks laid out.

    Args:
        q, k, v: arrays, or anything with their shapes and dtypes, as of `halo_attention`.
        logits_scale, **options: as of `reference.attend`.
    """
    heads, channels = k.shape[3:]
    rows, cols = make_axes(k.shape, **options)
    values = v.shape[-1]
    chunk = max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * channels <= LANES))
    group = max(n for n in range(1, chunk + 1) if chunk % n == 0 and (n == 1 or n * values <= LANES))
    value_lanes = group * values
    if group < heads:
        value_lanes = _round_up(value_lanes, LANES)
    if cols.queries % SUBLANES:
        query_rows, query_cols = 1, _round_up(rows.queries * cols.queries, SUBLANES)
    else:
        query_rows, query_cols = rows.queries, cols.queries
    return Plan(
        rows=rows, cols=cols, heads=heads, channels=channels, values=values, chunk=chunk, group=group, value_lanes=value_lanes,
        key_cols=_round_up(cols.keys, SUBLANES), query_rows=query_rows, query_cols=query_cols,
        offsets=_round_up(max(axis.block - 1 + axis.keys for axis in (rows, cols)) + SUBLANES - 1, SUBLANES),
        scale=float(logits_scale), dtype=jnp.result_type(q.dtype, k.dtype, v.dtype).name,
    )  # fmt: skip


def _round_up(value, multiple):
    return -(-value // multiple) * multiple


# Layouts. All begin with the batch and have columns of blocks as the third axis, channels as the last.


def _lay_pixels(plan, x):
    """`[B, H, W, N, D] -> [B, H, J, block, N * D]`."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, plan.cols.blocks * plan.cols.block - plan.cols.size), (0, 0), (0, 0)))
    return x.reshape(*x.shape[:2], plan.cols.blocks, plan.cols.block, -1)


def _group_values(plan, v):
    """`[B, H, W, N, E] -> [B, H, W, N / group, value_lanes]`."""
    v = v.reshape(*v.shape[:3], -1, plan.group * plan.values)
    return jnp.pad(v, ((0, 0),) * 4 + ((0, plan.value_lanes - v.shape[-1]),))


def _lay_queries(plan, q):
    """`[B, H, W, N, D] -> [B, I * query_rows, J, query_cols, N * D]`, H and W at the output's resolution."""
    rows, cols = plan.rows, plan.cols
    q = q.reshape(*q.shape[:3], -1)
    q = jnp.pad(q, ((0, 0), rows.query_padding, cols.query_padding, (0, 0)))
    if plan.query_rows > 1:
        return q.reshape(*q.shape[:2], cols.blocks, cols.queries, -1)
    q = q.reshape(-1, rows.blocks, rows.queries, cols.blocks, cols.queries, q.shape[-1]).transpose(0, 1, 3, 2, 4, 5)
    q = q.reshape(-1, rows.blocks, cols.blocks, rows.queries * cols.queries, q.shape[-1])
    return jnp.pad(q, ((0, 0),) * 3 + ((0, plan.query_cols - q.shape[3]), (0, 0)))


def _unlay_out(plan, out, q_shape):
    """`[B, I * query_rows, J, query_cols, chunks * groups * value_lanes] -> [B, H, W, N, E]`."""
    rows, cols = plan.rows, plan.cols
    batch, height, width = q_shape[:3]
    if plan.query_rows == 1:
        out = out[:, :, :, : rows.queries * cols.queries]
        out = out.reshape(batch, rows.blocks, cols.blocks, rows.queries, cols.queries, -1).transpose(0, 1, 3, 2, 4, 5)
    out = out.reshape(batch, rows.blocks * rows.queries, cols.blocks * cols.queries, -1, plan.value_lanes)
    out = out[:, :height, :width, :, : plan.group * plan.values]
    return out.reshape(batch, height, width, plan.heads, plan.values)


def _lay_table(plan, table, axis, lane):
    """`[2b + 2h - 1, D / 2 or D or 0] -> [offsets, key_lanes]`: a copy for each head of a chunk, from the head's `lane` on.

    The first row is for a block's last pixel and its window's first key.
    """
    first = axis.center - axis.halo - (axis.block - 1)
    table = table[first : first + axis.block - 1 + axis.keys]
    table = jnp.pad(table, ((0, plan.offsets - table.shape[0]), (lane, plan.channels - lane - table.shape[1])))
    return jnp.tile(table, (1, plan.chunk))


def _shifts(plan):
    """`[2, M]` int32: how far each stacked query's row and column are, to the tables, before the block's last."""
    pixel = np.minimum(np.arange(plan.block_queries), plan.rows.queries * plan.cols.queries - 1)
    indices = np.divmod(pixel, plan.cols.queries)
    shifts = [axis.block - 1 - index * axis.table_step for axis, index in zip((plan.rows, plan.cols), indices)]
    return jnp.asarray(np.tile(np.stack(shifts), (1, plan.group)), jnp.int32)


def _codes(plan):
    """`[sum(code_rows), K]`: transposed one-hot codes of each key's row, then of its column."""
    row, col = np.divmod(np.arange(plan.window), plan.key_cols)
    return jnp.asarray(np.concatenate([np.arange(n)[:, None] == x for n, x in zip(plan.code_rows, (row, col))]), plan.dtype)


# The operator on laid-out arrays, and its gradient.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(plan, interpret, q, k, v, tables):
    return _attend_forward(plan, interpret, q, k, v, tables)[0]


def _attend_forward(plan, interpret, q, k, v, tables):
    run, shapes = (functools.partial(f, plan) for f in (_run_forward, _forward_shapes))
    out, lse = per_device(run, (q, k, v, tables, _shifts(plan)), shapes, "tpu", whole=(3, 4), interpret=interpret)
    return out, (q, k, v, tables, lse)


def _attend_backward(plan, interpret, kept, dout):
    q, k, v, tables, lse = kept
    run, shapes = (functools.partial(f, plan) for f in (_run_backward, _backward_shapes))
    arrays = q, k, v, tables, _shifts(plan), _codes(plan), lse, dout
    dq, dk, dv, dtables = per_device(run, arrays, shapes, "tpu", whole=(3, 4, 5), interpret=interpret)
    return dq, dk, dv, dtables.sum((0, 1)).astype(plan.dtype)


_attend.defvjp(_attend_forward, _attend_backward)


def _forward_shapes(plan, q, k, v, *_):
    lse = q.shape[0], plan.chunks, plan.cols.blocks, plan.rows.blocks, plan.groups, plan.stacked
    return jax.ShapeDtypeStruct(q.shape[:-1] + v.shape[-1:], v.dtype), jax.ShapeDtypeStruct(lse, jnp.float32)


def _backward_shapes(plan, q, k, v, tables, *_):
    dtables = jax.ShapeDtypeStruct((q.shape[0], plan.chunks, *tables.shape), jnp.float32)
    return *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)), dtables


def _run_forward(plan, interpret, q, k, v, tables, shifts):
    lookahead = int(plan.cols.halo > 0)
    ahead, here = (_columns(plan, lag) for lag in (0, lookahead))
    out, lse = shapes = _forward_shapes(plan, q, k, v)
    return pl.pallas_call(
        functools.partial(kernels.forward_kernel, plan),
        grid=(q.shape[0], plan.chunks, plan.cols.blocks + lookahead),
        in_specs=[here(q), ahead(k), ahead(v), _whole(tables), _whole(shifts)],
        out_specs=[here(out), _lse_columns(plan, lookahead)],
        out_shape=shapes,
        scratch_shapes=kernels.scratch_shapes(plan, False),
        compiler_params=_compiler_params(plan, False),
        cost_estimate=_cost(plan, (q, k, v, tables, out, lse), backward=False),
        interpret=interpret,
        name="halo_attention_forward",
    )(q, k, v, tables, shifts)


def _run_backward(plan, interpret, q, k, v, tables, shifts, codes, lse, dout):
    lookahead = int(plan.cols.halo > 0)
    ahead, here, behind = (_columns(plan, lag) for lag in (0, lookahead, 2 * lookahead))
    *_, dtables = shapes = _backward_shapes(plan, q, k, v, tables)
    return pl.pallas_call(
        functools.partial(kernels.backward_kernel, plan),
        grid=(q.shape[0], plan.chunks, plan.cols.blocks + 2 * lookahead),
        in_specs=[
            here(q), ahead(k), ahead(v), _whole(tables), _whole(shifts), _whole(codes), _lse_columns(plan, lookahead), here(dout),
        ],
        out_specs=[here(q), behind(k), behind(v), pl.BlockSpec((None, None, *tables.shape), lambda n, c, s: (n, c, 0, 0, 0))],
        out_shape=shapes,
        scratch_shapes=kernels.scratch_shapes(plan, True),
        compiler_params=_compiler_params(plan, True),
        cost_estimate=_cost(plan, (q, q, k, k, v, v, dout, tables, lse, dtables), backward=True),
        interpret=interpret,
        name="halo_attention_backward",
    )(q, k, v, tables, shifts, codes, lse, dout)  # fmt: skip


def _columns(plan, lag):
    """Makes specs of one image's column of blocks, a chunk of its heads, `lag` grid steps late."""

    def spec(x):
        block = None, x.shape[1], None, x.shape[3], x.shape[4] // plan.chunks
        return pl.BlockSpec(block, lambda n, c, s: (n, 0, jnp.clip(s - lag, 0, plan.cols.blocks - 1), 0, c))

    return spec


def _lse_columns(plan, lag):
    block = None, None, None, plan.rows.blocks, plan.groups, plan.stacked
    return pl.BlockSpec(block, lambda n, c, s: (n, c, jnp.clip(s - lag, 0, plan.cols.blocks - 1), 0, 0, 0))


def _whole(x):
    return pl.BlockSpec(x.shape, lambda n, c, s: (0,) * x.ndim)


def _compiler_params(plan, backward):
    # Columns come in order; the rest is independent.
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=max(16 * 2**20, vmem_estimate(plan, backward)),
    )


def _cost(plan, arrays, backward):
    if not isinstance(arrays[0].shape[0], int):
        return None  # the cost of a symbolic batch is no number
    logits = arrays[0].shape[0] * plan.rows.blocks * plan.cols.blocks * plan.heads * plan.block_queries * plan.window
    key_lanes, value_lanes = (_round_up(n, LANES) for n in (plan.key_lanes, plan.value_lanes))
    products = 3 * key_lanes + 2 * value_lanes if backward else key_lanes + value_lanes
    return pl.CostEstimate(
        flops=2 * logits * products, transcendentals=logits, bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays)
    )


def vmem_estimate(plan: Plan, backward: bool) -> int:
    """Returns the on-chip memory of a kernel in bytes: bands, two copies of each block on its way, and temporaries.

    Args:
        plan: of the kernel.
        backward: whether it is the backward kernel.
    """
    itemsize = jnp.dtype(plan.dtype).itemsize
    tiled = lambda itemsize, *shape: (
        itemsize * math.prod(shape[:-2]) * _round_up(shape[-2], SUBLANES * 4 // itemsize) * _round_up(shape[-1], LANES)
    )
    bands = sum(tiled(4, *scratch.shape) for scratch in kernels.scratch_shapes(plan, backward))
    key_lanes, value_lanes = plan.key_lanes, plan.groups * plan.value_lanes
    pixels = sum(tiled(itemsize, plan.rows.size, plan.cols.block, n) for n in (key_lanes, value_lanes))
    queries = sum(tiled(itemsize, plan.rows.blocks * plan.query_rows, plan.query_cols, n) for n in (key_lanes, value_lanes))
    moving = 2 * (pixels + queries) * (1 + backward)
    moving -= 2 * backward * tiled(itemsize, plan.rows.blocks * plan.query_rows, plan.query_cols, value_lanes)
    logits = tiled(4, plan.window, plan.stacked)
    # libtpu 0.0.52 takes less than this for the layers of H0 to H7 on v4 and v5e, by up to a third.
    return (bands + moving) * 13 // 10 + 3 * logits + 2**19
