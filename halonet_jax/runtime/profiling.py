"""Measures runs: traces of a few steps, for TensorBoard or Perfetto, and the time to the first step."""

import time
from typing import Any

import jax
from etils import epath

from halonet_jax import STARTED


class ProfileWindow:
    """Traces the steps from `first` to `last`.

    Args:
        steps: `(first, last)`, counted from 1; (): no trace.
        directory: folder that the trace is written to.
        enabled: False: no trace, whatever `steps` says.
    """

    def __init__(self, steps: tuple[int, ...], directory: epath.Path, enabled: bool = True):
        self._first, self._last = steps if steps and enabled else (0, 0)
        self._directory, self._running = directory, False

    def before(self, step: int) -> None:
        """Starts the trace at the first step of the window. Call it before each step.

        Args:
            step: number of the step, counted from 1.
        """
        if self._first <= step <= self._last and not self._running:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Ends the trace after the last step of the window. Call it after each step.

        Args:
            step: number of the step, counted from 1.
            results: arrays that the step returned. The trace waits for them.
        """
        if step >= self._last and self._running:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends a trace that still runs, for a run that ends within the window."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            print(f"profile written; tensorboard --logdir={self._directory}", flush=True)


class StartUpClock:
    """Measures what the time to the first step goes into. The first clock of a process counts from the process's start."""

    _process_start = STARTED

    def __init__(self):
        self._begin = self._since = StartUpClock._process_start or time.monotonic()
        self._laps, StartUpClock._process_start = {}, None
        self.lap("imports and devices")

    def lap(self, name: str) -> None:
        """Ends a part. It does nothing after `finish`.

        Args:
            name: of the part.
        """
        if self._laps is not None:
            now = time.monotonic()
            self._laps[name], self._since = now - self._since, now

    def finish(self, name: str) -> None:
        """Ends the last part and prints all parts. Only the first call does; after a roll-back there is another.

        Args:
            name: of the last part.
        """
        self.lap(name)
        if self._laps and jax.process_index() == 0:
            parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._laps.items())
            print(f"first step done after {self._since - self._begin:.1f} s: {parts}", flush=True)
        self._laps = None
