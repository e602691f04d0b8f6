"""Halo attention fused for GPU: the calls around the kernels of `gpu_kernels`.

Queries, keys and values keep their layout. Gradients of the relative tables are sums over all queries. The kernels
write the gradient of each query's product with each row of the tables, `2 (2b + 2h - 1)` numbers, and two matrix
products by XLA do the rest. The backward pass keeps the operator's inputs and output and the log-sum-exp of each query,
and computes the rest again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from halonet_jax.ops import gpu_kernels as kernels
from halonet_jax.ops.geometry import make_axes
from halonet_jax.ops.gpu_kernels import Plan, Tiles
from halonet_jax.ops.platforms import per_device

MAX_CHANNELS = 256  # of queries or values: what a program can hold


def attend(
    q, k, v, rel_rows, rel_cols, *, block_size, halo_size, stride, centered, masked, logits_scale, adjacent=False, interpret=True
):  # fmt: skip
    """Attends by kernels. On platforms other than CUDA they are interpreted: correct, but slow.

    Products of float32 inputs are in full float32, without TensorFloat-32: exact, and several times slower than
    bfloat16.

    Args:
        q, k, v, rel_rows, rel_cols, block_size, halo_size, stride, centered, masked, logits_scale, adjacent: as of
            `reference.attend`.
        interpret: False: the result is zeros on platforms other than CUDA, for callers that do not use it there.

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
        raise ValueError(f'implementation="pallas" cannot do this: {reason}; use "xla" or "auto"')
    plan = make_plan(q, k, v, **options, logits_scale=logits_scale)
    beside = plan.channels - rel_rows.shape[1]  # channels that the other table has
    tables = jnp.concatenate([jnp.pad(rel_rows, ((0, 0), (0, beside))), jnp.pad(rel_cols, ((0, 0), (beside, 0)))])  # [2T, D]
    q, k, v, tables = (x.astype(plan.dtype) for x in (q, k, v, tables))
    out = _attend(plan, interpret, *(x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (q, k, v)), tables)
    return out.reshape(*q.shape[:4], -1).astype(v.dtype)


def unsupported(q, k, v, *, block_size, halo_size, stride=1, centered=False, masked=True, adjacent=False) -> str | None:
    """Returns why the kernels cannot attend like this, or None if they can.

    Args:
        q, k, v: arrays, or anything with their shapes and dtypes, as of `halo_attention`.
        block_size, halo_size, stride, centered, masked, adjacent: as of `reference.attend`.
    """
    if kernels.plgpu is None:
        return f"JAX {jax.__version__} has no Triton in Pallas"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}, not float32 or bfloat16"
        if x.shape[-1] > MAX_CHANNELS:
            return f"{name} has {x.shape[-1]} channels per head, more than {MAX_CHANNELS}"
    rows, cols = make_axes(k.shape, block_size=block_size, halo_size=halo_size, stride=stride, centered=centered, masked=masked)
    if rows.keys + cols.keys > 256:
        return f"windows of {rows.keys} x {cols.keys} keys have more than 256 rows and columns"
    return None


def make_plan(q, k, v, *, logits_scale, **options) -> Plan:
    """Chooses how the work is cut.

    Args:
        q, k, v: arrays, or anything with their shapes and dtypes, as of `halo_attention`.
        logits_scale, **options: as of `reference.attend`.
    """
    heads, channels = k.shape[3:]
    rows, cols = make_axes(k.shape, **options)
    dtype = jnp.result_type(q.dtype, k.dtype, v.dtype)
    forward, dq, dkv, patch = _tiles(rows, cols, channels, v.shape[-1], dtype.itemsize)
    return Plan(
        rows=rows, cols=cols, heads=heads, channels=channels, values=v.shape[-1], offsets=2 * rows.center + 1,
        scale=float(logits_scale), dtype=dtype.name, forward=forward, dq=dq, dkv=dkv, patch=patch,
    )  # fmt: skip


# Speed only. Products and tiles want at least 16 on each side, and powers of two.


