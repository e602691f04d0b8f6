"""How a run ends before its last step, and the exit code that says so."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

from halonet_jax.errors import Stopped

# sysexits.h where it has a fitting code.
EXIT_BAD_INPUT = 2  # config, data or checkpoint, as for a wrong flag
EXIT_LOST_PEER = 69  # EX_UNAVAILABLE: another process is gone, or a step hangs; the same command resumes
EXIT_NON_FINITE = 70  # EX_SOFTWARE
EXIT_STORAGE = 74  # EX_IOERR: the workdir cannot be written
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the state is saved, the same command resumes
EXIT_INTERRUPTED = 130  # 128 + SIGINT: a second Ctrl-C, which does not wait for a step's end


class StopRequest:
    """Context in which SIGTERM and SIGINT are noted, for the loop to act on between steps. A second SIGINT interrupts at once.

    With several processes, JAX's pre-emption service sees the SIGTERM of any of them, and lets all stop after the same step;
    a SIGINT is passed on to it.

    Attributes:
        signal: name of the signal that came; None where none did.
    """

    def __enter__(self):
        self.signal, self._calls = None, 0
        self._alone = jax.process_count() == 1
        # The service has a SIGTERM handler of its own, which one of ours would replace.
        numbers = (signal.SIGTERM, signal.SIGINT) if self._alone else (signal.SIGINT,)
        self._handlers = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self) -> bool:
        """Whether to save and stop after this step; all processes agree. To be called at every step, by all of them."""
        if self._alone:
            return self.signal is not None
        # Not the step's own number: the service lets all stop at the call after the highest number that it has seen, which
        # for a signal before the first call is 1, and a resumed run would never come to.
        self._calls += 1
        if not multihost_utils.reached_preemption_sync_point(self._calls):
            return False
        self.signal = self.signal or "SIGTERM"
        return True

    def interruptible(self, function: Callable[[], Any]) -> Any:
        """Calls `function`, which may block for minutes outside Python (compiling), and returns what it returns.

        Raises:
            Stopped: as soon as a signal comes; `function` then still runs in a thread, which the end of the process ends.
                With several processes, which must stop together, the signal takes effect after the next step.
        """
        outcome = []

        def work():
            try:
                outcome.append((function(), None))
            except BaseException as error:
                outcome.append((None, error))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            if self._alone and self.signal:
                raise Stopped(self.signal)
        result, error = outcome[0]
        if error is not None:
            raise error
        return result


class Watchdog:
    """Ends the process where nothing was done for `timeout` seconds: a collective, a disk or a data source hangs.

    Args:
        timeout: seconds; 0: never.
    """

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._doing, self._since = None, 0.0
        if timeout:
            threading.Thread(target=self._watch, daemon=True).start()

    def doing(self, what: str | None) -> None:
        """What comes next, such as "step 17"; None: nothing that could hang."""
        self._doing, self._since = what, time.monotonic()

    def _watch(self):
        while True:
            time.sleep(min(self._timeout / 4, 5))
            idle = time.monotonic() - self._since
            if self._doing and idle > self._timeout:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                print(
                    f"error: process {jax.process_index()} got nowhere in {self._doing} for {idle:.0f} s, more than "
                    f"config.hang_timeout={self._timeout:g}; a lost peer, network, disk or data source hangs. The last checkpoint "
                    "stands, the same command resumes",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_LOST_PEER)  # nothing that hangs can be ended otherwise
