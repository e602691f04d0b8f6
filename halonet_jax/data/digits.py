"""scikit-learn's handwritten digits, which need no download."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from halonet_jax.data import subsets
from halonet_jax.errors import DataError

CLASSES = tuple("0123456789")
# One fixed split of scikit-learn's 1,797 scans: a fifth held out, classes in proportion.
_TEST_SIZE = 360
_SPLIT_SEED = 0


def scans(
    split: str, role: str = "eval_split", *, flag: Callable[[str], str] = "--config.{}".format, source: str = "digits"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the scans of one split. The split is stratified and fixed: it is the same on every machine.

    Args:
        split: "train" (1,437 scans) or "test" (360).
        role: the field of the config's `data` block that named `split`: "train_split" or "eval_split".
        flag: spells the command-line flag that sets a config key, for remedies; "" where the entry has none.
        source: what the message calls the data.

    Returns:
        The scans, uint8 [n, 8, 8], ink from 0 to 16; their digits, int64 [n]; their rows among all 1,797, int64 [n].

    Raises:
        DataError: for another split; the message lists the two.
    """
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    train, test = model_selection.train_test_split(
        np.arange(len(digits.target)), test_size=_TEST_SIZE, random_state=_SPLIT_SEED, stratify=digits.target
    )
    splits = {"train": train, "test": test}
    if split not in splits:
        setting, best = flag(f"data.{role}") or f"data.{role}", "train" if role == "train_split" else "test"
        raise DataError(f"{source} has no split {split!r}; its splits are {', '.join(splits)}: set {setting}={best}")
    rows = np.sort(splits[split])
    return digits.images[rows].astype(np.uint8), digits.target[rows], rows


class DigitsSource:
    """Digits: `image` uint8 [8, 8, 3] and `label` int; splits "train" (1,437 images) and "test" (360).

    The scans ship with scikit-learn; `scans` splits them.

    Args:
        split: "train" or "test", or a slice of one, such as "train[:100]" (see `subsets.slice_rows`).
        role: as of `scans`.
        classes: the classes to keep, from "0" to "9"; empty: all. The slice is of their examples alone.
        flag: as of `scans`.

    Attributes:
        class_names: "0" to "9", or those that were kept, rising.

    Raises:
        DataError: for another split or class, or an impossible slice.
    """

    def __init__(
        self,
        split: str,
        role: str = "eval_split",
        *,
        classes: Sequence[str] = (),
        flag: Callable[[str], str] = "--config.{}".format,
    ):
        ink, digits, _ = scans(subsets.split_name(split), role, flag=flag)
        self.class_names = subsets.keep_classes(CLASSES, classes, "digits")
        labels = np.array([self.class_names.index(c) if c in self.class_names else -1 for c in CLASSES])[digits]
        rows = np.flatnonzero(labels >= 0)
        rows = rows[subsets.slice_rows(labels[rows], split, subsets.flag_of(flag, role))]
        gray = np.round(ink[rows] * (255 / 16)).astype(np.uint8)
        self._images = np.repeat(gray[..., None], 3, axis=-1)
        self._labels = labels[rows]
        self._split = split

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": int(self._labels[index])}

    def name(self, index: int) -> str:
        """Returns "digits/<split>[<index>]".

        Args:
            index: number of the image.
        """
        return f"digits/{self._split}[{index}]"
