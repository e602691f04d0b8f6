"""Format `weights`: `model.safetensors`, which `halonet_jax.load` reads."""

from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath

from halonet_jax.exporting import checking
from halonet_jax.exporting.interface import Interface
from halonet_jax.training.task import Task
from halonet_jax.weights import Loaded, load, portable

NAME, FILES, PACKAGES, EXTRA, EXACT = "weights", (portable.WEIGHTS,), (), "", True


def write(folder: epath.Path, loaded: Loaded, interface: Interface) -> None:
    """Writes the arrays, bit for bit.

    Args:
        folder: where the file goes.
        loaded: the model.
        interface: not needed.
    """
    del interface
    portable.write_weights(folder, loaded.variables)


def runners(folder: epath.Path, task: Task, interface: Interface) -> Iterator[tuple[str, Callable[..., dict[str, np.ndarray]]]]:
    """Yields the file's name and its runner, on a CPU.

    Args:
        folder: an export.
        task: not needed: `config.json` says all.
        interface: of its task.
    """
    del task
    loaded = load(str(folder), mesh=checking.cpu_mesh())
    run = jax.jit(lambda variables, *inputs: interface.predict(loaded.task, variables, *inputs))
    yield portable.WEIGHTS, lambda *inputs: jax.device_get(run(loaded.variables, *inputs))
