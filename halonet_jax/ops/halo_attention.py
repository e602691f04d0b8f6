"""The contract of blocked local self-attention with haloing (HaloNet, arXiv 2103.12731, sections 2-3)."""

import functools
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp

from halonet_jax.ops import reference, selection

WINDOWS = ("neighborhood", "centered")
PADDINGS = ("mask", "zero")
TABLE_OFFSETS = ("pixels", "queries")


def halo_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rel_rows: jax.Array | None,
    rel_cols: jax.Array | None,
    *,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    window: str = "neighborhood",
    padding: str = "mask",
    logits_scale: float | None = None,
    table_offsets: str = "pixels",
    implementation: str | Callable = "auto",
) -> jax.Array:
    """Attends from every query pixel to the neighbourhood of its block.

    The map is cut into blocks of `block_size` x `block_size` pixels, from the top left. A block's neighbourhood is the
    block with `halo_size` more pixels on each side. A query at pixel (y, x) of the map and a key at pixel (r, s) have
    the logit

        logit = logits_scale * (q · k + q_rows · rel_rows[r - y + b - 1 + h] + q_cols · rel_cols[s - x + b - 1 + h]),

    and the softmax is over the neighbourhood. If the tables are `[2b + 2h - 1, D / 2]`, `q_rows` is the first half of
    q's channels and `q_cols` the second (the paper's factorised form). If they are `[2b + 2h - 1, D]`, both are all of
    q. All heads share the tables. If both are None, the logit is `logits_scale * q · k`. Any map size
    works. One block that covers the map gives global attention. `block_size=1` gives attention over windows around each pixel.

    Source: arXiv 2103.12731, sections 2 and 3. The paper does not state `padding`; `window="centered"` is not the
    paper's.

    Args:
        q: `[B, ceil(H / stride), ceil(W / stride), N, D]`, queries. Pixel (i, j) of q is pixel (i * stride, j * stride)
            of the map. Not scaled. float32, bfloat16 or float64, as k and v.
        k: `[B, H, W, N, D]`, keys.
        v: `[B, H, W, N, E]`, values. E may differ from D.
        rel_rows: `[2 * block_size + 2 * halo_size - 1, D / 2 or D]`, any float dtype. Row 0 is for a key b - 1 + h rows
            above the query. None: no position term; `rel_cols` must be None too.
        rel_cols: the same for columns, from left to right.
        block_size: b, in pixels of the map; at least 1.
        halo_size: h, in pixels of the map; at least 0. 0 is attention within blocks.
        stride: pixels of the map from one query to the next, per axis; at least 1. 2 is the paper's attention
            downsampling: every second query per axis, with the same neighbourhoods.
        window: "neighborhood": every query of a block sees the whole neighbourhood, as in the paper. "centered": keys
            more than `halo_size` rows or columns away from the query are masked. These are the windows of SASA, arXiv
            1906.05909, with k = 2h + 1.
        padding: what keys outside of the map do. "mask": they take no part. "zero": they take part with zero key and
            value, and keep the logit of their position, as in timm.
        logits_scale: positive factor on both terms; None: `D ** -0.5`. For a position term without scale, as in timm,
            divide the tables by the scale.
        table_offsets: what strided queries are to the tables. "pixels": y and x above are pixels of the map. "queries":
            they are counted in queries from the first of the block, so that queries are adjacent to the tables, as in
            timm; `stride` must divide `block_size`. With stride 1 both are the same.
        implementation: "auto": the fastest for the platform and the shapes, see `selection`. "xla": einsums. "pallas":
            the fused kernels of the platform, see `unsupported` in `ops.tpu` and `ops.gpu`; a CPU interprets TPU's,
            which is slow. "reference": slow and obvious, in float32. Or a function like `reference.attend`. The
            platform is the one that the program is lowered for, see `platforms`. An export for CUDA needs "auto" or
            "xla", since `jax.export` refuses GPU kernels. All implementations have gradients (`jax.grad`); only
            "reference" has forward derivatives (`jax.jvp`) on every platform.

    Returns:
        `[B, ceil(H / stride), ceil(W / stride), N, E]` in v's dtype. Logits and softmax are at least float32. With
        bfloat16 inputs, the softmax weights are rounded to bfloat16 for the product with v.

    Raises:
        ValueError: an argument breaks a rule above; the message states value and rule.
    """
    _check(q, k, v, rel_rows, rel_cols, block_size, halo_size, stride, window, padding, implementation, table_offsets)
    if rel_rows is None:  # Implementations take this as tables without channels.
        rel_rows = rel_cols = jnp.zeros((2 * block_size + 2 * halo_size - 1, 0), q.dtype)
    if logits_scale is None:
        logits_scale = q.shape[-1] ** -0.5
    if not logits_scale > 0:
        raise ValueError(f"logits_scale={logits_scale!r} must be more than 0")
    options = dict(
        block_size=block_size, halo_size=halo_size, stride=stride, centered=window == "centered", masked=padding == "mask"
    )
    if table_offsets == "queries" and stride > 1:
        options["adjacent"] = True
    if implementation == "reference":
        implementation = reference.attend
    elif not callable(implementation):
        implementation = functools.partial(selection.attend, implementation=implementation)
    if block_size % stride == 0 or implementation is reference.attend:
        return implementation(q, k, v, rel_rows, rel_cols, **options, logits_scale=logits_scale)
    # Blocks hold unequal numbers of queries: attend from every pixel, then keep every stride-th.
    q = jnp.zeros(k.shape, q.dtype).at[:, ::stride, ::stride].set(q)
    out = implementation(q, k, v, rel_rows, rel_cols, **options | {"stride": 1}, logits_scale=logits_scale)
    return out[:, ::stride, ::stride]


