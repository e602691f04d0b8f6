"""What digit scenes are drawn with: random numbers, resized scans and textures, the same on every platform.

Only whole numbers are computed with. Random numbers are the raw words of NumPy's Philox generator, whose stream NumPy
guarantees; the methods of `np.random.Generator` may change. Matrix products are of small whole numbers in float32, where
sums below 2**24 are exact in any order.
"""

import functools

import numpy as np

_WORDS = 128  # random words to fetch at a time
_STEPS = 64  # of interpolation between two pixels
FULL = 16 * _STEPS * _STEPS  # a fully inked pixel of `resize`


class Draws:
    """Whole random numbers, as a function of the key.

    Args:
        seed: from 0 to 2**63 - 1.
        stream: sequences of different streams are independent; below 2**31.
        index: likewise; below 2**32.
    """

    def __init__(self, seed: int, stream: int, index: int):
        self._bits = np.random.Philox(key=seed << 64 | stream << 32 | index)
        self._words: list[int] = []

    def below(self, limit: int) -> int:
        """Returns a number from 0 to `limit - 1`; the remainder's bias is below 2**-40.

        Args:
            limit: at most 2**24.
        """
        if not self._words:
            self._words = self._bits.random_raw(_WORDS).tolist()
        return self._words.pop() % limit

    def between(self, least: int, most: int) -> int:
        """Returns a number from `least` to `most`, both included."""
        return least + self.below(most - least + 1)

    def sample(self, items: list, count: int) -> list:
        """Returns `count` different items in random order."""
        items = list(items)
        for place in range(count):
            other = place + self.below(len(items) - place)
            items[place], items[other] = items[other], items[place]
        return items[:count]

    def bytes(self, *shape: int) -> np.ndarray:
        """Returns uint8 of `shape`, from 0 to 255."""
        count = int(np.prod(shape))
        return self._bits.random_raw(-(-count // 8)).astype("<u8", copy=False).view(np.uint8)[:count].reshape(shape)


@functools.cache
def _weights(size: int, points: int) -> np.ndarray:
    """Linear interpolation from `points` to `size` pixels with aligned edges: float32 [size, points], whole 64ths."""
    weights = np.zeros((size, points), np.float32)
    for pixel in range(size):
        whole, rest = divmod(max(0, (2 * pixel + 1) * points - size), 2 * size)
        share = (rest * _STEPS + size) // (2 * size)
        weights[pixel, min(whole, points - 1)] += _STEPS - share
        weights[pixel, min(whole + 1, points - 1)] += share
    return weights


def resize(scan: np.ndarray, height: int, width: int) -> np.ndarray:
    """Interpolates a scan linearly.

    Args:
        scan: float32 [h, w] of whole numbers from 0 to 255.
        height: of the result, pixels.
        width: of the result, pixels.

    Returns:
        float32 [height, width] of whole numbers: 4,096 times the scan's.
    """
    return _weights(height, scan.shape[0]) @ scan @ _weights(width, scan.shape[1]).T


def textures(draws: Draws, count: int, size: int) -> np.ndarray:
    """Returns smooth noise of three scales, with stripes in every second texture.

    Args:
        draws: random numbers.
        count: number of textures.
        size: their side, pixels.

    Returns:
        int8 [count, size, size].
    """
    result = np.zeros((count, size, size), np.int32)
    y, x = np.mgrid[:size, :size]
    for number, texture in enumerate(result):
        for points, share in ((6, 4), (16, 3), (48, 2)):
            smooth = resize(draws.bytes(points, points).astype(np.float32), size, size).astype(np.int32)
            texture += share * (smooth // _STEPS**2 - 128)
        if number % 2:
            period, across, down = draws.between(size // 16, size // 4), draws.between(-8, 8), draws.between(-8, 8)
            wave = (x * across + y * down) // 8 % period
            texture += 4 * (np.abs(2 * wave - period) * 255 // period - 128)
    return np.clip(result // 5, -127, 127).astype(np.int8)


def clutter(draws: Draws, scans: np.ndarray, count: int, size: int) -> np.ndarray:
    """Returns layers of light and dark fragments of scans: parts of 4 by 4 pixels, resized.

    Args:
        draws: random numbers.
        scans: float32 [n, 8, 8], 0 to 16.
        count: number of layers.
        size: their side, pixels. Fragments are a twentieth to an eighth of it.

    Returns:
        int8 [count, size, size].
    """
    layers = np.zeros((count, size, size), np.int32)
    for layer in layers:
        for _ in range(80):
            side, sign = draws.between(size // 20, size // 8), 2 * draws.below(2) - 1
            scan, top, left = scans[draws.below(len(scans))], draws.below(5), draws.below(5)
            fragment = resize(scan[top : top + 4, left : left + 4], side, side).astype(np.int32) * 127 // FULL
            y, x = draws.below(size - side + 1), draws.below(size - side + 1)
            layer[y : y + side, x : x + side] += sign * fragment
    return np.clip(layers, -127, 127).astype(np.int8)
