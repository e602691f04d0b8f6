"""Detection's transform, held to the full masks of objects, which go the way of the image."""

import cv2
import numpy as np
import pytest
import toy_coco
from hypothesis import given, settings
from hypothesis import strategies as st

from halonet_jax import config as config_lib
from halonet_jax import data
from halonet_jax.data import annotations, masks
from halonet_jax.errors import CorruptImage, DataError


def transform(training=True, **overrides):
    config = config_lib.imagenet().data
    config.update({"image_size": 96, "max_objects": 6, "mean": (0.2, 0.2, 0.2), **overrides})
    return data.DetectionTransform(config, num_classes=3, training=training)


def record(full_masks, image, kind="bitmap", **fields):
    """A record whose masks are of one kind, and whose boxes enclose them."""
    boxes = []
    for mask in full_masks:
        y, x = np.nonzero(mask)
        boxes.append((y.min(), x.min(), y.max() + 1, x.max() + 1))
    found = {"bitmap": np.array(full_masks), "list": [masks.to_rle(m, *m.shape) for m in full_masks], "polygon": []}[kind]
    if kind == "polygon":
        found = [rows_as_polygons(m) for m in full_masks]
    n = len(full_masks)
    return {
        "image": image,
        "index": 7,
        "boxes": np.array(boxes, np.float32),
        "classes": np.arange(n) % 3,
        "masks": found,
        **fields,
    }


def rows_as_polygons(mask):
    """Exactly a mask whose rows are runs: a rectangle for each."""
    found = []
    for y in np.flatnonzero(mask.any(1)):
        x0, x1 = np.flatnonzero(mask[y])[[0, -1]] + (0, 1)
        found.append(np.array([(x0, y), (x1, y), (x1, y + 1), (x0, y + 1)], float))
    return found


def covered(mask, side):
    """How an input's pixels are covered by a mask in its box: pasted back, bool [side, side]."""
    out = np.zeros((side, side), bool)
    part, top, left = masks.paste(mask[1].astype(np.float32), mask[0], side, side)
    out[top : top + part.shape[0], left : left + part.shape[1]] = part
    return out


def overlap(a, b):
    return (a & b).sum() / max(1, (a | b).sum())


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(20, 220), width=st.integers(20, 220), seed=st.integers(0, 2**31),
    jitter=st.sampled_from([(0.8, 1.25), (0.3, 2.0), (1.0, 1.0)]), kind=st.sampled_from(["bitmap", "list", "polygon"]),
)  # fmt: skip
def test_boxes_and_masks_go_the_way_of_the_image(height, width, seed, jitter, kind):
    rng = np.random.default_rng(seed)
    full = [toy_coco.ellipse(rng, height, width) for _ in range(3)]
    # The image's channels are the masks. So the transformed image shows where each object ought to be.
    row = transform(scale_jitter=jitter)(record(full, np.stack(full, -1).astype(np.uint8) * 255, kind), rng)
    found = dict(zip(row["labels"][row["valid"]].tolist(), range(6)))
    for label in range(3):
        expected = row["image"][..., label] >= 128
        expected[int(row["image_size"][0]) :], expected[:, int(row["image_size"][1]) :] = False, False
        y, x = np.nonzero(expected)
        if label not in found:
            assert not len(y) or min(np.ptp(y), np.ptp(x)) <= 2  # less than a pixel, give or take one at each end
            continue
        box, mask = row["boxes"][found[label]], row["masks"][found[label]]
        assert (box[:2] >= 0).all() and (box[2:] <= row["image_size"]).all() and mask.any()
        if not len(y) or min(np.ptp(y), np.ptp(x)) < 12:
            continue
        assert overlap(covered((box, mask), 96), expected) > 0.85
        # A part of an ellipse may leave a part of its box empty; else they agree.
        tight = np.array([y.min(), x.min(), y.max() + 1, x.max() + 1])
        assert (box[:2] <= tight[:2] + 1).all() and (box[2:] >= tight[2:] - 1).all()
        cut = (box[[0, 1]] == 0).any() or (box[2:] == row["image_size"]).any()
        assert cut or np.abs(box - tight).max() <= 2  # tips fade where the image is made smaller


