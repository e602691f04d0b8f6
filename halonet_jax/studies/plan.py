"""The runs of a study: their configs, commands and folders, all checked before anything runs."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_collections
from etils import epath

from halonet_jax import config as config_lib
from halonet_jax.errors import ConfigError
from halonet_jax.runtime import storage
from halonet_jax.runtime import workdir as workdir_lib
from halonet_jax.studies import resolving
from halonet_jax.studies.spec import Row, Study

TRAIN = (sys.executable, "-m", "halonet_jax.train")
# Knobs that change no result. They may differ from one start to the next.
_FREE = (
    "checkpoints_to_keep", "data.dir", "data.num_threads", "data.num_workers", "data.prefetch", "hang_timeout",
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
        here = f"{Path.cwd()}/"  # reports are published: they need not say where this folder is
        return f"python -m halonet_jax.study --study={self.path} --scale={self.scale} --out={str(self.out).removeprefix(here)}"


def make(study: Study, path: str, scale: str, out: str) -> Plan:
    """Resolves every row's config and checks it.

    Args:
        study: of `spec.load`.
        path: of its file.
        scale: a key of `spec.SUFFIXES`.
        out: folder of the study, local or `gs://`.

    Raises:
        ConfigError: the folder belongs to another study or scale, a run there had another config, or no row is of this scale.
    """
    study = study.at(scale)
    folder = workdir_lib.locate(out)
    _check_folder(folder, study, scale)
    configs, broken = {}, {}
    for row in study.rows:
        try:
            configs[row.label] = resolving.resolve(study, row, scale)
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
    free = (*_FREE, "init_from") if run.parent else _FREE
    changes = [line for line in config_lib.differences(before, run.config) if line.partition(":")[0] not in free]
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ConfigError(
            f"{run.name} was started with another config ({'; '.join(changes[:3])}{more}); put the old values back, delete "
            f"{run.workdir} to run it again, or give another --out"
        )


def default_out(path: str, scale: str) -> str:
    """Returns the folder of a study where the user names none.

    Args:
        path: of the study's file.
        scale: its scale.
    """
    return os.path.join("studies_out", f"{Path(path).stem}_{scale}")
