"""Opens the configured data set: TFDS array_record files, an image folder, or the embedded digits."""

import numpy as np

from halonet_jax.data.example import Example, Source
from halonet_jax.data.folder import FolderSource
from halonet_jax.data.tfds import TfdsSource
from halonet_jax.errors import DataError

SOURCES = ("tfds", "folder", "digits")

# One fixed split of scikit-learn's 1,797 scans: a fifth held out, classes in proportion.
_DIGITS_TEST_SIZE = 360
_DIGITS_SPLIT_SEED = 0


def open_source(data_config, split: str) -> Source:
    """Opens one split of the configured data set; nothing is ever downloaded.

    Args:
        data_config: the config's `data` block; `source`, `name`, `dir`, `train_split` and `eval_split` are read.
        split: "train", "validation", ...; with TFDS also a slice such as "train[:90%]".

    Raises:
        DataError: if the data set, the split or a class folder is missing, empty or of the wrong kind.
    """
    if data_config.source == "digits":
        return DigitsSource(split)
    if data_config.source == "folder":
        flag = "train_split" if split == data_config.train_split else "eval_split"
        return FolderSource(data_config.dir, split, data_config.train_split, flag)
    if data_config.source == "tfds":
        return TfdsSource(data_config.name, data_config.dir, split)
    raise DataError(f"data.source {data_config.source!r} is unknown; use one of {', '.join(SOURCES)}")


class DigitsSource:
    """scikit-learn's handwritten digits: uint8 [8, 8, 3], splits "train" (1,437) and "test" (360).

    The scans ship with scikit-learn. The split is stratified and fixed: it is the same on every machine.
    """

    def __init__(self, split: str):
        from sklearn import datasets, model_selection

        digits = datasets.load_digits()
        train, test = model_selection.train_test_split(
            np.arange(len(digits.target)),
            test_size=_DIGITS_TEST_SIZE,
            random_state=_DIGITS_SPLIT_SEED,
            stratify=digits.target,
        )
        splits = {"train": train, "test": test}
        if split not in splits:
            raise DataError(f"digits has no split {split!r}; its splits are {', '.join(splits)}")
        rows = np.sort(splits[split])
        gray = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)  # [n, 8, 8], scanned as 0..16
        self._images = np.repeat(gray[..., None], 3, axis=-1)
        self._labels = digits.target[rows]
        self._split = split
        self.class_names = tuple(str(c) for c in digits.target_names)
        self.num_classes = len(self.class_names)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], int(self._labels[index]), self.name(index))

    def name(self, index: int) -> str:
        return f"digits/{self._split}[{index}]"
