"""Halo attention by its definition: one gathered window per query pixel, in float32. Slow, and meant to be obvious.

It shares no code with the other implementations, which are tested against it.
"""

import jax
import jax.numpy as jnp
import numpy as np


def attend(q, k, v, rel_rows, rel_cols, *, block_size, halo_size, stride, centered, masked, logits_scale, adjacent=False):
    """Attends, see `halo_attention`. Memory grows with (b + 2h)² per pixel. All implementations take these arguments.

    Args:
        q: `[B, ceil(H / stride), ceil(W / stride), N, D]`.
        k: `[B, H, W, N, D]`.
        v: `[B, H, W, N, E]`.
        rel_rows: `[2 * block_size + 2 * halo_size - 1, D / 2 or D]`; 0 channels: no position term.
        rel_cols: like `rel_rows`.
        block_size: in pixels of the map. Implementations other than this one need a multiple of `stride`.
        halo_size: in pixels of the map.
        stride: pixels of the map from one query to the next, per axis.
        centered: whether keys more than `halo_size` rows or columns away from the query are masked.
        masked: whether keys outside of the map are masked; else they are zeros.
        logits_scale: factor on the logits.
        adjacent: whether the tables take the queries of a block as adjacent pixels. It needs a block size that `stride`
            divides. `halo_attention` leaves it out where it is False.

    Returns:
        `[B, ceil(H / stride), ceil(W / stride), N, E]` in v's dtype.
    """
    dtype = v.dtype
    precise = jnp.promote_types(jnp.float32, dtype)
    q, k, v, rel_rows, rel_cols = (x.astype(precise) for x in (q, k, v, rel_rows, rel_cols))
    used = rel_rows.shape[1]  # channels that meet each table: half of them, all, or none
    half = slice(None, used), slice(q.shape[-1] - used, None)

    rows, row_offsets, row_inside = _neighbors(k.shape[1], block_size, halo_size, stride)  # [H, R]
    cols, col_offsets, col_inside = _neighbors(k.shape[2], block_size, halo_size, stride)  # [W, S]
    inside = row_inside[:, None, :, None] & col_inside[None, :, None, :]  # [H, W, R, S]

    def windows(x):
        x = x[:, np.clip(rows, 0, k.shape[1] - 1)[:, None, :, None], np.clip(cols, 0, k.shape[2] - 1)[None, :, None, :]]
        return jnp.where(inside[..., None, None], x, 0)  # [B, H, W, R, S, N, D]

    einsum = lambda *args: jnp.einsum(*args, precision=jax.lax.Precision.HIGHEST)
    logits = einsum("bhwnd,bhwrsnd->bhwnrs", q, windows(k))
    first_row = block_size - 1 + halo_size
    table_rows, table_cols = row_offsets + first_row, col_offsets + first_row
    if adjacent:  # a query is y % b pixels, and y % b / stride queries, from the first of its block
        inner_row, inner_col = (np.arange(0, size, stride)[:, None] % block_size for size in k.shape[1:3])
        table_rows, table_cols = table_rows + inner_row - inner_row // stride, table_cols + inner_col - inner_col // stride
    logits += einsum("bhwnd,hrd->bhwnr", q[..., half[0]], rel_rows[table_rows])[..., :, None]
    logits += einsum("bhwnd,wsd->bhwns", q[..., half[1]], rel_cols[table_cols])[..., None, :]
    logits *= logits_scale

    seen = inside if masked else np.ones_like(inside)
    if centered:
        near = (abs(row_offsets) <= halo_size)[:, None, :, None] & (abs(col_offsets) <= halo_size)[None, :, None, :]
        seen = seen & near
    seen = seen[:, :, None]  # one for all heads
    weights = jax.nn.softmax(logits, axis=(-2, -1), where=seen)
    return einsum("bhwnrs,bhwrsne->bhwne", weights, windows(v)).astype(dtype)


def _neighbors(size, block_size, halo_size, stride):
    """Each query's keys along an axis, their offsets from it, and whether they are on the map: `[queries, keys]`."""
    queries = np.arange(0, size, stride)
    first = queries // block_size * block_size - halo_size
    keys = first[:, None] + np.arange(block_size + 2 * halo_size)
    return keys, keys - queries[:, None], (keys >= 0) & (keys < size)
