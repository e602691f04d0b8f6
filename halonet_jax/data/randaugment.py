"""RandAugment (Cubuk et al., arXiv 1909.13719): a few random ops, all of one strength.

Ops and strengths follow the TensorFlow code published with AutoAugment and EfficientNet, which the paper's numbers come
from: lengths are pixels whatever the image's side, and geometric ops take the nearest pixel. We deviate in two places:
lengths are capped, so that small images survive, and `contrast` blends with the true mean gray, as Pillow does, where the
TensorFlow code divides the mean by the wrong count.

Magnitudes are nominally 0 to 10 and may go beyond (the paper searches up to 31). What each op does with `m`:

==================  =======================================  ==========================================
op                  strength                                 past 10
==================  =======================================  ==========================================
auto_contrast       none                                     same
equalize            none                                     same
invert              none                                     same
rotate              ±30° · m/10                              grows (93° at 31)
posterize           keeps int(4 · m/10) bits, 1 to 8         *weaker*: unchanged from 20 on
solarize            inverts values >= int(256 · m/10)        unchanged: the threshold is past 255
solarize_add        adds int(110 · m/10) to values < 128     grows; the sum stays within 255
color, contrast,    enhancement factor 0.1 + 1.8 · m/10      grows (5.68 at 31); values are clipped
brightness,         (1: unchanged, at m = 5)
sharpness
shear_x, shear_y    ±0.3 · m/10 pixels per pixel             grows (0.93 at 31)
translate_x,        ±100 pixels · m/10                       grows, up to 3/4 of the side,
translate_y                                                  so that some of the image stays
cutout              square of half-side 40 pixels · m/10     grows, up to a half-side of half the shorter side
==================  =======================================  ==========================================

Pixels that come from outside the image are gray (128), as is the cut-out square.
"""

import difflib
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from halonet_jax.errors import DataError

GRAY = (128, 128, 128)
_LEVELS = np.arange(256)


def apply_random_ops(
    image: np.ndarray, rng: np.random.Generator, layers: int, magnitude: float, ops: Sequence[str] = ()
) -> np.ndarray:
    """Applies `layers` ops, drawn uniformly with replacement, one after the other.

    Args:
        image: uint8 [h, w, 3], RGB.
        rng: draws the ops, signs and places.
        layers: number of ops.
        magnitude: strength of all of them, >= 0, see above.
        ops: names to draw from; empty: all of `OPS`.

    Returns:
        uint8 [h, w, 3].

    Raises:
        DataError: for a name that is not in `OPS`.
    """
    names = check_ops(ops)
    for choice in rng.integers(len(names), size=layers):
        image = OPS[names[choice]](image, magnitude, rng)
    return image


def check_ops(ops: Sequence[str]) -> tuple[str, ...]:
    """The names to draw from: `ops`, or all of `OPS` where that is empty. Raises DataError for unknown names."""
    for name in ops:
        if name not in OPS:
            close = difflib.get_close_matches(name, OPS, n=3, cutoff=0.4) or OPS
            raise DataError(f"RandAugment op {name!r} is unknown; did you mean {', '.join(close)}?")
    return tuple(ops) or tuple(OPS)


def auto_contrast(image, magnitude, rng):
    """Stretches each channel to the full range 0..255."""
    del magnitude, rng
    occupied = _histograms(image) > 0  # [256, 3]
    low, high = occupied.argmax(axis=0), 255 - occupied[::-1].argmax(axis=0)  # [3]
    scale = 255 / np.maximum(high - low, 1)
    table = (_LEVELS[:, None] - low) * scale  # [256, 3]
    return _look_up(image, np.where(high > low, table, _LEVELS[:, None]))


def equalize(image, magnitude, rng):
    """Flattens each channel's histogram."""
    del magnitude, rng
    return _look_up(image, np.stack([_equalizing_table(h) for h in _histograms(image).T], axis=-1))


def invert(image, magnitude, rng):
    """255 minus the value."""
    del magnitude, rng
    return cv2.bitwise_not(image)


def posterize(image, magnitude, rng):
    """Keeps the upper bits of each value."""
    del rng
    bits = min(max(int(0.4 * magnitude), 1), 8)
    return cv2.bitwise_and(image, np.full_like(image, 256 - (1 << (8 - bits))))


def solarize(image, magnitude, rng):
    """Inverts the values at and above a threshold."""
    del rng
    return _look_up(image, np.where(int(25.6 * magnitude) > _LEVELS, _LEVELS, 255 - _LEVELS))


