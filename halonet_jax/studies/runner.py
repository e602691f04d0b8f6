"""Runs the runs of a study on this machine, each in a process of its own. Other machines may work in the same folder.

A run belongs to the runner that holds its claim, a lease in `claims/`. The claim of a runner that died is taken over. The
run itself holds the lease of its workdir, so that a process that outlives its runner is waited for.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

from etils import epath

from halonet_jax.errors import ConfigError, Stopped, StorageError, WorkdirInUse
from halonet_jax.runtime import lease, stopping, storage
from halonet_jax.studies import processes, progress, results
from halonet_jax.studies.plan import TRAIN, Plan, Run

# What the same command may mend, by docs/reliability.md: pre-empted, lost peers, aborted, killed.
AGAIN = (stopping.EXIT_LOST_PEER, stopping.EXIT_PREEMPTED, stopping.EXIT_INTERRUPTED, 134, 137, 139, 143)
STARTS = 5  # of one run in a row, where each ends with such a code
POLL = 0.2  # seconds; waits are multiples
LOOK_AGAIN = 5.0  # seconds after which a run that another runner holds is tried again

WAITING, RUNNING, ELSEWHERE, DONE, FAILED = "waiting", "running", "elsewhere", "done", "failed"


class Runner:
    """Runs what is left of a plan.

    Args:
        plan: the study.
        runs: those of its runs that are wanted.
        jobs: how many at a time.
        tell: called with each line of progress.
        changed: called after each run that finished.
        train: the training command, without its flags.
        environments: environment and cores for each of the jobs, see `devices.share`; None: this process's own.
    """

    def __init__(
        self,
        plan: Plan,
        runs: Sequence[Run],
        jobs: int = 1,
        tell: Callable[[str], None] = lambda line: print(line, flush=True),
        changed: Callable[[], None] = lambda: None,
        train: Sequence[str] = TRAIN,
        environments: Sequence[tuple[dict[str, str], str]] | None = None,
    ):
        self.plan, self.runs, self.jobs, self.train = plan, list(runs), jobs, tuple(train)
        self._tell, self._changed = tell, changed
        self._environments = environments or [({}, "-")] * jobs
        self._variables = {"JAX_COMPILATION_CACHE_DIR": str(plan.out / "compile_cache")} | dict(os.environ)
        self._lock = threading.RLock()
        self._stop, self._kill = threading.Event(), threading.Event()
        self._signal = ""
        self._seen_elsewhere: set[Run] = set()
        self._claims: set[lease.Lease] = set()  # taken, or about to be
        self._began = time.time()
        self._states = dict.fromkeys(self.runs, WAITING)
        self._look_at = dict.fromkeys(self.runs, 0.0)
        self._clock = progress.Clock(self.runs, jobs)

    def run(self) -> int:
        """Runs until nothing is left, or a signal comes.

        Returns:
            0: all is done. 1: a run failed. 75 or 130: a signal came; the same command goes on.
        """
        self._refresh()
        threads = [threading.Thread(target=self._work, args=(slot,), daemon=True) for slot in range(self.jobs)]
        with self._signals():
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.1)  # a signal's handler runs between two of these
                    if self._stop.is_set():
                        for claim in list(self._claims):
                            if not claim.held:
                                claim.release()  # ends its wait
        if self._stop.is_set() and any(state not in (DONE, FAILED) for state in self._states.values()):
            self._say(f"stopped by {self._signal}; the same command goes on")
            return stopping.EXIT_INTERRUPTED if self._kill.is_set() else stopping.EXIT_PREEMPTED
        return 1 if FAILED in self._states.values() else 0

    # --- which run is next

    def _work(self, slot):
        while not self._stop.is_set():
            run = self._next()
            if run is not None:
                self._take(run, slot)
            elif not self._refresh():
                return
            else:
                self._stop.wait(5 * POLL)

    def _next(self):
        """A run that can be started, marked as running; None where there is none at the moment."""
        self._refresh()
        now = time.monotonic()
        with self._lock:
            ready = [run for run, state in self._states.items() if state in (WAITING, ELSEWHERE) and self._look_at[run] <= now]
            ready = [run for run in ready if run.parent is None or results.result(run.parent)]
            # Of a run that another machine holds, it takes a minute to see whether that machine lives.
            run = min(ready, key=lambda run: (_claim_folder(self.plan, run) / "lease.json").exists(), default=None)
            if run is not None:
                self._states[run] = RUNNING
            return run

    def _refresh(self):
        """Notes what other machines did. True while something is left."""
        for run in [run for run, state in self._states.items() if state in (WAITING, ELSEWHERE)]:
            failed, parent = results.failure(run), run.parent
            if results.result(run):
                self._note(run, DONE)
            elif failed and failed.get("time", 0) > self._began:
                self._note(run, FAILED, f"on another machine: {failed.get('reason')}")
            elif parent is not None and self._states.get(parent) == FAILED:
                self._note(run, FAILED, f"it starts from {parent.name}, which failed")
            elif parent is not None and parent not in self._states and not results.result(parent):
                self._note(run, FAILED, f"it starts from {parent.name}, which is not done and which --only leaves out")
        return any(state not in (DONE, FAILED) for state in self._states.values())

    def _note(self, run, state, why=""):
        with self._lock:
            before, self._states[run] = self._states[run], state
        if state == FAILED:
            self._say(f"failed: {run.name}: {why}")
        elif state == DONE and before in (RUNNING, ELSEWHERE):
            self._say(f"done: {run.name}{why}")

    # --- one run

    def _take(self, run, slot):
        """Claims a run, runs it and notes how it ended."""
        claim = _Claim(epath.Path(_claim_folder(self.plan, run)))
        self._claims.add(claim)
        try:
            claim.acquire()
            claim.held = True
            self._perform(run, slot, claim)
        except WorkdirInUse:
            self._look_at[run] = time.monotonic() + LOOK_AGAIN
            self._states[run] = ELSEWHERE
            if run not in self._seen_elsewhere and not results.result(run):
                self._seen_elsewhere.add(run)
                self._say(f"another process runs {run.name}")
        except Stopped:
            self._states[run] = WAITING
        except (OSError, ConfigError) as error:  # the folder cannot be written
            self._note(run, FAILED, f"{storage.reason(error)}; {storage.remedy(error)}, then give the same command again")
        except Exception as error:  # a fault of our own must not leave the others waiting
            self._note(run, FAILED, f"{type(error).__name__}: {storage.reason(error)}")
        finally:
            claim.release()
            self._claims.discard(claim)

    def _perform(self, run, slot, claim):
        if results.result(run):  # another runner finished it meanwhile
            return self._note(run, DONE)
        self._wait_for_orphan(run)
        (run.workdir / "failed.json").unlink(missing_ok=True)
        self._clock.start(run)
        code = self._train(run, slot)
        try:
            claim.check()
        except StorageError:  # this machine was suspended, and another one took the run over
            raise WorkdirInUse(run.name) from None
        seconds = self._clock.stop(run)
        found = results.collect(run, seconds) if code == 0 else None
        if found:
            score = results.score(found, self.plan.study.metric)
            at = "" if score is None else f", {self.plan.study.metric} {score:.2f} %"
            self._note(run, DONE, f"{at} in {progress.show(seconds)}")
            self._report()
        elif self._stop.is_set() and code in (*AGAIN, 0):
            raise Stopped(self._signal)
        else:
            self._fail(run, code)

    def _train(self, run, slot):
        """Runs the training command, again where that may help, and returns the last exit code."""
        code, (more, cores), log = stopping.EXIT_PREEMPTED, self._environments[slot], run.workdir / "train.log"
        command, variables, tick = [*self.train, *run.arguments], self._variables | more, lambda: self._clock.tick(self._say)
        for start in range(STARTS):
            if self._stop.is_set():
                break
            self._say(f"{'starting' if not start else 'starting again'}: {run.name}")
            code = processes.run(command, log, variables, cores, self._stop, self._kill, tick)
            if code not in AGAIN:
                break
            self._stop.wait(5 * POLL)
        return code

    def _fail(self, run, code):
        why = processes.last_line(run.workdir / "train.log") if code else "it ended without the evaluation of its last step"
        with contextlib.suppress(OSError):  # as where the disk is full, which is why it failed
            record = {"exit_code": code, "time": time.time(), "reason": why}
            results.write(run.workdir / "failed.json", json.dumps(record))
        self._note(run, FAILED, f"exit code {code}: {why} (see {run.workdir}/train.log)")
        self._report()

    def _wait_for_orphan(self, run):
        """Waits for the end of a training process that outlived its runner."""
        said = False
        while not self._stop.is_set():
            held = _Claim(run.workdir)
            self._claims.add(held)
            try:
                held.acquire()
                return
            except WorkdirInUse as error:
                if not said:
                    self._say(f"waiting: {error}".partition(";")[0])
                said = True
                self._stop.wait(5 * POLL)
            finally:
                held.release()
                self._claims.discard(held)
        raise Stopped(self._signal)

    # --- around

    def _report(self):
        try:
            self._changed()
        except Exception as error:  # a report is worth no run; it is written again after the next one
            self._say(f"the report could not be written: {storage.reason(error)}")

    def _say(self, event):
        with self._lock:
            self._tell(self._clock.line(self._states, event))

    @contextlib.contextmanager
    def _signals(self):
        def note(number, _):
            if self._stop.is_set():
                self._kill.set()
            self._signal = self._signal or signal.Signals(number).name
            self._stop.set()

        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if main else ()
        numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
        handlers = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


class _Claim(lease.Lease):
    held = False

    def _warn_of_wait(self, found):
        pass  # it is ordinary here, and comes once a minute


def _claim_folder(plan, run):
    return plan.out / "claims" / run.row.slug / f"seed{run.seed}"
