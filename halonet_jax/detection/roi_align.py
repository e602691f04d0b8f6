"""RoIAlign (arXiv 1703.06870) on a feature pyramid: a fixed square of features for each region of interest (RoI).

The RoI is cut into `size` x `size` bins. A bin's feature is the mean of bilinear samples at fixed points in it. Two
forms compute it. Einsums multiply the maps by matrices of interpolation weights, which suits matrix units. A gather reads
the four neighbours of each sample. They share nothing but the points, so that each is a check of the other.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from halonet_jax import ops

# Rows of bins at a time: 32 regions of 7 x 7 bins, 16 of 14 x 14. Their intermediate results are recomputed in the backward
# pass. Compiled for TPU v5e, einsums with their gradient then take 0.06 GB (7 x 7 bins, 512 regions an image) or 0.07 GB
# (14 x 14, 128 regions) beside the maps, for 4 images of 1024 px in bfloat16. The rows fit on-chip memory: twice as many
# take twice the memory and three to four times the traffic.
CHUNK_ROWS = 224
MOST_SAMPLES = 8  # of an adaptive bin, per axis: enough for regions four times as high as wide


class Sampling(NamedTuple):
    """Where the samples lie.

    Attributes:
        samples: of a bin, per axis; 0: one per pixel of the map that the bin is high or wide, rounded up, at most
            `MOST_SAMPLES`.
        half_pixel: whether a map's pixel (i, j) lies at its middle, (i + 0.5, j + 0.5) strides; otherwise at its corner.
        outside: what a sample outside of the map is: "clamp" gives the nearest pixel; "zero" gives 0, if it is a pixel or
            more outside.
    """

    samples: int = 1
    half_pixel: bool = False
    outside: str = "clamp"


def roi_levels(rois: jax.Array, strides: Sequence[int], base_size: float = 224) -> jax.Array:
    """Assigns regions to levels: those of `base_size` to stride 16, those of half the size to stride 8, and so on.

    The level is floor(log2(sqrt(area) / base_size)) from stride 16 on, limited to the levels there are (arXiv 1612.03144,
    equation 1). Areas are compared with the powers, since logarithms would round.

    Args:
        rois: `[..., 4]`, pixels of the image.
        strides: of the levels, rising by factors of 2.
        base_size: pixels.

    Returns:
        int32 `[...]`, index into `strides`.
    """
    sides = jnp.maximum(rois[..., 2:] - rois[..., :2], 0)
    area = sides[..., 0] * sides[..., 1]
    limits = jnp.array([(base_size * stride / 16) ** 2 for stride in strides[1:]], jnp.float32)
    return (area[..., None] >= limits).sum(-1, dtype=jnp.int32)


def roi_align(
    maps: Sequence[jax.Array], rois: jax.Array, strides: Sequence[int], size: int, sampling: Sampling,
    base_size: float = 224.0,
) -> jax.Array:  # fmt: skip
    """Returns the features of regions: by einsums, but on a CPU by the gather where bins have a fixed number of samples.

    On two CPU cores, the gather with its gradient takes a twelfth of the einsums' time at one sample a bin, and five times as
    long for adaptive bins (128 regions of a 512 px image, 64 channels).

    Args:
        maps: for each level `[H, W, C]`, of one image.
        rois: `[R, 4]`, pixels of the image.
        strides: pixels of the image per pixel of each map.
        size: bins per axis.
        sampling: where samples lie.
        base_size: as of `roi_levels`.

    Returns:
        `[R, size, size, C]` in the dtype of the maps. Gradients reach the maps, not the regions.
    """
    options = dict(strides=tuple(strides), size=size, sampling=sampling, base_size=base_size)
    einsum, gather = functools.partial(by_einsum, **options), functools.partial(by_gather, **options)
    rois = jax.lax.stop_gradient(rois)
    return ops.by_platform(tuple(maps), rois, cpu=gather if sampling.samples else einsum, default=einsum)


def by_einsum(maps, rois, *, strides, size, sampling, base_size=224.0) -> jax.Array:
    """As `roi_align`; each chunk of regions takes two products of matrices per level."""

    def features(rois):
        levels, total = roi_levels(rois, strides, base_size), 0
        for level, (x, stride) in enumerate(zip(maps, strides)):
            own = (levels == level)[:, None, None]
            rows, columns = (
                axis_weights(rois[:, axis] / stride, rois[:, axis + 2] / stride, size, x.shape[axis], sampling)
                for axis in (0, 1)
            )
            product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
            y = product("rih,hwc->riwc", jnp.where(own, rows, 0).astype(x.dtype), x)
            total += product("rjw,riwc->rijc", columns.astype(x.dtype), y)
        return total

    return _in_chunks(features, rois, size)


def by_gather(maps, rois, *, strides, size, sampling, base_size=224.0) -> jax.Array:
    """As `roi_align`; the four neighbours of each sample are read from all levels' pixels, one after the other."""
    pixels = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in maps])
    shapes = np.array([x.shape[:2] for x in maps])
    starts = jnp.asarray(np.cumsum([0, *shapes.prod(1)[:-1]]))

    def features(rois):
        levels = roi_levels(rois, strides, base_size)
        scaled = rois / jnp.asarray(strides, jnp.float32)[levels][:, None]
        sides = jnp.asarray(shapes)[levels]  # [R, 2]
        (y, rows), (x, columns) = (
            _neighbors(_points(scaled[:, axis], scaled[:, axis + 2], size, sampling), sides[:, axis], sampling)
            for axis in (0, 1)
        )
        index = starts[levels][:, None, None] + y[:, :, None] * sides[:, 1, None, None] + x[:, None]  # [R, Y, X]
        near = pixels[index].reshape(len(rois), size, -1, size, y.shape[1] // size, pixels.shape[-1])
        weights = (w.reshape(len(rois), size, -1).astype(near.dtype) for w in (rows, columns))
        return jnp.einsum("riajbc,ria,rjb->rijc", near, *weights, precision=jax.lax.Precision.HIGHEST)

    return _in_chunks(features, rois, size)


def axis_weights(start: jax.Array, end: jax.Array, size: int, length: int, sampling: Sampling) -> jax.Array:
    """Returns the share of each pixel of one axis in each bin. A sample's weights fall from 1 to 0 within a pixel.

    Args:
        start: `[R]`, of the regions, in pixels of the map.
        end: `[R]`.
        size: bins.
        length: pixels of the map.
        sampling: where samples lie.

    Returns:
        float32 `[R, size, length]`.
    """
    at, share = _within(*_points(start, end, size, sampling), length, sampling)
    distance = jnp.abs(at[..., None] - jnp.arange(length, dtype=jnp.float32))  # [R, size, S, length]
    return (jnp.maximum(0, 1 - distance) * share[..., None]).sum(-2)


def _in_chunks(features: Callable, rois, size):
    """Maps `features` over chunks of equal size, the last one padded with empty regions."""
    chunks = math.ceil(len(rois) / max(1, CHUNK_ROWS // size))
    chunk = math.ceil(len(rois) / chunks)
    padded = jnp.pad(rois, ((0, chunks * chunk - len(rois)), (0, 0))).reshape(chunks, chunk, 4)
    found = jax.lax.map(jax.checkpoint(features, prevent_cse=False), padded)
    return found.reshape(-1, *found.shape[2:])[: len(rois)]


def _points(start, end, size, sampling):
    """Coordinates of samples on one axis, in pixels of the map, and their share in the bin: both `[R, size, S]`.

    They are rounded as in other implementations, operation by operation. Beyond pixel 128, a step of float32 is 1.5e-5
    pixels, and features would differ by as much. Left to itself, XLA multiplies by the inverse of a divisor that several
    elements share, and fuses a product with its sum on a CPU. Each `where` and the second `maximum` keep it from that.
    """
    start, end = (x[:, None, None] - 0.5 * sampling.half_pixel for x in (start, end))
    side = jnp.maximum(end - start, 0)
    bin_size = side / jnp.where(side > 0, size, 1)
    count = sampling.samples or jnp.clip(jnp.ceil(bin_size), 0, MOST_SAMPLES)
    sample = jnp.arange(sampling.samples or MOST_SAMPLES, dtype=jnp.float32)
    share = jnp.where(sample < count, 1 / jnp.maximum(count, 1), 0)
    corner = jnp.maximum(jnp.arange(size, dtype=jnp.float32)[:, None] * bin_size, 0)
    at = start + corner + (sample + 0.5) * bin_size / jnp.where((sample < count) & (side > 0), count, 1)
    return at, jnp.broadcast_to(share, at.shape)


def _within(at, share, length, sampling):
    """Coordinates within the map, and shares without the samples that count as zeros."""
    if sampling.outside == "zero":
        share = jnp.where((at >= -1) & (at <= length), share, 0)
    return jnp.clip(at, 0, length - 1), share


def _neighbors(points, lengths, sampling):
    """Indices of the two pixels next to each sample on one axis, and their weights: both `[R, size * S * 2]`."""
    lengths = lengths[:, None, None]
    at, share = _within(*points, lengths, sampling)
    low = jnp.floor(at).astype(jnp.int32)
    index = jnp.stack([low, jnp.minimum(low + 1, lengths - 1)], axis=-1)
    weight = jnp.stack([1 - (at - low), at - low], axis=-1) * share[..., None]
    return index.reshape(len(index), -1), weight.reshape(len(weight), -1)
