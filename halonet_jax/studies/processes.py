"""Runs a training command as a process that ends with this one."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

LAUNCHER = Path(__file__).with_name("launcher.py")
POLL = 0.2  # seconds between looks at the process


def run(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    cores: str,
    stop: threading.Event,
    kill: threading.Event,
    tick: Callable[[], None],
) -> int:
    """Runs a command to its end. The calling thread must live as long: Linux counts it as the parent.

    Args:
        command: with its arguments.
        log: file to which its output is appended.
        environment: its variables.
        cores: "0,2", or "-" for all.
        stop: once set, the process gets SIGTERM.
        kill: once set, it is killed.
        tick: called between looks.

    Returns:
        Its exit code; 128 + its number where a signal ended it.

    Raises:
        OSError: the log cannot be written.
    """
    command = [sys.executable, "-I", str(LAUNCHER), str(os.getpid()), cores, *command]
    with open(log, "ab") as output:
        # A session of its own: Ctrl-C on the terminal reaches this process alone, which passes it on once.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    told = False
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(POLL)
            return code if code >= 0 else 128 - code
        if kill.is_set():
            process.kill()
        elif stop.is_set() and not told:
            told = True
            process.terminate()
        tick()


def last_line(path: Path) -> str:
    """Returns the error at the end of a log, or its last line.

    Args:
        path: of the log.
    """
    try:
        lines = [line.strip() for line in path.read_bytes()[-20000:].decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    errors = [line for line in lines[-30:] if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1]
