"""GPU kernels of halo attention through Pallas and Triton. Windows and logits are in registers only.

A program of `forward_kernel` and `dq_kernel` has a tile of one block's queries and loops over the keys of its window. A
program of `dkv_kernel` has a patch of key pixels and loops over the blocks whose windows see it. So the gradients of
overlapping windows meet in the registers of one program, always in the same order. Pixels keep their layout,
`[H * W, N * D]` of an image.

Logits of the position are `[Q, C]`: those of each query for the rows and the columns of its window, with a large
negative number for what is masked. Their product with the keys' one-hot codes of row and column, `[K, C]`, spreads them
over the keys. That is work for tensor cores, and leaves little to do for each logit. Their gradients are written as
`[pixels, 2T]`, for each offset of rows, then of columns, as if they were products of each query with each row of the
tables.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from halonet_jax.ops.geometry import Axis

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:  # JAX 0.12 announces that it will go
    plgpu = None

LOG2_E = math.log2(math.e)


class Tiles(NamedTuple):
    """What a program works on at a time. Speed depends on it; results only by the order of sums.

    Attributes:
        queries: of a tile.
        keys: of a tile.
        warps: of a program.
        stages: of Triton's software pipeline.
    """

    queries: int
    keys: int
    warps: int
    stages: int

    def window_steps(self, plan: "Plan") -> int:
        """Returns the number of tiles of keys in a window of the plan."""
        return pl.cdiv(plan.rows.keys * plan.cols.keys, self.keys)

    def ragged(self, plan: "Plan") -> bool:
        """Returns whether the last tile of keys reaches beyond a window of the plan."""
        return plan.rows.keys * plan.cols.keys % self.keys != 0


class Plan(NamedTuple):
    """All that the kernels know at compile time.

    Attributes:
        rows, cols: the map's axes.
        heads: N.
        channels: D.
        values: E.
        offsets: rows of a relative table, T.
        scale: of the logits.
        dtype: name of the dtype of q, k and v.
        forward: tiles of `forward_kernel`.
        dq: tiles of `dq_kernel`.
        dkv: tiles of `dkv_kernel`; it has as many queries as `dq`.
        patch: rows and columns of keys in a program of `dkv_kernel`.
    """

    rows: Axis
    cols: Axis
    heads: int
    channels: int
    values: int
    offsets: int
    scale: float
    dtype: str
    forward: Tiles
    dq: Tiles
    dkv: Tiles
    patch: tuple[int, int]

    @property
    def codes(self) -> int:
        """C, a power of two. Codes beyond those of a window's rows and columns hide keys outside of the window."""
        return pl.next_power_of_2(self.rows.keys + self.cols.keys)

    @property
    def spare_code(self) -> bool:
        """Whether there is a code beyond those of a window's rows and columns."""
        return self.codes > self.rows.keys + self.cols.keys

    @property
    def parts(self) -> int:
        """Number of arrays of `dtype` for the position logits. They keep float32's bits, or twice bfloat16's."""
        return 1 if self.dtype == "float32" else 2

    @property
    def base2_scale(self) -> float:
        """Factor on the logits for a softmax by powers of two."""
        return self.scale * LOG2_E

    @property
    def masked_logit(self) -> float:
        """About -2^30 when scaled. It is a power of two, which no product rounds."""
        return -(2.0 ** (30 - math.ceil(math.log2(self.base2_scale))))

    @property
    def patches(self) -> tuple[int, int]:
        """Number of patches per axis. The first begins before the map, so that some begin where windows do."""
        return tuple(pl.cdiv(axis.size + axis.halo % patch, patch) for axis, patch in zip((self.rows, self.cols), self.patch))


