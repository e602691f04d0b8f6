"""Boxes, their code, and anchors, held to values worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from halonet_jax.detection import boxes as box_ops


def array(*rows):
    return jnp.array(rows, jnp.float32)


def test_overlap():
    a = array([0, 0, 2, 2], [0, 0, 0, 5], [3, 3, 1, 1])  # the last two have no area
    b = array([1, 1, 3, 3], [0, 0, 2, 2], [2, 0, 4, 2], [0, 0, 4, 4], [0, 0, 0, 5])
    np.testing.assert_array_equal(box_ops.area(a), [4, 0, 0])
    expected = [[1 / 7, 1, 0, 1 / 4, 0], [0] * 5, [0] * 5]
    np.testing.assert_allclose(box_ops.iou(a, b), expected, rtol=1e-6)


def test_code():
    anchor = array([0, 0, 10, 20])
    for box, deltas in (
        ([0, 0, 10, 20], [0, 0, 0, 0]), ([5, 10, 15, 30], [0.5, 0.5, 0, 0]), ([0, 5, 10, 15], [0, 0, 0, -np.log(2)]),
        ([-5, 0, 15, 20], [0, 0, np.log(2), 0]),
    ):  # fmt: skip
        np.testing.assert_allclose(box_ops.encode(array(box), anchor), [deltas], atol=1e-6)
        np.testing.assert_allclose(box_ops.decode(array(deltas), anchor), [box], atol=1e-5)
        weighted = np.array([10, 10, 5, 5]) * deltas
        np.testing.assert_allclose(box_ops.encode(array(box), anchor, (10, 10, 5, 5)), [weighted], atol=1e-5)
        np.testing.assert_allclose(box_ops.decode(array(weighted), anchor, (10, 10, 5, 5)), [box], atol=1e-5)
    far = box_ops.decode(array([0, 0, 100, -100]), anchor)  # a side grows at most by 1000 / 16
    np.testing.assert_allclose(far, [[5 - 312.5, 10, 5 + 312.5, 10]], rtol=1e-5)
    assert np.isfinite(box_ops.encode(array([0, 0, 0, 0], [1, 1, 1, 9]), array([1, 1, 1, 1], [0, 0, 0, 0]))).all()


def test_coordinates_are_float32():
    """Steps of bfloat16 are 4 above 512; deltas in it must not make coordinates coarse."""
    box = box_ops.decode(jnp.zeros((1, 4), jnp.bfloat16), array([801, 803, 805, 807]))
    assert box.dtype == jnp.float32
    np.testing.assert_array_equal(box, [[801, 803, 805, 807]])


def test_clip():
    boxes = array([-3, -3, 5, 50], [12, 1, 20, 2], [1, 2, 3, 4])
    np.testing.assert_array_equal(box_ops.clip(boxes, jnp.array([10, 40])), [[0, 0, 5, 40], [10, 1, 10, 2], [1, 2, 3, 4]])


@pytest.mark.parametrize("offset, centre", [(0.5, 2), (0, 0)])
def test_anchors(offset, centre):
    fine, coarse = box_ops.anchors([(3, 2), (2, 1)], [4, 8], 8, (1, 2, 0.5), offset)
    assert fine.shape == (18, 4) and coarse.shape == (6, 4) and fine.dtype == jnp.float32
    long, short = 22.627417, 11.313708  # half of 32 √2 and of 32 / √2
    at_corner = np.array([[-16, -16, 16, 16], [-short, -long, short, long], [-long, -short, long, short]])
    np.testing.assert_allclose(fine[:3], at_corner + centre, rtol=1e-6)
    np.testing.assert_allclose(fine[3:6], fine[:3] + np.array([0, 4, 0, 4]), rtol=1e-6)  # the next column, then the next row
    np.testing.assert_allclose(fine[6:9], fine[:3] + np.array([4, 0, 4, 0]), rtol=1e-6)
    np.testing.assert_allclose(coarse[:3], 2 * at_corner + 2 * centre, rtol=1e-6)