def solarize_add(image, magnitude, rng):
    """Adds to the values below 128."""
    del rng
    return _look_up(image, np.where(_LEVELS < 128, _LEVELS + int(11 * magnitude), _LEVELS))


def color(image, magnitude, rng):
    """Blends with the image in gray."""
    del rng
    gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return _blend(gray, image, magnitude)


def contrast(image, magnitude, rng):
    """Blends with the mean gray."""
    del rng
    mean = np.floor(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _look_up(image, mean + _factor(magnitude) * (_LEVELS - mean))


def brightness(image, magnitude, rng):
    """Blends with black."""
    del rng
    return _look_up(image, _factor(magnitude) * _LEVELS)


def sharpness(image, magnitude, rng):
    """Blends with the image smoothed by a 3×3 kernel; the outermost pixels stay."""
    del rng
    smooth = image.copy()
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel)[1:-1, 1:-1]
    return _blend(smooth, image, magnitude)


def rotate(image, magnitude, rng):
    """Rotates about the centre."""
    h, w = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((w - 1) / 2, (h - 1) / 2), _sign(rng) * 3.0 * magnitude, 1.0)
    return _warp(image, matrix)


def shear_x(image, magnitude, rng):
    """Slides rows sideways, by more the lower they lie."""
    return _warp(image, [[1, _sign(rng) * 0.03 * magnitude, 0], [0, 1, 0]])


def shear_y(image, magnitude, rng):
    """Slides columns up or down, by more the further right they lie."""
    return _warp(image, [[1, 0, 0], [_sign(rng) * 0.03 * magnitude, 1, 0]])


def translate_x(image, magnitude, rng):
    """Shifts sideways."""
    return _warp(image, [[1, 0, _shift(image.shape[1], magnitude, rng)], [0, 1, 0]])


def translate_y(image, magnitude, rng):
    """Shifts up or down."""
    return _warp(image, [[1, 0, 0], [0, 1, _shift(image.shape[0], magnitude, rng)]])


def cutout(image, magnitude, rng):
    """Covers a square about a random pixel with gray; what lies outside the image is cut off (arXiv 1708.04552)."""
    h, w = image.shape[:2]
    half = round(min(4 * magnitude, 0.5 * min(h, w)))
    y, x = int(rng.integers(h)), int(rng.integers(w))
    image = image.copy()
    image[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = GRAY
    return image


OPS: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    op.__name__: op
    for op in (
        auto_contrast, equalize, invert, rotate, posterize, solarize, solarize_add, color, contrast, brightness,
        sharpness, shear_x, shear_y, translate_x, translate_y, cutout,
    )
}  # fmt: skip


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Maps every value by `table`, [256] or [256, 3], rounded and clipped to 0..255."""
    table = np.clip(np.rint(table), 0, 255).astype(np.uint8)
    return cv2.LUT(image, table if table.ndim == 1 else table[:, None, :])


def _histograms(image: np.ndarray) -> np.ndarray:
    """Pixels at each level, int64 [256, 3]."""
    counts = [cv2.calcHist([image], [c], None, [256], [0, 256]).ravel() for c in range(3)]
    return np.stack(counts, axis=1).astype(np.int64)


def _equalizing_table(histogram: np.ndarray) -> np.ndarray:
    """Pillow's and AutoAugment's rule: the top occupied level does not count toward the step."""
    step = (histogram.sum() - histogram[histogram.nonzero()[0][-1]]) // 255
    if step == 0:
        return _LEVELS
    return (step // 2 + np.cumsum(histogram) - histogram) // step


def _blend(degenerate: np.ndarray, image: np.ndarray, magnitude: float) -> np.ndarray:
    factor = _factor(magnitude)
    return cv2.addWeighted(image, factor, degenerate, 1 - factor, 0)


def _factor(magnitude: float) -> float:
    return 0.1 + 0.18 * magnitude


def _sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0


def _shift(side: int, magnitude: float, rng: np.random.Generator) -> float:
    return _sign(rng) * min(10 * magnitude, 0.75 * side)


def _warp(image: np.ndarray, matrix) -> np.ndarray:
    h, w = image.shape[:2]
    return cv2.warpAffine(image, np.asarray(matrix, np.float64), (w, h), flags=cv2.INTER_NEAREST, borderValue=GRAY)
