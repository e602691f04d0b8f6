"""Boxes and anchors. A box is (y0, x0, y1, x1): float32 pixels of the image, edges and not pixel centres."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Sides are at most 1000 / 16 times those of the anchor or RoI (Faster R-CNN's code, and all that followed).
_LOG_LIMIT = math.log(1000 / 16)
# Encoding a box without area stays finite. Such boxes are masked out of all losses.
_SMALLEST = 1e-6


def area(boxes: jax.Array) -> jax.Array:
    """Returns areas; a box whose sides are not positive has none.

    Args:
        boxes: `[..., 4]`.

    Returns:
        `[...]`, square pixels.
    """
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the intersection over union of all pairs. A box without area has 0 with every box, itself included.

    Args:
        a: `[N, 4]`.
        b: `[M, 4]`.

    Returns:
        `[N, M]`.
    """
    top_left = jnp.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = jnp.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = area(jnp.concatenate([top_left, bottom_right], axis=-1))
    union = area(a)[:, None] + area(b)[None] - shared
    return shared / jnp.where(union > 0, union, 1)


def encode(boxes: jax.Array, anchors: jax.Array, weights: Sequence[float] = (1, 1, 1, 1)) -> jax.Array:
    """Returns the deltas that `decode` turns into `boxes`.

    Args:
        boxes: `[..., 4]`.
        anchors: `[..., 4]`, anchors or RoIs.
        weights: what the deltas of y, x, height and width are multiplied by.

    Returns:
        `[..., 4]`: shifts of the centre over the anchor's sides, and logarithms of the ratios of sides, weighted.
    """
    centres, sides = _centres_and_sides(boxes)
    anchor_centres, anchor_sides = _centres_and_sides(anchors)
    sides, anchor_sides = jnp.maximum(sides, _SMALLEST), jnp.maximum(anchor_sides, _SMALLEST)
    deltas = [(centres - anchor_centres) / anchor_sides, jnp.log(sides / anchor_sides)]
    return jnp.concatenate(deltas, axis=-1) * jnp.asarray(weights, jnp.float32)


def decode(deltas: jax.Array, anchors: jax.Array, weights: Sequence[float] = (1, 1, 1, 1)) -> jax.Array:
    """Returns boxes from deltas. Sides grow at most by 1000 / 16.

    Args:
        deltas: `[..., 4]`, as `encode` returns them.
        anchors: `[..., 4]`, anchors or RoIs.
        weights: as of `encode`.

    Returns:
        `[..., 4]`, not clipped to an image.
    """
    shifts, logs = jnp.split(deltas.astype(jnp.float32) / jnp.asarray(weights, jnp.float32), 2, axis=-1)
    centres, sides = _centres_and_sides(anchors)
    centres, sides = centres + shifts * sides, sides * jnp.exp(jnp.minimum(logs, _LOG_LIMIT))
    return jnp.concatenate([centres - sides / 2, centres + sides / 2], axis=-1)


def clip(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Returns the parts of boxes within an image.

    Args:
        boxes: `[..., 4]`.
        size: `[2]`, height and width of the image in pixels, without padding.

    Returns:
        `[..., 4]`. A box outside of the image has no area.
    """
    return jnp.clip(boxes, 0, jnp.tile(size.astype(jnp.float32), 2))


def anchors(
    shapes: Sequence[tuple[int, int]], strides: Sequence[int], size: float, ratios: Sequence[float], offset: float
) -> tuple[jax.Array, ...]:
    """Returns the anchors of each level of a pyramid.

    Args:
        shapes: rows and columns of each level's map.
        strides: pixels of the image per pixel of each map.
        size: the side of a square anchor, in strides. All anchors of a level have its area.
        ratios: width over height of the anchors at one place.
        offset: of the first centre from the image's corner, in strides: 0.5 for the middle of a map's pixel, 0 for its corner.

    Returns:
        For each level `[rows * columns * ratios, 4]`, by row, then column, then ratio.
    """
    found = []
    for (rows, columns), stride in zip(shapes, strides):
        half = jnp.array([(size * stride / r**0.5 / 2, size * stride * r**0.5 / 2) for r in ratios], jnp.float32)
        y, x = ((jnp.arange(count, dtype=jnp.float32) + offset) * stride for count in (rows, columns))
        centres = jnp.stack(jnp.meshgrid(y, x, indexing="ij"), axis=-1)[:, :, None]  # [rows, columns, 1, 2]
        found.append(jnp.concatenate([centres - half, centres + half], axis=-1).reshape(-1, 4))
    return tuple(found)


def _centres_and_sides(boxes):
    sides = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + sides / 2, sides
