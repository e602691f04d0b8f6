"""Labelled images as TFDS array_record files. TFDS is imported when such a source is opened, TensorFlow not at all."""

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from halonet_jax.errors import CorruptImage, DataError

_REMOTE_PAUSES = (0.5, 2, 8)  # seconds between tries at a bucket that does not answer


class NotPrepared(DataError):
    """A set is known and not on disk.

    Args:
        message: the whole message.
        command: the shell command that prepares it; "" where a bucket must be filled.
        note: what must be there before; "" where nothing must.
    """

    def __init__(self, message: str, command: str = "", note: str = ""):
        super().__init__(message)
        self.command, self.note = command, note


class TfdsSource:
    """A prepared TFDS image-classification set in array_record files; images come as their encoded bytes.

    An example has `label`, an int; or `labels`, an int array, where the label feature is a sequence of classes.

    Args:
        name: TFDS name, with version or config where wanted: "imagenet2012", "imagenet2012:5.1.0".
        data_dir: TFDS data_dir, "~" is expanded; "": TFDS's own default.
        split: a TFDS split or slice of one.
        role: the field of the config's `data` block that named `split`: "train_split" or "eval_split".
        label_key: feature that holds the label: a ClassLabel, or a sequence of them.
        flag: spells the command-line flag that sets a config key, for remedies; "" where the entry has none.

    Attributes:
        class_names: those of the label feature, in the order of the labels.
        multi_label: whether an image may have any number of labels.
        single_label_keys: the set's features that are one class label.

    Raises:
        NotPrepared: if the set is known and not on disk.
        DataError: if TFDS is not installed, the set is unknown, without random access or without images and such a
            label, or if the split does not exist.
    """

    def __init__(
        self,
        name: str,
        data_dir: str,
        split: str,
        role: str = "eval_split",
        label_key: str = "label",
        *,
        flag: Callable[[str], str] = "--config.{}".format,
    ):
        data_dir = os.path.expanduser(data_dir or "")  # "--config.data.dir=~/tfds": no shell expands that
        self._arguments, self._label_key = (name, data_dir, split), label_key
        builder = _tfds_builder(name, data_dir, flag)
        features = builder.info.features
        labels = _label_features(features)
        if "image" not in features or not labels:
            raise DataError(
                f"TFDS data set {name!r} has the features {', '.join(features)}; an 'image' and a class label are"
                f" needed: choose an image-classification set with {_setting(flag, 'data.name')}"
            )
        if label_key not in labels:
            what = "is no class label" if label_key in features else "is no feature"
            raise DataError(
                f"data.label_key {label_key!r} {what} of TFDS data set {name!r}, whose features are {', '.join(features)};"
                f" set {_setting(flag, 'data.label_key')} to {' or '.join(labels)}"
            )
        self._records = _tfds_records(builder, split, role, flag)
        self.class_names, self.multi_label = labels[label_key]
        self.single_label_keys = [key for key, (_, multi_label) in labels.items() if not multi_label]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._read(index)
        image, label = record["image"], record[self._label_key]
        if image is None or label is None:  # what a truncated file gives
            raise CorruptImage("empty record")
        return {"image": image} | ({"labels": np.asarray(label)} if self.multi_label else {"label": int(label)})

    def _read(self, index):
        is_remote = "://" in (self._arguments[1] or "")
        for pause in (*_REMOTE_PAUSES, None) if is_remote else (None,):
            try:
                return self._records[index]
            except RuntimeError as e:  # a file that is gone, whose checksums don't hold, or a bucket that did not answer
                if pause is None:
                    raise CorruptImage(f"unreadable record: {e}") from None
                time.sleep(pause)

    def name(self, index: int) -> str:
        """Returns "<name>/<split>[<index>]".

        Args:
            index: number of the example.
        """
        name, _, split = self._arguments
        return f"{name}/{split}[{index}]"

    def __reduce__(self):
        # Open files do not travel to a worker process: it opens its own.
        return TfdsSource, (*self._arguments, "eval_split", self._label_key)


def _setting(flag, key):
    return flag(key) or key


