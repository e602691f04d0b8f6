"""Decoding of every kind of file, and the geometry of crops."""

import io

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from halonet_jax import config as config_lib
from halonet_jax import data
from halonet_jax.data import images


def _pil(image, file_format, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **kwargs)
    return buffer.getvalue()


def _with_alpha(image):
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size).point(lambda value: value // 2 + 128))
    return image


FILES = {
    "jpeg": lambda im: _pil(im, "JPEG", quality=95),
    "progressive jpeg": lambda im: _pil(im, "JPEG", quality=95, progressive=True),
    "gray jpeg": lambda im: _pil(im.convert("L"), "JPEG", quality=95),
    "cmyk jpeg": lambda im: _pil(im.convert("CMYK"), "JPEG", quality=95),
    "png": lambda im: _pil(im, "PNG"),
    "rgba png": lambda im: _pil(im.convert("RGBA"), "PNG"),
    "palette png": lambda im: _pil(im.convert("P"), "PNG"),
    "gray-alpha png": lambda im: _pil(im.convert("LA"), "PNG"),
    "webp": lambda im: _pil(im, "WEBP", quality=100),
    "lossless webp": lambda im: _pil(im, "WEBP", lossless=True),
    "rgba webp": lambda im: _pil(_with_alpha(im), "WEBP", lossless=True),
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
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.95, 0.98])
def test_truncated_files_raise(photo, kind, share):
    encoded = FILES[kind](Image.fromarray(photo()))
    with pytest.raises(data.CorruptImage):
        data.decode(encoded[: int(share * len(encoded))])


JUNK = [
    b"", b"\xff\xd8", b"not an image", b"\x89PNG\r\n\x1a\n", bytes(1000), b"RIFF", b"RIFF1234WEBPVP8 ", b"BM", b"BM" + bytes(99),
]


@pytest.mark.parametrize("junk", JUNK)
def test_junk_raises(junk):
    with pytest.raises(data.CorruptImage) as e:
        data.decode(junk)
    assert str(e.value)


@pytest.mark.parametrize("file_format", ["GIF", "TIFF", "PPM"])
def test_other_formats_are_refused(photo, file_format):
    """OpenCV would decode some of them, whatever size they claim."""
    with pytest.raises(data.CorruptImage, match="no JPEG, PNG, WebP or BMP"):
        data.decode(_pil(Image.fromarray(photo()), file_format))


@pytest.mark.parametrize("kind", FILES)
def test_too_many_pixels_raise_before_anything_is_decoded(photo, kind, monkeypatch):
    encoded = FILES[kind](Image.fromarray(photo()))
    assert data.decode(encoded, max_pixels=7500).size == 3 * 7500
    monkeypatch.delattr(cv2, "imdecode")
    monkeypatch.delattr(simplejpeg, "decode_jpeg")
    with pytest.raises(data.CorruptImage, match="^100 x 75 pixels, more than data.max_pixels=7499$"):
        data.decode(encoded, max_pixels=7499)


@pytest.mark.parametrize("kind, at, big_endian", [("jpeg", b"\xff\xc0", True), ("webp", b"\x9d\x01\x2a", False)])
def test_a_header_that_claims_too_much_is_not_believed(photo, kind, at, big_endian):
    encoded = bytearray(FILES[kind](Image.fromarray(photo())))
    start = encoded.find(at) + (5 if kind == "jpeg" else 3)
    encoded[start : start + 4] = (16000).to_bytes(2, "big" if big_endian else "little") * 2
    with pytest.raises(data.CorruptImage, match="16000 x 16000 pixels, more than data.max_pixels=134217728"):
        data.decode(bytes(encoded))


def test_sixteen_bit_png_keeps_the_upper_byte(photo):
    image = photo()
    encoded = cv2.imencode(".png", image[..., ::-1].astype(np.uint16) * 256 + 77)[1].tobytes()
    np.testing.assert_array_equal(data.decode(encoded), image)


@pytest.mark.parametrize("value", range(1, 10))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_is_followed_where_asked(photo, file_format, value):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a camera's maker", value  # 9 is no orientation
    encoded = _pil(Image.fromarray(photo(40, 60)), file_format, exif=exif)
    stored = data.decode(encoded)
    assert stored.shape == (40, 60, 3)
    np.testing.assert_array_equal(data.decode(encoded, upright=True), ImageOps.exif_transpose(_with_exif(stored, value)))


def _with_exif(image, orientation):
    image = Image.fromarray(image)
    image.getexif()[0x0112] = orientation
    return image


@pytest.mark.parametrize("kind", FILES)
def test_files_without_an_orientation_are_the_same_upright(photo, kind):
    encoded = FILES[kind](Image.fromarray(photo(40, 60)))
    np.testing.assert_array_equal(data.decode(encoded, upright=True), data.decode(encoded))


