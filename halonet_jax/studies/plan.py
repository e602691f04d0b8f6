"""The runs of a study: their configs, commands and folders, all checked before anything runs."""

import dataclasses
import difflib
import fnmatch
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from etils import epath

from halonet_jax import config as config_lib
from halonet_jax.errors import ConfigError
from halonet_jax.runtime import storage
from halonet_jax.runtime import workdir as workdir_lib
from halonet_jax.studies import spec
from halonet_jax.studies.spec import Row, Study

TRAIN = (sys.executable, "-m", "halonet_jax.train")
# Knobs that change no result. They may differ from one start to the next.
_FREE = (
    "checkpoints_to_keep", "data.dir", "data.num_threads", "data.num_workers", "data.prefetch", "hang_timeout", "init_from",
    "profile_steps", "tensorboard",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One row with one seed.

    Attributes:
        row: the row.
        seed: the seed.
        config: the whole config, as the run will see it.
        workdir: of the run.
        arguments: of `halonet_jax.train`.
        parent: the run whose weights it starts from; None: it starts from random ones.
    """

    row: Row
    seed: int
    config: ml_collections.ConfigDict
    workdir: epath.Path
    arguments: tuple[str, ...]
    parent: "Run | None" = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.row.label}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study at one scale, in one folder.

    Attributes:
        study: the study.
        path: of its file.
        scale: a key of `spec.SUFFIXES`.
        out: the folder.
        runs: all runs that can be started, row by row.
        broken: what is wrong with the other rows, by label.
    """

    study: Study
    path: str
    scale: str
    out: epath.Path
    runs: tuple[Run, ...]
    broken: Mapping[str, str]

    def of(self, row: Row) -> list[Run]:
        """Returns the runs of a row, by seed.

        Args:
            row: of the study.
        """
        return [run for run in self.runs if run.row is row]

    @property
    def command(self) -> str:
        """The command that goes on with the study."""
        return f"python -m halonet_jax.study --study={self.path} --scale={self.scale} --out={self.out}"


def make(study: Study, path: str, scale: str, out: str) -> Plan:
    """Resolves every row's config and checks it.

    Args:
        study: of `spec.load`.
        path: of its file.
        scale: a key of `spec.SUFFIXES`.
        out: folder of the study, local or `gs://`.

    Raises:
        ConfigError: the folder belongs to another study or scale, or a run there had another config.
    """
    folder = workdir_lib.locate(out)
    _check_folder(folder, study, scale)
    configs, broken = {}, {}
    for row in study.rows:
        try:
            configs[row.label] = _resolve(study, row, scale)
        except ConfigError as error:
            broken[row.label] = str(error)
    runs = {}
    for row in _parents_first(study):
        if row.after in broken:
            broken[row.label] = f"it starts from {row.after!r}, which has a fault"
        if row.label in broken:
            continue
        config, flags = configs[row.label]
        for seed in study.seeds:
            parent = runs[row.after, seed] if row.after else None
            runs[row.label, seed] = _make_run(row, seed, config, flags, folder, parent)
    ordered = [runs[row.label, seed] for row in study.rows if row.label not in broken for seed in study.seeds]
    for run in ordered:
        _check_unchanged(run)
    return Plan(study, path, scale, folder, tuple(ordered), broken)


def _parents_first(study) -> Iterator[Row]:
    depth = lambda row: 1 + depth(study.row(row.after)) if row.after else 0
    return sorted(study.rows, key=depth)


def _make_run(row, seed, config, flags, folder, parent):
    workdir = folder / "runs" / row.slug / f"seed{seed}"
    config = ml_collections.ConfigDict(config.to_dict(), convert_dict=True)
    config.seed = seed
    arguments = [*flags, f"--workdir={workdir}", f"--config.seed={seed}"]
    if parent:
        config.init_from = str(parent.workdir)
        arguments.append(f"--config.init_from={parent.workdir}")
    return Run(row, seed, config, workdir, tuple(arguments), parent)


def _resolve(study, row, scale):
    """The config of a row, and the flags that make `halonet_jax.train` use it."""
    path = row.recipes.get(scale, row.recipe)
    if not path:
        raise ConfigError(f"it has no recipe; write recipe='configs/NAME.py' in Row({row.label!r}, …)")
    suffix = spec.SUFFIXES[scale]
    config = _load_recipe(path, suffix.removeprefix(":"))
    own = {"tiny": row.tiny, "small": row.small}.get(scale)
    overrides = {**getattr(study, scale, {}), **(row.overrides if own is None else own)}
    for key, value in overrides.items():
        _set(config, key, value)
    config_lib.validate(config, 1)
    return config, [f"--config={path}{suffix}", *(f"--config.{key}={_text(value)}" for key, value in overrides.items())]


def _load_recipe(path, argument):
    file = Path(path)
    if not file.is_file():
        known = [str(other) for other in sorted(file.parent.glob("*.py"))]
        close = difflib.get_close_matches(path, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "start the study from the folder that holds configs/"
        raise ConfigError(f"recipe {path!r} is no file; {hint}")
    module_spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    try:
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        return module.get_config(argument) if argument else module.get_config()
    except (Exception, SystemExit) as error:  # whatever the recipe's own code does
        raise ConfigError(f"recipe {path}{':' if argument else ''}{argument}: {spec.reason(error)}") from None


def _set(config, key, value):
    *sections, name = key.split(".")
    node = config
    for section in sections:
        node = node.get(section) if isinstance(node, ml_collections.ConfigDict) else None
    if not isinstance(node, ml_collections.ConfigDict) or name not in node:
        raise ConfigError(f"the config has no key {key!r}; {spec.near(key, list(_keys(config)))[:200]}")
    try:
        node[name] = tuple(value) if isinstance(value, list) else value
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{key}={value!r} has the wrong type ({' '.join(str(error).split())[:150]}); give one like {node[name]!r}"
        ) from None


def _keys(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _text(value: Any) -> str:
    return repr(tuple(value)).replace(" ", "") if isinstance(value, (tuple, list)) else str(value)


# --- what is there already


def _check_folder(folder, study, scale):
    path = folder / "study.json"
    try:
        exists = path.exists()
    except Exception as error:  # of the store's library, as where the network or the right to read is missing
        text = storage.reason(error)
        raise ConfigError(
            f"--out={folder} cannot be read ({text}); see that this machine may read it, or give another --out"
        ) from None
    if exists:
        try:
            there = json.loads(path.read_text())
            title, other = there["title"], there["scale"]
        except (ValueError, KeyError, TypeError):
            return  # torn: it is written again
        if other != scale:
            raise ConfigError(f"{folder} holds this study at scale {other}; give --scale={other}, or another --out")
        if title != study.title:
            raise ConfigError(f"{folder} holds the study {title!r}, not {study.title!r}; give another --out")


def _check_unchanged(run):
    path = run.workdir / "config.json"
    try:
        text = path.read_bytes()
    except OSError:
        return
    try:
        before = config_lib.from_json(text)
    except ConfigError:
        return  # torn, or of another version: training writes it again
    changes = [line for line in config_lib.differences(before, run.config) if line.partition(":")[0] not in _FREE]
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ConfigError(
            f"{run.name} was started with another config ({'; '.join(changes[:3])}{more}); put the old values back, delete "
            f"{run.workdir} to run it again, or give another --out"
        )


# --- a selection


def select(plan: Plan, only: Sequence[str]) -> list[Run]:
    """Returns the runs that `--only` names.

    Args:
        plan: the study.
        only: labels, folder names or patterns of either, several separated by commas; with "/seedN" for one seed. Empty: all.

    Raises:
        ConfigError: one names no row.
    """
    if not only:
        return list(plan.runs)
    labels = [row.label for row in plan.study.rows]
    chosen = set()
    for pattern in (part for value in only for part in _split(value, labels)):
        row_pattern, _, seed = pattern.rpartition("/seed") if re.search(r"/seed\d+$", pattern) else (pattern, "", "")
        rows = [row for row in plan.study.rows if row_pattern == row.label] or [
            row for row in plan.study.rows if any(fnmatch.fnmatchcase(name, row_pattern) for name in (row.label, row.slug))
        ]
        if not rows:
            raise ConfigError(f"--only={pattern!r} names no row; {spec.near(row_pattern, labels)}")
        if seed and int(seed) not in plan.study.seeds:
            raise ConfigError(f"--only={pattern!r} names no seed; the seeds are {', '.join(map(str, plan.study.seeds))}")
        chosen |= {(row.label, s) for row in rows for s in plan.study.seeds if not seed or s == int(seed)}
    return [run for run in plan.runs if (run.row.label, run.seed) in chosen]


def _split(value, labels):
    """Cuts at commas, but not within a label that has some."""
    parts = value.split(",")
    while parts:
        for end in range(len(parts), 0, -1):
            joined = ",".join(parts[:end]).strip()
            if end == 1 or re.sub(r"/seed\d+$", "", joined) in labels:
                break
        parts = parts[end:]
        if joined:
            yield joined


def default_out(path: str, scale: str) -> str:
    """Returns the folder of a study where the user names none.

    Args:
        path: of the study's file.
        scale: its scale.
    """
    return os.path.join("studies_out", f"{Path(path).stem}_{scale}")
