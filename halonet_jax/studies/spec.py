"""What a study file says: rows, seeds and a plot. Loads such a file and checks it."""

import dataclasses
import difflib
import importlib.util
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halonet_jax.errors import ConfigError

# Scale: what follows a recipe's file name.
SUFFIXES = {"tiny": ":tiny", "small": ":small", "imagenet": ""}
AXES = ("parameters", "multiply_adds", "images_per_second")


@dataclasses.dataclass(frozen=True)
class Plot:
    """The picture of a study.

    Attributes:
        kind: "bar": one line for each row; "scatter": the score over `x`.
        x: of a scatter, one of `AXES`.
        log_x: whether that axis is logarithmic.
        front: whether to draw the line through the rows that no other row beats in both.
    """

    kind: str = "bar"
    x: str = "parameters"
    log_x: bool = False
    front: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """One recipe of a study, run once for each seed.

    Attributes:
        label: its name in tables and pictures.
        recipe: file, such as "configs/h1.py".
        overrides: config values by key, such as `{"model.block_size": 4}`.
        published: the paper's top-1, in percent; None: it states none.
        source: where the paper states it, in words.
        published_speed: the paper's relative time or speed, as a text or a number.
        tiny: in place of `overrides` at that scale; None: `overrides`.
        small: likewise.
        recipes: another recipe file by scale.
        after: label of the row whose weights this one starts from, those of the same seed; "": random weights.
        counts: False: it is run and listed, but not compared. For pre-training.
        group: rows of a group share a marker in the picture.
        scales: those at which the row is part of the study.
    """

    label: str
    recipe: str = ""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    published: float | None = None
    source: str = ""
    published_speed: str | float | None = None
    tiny: Mapping[str, Any] | None = None
    small: Mapping[str, Any] | None = None
    recipes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    after: str = ""
    counts: bool = True
    group: str = ""
    scales: Sequence[str] = tuple(SUFFIXES)

    @property
    def slug(self) -> str:
        """Name of the row's folder."""
        return re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-.")


@dataclasses.dataclass(frozen=True)
class Study:
    """A question, and the rows that answer it.

    Attributes:
        title: of the report.
        question: one sentence.
        finding: what the paper found, and where.
        rows: the recipes to compare.
        seeds: each row runs once for each.
        plot: of the scores.
        tiny: config values at that scale, for all rows. A row's own go first.
        small: likewise.
        baseline: label of the row to compare the others with; "": the first row that counts.
        metric: the score, as reports name it after "eval/". A fraction.
    """

    title: str
    question: str = ""
    finding: str = ""
    rows: Sequence[Row] = ()
    seeds: Sequence[int] = (0, 1, 2)
    plot: Plot = Plot()
    tiny: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    small: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    baseline: str = ""
    metric: str = "top1"

    def at(self, scale: str) -> "Study":
        """Returns the study with the rows of a scale.

        Args:
            scale: a key of `SUFFIXES`.

        Raises:
            ConfigError: it has none that counts, or one of them needs a row of other scales.
        """
        rows = tuple(row for row in self.rows if scale in row.scales)
        labels = {row.label for row in rows}
        if not any(row.counts for row in rows):
            raise ConfigError(f"--scale={scale}: the study has no row to compare at this scale; give another --scale")
        for what, label in [("baseline", self.baseline), *((f"after of {row.label!r}", row.after) for row in rows)]:
            if label and label not in labels:
                raise ConfigError(f"--scale={scale}: {what} is {label!r}, which has not this scale; add it to its scales")
        return dataclasses.replace(self, rows=rows)

    def row(self, label: str) -> Row:
        """Returns the row of a label.

        Args:
            label: a row's.
        """
        return next(row for row in self.rows if row.label == label)

    @property
    def base(self) -> Row | None:
        """The row that the others are compared with."""
        return self.row(self.baseline) if self.baseline else next((row for row in self.rows if row.counts), None)


def load(path: str) -> Study:
    """Loads a study file and checks what concerns the file as a whole.

    Args:
        path: such as "studies/accuracy_vs_params.py".

    Raises:
        ConfigError: one line that names the fault and the remedy.
    """
    file = Path(path)
    if not file.is_file():
        known = sorted(str(other) for other in file.parent.glob("*.py")) if file.parent.is_dir() else []
        close = difflib.get_close_matches(str(file), known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known) or 'none: the folder has no studies'}"
        raise ConfigError(f"--study={path} is no file; {hint}")
    spec = importlib.util.spec_from_file_location(f"study_{file.stem}", file)
    if spec is None:
        raise ConfigError(f"--study={path} is no Python file; give one, such as studies/NAME.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"--study={path} has an error in line {_line(error, file)}: {reason(error)}; mend that line"
        ) from None
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise ConfigError(f"--study={path} defines no STUDY; write STUDY = Study(…) there, as docs/studies.md shows")
    check(study, path)
    return study