@settings(max_examples=40, deadline=None)
@given(height=st.integers(20, 220), width=st.integers(20, 220), seed=st.integers(0, 2**31))
def test_boxes_are_those_of_a_rectangle_in_the_image(height, width, seed):
    rng = np.random.default_rng(seed)
    y0, x0 = rng.integers(0, height - 12), rng.integers(0, width - 12)
    full = np.zeros((height, width), bool)
    full[y0 : rng.integers(y0 + 12, height + 1), x0 : rng.integers(x0 + 12, width + 1)] = True
    row = transform(scale_jitter=(0.5, 2.0))(record([full], np.repeat(full[..., None], 3, -1).astype(np.uint8) * 255), rng)
    seen = row["image"][: int(row["image_size"][0]), : int(row["image_size"][1]), 0] >= 128
    y, x = np.nonzero(seen)
    if row["valid"][0] and len(y):
        np.testing.assert_allclose(row["boxes"][0], [y.min(), x.min(), y.max() + 1, x.max() + 1], atol=1)
        assert row["masks"][0].mean() > 0.9


def test_evaluation_keeps_the_aspect_and_maps_back():
    rng = np.random.default_rng(0)
    full = [toy_coco.ellipse(rng, 60, 80) for _ in range(3)]
    given_record = record(full, rng.integers(0, 256, (60, 80, 3), np.uint8))
    t = transform(training=False)
    row = t(given_record, None)
    assert row["image_size"].tolist() == [72, 96] and row["scale"] == pytest.approx(1.2) and row["index"] == 7
    assert "masks" not in row and (row["image"][72:] == 51).all()  # the mean colour
    np.testing.assert_allclose(row["boxes"][:3] / np.tile(row["scale"], 2), given_record["boxes"], atol=1e-4)
    np.testing.assert_array_equal(row["image"][:72], cv2.resize(given_record["image"], (96, 72)))
    for name, field in t.fields.items():
        assert np.asarray(row[name]).shape == field.shape and np.asarray(row[name]).dtype == field.dtype
    again = transform()(given_record, None)
    np.testing.assert_array_equal(again["image"], row["image"])


