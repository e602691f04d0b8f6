"""The device mesh and where arrays lie on it.

Axis `data` holds copies of the parameters, axis `fsdp` shares one copy out. Batches are cut over both.
"""

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = P(("data", "fsdp"))
# Smaller arrays are copied rather than shared out: gathering them would cost more than they save.
MIN_SHARDED_SIZE = 2**14


def make_mesh(fsdp: int = 1, devices: Any = None) -> Mesh:
    """A `[data, fsdp]` mesh over all devices; `fsdp` must divide their number."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices) // fsdp, fsdp), ("data", "fsdp"), devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 2
    )


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


def to_device(batches: Iterable[dict[str, np.ndarray]], mesh: Mesh, ahead: int = 2) -> Iterator[dict[str, jax.Array]]:
    """Turns each host's share of a batch into global arrays cut over the mesh, `ahead` batches before they are asked for."""
    sharding = NamedSharding(mesh, BATCH)
    put = lambda batch: {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
    batches = iter(batches)
    queue = collections.deque(map(put, itertools.islice(batches, ahead)))
    while queue:
        yield queue.popleft()
        queue.extend(map(put, itertools.islice(batches, 1)))