def check(study: Study, path: str) -> None:
    """Checks the rows against each other.

    Args:
        study: as the file gives it.
        path: of the file, for messages.

    Raises:
        ConfigError: one line.
    """
    fault = lambda text: ConfigError(f"{path}: {text}")
    if not isinstance(study.rows, Sequence) or not study.rows or not all(isinstance(row, Row) for row in study.rows):
        raise fault(f"rows={str(study.rows)[:60]} must hold at least one Row; write rows=(Row(…),)")
    if (
        not isinstance(study.seeds, Sequence)
        or not study.seeds
        or not all(type(seed) is int and seed >= 0 for seed in study.seeds)
    ):
        raise fault(f"seeds={study.seeds} must be whole numbers from 0; for example seeds=(0, 1, 2)")
    if len(set(study.seeds)) < len(study.seeds):
        raise fault(f"seeds={study.seeds} holds a seed twice; leave one out")
    for name, value in (("tiny", study.tiny), ("small", study.small)):
        if not isinstance(value, Mapping):
            raise fault(f"{name}={str(value)[:60]} must be a dict of config values by key")
    for row in study.rows:
        _check_row(row, fault)
    seen = {}
    for row in study.rows:
        if not row.slug:
            raise fault(f"label {row.label!r} has no letter or digit to name a folder; give another label")
        if row.label in (other.label for other in seen.values()):
            raise fault(f"two rows have the label {row.label!r}; give each its own")
        if row.slug in seen:
            raise fault(f"labels {seen[row.slug].label!r} and {row.label!r} name the same folder {row.slug}; change one")
        seen[row.slug] = row
    labels = [row.label for row in study.rows]
    for what, label in [("baseline", study.baseline), *((f"after of {row.label!r}", row.after) for row in study.rows)]:
        if label and label not in labels:
            raise fault(f"{what} is {label!r}, which is no row; {near(label, labels)}")
    for row in study.rows:
        chain = [row.label]
        while (label := study.row(chain[-1]).after) and label not in chain:
            chain.append(label)
        if label:
            raise fault(f"row {row.label!r} waits for itself: {' after '.join([*chain, label])}; take one `after` out")
    for row in study.rows:
        if unknown := [scale for scale in row.scales if scale not in SUFFIXES]:
            raise fault(f"scales of {row.label!r} has {unknown[0]!r}, which is no scale; {near(unknown[0], list(SUFFIXES))}")
    if study.plot.kind not in ("bar", "scatter"):
        raise fault(f"plot kind {study.plot.kind!r} is unknown; use 'bar' or 'scatter'")
    if study.plot.x not in AXES:
        raise fault(f"plot x={study.plot.x!r} is unknown; {near(study.plot.x, AXES)}")


def _check_row(row, fault):
    if not isinstance(row.label, str):
        raise fault(f"label {str(row.label)[:60]} must be a text; write Row('NAME', …)")
    for name in ("overrides", "tiny", "small", "recipes"):
        value = getattr(row, name)
        if not (isinstance(value, Mapping) or value is None and name in ("tiny", "small")):
            raise fault(f"{name}={str(value)[:60]} of row {row.label!r} must be a dict")
    if unknown := sorted(set(row.recipes) - set(SUFFIXES)):
        raise fault(f"recipes of row {row.label!r} names the scale {unknown[0]!r}; {near(unknown[0], list(SUFFIXES))}")
    published = row.published
    if published is not None and not (isinstance(published, (int, float)) and 1 <= published <= 100):
        raise fault(f"published={published!r} of row {row.label!r} must be in percent, from 1 to 100; for example 79.9")


def near(name: str, known: Sequence[str]) -> str:
    """Returns a hint at the known name that is meant.

    Args:
        name: the unknown one.
        known: all that are known.
    """
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(map(repr, known))}"


def reason(error: BaseException) -> str:
    """Returns an exception as one line.

    Args:
        error: of any type.
    """
    text = " ".join(str(error).split())
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}"


def _line(error, file):
    if isinstance(error, SyntaxError) and error.lineno:
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return lines[-1] if lines else 1
