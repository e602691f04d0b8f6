"""Lines of progress: how many runs are done, and when all will be."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from halonet_jax.runtime.reporting import format_seconds
from halonet_jax.studies import results
from halonet_jax.studies.plan import Run

EVERY = 600.0  # seconds after which a line comes although nothing happened

show = format_seconds


class Clock:
    """Durations of runs, measured here or told by their results.

    Args:
        runs: all that are wanted.
        jobs: how many run at a time.
    """

    def __init__(self, runs: Sequence[Run], jobs: int):
        self._runs, self._jobs = runs, jobs
        self._since: dict[Run, float] = {}
        self._from: dict[Run, float] = {}  # share that was done at the start
        self._told = time.monotonic()

    def start(self, run: Run) -> None:
        """Notes the start of a run.

        Args:
            run: of the study.
        """
        self._since[run], self._from[run] = time.monotonic(), results.progress(run)

    def stop(self, run: Run) -> float:
        """Returns the seconds since its start.

        Args:
            run: of the study.
        """
        return time.monotonic() - self._since.pop(run)

    def tick(self, say: Callable[[str], None]) -> None:
        """Says something where nothing was said for long.

        Args:
            say: takes the event.
        """
        if time.monotonic() - self._told > EVERY:
            say("running: " + ", ".join(f"{run.name} ({results.progress(run):.0%})" for run in list(self._since)))

    def line(self, states: Mapping[Run, str], event: str) -> str:
        """Returns one line.

        Args:
            states: of all runs, as `runner` names them.
            event: what happened.
        """
        self._told = time.monotonic()
        count = lambda *names: sum(state in names for state in states.values())
        left = self._seconds_left([run for run, state in states.items() if state not in ("done", "failed")])
        eta = "" if not count("waiting", "running", "elsewhere") else f", ETA {'unknown' if left is None else show(left)}"
        numbers = f"{count('done')} of {len(states)} done, {count('running', 'elsewhere')} running, {count('failed')} failed"
        return f"[{numbers}{eta}] {event}"

    def _seconds_left(self, left):
        """By finished runs, those of the same row first, and by the progress of those that run; None where it is unknown."""
        known: dict[str, list[float]] = {}
        for run in self._runs:
            found = results.result(run) if run not in left else None
            if found and found.get("seconds"):
                known.setdefault(run.row.label, []).append(found["seconds"])
        for run, since in list(self._since.items()):
            done = results.progress(run) - self._from[run]
            if done > 0:
                known.setdefault(run.row.label, []).append((time.monotonic() - since) / done)
        if not known:
            return None
        any_row = statistics.fmean(second for seconds in known.values() for second in seconds)
        total = 0.0
        for run in left:
            whole = statistics.fmean(known[run.row.label]) if run.row.label in known else any_row
            elapsed = time.monotonic() - self._since[run] if run in self._since else 0.0
            total += max(whole - elapsed, 0.0)
        return total / self._jobs