def forward_kernel(plan: Plan, q_ref, k_ref, v_ref, codes_ref, tables_ref, out_ref, lse_ref):
    """Attends from a tile of queries to its window.

    Refs hold one image and head, see the module's docstring.

    Args:
        plan: of the operator.
        q_ref, k_ref, v_ref: `[pixels, D or E]`.
        codes_ref: `[keys, C]`, see `codes`.
        tables_ref: `[2T, D]`, rows before columns.
        out_ref: result, `[pixels, E]`.
        lse_ref: result, `[pixels]` float32: the base-2 log-sum-exp of the scaled logits.
    """
    tiles = plan.forward
    i, j, tile, y, x, pixels, inside = _queries_of_program(plan, tiles)
    q = _load(q_ref, pixels, inside)
    position = _split(plan, _position(plan, tiles, q, tables_ref, i, j, tile, y, x, inside))

    def step(n, carry):
        out, total, top = carry
        key_pixels, on_map, in_window, code = _window_keys(plan, tiles, i, j, n)
        k, v, codes = _load(k_ref, key_pixels, on_map), _load(v_ref, key_pixels, on_map), _load(codes_ref, code)
        logits = sum((_dot(part, codes, 1, 1) for part in position), _dot(q, k, 1, 1))
        if tiles.ragged(plan):
            logits = _hide(plan, logits, in_window[None])
        new_top = jnp.maximum(top, logits.max(1) * plan.base2_scale)
        weights = jnp.exp2(logits * plan.base2_scale - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v, 1, 0)
        return out, total * shrink + weights.sum(1), new_top

    out = jnp.zeros((tiles.queries, pl.next_power_of_2(plan.values)), jnp.float32)
    zeros = jnp.zeros(tiles.queries, jnp.float32)
    # The sum of two masked logits is the least there is.
    carry = out, zeros, zeros + 2 * plan.masked_logit * plan.base2_scale
    out, total, top = lax.fori_loop(0, tiles.window_steps(plan), step, carry)
    _store(out_ref, pixels, inside, out / total[:, None])
    plgpu.store(lse_ref.at[pixels], top + jnp.log2(total), mask=inside)


def dq_kernel(plan: Plan, q_ref, k_ref, v_ref, codes_ref, tables_ref, lse_ref, out_ref, dout_ref, *result_refs):
    """Computes the gradients of a tile of queries, without what comes through the position logits, and of these logits.

    It also writes what `dkv_kernel` needs of each query, in the order of blocks and their queries.

    Args:
        plan: of the operator.
        q_ref, k_ref, v_ref, codes_ref, tables_ref: as of `forward_kernel`.
        lse_ref, out_ref: results of `forward_kernel`.
        dout_ref: gradient of the output, `[pixels, E]`.
        *result_refs: results. The gradients `[pixels, D]` and `[pixels, 2T]`; the log-sum-exp and the product of output
            and its gradient, both `[queries]` float32; the position logits in `plan.parts` parts, each `[queries, C]`.
    """
    dq_ref, dposition_ref, block_lse_ref, block_delta_ref, *part_refs = result_refs
    tiles = plan.dq
    i, j, tile, y, x, pixels, inside = _queries_of_program(plan, tiles)
    q, out, dout = (_load(ref, pixels, inside) for ref in (q_ref, out_ref, dout_ref))
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(1)
    lse = plgpu.load(lse_ref.at[pixels], mask=inside, other=0.0)
    position = _split(plan, _position(plan, tiles, q, tables_ref, i, j, tile, y, x, inside))
    here = pl.program_id(1) * tiles.queries + jnp.arange(tiles.queries, dtype=jnp.int32)
    block_lse_ref[here], block_delta_ref[here] = lse, delta
    for ref, part in zip(part_refs, position):
        _store(ref, here, None, part)

    def step(n, carry):
        dq, dposition = carry
        key_pixels, on_map, in_window, code = _window_keys(plan, tiles, i, j, n)
        k, v, codes = _load(k_ref, key_pixels, on_map), _load(v_ref, key_pixels, on_map), _load(codes_ref, code)
        logits = sum((_dot(part, codes, 1, 1) for part in position), _dot(q, k, 1, 1))
        if tiles.ragged(plan):
            logits = _hide(plan, logits, in_window[None])
        weights = jnp.exp2(logits * plan.base2_scale - lse[:, None])
        dlogits = (weights * (_dot(dout, v, 1, 1) - delta[:, None])).astype(q.dtype)
        return dq + _dot(dlogits, k, 1, 0), dposition + _dot(dlogits, codes, 1, 0)

    dq = jnp.zeros((tiles.queries, pl.next_power_of_2(plan.channels)), jnp.float32)
    dposition = jnp.zeros((tiles.queries, plan.codes), jnp.float32)
    dq, dposition = lax.fori_loop(0, tiles.window_steps(plan), step, (dq, dposition))
    _store(dq_ref, pixels, inside, dq * plan.scale)
    _store_position(plan, dposition_ref, y, x, pixels, inside, dposition * plan.scale)