def _tiles(rows, cols, channels, values, itemsize):
    """Returns `Tiles` of the three kernels, and the patch of keys.

    Small tiles fit blocks better; large ones keep tensor cores busy. They are chosen by what Triton's compiler makes of
    them for A100, L4 and H100: next to no registers spilled in bfloat16, and no more shared memory than the GPU has
    (`scripts/gpu/check_gpu_kernels.py`). They are not tuned on a GPU.
    """
    width = pl.next_power_of_2(channels) + pl.next_power_of_2(values)
    narrow = width * itemsize <= 320
    queries, keys, stages = rows.queries * cols.queries, 64 if narrow else 32, 2 if width * itemsize <= 640 else 1
    largest = 128 if narrow else 64
    tile = min((n for n in (16, 32, 64, 128) if n <= largest), key=lambda n: pl.cdiv(queries, n) * (n + 32))
    backward_tile = min(tile, largest // 2)
    patch = _patch(rows, cols, largest=keys)
    patch_keys = patch[0] * patch[1]

    # A thread then has up to 64 numbers of logits and sums. float32 products use no tensor cores.
    def warps(tile, other):
        return min(8, pl.next_power_of_2(pl.cdiv(tile * (other + width) * itemsize, 32 * 64 * 2)))

    return (
        Tiles(tile, keys, warps(tile, keys), stages),
        Tiles(backward_tile, keys, warps(backward_tile, keys), stages),
        Tiles(backward_tile, patch_keys, warps(patch_keys, backward_tile), stages),
        patch,
    )


def _patch(rows, cols, largest):
    """Returns the rows and columns of a patch of keys that meet the queries of their windows with the least waste."""

    def blocks_seeing(axis, patch):  # on average, far from the border
        starts = range(axis.block - axis.halo, axis.block - axis.halo + patch * axis.block, patch)
        return sum((s + patch - 1 + axis.halo) // axis.block - (s - axis.halo) // axis.block + 1 for s in starts) / len(starts)

    def cost(patch):
        size = patch[0] * patch[1]
        return blocks_seeing(rows, patch[0]) * blocks_seeing(cols, patch[1]) * (1 + 32 / size)

    sizes = [(y, x) for y in (2, 4, 8, 16) for x in (2, 4, 8, 16) if 16 <= y * x <= largest]
    return min(sizes, key=cost)


# The operator on `[B, pixels, N, D]`, and its gradient.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(plan, interpret, q, k, v, tables):
    return _attend_forward(plan, interpret, q, k, v, tables)[0]


def _attend_forward(plan, interpret, q, k, v, tables):
    run, shapes = (functools.partial(f, plan) for f in (_run_forward, _forward_shapes))
    out, lse = per_device(run, (q, k, v, tables), shapes, "cuda", whole=(3,), interpret=interpret)
    return out, (q, k, v, tables, out, lse)


def _attend_backward(plan, interpret, kept, dout):
    q, k, v, tables, out, lse = kept
    run, shapes = (functools.partial(f, plan) for f in (_run_backward, _backward_shapes))
    dq, dk, dv, dposition = per_device(run, (q, k, v, tables, lse, out, dout), shapes, "cuda", whole=(3,), interpret=interpret)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    dq = (dq + product("bpnt,td->bpnd", dposition, tables)).astype(q.dtype)
    return dq, dk, dv, product("bpnt,bpnd->td", dposition, q).astype(tables.dtype)


_attend.defvjp(_attend_forward, _attend_backward)


def _forward_shapes(plan, q, k, v, tables):
    batch, pixels, heads, _ = q.shape
    return jax.ShapeDtypeStruct((batch, pixels, heads, plan.values), q.dtype), _floats(batch, heads, pixels)


def _backward_shapes(plan, q, k, v, tables, *_):
    dposition = (*q.shape[:3], tables.shape[0])
    return tuple(jax.ShapeDtypeStruct(shape, q.dtype) for shape in (q.shape, k.shape, v.shape, dposition))


def _run_forward(plan, interpret, q, k, v, tables):
    arrays, results = (q, k, v, kernels.codes(plan), tables), _forward_shapes(plan, q, k, v, tables)
    return _call(plan, kernels.forward_kernel, plan.forward, _query_programs(plan, plan.forward), interpret, arrays, results)


def _run_backward(plan, interpret, q, k, v, tables, lse, out, dout):
    codes, programs = kernels.codes(plan), _query_programs(plan, plan.dq)
    dq, dk, dv, dposition = _backward_shapes(plan, q, k, v, tables)
    batch, _, heads, _ = q.shape
    queries = programs * plan.dq.queries
    statistics = (_floats(batch, heads, queries),) * 2
    parts = (jax.ShapeDtypeStruct((batch, queries, heads, plan.codes), q.dtype),) * plan.parts
    dq, dposition, *of_blocks = _call(
        plan, kernels.dq_kernel, plan.dq, programs, interpret, (q, k, v, codes, tables, lse, out, dout),
        (dq, dposition, *statistics, *parts),
    )  # fmt: skip
    dk, dv = _call(
        plan, kernels.dkv_kernel, plan.dkv, plan.patches[0] * plan.patches[1], interpret, (q, k, v, codes, dout, *of_blocks),
        (dk, dv),
    )  # fmt: skip
    return dq, dk, dv, dposition


def _floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _query_programs(plan, tiles):
    return plan.rows.blocks * plan.cols.blocks * pl.cdiv(plan.rows.queries * plan.cols.queries, tiles.queries)


def _call(plan, kernel, tiles, programs, interpret, arrays, results):
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(plan.heads, programs, arrays[0].shape[0]),  # heads first: those that run at once then share cache lines
        in_specs=[_spec(x) for x in arrays],
        out_specs=[_spec(x) for x in results],
        out_shape=results,
        compiler_params=kernels.plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=f"halo_attention_{kernel.__name__}",
    )(*arrays)


def _spec(x):
    """The pixels of one image and head of `[B, pixels, N, ...]` or `[B, N, pixels]`; all of the codes and tables."""
    if x.ndim == 2:
        return pl.BlockSpec(x.shape, lambda head, program, image: (0, 0))
    if x.ndim == 3:
        return pl.BlockSpec((None, None, x.shape[2]), lambda head, program, image: (image, head, 0))
    return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda head, program, image: (image, 0, head, 0))
