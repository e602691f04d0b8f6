"""Labelled images as files in folders."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging

from halonet_jax.data import folder_advice
from halonet_jax.data.folder_walk import IMAGE_EXTENSIONS, Walk, class_folders
from halonet_jax.errors import CorruptImage, DataError


class FolderSource:
    """Images as `root/<split>/<class>/*.jpg` (the torchvision layout); files are read when asked for.

    The classes are the sorted folder names of the train split, whichever split is opened, so that a label means the
    same in both. Files below a class folder count too. Files of other extensions and what tools leave behind are
    passed over (see `folder_walk`).

    Args:
        root: folder that holds the splits; "~" is expanded.
        split: folder to open.
        train_split: folder that defines the classes.
        role: the field of the config's `data` block that named `split`: "train_split" or "eval_split".
        class_names: the classes that labels must mean, in the order of the labels. The train split may then be absent.
            None: the classes of the train split.
        flag: spells the command-line flag that sets a config key, for remedies; "" where the entry has none.

    Attributes:
        class_names: the folder names, in the order of the labels.

    Raises:
        DataError: if a folder is missing, unreadable or holds no image, or if the classes of the splits, or those of
            the data and `class_names`, differ.
    """

    def __init__(
        self,
        root: str,
        split: str,
        train_split: str,
        role: str = "eval_split",
        *,
        class_names: Sequence[str] | None = None,
        flag: Callable[[str], str] = "--config.{}".format,
    ):
        root = os.path.expanduser(root)  # "--config.data.dir=~/images": no shell expands that
        if not os.path.isdir(root):
            raise DataError(folder_advice.no_root(root, flag))
        self._folder = _split_folder(root, split, role, flag)
        if class_names is None:
            train_folder = _split_folder(root, train_split, "train_split", flag)
            self.class_names = tuple(class_folders(train_folder))
            if not self.class_names:
                raise DataError(folder_advice.no_classes(train_folder))
        else:
            self.class_names = tuple(class_names)
            train_folder = os.path.join(root, train_split)
            if train_split and os.path.isdir(train_folder):
                _check_classes(train_folder, self.class_names, flag, all_of_them=True)
        present = class_folders(self._folder)
        if not present:
            raise DataError(folder_advice.no_classes(self._folder))
        if class_names is not None:
            _check_classes(self._folder, self.class_names, flag, all_of_them=False)
        elif unknown := [c for c in present if c not in self.class_names]:
            raise DataError(
                f"{self._folder} has class folders that {train_folder} lacks: {_some(unknown)}; every class needs images in"
                " the train split: add them there, or rename or remove these folders"
            )
        self._files, self._labels = self._find(present, needs_all=class_names is None and split == train_split)

    def _find(self, present, needs_all):
        walk = Walk(self._folder, present)
        files, labels = [], []
        for label, class_name in enumerate(self.class_names):
            found = walk.files.get(class_name, ())
            if not found and needs_all:
                raise DataError(
                    f"{os.path.join(self._folder, class_name)} holds no image; every class of the train split needs one"
                    f" ({', '.join(IMAGE_EXTENSIONS)}): add images or remove the folder"
                )
            files += found
            labels += [label] * len(found)
        if not files:
            raise DataError(
                f"no class folder of {self._folder} holds an image ({', '.join(IMAGE_EXTENSIONS)}); add images, or choose"
                " another split"
            )
        if walk.passed_over:
            message = "Passed over links in %s to what is counted already or contains them: %s"
            logging.info(message, self._folder, _some(walk.passed_over))
        return files, np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self._files)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.name(index)
        try:
            with open(path, "rb") as f:
                return {"image": f.read(), "label": int(self._labels[index])}
        except FileNotFoundError:
            if os.path.islink(path):
                raise CorruptImage(f"a link to {os.readlink(path)!r}, which does not exist") from None
            raise

    def name(self, index: int) -> str:
        """Returns the path of an image's file.

        Args:
            index: number of the image.
        """
        return os.path.join(self._folder, self._files[index])


def _split_folder(root, split, role, flag):
    folder = os.path.join(root, split)
    if split and os.path.isdir(folder):
        return folder
    raise DataError(folder_advice.no_split(root, split, role, flag))


def _check_classes(folder, class_names, flag, all_of_them):
    """Raises DataError where the class folders are not those of `class_names`, or not among them."""
    present = class_folders(folder)
    extra, absent = sorted(set(present) - set(class_names)), sorted(set(class_names) - set(present))
    if not extra and not (absent and all_of_them and present):
        return
    differences = [f"{folder} has {_some(extra)}"] * bool(extra) + [f"{folder} lacks {_some(absent)}"] * bool(absent)
    remedy = f"set {flag('data.dir')} to data of the same classes" if flag("data.dir") else "use data of the same classes"
    raise DataError(
        f"the labels must mean the {len(class_names)} classes {_some(class_names)}, and {' and '.join(differences)}; {remedy}"
    )


def _some(names):
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
