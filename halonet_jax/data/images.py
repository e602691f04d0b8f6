"""Decoding, cropping and resizing of one image: uint8 RGB in, uint8 RGB out, on NumPy, OpenCV and simplejpeg."""

import contextlib
import io
import math
import numbers
from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg
from PIL import BmpImagePlugin, Image, JpegImagePlugin

from halonet_jax.data import orientation, randaugment
from halonet_jax.errors import CorruptImage

# The loader's threads are the parallelism; OpenCV's own would only contend with them.
cv2.setNumThreads(0)

_CROP_TRIES = 10
_JPEG_START = b"\xff\xd8"


def decode(encoded: bytes, max_pixels: int = 2**27, upright: bool = False) -> np.ndarray:
    """Decodes a JPEG, PNG, WebP or BMP file.

    Gray is repeated over the three channels, palettes are looked up, CMYK is converted, 16-bit values keep their
    upper byte, alpha is dropped (not blended), and an animation gives its first frame. A JPEG with damaged bytes decodes
    as long as it has its end, as in other decoders; some of its pixels are wrong.

    Args:
        encoded: the whole file.
        max_pixels: most pixels, height times width. The header's numbers count: nothing is decoded before.
        upright: turn the pixels as the file's EXIF orientation says. False: they come as they are stored, as ImageNet's
            have always been read.

    Returns:
        uint8 [h, w, 3], RGB.

    Raises:
        CorruptImage: if the file is empty, truncated, too large or no image; the message is the reason.
    """
    image = _stored_pixels(encoded, max_pixels)
    return orientation.turn(image, orientation.read(encoded)) if upright else image


def _stored_pixels(encoded, max_pixels):
    if not encoded:
        raise CorruptImage("the file is empty")
    width, height = _header_size(encoded)
    if width * height > max_pixels:
        raise CorruptImage(f"{width} x {height} pixels, more than data.max_pixels={max_pixels}")
    if encoded.startswith(_JPEG_START):
        try:
            return simplejpeg.decode_jpeg(encoded, "RGB")
        except _SIMPLEJPEG_ERRORS:
            # Any of libjpeg's warnings. Most flaws cost a few pixels, but the missing rows of a truncated file would be gray.
            _check_end(encoded)
        with contextlib.suppress(*_SIMPLEJPEG_ERRORS):
            return simplejpeg.decode_jpeg(encoded, "RGB", strict=False)
    image = None
    try:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error as e:
        raise CorruptImage(f"OpenCV: {e.err}") from None
    if image is None:
        raise CorruptImage(f"damaged or truncated: OpenCV finds no complete image in its {len(encoded)} bytes")
    return image


def _header_size(encoded):
    """Width and height as the header states them. Pillow's classes are called directly: `PIL.Image.open` has its own limit."""
    for start, size in _HEADERS.items():
        if encoded.startswith(start):
            try:
                return size(encoded)
            except CorruptImage:
                raise
            except Exception as e:  # Pillow raises many kinds, SyntaxError among them
                raise CorruptImage(f"its header is damaged or truncated: {e or type(e).__name__}") from None
    raise CorruptImage(f"no JPEG, PNG, WebP or BMP image in its {len(encoded)} bytes")


def _pillow_size(kind):
    def size(encoded):
        with kind(io.BytesIO(encoded)) as header:
            return header.size

    return size


def _jpeg_size(encoded):
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(encoded, strict=False)
        return width, height
    except _SIMPLEJPEG_ERRORS:  # truncated, or of a kind that Pillow and OpenCV read
        _check_end(encoded)
        return _pillow_size(JpegImagePlugin.JpegImageFile)(encoded)


def _png_size(encoded):
    """By the IHDR chunk, which comes first. Pillow would also read comments, and has limits for them."""
    width, height = int.from_bytes(encoded[16:20]), int.from_bytes(encoded[20:24])
    if encoded[12:16] != b"IHDR" or not width or not height:
        raise CorruptImage("its header is damaged or truncated: no width and height")
    return width, height


