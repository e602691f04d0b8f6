"""Trains a recipe, or resumes it where its workdir has a checkpoint.

    python -m halonet_jax.train --config=configs/digits.py --workdir=runs/digits [--config.batch_size=128 …]

Exit codes: 0 done; 2 bad config or data; 70 non-finite loss; 75 stopped by a signal with the state saved (the same command
resumes). The workdir holds `config.json`, `run.json` (versions, devices), `metrics.jsonl`, TensorBoard files,
`learning_curve.png` and `checkpoints/`.
"""

import functools
import json
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import jax
import ml_collections
from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from halonet_jax import command_line, data
from halonet_jax import config as config_lib
from halonet_jax.analysis import plots
from halonet_jax.tasks import classification
from halonet_jax.training import checkpoint, optimizer, reporting, sharding, state, step, stopping

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Recipe, such as configs/h4.py or configs/h4.py:smoke.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://; made where missing, resumed where not.")


def main() -> int:
    """Entry point."""
    return train(_CONFIG.value, _WORKDIR.value)


def train(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Runs the whole recipe and returns an exit code.

    Raises:
        ConfigError, DataError, CheckpointError: for bad input, before anything is compiled.
        NonFiniteLoss: where training diverged; names the step and the last good checkpoint.
    """
    stop = stopping.StopRequest()
    begin = time.monotonic()
    config_lib.validate(config, jax.device_count())
    is_writer = jax.process_index() == 0

    # Data: what there is fixes the number of classes and of steps.
    train_source = data.open_source(config.data, config.data.train_split)
    eval_source = data.open_source(config.data, config.data.eval_split)
    steps_per_epoch = len(train_source) / config.batch_size
    total_steps = max(1, round(config.num_epochs * steps_per_epoch)) if config.num_epochs else config.max_steps
    last_step = min(total_steps, config.max_steps or total_steps)
    eval_every = round(config.eval_every_epochs * steps_per_epoch) or last_step

    workdir = _open_workdir(config, workdir, is_writer)

    # State: shapes first, so that it is born, or restored, where it shall lie.
    mesh = sharding.make_mesh(config.mesh.fsdp)
    task = classification.make_task(config, train_source.num_classes)
    schedule = optimizer.make_schedule(config, total_steps, steps_per_epoch)
    tx = optimizer.make_optimizer(config, schedule)
    create_state = functools.partial(state.create, task, tx, config.seed, ema=config.ema_decay > 0)
    abstract_state = jax.eval_shape(create_state)
    state_sharding = sharding.state_sharding(mesh, abstract_state)
    checkpointer = checkpoint.Checkpointer(workdir / "checkpoints", config.checkpoints_to_keep)
    collected = []
    if checkpointer.latest_step() is None:
        train_state = jax.jit(create_state, out_shardings=state_sharding)()
    else:
        placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        train_state, position = checkpointer.restore(jax.tree.map(placed, abstract_state, state_sharding))
        collected = position["step_metrics"]
    if is_writer:  # Only now: a config that does not fit the checkpoint leaves the workdir as it was.
        _record_run(config, workdir)
    start_step = int(train_state.step)

    # Programs.
    on_all = jax.NamedSharding(mesh, jax.P())
    train_step = jax.jit(
        step.make_train_step(
            task, tx, seed=config.seed, ema_decay=config.ema_decay, accumulation_steps=config.optimizer.accumulation_steps
        ),
        in_shardings=(state_sharding, jax.NamedSharding(mesh, sharding.BATCH)),
        out_shardings=(state_sharding, on_all),
        donate_argnums=0,
    )
    eval_step = jax.jit(step.make_eval_step(task), out_shardings=on_all)

    reporter = reporting.Reporter(
        workdir, start_step=start_step, last_step=last_step, batch_size=config.batch_size, enabled=is_writer
    )
    if is_writer:
        parameters = sum(x.size for x in jax.tree.leaves(train_state.params))
        print(
            f"{config.model.name}: {parameters:,} parameters, {len(train_source):,} images, {train_source.num_classes} classes; "
            f"{'resuming at' if start_step else 'starting at'} step {start_step} of {last_step}, batch {config.batch_size} on "
            f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), mesh {dict(mesh.shape)}",
            flush=True,
        )

    shares = dict(process_index=jax.process_index(), process_count=jax.process_count())
    step_metrics = reporting.StepMetrics(collected)

    def evaluate(train_state, at_step):
        batch_size = config.eval_batch_size or config.batch_size
        with data.eval_batches(eval_source, config.data, batch_size=batch_size, **shares) as batches:
            sums = step.evaluate(eval_step, train_state.weights(), sharding.to_device(batches, mesh))
            results = {f"{name}/{key}": value for name, total in sums.items() for key, value in step.means(total).items()}
            results["eval/count"], results["eval/corrupt"] = sums["eval"]["count"], batches.num_corrupt
        reporter.write(at_step, results)
        if is_writer:
            scores = [f"{name} top-1 {results[f'{name}/top1']:.4f} top-5 {results[f'{name}/top5']:.4f}" for name in sums]
            print(f"step {at_step}/{last_step}  " + "  ".join(scores) + f"  on {sums['eval']['count']} images", flush=True)
        return results

    def save(train_state, results=None):
        top1 = results and results.get("eval_ema/top1", results["eval/top1"])
        position = {"examples_seen": int(train_state.step) * config.batch_size, "step_metrics": step_metrics.collected()}
        checkpointer.save(train_state, position, top1)

    # Steps. Reports, evaluations and checkpoints come at fixed step numbers, so that a resumed run repeats none and skips none.
    results = None
    try:
        with data.train_batches(
            train_source, config.data, batch_size=config.batch_size, seed=config.seed, start_step=start_step, **shares
        ) as batches:
            for at_step, batch in zip(range(start_step + 1, last_step + 1), sharding.to_device(batches, mesh)):
                train_state, metrics = train_step(train_state, batch)
                step_metrics.append(at_step, metrics)
                if at_step == start_step + 1:
                    jax.block_until_ready(metrics)
                    reporter.restart_clock(at_step)  # compiling is over
                if at_step % config.log_every_steps == 0 or at_step == last_step:
                    values = step_metrics.pop_means()
                    values["learning_rate"] = float(schedule(at_step - 1))
                    values["epoch"], values["data/corrupt"] = at_step / steps_per_epoch, batches.num_corrupt
                    reporter.train(at_step, values)
                results = None
                if at_step % eval_every == 0 or at_step == last_step:
                    results = evaluate(train_state, at_step)
                if results or stop.signal or at_step % config.checkpoint_every_steps == 0:
                    save(train_state, results)
                    reporter.restart_clock(at_step)
                if stop.signal:
                    break
        checkpointer.wait()
    except stopping.NonFiniteLoss as error:
        checkpointer.wait()
        raise stopping.NonFiniteLoss(
            f"{error}. Last good checkpoint: step {checkpointer.latest_step()} in {workdir}/checkpoints. Try a lower "
            "schedule.learning_rate, more schedule.warmup_epochs, optimizer.clip_norm=1, or model.dtype=float32"
        ) from None
    finally:
        reporter.close()

    at_step = int(train_state.step)
    elapsed = reporting.format_seconds(time.monotonic() - begin)
    if stop.signal and at_step < last_step:
        print(f"{stop.signal}: saved step {at_step} after {elapsed}; the same command resumes", flush=True)
        return stopping.EXIT_PREEMPTED
    if is_writer:
        plots.learning_curve([workdir], workdir / "learning_curve.png")
        results = results or reporting.last_evaluation(workdir)
        scores = ", ".join(f"{key} {value:.4f}" for key, value in results.items() if key.endswith("top1"))
        print(
            f"done in {elapsed}: {scores}. Results: {workdir}/metrics.jsonl, learning_curve.png; checkpoint: "
            f"{workdir}/checkpoints/{at_step} (best: {checkpointer.best_step()})",
            flush=True,
        )
    checkpointer.close()
    return 0


def _open_workdir(config, workdir, is_writer):
    workdir = epath.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if is_writer:
            probe = workdir / ".writable"
            probe.write_text("")
            probe.unlink()
    except OSError as error:
        raise config_lib.ConfigError(f"workdir {workdir} cannot be written ({error}); give another --workdir") from None
    if (workdir / "config.json").exists():
        old = config_lib.from_dict(json.loads((workdir / "config.json").read_text()))
        for line in config_lib.differences(old, config):
            logging.warning("The config differs from this workdir's last run: %s", line)
    # Orbax and TensorBoard want absolute paths.
    return workdir if "://" in str(workdir) else epath.Path(Path(workdir).resolve())


def _record_run(config, workdir):
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "halonet_jax")
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    run = {
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "git_revision": git.stdout.strip() or None,
        "devices": [str(device.device_kind) for device in jax.devices()],
        "processes": jax.process_count(),
    }
    (workdir / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    (workdir / "run.json").write_text(json.dumps(run, indent=2))


if __name__ == "__main__":
    command_line.run(main, required_flags=("config", "workdir"))
