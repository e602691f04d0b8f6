"""Decoding of every kind of file, and the geometry of crops."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from halonet_jax import data


def _pil(image, file_format, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **kwargs)
    return buffer.getvalue()


FILES = {
    "jpeg": lambda im: _pil(im, "JPEG", quality=95),
    "progressive jpeg": lambda im: _pil(im, "JPEG", quality=95, progressive=True),
    "gray jpeg": lambda im: _pil(im.convert("L"), "JPEG", quality=95),
    "cmyk jpeg": lambda im: _pil(im.convert("CMYK"), "JPEG", quality=95),
    "png": lambda im: _pil(im, "PNG"),
    "rgba png": lambda im: _pil(im.convert("RGBA"), "PNG"),
    "palette png": lambda im: _pil(im.convert("P"), "PNG"),
    "gray-alpha png": lambda im: _pil(im.convert("LA"), "PNG"),
    "webp": lambda im: _pil(im, "WEBP", lossless=True),
    "bmp": lambda im: _pil(im, "BMP"),
}


@pytest.mark.parametrize("kind", FILES)
def test_decode_agrees_with_pillow(photo, kind):
    encoded = FILES[kind](Image.fromarray(photo()))
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)
    got = data.decode(encoded)
    assert got.dtype == np.uint8 and got.shape == (75, 100, 3)
    assert abs(got - expected).max() <= 2


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.98])
def test_truncated_files_raise(photo, kind, share):
    encoded = FILES[kind](Image.fromarray(photo()))
    with pytest.raises(data.CorruptImage):
        data.decode(encoded[: int(share * len(encoded))])


@pytest.mark.parametrize("junk", [b"", b"\xff\xd8", b"not an image", b"\x89PNG\r\n\x1a\n", bytes(1000)])
def test_junk_raises(junk):
    with pytest.raises(data.CorruptImage) as e:
        data.decode(junk)
    assert str(e.value)


def test_sixteen_bit_png_keeps_the_upper_byte(photo):
    image = photo()
    encoded = cv2.imencode(".png", image[..., ::-1].astype(np.uint16) * 256 + 77)[1].tobytes()
    np.testing.assert_array_equal(data.decode(encoded), image)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_orientation_is_ignored(photo, file_format):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90°"
    encoded = _pil(Image.fromarray(photo(40, 60)), file_format, exif=exif)
    assert data.decode(encoded).shape == (40, 60, 3)


def test_harmless_flaws_are_no_corruption(photo):
    """Stray bytes before the end marker: other decoders warn and go on."""
    encoded = _pil(Image.fromarray(photo()), "JPEG")
    flawed = encoded[:-2] + b"\x00\x00\x00" + encoded[-2:]
    np.testing.assert_array_equal(data.decode(flawed), data.decode(encoded))


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (64, 64), (37, 200), (300, 41), (512, 512)])
@pytest.mark.parametrize("size", [32, 64])
def test_transforms_give_squares(photo, data_config, shape, size):
    image, rng = photo(*shape), np.random.default_rng(0)
    for layers in (0, 2):
        config = data_config(image_size=size, randaugment_layers=layers, crop_scale=(0.08, 1.0))
        for out in (data.train_transform(image, rng, config), data.eval_transform(image, config)):
            assert out.shape == (size, size, 3) and out.dtype == np.uint8 and out.flags.c_contiguous


def test_random_resized_crop_covers_what_it_should():
    """A ramp tells which columns and rows a crop took."""
    h, w, scale, ratio = 120, 160, (0.2, 0.6), (0.75, 1.25)
    y, x = np.mgrid[0:h, 0:w]
    image = np.stack([x, y, x], -1).astype(np.uint8)
    rng = np.random.default_rng(0)
    areas, ratios, lefts = [], [], []
    for _ in range(300):
        crop = data.random_resized_crop(image, rng, 64, scale, ratio).astype(float)
        width, height = (np.ptp(crop[..., c]) + 1 for c in (0, 1))
        areas.append(width * height / (h * w))
        ratios.append(width / height)
        lefts.append(crop[..., 0].min())
    assert scale[0] - 0.02 < min(areas) < 0.25 and 0.55 < max(areas) < scale[1] + 0.02
    assert ratio[0] - 0.05 < min(ratios) < 0.82 and 1.15 < max(ratios) < ratio[1] + 0.05
    assert min(lefts) < 5 and max(lefts) > 60


def test_random_resized_crop_falls_back_to_the_centre():
    """No rectangle of these shapes with this area fits a strip."""
    image = np.zeros((20, 400, 3), np.uint8)
    image[:, 190:210] = 255
    crop = data.random_resized_crop(image, np.random.default_rng(0), 16, (0.9, 1.0), (1.0, 1.0))
    assert (crop == 255).all()


@pytest.mark.parametrize("fraction, white", [(1.0, 0.25), (0.5, 1.0)])
def test_center_crop_takes_the_fraction(fraction, white):
    image = np.zeros((80, 120, 3), np.uint8)
    image[20:60, 40:80] = 255
    assert (data.center_crop(image, 40, fraction) > 127).mean() == pytest.approx(white, abs=0.02)


def test_resize_keeps_the_mean(photo):
    """Strong reductions average; they don't pick pixels."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    out = data.resize(np.repeat(board[..., None], 3, -1), 32)
    assert abs(out.astype(int) - 127).max() <= 1
    image = photo(50, 70)
    for size in (20, 40, 90):
        np.testing.assert_allclose(data.resize(image, size).mean((0, 1)), image.mean((0, 1)), atol=1.5)


def test_flip(photo):
    image = photo()
    np.testing.assert_array_equal(data.horizontal_flip(image), image[:, ::-1])


def test_train_transform_flips_half(photo, data_config):
    image = photo(noise=0.0)
    config = data_config(image_size=16, crop_scale=(1.0, 1.0), crop_ratio=(4 / 3, 4 / 3), randaugment_layers=0)
    plain = data.train_transform(image, np.random.default_rng(0), data_config(**{**config, "flip": False}))
    results = [data.train_transform(image, np.random.default_rng(s), config) for s in range(200)]
    flipped = np.mean([not np.array_equal(r, plain) for r in results])
    assert 0.4 < flipped < 0.6
    assert all(np.array_equal(r, plain) or np.array_equal(r, plain[:, ::-1]) for r in results)
