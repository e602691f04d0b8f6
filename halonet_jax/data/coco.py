"""Data sets of COCO's layout: images in folders, and a JSON file of their objects for each split."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from halonet_jax.data import coco_advice, coco_parsing
from halonet_jax.data.annotations import Annotations
from halonet_jax.errors import CorruptImage, DataError

ANNOTATIONS, IMAGES = "annotations/instances_{split}.json", "{split}"


class CocoSource:
    """Images with boxes and masks, as `root/<split>/*.jpg` and `root/annotations/instances_<split>.json`.

    The records are those of `annotations`. Labels run from 0 in the order of category ids, which may have gaps. Training
    leaves out crowds, and images without other objects. Images are read when asked for.

    Args:
        root: folder of the data set; "~" is expanded.
        split: such as "train2017".
        annotations: the JSON file, from `root`; "{split}" stands for the split.
        images: the folder of images, likewise. `file_name` in the JSON file continues it.
        training: whether the records are for training.
        on_corrupt: "skip" leaves out broken annotations and names them in a warning; "stop" raises.
        class_names: the classes that labels must mean, in their order; the file's categories are found in them by name.
            None: those of the train split's file, so that labels mean the same in all splits.
        train_split: "" where there is none; then the classes are the file's own.
        role: the field of the config's `data` block that named `split`: "train_split" or "eval_split".
        flag: spells the command-line flag that sets a config key, for remedies; "" where the entry has none.

    Attributes:
        class_names: by label.
        annotations: `Annotations` of the split, with which it can be evaluated.
        broken: pairs of a name and a reason for each entry of the file that was left out.

    Raises:
        DataError: a folder or file is missing or cannot be used, no image is left, the categories are not among
            `class_names`, or an annotation is broken and `on_corrupt` is "stop".
    """

    def __init__(
        self,
        root: str,
        split: str,
        *,
        annotations: str = ANNOTATIONS,
        images: str = IMAGES,
        training: bool = False,
        on_corrupt: str = "skip",
        class_names: Sequence[str] | None = None,
        train_split: str = "",
        role: str = "eval_split",
        flag: Callable[[str], str] = "--config.{}".format,
    ):
        root = os.path.expanduser(root)
        if not os.path.isdir(root):
            raise DataError(coco_advice.no_root(root, flag))
        self._path = os.path.join(root, annotations.replace("{split}", split))
        if not os.path.isfile(self._path):
            raise DataError(coco_advice.no_file(root, split, annotations, role, flag))
        self._split, self._folder = split, os.path.join(root, images.replace("{split}", split))
        self.annotations, self.broken = coco_parsing.read(self._path, training=training)
        if self.broken:
            self._report(on_corrupt, flag)
        if not len(self.annotations):
            what = "image with an object that is not a crowd" if training else "image"
            raise DataError(f"{self._path} has no usable {what}; choose another split or file")
        some = [self.annotations.file(i) for i in range(min(len(self.annotations), 100))]
        if not any(os.path.isfile(os.path.join(self._folder, file)) for file in some):
            raise DataError(coco_advice.no_images(root, self._folder, some, split, flag))
        train_path = os.path.join(root, annotations.replace("{split}", train_split))
        if class_names is None and train_split not in ("", split) and os.path.isfile(train_path):
            class_names = coco_parsing.class_names(train_path)
        if class_names is not None:
            _relabel(self.annotations, tuple(class_names), self._path, flag)
        self.class_names = self.annotations.class_names

    def _report(self, on_corrupt, flag):
        (name, reason), more = self.broken[0], len(self.broken) - 1
        if on_corrupt == "stop":
            others = f", and {more} more entries are broken" if more else ""
            advice = f", or go on without: {flag('data.on_corrupt')}=skip" if flag("data.on_corrupt") else ""
            raise DataError(f"{self._path}: {name}: {reason}{others}; mend the file{advice}")
        shown = "; ".join(f"{name}: {reason}" for name, reason in self.broken[:5]) + ("; ..." if more > 4 else "")
        logging.warning("Left out %d broken entries of %s: %s", len(self.broken), self._path, shown)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.name(index)
        try:
            with open(path, "rb") as f:
                return {"image": f.read(), **self.annotations.record(index)}
        except OSError as error:
            raise CorruptImage(f"it cannot be read ({error.strerror})") from None

    def name(self, index: int) -> str:
        """Returns the path of an image's file.

        Args:
            index: number of the image.
        """
        return os.path.join(self._folder, self.annotations.file(index))


def _relabel(annotations: Annotations, class_names, path, flag):
    """Makes labels mean `class_names`. Categories that the file lacks get ids of their own."""
    own = annotations.class_names
    if own == class_names:
        return
    ambiguous = len(set(own)) < len(own) or len(set(class_names)) < len(class_names)
    if ambiguous or (extra := sorted(set(own) - set(class_names))):
        differ = "which have a name twice" if ambiguous else f"and it has {', '.join(extra[:5])}{', ...' * (len(extra) > 5)}"
        remedy = f"set {flag('data.dir')} to data of the same classes" if flag("data.dir") else "use data of the same classes"
        raise DataError(f"the labels must mean {len(class_names)} classes, {path} has {len(own)}, {differ}; {remedy}")
    ids = dict(zip(own, annotations.category_ids.tolist()))
    free = iter(range(max(ids.values()) + 1, max(ids.values()) + 1 + len(class_names)))
    annotations.relabel(class_names, [ids[name] if name in ids else next(free) for name in class_names])
