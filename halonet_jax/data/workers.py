"""Worker processes of a loader: what they get, who they are, and how they end.

Grain starts them and passes their batches. This module keeps three things away from its way of starting a process:

- The examples travel in a file. Python writes what a new process gets to a pipe, and where it is more than the pipe
  holds and the process is killed before it reads, that blocks for ever.
- The program's main module is not imported again: Grain pickles what belongs to it by value, and a worker of
  `python -m halonet_jax.train` would import JAX. `worker_main` runs in its place.
- Each worker leaves its number, so that one that does not end can be killed, and one that is gone is noticed.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from multiprocessing import spawn

import cloudpickle

from halonet_jax.data.rows import Examples
from halonet_jax.errors import DataError

_EXAMPLES = "examples"
_MAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker_main.py")


class Workers:
    """The folder that a loader shares with its worker processes.

    Args:
        examples: what the workers read.

    Raises:
        DataError: if the folder for temporary files cannot be written.
    """

    def __init__(self, examples: Examples):
        _replace_main_module()
        try:
            self.folder = tempfile.mkdtemp(prefix="halonet_jax_loader_")
            with open(os.path.join(self.folder, _EXAMPLES), "wb") as f:
                cloudpickle.dump(examples, f)
        except OSError as error:
            raise DataError(
                f"data workers get the list of examples in {tempfile.gettempdir()}, which cannot be written ({error}); free"
                " space there, or set the environment variable TMPDIR to another folder"
            ) from None
        self.examples = _Parcel(examples, os.path.join(self.folder, _EXAMPLES))

    def start(self, worker: int, workers: int) -> None:
        """Runs first in each worker process.

        Args:
            worker: number of the worker.
            workers: how many there are.
        """
        # Ctrl-C, and a scheduler's SIGTERM to all processes, are for the main process, which needs batches to finish its step.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with open(os.path.join(self.folder, str(os.getpid())), "x"):
            pass

        def end_with_parent():  # which may be killed; Grain's workers would stay for ever
            multiprocessing.parent_process().join()
            shutil.rmtree(self.folder, ignore_errors=True)
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()

    def __getstate__(self):
        return {"folder": self.folder}

    def all_started(self) -> None:
        """Frees the space of the examples' file; each worker has read it."""
        with contextlib.suppress(OSError):
            os.remove(os.path.join(self.folder, _EXAMPLES))

    def any_gone(self) -> bool:
        """Whether a worker that started has ended."""
        return len(self._alive()) < len(self._started())

    def kill(self) -> None:
        """Kills the workers that still run."""
        for process in self._alive():
            process.kill()

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _started(self):
        try:
            return {int(name) for name in os.listdir(self.folder) if name.isdecimal()}
        except OSError:  # closed
            return set()

    def _alive(self):
        started = self._started()
        return [process for process in multiprocessing.active_children() if process.pid in started]


class _Parcel:
    """Examples that are pickled as the path of a file that holds them."""

    def __init__(self, examples, path):
        self._examples, self._path = examples, path

    def __len__(self):
        return len(self._examples)

    def __getitem__(self, place):
        return self._examples[place]

    def __reduce__(self):
        return _open, (self._path,)


def _open(path):
    with open(path, "rb") as f:
        return cloudpickle.load(f)


def _replace_main_module():
    """Makes Grain's worker processes run `worker_main` in place of the program's main module; others are not affected."""
    original = spawn.get_preparation_data
    if hasattr(original, "halonet_jax"):
        return

    def get_preparation_data(name):
        found = original(name)
        if name.startswith("grain-process-prefetch"):
            found.pop("init_main_from_name", None)
            found["init_main_from_path"] = _MAIN
        return found

    get_preparation_data.halonet_jax = True
    spawn.get_preparation_data = get_preparation_data
