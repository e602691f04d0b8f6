"""Reports of a run: `metrics.jsonl`, TensorBoard beside it, and a progress line on the terminal."""

import concurrent.futures
import contextlib
import json
import math
import os
import sys
import time

import jax
from absl import logging
from etils import epath

from halonet_jax import STARTED
from halonet_jax.errors import NonFiniteLoss, StorageError
from halonet_jax.runtime import storage
from halonet_jax.runtime.workdir import locate

_LABELS = {"top1": "top-1", "box_ap": "box AP"}  # of metrics on the terminal, where the name is not what people call it


class StepMetrics:
    """Collects the metrics of every step since the last report.

    They stay on the device until a report or a checkpoint asks for them, so that steps are dispatched ahead. They are part of
    a checkpoint: a resumed run's next report then covers the very steps that it would have covered.

    Args:
        collected: what a checkpoint holds of them.
    """

    IN_FLIGHT = 2  # steps dispatched ahead; more would only hold memory

    def __init__(self, collected: list[dict[str, float]] = ()):
        self._host = list(collected)
        self._device = []

    def append(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of a step. Blocks until the step `IN_FLIGHT` before it is done.

        Args:
            step: its number.
            metrics: scalars by name, "loss" and "grad_norm" among them.
        """
        self._device.append((step, metrics))
        if len(self._device) > self.IN_FLIGHT:
            jax.block_until_ready(self._device[-1 - self.IN_FLIGHT])

    def collected(self) -> list[dict[str, float]]:
        """Returns the metrics of each step as Python floats. The list is the caller's.

        Raises:
            NonFiniteLoss: the loss or gradient norm of a step is not finite; it names the first one.
        """
        for step, metrics in jax.device_get(self._device):
            metrics = {key: float(value) for key, value in metrics.items()}
            if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
                raise NonFiniteLoss(step, f"loss is {metrics['loss']}, gradient norm {metrics['grad_norm']}")
            self._host.append(metrics)
        self._device.clear()
        return [dict(metrics) for metrics in self._host]

    def pop_means(self) -> dict[str, float]:
        """Returns the means over the steps since the last call, as "train/…".

        Raises:
            NonFiniteLoss: as `collected`.
        """
        collected, self._host = self.collected(), []
        return {f"train/{key}": math.fsum(m[key] for m in collected) / len(collected) for key in collected[0]}


class StartUpClock:
    """What the time from the start of the process to the first step goes into."""

    def __init__(self):
        self._laps, self._since, self._finished = {}, STARTED, False
        self.lap("imports and devices")

    def lap(self, name: str) -> None:
        """Ends a part.

        Args:
            name: of the part.
        """
        now = time.monotonic()
        self._laps[name], self._since = now - self._since, now

    def finish(self, name: str) -> None:
        """Ends the last part and prints all of them. A later call, as after a roll-back, does nothing.

        Args:
            name: of the last part.
        """
        if not self._finished:
            self.lap(name)
            parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._laps.items())
            if jax.process_index() == 0:
                print(f"first step done after {self._since - STARTED:.1f} s: {parts}", flush=True)
        self._finished = True


class Reporter:
    """Writes reports to a workdir and to the terminal.

    `metrics.jsonl` holds one JSON object a report, with "step" first. Reports of steps after `start_step`, left by a run that
    died later than its last checkpoint, are dropped: their steps are run again. Where that leaves none, because there is no
    checkpoint, the old file stays as `metrics.jsonl.bak`.

    Args:
        workdir: folder of the run.
        start_step: from which the run starts.
        last_step: at which it will end.
        batch_size: global, for rates.
        enabled: False on all processes but one: nothing is written or printed.
        tensorboard: whether to write TensorBoard's files too.
        primary_metric: of the task, which the terminal shows.

    Raises:
        StorageError: the reports cannot be written.
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
        self._enabled, self._metric = enabled, primary_metric
        self._last_step, self._batch_size = last_step, batch_size
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._tensorboard = None
        self.rewind(start_step)
        if enabled and tensorboard:
            # In a thread: importing TensorFlow takes seconds, in which the train step can compile.
            self._tensorboard = concurrent.futures.ThreadPoolExecutor(1).submit(_tensorboard_writer, workdir)
        self.start_clock(start_step)

    def rewind(self, step: int) -> None:
        """Drops reports of steps that will run again.

        Args:
            step: the last one whose reports stay.

        Raises:
            StorageError: the file cannot be written.
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
        """Leaves out of rates and ETA what came before, such as compiling.

        Args:
            step: the one just done.
        """
        self._begin = self._clock = (step, time.monotonic())

    def restart_clock(self, step: int) -> None:
        """Leaves out of the next rate what came before, such as an evaluation. The ETA keeps it in.

        Args:
            step: the one just done.
        """
        self._clock = (step, time.monotonic())

    def train(self, step: int, values: dict[str, float], seconds_waited: float) -> None:
        """Reports training metrics with the rate since the last report, and prints the progress line.

        Args:
            step: the one just done.
            values: scalars by name, "train/loss" among them.
            seconds_waited: for input since the last report or restart of the clock.

        Raises:
            StorageError: the report cannot be written.
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
        """Prints when the run will end, by the steps since the clock was started.

        Args:
            step: the one just done.
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
            step: of the weights.
            results: scalars such as "eval/top1" and "eval_ema/top1", with "eval/count".

        Raises:
            StorageError: the report cannot be written.
        """
        self.write(step, results)
        if self._enabled:
            label = _LABELS.get(self._metric, self._metric)
            keys = {name: f"{name}/{self._metric}" for name in ("eval", "eval_ema")}
            scores = [f"{name} {label} {results[key]:.4f}" for name, key in keys.items() if key in results]
            print(f"step {step}/{self._last_step}  {'  '.join(scores)}  ({results['eval/count']} examples)", flush=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one report.

        Args:
            step: that it is about.
            values: scalars by name. One that is not finite is written as null.

        Raises:
            StorageError: the report cannot be written.
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
        self._to_tensorboard(lambda writer: writer.write_scalars(step, values))

    def close(self) -> None:
        """Flushes TensorBoard."""
        self._to_tensorboard(lambda writer: writer.close())

    def _to_tensorboard(self, call):
        if self._tensorboard:
            try:
                writer = self._tensorboard.result()
                if writer:
                    call(writer)
            except Exception as error:  # of many types, some from the writer's thread; training can do without
                self._tensorboard = None
                logging.warning("No more TensorBoard files, only metrics.jsonl: %s", str(error).splitlines()[0])

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self._path} cannot be written ({storage.reason(error)}); the last checkpoint is safe: {storage.remedy(error)}, "
                "then the same command resumes"
            ) from None


