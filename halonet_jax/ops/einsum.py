"""Halo attention by einsums that XLA compiles.

They are mapped over rows of blocks, so that memory never holds the logits of a whole map.

All logits of a block come from one matrix product. Queries are extended by their logits for each row and each column of
the neighbourhood, keys by one-hot codes of their row and column, so that

    [q, row_logits, col_logits] · [k, onehot(row), onehot(col)] = q · k + row_logits[row] + col_logits[col].

A mask of rows times a mask of columns hides all that must be hidden. So masks are added to the row and column logits,
and cost nothing in the product.
"""

import jax
import jax.numpy as jnp
import numpy as np

from halonet_jax.ops.geometry import make_axes


def attend(q, k, v, rel_rows, rel_cols, *, logits_scale, **options):
    """Attends by einsums.

    Args:
        q, k, v, rel_rows, rel_cols, logits_scale, **options: as of `reference.attend`.

    Returns:
        As `reference.attend`.
    """
    batch, _, _, heads, channels = k.shape
    rows, cols = make_axes(k.shape, **options)
    k, v = (jnp.pad(x, ((0, 0), rows.key_padding, cols.key_padding, (0, 0), (0, 0))) for x in (k, v))

    q = jnp.pad(q, ((0, 0), rows.query_padding, cols.query_padding, (0, 0), (0, 0)))
    q = q.reshape(batch, rows.blocks, rows.queries, cols.blocks, cols.queries, heads, channels)
    q = q.transpose(1, 0, 3, 5, 2, 4, 6)  # [I, B, J, N, Y, X, D]

    tables = rel_rows.astype(q.dtype)[rows.table_index], rel_cols.astype(q.dtype)[cols.table_index]  # [Y, R, D], [X, S, D]
    col_bias = jnp.asarray(cols.bias[:, None, None])  # [J, N=1, Y=1, X, S]

    def attend_row(args):
        i, q, row_bias = args  # [], [B, J, N, Y, X, D], [Y, R]
        # Slicing here needs no copy of stacked bands; the backward pass is 1.3 to 1.5 times as fast on a CPU.
        bands = (jax.lax.dynamic_slice_in_dim(x, i * rows.block, rows.keys, axis=1) for x in (k, v))
        windows = (_windows(x, cols) for x in bands)  # [B, J, N, R, S, D]
        return _attend_blocks(q, *windows, *tables, row_bias[:, None], col_bias, logits_scale)

    row_args = (jnp.arange(rows.blocks), q, jnp.asarray(rows.bias))
    if rows.blocks == 1:
        out = attend_row(jax.tree.map(lambda x: x[0], row_args))[None]
    else:  # The backward pass computes the logits again, one row of blocks at a time.
        out = jax.lax.map(jax.checkpoint(attend_row, prevent_cse=False), row_args)
    out = out.transpose(1, 0, 4, 2, 5, 3, 6)  # [I, B, J, N, Y, X, E] -> [B, I, Y, J, X, N, E]
    out = out.reshape(batch, rows.blocks * rows.queries, cols.blocks * cols.queries, heads, v.shape[-1])
    return out[:, : rows.outputs, : cols.outputs]


def _attend_blocks(q, k, v, rel_rows, rel_cols, row_bias, col_bias, logits_scale):
    """Softmax attention of each block to its window.

    q is `[B, J, N, Y, X, D]`, k and v are `[B, J, N, R, S, D or E]`, the tables `[Y, R, D]` and `[X, S, D]`. The biases
    broadcast to `[J, N, Y, X, R]` and `[J, N, Y, X, S]`. Returns `[B, J, N, Y, X, E]`.
    """
    half = rel_rows.shape[-1]
    row_logits = jnp.einsum("bjnyxd,yrd->bjnyxr", q[..., :half], rel_rows, preferred_element_type=jnp.float32)
    col_logits = jnp.einsum("bjnyxd,xsd->bjnyxs", q[..., q.shape[-1] - half :], rel_cols, preferred_element_type=jnp.float32)
    position = jnp.concatenate([row_logits + row_bias, col_logits + col_bias], axis=-1)
    codes = _position_codes(*k.shape[3:5])
    extension = [position.astype(q.dtype)]
    if q.dtype != jnp.float32:  # Rounding errors are added as more channels: position logits then have twice the bits.
        extension.append((position - extension[0].astype(jnp.float32)).astype(q.dtype))
        codes = np.concatenate([codes, codes], axis=-1)
    q, codes = jnp.concatenate([q, *extension], axis=-1), jnp.asarray(codes, k.dtype)
    k = jnp.concatenate([k, jnp.broadcast_to(codes, k.shape[:-1] + codes.shape[-1:])], axis=-1)

    queries_shape = q.shape[3:5]
    q, k, v = (x.reshape(*x.shape[:3], -1, x.shape[-1]) for x in (q, k, v))  # one axis of pixels each, Y * X and R * S
    logits = jnp.einsum("bjnqd,bjnkd->bjnqk", q, k, preferred_element_type=jnp.float32)
    # Subtract before scaling: a scaled maximum would be rounded, which matters for queries whose keys are all masked.
    weights = jnp.exp(logits_scale * (logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))))
    total = weights.sum(-1, keepdims=True)
    # Dividing the output, not the weights, saves a pass over the largest array.
    out = jnp.einsum("bjnqk,bjnke->bjnqe", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return out.astype(v.dtype).reshape(*out.shape[:3], *queries_shape, out.shape[-1])


def _windows(x, cols):
    """`[B, R, W + 2h, N, D]` -> `[B, J, N, R, S, D]`, each block of a band with its halo."""
    x = jnp.stack([x[:, :, j * cols.block : j * cols.block + cols.keys] for j in range(cols.blocks)], axis=1)
    return x.transpose(0, 1, 4, 2, 3, 5)


def _position_codes(rows, cols):
    """`[R, S, R + S]`: one-hot row, then one-hot column, of each key."""
    return np.concatenate(
        [np.broadcast_to(np.eye(rows)[:, None], (rows, cols, rows)), np.broadcast_to(np.eye(cols), (rows, cols, cols))], axis=-1
    )
