"""Losses as sums over a batch of images and normalisers, all finite for images without objects.

The normalisers are `DetectionSpec.box_loss`: "matched" as TensorFlow's TPU code has them, "sampled" as detectron2 has.
A mean is over the whole batch, where the TPU code takes means over the images of one core.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from halonet_jax.detection.spec import DetectionSpec
from halonet_jax.detection.targets import AnchorTargets, RoiTargets


def anchor_sums(
    logits: jax.Array, deltas: jax.Array, targets: AnchorTargets, sizes: Sequence[int], spec: DetectionSpec
) -> dict:
    """Sums of one image, which `anchor_losses` turns into losses. Nothing of it needs another image.

    Args:
        logits: `[A]`, of "object".
        deltas: `[A, 4]`.
        targets: of the image.
        sizes: anchors of each level, A together.
        spec: settings `rpn_huber` and `box_loss`.

    Returns:
        `score`, the cross-entropy of the samples; `box` `[L]`, of each level's anchors; `coordinates` `[L]`, how many these
            are of.
    """
    samples = targets.samples
    score = jnp.where(samples.valid, binary_cross_entropy(logits[samples.index], samples.positive), 0).sum()
    if spec.box_loss == "matched":
        counted = targets.matched[:, None] & (targets.deltas != 0)
    else:
        # A scatter of ones alone: what is added where a sample is not positive is False.
        sampled = jnp.zeros(len(logits), bool).at[samples.index].max(samples.positive)
        counted = jnp.broadcast_to(sampled[:, None], deltas.shape)
    box = jnp.where(counted, huber(deltas - targets.deltas, spec.rpn_huber), 0)
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes) - 1)]
    by_level = lambda x: jnp.stack([part.sum(dtype=jnp.float32) for part in jnp.split(x, ends)])
    return {"score": score, "box": by_level(box), "coordinates": by_level(counted)}


def anchor_losses(sums: dict, spec: DetectionSpec) -> dict:
    """Returns the losses of the region proposal network.

    Args:
        sums: of `anchor_sums`, with a leading axis over the images.
        spec: settings `rpn_samples` and `box_loss`.

    Returns:
        `rpn_score` and `rpn_box`, float32 scalars.
    """
    samples = len(sums["score"]) * spec.rpn_samples
    box = sums["box"].sum(0)
    box = box / jnp.maximum(sums["coordinates"].sum(0), 1) if spec.box_loss == "matched" else box / samples
    return {"rpn_score": sums["score"].sum() / samples, "rpn_box": box.sum()}


def box_losses(logits: jax.Array, deltas: jax.Array, targets: RoiTargets, spec: DetectionSpec) -> dict:
    """Returns the losses of the box head.

    Args:
        logits: `[B, R, classes]`.
        deltas: `[B, R, classes, 4]`.
        targets: with a leading axis over the images.
        spec: settings `box_huber` and `box_loss`.

    Returns:
        `class` and `box`, float32 scalars.
    """
    positive = targets.classes > 0
    samples = jnp.maximum(targets.valid.sum(), 1)
    one_hot = jax.nn.one_hot(targets.classes, logits.shape[-1])
    cross_entropy = -(jax.nn.log_softmax(logits) * one_hot).sum(-1)
    own = (deltas * one_hot[..., None]).sum(-2)
    box = jnp.where(positive[..., None], huber(own - targets.deltas, spec.box_huber), 0).sum()
    return {
        "class": jnp.where(targets.valid, cross_entropy, 0).sum() / samples,
        "box": box / (jnp.maximum(4 * positive.sum(), 1) if spec.box_loss == "matched" else samples),
    }


def mask_loss(logits: jax.Array, targets: RoiTargets) -> dict:
    """Returns the loss of the mask head: the mean over the pixels of positive regions.

    Args:
        logits: `[B, Q, N, N, classes]`, of the first Q regions.
        targets: with a leading axis over the images.

    Returns:
        `mask`, a float32 scalar.
    """
    classes = targets.classes[:, : logits.shape[1]]
    loss = binary_cross_entropy(of_class(logits, classes), targets.masks).mean((2, 3))
    positive = classes > 0
    return {"mask": jnp.where(positive, loss, 0).sum() / jnp.maximum(positive.sum(), 1)}


def of_class(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """Returns each region's logits of one class, by a product, which any sharding of the batch leaves in its place.

    Args:
        logits: `[B, Q, N, N, classes]`.
        classes: int `[B, Q]`.

    Returns:
        `[B, Q, N, N]`.
    """
    one_hot = jax.nn.one_hot(classes, logits.shape[-1], dtype=logits.dtype)
    return (logits * one_hot[:, :, None, None]).sum(-1)


def huber(error: jax.Array, delta: float) -> jax.Array:
    """Returns the Huber loss of each error; for `delta` 0 the absolute error.

    Args:
        error: any shape.
        delta: errors up to this count by half their square, others by `delta * (error - delta / 2)`.
    """
    size = jnp.abs(error)
    return jnp.where(size <= delta, 0.5 * error * error, delta * (size - delta / 2)) if delta else size


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the cross-entropy of the sigmoid of each logit.

    Args:
        logits: any shape.
        targets: of the same shape, 0 to 1 or bool.
    """
    return jax.nn.softplus(logits) - logits * targets
