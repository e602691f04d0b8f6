"""A profile of a few steps, for TensorBoard's profile page or Perfetto."""

from typing import Any

import jax
from etils import epath


class ProfileWindow:
    """Traces the steps from `first` to `last`.

    Args:
        steps: `(first, last)`, counted from 1; (): none.
        directory: where the trace goes.
        enabled: False on all processes but one: nothing is traced.
    """

    def __init__(self, steps: tuple[int, ...], directory: epath.Path, enabled: bool = True):
        self._first, self._last = steps if steps and enabled else (0, 0)
        self._directory, self._running = directory, False

    def before(self, step: int) -> None:
        """To be called before each step.

        Args:
            step: its number.
        """
        if self._first <= step <= self._last and not self._running:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """To be called after each step.

        Args:
            step: its number.
            results: what it returned.
        """
        if step >= self._last and self._running:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends a trace that still runs, where the run ends within the window."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            print(f"profile written; tensorboard --logdir={self._directory}", flush=True)
