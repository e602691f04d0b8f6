"""Several processes as one run: they join through JAX's runtime, and compare what must be equal."""

import contextlib
import os
import threading
import zlib
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from halonet_jax.errors import DistributedError

PEER_TIMEOUT = 100  # seconds without a heartbeat after which a process counts as lost (JAX's default)


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    peer_timeout: int = PEER_TIMEOUT,
) -> None:
    """Joins this process to the others of its run. Call it before JAX touches a device.

    Without arguments JAX detects Cloud TPU slices, GKE and Slurm. If it detects none of them, or with
    `num_processes=1`, this process runs alone.

    Args:
        coordinator_address: "host:port" of process 0, the same in all processes.
        num_processes: number of processes of the run, at least 1.
        process_id: number of this process, from 0 to `num_processes` - 1.
        peer_timeout: seconds without a heartbeat after which a process counts as lost and the others end.

    Raises:
        DistributedError: arguments are incomplete or out of range, or the other processes do not come.
    """
    explicit = (coordinator_address, num_processes, process_id)
    if num_processes == 1 or (explicit == (None,) * 3 and os.environ.get("SLURM_NTASKS") == "1"):
        return
    if any(x is not None for x in explicit):
        names = ("coordinator_address", "num_processes", "process_id")
        missing = [f"--{name}" for name, value in zip(names, explicit) if value is None]
        if missing:
            raise DistributedError(f"{' and '.join(missing)} missing; give all of --{', --'.join(names)}, or none")
        if not 0 <= process_id < num_processes:
            raise DistributedError(f"process_id={process_id} must lie between 0 and {num_processes - 1}, num_processes less 1")
        if not coordinator_address.rpartition(":")[2].isdigit():
            raise DistributedError(f"coordinator_address={coordinator_address!r} must be HOST:PORT, such as 10.0.0.2:8476")
    hint = "Still waiting for the other processes of the run; start the same command for each of them (see --help)"
    waiting = threading.Timer(30, logging.warning, (hint,))
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(*explicit, heartbeat_timeout_seconds=peer_timeout)
    except ValueError as error:
        if explicit != (None,) * 3 or "should be defined" not in str(error):
            raise DistributedError(f"jax.distributed could not be set up: {error}") from None
    except RuntimeError as error:  # from XLA: some processes did not come in time
        reason = str(error).splitlines()[0]
        raise DistributedError(
            f"the {num_processes or ''} processes did not find one another: {reason}", peer_failed=True
        ) from None
    finally:
        waiting.cancel()


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Runs the block on every process and waits for all of them. If one fails, all end.

    Args:
        what: the activity, for the error message.

    Raises:
        DistributedError: another process failed. The process that failed raises its own error.
    """
    error = None
    try:
        yield
    except Exception as e:
        error = e
    failed = np.flatnonzero(gather(error is not None))
    if error is not None:
        raise error
    if failed.size:
        raise DistributedError(f"process {', '.join(map(str, failed))} failed in {what}; its output says why", peer_failed=True)


def gather(value: float) -> np.ndarray:
    """Returns the values of all processes, [processes], by process index. All processes must call it.

    Args:
        value: this process's value.
    """
    return np.asarray(multihost_utils.process_allgather(np.asarray(value))).reshape(-1)


def check_same(what: str, text: str) -> None:
    """Checks that a text is the same on every process. All processes must call it.

    Args:
        what: what the text is, for the error message.
        text: this process's text.

    Raises:
        DistributedError: a process has another text than process 0.
    """
    others = np.flatnonzero((sums := gather(np.uint32(zlib.crc32(text.encode())))) != sums[0])
    if others.size:
        raise DistributedError(
            f"process {', '.join(map(str, others))} has another {what} than process 0; start all with the same command, on the "
            "same code and data"
        )
