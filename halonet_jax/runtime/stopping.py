"""How a run ends before its last step, and the exit code that says so."""

import faulthandler
import os
import queue
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
    """Context in which SIGTERM and SIGINT are noted, for the loop to act on. A second SIGINT interrupts at once.

    With several processes, JAX's pre-emption service sees the SIGTERM of any of them, and lets all stop after the same step;
    a SIGINT is passed on to it. Outside of the main thread, where Python handles no signals, nothing is noted.

    Attributes:
        signal: name of the signal that came; None before one comes.
    """

    def __enter__(self):
        self.signal, self._calls, self._worker = None, 0, None
        self._alone = jax.process_count() == 1
        # The service has a SIGTERM handler of its own, which one of ours would replace.
        numbers = (signal.SIGTERM, signal.SIGINT) if self._alone else (signal.SIGINT,)
        if threading.current_thread() is not threading.main_thread():
            numbers = ()
        self._handlers = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._worker:
            self._worker.end()

    def _note(self, number, frame):
        self.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def check(self) -> None:
        """Looks for a signal. With several processes, which stop together, it does nothing.

        Raises:
            Stopped: a signal came.
        """
        if self._alone and self.signal:
            raise Stopped(self.signal)

    def requested(self) -> bool:
        """Returns whether to stop now. All processes get the same answer.

        All of them must call it equally often, such as at every step.
        """
        if self._alone:
            return self.signal is not None
        # Not the step's own number: the service lets all stop at the call after the highest number that it has seen. For a
        # signal before the first call that is 1, which a resumed run would never reach.
        self._calls += 1
        if not multihost_utils.reached_preemption_sync_point(self._calls):
            return False
        self.signal = self.signal or "SIGTERM"
        return True

    def interruptible(self, function: Callable[[], Any]) -> Any:
        """Calls `function`, which may block for minutes (compiling, a dead disk), and returns its result.

        A process alone runs it in a thread and keeps an eye on signals; with several processes it is called directly, and a
        signal takes effect at the next `requested`.

        Args:
            function: takes no arguments.

        Raises:
            Stopped: within a tenth of a second of a signal. The function may go on in its thread until the process ends.
        """
        if not self._alone:
            return function()
        if self._worker is None:
            self._worker = _Worker()
        outcome = self._worker.start(function)
        while not outcome.done.wait(0.1):
            if self.signal:
                self._worker.end()  # it is busy
                self._worker = None
                raise Stopped(self.signal)
        if outcome.error is not None:
            raise outcome.error
        return outcome.result


class _Outcome:
    def __init__(self):
        self.done, self.result, self.error = threading.Event(), None, None


class _Worker:
    """One daemon thread that runs functions in turn. An executor's threads would keep the process from ending."""

    def __init__(self):
        self._work = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="halonet_jax interruptible", daemon=True)
        self._thread.start()

    def start(self, function):
        outcome = _Outcome()
        self._work.put((function, outcome))
        return outcome

    def end(self):
        self._work.put(None)
        self._thread.join(0.2)

    def _run(self):
        while (item := self._work.get()) is not None:
            function, outcome = item
            try:
                outcome.result = function()
            except BaseException as error:
                outcome.error = error
            outcome.done.set()
            del item, function, outcome  # which may hold a donated state


class Watchdog:
    """Context that ends the process where nothing was done for `timeout` seconds: a disk, a data source, a compiler or a
    collective hangs.

    Args:
        timeout: seconds; 0: never.
    """

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._doing, self._since = None, 0.0
        self._ended = threading.Event()

    def __enter__(self):
        if self._timeout:
            self._thread = threading.Thread(target=self._watch, name="halonet_jax watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        if self._timeout:
            self._thread.join()

    def doing(self, what: str | None) -> None:
        """Says what comes next, and restarts the count of seconds.

        Args:
            what: such as "step 17"; None: nothing that could hang.
        """
        self._doing, self._since = what, time.monotonic()

    def _watch(self):
        while not self._ended.wait(min(self._timeout / 4, 5)):
            doing, idle = self._doing, time.monotonic() - self._since
            if doing and idle > self._timeout:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                print(
                    f"error: process {jax.process_index()} made no progress in {doing} for {idle:.0f} s, more than "
                    f"hang_timeout={self._timeout:g}; a disk, data source, network or another process hangs. The last checkpoint "
                    "is safe and the same command resumes; where this takes longer by itself, raise hang_timeout",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_LOST_PEER)  # nothing else ends what hangs
