"""Labelled images as files in folders."""

import os
from typing import Any

import numpy as np

from halonet_jax.errors import DataError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class FolderSource:
    """Images as `root/<split>/<class>/*.jpg` (the torchvision layout); files are read when asked for.

    The classes are the sorted folder names of the train split, whichever split is opened, so that a label
    means the same in both. Files below a class folder count too; those of other extensions are passed over.

    Args:
        root: folder that holds the splits.
        split: folder to open.
        train_split: folder that defines the classes.
        flag: the config field that named `split`, for the error message.
    """

    def __init__(self, root: str, split: str, train_split: str, flag: str = "eval_split"):
        root = os.path.expanduser(root)  # "--config.data.dir=~/images": no shell expands that
        if not os.path.isdir(root):
            raise DataError(f"data.dir {root!r} is no folder; set --config.data.dir to the one that holds the splits")
        self._folder = _split_folder(root, split, flag)
        train_folder = _split_folder(root, train_split, "train_split")
        self.class_names = tuple(_subfolders(train_folder))
        if not self.class_names:
            raise DataError(f"{train_folder} has no class folders; images belong in {train_folder}/<class>/")
        unknown = [c for c in _subfolders(self._folder) if c not in self.class_names]
        if unknown:
            raise DataError(
                f"{self._folder} has class folders that {train_folder} lacks: {', '.join(unknown[:5])}"
                f"{', ...' if len(unknown) > 5 else ''}; rename or remove them"
            )
        self._files, labels = [], []
        for label, class_name in enumerate(self.class_names):
            files = _image_files(self._folder, class_name)
            if not files and split == train_split:
                raise DataError(
                    f"{os.path.join(self._folder, class_name)} holds no image; every class of the train split needs"
                    f" one ({', '.join(IMAGE_EXTENSIONS)}): add images or remove the folder"
                )
            self._files += files
            labels += [label] * len(files)
        self._labels = np.asarray(labels, np.int32)
        if not self._files:
            raise DataError(f"{self._folder} holds no image ({', '.join(IMAGE_EXTENSIONS)}); add some")

    def __len__(self) -> int:
        return len(self._files)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with open(self.name(index), "rb") as f:
            return {"image": f.read(), "label": int(self._labels[index])}

    def name(self, index: int) -> str:
        return os.path.join(self._folder, self._files[index])


def _subfolders(folder: str) -> list[str]:
    """Sorted; hidden folders (caches of editors and file managers) are no classes."""
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _image_files(split_folder: str, class_name: str) -> list[str]:
    """Sorted paths relative to the split's folder."""
    found = []
    for folder, _, files in os.walk(os.path.join(split_folder, class_name), followlinks=True):
        relative = os.path.relpath(folder, split_folder)
        # ".name": what some systems leave beside each copied file under the image's own extension.
        images = (f for f in files if f.lower().endswith(IMAGE_EXTENSIONS) and not f.startswith("."))
        found += [os.path.join(relative, f) for f in images]
    return sorted(found)


def _split_folder(root: str, split: str, flag: str) -> str:
    folder = os.path.join(root, split)
    if split and os.path.isdir(folder):
        return folder
    splits = _subfolders(root)
    if not splits:
        raise DataError(f"{root} has no split {split!r}, nor any other; images belong in {root}/{split}/<class>/")
    usual = ("train",) if flag == "train_split" else ("validation", "val", "valid", "test")
    best = next((s for s in usual if s in splits), splits[0])
    raise DataError(f"{root} has no split {split!r}; its splits are {', '.join(splits)}: set --config.data.{flag}={best}")
