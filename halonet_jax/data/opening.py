"""Opens the configured data set: TFDS array_record files, an image folder, or scikit-learn's digits."""

from collections.abc import Callable, Sequence

from halonet_jax.data.digits import DigitsSource
from halonet_jax.data.example import Source
from halonet_jax.data.folder import FolderSource
from halonet_jax.data.tfds import TfdsSource
from halonet_jax.errors import DataError

SOURCES = ("tfds", "folder", "digits")


def open_source(
    data_config,
    split: str,
    *,
    class_names: Sequence[str] | None = None,
    flag: Callable[[str], str] = "--config.{}".format,
) -> Source:
    """Opens one split of the configured data set; nothing is ever downloaded.

    Args:
        data_config: the config's `data` block; `source`, `name`, `dir`, `train_split` and `classes` are
            read.
        split: "train", "validation", ..., or a slice such as "train[:90%]".
        class_names: the classes that labels must mean, such as those of a checkpoint. None: those of the data set
            itself. With them, an image folder does not need its train split.
        flag: spells the command-line flag that sets a config key, for the remedies in messages:
            "data.dir" gives "--config.data.dir" in training.

    Returns:
        A source for `halonet_jax.data.ClassificationTransform`.

    Raises:
        DataError: if the data set, the split or a class folder is missing, empty or of the wrong kind, or if the
            classes are not those of `class_names`.
    """
    class_names = tuple(class_names or ()) or None
    role = "train_split" if class_names is None and split == data_config.train_split else "eval_split"
    classes = tuple(data_config.classes)
    if data_config.source == "folder":
        return FolderSource(
            data_config.dir, split, data_config.train_split, role, class_names=class_names, classes=classes, flag=flag
        )
    if data_config.source == "tfds" and classes:
        raise DataError(
            f"data.classes={classes} does not work with data.source=tfds, which has no index of labels; export the images of"
            " these classes to DIR/<split>/<class>/ and train with data.source=folder, or set data.classes=()"
        )
    if data_config.source == "digits":
        source = DigitsSource(split, role, classes=classes, flag=flag)
    elif data_config.source == "tfds":
        source = TfdsSource(data_config.name, data_config.dir, split, role, flag=flag)
    else:
        raise DataError(f"data.source {data_config.source!r} is unknown; use one of {', '.join(SOURCES)}")
    if class_names is not None and source.class_names != class_names:
        changed = sorted(set(source.class_names) ^ set(class_names)) or ["their order"]
        flags = [flag(key) for key in ("data.dir", "data.name") if data_config.source == "tfds" and flag(key)]
        remedy = f", by {' or '.join(flags)}" if flags else ""
        raise DataError(
            f"the labels must mean {len(class_names)} classes, {source.name(0).split('[')[0]} has {len(source.class_names)}, and"
            f" they differ in {', '.join(changed[:5])}; choose data of the same classes{remedy}"
        )
    return source
