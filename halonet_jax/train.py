"""Trains a recipe, or resumes it where its workdir has a checkpoint.

    python -m halonet_jax.train --config=configs/digits.py --workdir=runs/digits [--config.batch_size=128 …]

Several hosts run the same command; TPU slices and Slurm are recognised, others give --coordinator_address and so on.
Exit codes: 0 done; 2 bad config, data or checkpoint; 69 a lost process or a hang; 70 non-finite loss; 74 the workdir cannot
be written; 75 stopped by a signal with the state saved. After 69 and 75 the same command resumes. The workdir holds
`config.json`, `run.json` (versions, devices), `metrics.jsonl`, TensorBoard files, `learning_curve.png`, `checkpoints/` and
`compile_cache/`.
"""

import functools
import time
from typing import Any, NamedTuple

import jax
import ml_collections
from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from halonet_jax import __version__, command_line, data, errors, tasks
from halonet_jax import config as config_lib
from halonet_jax.runtime import distributed, plots, profiling, reporting, stopping
from halonet_jax.runtime import workdir as workdir_lib
from halonet_jax.training import checkpoint, programs, sharding, state, step

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Recipe, such as configs/h4.py or configs/h4.py:smoke.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://; made where missing, resumed where not.")

MAX_ROLLBACKS = 5  # of one run, after which a loss that is not finite stops it


class Run(NamedTuple):
    """All that stays the same while a run lasts."""

    config: ml_collections.ConfigDict
    workdir: epath.Path
    programs: programs.Programs
    train_source: data.Source
    eval_source: data.Source
    steps_per_epoch: float
    last_step: int
    checkpointer: checkpoint.Checkpointer
    reporter: reporting.Reporter
    profile: profiling.ProfileWindow
    watchdog: stopping.Watchdog
    stop: stopping.StopRequest
    clock: reporting.StartUpClock


def main() -> int:
    """Entry point."""
    return train(_CONFIG.value, _WORKDIR.value)


