"""GPU kernels of halo attention through Pallas and Triton, forward and backward: windows and logits live in registers only.

A program of `forward_kernel` and of `dq_kernel` has a tile of one block's queries and loops over the keys of its window; a
program of `dkv_kernel` has a patch of key pixels and loops over the blocks whose windows see it, so that gradients of overlapping
windows meet in one program's registers, always in the same order. Pixels are read where they lie, `[H * W, N * D]` of an image.

Logits of the position come in as `[pixels, 2T]` (`T` offsets of rows, then of columns): the product of each query and each
entry of the relative tables. A program reads those that its window needs, `[Q, C]`: one for each row and each column of the
window. The product with one-hot codes `[C, K]` of the keys' rows and columns spreads them over the keys on the tensor cores.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

MASKED = -1e30  # finite, so that a tile of masked keys alone gives no NaN; the next unmasked one makes it weigh nothing
LOG2_E = math.log2(math.e)


class Axis(NamedTuple):
    """Geometry of one map axis."""

    size: int  # pixels of the map
    blocks: int
    block: int  # pixels per block
    halo: int
    queries: int  # per block
    outputs: int  # queries on the map

    @property
    def keys(self):
        return self.block + 2 * self.halo


class Tiles(NamedTuple):
    """What a program works on at a time; speed depends on it, results do not (but for the order of sums)."""

    queries: int
    keys: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """All that the kernels know at compile time."""

    rows: Axis
    cols: Axis
    stride: int
    heads: int
    channels: int
    values: int
    offsets: int  # rows of a relative table, T
    center: int  # the row for offset 0
    reach: int | None  # keys farther from the query are masked
    masked: bool  # whether keys outside of the map are masked
    scale: float
    dtype: str
    forward: Tiles
    dq: Tiles
    dkv: Tiles
    patch: tuple[int, int]  # rows and columns of keys in a program of dK and dV

    @property
    def codes(self):
        return pl.next_power_of_2(self.rows.keys + self.cols.keys)

    @property
    def patches(self):
        """Of rows and columns. The first begins before the map, so that some patches begin where windows do."""
        return tuple(pl.cdiv(axis.size + axis.halo % patch, patch) for axis, patch in zip((self.rows, self.cols), self.patch))


def forward_kernel(plan: Plan, q_ref, k_ref, v_ref, position_ref, out_ref, lse_ref):
    """Attends from a tile of queries to its window; keeps the base-2 log-sum-exp of the scaled logits."""
    tiles = plan.forward
    i, j, y, x, pixels, inside = _queries_of_program(plan, tiles)
    q = _load(q_ref, pixels, inside)
    position = _split(_load_position(plan, position_ref, y, x, pixels, inside), q.dtype)

    def step(n, carry):
        out, total, top = carry
        r, s, key_pixels, on_map, seen = _window_keys(plan, tiles, i, j, n)
        k, v = (_load(ref, key_pixels, on_map) for ref in (k_ref, v_ref))
        logits = sum((_dot(part, _codes(plan, r, s, q.dtype), 1, 0) for part in position), _dot(q, k, 1, 1))
        logits = _scale(plan, logits, y[:, None], x[:, None], r[None], s[None], seen[None])
        new_top = jnp.maximum(top, logits.max(1))
        weights = jnp.exp2(logits - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v, 1, 0)
        return out, total * shrink + weights.sum(1), new_top

    out = jnp.zeros((tiles.queries, pl.next_power_of_2(plan.values)), jnp.float32)
    zeros = jnp.zeros(tiles.queries, jnp.float32)
    out, total, top = lax.fori_loop(0, _window_steps(plan, tiles), step, (out, zeros, zeros + MASKED))
    _store(out_ref, pixels, inside, out / total[:, None])
    plgpu.store(lse_ref.at[pixels], top + jnp.log2(total), mask=inside)


def dq_kernel(plan: Plan, q_ref, k_ref, v_ref, position_ref, lse_ref, delta_ref, dout_ref, dq_ref, dposition_ref):
    """Gradients of a tile of queries, without what comes through the position logits, and of its position logits."""
    tiles = plan.dq
    i, j, y, x, pixels, inside = _queries_of_program(plan, tiles)
    q, dout = (_load(ref, pixels, inside) for ref in (q_ref, dout_ref))
    lse, delta = (plgpu.load(ref.at[pixels], mask=inside, other=0.0) for ref in (lse_ref, delta_ref))
    position = _split(_load_position(plan, position_ref, y, x, pixels, inside), q.dtype)

    def step(n, carry):
        dq, dposition = carry
        r, s, key_pixels, on_map, seen = _window_keys(plan, tiles, i, j, n)
        k, v = (_load(ref, key_pixels, on_map) for ref in (k_ref, v_ref))
        codes = _codes(plan, r, s, q.dtype)
        logits = sum((_dot(part, codes, 1, 0) for part in position), _dot(q, k, 1, 1))
        weights = jnp.exp2(_scale(plan, logits, y[:, None], x[:, None], r[None], s[None], seen[None]) - lse[:, None])
        dlogits = (weights * (_dot(dout, v, 1, 1) - delta[:, None])).astype(q.dtype)
        return dq + _dot(dlogits, k, 1, 0), dposition + _dot(dlogits, codes, 1, 1)

    dq = jnp.zeros((tiles.queries, pl.next_power_of_2(plan.channels)), jnp.float32)
    dposition = jnp.zeros((tiles.queries, plan.codes), jnp.float32)
    dq, dposition = lax.fori_loop(0, _window_steps(plan, tiles), step, (dq, dposition))
    _store(dq_ref, pixels, inside, dq * plan.scale)
    _store_position(plan, dposition_ref, y, x, pixels, inside, dposition * plan.scale)


def dkv_kernel(plan: Plan, q_ref, k_ref, v_ref, position_ref, lse_ref, delta_ref, dout_ref, dk_ref, dv_ref):
    """Gradients of a patch of keys and values. Logits stand transposed, `[K, Q]`, as the products with them need them."""
    tiles = plan.dkv
    patch_row, patch_col = _divmod(pl.program_id(1), plan.patches[1])
    top, left = (n * patch - axis.halo % patch for n, patch, axis in
                 zip((patch_row, patch_col), plan.patch, (plan.rows, plan.cols)))  # fmt: skip
    row, col = _divmod(jnp.arange(tiles.keys, dtype=jnp.int32), plan.patch[1])
    row, col = row + top, col + left
    key_pixels, on_map = _pixels(row, col, plan.rows.size, plan.cols.size)
    k, v = (_load(ref, key_pixels, on_map) for ref in (k_ref, v_ref))

    first_i, count_i = _blocks_seeing(plan.rows, top, plan.patch[0])
    first_j, count_j = _blocks_seeing(plan.cols, left, plan.patch[1])
    steps = pl.cdiv(plan.rows.queries * plan.cols.queries, tiles.queries)

    def step(n, carry):
        dk, dv = carry
        block, tile = _divmod(n, steps)
        i, j = _divmod(block, count_j)
        i, j = i + first_i, j + first_j
        y, x, pixels, inside = _queries(plan, tiles, i, j, tile)
        q, dout = (_load(ref, pixels, inside) for ref in (q_ref, dout_ref))
        lse, delta = (plgpu.load(ref.at[pixels], mask=inside, other=0.0) for ref in (lse_ref, delta_ref))
        r, s = row - (i * plan.rows.block - plan.rows.halo), col - (j * plan.cols.block - plan.cols.halo)
        seen = on_map & (r >= 0) & (r < plan.rows.keys) & (s >= 0) & (s < plan.cols.keys)
        codes = _codes(plan, r, s, q.dtype)
        position = _split(_load_position(plan, position_ref, y, x, pixels, inside), q.dtype)
        logits = sum((_dot(codes, part, 0, 1) for part in position), _dot(k, q, 1, 1))
        weights = jnp.exp2(_scale(plan, logits, y[None], x[None], r[:, None], s[:, None], seen[:, None]) - lse[None])
        dlogits = (weights * (_dot(v, dout, 1, 1) - delta[None])).astype(q.dtype)
        return dk + _dot(dlogits, q, 1, 0), dv + _dot(weights.astype(q.dtype), dout, 1, 0)

    zeros = (jnp.zeros((tiles.keys, pl.next_power_of_2(width)), jnp.float32) for width in (plan.channels, plan.values))
    dk, dv = lax.fori_loop(0, count_i * count_j * steps, step, tuple(zeros))
    _store(dk_ref, key_pixels, on_map, dk * plan.scale)
    _store(dv_ref, key_pixels, on_map, dv)


# Where things are. Indices are int32 vectors: over queries y and x, a query's pixel of the block (at full resolution); over keys
# r and s, a key's row and column of the window. `pixels` index the map's pixels in memory, at the output's resolution for queries.


def _queries_of_program(plan, tiles):
    block, tile = _divmod(pl.program_id(1), pl.cdiv(plan.rows.queries * plan.cols.queries, tiles.queries))
    i, j = _divmod(block, plan.cols.blocks)
    return i, j, *_queries(plan, tiles, i, j, tile)


def _queries(plan, tiles, i, j, tile):
    flat = tile * tiles.queries + jnp.arange(tiles.queries, dtype=jnp.int32)
    y, x = _divmod(flat, plan.cols.queries)
    pixels, inside = _pixels(
        i * plan.rows.queries + y, j * plan.cols.queries + x, plan.rows.outputs, plan.cols.outputs
    )  # fmt: skip
    inside &= y < plan.rows.queries
    # Others lie beyond the map's end in memory: where kernels are interpreted, a masked store must not hit another's pixel.
    return y * plan.stride, x * plan.stride, jnp.where(inside, pixels, plan.rows.outputs * plan.cols.outputs), inside


def _window_steps(plan, tiles):
    return pl.cdiv(plan.rows.keys * plan.cols.keys, tiles.keys)


def _window_keys(plan, tiles, i, j, n):
    r, s = _divmod(n * tiles.keys + jnp.arange(tiles.keys, dtype=jnp.int32), plan.cols.keys)
    row, col = i * plan.rows.block - plan.rows.halo + r, j * plan.cols.block - plan.cols.halo + s
    pixels, on_map = _pixels(row, col, plan.rows.size, plan.cols.size)
    in_window = r < plan.rows.keys
    on_map &= in_window
    return r, s, pixels, on_map, on_map if plan.masked else in_window


def _pixels(row, col, height, width):
    inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
    return jnp.where(inside, row * width + col, height * width), inside


def _blocks_seeing(axis, start, patch):
    """The first block whose window has one of the keys from `start` on, and how many blocks' have."""
    first = lax.div(jnp.maximum(start - axis.halo, 0), jnp.int32(axis.block))
    last = jnp.minimum(lax.div(start + (patch - 1 + axis.halo), jnp.int32(axis.block)), axis.blocks - 1)
    return first, last - first + 1