def dkv_kernel(plan: Plan, q_ref, k_ref, v_ref, codes_ref, dout_ref, lse_ref, delta_ref, *rest):
    """Computes the gradients of a patch of keys and values. Logits are `[K, Q]`, as the products with them need them.

    Args:
        plan: of the operator.
        q_ref, k_ref, v_ref, codes_ref: as of `forward_kernel`.
        dout_ref: gradient of the output, `[pixels, E]`.
        lse_ref, delta_ref: log-sum-exp, and product of output and its gradient, from `dq_kernel`.
        *rest: the parts of the position logits from `dq_kernel`; then the results, like k and v.
    """
    *part_refs, dk_ref, dv_ref = rest
    tiles = plan.dkv
    patch_row, patch_col = _divmod(pl.program_id(1), plan.patches[1])
    top = patch_row * plan.patch[0] - plan.rows.halo % plan.patch[0]
    left = patch_col * plan.patch[1] - plan.cols.halo % plan.patch[1]
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
        _, _, pixels, inside = _queries(plan, tiles, i, j, tile)
        q, dout = (_load(ref, pixels, inside) for ref in (q_ref, dout_ref))
        here = ((i * plan.cols.blocks + j) * steps + tile) * tiles.queries + jnp.arange(tiles.queries, dtype=jnp.int32)
        lse, delta, *parts = lse_ref[here], delta_ref[here], *(_load(ref, here) for ref in part_refs)
        r, s = row - (i * plan.rows.block - plan.rows.halo), col - (j * plan.cols.block - plan.cols.halo)
        codes = _load(codes_ref, _code(plan, r, s))
        logits = sum((_dot(codes, part, 1, 1) for part in parts), _dot(k, q, 1, 1))
        in_window = (r >= 0) & (r < plan.rows.keys) & (s >= 0) & (s < plan.cols.keys)
        logits = _hide(plan, logits, in_window[:, None])
        weights = jnp.exp2(logits * plan.base2_scale - lse[None])
        dlogits = (weights * (_dot(v, dout, 1, 1) - delta[None])).astype(q.dtype)
        return dk + _dot(dlogits, q, 1, 0), dv + _dot(weights.astype(q.dtype), dout, 1, 0)

    zeros = (jnp.zeros((tiles.keys, pl.next_power_of_2(width)), jnp.float32) for width in (plan.channels, plan.values))
    dk, dv = lax.fori_loop(0, count_i * count_j * steps, step, tuple(zeros))
    _store(dk_ref, key_pixels, on_map, dk * plan.scale)
    _store(dv_ref, key_pixels, on_map, dv)


def codes(plan: Plan):
    """Returns the one-hot codes of the keys in a window and a patch around it, `[keys, C]`: of row, then of column.

    Keys outside of the window have the first spare code, or none.

    Args:
        plan: of the operator.
    """
    r, s, code = (
        lax.broadcasted_iota(jnp.int32, (plan.rows.keys + 2 * plan.patch[0], plan.cols.keys + 2 * plan.patch[1], plan.codes), n)
        for n in range(3)
    )
    r, s = r - plan.patch[0], s - plan.patch[1]
    in_window = (r >= 0) & (r < plan.rows.keys) & (s >= 0) & (s < plan.cols.keys)
    hit = jnp.where(in_window, (code == r) | (code == s + plan.rows.keys), code == plan.rows.keys + plan.cols.keys)
    return hit.astype(plan.dtype).reshape(-1, plan.codes)


# Where things are. Indices are int32 vectors. Over queries, y and x are a query's pixel in the block, at full
# resolution. Over keys, r and s are a key's row and column in the window. `pixels` index pixels in memory, for queries
# those of the output.


def _queries_of_program(plan, tiles):
    block, tile = _divmod(pl.program_id(1), pl.cdiv(plan.rows.queries * plan.cols.queries, tiles.queries))
    i, j = _divmod(block, plan.cols.blocks)
    return i, j, tile, *_queries(plan, tiles, i, j, tile)


