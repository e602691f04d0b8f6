"""Suppression, in both of its forms, equal to a loop in NumPy and to TensorFlow's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet_jax.detection import nms


def place(*boxes):
    return np.array(boxes, np.float32).reshape(-1, 4)


def random_boxes(seed, count=40, grid=2):
    """Boxes with corners on a grid, where overlaps meet a threshold exactly, and with scores that are often equal."""
    rng = np.random.default_rng(seed)
    corner, sides = rng.integers(0, 20 * grid, (count, 2)), rng.integers(0, 12 * grid, (count, 2))
    return place(np.concatenate([corner, corner + sides], 1) / grid), rng.integers(0, 10, count).astype(np.float32) / 10


CHAIN = place(*([0, 3 * n, 10, 3 * n + 10] for n in range(40)))  # each overlaps the next by 7 / 13, the second next by 4 / 16
CASES = {
    "ties": (place([0, 0, 4, 4], [0, 1, 4, 5], [9, 9, 12, 12], [0, 0, 4, 4]), [1, 1, 1, 1], 0.5),
    "at the threshold": (place([0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 2, 4], [0, 2, 4, 4]), [0.9, 0.8, 0.7, 0.6], 0.5),
    "above the threshold": (place([0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 2, 4], [0, 2, 4, 4]), [0.9, 0.8, 0.7, 0.6], 0.4999),
    "identical": (np.tile(place([1, 2, 5, 7]), (6, 1)), [0.1, 0.5, 0.5, 0.4, 0.2, 0.5], 0.5),
    "chain": (CHAIN, np.linspace(1, 0, 40), 0.5),
    "chain upwards": (CHAIN, np.linspace(0, 1, 40), 0.5),
    "no area": (place([1, 1, 1, 5], [1, 1, 1, 5], [0, 0, 3, 3]), [0.9, 0.8, 0.7], 0.5),
    "negative scores": (place([0, 0, 4, 4], [0, 1, 4, 5], [8, 8, 9, 9]), [-3, -2, -9], 0.5),
} | {f"random {seed}": (*random_boxes(seed), (0.5, 0.25, 1 / 3)[seed % 3]) for seed in range(6)}  # fmt: skip


@functools.partial(jax.jit, static_argnames=("form", "count"))
def run(boxes, scores, valid, labels, threshold, form, count):
    original = nms.suppress
    nms.suppress = lambda boxes, valid, threshold, labels: getattr(nms, form)(boxes, valid, labels, threshold)
    try:
        return nms.nms(boxes, scores, valid, threshold, count, labels)
    finally:
        nms.suppress = original


def kept(form, boxes, scores, threshold, valid=None, labels=None, count=40):
    """Indices of the boxes kept. All cases are padded to 40 boxes, so that they share a program."""
    n, pad = len(boxes), 40 - len(boxes)
    valid, labels = np.ones(n, bool) if valid is None else valid, np.zeros(n, np.int32) if labels is None else labels
    scores = np.pad(np.asarray(scores, np.float32), (0, pad), constant_values=7)  # padding is not valid, whatever its score
    arrays = np.pad(boxes, ((0, pad), (0, 0))), scores, np.pad(valid, (0, pad)), np.pad(labels, (0, pad))
    found = run(*map(jnp.asarray, arrays), threshold, form, count)
    assert found.index.shape == found.valid.shape == (count,)
    return np.asarray(found.index)[np.asarray(found.valid)].tolist()


def greedy(boxes, scores, threshold, count):
    """The definition: the best box that is left stays, and those that overlap it by more than the threshold go."""
    sides = lambda box: np.maximum(box[..., 2:] - box[..., :2], 0).prod(-1)
    left, found = list(np.argsort(-np.asarray(scores), kind="stable")), []
    while left and len(found) < count:
        best = left.pop(0)
        found.append(int(best))
        others = boxes[left].reshape(-1, 4)
        corners = np.maximum(boxes[best, :2], others[:, :2]), np.minimum(boxes[best, 2:], others[:, 2:])
        shared = sides(np.concatenate(corners, -1))
        union = sides(boxes[best]) + sides(others) - shared
        overlap = shared / np.where(union > 0, union, 1)
        left = [n for n, iou in zip(left, overlap) if iou <= np.float32(threshold)]
    return found


def by_tensorflow(boxes, scores, threshold, count):
    tf = pytest.importorskip("tensorflow")
    return tf.image.non_max_suppression(boxes, np.asarray(scores, np.float32), count, threshold).numpy().tolist()


FORMS = pytest.mark.parametrize("form", ("fixed_point", "sequential"))


@FORMS
@pytest.mark.parametrize("peer", (greedy, by_tensorflow))
def test_equals_its_peers(form, peer):
    for name, (boxes, scores, threshold) in CASES.items():
        for count in (40, 3):
            assert kept(form, boxes, scores, threshold, count=count) == peer(boxes, scores, threshold, count), name


@FORMS
def test_labels_do_not_suppress_each_other(form):
    (boxes, scores), labels = random_boxes(9), np.arange(40, dtype=np.int32) % 3
    alone = [i for label in range(3) for i in kept(form, boxes, scores, 0.3, valid=labels == label)]
    together = kept(form, boxes, scores, 0.3, labels=labels)
    assert together == sorted(alone, key=lambda i: (-scores[i], i)) and len(together) > len(kept(form, boxes, scores, 0.3))


@FORMS
def test_what_is_not_valid_does_nothing(form):
    boxes, scores = place([0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4]), [0.9, np.nan, 0.3]
    assert kept(form, boxes, scores, 0.5, valid=np.array([False, True, True])) == [2]
    assert kept(form, boxes, scores, 0.5, valid=np.zeros(3, bool)) == []


def test_platform_chooses_the_form():
    """Programs for a CPU have the loop; those for a TPU have the fixed point, which makes one matrix of overlaps."""
    boxes, valid = jnp.zeros((40, 4)), jnp.ones(40, bool)
    traced = jax.jit(lambda *arrays: nms.suppress(*arrays, 0.5)).trace(boxes, valid)
    for platform, has_matrix in (("cpu", False), ("tpu", True)):
        assert ("40x40xi1" in traced.lower(lowering_platforms=(platform,)).as_text()) == has_matrix