def read_metrics(workdir: str | epath.Path) -> list[dict[str, float | None]]:
    """Returns the reports in `workdir/metrics.jsonl`, in order. A line that is no report, as a crash leaves one, is left out.

    Args:
        workdir: folder of a run.
    """
    path, reports = locate(str(workdir)) / "metrics.jsonl", []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        if line.strip():
            report = _parse(line)
            if report is None:
                logging.warning("%s has a torn line, left out: %.60r", path, line.decode(errors="replace"))
            else:
                reports.append(report)
    return reports


def _parse(line):
    """The report of a line, "step" and scalars; None where it is something else."""
    try:
        report = json.loads(line.decode())
    except (ValueError, RecursionError):  # ValueError: no JSON, no UTF-8, a number of thousands of digits
        return None
    if not isinstance(report, dict) or type(report.get("step")) is not int:
        return None
    finite = lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max
    return report if all(value is None or finite(value) for value in report.values()) else None


def last_evaluation(workdir: str | epath.Path) -> dict[str, float | None]:
    """Returns the newest report that holds an evaluation; empty where there is none.

    Args:
        workdir: folder of a run.
    """
    return next((report for report in reversed(read_metrics(workdir)) if any(key.startswith("eval/") for key in report)), {})


def format_seconds(seconds: float) -> str:
    """Returns a time as 12:07, or 3:12:07 from an hour on.

    Args:
        seconds: the time.
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _tensorboard_writer(workdir):
    try:
        # Here, since TensorFlow takes seconds and may be missing; it must not take the GPU's memory either.
        import tensorflow as tf
        from clu import metric_writers

        tf.config.set_visible_devices([], "GPU")
        return metric_writers.AsyncWriter(metric_writers.SummaryWriter(os.fspath(workdir)))
    except ImportError as error:
        logging.warning("No TensorBoard files, only metrics.jsonl: %s", error)
        return None