def _queries(plan, tiles, i, j, tile):
    flat = tile * tiles.queries + jnp.arange(tiles.queries, dtype=jnp.int32)
    y, x = _divmod(flat, plan.cols.queries)
    row, col = i * plan.rows.queries + y, j * plan.cols.queries + x
    pixels, inside = _pixels(row, col, plan.rows.outputs, plan.cols.outputs)
    inside &= y < plan.rows.queries
    # Others get an index after the map's end: if kernels are interpreted, a masked store must not hit another's pixel.
    return y * plan.rows.stride, x * plan.cols.stride, jnp.where(inside, pixels, plan.rows.outputs * plan.cols.outputs), inside


def _window_keys(plan, tiles, i, j, n):
    r, s = _divmod(n * tiles.keys + jnp.arange(tiles.keys, dtype=jnp.int32), plan.cols.keys)
    row, col = i * plan.rows.block - plan.rows.halo + r, j * plan.cols.block - plan.cols.halo + s
    pixels, on_map = _pixels(row, col, plan.rows.size, plan.cols.size)
    in_window = r < plan.rows.keys
    return pixels, on_map & in_window, in_window, jnp.where(in_window, _code(plan, r, s), 0)


def _code(plan, r, s):
    return (r + plan.patch[0]) * (plan.cols.keys + 2 * plan.patch[1]) + s + plan.patch[1]


def _pixels(row, col, height, width):
    inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
    return jnp.where(inside, row * width + col, height * width), inside


def _blocks_seeing(axis, start, patch):
    """The first block whose window has one of the keys from `start` on, and how many blocks' have."""
    first, _ = _divmod(jnp.maximum(start - axis.halo, 0), axis.block)
    last, _ = _divmod(start + patch - 1 + axis.halo, axis.block)
    return first, jnp.minimum(last, axis.blocks - 1) - first + 1


def _divmod(a, b):
    """Returns quotient and remainder of numbers that are not negative."""
    return lax.div(a, jnp.int32(b)), lax.rem(a, jnp.int32(b))


# Memory and products.


def _load(ref, pixels, inside=None):
    """`[K]` pixels of `[H * W, D]`: `[K, D]`, D rounded up to a power of two; zeros where not inside."""
    index, mask = _grid(ref, pixels, inside)
    return plgpu.load(ref.at[index], mask=mask, other=None if mask is None else 0.0)


def _store(ref, pixels, inside, values):
    index, mask = _grid(ref, pixels, inside)
    plgpu.store(ref.at[index], values.astype(ref.dtype), mask=mask)


def _grid(ref, pixels, inside):
    width = ref.shape[1]
    channels = jnp.arange(pl.next_power_of_2(width), dtype=jnp.int32)
    shape = len(pixels), len(channels)
    mask = None if inside is None else jnp.broadcast_to(inside[:, None], shape)
    if len(channels) != width:
        mask &= (channels < width)[None]
    return (jnp.broadcast_to(pixels[:, None], shape), jnp.broadcast_to(channels[None], shape)), mask


def _first_offsets(plan, y, x):
    """Returns where the window's offsets begin among those of rows and of columns, for each query."""
    if plan.rows.table_step != plan.rows.stride:  # of the two, 1
        y, x = (_divmod(pixel, axis.stride)[0] for pixel, axis in ((y, plan.rows), (x, plan.cols)))
    return plan.rows.center - plan.rows.halo - y, plan.cols.center - plan.cols.halo - x


def _window_offsets(plan, y, x, pixels):
    """Index of each query's position logits for its window's rows, then columns: `[Q, C]` of `[pixels, 2T]`."""
    code = jnp.arange(plan.codes, dtype=jnp.int32)[None]
    first_row, first_col = (first[:, None] for first in _first_offsets(plan, y, x))
    offset = code + jnp.where(code < plan.rows.keys, first_row, first_col + (plan.offsets - plan.rows.keys))
    offset = jnp.where(code < plan.rows.keys + plan.cols.keys, offset, 2 * plan.offsets)
    return jnp.broadcast_to(pixels[:, None], offset.shape), offset


