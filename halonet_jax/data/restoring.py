"""Detections back in the pixels of their image: the way out of what `DetectionTransform` did on the way in."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from halonet_jax.data import masks


class Restored(NamedTuple):
    """One detected object.

    Attributes:
        place: its position among the detections that were given.
        box: y0, x0, y1, x1, pixels of the image, within it, with an area.
        label: its class, from 0.
        score: from 0 to 1.
        mask: run lengths as pycocotools gives them; None without one.
    """

    place: int
    box: tuple[float, float, float, float]
    label: int
    score: float
    mask: dict[str, Any] | None


def restore(
    values: Mapping[str, np.ndarray], scale: np.ndarray, height: int, width: int, num_classes: int
) -> Iterator[Restored]:
    """Yields the detections of one image, in order. Those that are not finite, or have no area within it, are left out.

    Args:
        values: `boxes`, float [D, 4]: y0, x0, y1, x1, pixels of the input; `scores`, float [D]; `classes`, int [D], from 0;
            `valid`, bool [D]; optionally `masks`, [D, m, m]: probabilities in the frame of each box, or uint8, 255 for 1; or
            `full_masks`, bool [D, S, S], in pixels of the input.
        scale: float [2]: pixels of the input over pixels of the image, y and x.
        height: of the image, pixels.
        width: likewise.
        num_classes: detections of other classes are left out.
    """
    scale = np.asarray(scale, np.float64)
    boxes = np.clip(values["boxes"].astype(np.float64) / np.tile(scale, 2), 0, np.tile([height, width], 2))
    scores, classes = values["scores"].astype(np.float64), values["classes"]
    usable = values["valid"] & np.isfinite(boxes).all(1) & np.isfinite(scores)
    usable &= (boxes[:, 2:] > boxes[:, :2]).all(1) & (classes >= 0) & (classes < num_classes)
    for n in np.flatnonzero(usable).tolist():
        mask = None
        if "masks" in values:
            probabilities = values["masks"][n].astype(np.float32) / (255 if values["masks"].dtype == np.uint8 else 1)
            mask = masks.pasted_rle(probabilities, boxes[n], height, width)
        elif "full_masks" in values:
            mask = _whole(values["full_masks"][n], scale, height, width)
        yield Restored(n, tuple(boxes[n].tolist()), int(classes[n]), float(scores[n]), mask)


def _whole(mask, scale, height, width):
    y = np.minimum(((np.arange(height) + 0.5) * scale[0]).astype(int), mask.shape[0] - 1)
    x = np.minimum(((np.arange(width) + 0.5) * scale[1]).astype(int), mask.shape[1] - 1)
    return masks.to_rle(np.asarray(mask)[y[:, None], x] > 0, height, width)
