"""RandAugment: every op against Pillow where Pillow has it, neutral strengths, directions and extents."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from halonet_jax import data
from halonet_jax.data import randaugment as ra

RNG = np.random.default_rng


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (33, 48)])
@pytest.mark.parametrize("magnitude", [0, 10, 31])
@pytest.mark.parametrize("op", ra.OPS)
def test_every_op_keeps_shape_dtype_and_input(photo, op, magnitude, shape):
    image = photo(*shape)
    before = image.copy()
    out = ra.OPS[op](image, magnitude, RNG(0))
    assert out.shape == image.shape and out.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


PILLOW = {
    "auto_contrast": lambda im, m: ImageOps.autocontrast(im),
    "equalize": lambda im, m: ImageOps.equalize(im),
    "invert": lambda im, m: ImageOps.invert(im),
    "posterize": lambda im, m: ImageOps.posterize(im, max(1, min(8, int(0.4 * m)))),
    "solarize": lambda im, m: ImageOps.solarize(im, int(25.6 * m)),
    "color": lambda im, m: ImageEnhance.Color(im).enhance(0.1 + 0.18 * m),
    "contrast": lambda im, m: ImageEnhance.Contrast(im).enhance(0.1 + 0.18 * m),
    "brightness": lambda im, m: ImageEnhance.Brightness(im).enhance(0.1 + 0.18 * m),
    "sharpness": lambda im, m: ImageEnhance.Sharpness(im).enhance(0.1 + 0.18 * m),
}


@pytest.mark.parametrize("magnitude", [0, 3, 7, 10])
@pytest.mark.parametrize("op", PILLOW)
def test_agrees_with_pillow(photo, op, magnitude):
    image = (photo() * 0.7 + 30).astype(np.uint8)
    expected = np.asarray(PILLOW[op](Image.fromarray(image), magnitude)).astype(int)
    assert abs(ra.OPS[op](image, magnitude, RNG(0)) - expected).max() <= 2


NEUTRAL = {"color": 5, "contrast": 5, "brightness": 5, "sharpness": 5, "solarize": 10, "posterize": 20}
NEUTRAL |= dict.fromkeys(("rotate", "shear_x", "shear_y", "translate_x", "translate_y", "cutout", "solarize_add"), 0)


@pytest.mark.parametrize("op", NEUTRAL)
def test_neutral_strength_is_the_identity(photo, op):
    image = photo()
    np.testing.assert_array_equal(ra.OPS[op](image, NEUTRAL[op], RNG(0)), image)


@pytest.mark.parametrize("op", ["auto_contrast", "equalize"])
def test_a_constant_image_stays(op):
    image = np.full((9, 9, 3), 77, np.uint8)
    np.testing.assert_array_equal(ra.OPS[op](image, 10, RNG(0)), image)


def test_solarize_add():
    image = np.array([[[0, 100, 127], [128, 200, 255]]], np.uint8)
    np.testing.assert_array_equal(ra.solarize_add(image, 10, RNG(0)), [[[110, 210, 237], [128, 200, 255]]])
    np.testing.assert_array_equal(ra.solarize_add(image, 31, RNG(0)), [[[255, 255, 255], [128, 200, 255]]])


@pytest.mark.parametrize("op, axis", [("translate_x", 1), ("translate_y", 0)])
@pytest.mark.parametrize("magnitude, pixels", [(1, 10), (5, 50), (31, 75)])
def test_translations_shift_by_pixels_up_to_most_of_the_side_and_fill_gray(op, axis, magnitude, pixels):
    image = np.full((100, 100, 3), 255, np.uint8)
    seen = set()
    for seed in range(20):
        line = ra.OPS[op](image, magnitude, RNG(seed)).take(0, axis=1 - axis)[:, 0]
        gray = line == 128
        assert abs(gray.sum() - pixels) <= 1
        seen.add(bool(gray[0]))
    assert seen == {True, False}


@pytest.mark.parametrize("magnitude", [5, 10, 31])
@pytest.mark.parametrize("op, axis", [("shear_x", 1), ("shear_y", 0)])
def test_shears_slide_in_proportion(op, axis, magnitude):
    """A line through the middle ends up slanted by 0.03 pixels per pixel and unit of magnitude."""
    image = np.zeros((65, 65, 3), np.uint8)
    image[(slice(None), 32) if axis == 1 else 32] = 255
    out = ra.OPS[op](image, magnitude, RNG(1))[..., 0]
    out = out if axis == 1 else out.T
    line = [np.flatnonzero(row > 128).mean() if (row > 128).any() else np.nan for row in out]
    slopes = np.diff(line)[:30]
    assert abs(np.nanmean(slopes)) == pytest.approx(0.03 * magnitude, abs=0.05)


def test_rotation_turns_about_the_centre():
    image = np.zeros((41, 41, 3), np.uint8)
    image[20, :] = 255
    out = ra.rotate(image, 30, RNG(0))  # 90 degrees: exactly a column
    np.testing.assert_array_equal(out[..., 0] > 200, np.arange(41)[None, :] == np.full((41, 1), 20))


@pytest.mark.parametrize("magnitude, half", [(2.5, 10), (5, 20), (31, 56)])
def test_cutout_covers_at_most_its_square(magnitude, half):
    image = np.zeros((112, 112, 3), np.uint8)
    covered = [(ra.cutout(image, magnitude, RNG(s))[..., 0] == 128).sum() for s in range(200)]
    assert half**2 <= min(covered) and max(covered) <= 4 * half**2
    assert max(covered) > 3.4 * half**2


def test_randaugment_draws_all_ops_and_is_reproducible(photo, monkeypatch):
    image, called = photo(), []
    for name, op in ra.OPS.items():
        monkeypatch.setitem(ra.OPS, name, lambda *a, name=name, op=op: called.append(name) or op(*a))
    for seed in range(100):
        first, again = (ra.apply_random_ops(image, RNG(seed), 2, 10.0) for _ in range(2))
        np.testing.assert_array_equal(first, again)
    assert set(called) == set(ra.OPS) and len(called) == 400


def test_randaugment_keeps_to_the_chosen_ops(photo):
    image = photo()
    np.testing.assert_array_equal(ra.apply_random_ops(image, RNG(0), 1, 10.0, ("invert",)), 255 - image)
    np.testing.assert_array_equal(ra.apply_random_ops(image, RNG(0), 2, 10.0, ("invert",)), image)
    np.testing.assert_array_equal(ra.apply_random_ops(image, RNG(0), 0, 10.0), image)


def test_unknown_op_names_the_closest(photo):
    with pytest.raises(data.DataError, match="'ShearX' is unknown; did you mean shear_"):
        ra.apply_random_ops(photo(), RNG(0), 1, 10.0, ("invert", "ShearX"))
