"""Starts a command that ends with its parent. `runner.py` runs this file by its path: importing the package takes a second.

    python -I launcher.py PARENT_PID CORES COMMAND…

CORES are numbers of CPU cores, separated by commas, or "-" for all. Where the parent dies, even by SIGKILL, Linux sends the
command SIGTERM: it saves and ends. Elsewhere it runs to its end.
"""

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    _parent, _cores, *_command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(_parent):  # it died before
            sys.exit(75)
    if _cores != "-" and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # a core that was taken away meanwhile
            os.sched_setaffinity(0, {int(core) for core in _cores.split(",")})
    os.execvp(_command[0], _command)
