"""Masks drawn into their image, on the host with NumPy."""

import numpy as np


def paste(mask: np.ndarray, box: np.ndarray, height: int, width: int, threshold: float = 0.5) -> np.ndarray:
    """Returns the pixels of an image that an object covers.

    The mask is interpolated at the centres of the pixels. Around it are zeros, so that it fades out half a mask's pixel beyond
    its box.

    Args:
        mask: `[N, N]`, probabilities in the frame of the box.
        box: `[4]`, pixels of the image; to paste into the original image, scale it first.
        height: of the image, pixels.
        width: of the image, pixels.
        threshold: of the probability.

    Returns:
        bool `[height, width]`. A box without area covers nothing.
    """
    image = np.zeros((height, width), bool)
    y0, x0, y1, x1 = (float(edge) for edge in box)
    if y1 <= y0 or x1 <= x0:
        return image
    rows, row_weights = _axis(y0, y1, height, mask.shape[0])
    columns, column_weights = _axis(x0, x1, width, mask.shape[1])
    image[rows, columns] = row_weights @ mask.astype(np.float32) @ column_weights.T >= threshold
    return image


def _axis(start, end, length, size):
    """The image's pixels that the box can reach on one axis, and the weights of the mask's pixels in each of them."""
    reach = (end - start) / size
    first, last = (int(np.clip(at, 0, length)) for at in (np.floor(start - reach), np.ceil(end + reach)))
    at = (np.arange(first, last) + 0.5 - start) / (end - start) * size - 0.5
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(size)))
    return slice(first, last), weights.astype(np.float32)
