"""Pictures of detections: what is drawn where."""

import itertools

import numpy as np
import pytest

from halonet_jax import detection_pictures as pictures

GRAY = np.full((240, 320, 3), 128, np.uint8)
BOX = np.array([[60, 50, 180, 200]], np.float32)


def test_colors_of_neighbours_differ():
    colors = np.array([pictures.color(label) for label in range(30)])
    assert len({tuple(c) for c in colors}) == 30 and pictures.color(3) == pictures.color(3)
    assert min(np.abs(a - b).sum() for a, b in itertools.combinations(colors[:10], 2)) > 80


@pytest.mark.parametrize("masks", [None, np.ones((1, 28, 28), np.float32), np.ones((1, 240, 320), bool)])
def test_box_mask_and_label_are_where_they_belong(masks):
    picture = pictures.draw(GRAY, BOX, [4], class_names="abcdefg", scores=[0.87], masks=masks, least_side=1)
    color = np.array(pictures.color(4))
    assert picture.shape == GRAY.shape and picture.dtype == np.uint8 and (GRAY == 128).all()
    assert (picture[60:180, 50] == color).all() and (picture[179, 50:200] == color).all()
    inside, outside = picture[100, 100], picture[210, 300]
    blended = np.round(128 * 0.55 + color * 0.45)
    assert (inside == (128 if masks is None else blended)).all()
    assert (outside == (blended if masks is not None and masks.dtype == bool else 128)).all() or masks.dtype == bool
    assert (picture[40:60, 50:110] != 128).any()  # the label, above


def test_small_pictures_grow_and_low_scores_go():
    image = np.zeros((48, 64, 3), np.uint8)
    picture = pictures.draw(image, [[10, 10, 20, 30], [5, 5, 9, 9]], [0, 1], scores=[0.9, 0.1], min_score=0.5)
    assert picture.shape == (384, 512, 3)
    assert (picture[80, 80:240] == pictures.color(0)).all() and not (picture == pictures.color(1)).all(-1).any()
    assert not pictures.draw(image, np.zeros((0, 4)), []).any()


@pytest.mark.parametrize(
    "box", [[-20, -20, 30, 40], [0, 0, 240, 320], [230, 310, 300, 400], [500, 500, 600, 600], [9, 9, 9, 9]]
)
def test_boxes_at_and_past_the_border(box):
    masks = np.ones((2, 28, 28), np.float32)
    picture = pictures.draw(GRAY, [box] * 2, [0, 12], class_names=["a long name ×" * 9], scores=[1, 0.5], masks=masks)
    assert picture.shape == (480, 640, 3)