def _scale(plan, logits, y, x, r, s, seen):
    """Logits to the base 2, scaled, and masked where pairs of the given queries and keys are."""
    if plan.reach is not None:
        seen = seen & (abs(r - plan.rows.halo - y) <= plan.reach) & (abs(s - plan.cols.halo - x) <= plan.reach)
    return jnp.where(seen, logits * (plan.scale * LOG2_E), MASKED)


def _divmod(a, b):
    """Of numbers that are not negative, which spares the case."""
    return lax.div(a, jnp.int32(b)), lax.rem(a, jnp.int32(b))


# Memory and products.


def _load(ref, pixels, inside):
    """`[K]` pixels of `[H * W, D]`: `[K, D]`, D rounded up to a power of two; zeros where not inside."""
    index, mask = _grid(ref, pixels, inside)
    return plgpu.load(ref.at[index], mask=mask, other=0.0)


def _store(ref, pixels, inside, values):
    index, mask = _grid(ref, pixels, inside)
    plgpu.store(ref.at[index], values.astype(ref.dtype), mask=mask)


def _grid(ref, pixels, inside):
    channels = jnp.arange(pl.next_power_of_2(ref.shape[1]), dtype=jnp.int32)
    shape = len(pixels), len(channels)
    mask = jnp.broadcast_to(inside[:, None], shape)
    if shape[1] != ref.shape[1]:
        mask &= (channels < ref.shape[1])[None]
    return (jnp.broadcast_to(pixels[:, None], shape), jnp.broadcast_to(channels[None], shape)), mask