def train(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Runs the whole recipe, or what is left of it, and returns an exit code.

    Raises:
        ConfigError, DataError, CheckpointError: for bad input, most of it before anything is compiled.
        DistributedError: where another process failed.
        NonFiniteLoss: where training diverged; names the step and the last good checkpoint.
        StorageError: where the workdir can no longer be written.
    """
    begin = time.monotonic()
    sharding.use_cpu_cores(config_lib.independent_parts(config))  # before anything asks JAX for its devices
    with stopping.StopRequest() as stop:
        run, train_state, position = prepare(config, workdir, stop)
        start_step = int(train_state.step)
        try:
            while True:
                try:
                    train_state, results = run_steps(run, train_state, position)
                    break
                except errors.NonFiniteLoss as error:
                    train_state, position = roll_back(run, position, error)
        except errors.Stopped:
            print(
                f"{stop.signal}: there was no step since the last start, nothing to save; the same command resumes", flush=True
            )
            return stopping.EXIT_PREEMPTED
        finally:
            run.profile.close()
            run.reporter.close()
            run.watchdog.doing("writing the last checkpoint")
            run.checkpointer.close()
            run.watchdog.doing(None)
        elapsed = reporting.format_seconds(time.monotonic() - begin)
        return finish(run, start_step, int(train_state.step), results, elapsed)


def prepare(config, workdir, stop) -> tuple[Run, state.TrainState, dict[str, Any]]:
    """Config to data to state to programs: everything up to the first step. Returns also what the checkpoint says of data."""
    clock = reporting.StartUpClock()
    is_writer = jax.process_index() == 0
    config_lib.validate(config, jax.device_count())
    distributed.check_same("config or version", config_lib.to_json(config) + __version__ + jax.__version__)

    # Data: what there is fixes the number of classes and of steps.
    with distributed.together("opening the data"):
        train_source = data.open_source(config.data, config.data.train_split)
        eval_source = data.open_source(config.data, config.data.eval_split)
        data.randaugment.check_ops(config.data.randaugment_ops)
    distributed.check_same("data set", f"{len(train_source)} {len(eval_source)} {train_source.class_names}")
    steps_per_epoch = len(train_source) / config.batch_size
    total_steps = max(1, round(config.num_epochs * steps_per_epoch)) if config.num_epochs else config.max_steps
    last_step = min(total_steps, config.max_steps or total_steps)
    workdir = workdir_lib.open_workdir(config, workdir)
    workdir_lib.use_compile_cache(workdir)
    per_device = config.batch_size // config.optimizer.accumulation_steps // jax.device_count()
    if config.model.bn_group_size and per_device % config.model.bn_group_size and is_writer:
        message = "Batch-norm groups of %d images span devices, which hold %d each: their statistics travel in every layer"
        logging.warning(message, config.model.bn_group_size, per_device)
    clock.lap("data")

    # State: shapes first, so that it is born, or restored, where it shall lie.
    mesh = sharding.make_mesh(config.mesh.fsdp)
    task = tasks.make_task(config, train_source.num_classes)
    program = programs.make_programs(config, task, mesh, total_steps, steps_per_epoch)
    checkpointer = checkpoint.Checkpointer(workdir / "checkpoints", config.checkpoints_to_keep)
    if checkpointer.latest_step() is None:
        train_state, position = program.create_state(), describe_data(config, train_source)
    else:
        train_state, position = checkpointer.restore(program.abstract_state, program.create_state)
        check_same_data(position, describe_data(config, train_source))
    jax.block_until_ready(train_state)
    clock.lap("state")
    start_step = int(train_state.step)

    if is_writer:  # Only now: a config that does not fit the checkpoint leaves the workdir as it was.
        workdir_lib.record_run(config, workdir)
        parameters = sum(x.size for x in jax.tree.leaves(train_state.params))
        hosts = f" on {jax.process_count()} hosts, {config.batch_size // jax.process_count()} images each"
        print(
            f"{config.model.name}: {parameters:,} parameters, {len(train_source):,} images, {train_source.num_classes} classes; "
            f"step {start_step} of {last_step}, batch {config.batch_size} on {jax.device_count()} {jax.devices()[0].device_kind} "
            f"device(s){hosts if jax.process_count() > 1 else ''}, mesh {dict(mesh.shape)}\n  {program.description}",
            flush=True,
        )
    reporter = reporting.Reporter(
        workdir, start_step=start_step, last_step=last_step, batch_size=config.batch_size, enabled=is_writer,
        tensorboard=config.tensorboard,
    )  # fmt: skip
    run = Run(
        config, workdir, program, train_source, eval_source, steps_per_epoch, last_step, checkpointer, reporter,
        profiling.ProfileWindow(config.profile_steps, workdir / "profile", enabled=is_writer),
        stopping.Watchdog(config.hang_timeout), stop, clock,
    )  # fmt: skip
    return run, train_state, position


def run_steps(run: Run, train_state, position) -> tuple[state.TrainState, dict | None]:
    """Steps up to the last, or to a signal. Returns the state and the evaluation of its step, where there was one.

    Reports, evaluations and checkpoints come at fixed step numbers, so that a resumed run repeats none and skips none.
    """
    config, last_step, results = run.config, run.last_step, None
    start_step = at_step = int(train_state.step)
    eval_every = round(config.eval_every_epochs * run.steps_per_epoch) or last_step
    step_metrics = reporting.StepMetrics(position.get("step_metrics", []))
    estimate_at = min(start_step + 5, last_step - 1)

    def save(top1=None):
        run.watchdog.doing(f"saving step {at_step}")
        now = position | describe_data(config, run.train_source) | {"step_metrics": step_metrics.collected()}
        run.checkpointer.save(train_state, now | {"num_corrupt": num_corrupt()})
        if top1 is not None:
            run.checkpointer.set_score(at_step, top1)

    def num_corrupt():
        return position.get("num_corrupt", 0) + int(distributed.gather(batches.num_corrupt).sum())

    if start_step == last_step and reporting.last_evaluation(run.workdir).get("step") != last_step:
        results = evaluate(run, train_state, last_step)  # which the last start did not come to
    with data.train_batches(
        run.train_source, config.data, batch_size=config.batch_size, seed=config.seed,
        start_step=start_step + position.get("skipped_batches", 0), **_share(),
    ) as loader:  # fmt: skip
        batches = sharding.DeviceBatches(loader, run.programs.mesh)
        try:
            for next_step, batch in zip(range(start_step + 1, last_step + 1), batches):
                run.profile.before(next_step)
                if at_step == start_step:
                    run.clock.lap("first batch")
                    first_step = functools.partial(run.programs.train_step, train_state, batch)
                    train_state, metrics = jax.block_until_ready(run.stop.interruptible(first_step))
                    run.clock.finish("compiling and the first step")
                    run.reporter.start_clock(next_step)
                    batches.pop_seconds_waited()
                else:
                    run.watchdog.doing(f"step {next_step}")
                    train_state, metrics = run.programs.train_step(train_state, batch)
                at_step = next_step
                step_metrics.append(at_step, metrics)
                run.profile.after(at_step, metrics)
                if at_step == estimate_at:
                    jax.block_until_ready(metrics)
                    run.reporter.estimate(at_step)
                stop = run.stop.requested()
                if at_step % config.log_every_steps == 0 or at_step == last_step:
                    values = step_metrics.pop_means() | {"data/corrupt": num_corrupt()}
                    values |= {
                        "learning_rate": float(run.programs.schedule(at_step - 1)),
                        "epoch": at_step / run.steps_per_epoch,
                    }
                    run.reporter.train(at_step, values, batches.pop_seconds_waited())
                    run.checkpointer.check()
                # None shortly before the last step, which is evaluated anyway.
                due = at_step % eval_every == 0 and last_step - at_step >= eval_every / 2
                results = evaluate(run, train_state, at_step) if due or at_step == last_step else None
                if results or stop or at_step % config.checkpoint_every_steps == 0:
                    save(results and results.get("eval_ema/top1", results["eval/top1"]))
                    run.reporter.restart_clock(at_step)
                    batches.pop_seconds_waited()
                if stop:
                    break
        except errors.DataError as error:
            if jax.process_count() > 1 or at_step == start_step:
                raise
            save()  # Alone, so that none waits in a step that will not come.
            raise errors.DataError(f"{error}. Step {at_step} is saved; the same command resumes") from None
    return train_state, results


def evaluate(run: Run, train_state, at_step) -> dict[str, float]:
    """Evaluates raw and EMA weights in one pass over the evaluation split, and reports."""
    config = run.config
    batch_size = config.eval_batch_size or config.batch_size

    def watched(batches):
        for number, batch in enumerate(batches):
            run.watchdog.doing(f"batch {number} of the evaluation of step {at_step}")
            yield batch

    with data.eval_batches(run.eval_source, config.data, batch_size=batch_size, **_share()) as loader:
        batches = watched(sharding.DeviceBatches(loader, run.programs.mesh))
        sums = step.evaluate(run.programs.eval_step, train_state.weights(), batches)
        corrupt = int(distributed.gather(loader.num_corrupt).sum())
    if not sums["eval"]["count"]:
        raise errors.DataError(
            f"no image of {config.data.eval_split!r} could be read, {corrupt} are corrupt; see the warnings above"
        )
    results = {f"{name}/{key}": value for name, total in sums.items() for key, value in step.means(total).items()}
    results |= {"eval/count": sums["eval"]["count"], "eval/corrupt": corrupt}
    run.reporter.evaluation(at_step, results)
    return results


def roll_back(run: Run, position, error: errors.NonFiniteLoss) -> tuple[state.TrainState, dict[str, Any]]:
    """With on_non_finite="skip": the last checkpoint, from which the batches up to the bad step are left out.

    Raises:
        NonFiniteLoss: with "stop", without a checkpoint, and after too many rollbacks; with advice.
    """
    run.watchdog.doing("going back to a checkpoint")
    run.checkpointer.wait()
    last = run.checkpointer.latest_step()
    rollbacks = position.get("rollbacks", 0)
    if run.config.on_non_finite == "stop" or last is None or rollbacks == MAX_ROLLBACKS:
        error.args = (f"{error}. {_advice(run, last, rollbacks)}",)
        raise error
    train_state, restored = run.checkpointer.restore(run.programs.abstract_state)
    step_after = int(train_state.step)
    skipped = error.step - step_after
    restored |= {"skipped_batches": position.get("skipped_batches", 0) + skipped, "rollbacks": rollbacks + 1}
    logging.warning("%s. Back to checkpoint %d, past %d batches", error, step_after, skipped)
    run.reporter.rewind(step_after)
    return train_state, restored


def _advice(run, last, rollbacks):
    saved = "No checkpoint was saved before" if last is None else f"Last good checkpoint: {run.workdir}/checkpoints/{last}"
    if run.config.on_non_finite == "stop":
        besides = ", or on_non_finite=skip"
    else:
        besides = f"; it went back {rollbacks} times" if rollbacks else ", or a smaller checkpoint_every_steps"
    return (
        f"{saved}. Try a lower schedule.learning_rate, more schedule.warmup_epochs, optimizer.clip_norm=1, "
        f"model.dtype=float32{besides}"
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
        try:
            plots.learning_curve([run.workdir], run.workdir / "learning_curve.png")
        except OSError as error:
            logging.warning("No picture of the learning curve: %s", error)
        scores = ", ".join(f"{key} {value:.4f}" for key, value in results.items() if key.endswith("top1"))
        status = f"done in {elapsed}" if at_step > start_step else f"nothing to do, step {at_step} was the last"
        print(
            f"{status}: {scores}\n  results     {run.workdir}/metrics.jsonl, learning_curve.png\n"
            f"  checkpoint  {run.workdir}/checkpoints/{at_step}",
            flush=True,
        )
    return 0


def describe_data(config, source: data.Source) -> dict:
    """What, with the step and the seed, fixes the batches to come; saved in every checkpoint."""
    return {"batch_size": config.batch_size, "num_examples": len(source), "class_names": list(source.class_names)}


def check_same_data(saved: dict, now: dict) -> None:
    """Refuses other classes, whose labels would lie; names other changes, after which batches are not what they would have been."""
    if saved["class_names"] != now["class_names"]:
        changed = sorted(set(saved["class_names"]) ^ set(now["class_names"])) or ["their order"]
        raise errors.CheckpointError(
            f"the checkpoint was trained on {len(saved['class_names'])} classes, the data has {len(now['class_names'])}, and they "
            f"differ in {', '.join(changed[:5])}; give the data that it was trained on, or another --workdir"
        )
    for key in ("num_examples", "batch_size"):
        if saved[key] != now[key]:
            logging.warning(
                "%s was %d and is %d: batches from here on are not those of an undisturbed run", key, saved[key], now[key]
            )


def _share():
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


if __name__ == "__main__":
    command_line.run(main, required_flags=("config", "workdir"))