def _webp_size(encoded):
    """By RFC 9649. Pillow has a limit of its own for WebP, and some versions allocate the whole canvas."""
    kind, data = encoded[8:16], encoded[20:30]
    if len(data) < 10:
        raise CorruptImage(f"truncated WebP: {len(encoded)} bytes")
    if kind == b"WEBPVP8X":
        return int.from_bytes(data[4:7], "little") + 1, int.from_bytes(data[7:10], "little") + 1
    if kind == b"WEBPVP8L":
        bits = int.from_bytes(data[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"WEBPVP8 ":
        return int.from_bytes(data[6:8], "little") & 0x3FFF, int.from_bytes(data[8:10], "little") & 0x3FFF
    raise CorruptImage(f"no WebP image: it starts with {encoded[:16]!r}")


_SIMPLEJPEG_ERRORS = (ValueError, KeyError)  # the second for a kind of JPEG that it has no name for
# By the file's first bytes; the only formats that are decoded.
_HEADERS = {
    _JPEG_START: _jpeg_size,
    b"\x89PNG\r\n\x1a\n": _png_size,
    b"RIFF": _webp_size,
    b"BM": _pillow_size(BmpImagePlugin.BmpImageFile),
}


def _check_end(jpeg):
    """Raises CorruptImage where no end-of-image marker follows the start of the image's first scan.

    Segments before the scan are passed over by their length, because an EXIF thumbnail has an end marker of its own.
    Within a scan the marker's two bytes cannot occur, and whatever comes after them does not matter.
    """
    at = 2
    while (at := jpeg.find(b"\xff", at)) >= 0:
        marker = jpeg[at + 1 : at + 2]
        if marker == b"\xda":  # start of a scan
            if jpeg.find(b"\xff\xd9", at) >= 0:
                return
            break
        if marker in _NO_LENGTH:
            at += 1
        else:
            at += 2 + int.from_bytes(jpeg[at + 2 : at + 4])
    raise CorruptImage(f"truncated JPEG: its {len(jpeg)} bytes have no end-of-image marker")


# What a 0xff is followed by where no segment starts: stuffing, fill bytes, restart markers and the like.
_NO_LENGTH = {bytes([b]) for b in (0x00, 0x01, 0xFF, *range(0xD0, 0xDA))}


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns (height, width), pixels.

    Args:
        size: the side of a square, or (height, width).
    """
    return (size, size) if isinstance(size, numbers.Integral) else tuple(size)


def resize(image: np.ndarray, size: int | Sequence[int], interpolation: str = "area_bicubic") -> np.ndarray:
    """Resizes [h, w, 3] to the side, or to the height and width, `size`.

    "area_bicubic" averages 2×2 pixels while that leaves enough, then is bicubic. So a strong reduction does not alias,
    and costs a tenth of OpenCV's area averaging by an odd factor. An odd last row or column is left out of an average.
    "bicubic" is Pillow's filter, which widens with the reduction.
    """
    height, width = height_and_width(size)
    if interpolation == "bicubic":
        return _pillow_bicubic(image, height, width)
    while image.shape[0] >= 2 * height and image.shape[1] >= 2 * width:
        h, w = image.shape[0] // 2, image.shape[1] // 2
        image = cv2.resize(image[: 2 * h, : 2 * w], (w, h), interpolation=cv2.INTER_AREA)
    if image.shape[:2] == (height, width):
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int | Sequence[int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    interpolation: str = "area_bicubic",
) -> np.ndarray:
    """Crops a random rectangle and resizes it (Inception crop, arXiv 1409.4842, section 6).

    After ten rectangles that do not fit, the largest central one whose shape lies within `ratio` is taken. For a result that
    is no square, `ratio` is relative to its shape, so that it bounds how much objects are stretched. torchvision and timm
    take it as it is there.

    Args:
        image: [h, w, 3].
        rng: draws the rectangle.
        size: side, or height and width, of the result, pixels.
        scale: range of the rectangle's share of the area, uniform.
        ratio: range of its width over height, over that of the result, log-uniform.
        interpolation: of `resize`.

    Returns:
        [height, width, 3].
    """
    h, w = image.shape[:2]
    height, width = height_and_width(size)
    ratio = ratio[0] * (width / height), ratio[1] * (width / height)
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_TRIES):
        area = h * w * rng.uniform(*scale)
        shape = math.exp(rng.uniform(*log_ratio))
        crop_w, crop_h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < crop_w <= w and 0 < crop_h <= h:
            top, left = rng.integers(h - crop_h + 1), rng.integers(w - crop_w + 1)
            return resize(image[top : top + crop_h, left : left + crop_w], size, interpolation)
    shape = min(max(w / h, ratio[0]), ratio[1])
    crop_w, crop_h = min(w, round(h * shape)), min(h, round(w / shape))
    return resize(_central(image, max(crop_h, 1), max(crop_w, 1)), size, interpolation)


def horizontal_flip(image: np.ndarray) -> np.ndarray:
    """Mirrors [h, w, 3] left to right."""
    return cv2.flip(image, 1)


def center_crop(image: np.ndarray, size: int | Sequence[int], fraction: float) -> np.ndarray:
    """Resizes the central rectangle of the result's shape to that result.

    Its sides are `fraction` of those of the largest such rectangle. For a square, this is `fraction` of the image's shorter
    side.

    Args:
        image: [h, w, 3].
        size: side, or height and width, of the result, pixels.
        fraction: as above.
    """
    (h, w), (height, width) = image.shape[:2], height_and_width(size)
    if h * width <= w * height:  # the height bounds the rectangle
        sides = fraction * h, fraction * h * (width / height)
    else:
        sides = fraction * w * (height / width), fraction * w
    return resize(_central(image, *(max(1, round(side)) for side in sides)), size)


def resize_and_crop(image: np.ndarray, size: int | Sequence[int], fraction: float) -> np.ndarray:
    """Resizes by antialiased bicubic, then crops the centre, as timm and torchvision do.

    Args:
        image: [h, w, 3].
        size: side, or height and width, of the result, pixels.
        fraction: the result's sides over those of the smallest resized image that holds it; timm's `crop_pct`. For a square:
            over the shorter side between the two steps.
    """
    (h, w), (height, width) = image.shape[:2], height_and_width(size)
    if height == width:
        short = max(height, math.floor(height / fraction))
        scaled_h, scaled_w = (short, int(short * w / h)) if h <= w else (int(short * h / w), short)
    else:  # timm's ResizeKeepRatio
        least = max(height, math.floor(height / fraction)), max(width, math.floor(width / fraction))
        ratio = min(h / least[0], w / least[1])
        scaled_h, scaled_w = round(h / ratio), round(w / ratio)
    image = _pillow_bicubic(image, scaled_h, scaled_w)
    top, left = round((scaled_h - height) / 2), round((scaled_w - width) / 2)
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def _pillow_bicubic(image, height, width):
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def train_transform(image: np.ndarray, rng: np.random.Generator, data_config) -> np.ndarray:
    """Random resized crop, flip, RandAugment, as configured; uint8 [h, w, 3] to `image_size`."""
    c = data_config
    image = random_resized_crop(image, rng, c.image_size, c.crop_scale, c.crop_ratio, c.interpolation)
    if c.flip and rng.random() < 0.5:
        image = horizontal_flip(image)
    if c.randaugment_layers:
        image = randaugment.apply_random_ops(image, rng, c.randaugment_layers, c.randaugment_magnitude, c.randaugment_ops)
    return image


def eval_transform(image: np.ndarray, data_config) -> np.ndarray:
    """Central crop, as configured; uint8 [h, w, 3] to `image_size`."""
    if data_config.interpolation == "bicubic":
        return resize_and_crop(image, data_config.image_size, data_config.eval_crop)
    return center_crop(image, data_config.image_size, data_config.eval_crop)


def _central(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]
