"""TPU kernels of halo attention. Windows and logits are in on-chip memory (VMEM) only.

The grid is (batch, chunks of heads, columns of blocks). A step holds one column of blocks over the map's whole height,
and loops over its blocks. Columns come in order, so that each key and value is read once: a band in VMEM keeps what the
next column's windows overlap with. In the backward pass a second band sums the gradients of overlapping windows before
they are written.

The layout suits the hardware. The band is `[rows, columns, channels]`, with channels in lanes, columns in sublanes and
rows untiled, so that a window is a slice of whole tiles at a dynamic row. Logits are transposed, with keys in sublanes
and queries in lanes. Softmax then reduces over sublanes, which adds whole registers; statistics of queries are dense
rows; and the logits of a relative position are one broadcast add per key row and column. Narrow heads share a matrix
product: queries of `group` heads are stacked, each with the lanes of the other heads set to zero, and keys keep all
their lanes.

Letters are those of `halonet_jax.ops`. M: stacked queries of a group, one head after the other. K: keys of a window,
R * S.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from halonet_jax.ops.geometry import MASKED, Axis

LANES, SUBLANES = 128, 8


class Plan(NamedTuple):
    """All that the kernels know at compile time.

    Attributes:
        rows, cols: the map's axes.
        heads: N.
        channels: D.
        values: E.
        chunk: heads of one grid step, whose keys share up to 128 lanes.
        group: heads that are stacked; divides `chunk`.
        value_lanes: of a group's values, padded to a multiple of 128 where there are several groups.
        key_cols: S, padded to whole sublanes.
        query_rows, query_cols: layout of a block's queries, whose columns fill whole sublanes. It is that of the
            block's pixels if their columns fill sublanes; else one row of all pixels, padded.
        offsets: rows of the tables, padded to whole sublanes.
        scale: of the logits.
        dtype: name of the dtype of q, k and v, and of the operands of matrix products; the rest is float32.
    """

    rows: Axis
    cols: Axis
    heads: int
    channels: int
    values: int
    chunk: int
    group: int
    value_lanes: int
    key_cols: int
    query_rows: int
    query_cols: int
    offsets: int
    scale: float
    dtype: str

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return self.heads // self.chunk

    @property
    def groups(self) -> int:
        """Number of groups in a chunk."""
        return self.chunk // self.group

    @property
    def key_lanes(self) -> int:
        """Channels of a chunk's queries or keys."""
        return self.chunk * self.channels

    @property
    def block_queries(self) -> int:
        """Number of queries in a block, with padding."""
        return self.query_rows * self.query_cols

    @property
    def stacked(self) -> int:
        """M, the number of stacked queries."""
        return self.group * self.block_queries

    @property
    def window(self) -> int:
        """K, the number of keys in a window, with padding."""
        return self.rows.keys * self.key_cols

    @property
    def band_rows(self) -> int:
        """Rows of a band: those of all blocks and of the halo."""
        return self.rows.blocks * self.rows.block + 2 * self.rows.halo

    @property
    def code_rows(self) -> tuple[int, int]:
        """Rows of the transposed one-hot codes of a key's row and of its column, each padded to whole sublanes."""
        return -(-self.rows.keys // SUBLANES) * SUBLANES, self.key_cols


def forward_kernel(plan, q_ref, k_ref, v_ref, tables_ref, shifts_ref, out_ref, lse_ref, k_band, v_band):
    """Attends from one column of blocks. Shapes of refs are without the axes of the grid.

    Args:
        plan: of the operator.
        q_ref: `[I * query_rows, query_cols, key_lanes]`.
        k_ref: `[H, block, key_lanes]`.
        v_ref: `[H, block, groups * value_lanes]`.
        tables_ref: `[2, offsets, key_lanes]`, of rows and columns.
        shifts_ref: `[2, M]` int32, see `_shift`.
        out_ref: result, `[I * query_rows, query_cols, groups * value_lanes]`.
        lse_ref: result, `[I, groups, M]` float32: the log-sum-exp of the scaled logits, over `scale`.
        k_band, v_band: scratch, see `scratch_shapes`.
    """
    step = pl.program_id(2)
    lookahead = int(plan.cols.halo > 0)
    column = step - lookahead
    for band, ref in ((k_band, k_ref), (v_band, v_ref)):
        _enter(plan, band, ref, step)

    def attend_block(i, _):
        q, k = _queries(plan, q_ref, i), _window(plan, k_band, i)
        rows = pl.ds(i * plan.query_rows, plan.query_rows)
        for group in range(plan.groups):
            lanes = pl.ds(group * plan.value_lanes, plan.value_lanes)
            stacked = _stack(plan, q, group * plan.group, plan.channels)
            logits = _logits(plan, k, stacked, tables_ref, shifts_ref, i, column)
            maximum = jnp.max(logits, axis=0, keepdims=True)
            # Subtract before scaling: a scaled maximum would be rounded, which matters if all keys are masked.
            weights = jnp.exp(plan.scale * (logits - maximum))
            total = jnp.sum(weights, axis=0, keepdims=True)
            lse_ref[i, group : group + 1] = maximum + jnp.log(total) / plan.scale
            v = _window(plan, v_band, i, lanes)
            out = _dot(v, weights.astype(v.dtype), 0, 0) / total  # [value_lanes, M]
            out = _unstack(plan, out.T, 0, plan.values)
            out_ref[rows, :, lanes] = out.reshape(plan.query_rows, plan.query_cols, plan.value_lanes).astype(out_ref.dtype)

    @pl.when(column >= 0)
    def _():
        lax.fori_loop(0, plan.rows.blocks, attend_block, None)

    for band, ref in ((k_band, k_ref), (v_band, v_ref)):
        _leave(plan, band, ref, step)


def backward_kernel(
    plan, q_ref, k_ref, v_ref, tables_ref, shifts_ref, codes_ref, lse_ref, dout_ref,
    dq_ref, dk_ref, dv_ref, dtables_ref, k_band, v_band, dk_band, dv_band, *done,
):  # fmt: skip
    """Computes the gradients of one column of blocks; it computes the softmax weights again.

    Args:
        plan: of the operator.
        q_ref, k_ref, v_ref, tables_ref, shifts_ref, lse_ref: as of `forward_kernel`.
        codes_ref: `[sum(code_rows), K]`, transposed one-hot codes of each key's row, then of its column.
        dout_ref: gradient of the output, like it.
        dq_ref: result, like q.
        dk_ref, dv_ref: results, like k and v. They come a column later, when all windows that see them are done.
        dtables_ref: result, `[2, offsets, key_lanes]` float32, summed over the columns.
        k_band, v_band, dk_band, dv_band: scratch, see `scratch_shapes`.
        *done: scratch for columns of dk and dv that are complete but not written yet, `[H, block - halo, channels]`;
            none if it would be empty.
    """
    step = pl.program_id(2)
    lookahead = int(plan.cols.halo > 0)
    column = step - lookahead
    dtype = jnp.dtype(plan.dtype)
    for band, ref in ((k_band, k_ref), (v_band, v_ref)):
        _enter(plan, band, ref, step)

    @pl.when(step == 0)
    def _():
        for ref in (dtables_ref, dk_band, dv_band, *done):
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    row_codes = plan.code_rows[0]

    def attend_block(i, _):
        q, k, dout = _queries(plan, q_ref, i), _window(plan, k_band, i), _queries(plan, dout_ref, i)
        dq = jnp.zeros(q.shape, jnp.float32)
        dk = jnp.zeros(k.shape, jnp.float32)
        for group in range(plan.groups):
            lanes = pl.ds(group * plan.value_lanes, plan.value_lanes)
            stacked = _stack(plan, q, group * plan.group, plan.channels)
            dstacked = _stack(plan, dout[:, group * plan.value_lanes : (group + 1) * plan.value_lanes], 0, plan.values)
            v = _window(plan, v_band, i, lanes)

            logits = _logits(plan, k, stacked, tables_ref, shifts_ref, i, column)
            weights = jnp.exp(plan.scale * (logits - lse_ref[i, group : group + 1]))  # [K, M]
            _add_window(plan, dv_band, i, _dot(weights.astype(dtype), dstacked, 1, 0), lanes)
            dweights = _dot(v, dstacked, 1, 1)
            # The subtracted sum comes from the weights, not from the output, which then need not be kept.
            dlogits = weights * (dweights - jnp.sum(weights * dweights, axis=0, keepdims=True))
            dlogits = (plan.scale * dlogits).astype(dtype)

            dk += _dot(dlogits, stacked, 1, 0)
            dstacked_q = _dot(k, dlogits, 0, 0)  # [key_lanes, M]
            positions = _dot(codes_ref[...], dlogits, 1, 0)  # sums over each key row and each key column
            for n, (part, axis) in enumerate(((positions[:row_codes], plan.rows), (positions[row_codes:], plan.cols))):
                part = _unshift(plan, part, shifts_ref[n : n + 1], axis.block).astype(dtype)
                dtables_ref[n] += _dot(part, stacked, 1, 0)
                dstacked_q += _dot(tables_ref[n], part, 0, 0)
            dq += _unstack(plan, dstacked_q.T, group * plan.group, plan.channels)
        _add_window(plan, dk_band, i, dk)
        rows = pl.ds(i * plan.query_rows, plan.query_rows)
        dq_ref[rows] = dq.reshape(plan.query_rows, plan.query_cols, plan.key_lanes).astype(dq_ref.dtype)

    @pl.when((column >= 0) & (column < plan.cols.blocks))
    def _():
        lax.fori_loop(0, plan.rows.blocks, attend_block, None)

    for band, ref in ((k_band, k_ref), (v_band, v_ref)):
        _leave(plan, band, ref, step)
    for band, ref, pending in zip((dk_band, dv_band), (dk_ref, dv_ref), done or (None, None)):
        _leave_gradient(plan, band, ref, pending)


def _enter(plan, band, ref, step):
    """Completes the band: the halo on the right of its column is the left of the column in `ref`."""
    axis, rows = plan.cols, _map_rows(plan)

    @pl.when(step == 0)
    def _():
        band[...] = jnp.zeros(band.shape, band.dtype)

    if axis.halo:
        band[rows, axis.halo + axis.block : axis.keys] = _fresh(plan, ref, step)[:, : axis.halo]
    else:
        band[rows, : axis.block] = _fresh(plan, ref, step)


def _leave(plan, band, ref, step):
    """Moves the band on by a block."""
    axis, rows = plan.cols, _map_rows(plan)
    if axis.halo:
        end = axis.halo + axis.block
        band[rows, :end] = jnp.concatenate([band[rows, axis.block : end], _fresh(plan, ref, step)], axis=1)


def _fresh(plan, ref, step):
    """Returns the column of blocks of a step, zeros right of the map. Read again at each use, which saves memory."""
    return jnp.where(step < plan.cols.blocks, ref[...].astype(jnp.float32), 0)


def _leave_gradient(plan, band, ref, done):
    """Writes the column of blocks that is complete and moves the band on by a block."""
    axis, rows = plan.cols, _map_rows(plan)
    if not axis.halo:
        ref[...] = band[rows, : axis.block].astype(ref.dtype)
        band[...] = jnp.zeros(band.shape, band.dtype)
        return
    # The block left of the band's is written; the band's left halo is its right end.
    left = axis.block - axis.halo
    ref[:, left:] = band[rows, : axis.halo].astype(ref.dtype)
    if done is not None:
        ref[:, :left] = done[...].astype(ref.dtype)
        done[...] = band[rows, axis.halo : axis.block]
    empty = jnp.zeros((plan.band_rows, plan.key_cols - 2 * axis.halo, band.shape[2]), band.dtype)
    band[...] = jnp.concatenate([band[:, axis.block : axis.keys], empty], axis=1)


def _map_rows(plan):
    return slice(plan.rows.halo, plan.rows.halo + plan.rows.size)


def _dot(a, b, a_axis, b_axis):
    """Contracts an axis of each, summing in float32."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _queries(plan, ref, i):
    """Returns block i of queries, or of arrays like them: `[query_rows * query_cols, channels]` float32."""
    x = ref[pl.ds(i * plan.query_rows, plan.query_rows)].astype(jnp.float32)
    return x.reshape(plan.block_queries, x.shape[-1])


def _window(plan, band, i, lanes=slice(None)):
    """Returns the keys or values of block i: `[K, lanes]`."""
    x = band[pl.ds(i * plan.rows.block, plan.rows.keys), :, lanes]
    return x.reshape(plan.window, x.shape[-1]).astype(plan.dtype)


def _add_window(plan, band, i, x, lanes=slice(None)):
    """Adds `[K, lanes]` to where `_window` reads."""
    band[pl.ds(i * plan.rows.block, plan.rows.keys), :, lanes] += x.reshape(plan.rows.keys, plan.key_cols, x.shape[-1])


def _stack(plan, x, first, width):
    """`[queries, lanes] -> [M, lanes]`: a copy for each head of a group, with the `width` lanes of that head alone."""
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    heads = [jnp.where((lane >= n * width) & (lane < (n + 1) * width), x, 0) for n in range(first, first + plan.group)]
    return jnp.concatenate(heads, axis=0).astype(plan.dtype)


def _unstack(plan, x, first, width):
    """`[M, lanes] -> [queries, lanes]`: each head's own lanes. The transpose of `_stack`."""
    out = jnp.zeros((plan.block_queries, x.shape[1]), x.dtype)
    lane = lax.broadcasted_iota(jnp.int32, out.shape, 1)
    for n in range(plan.group):
        own = (lane >= (first + n) * width) & (lane < (first + n + 1) * width)
        out = jnp.where(own, x[n * plan.block_queries : (n + 1) * plan.block_queries], out)
    return out


def _logits(plan, k, q, tables_ref, shifts_ref, i, j):
    """Returns the logits before scaling, `[K, M]`."""
    row, col = (
        _position_logits(plan, q, tables_ref[n], shifts_ref[n : n + 1], axis, index, keys)
        for n, (axis, index, keys) in enumerate(((plan.rows, i, plan.code_rows[0]), (plan.cols, j, plan.code_rows[1])))
    )
    content = _dot(k, q, 1, 1)
    # By slices of whole tiles: one key row each.
    return jnp.concatenate(
        [content[r * plan.key_cols : (r + 1) * plan.key_cols] + (row[r : r + 1] + col) for r in range(plan.rows.keys)], axis=0
    )


def _position_logits(plan, q, table, shift, axis, index, keys):
    """Returns position logits of block `index` along an axis, masked: `[keys, M]`, keys padded to whole sublanes."""
    logits = _shift(plan, _dot(table, q, 1, 1), shift, axis.block)[:keys]
    key = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    seen = key < axis.keys
    if axis.masked:
        position = key + (index * axis.block - axis.halo)
        seen &= (position >= 0) & (position < axis.size)
    if axis.reach is not None:
        seen &= jnp.abs(key - (axis.halo + axis.block - 1) + shift) <= axis.reach
    return jnp.where(seen, logits, MASKED)


def _shift(plan, x, shift, block):
    """Moves each column of `[offsets, M]` up by its `shift`, which is block - 1 minus the query's pixel, bit by bit.

    Tables begin with the offset from a block's last query to its window's first key. Row r of the result is for key r.
    """
    for bit in _bits(block):
        x = jnp.where(shift & bit != 0, pltpu.roll(x, plan.offsets - bit, 0), x)
    return x


def _unshift(plan, x, shift, block):
    """The transpose of `_shift`, from `[keys, M]`."""
    if x.shape[0] < plan.offsets:
        x = jnp.concatenate([x, jnp.zeros((plan.offsets - x.shape[0], x.shape[1]), x.dtype)], axis=0)
    for bit in _bits(block):
        x = jnp.where(shift & bit != 0, pltpu.roll(x, bit, 0), x)
    return x


def _bits(block):
    return [1 << n for n in range((block - 1).bit_length())]


def scratch_shapes(plan: Plan, backward: bool) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes of a kernel's scratch memory, in the order of its arguments.

    Args:
        plan: of the operator.
        backward: whether it is the backward kernel.
    """
    lanes = plan.key_lanes, plan.groups * plan.value_lanes
    bands = [pltpu.VMEM((plan.band_rows, plan.key_cols, n), jnp.float32) for n in lanes]
    if not backward:
        return bands
    done = [pltpu.VMEM((plan.rows.size, plan.cols.block - plan.cols.halo, n), jnp.float32) for n in lanes]
    if plan.cols.halo in (0, plan.cols.block):
        done = []
    return bands + bands + done
