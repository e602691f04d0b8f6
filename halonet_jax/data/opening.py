"""Opens the configured data set: TFDS array_record files, an image folder, scikit-learn's digits, or COCO's layout."""

from collections.abc import Callable, Sequence

from halonet_jax.data.coco import CocoSource
from halonet_jax.data.digits import DigitsSource
from halonet_jax.data.example import Source
from halonet_jax.data.folder import FolderSource
from halonet_jax.data.tfds import TfdsSource
from halonet_jax.errors import DataError

SOURCES = ("tfds", "folder", "digits", "coco")


def open_source(
    data_config,
    split: str,
    *,
    class_names: Sequence[str] | None = None,
    flag: Callable[[str], str] = "--config.{}".format,
) -> Source:
    """Opens one split of the configured data set; nothing is ever downloaded.

    Args:
        data_config: the config's `data` block; `source`, `name`, `dir` and `train_split` are read, for COCO's layout
            also `annotations`, `images` and `on_corrupt`.
        split: "train", "validation", ...; with TFDS also a slice such as "train[:90%]".
        class_names: the classes that labels must mean, such as those of a checkpoint. None: those of the data set
            itself. With them, an image folder does not need its train split.
        flag: spells the command-line flag that sets a config key, for the remedies in messages:
            "data.dir" gives "--config.data.dir" in training.

    Returns:
        A source for `halonet_jax.data.ClassificationTransform`; of COCO's layout, for `DetectionTransform`.

    Raises:
        DataError: if the data set, the split or a class folder is missing, empty or of the wrong kind, or if the
            classes are not those of `class_names`.
    """
    class_names = tuple(class_names or ()) or None
    role = "train_split" if class_names is None and split == data_config.train_split else "eval_split"
    if data_config.source == "folder":
        return FolderSource(data_config.dir, split, data_config.train_split, role, class_names=class_names, flag=flag)
    if data_config.source == "coco":
        return CocoSource(
            data_config.dir, split, annotations=data_config.annotations, images=data_config.images,
            training=role == "train_split", on_corrupt=data_config.on_corrupt, class_names=class_names,
            train_split=data_config.train_split, role=role, flag=flag,
        )  # fmt: skip
    if data_config.source == "digits":
        source = DigitsSource(split, role, flag=flag)
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
