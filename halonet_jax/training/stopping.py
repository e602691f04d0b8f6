"""How a run ends before its last step, and the exit code that says so."""

import signal

# sysexits.h where it has a fitting code.
EXIT_BAD_INPUT = 2  # config or data, as for a wrong flag
EXIT_NON_FINITE = 70  # EX_SOFTWARE
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the state is saved, the same command resumes


class NonFiniteLoss(ArithmeticError):
    """The loss or a gradient is NaN or infinite."""


class StopRequest:
    """Notes SIGTERM and SIGINT, for the loop to act on between steps. A second SIGINT interrupts at once."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
