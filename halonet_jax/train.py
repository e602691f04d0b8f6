"""Trains a recipe, or resumes it where its workdir has a checkpoint.

    python -m halonet_jax.train --config=configs/digits.py --workdir=runs/digits [--config.batch_size=128 …]

Exit codes: 0 done; 2 bad config or data; 70 non-finite loss; 75 stopped by a signal with the state saved (the same command
resumes). The workdir holds `config.json`, `run.json` (versions, devices), `metrics.jsonl`, TensorBoard files,
`learning_curve.png` and `checkpoints/`.
"""

import json
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from halonet_jax import __version__, command_line, data, tasks
from halonet_jax import config as config_lib
from halonet_jax.analysis import plots
from halonet_jax.training import checkpoint, programs, reporting, sharding, state, step, stopping

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Recipe, such as configs/h4.py or configs/h4.py:smoke.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://; made where missing, resumed where not.")


class Run(NamedTuple):
    """All that stays the same while a run lasts."""

    config: ml_collections.ConfigDict
    workdir: epath.Path
    program: programs.Programs
    train_source: data.Source
    eval_source: data.Source
    steps_per_epoch: float
    last_step: int
    checkpointer: checkpoint.Checkpointer
    reporter: reporting.Reporter
    stop: stopping.StopRequest


def main() -> int:
    """Entry point."""
    return train(_CONFIG.value, _WORKDIR.value)


