"""Training targets of one image, with fixed shapes: matching, sampling, and what anchors and regions should predict.

The objects of an image are padded to a fixed number; `valid` says which there are. No target passes a gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from halonet_jax.detection import boxes as box_ops
from halonet_jax.detection import roi_align
from halonet_jax.detection.spec import DetectionSpec

# Masks are cut from bitmaps in the frame of their object. Pixels are squares there, and nothing is beyond the frame.
_MASK_SAMPLING = roi_align.Sampling(samples=2, half_pixel=True, outside="zero")


class Objects(NamedTuple):
    """The objects of one image, padded to G of them.

    Attributes:
        boxes: `[G, 4]`.
        classes: int `[G]`, from 1.
        valid: bool `[G]`; False is padding, whose other values have no effect.
        masks: `[G, M, M]`, 0 and 1, each in the frame of its box: pixel (0, 0) is at the box's top left.
    """

    boxes: jax.Array
    classes: jax.Array
    valid: jax.Array
    masks: jax.Array


class Samples(NamedTuple):
    """Sampled candidates, the positive ones first.

    Attributes:
        index: int32 `[K]`, of the candidate.
        positive: bool `[K]`.
        valid: bool `[K]`; False: there were fewer candidates, and this entry is padding.
    """

    index: jax.Array
    positive: jax.Array
    valid: jax.Array


class AnchorTargets(NamedTuple):
    """What the region proposal network should predict.

    Attributes:
        samples: `Samples` of the anchors, for their scores.
        matched: bool `[A]`, whether an anchor is positive, sampled or not.
        deltas: `[A, 4]`, from each anchor to its object; 0 where not matched.
    """

    samples: Samples
    matched: jax.Array
    deltas: jax.Array


class RoiTargets(NamedTuple):
    """Regions for the heads, the positive ones first, and what the heads should predict.

    Attributes:
        rois: `[R, 4]`, pixels.
        valid: bool `[R]`; False is padding.
        classes: int32 `[R]`; 0: background.
        deltas: `[R, 4]`, weighted; 0 for the background.
        masks: float32 `[Q, N, N]`, 0 and 1, for the first Q regions; 0 for the background.
    """

    rois: jax.Array
    valid: jax.Array
    classes: jax.Array
    deltas: jax.Array
    masks: jax.Array


def overlaps(boxes: jax.Array, objects: Objects) -> jax.Array:
    """Returns the intersection over union of boxes with objects, -1 for padding.

    Args:
        boxes: `[N, 4]`.
        objects: of the image.

    Returns:
        `[N, G]`.
    """
    return jnp.where(objects.valid, box_ops.iou(boxes, objects.boxes), -1)


def match(
    iou: jax.Array, positive: float, negative: float, *, strict: bool = False, rescue: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Matches each box with the object that it overlaps most.

    Args:
        iou: `[N, G]`, -1 for objects that are padding.
        positive: a box with at least this overlap is positive.
        negative: a box with less is negative. Without any object, all boxes are.
        strict: whether positive boxes must have more than `positive`.
        rescue: whether the best box of each object is positive, and matched with it, if it overlaps at all. Of equally good
            boxes it is the first; of several objects that have it as their best, the one that it overlaps most.

    Returns:
        The object's index, int32 `[N]`, and whether the box is positive and negative, bool `[N]`.
    """
    index, best = iou.argmax(1).astype(jnp.int32), iou.max(1)
    is_positive = best > positive if strict else best >= positive
    is_negative = best < negative
    if rescue:
        best_of_object = (jnp.arange(len(iou))[:, None] == iou.argmax(0)) & (iou.max(0) > 0)
        rescued = best_of_object.any(1)
        index = jnp.where(rescued, jnp.where(best_of_object, iou, -1).argmax(1).astype(jnp.int32), index)
        is_positive, is_negative = is_positive | rescued, is_negative & ~rescued
    return index, is_positive, is_negative


