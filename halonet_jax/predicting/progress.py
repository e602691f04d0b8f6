"""Progress on stderr."""

import math
import sys
import time


class Progress:
    """Images done and the time that is left: one line that is rewritten on a terminal, else one every ten seconds.

    Args:
        total: number of images.
    """

    def __init__(self, total: int):
        self._total, self._done, self._start, self._shown = total, 0, time.monotonic(), 0.0
        self._terminal = sys.stderr.isatty()

    def add(self) -> None:
        """Counts an image."""
        self._done += 1
        now = time.monotonic()
        if now - self._shown < (0.2 if self._terminal else 10) or self._done == self._total:
            return
        if not self._shown and not self._terminal:
            self._shown = now  # no line for what is done in seconds
            return
        self._shown = now
        left = (self._total - self._done) * (now - self._start) / self._done
        line = f"{self._done:,} of {self._total:,} images, {_rate(self._done, now - self._start)}, {_clock(left)} left"
        print(f"\r\x1b[K{line}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Takes the line off the terminal, for others."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def close(self, skipped: int) -> None:
        """Says how long it took.

        Args:
            skipped: number of broken images.
        """
        self.clear()
        seconds = time.monotonic() - self._start
        end = f"; skipped {skipped:,} that cannot be read, see above" if skipped else ""
        images = "1 image" if self._total == 1 else f"{self._total:,} images"
        print(f"{images} in {_clock(seconds)}, {_rate(self._total, seconds)}{end}", file=sys.stderr)


def _rate(images, seconds):
    rate = images / seconds
    return f"{rate:,.0f} a second" if rate >= 10 else f"{rate:.1f} a second"


def _clock(seconds):
    seconds = math.ceil(seconds)
    return (
        f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        if seconds >= 3600
        else f"{seconds // 60}:{seconds % 60:02d}"
    )