def test_what_is_left_out():
    rng = np.random.default_rng(1)
    full = [toy_coco.ellipse(rng, 96, 96) for _ in range(9)]
    image = np.zeros((96, 96, 3), np.uint8)
    row = transform()(record(full, image), None)
    assert row["valid"].sum() == 6 and row["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    crowd = np.arange(9) % 2 == 0
    row = transform()(record(full, image, crowd=crowd), None)
    assert row["valid"].sum() == 4 and row["labels"][:4].tolist() == [1, 0, 2, 1] and not row["masks"][4:].any()
    small = record(full[:1], image)
    small["boxes"][0] = (10, 10, 10.5, 30)
    assert not transform()(small, None)["valid"].any()
    nothing = {"image": image, "index": 0, "boxes": np.zeros((0, 4)), "classes": np.zeros(0, int), "masks": []}
    assert not transform()(nothing, rng)["valid"].any()
    box_only = {**record(full[:2], image), "masks": [None, full[1]]}
    row = transform()(box_only, None)
    assert row["valid"].sum() == 2 and not row["masks"][0].any() and row["masks"][1].any()
    with pytest.raises(DataError, match="the classes 0 to 3 are not all between 0 and 2"):
        transform()({**box_only, "classes": np.array([0, 3])}, None)


def test_flip_and_jitter_follow_the_config():
    image = np.zeros((40, 96, 3), np.uint8)
    image[:, :48] = 255
    rows = [transform(scale_jitter=(1.0, 1.0))(record([image[..., 0] > 0], image), np.random.default_rng(i)) for i in range(20)]
    left = [row["image"][5, 5, 0] == 255 for row in rows]
    assert 4 < sum(left) < 16
    for row, is_left in zip(rows, left):
        assert row["boxes"][0].tolist() == ([0, 0, 40, 48] if is_left else [0, 48, 40, 96])
    never = transform(flip=False, scale_jitter=(1.0, 1.0))
    assert all(never(record([image[..., 0] > 0], image), np.random.default_rng(i))["image"][5, 5, 0] for i in range(8))
    sizes = [transform(scale_jitter=(0.5, 0.75)).geometry(50, 100, np.random.default_rng(i)).scaled[1] for i in range(50)]
    assert 48 <= min(sizes) < 54 and 67 < max(sizes) <= 72


def _with_orientation(encoded, orientation):
    """Puts an EXIF segment into a JPEG."""
    tiff = (
        b"II*\0\x08\0\0\0\x01\0"
        + (0x0112).to_bytes(2, "little")
        + b"\x03\0\x01\0\0\0"
        + bytes([orientation, 0, 0, 0])
        + b"\0" * 4
    )
    segment = b"Exif\0\0" + tiff
    return encoded[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2) + segment + encoded[2:]


def test_image_of_another_size_than_its_annotations(photo, encode):
    encoded = encode(photo(30, 40))
    mask = np.zeros((40, 30), bool)
    mask[5:20, 5:20] = True
    turned = {**record([mask], _with_orientation(encoded, 6)), "size": (40, 30)}
    assert transform(training=False)(turned, None)["image_size"].tolist() == [96, 72]
    stored = {**turned, "size": (30, 40)}
    assert transform(training=False)(stored, None)["image_size"].tolist() == [72, 96]
    with pytest.raises(CorruptImage, match="it is 40 x 30 pixels, and its annotations are for 35 x 30"):
        transform()({**turned, "image": encoded, "size": (30, 35)}, None)
    with pytest.raises(CorruptImage):
        transform()({**turned, "image": encoded[:100]}, None)


def test_annotations_of_drawn_records():
    rng = np.random.default_rng(2)
    records = [record([toy_coco.ellipse(rng, 50, 60) for _ in range(n)], np.zeros((50, 60, 3), np.uint8)) for n in (2, 0, 3)]
    found = annotations.of_records(records, ("a", "b", "c"))
    assert found.image_ids.tolist() == [1, 2, 3] and found.first.tolist() == [0, 2, 2, 5] and found.has_masks
    for index, given_record in enumerate(records):
        again = found.record(index)
        np.testing.assert_array_equal(again["boxes"], given_record["boxes"].reshape(-1, 4))
        for ours, theirs in zip(again["masks"], given_record["masks"], strict=True):
            np.testing.assert_array_equal(masks.bitmap(ours, 50, 60), theirs)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), side=st.sampled_from([1, 7, 28]))
def test_pasted_run_lengths_are_those_of_the_whole_picture(seed, side):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 60, 2)
    corners = np.sort(rng.uniform(-0.3, 1.3, (2, 2)), axis=0) * (height, width)
    box, mask = corners.ravel(), (rng.random((side, side)) ** 0.3).astype(np.float32)
    part, top, left = masks.paste(mask, box, height, width)
    whole = np.zeros((height, width), bool)
    whole[top : top + part.shape[0], left : left + part.shape[1]] = part
    assert masks.pasted_rle(mask, box, height, width) == masks.to_rle(whole, height, width)


def test_pasting_by_hand():
    part, top, left = masks.paste(np.ones((28, 28), np.float32), (10, 20.4, 30, 41.6), 100, 100)
    assert (top, left, part.shape) == (10, 20, (20, 22)) and part.all()  # the pixels whose centres the box covers
    half = np.zeros((2, 2), np.float32)
    half[:, 1] = 1
    part, top, left = masks.paste(half, (0, 0, 2, 8), 4, 8)
    assert part.tolist() == [[False] * 4 + [True] * 4] * 2
    part, top, left = masks.paste(half, (0, 0, 4, 8), 4, 8)  # zeros around: the values at the corners are 0.75 * 0.625
    assert part.tolist() == [
        [False] * 5 + [True] * 2 + [False],
        *[[False] * 4 + [True] * 4] * 2,
        [False] * 5 + [True] * 2 + [False],
    ]
    for box in ((5, 5, 5, 9), (9, 9, 5, 5), (-9, 0, -2, 5), (100, 0, 120, 5)):
        assert masks.paste(half, box, 100, 100)[0].size == 0
