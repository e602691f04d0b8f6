"""The training loop: steps, reports, checkpoints, evaluations. It serves every task.

Reports, evaluations and checkpoints come at fixed step numbers, so a resumed run repeats none and skips none. A due step is
saved before it is evaluated, so a stop or a crash during the evaluation loses nothing.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
from absl import logging
from etils import epath

from halonet_jax.errors import DataError, NonFiniteLoss, Stopped
from halonet_jax.runtime import distributed, lease, profiling, reporting, stopping
from halonet_jax.training import evaluation, sharding
from halonet_jax.training.checkpoint import Checkpointer
from halonet_jax.training.programs import Programs
from halonet_jax.training.progress import Progress
from halonet_jax.training.state import TrainState
from halonet_jax.training.task import Task

MAX_ROLLBACKS = 5  # of one run; the next loss that is not finite stops it


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that stays the same while a run lasts.

    Attributes:
        config: the whole config.
        task: the config's.
        workdir: the run's folder.
        lease: held on the workdir; checked before anything is written there.
        programs: the compiled steps.
        inputs: makes loaders; a `halonet_jax.tasks.inputs.Inputs`.
        steps_per_epoch: of the training split; a fraction where a batch does not divide it.
        last_step: number of the step after which the run ends.
        checkpointer: of `workdir/checkpoints`.
        reporter: writes `metrics.jsonl` and the progress lines.
        profile: the steps to trace.
        watchdog: ends the process where nothing happens for too long.
        stop: notes signals.
        clock: measures the time to the first step.
    """

    config: ml_collections.ConfigDict
    task: Task
    workdir: epath.Path
    lease: lease.Lease
    programs: Programs
    inputs: Any
    steps_per_epoch: float
    last_step: int
    checkpointer: Checkpointer
    reporter: reporting.Reporter
    profile: profiling.ProfileWindow
    watchdog: stopping.Watchdog
    stop: stopping.StopRequest
    clock: reporting.StartUpClock

    @functools.cached_property
    def eval_every(self) -> int:
        """Steps between evaluations: at least 1, and all of the run where `eval_every_epochs` is 0."""
        every = self.config.eval_every_epochs
        return max(1, round(every * self.steps_per_epoch)) if every else self.last_step

    def evaluation_is_due(self, step: int) -> bool:
        """Whether `step` is evaluated. Not shortly before the last step, which always is."""
        return step == self.last_step or (step % self.eval_every == 0 and self.last_step - step >= self.eval_every / 2)


class Outcome(NamedTuple):
    """How a call of `run` ended.

    Attributes:
        step: the last step that was done.
        evaluation: the report of its evaluation; None where it was not evaluated now.
        stopped: a signal ended the run early.
        saved: steps were done, and they are in a checkpoint.
    """

    step: int
    evaluation: dict[str, float] | None
    stopped: bool = False
    saved: bool = True


def run(run: Run, state: TrainState, progress: Progress) -> Outcome:
    """Trains from `state` to the last step, through roll-backs, or to a signal.

    Args:
        run: from `halonet_jax.train.prepare`.
        state: new, or restored; it is donated.
        progress: restored with it.

    Raises:
        DataError, NonFiniteLoss, StorageError: as `halonet_jax.train.train`.
    """
    while True:
        try:
            return _run_steps(run, state, progress)
        except NonFiniteLoss as error:
            state, progress = _roll_back(run, progress, error)


