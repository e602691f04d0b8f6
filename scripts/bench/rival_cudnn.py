"""A peer of the fused GPU kernels: halo attention through cuDNN's attention, with extra channels.

Queries get their position logits for each row and column of the window as extra channels. Keys get one-hot codes of
their row and column. So the logits never are in memory. All windows are, though: `(b + 2h)² / b²` times as many keys,
and `1 + 4 (b + 2h) / D` times as wide.

cuDNN needs bfloat16 or float16, and at most 128 channels (256 on Hopper and later). Keys and values must be equally
wide.
"""

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e9


def attend(
    q, k, v, rel_rows, rel_cols, *, block_size, halo_size, stride=1, centered=False, masked=True, logits_scale=None,
    implementation="cudnn",
):  # fmt: skip
    """Computes halo attention under the contract of `halonet_jax.ops`. The stride must divide the block.

    Args:
        q: queries [B, ceil(H / stride), ceil(W / stride), N, D].
        k: keys [B, H, W, N, D].
        v: values [B, H, W, N, E].
        rel_rows: relative logits' table [2b + 2h - 1, D / 2] for rows.
        rel_cols: likewise for columns.
        block_size: side of a block of queries (b), in pixels of the keys' map.
        halo_size: border around the block (h), in pixels.
        stride: of the queries.
        centered: whether a query sees only the window of 2h + 1 pixels that is centred on it.
        masked: whether keys outside the map are masked; if not, they are zeros.
        logits_scale: factor of the logits; None: D**-0.5.
        implementation: of `jax.nn.dot_product_attention`. "xla" runs anywhere.

    Returns:
        [B, ceil(H / stride), ceil(W / stride), N, E].
    """
    batch, height, width, heads, channels = k.shape
    rows, cols = (_axis(n, block_size, halo_size, stride, centered, masked) for n in (height, width))
    row_tables, cols_tables = rel_rows[rows["offsets"]], rel_cols[cols["offsets"]]  # [Y, R, D], [X, S, D]
    half, values = rel_rows.shape[1], v.shape[-1]

    pads = ((0, rows["blocks"] * rows["queries"] - q.shape[1]), (0, cols["blocks"] * cols["queries"] - q.shape[2]))
    blocks = jnp.pad(q, ((0, 0), *pads, (0, 0), (0, 0)))
    blocks = blocks.reshape(batch, rows["blocks"], rows["queries"], cols["blocks"], cols["queries"], heads, channels)
    blocks = blocks.transpose(0, 1, 3, 2, 4, 5, 6)  # [B, I, J, Y, X, N, D]
    einsum = lambda *args: jnp.einsum(*args, preferred_element_type=jnp.float32)
    row_logits = einsum("bijyxnd,yrd->bijyxnr", blocks[..., :half], row_tables.astype(q.dtype))
    col_logits = einsum("bijyxnd,xsd->bijyxns", blocks[..., -half:], cols_tables.astype(q.dtype))
    row_logits += rows["bias"][:, None, :, None, None]  # [I, J, Y, X, N, R]
    col_logits += cols["bias"][None, :, None, :, None]  # [I, J, Y, X, N, S]
    position = jnp.concatenate([row_logits, col_logits], -1)
    high = position.astype(q.dtype)
    low = (position - high.astype(jnp.float32)).astype(q.dtype)

    codes = np.concatenate(
        [np.repeat(np.eye(rows["keys"]), cols["keys"], 0), np.tile(np.eye(cols["keys"]), (rows["keys"], 1))], 1
    )
    wide = channels + 2 * codes.shape[1]
    total = -(-max(wide, values) // 8) * 8
    queries = jnp.concatenate([blocks, high, low], -1).reshape(-1, rows["queries"] * cols["queries"], heads, wide)
    keys, windows = (_windows(x, rows, cols) for x in (k, v))  # [B * I * J, R * S, N, D]
    codes = jnp.broadcast_to(jnp.asarray(np.tile(codes, 2), k.dtype)[:, None], (*keys.shape[:3], 2 * codes.shape[1]))
    widen = lambda x: jnp.pad(x, ((0, 0),) * 3 + ((0, total - x.shape[-1]),))
    out = jax.nn.dot_product_attention(
        widen(queries), widen(jnp.concatenate([keys, codes], -1)), widen(windows),
        scale=channels**-0.5 if logits_scale is None else logits_scale, implementation=implementation,
    )[..., :values]  # fmt: skip
    out = out.reshape(*blocks.shape[:-1], values).transpose(0, 1, 3, 2, 4, 5, 6)
    out = out.reshape(batch, rows["blocks"] * rows["queries"], cols["blocks"] * cols["queries"], heads, values)
    return out[:, : q.shape[1], : q.shape[2]]


def _axis(size, block, halo, stride, centered, masked):
    blocks, keys = -(-size // block), block + 2 * halo
    distance = np.arange(-halo, block + halo) - np.arange(0, block, stride)[:, None]  # [Y, R]
    position = np.arange(-halo, block + halo) + block * np.arange(blocks)[:, None]  # [I, R]
    hidden = np.zeros((blocks, *distance.shape), bool)
    if masked:
        hidden |= ((position < 0) | (position >= size))[:, None]
    if centered:
        hidden |= abs(distance) > halo
    return dict(
        blocks=blocks, keys=keys, queries=block // stride, offsets=distance + block - 1 + halo, block=block,
        bias=np.where(hidden, np.float32(MASKED), 0), pad=(halo, blocks * block - size + halo),
    )  # fmt: skip


def _windows(x, rows, cols):
    x = jnp.pad(x, ((0, 0), rows["pad"], cols["pad"], (0, 0), (0, 0)))
    for number, axis in ((1, rows), (3, cols)):
        x = jnp.stack(
            [jax.lax.slice_in_dim(x, i * axis["block"], i * axis["block"] + axis["keys"], axis=number)
             for i in range(axis["blocks"])], axis=1 if number == 1 else 2,
        )  # fmt: skip
        # After rows: [B, I, R, W, N, D]; after columns: [B, I, J, R, S, N, D].
    return x.reshape(-1, rows["keys"] * cols["keys"], *x.shape[-2:])
