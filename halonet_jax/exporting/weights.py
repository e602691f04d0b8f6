"""Format `weights`: `model.safetensors`, which `halonet_jax.load` reads."""

from collections.abc import Callable, Iterator

import numpy as np
from etils import epath

from halonet_jax.exporting import checking
from halonet_jax.training.task import Task
from halonet_jax.weights import Loaded, load, portable

NAME, FILES, PACKAGES, EXTRA, EXACT = "weights", (portable.WEIGHTS,), (), "", True


def write(folder: epath.Path, loaded: Loaded) -> None:
    """Writes the arrays, bit for bit.

    Args:
        folder: where the file goes.
        loaded: the model.
    """
    portable.write_weights(folder, loaded.variables)


def runners(folder: epath.Path, task: Task) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Yields the file's name and its runner, on a CPU.

    Args:
        folder: an export.
        task: not needed: `config.json` says all.
    """
    del task
    loaded = load(str(folder), mesh=checking.cpu_mesh())
    yield portable.WEIGHTS, lambda images: np.asarray(loaded.logits(images))
