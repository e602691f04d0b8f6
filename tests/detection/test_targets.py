"""Matching, sampling and the targets of anchors, regions and masks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet_jax.detection import PAPER, targets
from halonet_jax.detection.targets import Objects

SPEC = dataclasses.replace(PAPER, rpn_samples=8, roi_samples=8, mask_bins=4)


def objects(*rows, padding=2, mask=1):
    """Objects of (y0, x0, y1, x1, class), and padding that would match everything."""
    rows = np.array(rows, np.float32).reshape(-1, 5)
    boxes = np.pad(rows[:, :4], ((0, padding), (0, 0)))
    boxes[len(rows) :] = 0, 0, 30, 30
    valid, classes = np.arange(len(boxes)) < len(rows), np.pad(rows[:, 4].astype(np.int32), (0, padding), constant_values=9)
    return Objects(*map(jnp.asarray, (boxes, classes, valid, np.full((len(boxes), 16, 16), mask, np.uint8))))


MATCHES = {
    # name: IoU by box (rows) and object (columns), options, index, positive, negative
    "thresholds": ([[0.7, 0], [0.69, 0], [0.3, 0], [0.29, 0]], {}, [0, 0, 0, 0], "1000", "0001"),
    "strict": ([[0.7, 0], [0.71, 0], [0, 0.3]], {"strict": True}, [0, 0, 1], "010", "000"),
    "no object": ([[-1, -1], [-1, -1]], {"rescue": True}, [0, 0], "00", "11"),
    "padding": ([[0.8, -1], [0.1, -1]], {"rescue": True}, [0, 0], "10", "01"),
    "rescue": ([[0.1, 0.2], [0.05, 0.4], [0.0, 0.0]], {"rescue": True}, [0, 1, 0], "110", "001"),
    "nothing overlaps an object": ([[0.9, 0], [0.1, 0]], {"rescue": True}, [0, 0], "10", "01"),
    "rescue, ties": ([[0.2, 0], [0.2, 0], [0.1, 0]], {"rescue": True}, [0, 0, 0], "100", "011"),
    "objects, ties": ([[0.8, 0.8], [0.3, 0.3], [0.1, 0.1]], {}, [0, 0, 0], "100", "001"),
    "rescue takes a positive box": ([[0.8, 0.75], [0.9, 0.1]], {"rescue": True}, [1, 0], "11", "00"),
    "one box is best of two": ([[0.4, 0.6], [0.1, 0.2]], {"rescue": True}, [1, 1], "10", "01"),
}


@pytest.mark.parametrize("name", MATCHES)
def test_match(name):
    iou, options, index, positive, negative = MATCHES[name]
    found = targets.match(jnp.array(iou, jnp.float32), np.float32(0.7), np.float32(0.3), **options)
    bits = lambda mask: "".join(str(int(bit)) for bit in mask)
    assert (found[0].tolist(), bits(found[1]), bits(found[2])) == (index, positive, negative)


@functools.partial(jax.jit, static_argnums=(3, 4))
def draw(key, positive, negative, count, most):
    return jax.vmap(lambda key: targets.sample(key, positive, negative, count, most))(jax.random.split(key, 200))


@pytest.mark.parametrize("positives, negatives, expected", [(9, 20, (4, 6)), (2, 20, (2, 8)), (0, 20, (0, 10)), (9, 3, (4, 3))])
def test_sample(positives, negatives, expected):
    """The quota of positive ones first, then negative ones, then padding; each candidate equally often, none twice."""
    positive, negative = np.arange(32) < positives, (np.arange(32) >= 10) & (np.arange(32) < 10 + negatives)
    found = draw(jax.random.key(0), positive, negative, 10, 4)
    places = np.arange(10)
    np.testing.assert_array_equal(found.positive, np.tile(places < expected[0], (200, 1)))
    np.testing.assert_array_equal(found.valid, np.tile(places < sum(expected), (200, 1)))
    index, valid = np.asarray(found.index), np.asarray(found.valid)
    assert all(len(set(row[ok])) == ok.sum() for row, ok in zip(index, valid))
    assert positive[index[np.asarray(found.positive)]].all() and negative[index[valid & ~np.asarray(found.positive)]].all()
    often = np.bincount(index[valid], minlength=32) / 200
    for kind, taken in ((positive, expected[0]), (negative, expected[1])):
        assert np.abs(often[kind] - taken / max(kind.sum(), 1)).max(initial=0) < 0.15


def test_more_samples_than_candidates():
    found = targets.sample(jax.random.key(0), jnp.array([True, False]), jnp.array([False, True]), 5, 3)
    assert found.index[:2].tolist() == [0, 1] and found.valid.tolist() == [True, True, False, False, False]


ANCHORS = jnp.array([[0, 0, 10, 10], [0, 0, 10, 8], [0, 10, 10, 20], [40, 40, 50, 50], [4, 4, 10, 10]], jnp.float32)


def test_anchor_targets():
    """Deltas are of all positive anchors, sampled or not. Without objects, there are negative samples alone."""
    run = jax.jit(functools.partial(targets.anchor_targets, spec=SPEC))
    found = run(jax.random.key(0), ANCHORS, objects((0, 0, 10, 10, 3), (40, 40, 60, 60, 1)))
    assert found.matched.tolist() == [True, True, False, True, False]  # 1, 0.8, 0, best of its object, 0.36
    expected = [[0] * 4, [0, 1 / 8, 0, np.log(10 / 8)], [0] * 4, [0.5, 0.5, np.log(2), np.log(2)], [0] * 4]
    np.testing.assert_allclose(found.deltas, expected, atol=1e-6)
    assert sorted(found.samples.index[:3].tolist()) == [0, 1, 3] and found.samples.index[3:4].tolist() == [2]
    assert found.samples.valid.tolist() == [True] * 4 + [False] * 4
    empty = run(jax.random.key(0), ANCHORS, objects(padding=4))
    assert not empty.matched.any() and not empty.deltas.any() and not empty.samples.positive.any()
    assert empty.samples.valid.sum() == 5


def test_roi_targets():
    """Objects' own boxes are regions too; the positive ones lead, as many as the quota has at most."""
    run = jax.jit(functools.partial(targets.roi_targets, spec=SPEC))
    image = objects((0, 0, 10, 10, 3), (40, 40, 60, 60, 1))
    proposals = jnp.array([[0, 0, 10, 8], [40, 45, 60, 60], [70, 70, 80, 80], [0, 0, 5, 10], [0, 0, 9, 9]], jnp.float32)
    valid = jnp.array([True, True, True, True, False])
    seen = set()
    for seed in range(20):
        found = run(jax.random.key(seed), proposals, valid, image)
        assert found.valid.tolist() == [True] * 3 + [False] * 5 and found.masks.shape == (2, 8, 8)
        classes = dict(zip(map(tuple, np.asarray(found.rois[:3]).astype(int).tolist()), found.classes[:3].tolist()))
        seen |= set(classes.items())
        assert (found.classes[:2] > 0).all() and not found.classes[2:].any()
    # IoU of exactly 0.5, and what is not valid, are never sampled.
    assert seen == {
        ((0, 0, 10, 8), 3), ((40, 45, 60, 60), 1), ((70, 70, 80, 80), 0), ((0, 0, 10, 10), 3), ((40, 40, 60, 60), 1)
    }  # fmt: skip
    spec = dataclasses.replace(SPEC, roi_strict=False, roi_positive_share=0.5)
    at_half = jax.jit(functools.partial(targets.roi_targets, spec=spec))
    found = at_half(jax.random.key(0), proposals[3:4], valid[:1], image)
    assert found.classes.tolist().count(3) == 2
    row = found.rois.tolist().index([0, 0, 5, 10])
    np.testing.assert_allclose(found.deltas[row], [5, 0, 5 * np.log(2), 0], atol=1e-5)
    empty = run(jax.random.key(0), proposals, valid, objects(padding=4))
    assert empty.valid.tolist() == [True] * 4 + [False] * 4 and not empty.classes.any() and not empty.masks.any()


