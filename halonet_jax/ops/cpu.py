"""Halo attention for CPUs: mapped over heads and rows of blocks, so that logits stay in cache, with a backward pass of its own.

The backward pass keeps the logarithm of each softmax's sum, and computes the weights anew from it without passes for maximum and
sum. It has logits as [keys, queries]: sums over them then run along the queries, whole vectors at a time, and the products for
the gradients of keys and values need no transposed operand. `docs/performance.md` says what each of this is worth.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from halonet_jax.ops import blocked


def attend(q, k, v, rel_rows, rel_cols, *, block_size, halo_size, stride, centered, masked, logits_scale):
    """See `halo_attention` for the contract."""
    if block_size % stride:  # as in `blocked`
        dense = jnp.zeros_like(k).at[:, ::stride, ::stride].set(q)
        out = attend(
            dense, k, v, rel_rows, rel_cols, block_size=block_size, halo_size=halo_size, stride=1, centered=centered,
            masked=masked, logits_scale=logits_scale,
        )  # fmt: skip
        return out[:, ::stride, ::stride]

    batch, height, width, heads, channels = k.shape
    rows = blocked._axis(height, block_size, halo_size, stride, centered, masked)
    cols = blocked._axis(width, block_size, halo_size, stride, centered, masked)
    q_height, q_width = q.shape[1:3]
    pad = ((0, 0), (0, rows.blocks * rows.queries - q_height), (0, cols.blocks * cols.queries - q_width), (0, 0), (0, 0))
    q = jnp.pad(q, pad).reshape(batch, rows.blocks, rows.queries, cols.blocks, cols.queries, heads, channels)
    q = q.transpose(5, 1, 0, 3, 2, 4, 6)  # [N, I, B, J, Y, X, D]

    tables = (table.astype(q.dtype)[axis.table_index] for table, axis in ((rel_rows, rows), (rel_cols, cols)))
    position = functools.partial(_position_logits, rows, cols, logits_scale, *tables)
    row_logits, col_logits = _map(position, q)
    q = q.reshape(*q.shape[:4], -1, channels)  # [N, I, B, J, Q, D]
    pad = ((0, 0), rows.pad(height), cols.pad(width), (0, 0), (0, 0))
    k, v = (jnp.pad(x, pad).transpose(3, 0, 1, 2, 4) for x in (k, v))  # [N, B, H + 2h, W + 2h, D or E]
    out = _Attention(rows, cols, logits_scale)(q, k, v, row_logits, col_logits)
    out = out.reshape(*out.shape[:5], rows.queries, cols.queries)
    out = out.transpose(2, 1, 5, 3, 6, 0, 4)  # [N, I, B, J, E, Y, X] -> [B, I, Y, J, X, N, E]
    return out.reshape(batch, rows.blocks * rows.queries, cols.blocks * cols.queries, heads, -1)[:, :q_height, :q_width]


def _position_logits(rows, cols, scale, row_table, col_table, n, i, q):
    """Scaled and masked logits of the rows and columns of each block's window, `[B, J, R, Q]` and `[B, J, S, Q]` in float32.

    q `[B, J, Y, X, D]`, tables `[Y, R, D / 2 or D]` and `[X, S, D / 2 or D]`.
    """
    half = row_table.shape[-1]
    row_logits = scale * _wide("bjyxd,yrd->bjryx", q[..., :half], row_table) + jnp.asarray(rows.bias)[i].T[:, :, None]
    col_logits = scale * _wide("bjyxd,xsd->bjsyx", q[..., -half:], col_table) + cols.bias.swapaxes(1, 2)[:, :, None]
    return tuple(x.reshape(*x.shape[:3], -1) for x in (row_logits, col_logits))


class _Attention:
    """Softmax attention of each block to its window, with its own derivative.

    q `[N, I, B, J, Q, D]`, k and v `[N, B, H + 2h, W + 2h, D or E]`, logits as of `_position_logits`, `[N, I, …]`.
    Returns `[N, I, B, J, E, Q]`.
    """

    def __init__(self, rows, cols, scale):
        self.rows, self.cols, self.scale = rows, cols, scale

    def __call__(self, *arrays):
        attend = jax.custom_vjp(lambda *arrays: self.forward(*arrays)[0])
        attend.defvjp(self.forward, self.backward)
        return attend(*arrays)

    def forward(self, q, k, v, row_logits, col_logits):
        def body(n, i, q, row_logits, col_logits):
            logits = self.logits(self.windows(k, n, i), q, row_logits, col_logits)
            largest = logits.max(2)
            weights = jnp.exp(logits - largest[:, :, None])
            total = weights.sum(2)
            out = _wide("bjek,bjkq->bjeq", _transposed(self.windows(v, n, i)), weights.astype(v.dtype))
            return (out / total[:, :, None]).astype(v.dtype), largest + jnp.log(total)

        out, log_total = _map(body, q, row_logits, col_logits)
        return out, (q, k, v, row_logits, col_logits, out, log_total)

    def backward(self, residuals, d_out):
        q, k, v, row_logits, col_logits, out, log_total = residuals

        def body(n, i, q, row_logits, col_logits, d_out, log_total, delta):
            k_windows, v_windows = self.windows(k, n, i), self.windows(v, n, i)
            weights = jnp.exp(self.logits(k_windows, q, row_logits, col_logits, log_total))
            d_weights = _wide("bjke,bjeq->bjkq", v_windows, d_out)
            d_logits = weights * (d_weights - delta[:, :, None])
            parts = d_logits.reshape(*d_logits.shape[:2], self.rows.keys, self.cols.keys, -1)
            d_position = parts.sum(3), parts.sum(2)
            d_logits = (self.scale * d_logits).astype(q.dtype)
            d_q = _wide("bjdk,bjkq->bjdq", _transposed(k_windows), d_logits)
            d_k = _wide("bjkq,bjqd->bjkd", d_logits, q)
            d_v = _wide("bjkq,bjeq->bjke", weights.astype(v.dtype), d_out)
            return d_q, self.bands(d_k), self.bands(d_v), *d_position

        delta = (d_out.astype(jnp.float32) * out).sum(-2)
        d_q, d_k, d_v, *d_position = _map(body, q, row_logits, col_logits, d_out, log_total, delta)
        d_k, d_v = (self.rows_added(d, x) for d, x in ((d_k, k), (d_v, v)))
        return d_q.swapaxes(-1, -2).astype(q.dtype), d_k, d_v, *d_position

    def logits(self, k_windows, q, row_logits, col_logits, minus=None):
        """`[B, J, K, Q]`, less `minus` `[B, J, Q]`."""
        logits = self.scale * _wide("bjkd,bjqd->bjkq", k_windows, q)
        parts = logits.reshape(*logits.shape[:2], self.rows.keys, self.cols.keys, -1)
        parts += row_logits[:, :, :, None] + col_logits[:, :, None]
        return (parts if minus is None else parts - minus[:, :, None, None]).reshape(logits.shape)

    def windows(self, x, n, i):
        """Windows of head n and row of blocks i: `[N, B, H + 2h, W + 2h, D] -> [B, J, R * S, D]`."""
        zero = jnp.zeros_like(n)
        start = n, zero, i * self.rows.block, zero, zero
        band = jax.lax.dynamic_slice(x, start, (1, x.shape[1], self.rows.keys, *x.shape[3:]))[0]
        # A gather, which copies whole pixels, takes a quarter of the time of slices put together.
        columns = self.cols.block * np.arange(self.cols.blocks)[:, None] + np.arange(self.cols.keys)
        return band[:, :, columns].swapaxes(1, 2).reshape(x.shape[1], self.cols.blocks, -1, x.shape[-1])

    def bands(self, x):
        """Adds windows up where they overlap: `[B, J, R * S, D] -> [B, R, W + 2h, D]`, the transpose of `windows`."""
        x = x.reshape(*x.shape[:2], self.rows.keys, self.cols.keys, -1).swapaxes(1, 2)
        return _overlap_add(x, 2, self.cols.block, self.cols.blocks * self.cols.block + 2 * self.cols.halo)

    def rows_added(self, bands, like):
        """Adds bands up where they overlap: `[N, I, B, R, W + 2h, D] -> [N, B, H + 2h, W + 2h, D]`."""
        return _overlap_add(bands.swapaxes(1, 2), 2, self.rows.block, like.shape[2]).astype(like.dtype)


_wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _map(body, *arrays):
    """Maps `body(n, i, *arrays)` over heads and rows of blocks, `[N, I, …]`."""
    heads, rows = arrays[0].shape[:2]
    indices = jnp.repeat(jnp.arange(heads), rows), jnp.tile(jnp.arange(rows), heads)
    flat = (x.reshape(heads * rows, *x.shape[2:]) for x in arrays)
    outs = jax.lax.map(lambda args: body(*args), (*indices, *flat))
    return jax.tree.map(lambda x: x.reshape(heads, rows, *x.shape[1:]), outs)


def _transposed(x):
    """Swaps the last two axes, in memory: products of row-major operands are three times faster than with it folded in."""
    return jax.lax.optimization_barrier(x.swapaxes(-1, -2))


def _overlap_add(x, axis, step, size):
    """`[…, J, S, …] -> […, size, …]` with `x[j, s]` added to place `j * step + s`; `axis` is J's.

    Windows are cut into pieces of `step`, of which those of all windows lie side by side.
    """
    blocks, keys = x.shape[axis : axis + 2]
    total = 0
    for start in range(0, keys, step):
        piece = jax.lax.slice_in_dim(x, start, min(start + step, keys), axis=axis + 1)
        pad = [(0, 0)] * x.ndim
        pad[axis + 1] = (0, step - piece.shape[axis + 1])
        piece = jnp.pad(piece, pad).reshape(*x.shape[:axis], blocks * step, *x.shape[axis + 2 :])
        pad = [(0, 0)] * piece.ndim
        pad[axis] = (start, max(0, size - start - blocks * step))
        total += jax.lax.slice_in_dim(jnp.pad(piece, pad), 0, size, axis=axis)
    return total
