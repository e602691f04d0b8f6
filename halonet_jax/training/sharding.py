"""The device mesh and where arrays lie on it.

Axis `data` holds copies of the parameters, axis `fsdp` shares one copy out. Batches are cut over both.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = P(("data", "fsdp"))
# Smaller arrays are copied rather than shared out: gathering them would cost more than they save.
MIN_SHARDED_SIZE = 2**14


def use_cpu_cores(parts: int) -> None:
    """Makes cores of this machine devices of their own, as many as divide `parts`; to be called before JAX touches a device.

    Of use where there is no accelerator, and without effect where there is one: two cores with a program each are faster than
    one program on both (docs/performance.md). Each holds a copy of the state, as every device does. Nothing changes where several
    processes run, where JAX_NUM_CPU_DEVICES or XLA_FLAGS gives the number, and where JAX has its devices already. Give the
    number where a container's share of CPU time is less than the cores that it sees.
    """
    given = jax.config.jax_num_cpu_devices > 0 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if given or jax.distributed.is_initialized():
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", max(n for n in range(1, cores + 1) if parts % n == 0))


def make_mesh(fsdp: int = 1, devices: Any = None) -> Mesh:
    """A `[data, fsdp]` mesh over all devices; `fsdp` must divide their number.

    Devices are in the order of their processes, so that process p of P holds the p-th part of every batch, and one copy of the
    state lies within a host where it can. Collectives over all devices do not depend on the order.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices).reshape(-1, fsdp), ("data", "fsdp"))


def use(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Makes the mesh known to what is traced: which devices it is for, and how operators that XLA cannot cut are to be cut."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """One rule for the whole state: an array's largest axis that `fsdp` divides is shared out, unless the array is small.

    Args:
        state: pytree of arrays or `ShapeDtypeStruct`s.

    Returns:
        The same tree of `NamedSharding`.
    """
    fsdp = mesh.shape["fsdp"]

    def rule(array):
        axes = [axis for axis, size in enumerate(array.shape) if size % fsdp == 0]
        if fsdp == 1 or array.size < MIN_SHARDED_SIZE or not axes:
            return NamedSharding(mesh, P())
        axis = max(axes, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, P(*[None] * axis, "fsdp"))

    return jax.tree.map(rule, state)


class DeviceBatches:
    """Context that reads batches in the background and gives them as global arrays cut over the mesh.

    Args:
        batches: a loader: an iterator over dicts of this process's rows, `[local batch, ...]`, with `close()` and `num_corrupt`
            where it has them. It is closed at the end, in the background thread.
        mesh: over which the batch axis is cut.
        ahead: how many batches are placed on the devices early.
        check: called while the next batch is waited for; what it raises ends the wait.

    Attributes:
        num_corrupt: the loader's count, of the batches handed out so far.
    """

    _POLL, _END = 0.1, 5.0  # seconds

    def __init__(
        self,
        batches: Iterator[dict[str, np.ndarray]],
        mesh: Mesh,
        ahead: int = 2,
        check: Callable[[], None] = lambda: None,
    ):
        self.num_corrupt = 0
        self._seconds_waited = 0.0
        self._batches, self._sharding, self._check = batches, NamedSharding(mesh, BATCH), check
        self._queue, self._ended = queue.Queue(ahead), threading.Event()
        self._thread = threading.Thread(target=self._read, name="halonet_jax batches", daemon=True)

    def __enter__(self) -> "DeviceBatches":
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        with contextlib.suppress(queue.Empty):
            while True:  # so that a full queue does not hold the thread
                self._queue.get_nowait()
        self._thread.join(self._END)
        if self._thread.is_alive():
            logging.warning("The data loader did not end within %d s; a disk or worker process hangs", self._END)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        while True:
            batch, num_corrupt, error = self._next()
            if error is not None:
                raise error
            if batch is None:
                return
            self.num_corrupt = num_corrupt
            yield batch

    def pop_seconds_waited(self) -> float:
        """Seconds that the caller waited for a batch since the last call."""
        seconds, self._seconds_waited = self._seconds_waited, 0.0
        return seconds

    def _next(self):
        begin = time.monotonic()
        try:
            while True:
                try:
                    return self._queue.get(timeout=self._POLL)
                except queue.Empty:
                    self._check()
        finally:
            self._seconds_waited += time.monotonic() - begin

    def _read(self):
        try:
            for batch in self._batches:
                placed = {k: jax.make_array_from_process_local_data(self._sharding, v) for k, v in batch.items()}
                if not self._put((placed, getattr(self._batches, "num_corrupt", 0), None)):
                    return
            self._put((None, 0, None))
        except BaseException as error:
            self._put((None, 0, error))
        finally:
            if hasattr(self._batches, "close"):
                self._batches.close()

    def _put(self, item):
        while not self._ended.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=self._POLL)
                return True
        return False
