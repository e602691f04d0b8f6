"""Ends a run before its last step: signals, the watchdog, and the exit codes."""

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

# Codes of sysexits.h, if it has a fitting one.
EXIT_BAD_INPUT = 2  # a flag, the config, data or a checkpoint
EXIT_INCOMPLETE = 3  # a suite was evaluated, less the sets that are not prepared
EXIT_LOST_PEER = 69  # EX_UNAVAILABLE: another process is gone, or a step hangs; the same command resumes
EXIT_NON_FINITE = 70  # EX_SOFTWARE
EXIT_STORAGE = 74  # EX_IOERR: the workdir cannot be written
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the state is saved, the same command resumes
EXIT_INTERRUPTED = 130  # 128 + SIGINT: a second Ctrl-C, which does not wait for the end of the step
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE: nobody reads the output any more, as in `… | head`


class StopRequest:
    """Context that notes SIGTERM and SIGINT, so that the loop can stop. A second SIGINT interrupts at once.

    With several processes, JAX's pre-emption service sees the SIGTERM of any process and lets all stop after the same
    step. A SIGINT is passed on to it. Outside the main thread nothing is noted, because Python handles signals only
    there.

    Attributes:
        signal: name of the signal that came; None: no signal has come.
    """

    def __enter__(self):
        self.signal, self._calls, self._worker = None, 0, None
        self._alone = jax.process_count() == 1
        # The service has its own SIGTERM handler. One of ours would replace it.
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
        """Raises Stopped after a signal. With several processes it does nothing, because they stop together.

        Raises:
            Stopped: a signal came and this process runs alone.
        """
        if self._alone and self.signal:
            raise Stopped(self.signal)

    def requested(self) -> bool:
        """Returns whether to stop now. All processes get the same answer. They must call it equally often."""
        if self._alone:
            return self.signal is not None
        # The service stops all at the call after the highest number that it has seen. For a signal before the first
        # call, that is call 1. A resumed run would never reach step 1, so we count calls instead of steps.
        self._calls += 1
        if not multihost_utils.reached_preemption_sync_point(self._calls):
            return False
        self.signal = self.signal or "SIGTERM"
        return True

    def interruptible(self, function: Callable[[], Any]) -> Any:
        """Calls a function that may block for minutes, such as a compile or a read from a dead disk.

        A process that runs alone calls it in a thread and watches for signals. With several processes it is called
        directly, and a signal takes effect at the next `requested`.

        Args:
            function: called without arguments.

        Returns:
            The result of the function.

        Raises:
            Stopped: a signal came, within a tenth of a second. The function may continue in its thread until the
                process ends.
        """
        if not self._alone:
            return function()
        if self._worker is None:
            self._worker = _Worker()
        outcome = self._worker.start(function)
        while not outcome.done.wait(0.1):
            if self.signal:
                self._worker.end()  # it is busy with the function; another call gets a new one
                self._worker = None
                raise Stopped(self.signal)
        if outcome.error is not None:
            raise outcome.error
        return outcome.result


class _Outcome:
    def __init__(self):
        self.done, self.result, self.error = threading.Event(), None, None


class _Worker:
    """One daemon thread that runs functions in turn. The threads of an executor would keep the process alive."""

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
            del item, function, outcome  # they may hold a donated state


class Watchdog:
    """Context that ends the process if it makes no progress for `timeout` seconds.

    Then a disk, a data source, a compiler or a collective hangs.

    Args:
        timeout: seconds; 0: never end it.
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
        """Notes the next activity and restarts the clock.

        Args:
            what: the activity, such as "step 17"; None: nothing that can hang.
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
                    f"is safe and the same command resumes; if {doing} needs longer than this, raise hang_timeout",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_LOST_PEER)  # a hanging thread ends only with its process
