"""Reports the progress of a run: `metrics.jsonl`, TensorBoard files, and lines on the terminal."""

import contextlib
import json
import math
import os
import re
import time
from typing import Any

import jax
from absl import logging
from etils import epath

from halonet_jax.errors import NonFiniteLoss, StorageError
from halonet_jax.runtime import storage
from halonet_jax.runtime.tensorboard import TensorBoard


class StepMetrics:
    """Collects the metrics of every step since the last report.

    They stay on the device until a report or a checkpoint asks for them, so that steps are dispatched ahead. They are part of
    a checkpoint, so that a resumed run's next report covers the same steps as that of an undisturbed run.

    Args:
        collected: from a checkpoint.
    """

    IN_FLIGHT = 2  # steps dispatched ahead; more would only hold memory

    def __init__(self, collected: list[dict[str, float]] = ()):
        self._host = list(collected)
        self._device = []

    def append(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of a step. Waits until the step `IN_FLIGHT` before it is done.

        Args:
            step: its number.
            metrics: float scalars, "loss" and "grad_norm" among them.
        """
        self._device.append((step, metrics))
        if len(self._device) > self.IN_FLIGHT:
            jax.block_until_ready(self._device[-1 - self.IN_FLIGHT])

    def collected(self) -> list[dict[str, float]]:
        """Returns a new list of the metrics of each step, as Python floats.

        Raises:
            NonFiniteLoss: the loss or gradient norm of a step is not finite. The error names the first such step.
        """
        for step, metrics in jax.device_get(self._device):
            metrics = {key: float(value) for key, value in metrics.items()}
            if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
                raise NonFiniteLoss(step, f"loss is {metrics['loss']}, gradient norm {metrics['grad_norm']}")
            self._host.append(metrics)
        self._device.clear()
        return list(self._host)

    def pop_means(self) -> dict[str, float]:
        """Returns the means over the steps since the last call, as "train/<metric>".

        Raises:
            NonFiniteLoss: as for `collected`.
        """
        collected, self._host = self.collected(), []
        return {f"train/{key}": math.fsum(m[key] for m in collected) / len(collected) for key in collected[0]}


class Reporter:
    """Writes reports under `workdir` and prints progress.

    `metrics.jsonl` holds one JSON object per report, with "step" first. A run that dies after its last checkpoint leaves reports
    of steps that are done again. They are dropped. If no report is left, the old file stays as `metrics.jsonl.bak`.

    Args:
        workdir: of the run.
        start_step: number of steps done.
        last_step: after which the run ends.
        batch_size: global, for rates in images per second.
        enabled: False on all processes but the first. Then nothing is written or printed.
        tensorboard: whether to write TensorBoard files too.
        primary_metric: the metric of evaluations to print, without "eval/".

    Raises:
        StorageError: `metrics.jsonl` cannot be written.
    """

    def __init__(
        self,
        workdir: str | epath.Path,
        *,
        start_step: int,
        last_step: int,
        batch_size: int,
        enabled: bool = True,
        tensorboard: bool = False,
        primary_metric: str = "top1",
    ):
        self._enabled = enabled
        self._last_step, self._batch_size, self._primary_metric = last_step, batch_size, primary_metric
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self.rewind(start_step)
        self._tensorboard = TensorBoard(workdir) if enabled and tensorboard else None
        self.start_clock(start_step)

    def rewind(self, step: int) -> None:
        """Drops the reports of later steps, because these steps are done again.

        Args:
            step: the last step whose reports stay.

        Raises:
            StorageError: `metrics.jsonl` cannot be written.
        """
        if not self._enabled:
            return
        with self._writing():
            reports = read_metrics(self._path.parent)
            self._lines = [json.dumps(report) + "\n" for report in reports if report["step"] <= step]
            if reports and not self._lines:
                self._path.replace(self._path.with_suffix(".jsonl.bak"))
            temporary = self._path.with_suffix(".jsonl.tmp")
            temporary.write_text("".join(self._lines))
            temporary.replace(self._path)

    def start_clock(self, step: int) -> None:
        """Starts the clock of rates and ETA, so that they leave out compiling.

        Args:
            step: the last step that is done.
        """
        self._begin = self._clock = (step, time.monotonic())

    def restart_clock(self, step: int) -> None:
        """Starts the clock of the next rate, so that it leaves out evaluating and saving. The ETA includes them.

        Args:
            step: the last step that is done.
        """
        self._clock = (step, time.monotonic())

    def train(self, step: int, values: dict[str, float], seconds_waited: float) -> None:
        """Reports training metrics with the rate since the last report, and prints the progress line.

        Args:
            step: the last step that is done.
            values: by name, "train/loss" among them.
            seconds_waited: for input, since the last report or restart of the clock.

        Raises:
            StorageError: as for `write`.
        """
        since_step, since = self._clock
        seconds = time.monotonic() - since
        if step > since_step:
            rates = {
                "images_per_second": self._batch_size * (step - since_step) / seconds,
                "input_wait": min(seconds_waited / seconds, 1.0),
            }
            values = {**values, **rates}
        self.write(step, values)
        if self._enabled:
            parts = [f"step {step}/{self._last_step} ({100 * step // self._last_step}%)", f"loss {values['train/loss']:.4f}"]
            if step > since_step:
                parts.append(f"{values['images_per_second']:,.0f} img/s")
                parts.append(f"input wait {values['input_wait']:.0%}")
                parts.append(f"ETA {format_seconds(self._seconds_left(step))}")
            print("  ".join(parts), flush=True)
        self.restart_clock(step)

    def estimate(self, step: int) -> None:
        """Prints when the run will end, judged by the steps since the clock was started.

        Args:
            step: the last step that is done.
        """
        if self._enabled and step > self._begin[0]:
            left = self._seconds_left(step)
            end = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + left))
            rate = self._batch_size * (self._last_step - step) / left if left else 0
            print(f"about {rate:,.0f} img/s: {format_seconds(left)} to go, done about {end}, evaluations apart", flush=True)

    def _seconds_left(self, step):
        begin_step, begin = self._begin
        return (self._last_step - step) * (time.monotonic() - begin) / (step - begin_step)

    def evaluation(self, step: int, results: dict[str, float]) -> None:
        """Reports an evaluation and prints its primary metric.

        Args:
            step: that was evaluated.
            results: "eval/<metric>" and "eval_ema/<metric>", with "eval/count".

        Raises:
            StorageError: as for `write`.
        """
        self.write(step, results)
        if self._enabled:
            label = metric_label(self._primary_metric)
            keys = [(name, f"{name}/{self._primary_metric}") for name in ("eval", "eval_ema")]
            scores = [f"{name} {label} {results[key]:.4f}" for name, key in keys if key in results]
            print(f"step {step}/{self._last_step}  {'  '.join(scores)}  ({results['eval/count']} images)", flush=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one report.

        Args:
            step: the last step that is done.
            values: numbers by name. One that is not finite is written as null.

        Raises:
            StorageError: `metrics.jsonl` cannot be written.
        """
        if not self._enabled:
            return
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._lines.append(json.dumps({"step": step, **finite}) + "\n")
        with self._writing():
            if "://" in str(self._path):  # object stores cannot append
                self._path.write_text("".join(self._lines))
            else:
                with self._path.open("a") as file:
                    file.write(self._lines[-1])
                    file.flush()
                    os.fsync(file.fileno())  # a checkpoint of this step may follow, after which it is not reported again
        if self._tensorboard:
            self._tensorboard.write(step, values)

    def close(self) -> None:
        """Closes the TensorBoard files."""
        if self._tensorboard:
            self._tensorboard.close()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self._path} cannot be written ({storage.reason(error)}); the last checkpoint is safe: {storage.remedy(error)}, "
                "then the same command resumes"
            ) from None


