"""Trains a recipe, or resumes it where its workdir has a checkpoint.

    python -m halonet_jax.train --config=configs/digits.py --workdir=runs/digits [--config.batch_size=128 …]

Several hosts run the same command. TPU slices and Slurm are recognised; elsewhere give --coordinator_address,
--num_processes and --process_id. docs/training.md describes the workdir and the exit codes.

In Python, `train(config, workdir)` does the same and returns a `Result`; it can be called again in the same process.
"""

import contextlib
import dataclasses
import time
from typing import Any

import jax
import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from halonet_jax import __version__, command_line, starting, tasks
from halonet_jax import config as config_lib
from halonet_jax.errors import Stopped
from halonet_jax.runtime import distributed, lease, plots, profiling, reporting, stopping
from halonet_jax.runtime import workdir as workdir_lib
from halonet_jax.tasks.inputs import Inputs
from halonet_jax.training import checkpoint, loop, programs, sharding
from halonet_jax.training.progress import Progress


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        exit_code: 0, or 75 if a signal stopped the run.
        step: the last step that was done.
        metrics: the newest evaluation, such as `{"eval/top1": 0.99, "eval_ema/top1": 0.99, …}`; empty before the first.
        best_step: of the checkpoint that evaluated best; None before the first evaluation.
        workdir: the run's folder.
    """

    exit_code: int
    step: int
    metrics: dict[str, float]
    best_step: int | None
    workdir: str


def train(config: ml_collections.ConfigDict, workdir: str) -> Result:
    """Runs the whole recipe, or what is left of it.

    Args:
        config: such as a recipe's `get_config()`.
        workdir: folder of the run, local or `gs://`; created where it is missing.

    Raises:
        ConfigError, DataError, CheckpointError: for bad input, most of it before anything is compiled.
        DistributedError: where another process failed.
        NonFiniteLoss: where training diverged; names the step and the last good checkpoint.
        StorageError: where the workdir can no longer be written.
    """
    begin = time.monotonic()
    definition = tasks.find(config)
    sharding.use_cpu_cores(config_lib.independent_parts(config))  # before anything asks JAX for its devices
    config_lib.validate(config, jax.device_count())
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stopping.StopRequest())
        watchdog = stack.enter_context(stopping.Watchdog(config.hang_timeout))
        try:
            run, state, progress = prepare(config, workdir, definition, stack, stop, watchdog)
            start_step = int(state.step)
            outcome = loop.run(run, state, progress)
            del state  # donated
        except Stopped:
            print(f"{stop.signal}: nothing was done yet, so nothing is saved; the same command resumes", flush=True)
            return Result(stopping.EXIT_PREEMPTED, 0, {}, None, str(workdir))
        run.watchdog.doing("writing the last checkpoint")
        run.checkpointer.wait()
        elapsed = reporting.format_seconds(time.monotonic() - begin)
        return finish(run, outcome, start_step, elapsed)


def prepare(
    config: ml_collections.ConfigDict,
    workdir: str,
    definition: tasks.Definition,
    stack: contextlib.ExitStack,
    stop: stopping.StopRequest,
    watchdog: stopping.Watchdog,
) -> tuple[loop.Run, Any, Progress]:
    """Everything up to the first step: config to data to state to programs.

    Args:
        config: validated.
        workdir: as `train` takes it.
        definition: of the config's task.
        stack: closes what is opened here.
        stop: interrupts calls that block.
        watchdog: gets the name of each activity.

    Returns:
        The run, the state to start from, and the progress that belongs to it.
    """
    clock = reporting.StartUpClock()
    is_writer = jax.process_index() == 0
    distributed.check_same("config or version", config_lib.to_json(config) + __version__ + jax.__version__)

    # Data: it fixes the number of classes and of steps.
    watchdog.doing("opening the data")

    def open_data():
        with distributed.together("opening the data"):
            return [definition.open_source(config, split) for split in (config.data.train_split, config.data.eval_split)]

    train_source, eval_source = stop.interruptible(open_data)
    metadata = definition.metadata(config, train_source)
    distributed.check_same("data set", f"{len(train_source)} {len(eval_source)} {metadata}")
    steps_per_epoch = len(train_source) / config.batch_size
    total_steps = max(1, round(config.num_epochs * steps_per_epoch)) if config.num_epochs else config.max_steps
    last_step = min(total_steps, config.max_steps or total_steps)
    watchdog.doing("opening the workdir")
    held = lease.Lease(workdir_lib.locate(workdir))
    stack.callback(held.release)
    stop.interruptible(lambda: held.acquire(lambda: watchdog.doing("waiting for the workdir's lease")))
    workdir = stop.interruptible(lambda: workdir_lib.open_workdir(config, workdir))
    workdir_lib.use_compile_cache(workdir)
    _warn_of_batch_norm_groups(config)
    clock.lap("data")

    # State: shapes first, so that it is created, or restored, with its final sharding.
    mesh = sharding.make_mesh(config.mesh.fsdp)
    task = definition.make_task(config, metadata)
    program = programs.make_programs(config, task, mesh, total_steps, steps_per_epoch)
    checkpointer = checkpoint.Checkpointer(workdir / "checkpoints", config.checkpoints_to_keep)
    stack.callback(checkpointer.close)
    progress = Progress(metadata, len(train_source), config.batch_size)
    watchdog.doing("creating or restoring the state")
    if checkpointer.latest_step() is None:
        create = lambda: starting.create(config, task, program)
        state = stop.interruptible(lambda: jax.block_until_ready(create()))
    else:
        restore = lambda: checkpointer.restore(program.abstract_state, program.create_state)
        state, record = stop.interruptible(lambda: jax.block_until_ready(restore()))
        progress = Progress.from_record(record).continue_with(progress)
    clock.lap("state")
    start_step = int(state.step)

    if is_writer:  # Only now: a config that does not fit the checkpoint leaves the workdir as it was.
        workdir_lib.record_run(config, workdir, last_step)
        _print_start(config, state, len(train_source), metadata, start_step, last_step, program)
    reporter = reporting.Reporter(
        workdir, start_step=start_step, last_step=last_step, batch_size=config.batch_size, enabled=is_writer,
        tensorboard=config.tensorboard, primary_metric=task.primary_metric,
    )  # fmt: skip
    stack.callback(reporter.close)
    profile = profiling.ProfileWindow(config.profile_steps, workdir / "profile", enabled=is_writer)
    stack.callback(profile.close)
    run = loop.Run(
        config=config, task=task, workdir=workdir, lease=held, programs=program,
        inputs=Inputs(config, task, train_source, eval_source), steps_per_epoch=steps_per_epoch, last_step=last_step,
        checkpointer=checkpointer, reporter=reporter, profile=profile, watchdog=watchdog, stop=stop, clock=clock,
    )  # fmt: skip
    return run, state, progress


def finish(run: loop.Run, outcome: loop.Outcome, start_step: int, elapsed: str) -> Result:
    """Draws the learning curve, prints where results are, and returns the `Result`.

    Args:
        run: the run.
        outcome: how the loop ended.
        start_step: from which it started.
        elapsed: time taken, as text.
    """
    is_writer, metric = jax.process_index() == 0, run.task.primary_metric
    newest = reporting.last_evaluation(run.workdir)
    best_step = run.checkpointer.best_step()
    if outcome.stopped:
        if is_writer:
            done = f"saved step {outcome.step}" if outcome.saved else "there was no step since the last start, nothing to save"
            print(f"{run.stop.signal}: {done} after {elapsed}; the same command resumes", flush=True)
        return Result(stopping.EXIT_PREEMPTED, outcome.step, newest, best_step, str(run.workdir))
    if is_writer:
        try:
            plots.learning_curve([run.workdir], run.workdir / "learning_curve.png", metric)
        except Exception as error:  # a picture is worth no run, whatever is wrong with fonts, caches or the disk
            logging.warning("No picture of the learning curve: %s", " ".join(str(error).split()) or type(error).__name__)
        results = outcome.evaluation or newest
        keys = [key for key in (f"eval/{metric}", f"eval_ema/{metric}") if results.get(key) is not None]
        scores = ", ".join(f"{key} {results[key]:.4f}" for key in keys)
        done = outcome.step > start_step
        status = f"done in {elapsed}" if done else f"nothing to do, step {outcome.step} was the last"
        print(
            f"{status}: {scores}\n  results     {run.workdir}/metrics.jsonl, learning_curve.png\n"
            f"  checkpoint  {run.workdir}/checkpoints/{outcome.step}",
            flush=True,
        )
    return Result(0, outcome.step, outcome.evaluation or newest, best_step, str(run.workdir))


def _warn_of_batch_norm_groups(config):
    per_device = config.batch_size // config.optimizer.accumulation_steps // jax.device_count()
    if config.model.bn_group_size and per_device % config.model.bn_group_size and jax.process_index() == 0:
        message = "Batch-norm groups of %d images span devices, which hold %d each: their statistics travel in every layer"
        logging.warning(message, config.model.bn_group_size, per_device)


def _print_start(config, state, num_examples, metadata, start_step, last_step, program):
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    hosts = f" on {jax.process_count()} hosts, {config.batch_size // jax.process_count()} images each"
    print(
        f"{config.model.name}: {parameters:,} parameters, {num_examples:,} images, {len(metadata.get('class_names', []))} classes; "
        f"step {start_step} of {last_step}, batch {config.batch_size} on {jax.device_count()} {jax.devices()[0].device_kind} "
        f"device(s){hosts if jax.process_count() > 1 else ''}, mesh {dict(program.mesh.shape)}\n  {program.description}",
        flush=True,
    )


def define_flags() -> None:
    """Defines the flags of the command; not on import, so that several entries can be imported together."""
    config_flags.DEFINE_config_file("config", help_string="Recipe, such as configs/h4.py or configs/h4.py:smoke.")
    flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://; created if missing, else resumed.")


def main() -> int:
    """Runs the command and returns its exit code."""
    return train(flags.FLAGS.config, flags.FLAGS.workdir).exit_code


if __name__ == "__main__":
    define_flags()
    command_line.run(main, required_flags=("config", "workdir"))
