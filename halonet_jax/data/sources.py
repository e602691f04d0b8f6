"""Random access to labelled images: TFDS array_record files, an image folder, the embedded digits."""

import os
import re
import sys
from typing import NamedTuple, Protocol

import numpy as np

from halonet_jax.data.errors import CorruptImage, DataError

SOURCES = ("tfds", "folder", "digits")
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

# One fixed split of scikit-learn's 1,797 scans: a fifth held out, classes in proportion.
_DIGITS_TEST_SIZE = 360
_DIGITS_SPLIT_SEED = 0


class Example(NamedTuple):
    """One labelled image as it is stored."""

    image: bytes | np.ndarray  # an encoded file, or uint8 [h, w, 3]
    label: int
    name: str  # file path, or "imagenet2012/train[17]"


class Source(Protocol):
    """A picklable sequence of examples; reading one may raise OSError or CorruptImage."""

    num_classes: int
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def name(self, index: int) -> str:
        """The name of example `index`, without reading it."""
        ...


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
        self.num_classes = len(self.class_names)
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

    def __getitem__(self, index: int) -> Example:
        name = self.name(index)
        with open(name, "rb") as f:
            return Example(f.read(), int(self._labels[index]), name)

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
    raise DataError(
        f"{root} has no split {split!r}; its splits are {', '.join(splits)}: set --config.data.{flag}={best}"
    )


class TfdsSource:
    """A prepared TFDS image-classification set in array_record files; images come as their encoded bytes.

    Args:
        name: TFDS name, with version or config where wanted: "imagenet2012", "imagenet2012:5.1.0".
        data_dir: TFDS data_dir; "": TFDS's own default.
        split: a TFDS split or slice of one.
    """

    def __init__(self, name: str, data_dir: str, split: str):
        self._arguments = (name, data_dir, split)
        builder = _tfds_builder(name, data_dir)
        features = builder.info.features
        if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
            raise DataError(
                f"TFDS data set {name!r} has the features {', '.join(features)}; an 'image' and a class 'label' are"
                f" needed: choose an image-classification set with --config.data.name"
            )
        self._records = _tfds_records(builder, split)
        self.class_names = tuple(features["label"].names)
        self.num_classes = features["label"].num_classes

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self._records[index]
        except RuntimeError as e:  # a file that is gone, or whose checksums don't hold
            raise CorruptImage(f"unreadable record: {e}") from None
        if record["image"] is None or record["label"] is None:  # what a truncated file gives
            raise CorruptImage("empty record")
        return Example(record["image"], int(record["label"]), self.name(index))

    def name(self, index: int) -> str:
        name, _, split = self._arguments
        return f"{name}/{split}[{index}]"

    def __reduce__(self):
        # Open files do not travel to a worker process: it opens its own.
        return TfdsSource, self._arguments


def _tfds_builder(name: str, data_dir: str):
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
            f"data.name {name!r} is neither a TFDS data set nor prepared in data.dir {data_dir or '(default)'!r};"
            " names are listed at https://www.tensorflow.org/datasets/catalog/overview"
        ) from None
    except (AssertionError, ValueError) as e:
        raise DataError(f"TFDS cannot open data.name {name!r}: {str(e).splitlines()[0]}; correct the name") from None
    if "tensorflow" in sys.modules:
        _keep_tensorflow_off_accelerators()
    if not builder.data_path.exists() or not builder.info.splits:
        root = os.fspath(builder._data_dir_root) if hasattr(builder, "_data_dir_root") else data_dir
        arguments = f"'{name}', data_dir='{root}', file_format='array_record'"
        raise DataError(
            f"TFDS data set {name!r} is not prepared in {root}; prepare it once with\n"
            f'  python -c "import tensorflow_datasets as tfds; tfds.builder({arguments}).download_and_prepare()"\n'
            f"(or tfds build {name} --file_format=array_record --data_dir={root}, where apache-beam is installed)"
            + _manual_archives(name, root)
        )
    return builder


def _manual_archives(name: str, root: str) -> str:
    if not name.startswith("imagenet2012"):
        return ""
    return (
        f"\nafter putting ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, from https://image-net.org, into"
        f" {os.path.join(root, 'downloads', 'manual')}"
    )


def _tfds_records(builder, split: str):
    import tensorflow_datasets as tfds

    base = re.split(r"[\[+]", split)[0]
    if base not in builder.info.splits and base != "all":
        raise DataError(
            f"TFDS data set {builder.info.full_name} has no split {split!r}; its splits are"
            f" {', '.join(builder.info.splits)}: set --config.data.train_split or --config.data.eval_split"
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
        raise DataError(f"data split {split!r} is no TFDS split ({e}); write it like 'train[:90%]'") from None


def _keep_tensorflow_off_accelerators():
    """TFDS may import TensorFlow, which would take all memory of a GPU that JAX needs."""
    import tensorflow as tf

    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:
        pass  # TensorFlow has started; whoever started it has chosen its devices
