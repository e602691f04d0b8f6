"""Draws detections on a picture: boxes, masks, classes and scores."""

import functools
import os
from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from halonet_jax.data import masks as masks_lib

_LEAST_SIDE = 480  # a smaller picture is enlarged, so that its labels can be read
_MASK_ALPHA = 0.45
_COLORS = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#7a4fd0", "#e3262c", "#35c4e8", "#e85fb3", "#a5d91a", "#9a5b2d")


def color(label: int) -> tuple[int, int, int]:
    """Returns the colour of a class, RGB; always the same. Ten differ in hue, the next ones are lighter, then darker.

    Args:
        label: number of the class, from 0.
    """
    rgb = np.array(ImageColor.getrgb(_COLORS[label % len(_COLORS)]))
    tone = label // len(_COLORS) % 3
    return tuple(((rgb, (rgb + 255) / 2, rgb / 2)[tone]).astype(int).tolist())


def draw(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: Sequence[int],
    *,
    class_names: Sequence[str] = (),
    scores: Sequence[float] | None = None,
    masks: Sequence[np.ndarray] | None = None,
    min_score: float = 0.0,
    least_side: int = _LEAST_SIDE,
) -> np.ndarray:
    """Draws objects on a picture, small ones and those of high score on top.

    Args:
        image: uint8 [h, w, 3].
        boxes: [n, 4]: y0, x0, y1, x1, pixels of the image.
        classes: n numbers of classes, from 0.
        class_names: by number; without them, the number is shown.
        scores: n scores from 0 to 1; None: none are shown.
        masks: n squares of probabilities [m, m] in the frames of the boxes, as a mask head gives them, or n bitmaps, bool
            [h, w]; None: boxes alone.
        min_score: objects below are left out.
        least_side: a picture whose longer side is smaller is enlarged by a whole factor.

    Returns:
        uint8 [f h, f w, 3] for a whole factor f.
    """
    height, width = image.shape[:2]
    factor = max(1, -(-least_side // max(height, width)))
    size = height * factor, width * factor
    canvas = cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC) if factor > 1 else image.copy()
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4) * factor
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    order = [n for n in np.argsort(-area, kind="stable") if scores is None or scores[n] >= min_score]
    line = max(1, round(max(size) / 400))
    if masks is not None:
        for n in order:
            _draw_mask(canvas, _mask(masks[n], boxes[n], image.shape[:2], size), color(int(classes[n])), line)
    picture = Image.fromarray(canvas)
    pen, font, taken = ImageDraw.Draw(picture), _font(max(11, round(max(size) / 45))), []
    for n in order:
        y0, x0, y1, x1 = np.clip(boxes[n], 0, [*size, *size]).round().astype(int).tolist()
        if y1 > y0 and x1 > x0:
            pen.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=color(int(classes[n])), width=line)
    for n in order:
        label = int(classes[n])
        text = class_names[label] if label < len(class_names) else str(label)
        text = text if scores is None else f"{text} {scores[n]:.2f}"
        _draw_label(pen, text, boxes[n], color(label), font, size, taken)
    return np.asarray(picture)


def _mask(mask, box, original, size):
    """A mask as bool [h, w] of the enlarged picture."""
    mask = np.asarray(mask)
    if mask.shape == original and mask.dtype == bool:
        return cv2.resize(mask.astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST) > 0
    whole = np.zeros(size, bool)
    part, top, left = masks_lib.paste(mask, box, *size)
    whole[top : top + part.shape[0], left : left + part.shape[1]] = part
    return whole


def _draw_mask(canvas, mask, rgb, line):
    canvas[mask] = np.round(canvas[mask] * (1 - _MASK_ALPHA) + np.array(rgb) * _MASK_ALPHA).astype(np.uint8)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, outlines, -1, rgb, line)


def _draw_label(pen, text, box, rgb, font, size, taken):
    """Writes above the box, or inside where there is no room; below what was written before at that place."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    height, width = bottom - top + 4, right - left + 6
    x = int(np.clip(box[1], 0, max(0, size[1] - width)))
    y = int(box[0]) - height if box[0] >= height else int(max(0, box[0]))
    y = max(0, min(y, size[0] - height))
    while clash := [t for t in taken if x < t[2] and t[0] < x + width and y < t[3] and t[1] < y + height]:
        lower = max(t[3] for t in clash)
        if lower + height > size[0]:
            break
        y = lower
    taken.append((x, y, x + width, y + height))
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=rgb)
    dark = np.dot(rgb, (0.299, 0.587, 0.114)) > 140
    pen.text((x + 3 - left, y + 2 - top), text, font=font, fill=(0, 0, 0) if dark else (255, 255, 255))


@functools.cache
def _font(size):
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
