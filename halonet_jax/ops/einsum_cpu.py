"""Halo attention by einsums for CPUs, with a backward pass of its own.

It is mapped over heads and rows of blocks, so that logits stay in cache. The backward pass keeps the logarithm of each
softmax's sum and computes the weights again from it, without passes for maximum and sum. It holds logits as [keys,
queries]. Sums over keys then run along the queries, whole vectors at a time, and the products for the gradients of keys
and values need no transposed operand. `docs/performance.md` says what each of these is worth.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from halonet_jax.ops.geometry import make_axes


def attend(q, k, v, rel_rows, rel_cols, *, logits_scale, **options):
    """Attends by einsums that are fast on a CPU.

    Args:
        q, k, v, rel_rows, rel_cols, logits_scale, **options: as of `reference.attend`.

    Returns:
        As `reference.attend`.
    """
    batch, _, _, heads, channels = k.shape
    rows, cols = make_axes(k.shape, **options)
    q = jnp.pad(q, ((0, 0), rows.query_padding, cols.query_padding, (0, 0), (0, 0)))
    q = q.reshape(batch, rows.blocks, rows.queries, cols.blocks, cols.queries, heads, channels)
    q = q.transpose(5, 1, 0, 3, 2, 4, 6)  # [N, I, B, J, Y, X, D]

    tables = (table.astype(q.dtype)[axis.table_index] for table, axis in ((rel_rows, rows), (rel_cols, cols)))
    pad = ((0, 0), rows.key_padding, cols.key_padding, (0, 0), (0, 0))
    k, v = (jnp.pad(x, pad).transpose(3, 0, 1, 2, 4) for x in (k, v))  # [N, B, H + 2h, W + 2h, D or E]
    out = _Attention(rows, cols, logits_scale)(q, k, v, *tables)
    out = out.reshape(*out.shape[:5], rows.queries, cols.queries)
    out = out.transpose(2, 1, 5, 3, 6, 0, 4)  # [N, I, B, J, E, Y, X] -> [B, I, Y, J, X, N, E]
    out = out.reshape(batch, rows.blocks * rows.queries, cols.blocks * cols.queries, heads, -1)
    return out[:, : rows.outputs, : cols.outputs]


class _Attention:
    """Softmax attention of each block to its window, with its own derivative.

    q is `[N, I, B, J, Y, X, D]`, k and v are `[N, B, H + 2h, W + 2h, D or E]`, the tables `[Y, R, D / 2 or D]` and
    `[X, S, D / 2 or D]`, or of 0 channels. Returns `[N, I, B, J, E, Q]` with Q = Y * X. Windows have K = R * S keys.
    """

    def __init__(self, rows, cols, scale):
        self.rows, self.cols, self.scale = rows, cols, scale

    def __call__(self, *arrays):
        attend = jax.custom_vjp(self.inference)
        attend.defvjp(self.forward, self.backward)
        return attend(*arrays)

    def inference(self, q, k, v, *tables):
        """Returns the output alone. Logits are `[B, J, Q, K]`: XLA fuses their product with the maximum."""

        def body(n, i, q):
            row_logits, col_logits = (x.swapaxes(-1, -2) for x in self.position(n, i, q, tables))
            logits = self.scale * _wide("bjqd,bjkd->bjqk", _flat(q), self.windows(k, n, i))
            logits += (row_logits[..., None] + col_logits[..., None, :]).reshape(logits.shape)
            # Without this barrier, XLA fuses what follows as well, and all takes 1.1 to 1.3 times as long.
            logits, largest = jax.lax.optimization_barrier((logits, logits.max(-1, keepdims=True)))
            weights = jnp.exp(logits - largest)
            out = _wide("bjqk,bjke->bjqe", weights.astype(v.dtype), self.windows(v, n, i))
            return (out / weights.sum(-1, keepdims=True)).astype(v.dtype)

        return _map(body, q).swapaxes(-1, -2)

    def forward(self, q, k, v, *tables):
        """Returns the output, and what the backward pass needs."""

        def body(n, i, q, *position):
            logits = self.logits(self.windows(k, n, i), q, *position)
            largest = logits.max(2)
            weights = jnp.exp(logits - largest[:, :, None])
            total = weights.sum(2)
            out = _wide("bjek,bjkq->bjeq", _transposed(self.windows(v, n, i)), weights.astype(v.dtype))
            return (out / total[:, :, None]).astype(v.dtype), largest + jnp.log(total)

        # In a loop of its own: else XLA fuses it into the logits and computes it for each of them.
        position = _map(functools.partial(self.position, tables=tables), q)
        out, log_total = _map(body, q, *position)
        return out, (q, k, v, tables, position, out, log_total)

    def backward(self, residuals, d_out):
        q, k, v, tables, position, out, log_total = residuals

        def body(n, i, q, row_logits, col_logits, d_out, log_total, delta):
            k_windows, v_windows = self.windows(k, n, i), self.windows(v, n, i)
            weights = jnp.exp(self.logits(k_windows, q, row_logits, col_logits, log_total))
            d_logits = weights * (_wide("bjke,bjeq->bjkq", v_windows, d_out) - delta[:, :, None])
            parts = d_logits.reshape(*d_logits.shape[:2], self.rows.keys, self.cols.keys, -1)
            d_position = parts.sum(3), parts.sum(2)
            d_logits = (self.scale * d_logits).astype(q.dtype)
            d_q = _wide("bjdk,bjkq->bjdq", _transposed(k_windows), d_logits)
            d_k = _wide("bjkq,bjqd->bjkd", d_logits, _flat(q))
            d_v = _wide("bjkq,bjeq->bjke", weights.astype(v.dtype), d_out)
            return d_q, self.bands(d_k), self.bands(d_v), d_position

        delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-2)
        d_q, d_k, d_v, d_position = _map(body, q, *position, d_out, log_total, delta)
        # Not in the loop: the tables' gradients are sums over the batch, so every iteration would sum over devices.
        d_position = tuple(d.reshape(*d.shape[:-1], self.rows.queries, self.cols.queries) for d in d_position)
        d_q_position, *d_tables = jax.vjp(self.unmasked_position, q, *tables)[1](d_position)
        d_q = d_q.swapaxes(-1, -2).reshape(q.shape).astype(q.dtype) + d_q_position
        d_k, d_v = (self.rows_added(d, x) for d, x in ((d_k, k), (d_v, v)))
        return d_q, d_k, d_v, *d_tables

    def position(self, n, i, q, tables):
        """Returns scaled, masked logits of rows and columns, `[B, J, R, Q]` and `[B, J, S, Q]` float32."""
        row_logits, col_logits = self.unmasked_position(q, *tables)
        row_logits += jnp.asarray(self.rows.bias)[i].T[:, :, None]
        col_logits += self.cols.bias.swapaxes(1, 2)[:, :, None]
        return tuple(x.reshape(*x.shape[:3], -1) for x in (row_logits, col_logits))

    def unmasked_position(self, q, rel_rows, rel_cols):
        """Returns scaled logits of rows and columns: `[…, Y, X, D]` to `[…, R, Y, X]` and `[…, S, Y, X]`."""
        half = rel_rows.shape[-1]
        row_logits = self.scale * _wide("...yxd,yrd->...ryx", q[..., :half], rel_rows)
        return row_logits, self.scale * _wide("...yxd,xsd->...syx", q[..., q.shape[-1] - half :], rel_cols)

    def logits(self, k_windows, q, row_logits, col_logits, minus=None):
        """Returns the logits `[B, J, K, Q]`, with `minus` `[B, J, Q]` subtracted."""
        logits = self.scale * _wide("bjkd,bjqd->bjkq", k_windows, _flat(q))
        parts = logits.reshape(*logits.shape[:2], self.rows.keys, self.cols.keys, -1)
        parts += row_logits[:, :, :, None] + col_logits[:, :, None]
        return (parts if minus is None else parts - minus[:, :, None, None]).reshape(logits.shape)

    def windows(self, x, n, i):
        """Returns the windows of head n and row of blocks i: `[N, B, H + 2h, W + 2h, D] -> [B, J, R * S, D]`."""
        zero = jnp.zeros_like(n)
        start = n, zero, i * self.rows.block, zero, zero
        band = jax.lax.dynamic_slice(x, start, (1, x.shape[1], self.rows.keys, *x.shape[3:]))[0]
        # A gather, which copies whole pixels, takes a quarter of the time of slices put together.
        columns = self.cols.block * np.arange(self.cols.blocks)[:, None] + np.arange(self.cols.keys)
        return band[:, :, columns].swapaxes(1, 2).reshape(x.shape[1], self.cols.blocks, -1, x.shape[-1])

    def bands(self, x):
        """Adds overlapping windows: `[B, J, R * S, D] -> [B, R, W + 2h, D]`. The transpose of `windows`."""
        x = x.reshape(*x.shape[:2], self.rows.keys, self.cols.keys, -1).swapaxes(1, 2)
        return _overlap_add(x, 2, self.cols.block, self.cols.blocks * self.cols.block + 2 * self.cols.halo)

    def rows_added(self, bands, like):
        """Adds overlapping bands: `[N, I, B, R, W + 2h, D] -> [N, B, H + 2h, W + 2h, D]`."""
        return _overlap_add(bands.swapaxes(1, 2), 2, self.rows.block, like.shape[2]).astype(like.dtype)


_wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _map(body, *arrays):
    """Maps `body(n, i, *arrays)` over heads and rows of blocks, `[N, I, …]`."""
    heads, rows = arrays[0].shape[:2]
    indices = jnp.repeat(jnp.arange(heads), rows), jnp.tile(jnp.arange(rows), heads)
    flat = (x.reshape(heads * rows, *x.shape[2:]) for x in arrays)
    outs = jax.lax.map(lambda args: body(*args), (*indices, *flat))
    return jax.tree.map(lambda x: x.reshape(heads, rows, *x.shape[1:]), outs)


def _flat(x):
    """`[B, J, Y, X, D] -> [B, J, Q, D]`"""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _transposed(x):
    """Swaps the last two axes in memory: products of row-major operands are three times as fast."""
    return jax.lax.optimization_barrier(x.swapaxes(-1, -2))


def _overlap_add(x, axis, step, size):
    """`[…, J, S, …] -> […, size, …]`: adds `x[j, s]` to place `j * step + s`. `axis` is that of J.

    Windows are cut into pieces of `step`. The first pieces of all windows lie side by side, and so do the others.
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