def sample(rng: jax.Array, positive: jax.Array, negative: jax.Array, count: int, most_positive: int) -> Samples:
    """Draws candidates at random, without replacement. Places that positive ones leave are filled with negative ones.

    Args:
        rng: a random key.
        positive: bool `[N]`.
        negative: bool `[N]`; no candidate is both.
        count: number of results.
        most_positive: how many of them may be positive.

    Returns:
        `Samples` with K = `count`.
    """
    total, chance = len(positive), jax.random.uniform(rng, positive.shape)
    quota = min(most_positive, total)
    _, first = jax.lax.top_k(jnp.where(positive, chance, -1), quota)
    chosen = jnp.zeros(total, bool).at[first].set(True) & positive
    score, index = jax.lax.top_k(jnp.where(chosen, 2 + chance, jnp.where(negative, chance, -1)), min(count, total))
    pad = (0, count - len(index))
    return Samples(jnp.pad(index, pad), jnp.pad(chosen[index], pad), jnp.pad(score >= 0, pad))


@jax.named_scope("anchor_targets")
def anchor_targets(rng: jax.Array, anchors: jax.Array, objects: Objects, spec: DetectionSpec) -> AnchorTargets:
    """Returns what the region proposal network should predict for an image.

    Args:
        rng: a random key.
        anchors: `[A, 4]`.
        objects: of the image.
        spec: settings `rpn_*`.
    """
    index, positive, negative = match(
        overlaps(anchors, objects), spec.rpn_positive_iou, spec.rpn_negative_iou, rescue=True
    )  # fmt: skip
    samples = sample(rng, positive, negative, spec.rpn_samples, round(spec.rpn_samples * spec.rpn_positive_share))
    deltas = jnp.where(positive[:, None], box_ops.encode(objects.boxes[index], anchors), 0)
    return AnchorTargets(samples, positive, deltas)


@jax.named_scope("roi_targets")
def roi_targets(
    rng: jax.Array, proposals: jax.Array, valid: jax.Array, objects: Objects, spec: DetectionSpec
) -> RoiTargets:  # fmt: skip
    """Samples regions from the proposals and the objects' own boxes.

    Args:
        rng: a random key.
        proposals: `[P, 4]`.
        valid: bool `[P]`.
        objects: of the image.
        spec: settings `roi_*`, `box_weights` and `mask_bins`.
    """
    boxes = jnp.concatenate([proposals, objects.boxes])
    valid = jnp.concatenate([valid, objects.valid])
    index, positive, negative = match(overlaps(boxes, objects), spec.roi_iou, spec.roi_iou, strict=spec.roi_strict)
    samples = sample(rng, positive & valid, negative & valid, spec.roi_samples, spec.mask_rois)
    rois = jnp.where(samples.valid[:, None], boxes[samples.index], 0)
    index = index[samples.index]
    classes = jnp.where(samples.positive, objects.classes[index].astype(jnp.int32), 0)
    deltas = jnp.where(samples.positive[:, None], box_ops.encode(objects.boxes[index], rois, spec.box_weights), 0)
    with_mask = slice(spec.mask_rois)
    masks = crop_masks(objects, index[with_mask], rois[with_mask], 2 * spec.mask_bins)
    return RoiTargets(rois, samples.valid, classes, deltas, jnp.where(samples.positive[with_mask, None, None], masks, 0))


def crop_masks(objects: Objects, index: jax.Array, rois: jax.Array, size: int) -> jax.Array:
    """Cuts masks from the objects' bitmaps.

    Args:
        objects: of the image.
        index: int `[Q]`, the object of each region.
        rois: `[Q, 4]`.
        size: pixels of a mask per axis.

    Returns:
        float32 `[Q, size, size]`, 0 and 1. A pixel is 1 if at least half of it is covered, by bilinear samples.
    """
    frames = objects.boxes[index]
    sides = jnp.maximum(frames[:, 2:] - frames[:, :2], 1e-6)
    pixels = objects.masks.shape[-1]
    local = (rois - jnp.tile(frames[:, :2], 2)) / jnp.tile(sides, 2) * pixels
    rows, columns = (
        roi_align.axis_weights(local[:, axis], local[:, axis + 2], size, pixels, _MASK_SAMPLING) for axis in (0, 1)
    )
    bitmaps = objects.masks[index].astype(jnp.float32)
    covered = jnp.einsum("qih,qhw,qjw->qij", rows, bitmaps, columns, precision=jax.lax.Precision.HIGHEST)
    return (covered >= 0.5).astype(jnp.float32)