def test_masks_are_those_of_the_full_image():
    """Bitmaps of 112 px in the frame of an object, cut again, against the object's shape at the region's own pixels."""
    ellipse = lambda y, x: ((y - 50) / 38) ** 2 + ((x - 70) / 25) ** 2 < 1
    frame = np.array([12, 45, 88, 95], np.float32)
    y, x = (start + (np.arange(112) + 0.5) / 112 * (end - start) for start, end in zip(frame[:2], frame[2:]))
    image = Objects(frame[None], np.ones(1), np.ones(1, bool), ellipse(y[:, None], x)[None].astype(np.uint8))
    rois = np.array([[12, 45, 88, 95], [0, 30, 60, 80], [40, 60, 70, 140], [20, 60, 30, 64], [0, 0, 10, 10]], np.float32)
    masks = jax.jit(targets.crop_masks, static_argnums=3)(image, np.zeros(len(rois), int), rois, 28)
    for roi, mask in zip(rois, masks):
        y, x = (start + (np.arange(28) + 0.5) / 28 * (end - start) for start, end in zip(roi[:2], roi[2:]))
        expected = ellipse(y[:, None], x)
        assert (expected & (mask > 0)).sum() >= 0.97 * (expected | (mask > 0)).sum()
    assert masks[3].all() and not masks[4].any() and set(np.unique(masks)) == {0, 1}
