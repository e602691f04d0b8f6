"""The device mesh and the sharding of arrays on it.

The parameters are replicated over the axis `data` and sharded over the axis `fsdp`. Batches are cut over both.
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
# Smaller arrays are replicated: gathering them would cost more than sharding saves.
MIN_SHARDED_SIZE = 2**14


def use_cpu_cores(parts: int) -> None:
    """Makes each CPU core a JAX device. Call it before JAX touches a device.

    Two cores with a program each are faster than one program on both (docs/performance.md). The number of devices is
    the largest that divides `parts` and is at most the number of cores. Each device holds a copy of the state.

    It has no effect with an accelerator, with several processes, if JAX has already created its devices, or if
    JAX_NUM_CPU_DEVICES or XLA_FLAGS sets the number. Set JAX_NUM_CPU_DEVICES in a container that may use less CPU time
    than the cores that it sees.

    Args:
        parts: number of equal parts that a batch may be cut into, at least 1.
    """
    given = jax.config.jax_num_cpu_devices > 0 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if given or jax.distributed.is_initialized():
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", max(n for n in range(1, cores + 1) if parts % n == 0))


def make_mesh(fsdp: int = 1, devices: Any = None) -> Mesh:
    """Returns a `[data, fsdp]` mesh.

    Devices are ordered by process. So process p holds the p-th part of every batch, and a copy of the state stays
    within one host if the host has enough devices. Collectives over all devices do not depend on the order.

    Args:
        fsdp: number of devices that share one copy of the state. It must divide the number of devices.
        devices: a sequence of devices; None: all devices of the run.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices).reshape(-1, fsdp), ("data", "fsdp"))


def use(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Returns a context in which traced code knows the mesh.

    Operators that XLA cannot partition, such as Pallas kernels, read from it how to cut their arrays.

    Args:
        mesh: the mesh; None: the context does nothing.
    """
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """Returns the sharding of every array of a state.

    An array is cut over `fsdp` along its largest axis that `fsdp` divides. Arrays of less than `MIN_SHARDED_SIZE`
    elements, and arrays without such an axis, are replicated.

    Args:
        mesh: from `make_mesh`.
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
    """Context that reads batches in the background. Iterating over it yields global arrays, cut over the mesh.

    Args:
        batches: an iterator over dicts of this process's rows, `[local batch, ...]`. Its `close()` and `num_corrupt`
            are used if it has them. The background thread closes it at the end.
        mesh: the mesh that the batch axis is cut over.
        ahead: number of batches to place on the devices in advance.
        check: called every tenth of a second while the caller waits for a batch. An exception from it ends the wait.

    Attributes:
        num_corrupt: the loader's count of corrupt examples, for the batches handed out so far.
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
            while True:  # empties the queue: a full one would block the thread
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
        """Returns the seconds that the caller waited for batches since the last call."""
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
