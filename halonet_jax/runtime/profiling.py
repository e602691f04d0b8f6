"""Profiles a few steps, for TensorBoard's profile page or Perfetto."""

from typing import Any

import jax
from etils import epath


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