def _label_features(features):
    """Class names, and whether an image has several labels, of each feature that is a class label."""
    import tensorflow_datasets as tfds

    found = {}
    for key, feature in features.items():
        multi_label = isinstance(feature, tfds.features.Sequence)
        names = getattr(feature.feature if multi_label else feature, "names", None)
        if names is not None:
            found[key] = tuple(names), multi_label
    return found


def _tfds_builder(name, data_dir, flag):
    """The builder of a set that is prepared on disk, or a DataError that says how to prepare it."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as e:
        raise DataError("data.source 'tfds' needs TFDS: pip install tensorflow-datasets") from e
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.registered.DatasetNotFoundError:
        # Its own message lists a thousand names.
        raise DataError(
            f"data.name {name!r} is neither a TFDS data set nor prepared in data.dir {data_dir or '(default)'!r}; set"
            f" {_setting(flag, 'data.name')} to a name listed at https://www.tensorflow.org/datasets/catalog/overview, or"
            f" {_setting(flag, 'data.dir')} to where it is prepared"
        ) from None
    except (AssertionError, ValueError) as e:
        raise DataError(
            f"TFDS cannot open data.name {name!r}: {str(e).splitlines()[0]}; correct {_setting(flag, 'data.name')}"
        ) from None
    if "tensorflow" in sys.modules:
        _keep_tensorflow_off_accelerators()
    if not builder.data_path.exists() or not builder.info.splits:
        root = os.fspath(builder.data_path).removesuffix(builder.info.full_name).rstrip("/")
        elsewhere = f"set {_setting(flag, 'data.dir')} to where it is, or "
        if "://" in root:
            raise NotPrepared(
                f"TFDS data set {name!r} is not prepared in {root}; {elsewhere}prepare it in a local folder, as array_record, and"
                f" copy that with\n  gcloud storage rsync --recursive FOLDER {root}\n(docs/tpu_pods.md goes through it)"
            )
        arguments = f"'{name}', data_dir='{root}', file_format='array_record'"
        command = f'python -c "import tensorflow_datasets as tfds; tfds.builder({arguments}).download_and_prepare()"'
        note = _manual_archives(name, root)
        raise NotPrepared(
            f"TFDS data set {name!r} is not prepared in {root}; {elsewhere}prepare it once with\n  {command}\n"
            f"(or tfds build {name} --file_format=array_record --data_dir={root}, where apache-beam is installed)"
            + (f"\n{note}" if note else ""),
            command,
            note,
        )
    return builder


def _manual_archives(name: str, root: str) -> str:
    if not name.startswith("imagenet2012"):
        return ""
    both = re.split("[/:]", name)[0] not in ("imagenet2012_real", "imagenet2012_corrupted")
    return (
        f"after putting {'ILSVRC2012_img_train.tar and ' * both}ILSVRC2012_img_val.tar, from https://image-net.org, into"
        f" {os.path.join(root, 'downloads', 'manual')}"
    )


def _tfds_records(builder, split, role, flag):
    import tensorflow_datasets as tfds

    base = re.split(r"[\[+]", split)[0]
    splits = list(builder.info.splits)
    if base not in splits and base != "all":
        usual = ("train",) if role == "train_split" else ("validation", "test", "val")
        best = next((name for name in usual if name in splits), splits[0])
        raise DataError(
            f"TFDS data set {builder.info.full_name} has no split {split!r}; its splits are"
            f" {', '.join(splits)}: set {_setting(flag, f'data.{role}')}={best}"
        )
    try:
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError:
        raise DataError(
            f"{builder.data_path} holds {builder.info.file_format.value} files, which have no random access;"
            " add array_record files beside them with\n  pip install apache-beam\n"
            f"  tfds convert_format --dataset_version_dir={builder.data_path} --out_file_format=array_record"
        ) from None
    except (ValueError, AssertionError) as e:
        raise DataError(
            f"data split {split!r} is no TFDS split ({e}); set {_setting(flag, f'data.{role}')} to one like 'train[:90%]'"
        ) from None


def _keep_tensorflow_off_accelerators():
    """TFDS may import TensorFlow, which would take all memory of a GPU that JAX needs."""
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # TensorFlow has started: whoever started it has chosen its devices
        tf.config.set_visible_devices([], "GPU")