def _check(q, k, v, rel_rows, rel_cols, block_size, halo_size, stride, window, padding, implementation, table_offsets):
    for name, value, known in (
        ("window", window, WINDOWS), ("padding", padding, PADDINGS), ("implementation", implementation, selection.NAMES),
        ("table_offsets", table_offsets, TABLE_OFFSETS),
    ):  # fmt: skip
        if value not in known and not (name == "implementation" and callable(value)):
            raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(known)}")
    for name, value, least in (("block_size", block_size, 1), ("halo_size", halo_size, 0), ("stride", stride, 1)):
        if not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
    if table_offsets == "queries" and block_size % stride:
        raise ValueError(
            f"table_offsets='queries' needs a block_size that stride={stride} divides, not {block_size}; use 'pixels', or "
            f"block_size={-(-block_size // stride) * stride}"
        )
    if (rel_rows is None) != (rel_cols is None):
        given, absent = ("rel_cols", "rel_rows") if rel_rows is None else ("rel_rows", "rel_cols")
        raise ValueError(f"{absent}=None leaves {given} without its pair; give both tables, or None for both")
    for name, array, rank, axes in (
        ("q", q, 5, "[batch, height, width, heads, channels]"), ("k", k, 5, "[batch, height, width, heads, channels]"),
        ("v", v, 5, "[batch, height, width, heads, channels]"), ("rel_rows", rel_rows, 2, "[offsets, channels]"),
        ("rel_cols", rel_cols, 2, "[offsets, channels]"),
    ):  # fmt: skip
        if array is not None and array.ndim != rank:
            raise ValueError(f"{name} has shape {array.shape}; it must be {axes}")
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float64):
            raise ValueError(f"{name} is {array.dtype}; it must be float32 or bfloat16 (in float16, masked logits overflow)")
    batch, height, width, heads, channels = k.shape
    expected_q = (batch, -(-height // stride), -(-width // stride), heads, channels)
    if q.shape != expected_q:
        raise ValueError(f"q has shape {q.shape}; with k of shape {k.shape} and stride={stride} it must be {expected_q}")
    if v.shape[:4] != k.shape[:4]:
        raise ValueError(f"v has shape {v.shape}; all but its channels must be those of k, {k.shape}")
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"q of shape {q.shape} and v of shape {v.shape} must have no empty axis")
    if rel_rows is None:
        return
    offsets = 2 * block_size + 2 * halo_size - 1
    if rel_rows.shape != rel_cols.shape or rel_rows.shape[0] != offsets or rel_rows.shape[1] not in (channels, channels / 2):
        raise ValueError(
            f"rel_rows and rel_cols have shapes {rel_rows.shape} and {rel_cols.shape}; with block_size={block_size}, "
            f"halo_size={halo_size} and {channels} channels per head both must be ({offsets}, {channels / 2:g}) or "
            f"({offsets}, {channels})"
        )
