"""Exact greedy non-maximum suppression with fixed shapes.

A box is dropped if it overlaps a box of higher score that is kept, by more than the threshold. Of equal scores, the box
with the lower index comes first. The result is that of `tf.image.non_max_suppression`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from halonet_jax import ops
from halonet_jax.detection import boxes as box_ops


class Kept(NamedTuple):
    """What is kept, by falling score.

    Attributes:
        index: int32 `[K]`, of the box.
        valid: bool `[K]`; False: this entry is padding, and `index` any number in range.
    """

    index: jax.Array
    valid: jax.Array


def best(scores: jax.Array, count: int, how: str = "top_k") -> tuple[jax.Array, jax.Array]:
    """Returns the highest scores, falling, and their places; of equal ones, the first.

    Args:
        scores: `[N]`.
        count: at most N.
        how: "top_k", or "sort", which gives the same and which TensorFlow can read.
    """
    if how == "top_k":
        return jax.lax.top_k(scores, count)
    negated, order = jax.lax.sort((-scores, jnp.arange(len(scores), dtype=jnp.int32)), num_keys=1, is_stable=True)
    return -negated[:count], order[:count]


@jax.named_scope("nms")
def nms(
    boxes: jax.Array, scores: jax.Array, valid: jax.Array, threshold: float, count: int, labels: jax.Array | None = None
) -> Kept:
    """Keeps the best boxes that do not overlap each other.

    Args:
        boxes: `[N, 4]`.
        scores: `[N]`. A box with NaN is not valid.
        valid: bool `[N]`; the others are neither kept nor suppress any.
        threshold: a box is suppressed at an intersection over union of more than this.
        count: number of results.
        labels: int `[N]`; boxes with different labels do not suppress each other. None: all have the same.

    Returns:
        `Kept` with K = `count`.
    """
    scores = jnp.where(valid & ~jnp.isnan(scores), scores, -jnp.inf)
    scores, order = best(scores, len(scores), "sort")
    keep = suppress(boxes[order], scores > -jnp.inf, threshold, None if labels is None else labels[order])
    (position,) = jnp.nonzero(keep, size=count, fill_value=len(order))
    return Kept(order[jnp.minimum(position, len(order) - 1)], position < len(order))


def suppress(boxes: jax.Array, valid: jax.Array, threshold: float, labels: jax.Array | None = None) -> jax.Array:
    """Returns which boxes are kept: by the sequential form on a CPU, by the fixed point elsewhere.

    Args:
        boxes: `[N, 4]` by falling score.
        valid: bool `[N]`.
        threshold: as of `nms`.
        labels: as of `nms`.

    Returns:
        bool `[N]`.
    """
    labels = jnp.zeros(len(boxes), jnp.int32) if labels is None else labels
    return ops.by_platform(
        boxes, valid, labels,
        cpu=lambda *arrays: sequential(*arrays, threshold), default=lambda *arrays: fixed_point(*arrays, threshold),
    )  # fmt: skip


def fixed_point(boxes: jax.Array, valid: jax.Array, labels: jax.Array, threshold: float) -> jax.Array:
    """Iterates "kept, if no kept box before it overlaps" until nothing changes.

    Each round decides at least the first undecided box, so that the loop ends, and there is one fixed point, the greedy
    one. The number of rounds is the longest chain of boxes that decide each other: 4 to 8 for the proposals of a picture.

    Args:
        boxes: `[N, 4]` by falling score.
        valid: bool `[N]`.
        labels: int32 `[N]`.
        threshold: as of `nms`.

    Returns:
        bool `[N]`.
    """
    order = jnp.arange(len(boxes))
    over = (box_ops.iou(boxes, boxes) > threshold) & (labels[:, None] == labels) & (order[:, None] < order)

    def step(state):
        keep, _ = state
        new = valid & ~(over & keep[:, None]).any(0)
        return new, (new != keep).any()

    return jax.lax.while_loop(lambda state: state[1], step, (valid, jnp.bool_(True)))[0]


def sequential(boxes: jax.Array, valid: jax.Array, labels: jax.Array, threshold: float) -> jax.Array:
    """Lets each kept box in turn drop those after it. It computes one row of overlaps at a time.

    Args:
        boxes: `[N, 4]` by falling score.
        valid: bool `[N]`.
        labels: int32 `[N]`.
        threshold: as of `nms`.

    Returns:
        bool `[N]`.
    """
    order = jnp.arange(len(boxes))

    def step(i, keep):
        over = (box_ops.iou(boxes[i][None], boxes)[0] > threshold) & (labels[i] == labels) & (i < order)
        return keep & ~(over & keep[i])

    return jax.lax.fori_loop(0, len(boxes), step, valid)
