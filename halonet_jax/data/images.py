"""Decoding, cropping and resizing of one image: uint8 RGB in, uint8 RGB out, on NumPy and OpenCV."""

import math

import cv2
import numpy as np
import simplejpeg

from halonet_jax.data import randaugment
from halonet_jax.errors import CorruptImage

# The loader's threads are the parallelism; OpenCV's own would only contend with them.
cv2.setNumThreads(0)

_CROP_TRIES = 10


def decode(encoded: bytes) -> np.ndarray:
    """Decodes a JPEG, PNG, WebP or BMP file.

    Gray is repeated over the three channels, palettes are looked up, CMYK is converted, 16-bit values keep their
    upper byte, alpha is dropped (not blended), and an EXIF orientation is ignored: pixels come as they are stored.

    Args:
        encoded: the whole file.

    Returns:
        uint8 [h, w, 3], RGB.

    Raises:
        CorruptImage: if the file is empty, truncated or no image; the message is the reason.
    """
    if not encoded:
        raise CorruptImage("the file is empty")
    if encoded[:2] == b"\xff\xd8":
        try:
            return simplejpeg.decode_jpeg(encoded, "RGB")
        except ValueError as e:
            if "remature end" in str(e):  # OpenCV may fill the missing rows with gray instead of failing
                raise CorruptImage(f"truncated JPEG: {e}") from None
            # Strict on harmless flaws, too (stray bytes between markers): OpenCV decides.
    image = None
    try:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error as e:
        raise CorruptImage(f"OpenCV: {e.err}") from None
    if image is None:
        raise CorruptImage(f"no complete JPEG, PNG, WebP or BMP image in its {len(encoded)} bytes")
    return image


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes [h, w, 3] to [size, size, 3]: averages 2×2 pixels while that leaves enough, then bicubic.

    So a strong reduction does not alias, and costs a tenth of OpenCV's area averaging by an odd factor. An odd last row
    or column is left out of an average.
    """
    while min(image.shape[:2]) >= 2 * size:
        h, w = image.shape[0] // 2, image.shape[1] // 2
        image = cv2.resize(image[: 2 * h, : 2 * w], (w, h), interpolation=cv2.INTER_AREA)
    if image.shape[:2] == (size, size):
        return image
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Crops a random rectangle and resizes it to a square (Inception crop, arXiv 1409.4842, section 6).

    After ten rectangles that do not fit, the largest central one whose shape lies within `ratio` is taken.

    Args:
        image: [h, w, 3].
        size: side of the result, pixels.
        scale: range of the rectangle's share of the area, uniform.
        ratio: range of its width over height, log-uniform.

    Returns:
        [size, size, 3].
    """
    h, w = image.shape[:2]
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_TRIES):
        area = h * w * rng.uniform(*scale)
        shape = math.exp(rng.uniform(*log_ratio))
        crop_w, crop_h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < crop_w <= w and 0 < crop_h <= h:
            top, left = rng.integers(h - crop_h + 1), rng.integers(w - crop_w + 1)
            return resize(image[top : top + crop_h, left : left + crop_w], size)
    shape = min(max(w / h, ratio[0]), ratio[1])
    crop_w, crop_h = min(w, round(h * shape)), min(h, round(w / shape))
    return resize(_central(image, max(crop_h, 1), max(crop_w, 1)), size)


def horizontal_flip(image: np.ndarray) -> np.ndarray:
    """Mirrors [h, w, 3] left to right."""
    return cv2.flip(image, 1)


def center_crop(image: np.ndarray, size: int, fraction: float) -> np.ndarray:
    """Resizes the central square, whose side is `fraction` of the image's shorter side, to [size, size, 3]."""
    side = max(1, round(fraction * min(image.shape[:2])))
    return resize(_central(image, side, side), size)


def train_transform(image: np.ndarray, rng: np.random.Generator, data_config) -> np.ndarray:
    """Random resized crop, flip, RandAugment, as configured; uint8 [h, w, 3] to [size, size, 3]."""
    c = data_config
    image = random_resized_crop(image, rng, c.image_size, c.crop_scale, c.crop_ratio)
    if c.flip and rng.random() < 0.5:
        image = horizontal_flip(image)
    if c.randaugment_layers:
        image = randaugment.apply_random_ops(image, rng, c.randaugment_layers, c.randaugment_magnitude, c.randaugment_ops)
    return image


def eval_transform(image: np.ndarray, data_config) -> np.ndarray:
    """Central crop, as configured; uint8 [h, w, 3] to [size, size, 3]."""
    return center_crop(image, data_config.image_size, data_config.eval_crop)


def _central(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]
