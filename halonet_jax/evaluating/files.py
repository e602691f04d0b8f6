"""The files that an evaluation writes, and their names."""

import csv
import io
import json
import re
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from halonet_jax.errors import ConfigError
from halonet_jax.evaluating.subject import Subject
from halonet_jax.runtime import confusion_picture

_DATA = ("source", "name", "dir", "label_key")


def about_data(subject: Subject) -> dict[str, str]:
    """Returns what names the data of a pass: source, name, dir and label_key.

    Args:
        subject: gives the config.
    """
    return {key: subject.config.data[key] for key in _DATA}


def stem(subject: Subject, what: str, ending: str = "") -> str:
    """Returns the name of a result's files, less what follows: `[<model>_<format>_]eval_<what>_<step>[_ema]<ending>`.

    Args:
        subject: the model.
        what: the split, or the suite.
        ending: what else tells results apart.
    """
    average = "_ema" if subject.weights == "ema" else ""
    name = f"eval_{re.sub('[^a-zA-Z0-9_-]+', '_', what)}_{subject.step}{average}{ending}"
    return f"{subject.name}_{name}" if subject.name else name


def data_ending(subject: Subject) -> str:
    """Returns a checksum of the data where it is not that of training, for `stem`; otherwise "".

    Args:
        subject: gives the config.
    """
    data = about_data(subject)
    same = data == {key: subject.trained_on[key] for key in data}
    return "" if same else f"_{zlib.crc32(json.dumps(data).encode()):08x}"


def write(subject: Subject, contents: dict[str, str], result: dict[str, Any]) -> None:
    """Writes files into the folder of results; only process 0 does.

    Args:
        subject: gives the folder.
        contents: text by file name.
        result: for the message where they cannot be written.

    Raises:
        ConfigError: the folder cannot be written.
    """
    if jax.process_index():
        return
    try:
        subject.folder.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            (subject.folder / name).write_text(text)
    except OSError as error:
        raise ConfigError(
            f"{subject.folder} cannot be written ({error}); give another --out; the result is {result}"
        ) from None  # fmt: skip


def by_class(class_names: Sequence[str], confusion: np.ndarray) -> dict[str, str]:
    """Returns two CSV files by the ending of their names: each class's accuracy, and the confusion matrix.

    Args:
        class_names: in the order of the labels.
        confusion: int `[label, predicted]`.
    """
    counts, correct = confusion.sum(1).tolist(), confusion.diagonal().tolist()
    rows = [("class", "count", "correct", "accuracy")]
    rows += [(name, n, k, k / n if n else "") for name, n, k in zip(class_names, counts, correct)]
    matrix = [("label \\ predicted", *class_names)]
    matrix += [(name, *row) for name, row in zip(class_names, confusion.tolist())]
    return {"_per_class.csv": _csv(rows), "_confusion.csv": _csv(matrix)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns rows as CSV, with their keys for a header. A share below 0 stands for none, and its cell is empty.

    Args:
        rows: at least one; all have the same keys.
    """
    show = lambda value: "" if isinstance(value, float) and value < 0 else value
    return _csv([rows[0].keys(), *([show(value) for value in row.values()] for row in rows)])


def draw(subject: Subject, name: str, class_names: Sequence[str], confusion: np.ndarray, title: str) -> epath.Path | None:
    """Draws the confusion matrix and returns the picture's path, None where it could not be drawn; only process 0 draws.

    Args:
        subject: gives the folder.
        name: of the PNG.
        class_names: in the order of the labels.
        confusion: int `[label, predicted]`.
        title: of the picture.
    """
    path = subject.folder / name
    if jax.process_index() == 0:
        try:
            confusion_picture.draw(confusion, class_names, title, path)
        except Exception as error:  # the figures are worth more than a picture, whatever is wrong with fonts or caches
            logging.warning("No picture of the confusion matrix: %s", " ".join(str(error).split()) or type(error).__name__)
            return None
    return path


def _csv(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
