"""Scenes of several scanned digits on a textured background, drawn on demand, with labels, boxes and masks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from halonet_jax.data import annotations, drawing, subsets
from halonet_jax.data.digits import CLASSES, scans
from halonet_jax.data.layouts import LABELS, Layouts
from halonet_jax.errors import DataError

_STREAMS = {"train": 0, "test": 1}
_BANK = 8  # textures and layers of clutter, each twice as wide as the canvas; a scene cuts its own place from one of each
_MASK = int(0.35 * drawing.FULL)  # a pixel belongs to a digit if it has more ink


class DigitScenes:
    """Scenes composed of scikit-learn's digits: `image` uint8 [size, size, 3] and `label` int.

    An example is a function of (seed, split, index), the same on every platform. Scans of one split never appear in the
    other; `halonet_jax.data.digits.scans` splits them.

    The label of a scene is one of:

    - "most": the digit that occurs most often. No other occurs as often.
    - "left": the digit next to the framed one, on its left.
    - "largest": the largest digit, of one to five that are a ninth to four ninths of the canvas. For detection.

    Args:
        split: "train" or "test", or a slice of one, such as "train[:100]".
        count: number of scenes in the whole split.
        size: side of the canvas, pixels, 48 to 256.
        label: one of `LABELS`.
        difficulty: 0 to 1. More means more digits, of sizes that differ more (both but for "largest"), more clutter and
            noise, and less contrast.
        seed: of the scenes.
        classes: the digits that scenes have, from "0" to "9"; empty: all.
        role: as of `halonet_jax.data.digits.scans`.
        flag: likewise.

    Attributes:
        class_names: "0" to "9", or those of `classes`, rising.
        rows: rows of the split's scans among scikit-learn's 1,797, int64 [n].

    Raises:
        DataError: for another split, label or class, or an impossible slice.
    """

    def __init__(
        self, split: str, *, count: int, size: int = 64, label: str = "most", difficulty: float = 0.0, seed: int = 0,
        classes: Sequence[str] = (), role: str = "eval_split", flag: Callable[[str], str] = "--config.{}".format,
    ):  # fmt: skip
        name = subsets.split_name(split)
        ink, digits, rows = scans(name, role, flag=flag, source="digit_scenes")
        if label not in LABELS:
            raise DataError(f"digit scenes have no label {label!r}; use one of {', '.join(LABELS)}")
        self.class_names = subsets.keep_classes(CLASSES, classes, "digit_scenes")
        chosen = np.isin(digits, [int(name) for name in self.class_names])
        self._scans, self.rows = ink[chosen].astype(np.float32), rows[chosen]
        of_class = [np.flatnonzero(digits[chosen] == int(name)).tolist() for name in self.class_names]
        self._split, self._stream, self._size = split, _STREAMS[name], size
        self._begin, self._end = subsets.bounds(count, split, subsets.flag_of(flag, role))
        self._difficulty, self._seed, self._framed = round(100 * difficulty), seed, label == "left"
        self._layouts = Layouts(label, size, self._difficulty, of_class)
        draws = drawing.Draws(seed, 2 + self._stream, 0)
        self._textures = drawing.textures(draws, _BANK, 2 * size)
        self._clutter = drawing.clutter(draws, self._scans, _BANK, 2 * size)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return self._end - self._begin

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label, _, _ = self._draw(index)
        return {"image": image, "label": label}

    def scene(self, index: int) -> dict[str, Any]:
        """Returns an example with its objects, in the order in which they were drawn.

        Args:
            index: number of the example.

        Returns:
            `image` and `label` of the example; for its n digits `boxes`, float32 [n, 4], top, left, bottom and right of
            the visible pixels; `classes`, int32 [n]; `masks` of the visible pixels, bool [n, size, size]; and `scans`,
            int64 [n], their rows among scikit-learn's 1,797.
        """
        image, label, digits, inks = self._draw(index)
        masks = np.zeros((len(digits), self._size, self._size), bool)
        for number, (d, ink) in enumerate(zip(digits, inks)):
            place = slice(d.top, d.top + d.height), slice(d.left, d.left + d.width)
            inked = ink > _MASK
            masks[number][place] = inked
            masks[(slice(number), *place)] &= ~inked
        return {
            "image": image, "label": label, "boxes": np.array([_box(mask) for mask in masks], np.float32),
            "classes": np.array([d.label for d in digits], np.int32), "masks": masks,
            "scans": self.rows[[d.scan for d in digits]],
        }  # fmt: skip

    def name(self, index: int) -> str:
        """Returns "digit_scenes/<split>[<index>]".

        Args:
            index: number of the example.
        """
        return f"digit_scenes/{self._split}[{index}]"

    def _draw(self, index):
        """Image, label, digits and the ink of each."""
        draws, hard, size = drawing.Draws(self._seed, self._stream, self._begin + index), self._difficulty, self._size
        noise = draws.bytes(size, size, 3)
        label, digits = self._layouts.draw(draws)
        base = draws.between(40, 40 + 140 * hard // 100)
        image = self._background(draws, base, hard)
        contrast = 170 - 70 * hard // 100
        sides = [side for side in (-1, 1) if 0 <= base + side * contrast <= 255] or [1 if base < 128 else -1]
        level = base + draws.sample(sides, 1)[0] * contrast
        tint, inks = 30 * hard // 100, []
        for d in digits:
            ink = drawing.resize(self._scans[d.scan], d.height, d.width)
            color = np.array([min(255, max(0, level + draws.between(-tint, tint))) for _ in range(3)], np.int32)
            _paint(image, d, (ink.astype(np.int32) >> 8)[..., None], color)
            inks.append(ink)
        if self._framed:
            self._frame(image, digits[0], level)
        if amplitude := 35 * hard // 100:
            image += ((noise.astype(np.int32) - 128) * amplitude) >> 7
        return np.clip(image, 0, 255).astype(np.uint8), label, digits, inks

    def _background(self, draws, base, hard):
        size = self._size

        def cut(bank):
            layer, y, x = draws.below(_BANK), draws.below(size + 1), draws.below(size + 1)
            return bank[layer, y : y + size, x : x + size].astype(np.int32)

        gray = base + ((cut(self._textures) * (8 + 37 * hard // 100) + cut(self._clutter) * (45 * hard // 100)) >> 7)
        tint = 20 * hard // 100
        return gray[..., None] + np.array([draws.between(-tint, tint) for _ in range(3)], np.int32)

    def _frame(self, image, digit, level):
        """Marks a digit by a line around it."""
        top, left = max(0, digit.top - 1), max(0, digit.left - 1)
        bottom, right = min(self._size, digit.top + digit.height + 1), min(self._size, digit.left + digit.width + 1)
        image[[top, bottom - 1], left:right] = level
        image[top:bottom, [left, right - 1]] = level


class SceneObjects:
    """Digit scenes as a source for detection: the records of `halonet_jax.data.annotations`.

    Args:
        scenes: what to draw.

    Attributes:
        class_names: by label.
    """

    def __init__(self, scenes: DigitScenes):
        self._scenes, self.class_names = scenes, scenes.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @functools.cached_property
    def annotations(self) -> annotations.Annotations:
        """The objects of all scenes, with which the split can be evaluated. The first use draws every scene."""
        return annotations.of_records(map(self.__getitem__, range(len(self))), self.class_names)

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._scenes.scene(index), "index": index}

    def name(self, index: int) -> str:
        """Returns the name of a scene.

        Args:
            index: number of the scene.
        """
        return self._scenes.name(index)


def _paint(image, digit, ink, color):
    place = image[digit.top : digit.top + digit.height, digit.left : digit.left + digit.width]
    place += ((color - place) * ink) >> 8


def _box(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
