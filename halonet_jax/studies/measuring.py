"""Measures how fast the models of a study are, on the device at hand or by TPU's compiler, into each row's `speed.json`."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from halonet_jax import config as config_lib
from halonet_jax.errors import ConfigError
from halonet_jax.studies import results
from halonet_jax.studies.plan import Plan, Run


def measure(plan: Plan, runs: Sequence[Run], topology: str) -> int:
    """Measures each row, in a process of its own, and prints a line for each.

    Args:
        plan: the study.
        runs: those wanted; one of each row is measured.
        topology: a TPU slice, such as "v5e:4x4", whose compiler gives the figures; "": this machine measures them.

    Returns:
        0, or 1 if a row could not be measured.
    """
    code = 0
    first = {}
    for run in runs:
        first.setdefault(run.row.label, run)
    for run in first.values():
        try:
            found = by_compiler(run, topology) if topology else by_clock(run)
        except (ConfigError, RuntimeError) as error:
            print(f"failed: {run.row.label}: {' '.join(str(error).split())}", flush=True)
            code = 1
            continue
        folder = plan.out / "runs" / run.row.slug
        folder.mkdir(parents=True, exist_ok=True)
        results.write(folder / "speed.json", json.dumps(found, indent=1))
        parts = [
            f"{what} {1e3 * found[key]:.3g} ms/image"
            for what, key in (("inference", "inference_seconds_per_image"), ("training step", "train_seconds_per_image"))
        ]
        print(f"{run.row.label}: {', '.join(parts)} on {found['device']}, batch {found['batch_size']}", flush=True)
    return code


def by_clock(run: Run) -> dict:
    """Returns what `speed_worker` measured.

    Args:
        run: of the row.

    Raises:
        RuntimeError: it failed. The message is its last line.
    """
    with tempfile.TemporaryDirectory(prefix="halonet_jax_speed_") as folder:
        spec, out = Path(folder) / "config.json", Path(folder) / "speed.json"
        spec.write_text(config_lib.to_json(run.config))
        command = [sys.executable, "-m", "halonet_jax.studies.speed_worker", str(spec), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not out.exists():
            raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        return json.loads(out.read_text())


def by_compiler(run: Run, topology: str) -> dict:
    """Returns TPU's compiler's estimate of the row's own batch on a slice. Nothing runs.

    Args:
        run: of the row.
        topology: such as "v5e:4x4".

    Raises:
        ConfigError: libtpu is not installed, or the config does not fit the topology.
        RuntimeError: the compiler failed, or the step does not fit into memory.
    """
    from halonet_jax.costs import chips, tpu_compile  # here: they import the models and the training

    parsed = tpu_compile.check(run.config, topology)
    found = {"device": f"{topology}, by its compiler", "batch_size": run.config.batch_size}
    for step, key in (("eval", "inference_seconds_per_image"), ("train", "train_seconds_per_image")):
        record = tpu_compile.compile_step(run.config, topology, step, quick=False)
        if not record["fits"]:
            raise RuntimeError(f"its {step} step does not fit into the memory of {topology}; give a larger slice")
        kernels = record.get("kernel_flops", 0)
        seconds = chips.step_seconds(parsed.chip, record["flops"], record["bytes"], record["cycles"], kernels)
        batch = run.config.batch_size if step == "train" else run.config.eval_batch_size or run.config.batch_size
        found[key] = seconds / batch if seconds else None
    return found
