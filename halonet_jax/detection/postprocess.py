"""From scores and deltas to boxes of one image: proposals of the first stage, detections of the second."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from halonet_jax.detection import boxes as box_ops
from halonet_jax.detection.nms import best, nms
from halonet_jax.detection.spec import DetectionSpec


class Detections(NamedTuple):
    """Detected objects by falling score, padded to D of them.

    Attributes:
        boxes: float32 `[D, 4]`, pixels; 0 for padding, as all that follows.
        scores: float32 `[D]`.
        classes: int32 `[D]`, from 1.
        valid: bool `[D]`; False is padding.
    """

    boxes: jax.Array
    scores: jax.Array
    classes: jax.Array
    valid: jax.Array


@jax.named_scope("proposals")
def proposals(
    logits: jax.Array, deltas: jax.Array, anchors: Sequence[jax.Array], size: jax.Array, spec: DetectionSpec, candidates: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the best-scored boxes of all levels, without those that overlap a better one of their level.

    Args:
        logits: `[A]`.
        deltas: `[A, 4]`.
        anchors: `[A_l, 4]` for each level l, A together.
        size: `[2]`, height and width of the image in pixels, without padding. Boxes are clipped to it.
        spec: settings `proposals` and `proposal_nms`.
        candidates: of each level, before suppression.

    Returns:
        boxes `[P, 4]` by falling score, and bool `[P]`, False for padding, with P = `spec.proposals` or what all levels can
        give, if that is less.
    """
    most = min(candidates, max(len(level) for level in anchors))
    boxes, scores, start = [], [], 0
    for level in anchors:
        here = slice(start, start + len(level))
        start += len(level)
        score, index = best(logits[here], min(candidates, len(level)), spec.best_by)
        box = box_ops.clip(box_ops.decode(deltas[here][index], level[index]), size)
        pad = most - len(index)
        boxes.append(jnp.pad(box, ((0, pad), (0, 0))))
        scores.append(jnp.pad(score, (0, pad), constant_values=-jnp.inf))
    boxes, scores = jnp.stack(boxes), jnp.stack(scores)  # [L, most, ...]: one loop suppresses on all levels
    count = min(spec.proposals, most)
    valid = (box_ops.area(boxes) > 0) & (scores > -jnp.inf)
    kept = jax.vmap(lambda *level: nms(*level, spec.proposal_nms, count))(boxes, scores, valid)
    boxes = jnp.take_along_axis(boxes, kept.index[..., None], axis=1).reshape(-1, 4)
    scores = jnp.where(kept.valid, jnp.take_along_axis(scores, kept.index, axis=1), -jnp.inf).reshape(-1)
    scores, index = best(scores, min(spec.proposals, len(scores)), spec.best_by)
    return boxes[index], scores > -jnp.inf


def detections(
    logits: jax.Array, deltas: jax.Array, rois: jax.Array, valid: jax.Array, size: jax.Array, spec: DetectionSpec
) -> Detections:
    """Returns the best classes and boxes of all regions, without those that overlap a better one of their class.

    Args:
        logits: `[R, classes]`, the background first.
        deltas: `[R, classes, 4]`.
        rois: `[R, 4]`.
        valid: bool `[R]`; False is padding.
        size: `[2]`, height and width of the image in pixels, without padding. Boxes are clipped to it.
        spec: settings `box_weights`, `min_score` and `detection*`.

    Returns:
        `Detections` with D = `spec.detections`.
    """
    scores = jax.nn.softmax(logits)[:, 1:]
    scores = jnp.where(valid[:, None] & (scores >= spec.min_score), scores, 0).reshape(-1)
    scores, pair = best(scores, min(spec.detection_candidates, len(scores)), spec.best_by)
    region, label = jnp.divmod(pair, logits.shape[1] - 1)
    boxes = box_ops.clip(box_ops.decode(deltas[region, label + 1], rois[region], spec.box_weights), size)
    usable = (scores > 0) & (box_ops.area(boxes) > 0)
    kept = nms(boxes, scores, usable, spec.detection_nms, spec.detections, label)
    masked = lambda x: jnp.where(kept.valid.reshape(-1, *(1,) * (x.ndim - 1)), x[kept.index], 0)
    return Detections(masked(boxes), masked(scores), masked(label.astype(jnp.int32) + 1), kept.valid)