@pytest.mark.parametrize("exif", [b"", b"Exif", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff\x01\x12", bytes(90)])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_leaves_the_pixels_as_they_are(photo, file_format, exif):
    encoded = _pil(Image.fromarray(photo(40, 60)), file_format, exif=b"Exif\0\0" + exif)
    np.testing.assert_array_equal(data.decode(encoded, upright=True), data.decode(encoded))


@pytest.mark.parametrize("source, shape", [("folder", (60, 40, 3)), ("tfds", (40, 60, 3))])
def test_files_are_turned_and_imagenet_is_not(photo, monkeypatch, source, shape):
    """Published ImageNet figures ignore the orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90°"
    config = config_lib.digits().data
    config.source = source
    transform = data.ClassificationTransform(config, num_classes=1, training=False)
    shapes = []
    crop = images.eval_transform
    monkeypatch.setattr(images, "eval_transform", lambda image, options: shapes.append(image.shape) or crop(image, options))
    transform({"image": _pil(Image.fromarray(photo(40, 60)), "JPEG", exif=exif), "label": 0}, None)
    assert shapes == [shape]


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(photo, file_format):
    frames = [Image.fromarray(photo()), Image.fromarray(255 - photo())]
    encoded = _pil(frames[0], file_format, save_all=True, append_images=frames[1:], lossless=True)
    assert abs(data.decode(encoded).astype(int) - np.asarray(frames[0])).max() <= 2


def test_harmless_flaws_are_no_corruption(photo):
    """Stray bytes before the end marker: other decoders warn and go on."""
    encoded = _pil(Image.fromarray(photo()), "JPEG")
    flawed = encoded[:-2] + b"\x00\x00\x00" + encoded[-2:]
    np.testing.assert_array_equal(data.decode(flawed), data.decode(encoded))


@pytest.mark.parametrize("options", [{"restart_marker_rows": 1}, {}, {"progressive": True}], ids=str)
def test_damage_within_a_jpeg_is_no_truncation(photo, options):
    """Pillow and others show such a file, with some wrong pixels; so do we."""
    whole = _pil(Image.fromarray(photo(noise=0.0)), "JPEG", quality=95, **options)
    begin, strict_errors, wrong = whole.find(b"\xff\xda") + 14, 0, []
    for at in np.linspace(begin, len(whole) - 12, 40).astype(int):
        damaged = whole[:at] + b"\x12" * 10 + whole[at + 10 :]
        try:
            simplejpeg.decode_jpeg(damaged, "RGB")
        except ValueError:
            strict_errors += 1
        try:
            expected = np.asarray(Image.open(io.BytesIO(damaged)).convert("RGB")).astype(int)
        except OSError:  # damage to a table between two scans
            continue
        got = data.decode(damaged)
        wrong.append((abs(got - expected).max(-1) > 8).mean())
    assert strict_errors > 10 and len(wrong) > 20
    assert np.mean(wrong) < 0.05


@pytest.mark.parametrize("trailer", [b"", bytes(5000), b"\xff" * 9], ids=["none", "zeros", "ff"])
def test_the_end_is_looked_for_behind_a_thumbnail_and_before_a_trailer(photo, trailer):
    """An EXIF thumbnail is a JPEG with an end of its own; cameras and downloads leave bytes behind the image's end."""
    thumbnail = _pil(Image.fromarray(photo(20, 30)), "JPEG")
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0" + thumbnail
    whole = _pil(Image.fromarray(photo()), "JPEG", exif=exif)
    assert data.decode(whole + trailer).shape == (75, 100, 3)
    for share in (0.1, 0.5, 0.95):
        with pytest.raises(data.CorruptImage, match="truncated"):
            data.decode(whole[: int(share * len(whole))] + trailer)


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (64, 64), (37, 200), (300, 41), (512, 512)])
@pytest.mark.parametrize(
    "size, interpolation", [(32, "area_bicubic"), (64, "area_bicubic"), ((20, 64), "area_bicubic"), ((48, 32), "bicubic")]
)
def test_transforms_give_the_size(photo, data_config, shape, size, interpolation):
    image, rng, expected = photo(*shape), np.random.default_rng(0), data.height_and_width(size)
    for layers in (0, 2):
        options = {"interpolation": interpolation, "randaugment_layers": layers}
        config = data_config(image_size=size, crop_scale=(0.08, 1.0), **options)
        for out in (data.train_transform(image, rng, config), data.eval_transform(image, config)):
            assert out.shape == (*expected, 3) and out.dtype == np.uint8 and out.flags.c_contiguous


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


@pytest.mark.parametrize("shape", [(91, 130), (200, 60)])
@pytest.mark.parametrize("interpolation", ["area_bicubic", "bicubic"])
def test_evaluation_does_not_stretch(photo, data_config, shape, interpolation):
    """Both scales are equal, whatever the shapes are, and the crop is central."""
    h, w = shape
    y, x = np.mgrid[0:h, 0:w]
    image = np.stack([x, y, x], -1).astype(np.uint8)
    config = data_config(eval_crop=0.8, interpolation=interpolation)
    for config.image_size in ((24, 40), (40, 24)):
        out = data.eval_transform(image, config).astype(float)
        (height, width), inner = config.image_size, out[4:-4, 4:-4]
        steps = np.diff(inner[..., 1], axis=0).mean(), np.diff(inner[..., 0], axis=1).mean()
        np.testing.assert_allclose(steps, 0.8 * min(h / height, w / width), rtol=0.06)
        np.testing.assert_allclose(out.mean((0, 1))[:2], ((w - 1) / 2, (h - 1) / 2), atol=1.5)


def test_training_crops_stretch_alike_for_all_shapes():
    """A ramp tells the rectangle's shape: over that of the result, it lies within `ratio`."""
    y, x = np.mgrid[0:120, 0:160]
    image, rng, found = np.stack([x, y, x], -1).astype(np.uint8), np.random.default_rng(0), []
    for _ in range(200):
        crop = data.random_resized_crop(image, rng, (96, 48), (0.1, 0.3), (0.75, 1.25)).astype(float)
        width, height = (np.ptp(crop[..., c]) + 1 for c in (0, 1))
        found.append(width / height * 2)
    assert 0.7 < min(found) < 0.85 and 1.15 < max(found) < 1.32


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
