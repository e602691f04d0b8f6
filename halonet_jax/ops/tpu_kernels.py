"""TPU kernels of halo attention, forward and backward: windows and logits live in on-chip memory (VMEM) only.

The grid is (batch, chunks of heads, columns of blocks). A step holds one column of blocks over the map's whole height; a loop
inside goes down its blocks. Columns come in order, so that each key and value is read once: a band in VMEM keeps what the next
column's windows overlap with, and in the backward pass a second band sums the gradients of overlapping windows before they
are written.

Layout, by what the hardware wants. The band is `[rows, columns, channels]`: channels in lanes, columns in sublanes, rows untiled,
so that a window is a slice of whole tiles at a dynamic row. Logits stand transposed, keys in sublanes and queries in lanes:
softmax then reduces over sublanes, which is plain adding of registers, statistics of a query are dense rows, and the logits
of a relative position are one broadcast add per key row and column. Narrow heads share a matrix product: queries of `group`
heads are stacked, each with the other heads' lanes set to zero, against keys that keep all their lanes.

Letters as in `halonet_jax.ops`, and M: the stacked queries of a group, its heads one after the other, K: keys of a window, R * S.
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
    """All that is static.

    Attributes:
        heads: N.
        channels: D.
        values: E.
        chunk: heads of one grid step, whose keys share up to 128 lanes.
        group: heads that are stacked; divides `chunk`.
        value_lanes: of a group's values, padded to a multiple of 128 where there are several groups.
        key_cols: S, padded to whole sublanes.
        query_rows, query_cols: a block's queries are so many rows of whole sublanes: its pixels if their columns fill sublanes,
            else all pixels flat in one row, padded.
        offsets: rows of the tables, padded to whole sublanes.
        scale: of the logits.
        dtype: name of q, k and v's dtype; matrix products take it, all else is float32.
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
    def chunks(self):
        return self.heads // self.chunk

    @property
    def groups(self):
        """Of one chunk."""
        return self.chunk // self.group

    @property
    def key_lanes(self):
        return self.chunk * self.channels

    @property
    def block_queries(self):
        return self.query_rows * self.query_cols

    @property
    def stacked(self):
        """M."""
        return self.group * self.block_queries

    @property
    def window(self):
        """K."""
        return self.rows.keys * self.key_cols

    @property
    def band_rows(self):
        return self.rows.blocks * self.rows.block + 2 * self.rows.halo

    @property
    def code_rows(self):
        """Rows of the transposed one-hot codes of a key's row and column, each padded to whole sublanes."""
        return -(-self.rows.keys // SUBLANES) * SUBLANES, self.key_cols


def forward_kernel(plan, q_ref, k_ref, v_ref, tables_ref, shifts_ref, out_ref, lse_ref, k_band, v_band):
    """Attends one column of blocks. Refs, without the axes that the grid runs over:

    q `[I * query_rows, query_cols, key_lanes]`, k `[H, block, key_lanes]`, v and out likewise with `groups * value_lanes`,
    tables `[2, offsets, key_lanes]`, shifts `[2, M]` (see `_shift`), lse `[I, groups, M]` float32: the log-sum-exp over `scale`.
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
            # The difference first: a scaled maximum would round, which matters where all keys are masked.
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
    """Gradients of one column of blocks; probabilities are recomputed.

    As in `forward_kernel`, and codes `[sum(code_rows), K]`; gradients as what they are of, but dtables `[2, offsets,
    key_lanes]` in float32, summed over the columns. dk and dv lag a column more, until all windows that see them are through.
    `done` holds the columns of dk and dv that are complete but not written, `[H, block - halo, channels]`, where that is
    anything.
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
            # What softmax takes off, from the weights rather than from the output: that need not be kept then.
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
    """Completes the band of the column to be attended by the halo on its right, the left of what `ref` brings."""
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
    """The column of blocks that a step brings, 0 right of the map. Read anew where needed: holding it would take room."""
    return jnp.where(step < plan.cols.blocks, ref[...].astype(jnp.float32), 0)


def _leave_gradient(plan, band, ref, done):
    """Writes the column of blocks that is complete and moves the band on by a block."""
    axis, rows = plan.cols, _map_rows(plan)
    if not axis.halo:
        ref[...] = band[rows, : axis.block].astype(ref.dtype)
        band[...] = jnp.zeros(band.shape, band.dtype)
        return
    # Written is the block left of the band's: the band's own left halo is its right end.
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
    """Block i's queries, or what lies as they do: `[query_rows * query_cols, channels]` float32."""
    x = ref[pl.ds(i * plan.query_rows, plan.query_rows)].astype(jnp.float32)
    return x.reshape(plan.block_queries, x.shape[-1])


def _window(plan, band, i, lanes=slice(None)):
    """Block i's keys or values: `[K, lanes]`."""
    x = band[pl.ds(i * plan.rows.block, plan.rows.keys), :, lanes]
    return x.reshape(plan.window, x.shape[-1]).astype(plan.dtype)


def _add_window(plan, band, i, x, lanes=slice(None)):
    """Adds `[K, lanes]` to where `_window` reads."""
    band[pl.ds(i * plan.rows.block, plan.rows.keys), :, lanes] += x.reshape(plan.rows.keys, plan.key_cols, x.shape[-1])


def _stack(plan, x, first, width):
    """`[queries, lanes] -> [M, lanes]`: once for each head of a group, with lanes of that head alone, `width` each."""
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    heads = [jnp.where((lane >= n * width) & (lane < (n + 1) * width), x, 0) for n in range(first, first + plan.group)]
    return jnp.concatenate(heads, axis=0).astype(plan.dtype)


def _unstack(plan, x, first, width):
    """`[M, lanes] -> [queries, lanes]`: of each head its own lanes; the transpose of `_stack`."""
    out = jnp.zeros((plan.block_queries, x.shape[1]), x.dtype)
    lane = lax.broadcasted_iota(jnp.int32, out.shape, 1)
    for n in range(plan.group):
        own = (lane >= (first + n) * width) & (lane < (first + n + 1) * width)
        out = jnp.where(own, x[n * plan.block_queries : (n + 1) * plan.block_queries], out)
    return out


def _logits(plan, k, q, tables_ref, shifts_ref, i, j):
    """`[K, M]`, before the scale."""
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
    """Relative logits of block `index` along an axis, `[keys, M]`, keys padded to whole sublanes, with masks."""
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
    """Moves each column of `[offsets, M]` up by its `shift`, block - 1 less the query's pixel, bit by bit.

    The tables begin with the offset of a block's last query to its window's first key; row r of the result is of key r.
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
    """Of the kernels' bands, in their order."""
    lanes = plan.key_lanes, plan.groups * plan.value_lanes
    bands = [pltpu.VMEM((plan.band_rows, plan.key_cols, n), jnp.float32) for n in lanes]
    if not backward:
        return bands
    done = [pltpu.VMEM((plan.rows.size, plan.cols.block - plan.cols.halo, n), jnp.float32) for n in lanes]
    if plan.cols.halo in (0, plan.cols.block):
        done = []
    return bands + bands + done
