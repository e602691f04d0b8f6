"""Losses against sums written out, for the normalisers of both recipes, and without objects."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet_jax.detection import DETECTRON2, PAPER, losses
from halonet_jax.detection.targets import AnchorTargets, RoiTargets, Samples

SPECS = pytest.mark.parametrize("recipe", (PAPER, DETECTRON2), ids=("paper", "detectron2"))
SIZES = (5, 3)  # anchors of two levels


def bce(logits, targets):
    return np.log1p(np.exp(np.where(targets, -logits, logits)))


def huber(error, delta):
    return np.where(np.abs(error) <= delta, error**2 / 2, delta * (np.abs(error) - delta / 2)) if delta else np.abs(error)


def anchor_batch(objects):
    """Two images: logits, deltas and targets. Samples 0 and 1 are positive in the first image, if it has objects."""
    rng = np.random.default_rng(0)
    logits, deltas = rng.standard_normal((2, 8)).astype(np.float32), rng.standard_normal((2, 8, 4)).astype(np.float32)
    matched, goals = np.zeros((2, 8), bool), np.zeros((2, 8, 4), np.float32)
    if objects:
        matched[0, [1, 2, 6]] = True
        goals[0, [1, 2, 6]] = [[0.5, 0, 0.1, -0.2], [0.05, 1, 0, 0], [0.3, 0.3, 0.3, 0.3]]
    positive = np.array([[objects, objects, False, False], [False] * 4])
    samples = Samples(np.array([[1, 6, 0, 3], [4, 5, 7, 0]]), positive, np.array([[True] * 4, [True, True, True, False]]))
    return logits, deltas, AnchorTargets(*jax.tree.map(jnp.asarray, (samples, matched, goals)))


@SPECS
@pytest.mark.parametrize("objects", (True, False))
def test_anchor_losses(recipe, objects):
    spec = dataclasses.replace(recipe, rpn_samples=4)
    logits, deltas, goals = anchor_batch(objects)

    @jax.jit
    @jax.value_and_grad
    def run(values):
        sums = jax.vmap(lambda *image: losses.anchor_sums(*image, SIZES, spec))(*values, goals)
        found = losses.anchor_losses(sums, spec)
        return found["rpn_score"] + 10 * found["rpn_box"]

    total, gradients = run((jnp.asarray(logits), jnp.asarray(deltas)))
    score = bce(logits[0, [1, 6]], objects).sum() + bce(logits[0, [0, 3]], 0).sum() + bce(logits[1, [4, 5, 7]], 0).sum()
    error = huber(deltas - np.asarray(goals.deltas), spec.rpn_huber)[0]
    if recipe is PAPER:  # coordinates with a target other than 0: 3 + 2 on the first level, 4 on the second
        fine, coarse = error[1, [0, 2, 3]].sum() + error[2, :2].sum(), error[6].sum()
        box = fine / 5 + coarse / 4
    else:
        box = error[[1, 6]].sum() / (2 * 4)
    np.testing.assert_allclose(total, score / (2 * 4) + 10 * box * objects, rtol=1e-5)
    assert all(np.isfinite(g).all() for g in gradients) and gradients[1].any() == objects


@SPECS
@pytest.mark.parametrize("objects", (True, False))
def test_region_losses(recipe, objects):
    """Classes 2 and 1, one background region and one that is padding; masks of the positive ones."""
    rng = np.random.default_rng(1)
    logits, deltas, masks = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((1, 4, 3), (1, 4, 3, 4), (1, 3, 2, 2, 3))
    )
    classes = np.array([[2, 1, 0, 0]]) * objects
    goals = np.array([[[0.5] * 4, [3.0] * 4, [0] * 4, [0] * 4]], np.float32) * objects
    mask_goals = rng.integers(0, 2, (1, 3, 2, 2)).astype(np.float32)
    regions = RoiTargets(*map(jnp.asarray, (np.zeros((1, 4, 4)), np.array([[1, 1, 1, 0]], bool), classes, goals, mask_goals)))

    @jax.jit
    @jax.value_and_grad
    def run(values):
        found = losses.box_losses(*values[:2], regions, recipe) | losses.mask_loss(values[2], regions)
        return found["class"] + 10 * found["box"] + 100 * found["mask"]

    total, gradients = run((jnp.asarray(logits), jnp.asarray(deltas), jnp.asarray(masks)))
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -sum(log_probabilities[0, n, classes[0, n]] for n in range(3)) / 3
    if objects:
        box = sum(huber(deltas[0, n, classes[0, n]] - goals[0, n], recipe.box_huber).sum() for n in range(2))
        mask = np.mean([bce(masks[0, n, ..., classes[0, n]], mask_goals[0, n]) for n in range(2)])
        expected += 10 * box / (8 if recipe is PAPER else 3) + 100 * mask
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert all(np.isfinite(g).all() for g in gradients)
    assert gradients[1].any() == gradients[2].any() == objects
    assert not np.asarray(gradients[0])[0, 3].any()  # padding
