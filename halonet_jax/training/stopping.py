"""How a run ends before its last step, and the exit code that says so."""

import signal
from typing import Any

import jax
import jax.numpy as jnp

# sysexits.h where it has a fitting code.
EXIT_BAD_INPUT = 2  # config or data, as for a wrong flag
EXIT_NON_FINITE = 70  # EX_SOFTWARE
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the state is saved, the same command resumes
EXIT_INTERRUPTED = 130  # 128 + SIGINT: a second Ctrl-C, which does not wait for a step's end


class NonFiniteLoss(ArithmeticError):
    """The loss, a gradient or the state is NaN or infinite."""


@jax.jit
def _all_finite(tree):
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def check_finite(state: Any, step: int) -> None:
    """Raises NonFiniteLoss where an array of the state is not finite: one bad update may follow a good loss."""
    if not _all_finite(state):
        raise NonFiniteLoss(f"step {step}: the update made weights or statistics that are not finite")


class StopRequest:
    """Context in which SIGTERM and SIGINT are noted, for the loop to act on between steps. A second SIGINT interrupts at once.

    Attributes:
        signal: name of the signal that came; None where none did.
    """

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