def _position_grid(plan, y, x, pixels, inside):
    """Index and mask of each query's position logits for its window's rows, then columns: `[Q, C]` of `[pixels, 2T]`."""
    code = jnp.arange(plan.codes, dtype=jnp.int32)
    rows, cols = plan.rows, plan.cols
    for_row = code < rows.keys
    first = jnp.where(for_row, plan.center - rows.halo, plan.offsets + plan.center - cols.halo - rows.keys)
    offset = (first + code)[None] - jnp.where(for_row[None], y[:, None], x[:, None])
    mask = inside[:, None] & (code < rows.keys + cols.keys)[None]
    return (jnp.broadcast_to(pixels[:, None], offset.shape), jnp.where(mask, offset, 2 * plan.offsets)), mask


def _load_position(plan, ref, y, x, pixels, inside):
    index, mask = _position_grid(plan, y, x, pixels, inside)
    return plgpu.load(ref.at[index], mask=mask, other=0.0)


def _store_position(plan, ref, y, x, pixels, inside, dposition):
    """Stores at the offsets of the window, and zeros at the others."""
    index, mask = _position_grid(plan, y, x, pixels, inside)
    plgpu.store(ref.at[index], dposition.astype(ref.dtype), mask=mask)
    (rows, offset), mask = _grid(ref, pixels, inside)
    for_row = offset < plan.offsets
    r = offset - plan.center + y[:, None] + plan.rows.halo
    s = offset - (plan.offsets + plan.center) + x[:, None] + plan.cols.halo
    stored = (for_row & (r >= 0) & (r < plan.rows.keys)) | (~for_row & (s >= 0) & (s < plan.cols.keys))
    mask &= ~stored
    index = rows, jnp.where(mask, offset, 2 * plan.offsets)
    plgpu.store(ref.at[index], jnp.zeros(mask.shape, ref.dtype), mask=mask)


def _codes(plan, r, s, dtype):
    """`[C, K]`: one-hot codes of each key's row, then of its column."""
    code = jnp.arange(plan.codes, dtype=jnp.int32)[:, None]
    return ((code == r[None]) | (code == s[None] + plan.rows.keys)).astype(dtype)


def _split(x, dtype):
    """Parts in `dtype` that sum up to float32 `x`, to twice the bits of bfloat16."""
    if dtype == jnp.float32:
        return (x,)
    high = x.astype(dtype)
    return high, (x - high.astype(jnp.float32)).astype(dtype)


def _dot(a, b, a_axis, b_axis):
    """Product over one axis of each, in float32: of float32 numbers to all bits, without TensorFloat-32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