def read_metrics(workdir: str | epath.Path) -> list[dict[str, Any]]:
    """Returns the reports in `workdir/metrics.jsonl`, in order. Lines that are no whole report are left out with a warning.

    A report has a step number, and a number or None by every other key.

    Args:
        workdir: of the run. Without the file, there are no reports.

    Raises:
        OSError: the file cannot be read.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    reports = []
    for line in lines:
        try:
            report = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: JSON and UTF-8 faults, integers of thousands of digits
            report = None
        if _is_report(report):
            reports.append(report)
        elif line.strip():
            logging.warning("%s has a torn line, left out: %.60r", path, line.decode(errors="replace"))
    return reports


def _is_report(report):
    if not isinstance(report, dict):
        return False
    numbers = [value for value in report.values() if value is not None]
    step = report.get("step")
    return type(step) is int and step >= 0 and all(type(value) in (int, float) and abs(value) < 1e300 for value in numbers)


def last_evaluation(workdir: str | epath.Path) -> dict[str, Any]:
    """Returns the newest report with an evaluation, one whose keys begin with "eval/"; without any, an empty dict.

    Args:
        workdir: of the run.
    """
    evaluated = lambda report: any(key.startswith("eval/") for key in report)
    return next(filter(evaluated, reversed(read_metrics(workdir))), {})


def metric_label(metric: str) -> str:
    """Returns a metric's name for the reader: "top-1" for "top1", "mean overlap" for "mean_overlap".

    Args:
        metric: as the task names it.
    """
    return re.sub(r"(?<=[a-z])(?=[0-9])", "-", metric).replace("_", " ")


def format_seconds(seconds: float) -> str:
    """Returns "12:07", or "3:12:07" from an hour on.

    Args:
        seconds: a duration.
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
