"""Proposals and detections of one image, worked out by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from halonet_jax.detection import PAPER, postprocess

SIZE = jnp.array([40, 30], jnp.float32)


def test_proposals():
    """Suppression is within a level; what has no area within the image is dropped; of each level, the best are candidates."""
    fine = jnp.array([[0, 0, 10, 10], [0, 1, 10, 11], [20, 20, 30, 40], [0, 50, 9, 60], [5, 5, 9, 9]], jnp.float32)
    coarse = jnp.array([[0, 0, 10, 10], [30, 0, 50, 20]], jnp.float32)
    logits = jnp.array([2.0, 3.0, 1.0, 9.0, -9.0, 0.5, 2.5])
    deltas = jnp.zeros((7, 4)).at[6].set(jnp.array([0, 0, np.log(2), 0]))  # twice as high about its middle: 20 to 60
    spec = dataclasses.replace(PAPER, proposals=5)
    run = jax.jit(functools.partial(postprocess.proposals, spec=spec, candidates=4))
    boxes, valid = run(logits, deltas, (fine, coarse), SIZE)
    assert valid.tolist() == [True] * 4 + [False]
    np.testing.assert_allclose(boxes[:4], [[0, 1, 10, 11], [20, 0, 40, 20], [20, 20, 30, 30], [0, 0, 10, 10]], atol=1e-4)


def test_detections():
    """Each class has its own boxes and suppression. Scores are 0.05 at least, padding is no region."""
    rois = jnp.array([[0, 0, 10, 10], [0, 1, 10, 11], [20, 20, 30, 40], [0, 0, 10, 10]], jnp.float32)
    scores = np.array([[0.1, 0.6, 0.3], [0.2, 0.7, 0.1], [0.91, 0.04, 0.05], [0, 1, 0]])
    deltas = np.zeros((4, 3, 4), np.float32)
    deltas[0, 2] = 10, 0, 0, 0  # class 2 of the first region lies a height lower
    deltas[2, 0] = 99
    spec = dataclasses.replace(PAPER, detections=6, min_score=0.0499)
    run = jax.jit(functools.partial(postprocess.detections, spec=spec))
    found = run(jnp.log(scores), jnp.asarray(deltas), rois, jnp.array([True, True, True, False]), SIZE)
    assert found.valid.tolist() == [True] * 4 + [False] * 2
    assert found.classes.tolist() == [1, 2, 2, 2, 0, 0]
    np.testing.assert_allclose(found.scores, [0.7, 0.3, 0.1, 0.05, 0, 0], rtol=1e-5)
    expected = [[0, 1, 10, 11], [10, 0, 20, 10], [0, 1, 10, 11], [20, 20, 30, 30]]
    np.testing.assert_allclose(found.boxes, expected + [[0] * 4] * 2, atol=1e-4)
    nothing = run(jnp.full((4, 3), jnp.nan), jnp.asarray(deltas), rois, jnp.ones(4, bool), SIZE)
    assert not nothing.valid.any() and not nothing.boxes.any()
