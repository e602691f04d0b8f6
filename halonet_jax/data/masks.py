"""Masks of objects: COCO's polygons and run lengths, bitmaps, and the square of probabilities that a mask head gives.

A *segmentation* is one of:

- polygons: a list of float arrays [k, 2] of x, y in pixels; the object is their union;
- run lengths (RLE): a dict of `size`, [height, width], and `counts`, bytes as pycocotools compresses them;
- a bitmap: bool or uint8 [height, width];
- None: the object has a box alone.

Coordinates are continuous: pixel (y, x) covers [y, y + 1) × [x, x + 1). A *frame* is a box (y0, x0, y1, x1) in pixels.
pycocotools is the codec. It is imported when it is needed.
"""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from halonet_jax.errors import DataError


def codec() -> Any:
    """Returns the module `pycocotools.mask`.

    Raises:
        DataError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError:
        raise DataError("masks and evaluation of detection need pycocotools; pip install -e '.[detection]'") from None
    return mask


def run_lengths(counts: bytes) -> np.ndarray:
    """Expands compressed run lengths.

    Args:
        counts: as pycocotools writes them: numbers of six-bit characters with a sign, each from the third on as the
            difference to the one before the previous one.

    Returns:
        int64 [m]: pixels of background, object, background, ..., column by column.

    Raises:
        ValueError: these are no compressed run lengths.
    """
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError("no compressed run lengths")
    last = digits & 32 == 0
    first = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    number = np.cumsum(last) - last
    place = np.arange(len(digits)) - first[number]
    if place.max() > 6:  # 35 bits hold any image
        raise ValueError("a run length is too large")
    values = np.add.reduceat((digits & 31) << 5 * place, first)
    negative = digits[last] & 16 != 0
    values[negative] -= 1 << 5 * (place[last][negative] + 1)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def in_frame(segmentation: Any, frame: Sequence[float], size: int) -> np.ndarray:
    """Rasterises an object in a frame.

    Args:
        segmentation: see the top of this module; not None.
        frame: the box that the result covers, pixels of the image, with an area.
        size: side of the result.

    Returns:
        uint8 [size, size], 0 or 1.
    """
    y0, x0, y1, x1 = map(float, frame)
    step_y, step_x = (y1 - y0) / size, (x1 - x0) / size
    if isinstance(segmentation, list):
        origin, step = np.array([x0, y0]), np.array([step_x, step_y])
        polygons = [((p - origin) / step).ravel().tolist() for p in segmentation]
        return codec().decode(codec().merge(codec().frPyObjects(polygons, size, size)))
    bitmap = codec().decode(segmentation) if isinstance(segmentation, dict) else np.asarray(segmentation, np.uint8)
    place = np.array([[step_x, 0, x0 + step_x / 2 - 0.5], [0, step_y, y0 + step_y / 2 - 0.5]])
    found = cv2.warpAffine(bitmap * 255, place, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return (found >= 128).astype(np.uint8)


def bitmap(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Rasterises an object in its image.

    Args:
        segmentation: see the top of this module; not None.
        height: of the image, pixels.
        width: likewise.

    Returns:
        uint8 [height, width], 0 or 1.
    """
    if isinstance(segmentation, (list, dict)):
        return codec().decode(to_rle(segmentation, height, width))
    return np.asarray(segmentation, np.uint8)


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Returns the run lengths of an object, equal to pycocotools' own.

    Args:
        segmentation: see the top of this module; not None.
        height: of the image, pixels.
        width: likewise.
    """
    if isinstance(segmentation, dict):
        return segmentation
    if isinstance(segmentation, list):
        polygons = [np.asarray(p, np.float64).ravel().tolist() for p in segmentation]
        return codec().merge(codec().frPyObjects(polygons, height, width))
    return codec().encode(np.asfortranarray(segmentation, np.uint8))


def paste(mask: np.ndarray, box: Sequence[float], height: int, width: int) -> tuple[np.ndarray, int, int]:
    """Puts the probabilities of a mask head where its box lies, and cuts them at 1/2.

    A pixel's value is interpolated at its centre, bilinearly, with zeros around the square.

    Args:
        mask: probabilities [m, n], which cover the box.
        box: (y0, x0, y1, x1), pixels of the image.
        height: of the image, pixels.
        width: likewise.

    Returns:
        bool [h, w], the part of the image that the box covers, empty where that is none; its first row; its first column.
    """
    top, cell_y, part_y = _cells(box[0], box[2], height, mask.shape[0])
    left, cell_x, part_x = _cells(box[1], box[3], width, mask.shape[1])
    # Not as a product of matrices: BLAS starts threads for it, which then wait for each other.
    mask = np.pad(np.asarray(mask, np.float32), 1)
    rows = (mask[cell_y] + (mask[cell_y + 1] - mask[cell_y]) * part_y[:, None]).T.copy()
    found = np.diff(rows, axis=0)[cell_x]  # [columns, rows], so that columns are whole in memory
    found *= part_x[:, None]
    found += rows[cell_x]
    return (found >= 0.5).T, top, left


def _cells(start, stop, length, cells):
    """The first pixel whose centre lies in [start, stop]; for each such pixel the cell before it, and how far it is on."""
    start, stop = float(start), float(stop)
    first, end = max(0, math.ceil(start - 0.5)), min(length, math.floor(stop - 0.5) + 1)
    if not stop > start or end <= first:
        return first, np.zeros(0, int), np.zeros(0, np.float32)
    at = (np.arange(first, end) + (0.5 - start)) * (cells / (stop - start)) + 0.5  # cell 0 is the border
    cell = np.minimum(at.astype(int), cells)
    return first, cell, (at - cell).astype(np.float32)


def pasted_rle(mask: np.ndarray, box: Sequence[float], height: int, width: int) -> dict[str, Any]:
    """Returns the run lengths of a pasted mask, without building the whole picture.

    Args:
        mask: see `paste`.
        box: likewise.
        height: likewise.
        width: likewise.
    """
    part, top, left = paste(mask, box, height, width)
    columns = np.zeros((height, part.shape[1]), np.uint8, order="F")
    columns[top : top + part.shape[0]] = part
    counts = run_lengths(codec().encode(columns)["counts"]) if part.size else np.array([0])
    counts[0] += left * height
    rest = height * width - counts.sum()
    counts = [*counts.tolist(), rest] if len(counts) % 2 == 0 and rest else [*counts[:-1].tolist(), int(counts[-1] + rest)]
    return codec().frPyObjects({"size": [height, width], "counts": counts}, height, width)
