"""Runs a study: several recipes and seeds, with a report that sets the paper's numbers beside ours.

    python -m halonet_jax.study --study=studies/accuracy_vs_params.py [--scale=tiny|small|imagenet] [--out=FOLDER]
        [--only=LABEL,…] [--jobs=N] [--launch=local|slurm|pod] [--report] [--measure=speed]

The same command goes on where the last one stopped, on one machine or on several that share the folder. docs/studies.md
describes studies and their reports.
"""

import json
import sys
import threading
import time
from collections.abc import Sequence

import jax
from absl import flags

from halonet_jax import command_line
from halonet_jax.errors import ConfigError
from halonet_jax.runtime import storage
from halonet_jax.studies import devices, launch, measuring, plan, report, results, selection, spec
from halonet_jax.studies.runner import Runner

PICTURE_EVERY = 30.0  # seconds


def define_flags() -> None:
    """Defines the flags of the command; not on import, so that several entries can be imported together."""
    flags.DEFINE_string("study", None, "A study file, such as studies/accuracy_vs_params.py.")
    flags.DEFINE_string("out", None, "Folder of runs and report; default: studies_out/STUDY_SCALE.")
    flags.DEFINE_enum("scale", "tiny", list(spec.SUFFIXES), "tiny: minutes on a laptop; small: hours; imagenet: the paper's.")
    flags.DEFINE_multi_string("only", [], "Labels, folder names or patterns of rows, with /seedN for one seed; commas between.")
    flags.DEFINE_integer("jobs", 1, "Runs at a time on this machine.", 1)
    flags.DEFINE_enum("launch", "local", ["local", "slurm", "pod"], "Where to run.")
    flags.DEFINE_string("launch_args", "", "Further arguments of sbatch or of scripts/launch/pod.sh resume.")
    flags.DEFINE_boolean("yes", False, "With --launch=pod: run the commands that would be printed.")
    flags.DEFINE_boolean("report", False, "Run nothing: write the report of what is there.")
    flags.DEFINE_enum("measure", None, ["speed"], "speed: time inference and training steps of each row, train nothing.")
    flags.DEFINE_string("topology", "", "With --measure=speed: figures of TPU's compiler for this slice, such as v5e:4x4.")


def main(train: Sequence[str] = plan.TRAIN) -> int:
    """Runs the command and returns its exit code.

    Args:
        train: the training command, without its flags.
    """
    f = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # of this process alone: the devices are for the runs
    study = spec.load(f.study)
    made = plan.make(study, f.study, f.scale, plan.default_out(f.study, f.scale) if f.out is None else f.out)
    for label, fault in made.broken.items():
        print(f"error: row {label!r} cannot run: {fault}", file=sys.stderr, flush=True)
    runs = selection.select(made, f.only)
    if f.topology and not f.measure:
        raise ConfigError("--topology is for --measure=speed; add that, or leave --topology out")
    _open(made)
    if f.report:
        return _finish(made, 0)
    if f.measure:
        return _finish(made, measuring.measure(made, runs, f.topology))
    if f.launch != "local":
        results.harvest(runs)
        code = (launch.slurm if f.launch == "slurm" else launch.pod)(made, runs, f.launch_args, f.yes)
        return max(code, bool(made.broken))
    if "://" in str(made.out):
        raise ConfigError(f"--out={made.out}: runs on this machine need a local or network folder; give one, or --launch=pod")
    runner = Runner(made, runs, f.jobs, changed=_Reports(made), train=train, environments=devices.share(f.jobs))
    return _finish(made, runner.run())


class _Reports:
    """Writes the report after a run. The picture takes seconds, so it is drawn at most every half minute, and at the end."""

    def __init__(self, made):
        self._plan, self._drawn, self._lock = made, time.monotonic(), threading.Lock()

    def __call__(self):
        with self._lock:
            due = time.monotonic() - self._drawn > PICTURE_EVERY
            report.write(self._plan, picture=due)
            self._drawn = time.monotonic() if due else self._drawn


def _open(made):
    try:
        made.out.mkdir(parents=True, exist_ok=True)
        results.write(made.out / "study.json", json.dumps({"title": made.study.title, "scale": made.scale}))
    except OSError as error:
        raise ConfigError(
            f"--out={made.out} cannot be written ({storage.reason(error)}); {storage.remedy(error)}, or give another --out"
        ) from None


def _finish(made, code):
    lines = report.write(made)
    done, total = sum(len(line.scores.values) for line in lines), sum(line.planned for line in lines)
    print(f"{done} of {total} runs done; report: {made.out}/report.md, report.png, report.csv", flush=True)
    return code or int(bool(made.broken))


if __name__ == "__main__":
    define_flags()
    command_line.run(main, required_flags=("study",), alone=True)
