"""Results as text, JSON and CSV, each written as soon as it is there."""

import csv
import json
from typing import Any, Protocol, TextIO

from halonet_jax.predicting.results import Detections, Prediction

FORMATS = ("text", "json", "csv")


class Layout(Protocol):
    """How results of one kind look.

    Attributes:
        columns: of CSV.
    """

    columns: list[str]

    def lines(self, result: Any) -> list[str]:
        """Returns a result as text."""
        ...

    def record(self, result: Any) -> dict[str, Any]:
        """Returns a result as JSON values."""
        ...

    def rows(self, result: Any) -> list[list[Any]]:
        """Returns a result as rows of CSV."""
        ...


class ClassLayout:
    """Of predictions of classes: in CSV, one row per image.

    Args:
        top: classes per image.
        attention: whether there are attention pictures.
    """

    def __init__(self, top: int, attention: bool):
        self._attention = attention
        columns = [f"{name}{n}" for n in range(1, top + 1) for name in ("class", "probability")]
        self.columns = ["file", *columns, *["attention"] * attention]

    def lines(self, result: Prediction) -> list[str]:
        """Returns the file, then one line per class."""
        width = max(len(name) for name, _ in result.classes)
        return [result.file, *(f"  {p:7.2%}  {name:{width}}".rstrip() for name, p in result.classes)]

    def record(self, result: Prediction) -> dict[str, Any]:
        """Returns file and classes."""
        classes = [{"class": name, "probability": p} for name, p in result.classes]
        return {"file": result.file, "classes": classes} | ({"attention": result.attention} if self._attention else {})

    def rows(self, result: Prediction) -> list[list[Any]]:
        """Returns one row."""
        values = [x for name, p in result.classes for x in (name, f"{p:.6g}")]
        return [[result.file, *values, *[result.attention] * self._attention]]


class DetectionLayout:
    """Of detections: in CSV, one row per object.

    Args:
        min_score: for the text where there is nothing.
        pictures: whether there are pictures.
    """

    def __init__(self, min_score: float, pictures: bool):
        self._min_score, self._pictures = min_score, pictures
        self.columns = ["file", "class", "score", "x", "y", "width", "height", *["picture"] * pictures]

    def lines(self, result: Detections) -> list[str]:
        """Returns file and size, then one line per object."""
        head = f"{result.file} ({result.width} × {result.height})"
        if not result.objects:
            return [head, f"  nothing with a score of {self._min_score:g} or more"]
        width = max(len(each.name) for each in result.objects)
        numbers = [[f"{x:.1f}" for x in each.box] for each in result.objects]
        widths = [max(map(len, column)) for column in zip(*numbers)]
        boxes = [
            ", ".join(f"{name} {x:>{w}}" for name, x, w in zip(("x", "y", "width", "height"), box, widths)) for box in numbers
        ]
        return [head, *(f"  {each.score:.3f}  {each.name:{width}}  {box}" for each, box in zip(result.objects, boxes))]

    def record(self, result: Detections) -> dict[str, Any]:
        """Returns file, size and objects; boxes and masks as COCO's results have them."""
        objects = [{"class": x.name, "score": x.score, "box": list(x.box), "mask": x.mask} for x in result.objects]
        record = {"file": result.file, "height": result.height, "width": result.width, "detections": objects}
        return record | ({"picture": result.picture} if self._pictures else {})

    def rows(self, result: Detections) -> list[list[Any]]:
        """Returns a row for each object."""
        return [
            [result.file, x.name, f"{x.score:.6g}", *(f"{number:.6g}" for number in x.box), *[result.picture] * self._pictures]
            for x in result.objects
        ]


class Writer:
    """Writes results in a format.

    Args:
        file: where they go.
        file_format: one of `FORMATS`.
        layout: of the kind of results.
    """

    def __init__(self, file: TextIO, file_format: str, layout: Layout):
        self._file, self._format, self._layout, self._first = file, file_format, layout, True
        if file_format == "csv":
            self._csv = csv.writer(file, lineterminator="\n")
            self._csv.writerow(layout.columns)

    def add(self, result: Any) -> None:
        """Writes one result.

        Args:
            result: without `error`.
        """
        if self._format == "text":
            print("\n".join(self._layout.lines(result)), file=self._file)
        elif self._format == "json":
            record = json.dumps(self._layout.record(result), ensure_ascii=False)
            print("[" if self._first else ",", record, sep="\n", end="", file=self._file)
        else:
            self._csv.writerows(self._layout.rows(result))
        self._first = False

    def close(self) -> None:
        """Writes what ends the result."""
        if self._format == "json":
            print("[]" if self._first else "\n]", file=self._file)
        self._file.flush()
