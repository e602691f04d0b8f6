"""Labelled images as files in folders."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging

from halonet_jax.data import folder_advice, subsets
from halonet_jax.data.folder_walk import IMAGE_EXTENSIONS, Walk, class_folders
from halonet_jax.errors import CorruptImage, DataError


class FolderSource:
    """Images as `root/<split>/<class>/*.jpg` (the torchvision layout); files are read when asked for.

    The classes are the sorted folder names of the train split, whichever split is opened, so that a label means the
    same in both. Files below a class folder count too. Files of other extensions and what tools leave behind are
    passed over (see `folder_walk`).

    Args:
        root: folder that holds the splits; "~" is expanded.
        split: folder to open, or a slice of one, such as "train[:10%]" (see `subsets.slice_rows`).
        train_split: folder that defines the classes; of a slice, the folder.
        role: the field of the config's `data` block that named `split`: "train_split" or "eval_split".
        class_names: the classes that labels must mean, in the order of the labels. The train split may then be absent.
            None: the classes of the train split.
        classes: the classes to keep; empty: all. The folders of others are passed over. A slice is of what is kept.
        flag: spells the command-line flag that sets a config key, for remedies; "" where the entry has none.

    Attributes:
        class_names: the folder names, in the order of the labels.

    Raises:
        DataError: if a folder is missing, unreadable or holds no image, if the classes of the splits, or those of the
            data and `class_names`, differ, or for an unknown class or an impossible slice.
    """

    def __init__(
        self,
        root: str,
        split: str,
        train_split: str,
        role: str = "eval_split",
        *,
        class_names: Sequence[str] | None = None,
        classes: Sequence[str] = (),
        flag: Callable[[str], str] = "--config.{}".format,
    ):
        root = os.path.expanduser(root)  # "--config.data.dir=~/images": no shell expands that
        if not os.path.isdir(root):
            raise DataError(folder_advice.no_root(root, flag))
        self._folder, train_folder = (_folder_of(root, name) for name in (split, train_split))
        if not split or not os.path.isdir(self._folder):
            raise DataError(folder_advice.no_split(root, split, role, flag))
        if class_names is None:
            if not train_split or not os.path.isdir(train_folder):
                raise DataError(folder_advice.no_split(root, train_split, "train_split", flag))
            found = class_folders(train_folder)
            if not found:
                raise DataError(folder_advice.no_classes(train_folder))
            self.class_names = subsets.keep_classes(found, classes, train_folder)
        else:
            self.class_names = tuple(class_names)
            if train_split and os.path.isdir(train_folder):
                _check_classes(train_folder, classes, self.class_names, flag, all_of_them=True)
        present = class_folders(self._folder)
        if not present:
            raise DataError(folder_advice.no_classes(self._folder))
        if class_names is not None:
            _check_classes(self._folder, classes, self.class_names, flag, all_of_them=False)
        elif unknown := [c for c in present if c not in found]:
            raise DataError(
                f"{self._folder} has class folders that {train_folder} lacks: {_some(unknown)}; every class needs images in"
                " the train split: add them there, or rename or remove these folders"
            )
        present = [c for c in present if c in self.class_names]
        self._files, self._labels = self._find(present, class_names is None and self._folder == train_folder)
        if not os.path.isdir(os.path.join(root, split)):  # a slice
            rows = subsets.slice_rows(self._labels, split, subsets.flag_of(flag, role))
            self._files, self._labels = [self._files[row] for row in rows], self._labels[rows]

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


def _folder_of(root, split):
    """The folder of a split or of a slice of one. A folder itself may be called "train[:1]", too."""
    named = os.path.join(root, split)
    return named if os.path.isdir(named) else os.path.join(root, subsets.split_name(split))


def _check_classes(folder, classes, class_names, flag, all_of_them):
    """Raises DataError where the class folders, or those of `classes`, are not those of `class_names`, or not among them."""
    present = [name for name in class_folders(folder) if name in classes or not classes]
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