def _run_steps(run, state, progress):
    config, last_step = run.config, run.last_step
    start_step = at_step = int(state.step)
    step_metrics = reporting.StepMetrics(progress.step_metrics)
    estimate_at = min(start_step + 5, last_step - 1)
    results, stop = None, False

    def save():
        run.watchdog.doing(f"saving step {at_step}")
        run.lease.check()
        now = dataclasses.replace(progress, step_metrics=step_metrics.collected(), num_corrupt=num_corrupt())
        run.checkpointer.save(state, now.to_record())

    def num_corrupt():
        return progress.num_corrupt + int(distributed.gather(batches.num_corrupt).sum())

    def score():
        results = evaluate(run, state, at_step)
        run.checkpointer.set_score(at_step, _score(run.task, results))
        return results

    if _evaluation_is_missing(run, start_step):
        try:
            results = score()  # which the last start did not finish
        except Stopped:
            return Outcome(at_step, None, stopped=True, saved=False)
    if start_step >= last_step:
        return Outcome(at_step, results)
    run.watchdog.doing("waiting for the first batch")
    loader = run.inputs.train_batches(start_step + progress.skipped_batches)
    with sharding.DeviceBatches(loader, run.programs.mesh, check=run.stop.check) as batches:
        try:
            for next_step, batch in zip(range(start_step + 1, last_step + 1), batches):
                run.profile.before(next_step)
                if at_step == start_step:
                    run.clock.lap("first batch")
                    run.watchdog.doing("compiling and the first step")
                    first_step = functools.partial(run.programs.train_step, state, batch)
                    state, metrics = run.stop.interruptible(lambda step=first_step: jax.block_until_ready(step()))
                    run.clock.finish("compiling and the first step")
                    run.reporter.start_clock(next_step)
                    batches.pop_seconds_waited()
                else:
                    run.watchdog.doing(f"step {next_step}")
                    state, metrics = run.programs.train_step(state, batch)
                at_step = next_step
                step_metrics.append(at_step, metrics)
                run.profile.after(at_step, metrics)
                if at_step == estimate_at:
                    jax.block_until_ready(metrics)
                    run.reporter.estimate(at_step)
                stop = run.stop.requested()
                if at_step % config.log_every_steps == 0 or at_step == last_step:
                    run.lease.check()
                    values = step_metrics.pop_means() | {
                        "data/corrupt": num_corrupt(),
                        "learning_rate": float(run.programs.schedule(at_step - 1)),
                        "epoch": at_step / run.steps_per_epoch,
                    }
                    run.reporter.train(at_step, values, batches.pop_seconds_waited())
                    run.checkpointer.check()
                due = run.evaluation_is_due(at_step)
                if due or stop or at_step % config.checkpoint_every_steps == 0:
                    save()
                results = score() if due and not stop else None
                if due or at_step % config.checkpoint_every_steps == 0:
                    run.reporter.restart_clock(at_step)
                    batches.pop_seconds_waited()
                if stop:
                    break
                run.watchdog.doing(f"waiting for the batch of step {at_step + 1}")
        except Stopped:  # while it waited for a batch, compiled or evaluated
            stop = True
            if at_step > start_step:
                save()  # does nothing where this step is saved already
        except DataError as error:
            if jax.process_count() > 1 or at_step == start_step:
                raise
            save()  # Alone, so that no other process waits in a step that will not come.
            raise DataError(f"{error}. Step {at_step} is saved; the same command resumes") from None
        run.watchdog.doing("closing the data loader")
    return Outcome(at_step, results, stopped=stop, saved=at_step > start_step)


def evaluate(run: Run, state: TrainState, at_step: int) -> dict[str, float]:
    """Evaluates raw and averaged weights in one pass over the evaluation split, and reports.

    Returns:
        The report: "eval/…" and "eval_ema/…" by metric, with "eval/count" and "eval/corrupt".

    Raises:
        Stopped: where a signal came. It is looked for at every batch, and while the result is computed.
        DataError: where not one image could be read.
    """
    loader = run.inputs.eval_batches()
    run.watchdog.doing(f"the evaluation of step {at_step}")

    def watched(batches) -> Iterator[dict]:
        for number, batch in enumerate(batches, start=1):
            run.watchdog.doing(f"batch {number} of the evaluation of step {at_step}")
            if run.stop.requested():
                raise Stopped(run.stop.signal)
            yield batch

    with sharding.DeviceBatches(loader, run.programs.mesh, check=run.stop.check) as batches:
        evaluators = evaluation.evaluate(
            run.programs.eval_step, run.task.evaluator, run.inputs.eval_source, state.weights(), watched(batches),
            run.stop.interruptible,
        )  # fmt: skip
        corrupt = int(distributed.gather(loader.num_corrupt).sum())
    run.watchdog.doing(f"the result of the evaluation of step {at_step}")
    found = {name: run.stop.interruptible(evaluator.result) for name, evaluator in evaluators.items()}
    if not found["eval"]["count"]:
        split = run.config.data.eval_split
        raise DataError(f"no image of {split!r} could be read, {corrupt} are corrupt; see the warnings above")
    report = {f"{name}/{key}": value for name, result in found.items() for key, value in result.items() if key != "count"}
    report |= {"eval/count": found["eval"]["count"], "eval/corrupt": corrupt}
    run.reporter.evaluation(at_step, report)
    return report


def _score(task, results):
    return results.get(f"eval_ema/{task.primary_metric}", results[f"eval/{task.primary_metric}"])


def _evaluation_is_missing(run, step):
    """Of the step that the run starts from: a stop or a crash came before or during its evaluation."""
    if step == 0 or not run.evaluation_is_due(step):
        return False
    missing = reporting.last_evaluation(run.workdir).get("step") != step
    return bool(distributed.gather(missing)[0])  # as process 0 sees the file


def _roll_back(run, progress, error):
    """With on_non_finite="skip": the last checkpoint, from which the batches up to the bad step are left out."""
    run.watchdog.doing("going back to a checkpoint")
    run.checkpointer.wait()
    last = run.checkpointer.latest_step()
    if run.config.on_non_finite == "stop" or last is None or progress.rollbacks == MAX_ROLLBACKS:
        error.args = (f"{error}. {_advice(run, last, progress.rollbacks)}",)
        raise error
    state, record = run.checkpointer.restore(run.programs.abstract_state, run.programs.create_state)
    restored, step_after = Progress.from_record(record), int(state.step)
    skipped = error.step - step_after
    logging.warning("%s. Back to checkpoint %d, past %d batches", error, step_after, skipped)
    run.reporter.rewind(step_after)
    return state, dataclasses.replace(
        restored, skipped_batches=progress.skipped_batches + skipped, rollbacks=progress.rollbacks + 1
    )


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
