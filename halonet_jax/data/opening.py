"""Opens the configured data set: TFDS array_record files, an image folder, COCO's layout, digits, or scenes of them."""

from collections.abc import Callable, Sequence

from halonet_jax.data import subsets
from halonet_jax.data.coco import CocoSource
from halonet_jax.data.digits import DigitsSource
from halonet_jax.data.example import Source
from halonet_jax.data.folder import FolderSource
from halonet_jax.data.scenes import DigitScenes
from halonet_jax.data.tfds import TfdsSource
from halonet_jax.errors import DataError

SOURCES = ("tfds", "folder", "digits", "digit_scenes", "coco")


def open_source(
    data_config,
    split: str,
    *,
    class_names: Sequence[str] | None = None,
    multi_label: bool = False,
    flag: Callable[[str], str] = "--config.{}".format,
) -> Source:
    """Opens one split of the configured data set; nothing is ever downloaded.

    Args:
        data_config: the config's `data` block; what its source needs is read.
        split: "train", "validation", ..., or a slice such as "train[:90%]".
        class_names: the classes that labels must mean, such as those of a checkpoint. None: those of the data set
            itself. With them, an image folder does not need its train split.
        multi_label: whether an image may have any number of labels. Training needs one.
        flag: spells the command-line flag that sets a config key, for the remedies in messages:
            "data.dir" gives "--config.data.dir" in training.

    Returns:
        A source for `halonet_jax.data.ClassificationTransform`; of COCO's layout, for `DetectionTransform`.

    Raises:
        DataError: if the data set, the split or a class folder is missing, empty or of the wrong kind, if images have
            several labels and `multi_label` is False, or if the classes are not those of `class_names`.
    """
    class_names = tuple(class_names or ()) or None
    role = "train_split" if class_names is None and split == data_config.train_split else "eval_split"
    if data_config.source != "tfds" and data_config.label_key != "label":
        raise DataError(
            f"data.label_key={data_config.label_key!r} is for TFDS data sets, and data.source is {data_config.source!r}; leave"
            f" {flag('data.label_key') or 'data.label_key'} out"
        )
    classes = tuple(data_config.classes)
    if data_config.source == "folder":
        return FolderSource(
            data_config.dir, split, data_config.train_split, role, class_names=class_names, classes=classes, flag=flag
        )
    if data_config.source == "coco" and classes:
        raise DataError(
            f"data.classes={classes} does not work with data.source=coco; leave the other categories out of its JSON files, or set"
            " data.classes=()"
        )
    if data_config.source == "tfds" and classes:
        raise DataError(
            f"data.classes={classes} does not work with data.source=tfds, which has no index of labels; export the images of"
            " these classes to DIR/<split>/<class>/ and train with data.source=folder, or set data.classes=()"
        )
    if data_config.source == "coco":
        return CocoSource(
            data_config.dir, split, annotations=data_config.annotations, images=data_config.images,
            training=role == "train_split", on_corrupt=data_config.on_corrupt, class_names=class_names,
            train_split=data_config.train_split, role=role, flag=flag,
        )  # fmt: skip
    if data_config.source == "digits":
        source = DigitsSource(split, role, classes=classes, flag=flag)
    elif data_config.source == "digit_scenes":
        c = data_config
        source = DigitScenes(
            split, count=c.num_train_scenes if subsets.split_name(split) == "train" else c.num_eval_scenes, size=c.scene_size,
            label=c.scene_label, difficulty=c.scene_difficulty, classes=classes, role=role, flag=flag,
        )  # fmt: skip
    elif data_config.source == "tfds":
        source = TfdsSource(data_config.name, data_config.dir, split, role, data_config.label_key, flag=flag)
        if source.multi_label and not multi_label:
            setting, keys = flag("data.label_key") or "data.label_key", " or ".join(source.single_label_keys)
            raise DataError(
                f"data.label_key {data_config.label_key!r} of TFDS data set {data_config.name!r} holds several labels for an"
                f" image, and one is needed; {f'set {setting} to {keys}' if keys else 'choose another data set'}"
            )
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