def train(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Runs the whole recipe, or what is left of it, and returns an exit code.

    Raises:
        ConfigError, DataError, CheckpointError: for bad input, before anything is compiled.
        NonFiniteLoss: where training diverged; names the step and the last good checkpoint.
    """
    begin = time.monotonic()
    with stopping.StopRequest() as stop:
        run, train_state, step_metrics = prepare(config, workdir, stop)
        start_step = int(train_state.step)
        try:
            train_state, results = run_steps(run, train_state, step_metrics)
        except stopping.NonFiniteLoss as error:
            raise stopping.NonFiniteLoss(f"{error}. {_advice(run)}") from None
        finally:
            run.checkpointer.close()
            run.reporter.close()
        elapsed = reporting.format_seconds(time.monotonic() - begin)
        return finish(run, start_step, int(train_state.step), results, elapsed)


def prepare(config, workdir, stop) -> tuple[Run, state.TrainState, reporting.StepMetrics]:
    """Config to data to state to programs: everything up to the first step."""
    config_lib.validate(config, jax.device_count())
    is_writer = jax.process_index() == 0

    # Data: what there is fixes the number of classes and of steps.
    train_source = data.open_source(config.data, config.data.train_split)
    eval_source = data.open_source(config.data, config.data.eval_split)
    data.randaugment.check_ops(config.data.randaugment_ops)
    steps_per_epoch = len(train_source) / config.batch_size
    total_steps = max(1, round(config.num_epochs * steps_per_epoch)) if config.num_epochs else config.max_steps
    last_step = min(total_steps, config.max_steps or total_steps)
    workdir = open_workdir(config, workdir, is_writer)
    per_device = config.batch_size // config.optimizer.accumulation_steps // jax.device_count()
    if config.model.bn_group_size and per_device % config.model.bn_group_size and is_writer:
        message = "Batch-norm groups of %d images span devices, which hold %d each: their statistics travel in every layer"
        logging.warning(message, config.model.bn_group_size, per_device)

    # State: shapes first, so that it is born, or restored, where it shall lie.
    mesh = sharding.make_mesh(config.mesh.fsdp)
    task = tasks.make_task(config, train_source.num_classes)
    program = programs.make_programs(config, task, mesh, total_steps, steps_per_epoch)
    checkpointer = checkpoint.Checkpointer(workdir / "checkpoints", config.checkpoints_to_keep)
    if checkpointer.latest_step() is None:
        train_state, position = program.create_state(), {}
    else:
        train_state, position = checkpointer.restore(program.abstract_state)
        check_same_data(position, describe_data(config, train_source))
    start_step = int(train_state.step)

    if is_writer:  # Only now: a config that does not fit the checkpoint leaves the workdir as it was.
        record_run(config, workdir)
        parameters = sum(x.size for x in jax.tree.leaves(train_state.params))
        print(
            f"{config.model.name}: {parameters:,} parameters, {len(train_source):,} images, {train_source.num_classes} classes; "
            f"step {start_step} of {last_step}, batch {config.batch_size} on {jax.device_count()} {jax.devices()[0].device_kind} "
            f"device(s), mesh {dict(mesh.shape)}",
            flush=True,
        )
    reporter = reporting.Reporter(
        workdir, start_step=start_step, last_step=last_step, batch_size=config.batch_size, enabled=is_writer
    )
    run = Run(
        config, workdir, program, train_source, eval_source, steps_per_epoch, last_step, checkpointer, reporter, stop,
    )  # fmt: skip
    return run, train_state, reporting.StepMetrics(position.get("step_metrics", []))


def run_steps(run: Run, train_state, step_metrics) -> tuple[state.TrainState, dict | None]:
    """Steps up to the last, or to a signal. Returns the state and the evaluation of its step, where there was one.

    Reports, evaluations and checkpoints come at fixed step numbers, so that a resumed run repeats none and skips none.
    """
    config, last_step, results = run.config, run.last_step, None
    start_step = int(train_state.step)
    eval_every = round(config.eval_every_epochs * run.steps_per_epoch) or last_step
    with data.train_batches(
        run.train_source, config.data, batch_size=config.batch_size, seed=config.seed, start_step=start_step, **_share()
    ) as batches:
        for at_step, batch in zip(range(start_step + 1, last_step + 1), sharding.to_device(batches, run.program.mesh)):
            train_state, metrics = run.program.train_step(train_state, batch)
            step_metrics.append(at_step, metrics)
            if at_step == start_step + 1:
                jax.block_until_ready((metrics, run.program.schedule(at_step)))
                run.reporter.start_clock(at_step)  # compiling is over
            if at_step % config.log_every_steps == 0 or at_step == last_step:
                values = step_metrics.pop_means()
                values |= {"learning_rate": float(run.program.schedule(at_step - 1)), "epoch": at_step / run.steps_per_epoch}
                run.reporter.train(at_step, values | {"data/corrupt": batches.num_corrupt})
            # None shortly before the last step, which is evaluated anyway.
            due = at_step % eval_every == 0 and last_step - at_step >= eval_every / 2
            results = evaluate(run, train_state, at_step) if due or at_step == last_step else None
            if results or run.stop.signal or at_step % config.checkpoint_every_steps == 0:
                position = describe_data(config, run.train_source) | {"step_metrics": step_metrics.collected()}
                top1 = results and results.get("eval_ema/top1", results["eval/top1"])
                stopping.check_finite(train_state, at_step)
                run.checkpointer.save(train_state, position, top1)
                run.reporter.restart_clock(at_step)
            if run.stop.signal:
                break
    return train_state, results


def evaluate(run: Run, train_state, at_step) -> dict[str, float]:
    """Evaluates raw and EMA weights in one pass over the evaluation split, and reports."""
    config = run.config
    batch_size = config.eval_batch_size or config.batch_size
    with data.eval_batches(run.eval_source, config.data, batch_size=batch_size, **_share()) as batches:
        sums = step.evaluate(run.program.eval_step, train_state.weights(), sharding.to_device(batches, run.program.mesh))
        corrupt = batches.num_corrupt
    if not sums["eval"]["count"]:
        raise data.DataError(
            f"no image of {config.data.eval_split!r} could be read, {corrupt} are corrupt; see the warnings above"
        )
    results = {f"{name}/{key}": value for name, total in sums.items() for key, value in step.means(total).items()}
    results |= {"eval/count": sums["eval"]["count"], "eval/corrupt": corrupt}
    run.reporter.evaluation(at_step, results)
    return results


def _advice(run):
    run.checkpointer.wait()
    last = run.checkpointer.latest_step()
    saved = "No checkpoint was saved before" if last is None else f"Last good checkpoint: {run.workdir}/checkpoints/{last}"
    return (
        f"{saved}. Try a lower schedule.learning_rate, more schedule.warmup_epochs, optimizer.clip_norm=1, or "
        "model.dtype=float32"
    )


def finish(run: Run, start_step: int, at_step: int, results: dict | None, elapsed: str) -> int:
    """Says where everything is; returns the exit code."""
    is_writer = jax.process_index() == 0
    if at_step < run.last_step:
        if is_writer:
            print(f"{run.stop.signal}: saved step {at_step} after {elapsed}; the same command resumes", flush=True)
        return stopping.EXIT_PREEMPTED
    if is_writer:
        results = results or reporting.last_evaluation(run.workdir)
        plots.learning_curve([run.workdir], run.workdir / "learning_curve.png")
        scores = ", ".join(f"{key} {value:.4f}" for key, value in results.items() if key.endswith("top1"))
        status = f"done in {elapsed}" if at_step > start_step else f"nothing to do, step {at_step} was the last"
        print(
            f"{status}: {scores}\n  results     {run.workdir}/metrics.jsonl, learning_curve.png\n"
            f"  checkpoint  {run.workdir}/checkpoints/{at_step}",
            flush=True,
        )
    return 0


def open_workdir(config, workdir: str, is_writer: bool) -> epath.Path:
    """Makes the folder where it is missing; names what in the config differs from the run that it holds."""
    workdir = epath.Path(workdir if "://" in workdir else Path(workdir).resolve())  # Orbax wants absolute paths
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if is_writer:
            probe = workdir / ".writable"
            probe.write_text("")
            probe.unlink()
    except OSError as error:
        raise config_lib.ConfigError(f"workdir {workdir} cannot be written ({error}); give another --workdir") from None
    if (workdir / "config.json").exists():
        for line in config_lib.differences(config_lib.from_json((workdir / "config.json").read_text()), config):
            logging.warning("The config differs from this workdir's last run: %s", line)
    return workdir


def describe_data(config, source: data.Source) -> dict:
    """What, with the step and the seed, fixes the batches to come; saved in every checkpoint."""
    return {"batch_size": config.batch_size, "num_examples": len(source), "class_names": list(source.class_names)}


def check_same_data(saved: dict, now: dict) -> None:
    """Refuses other classes, whose labels would lie; names other changes, after which batches are not what they would have been."""
    if saved["class_names"] != now["class_names"]:
        changed = sorted(set(saved["class_names"]) ^ set(now["class_names"])) or ["their order"]
        raise checkpoint.CheckpointError(
            f"the checkpoint was trained on {len(saved['class_names'])} classes, the data has {len(now['class_names'])}, and they "
            f"differ in {', '.join(changed[:5])}; give the data that it was trained on, or another --workdir"
        )
    for key in ("num_examples", "batch_size"):
        if saved[key] != now[key]:
            logging.warning(
                "%s was %d and is %d: batches from here on are not those of an undisturbed run", key, saved[key], now[key]
            )


def record_run(config, workdir: epath.Path) -> None:
    """Writes the resolved config, and what it ran with."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() if shutil.which("git") else ""
    about = {
        "python": platform.python_version(),
        "versions": {"halonet_jax": __version__} | {name: metadata.version(name) for name in packages},
        "git_revision": revision or None,
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
    }
    (workdir / "config.json").write_text(config_lib.to_json(config))
    (workdir / "run.json").write_text(json.dumps(about, indent=2))


def _share():
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


if __name__ == "__main__":
    command_line.run(main, required_flags=("config", "workdir"))