def _position(plan, tiles, q, tables_ref, i, j, tile, y, x, inside):
    """Returns each query's position logits for the rows, then the columns of its window, `[Q, C]`, masked.

    Queries of one row of the block share their row offsets. For each row, all queries are multiplied with the rows of
    the table that this row needs, and its queries keep their products. The same holds for columns.
    """
    code = jnp.arange(plan.codes, dtype=jnp.int32)
    is_row, is_col = code < plan.rows.keys, (code >= plan.rows.keys) & (code < plan.rows.keys + plan.cols.keys)
    r, s = code, code - plan.rows.keys

    def add_row(n, logits):
        table = _load(tables_ref, r + plan.rows.center - plan.rows.halo - n * plan.rows.table_step, is_row)
        return jnp.where((y == n * plan.rows.stride)[:, None], _dot(q, table, 1, 1), logits)

    def add_col(n, logits):
        table = _load(tables_ref, s + plan.offsets + plan.cols.center - plan.cols.halo - n * plan.cols.table_step, is_col)
        return jnp.where((x == n * plan.cols.stride)[:, None], logits + _dot(q, table, 1, 1), logits)

    first, _ = _divmod(tile * tiles.queries, plan.cols.queries)
    last, _ = _divmod(tile * tiles.queries + tiles.queries - 1, plan.cols.queries)
    logits = jnp.zeros((tiles.queries, plan.codes), jnp.float32)
    logits = lax.fori_loop(first, jnp.minimum(last + 1, plan.rows.queries), add_row, logits)
    logits = lax.fori_loop(0, plan.cols.queries, add_col, logits)

    if plan.rows.masked:
        row, col = i * plan.rows.block - plan.rows.halo + r, j * plan.cols.block - plan.cols.halo + s
        is_row &= (row >= 0) & (row < plan.rows.size)
        is_col &= (col >= 0) & (col < plan.cols.size)
    seen = inside[:, None] & (is_row | is_col)[None]
    if plan.rows.reach is not None:
        distance = jnp.where(is_row[None], (r - plan.rows.halo)[None] - y[:, None], (s - plan.cols.halo)[None] - x[:, None])
        seen &= abs(distance) <= plan.rows.reach
    return jnp.where(seen, logits, plan.masked_logit)


def _store_position(plan, ref, y, x, pixels, inside, dposition):
    """Stores at the offsets of the window, and zeros at the others."""
    index = _window_offsets(plan, y, x, pixels)
    code = jnp.arange(plan.codes, dtype=jnp.int32)
    mask = inside[:, None] & (code < plan.rows.keys + plan.cols.keys)[None]
    plgpu.store(ref.at[index], dposition.astype(ref.dtype), mask=mask)

    other_rows, other_cols = plan.offsets - plan.rows.keys, plan.offsets - plan.cols.keys
    if other_rows + other_cols == 0:
        return
    code = jnp.arange(pl.next_power_of_2(other_rows + other_cols), dtype=jnp.int32)[None]
    first_row, first_col = (first[:, None] for first in _first_offsets(plan, y, x))
    row, col = code, code - other_rows
    row, col = (other + jnp.where(other < first, 0, axis.keys) for other, first, axis in
                ((row, first_row, plan.rows), (col, first_col, plan.cols)))  # fmt: skip
    offset = jnp.where(code < other_rows, row, col + plan.offsets)
    mask = inside[:, None] & (code < other_rows + other_cols)
    offset = jnp.where(mask, offset, 2 * plan.offsets)
    index = jnp.broadcast_to(pixels[:, None], offset.shape), offset
    plgpu.store(ref.at[index], jnp.zeros(offset.shape, ref.dtype), mask=mask)


def _hide(plan, logits, in_window):
    """Masks keys outside of the window where there is no spare code to do it."""
    return logits if plan.spare_code else jnp.where(in_window, logits, plan.masked_logit)


def _split(plan, x):
    """Parts in `dtype` that sum up to float32 `x`."""
    if plan.parts == 1:
        return (x,)
    high = x.astype(plan.dtype)
    return high, (x - high.astype(jnp.float32)).astype(plan.dtype)


def _dot(a, b, a_axis, b_axis):
    """Product over one axis of each, in float32: of float32 numbers to all bits, without TensorFloat-32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
