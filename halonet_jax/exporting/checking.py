"""Runs an export in its own runtime and compares what it gives with the checkpoint."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from halonet_jax.errors import ConfigError, ExportError
from halonet_jax.exporting.interface import Interface
from halonet_jax.training import sharding
from halonet_jax.weights import Loaded

BATCH_SIZES = (1, 2, 5)
# Largest difference of an output, as a share of the largest output or of 1, whichever is more. Runtimes sum in other orders.
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.05}
_OF_OBJECTS = {"float32": 1e-4, "bfloat16": 0.05}  # of scores, masks and boxes, which have gone through exponentials


class Check(NamedTuple):
    """What was compared.

    Attributes:
        artefact: the file or folder that was run.
        batch_sizes: of the images that it was run on.
        max_error: largest difference of a logit; of objects: of a score, of a mask, or of a box as a share of the image's side.
        tolerance: largest difference that is allowed.
        max_logit: largest magnitude of the checkpoint's logits; None of detectors.
        objects: number of objects that were compared; None of classifiers.
    """

    artefact: str
    batch_sizes: tuple[int, ...]
    max_error: float
    tolerance: float
    max_logit: float | None
    objects: int | None

    def __str__(self):
        """What is told when an export has been checked."""
        sizes = ", ".join(map(str, self.batch_sizes))
        what = f"logits up to {self.max_logit:.3g}" if self.objects is None else f"{self.objects} objects"
        error = f"{self.artefact}: largest error {self.max_error:.2g} of {what}, allowed {self.tolerance:.2g}"
        return f"{error}, batch sizes {sizes}"


def cpu_mesh() -> jax.sharding.Mesh:
    """Returns a mesh of one CPU device: all exports are run back on a CPU, where all runtimes compute alike.

    Raises:
        ConfigError: JAX was told to use no CPU.
    """
    try:
        return sharding.make_mesh(devices=jax.local_devices(backend="cpu")[:1])
    except RuntimeError:
        platforms = jax.config.jax_platforms
        raise ConfigError(f"JAX_PLATFORMS={platforms} leaves out the CPU, which checks exports; add ',cpu' to it") from None


def tolerance(loaded: Loaded) -> float:
    """Returns the largest difference of an output that is allowed, as a share of the largest output or of 1.

    Args:
        loaded: the checkpoint.
    """
    return (_OF_OBJECTS if loaded.config.task == "detection" else TOLERANCES)[loaded.config.model.dtype]


def expected_outputs(loaded: Loaded, interface: Interface, inputs: Sequence[np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
    """Returns the checkpoint's outputs by name, of the first inputs, by batch size.

    Args:
        loaded: the checkpoint, on `cpu_mesh`.
        interface: of its task.
        inputs: of `Interface.samples`.

    Raises:
        ExportError: an output is not finite.
    """
    run = jax.jit(lambda variables, *inputs: interface.predict(loaded.task, variables, *inputs))
    outputs = {size: jax.device_get(run(loaded.variables, *(x[:size] for x in inputs))) for size in BATCH_SIZES}
    broken = [name for found in outputs.values() for name, x in found.items() if not np.isfinite(x).all()]
    if broken:
        raise ExportError(f"step {loaded.step} of {loaded.folder} gives {broken[0]} that are not finite; choose another --step")
    return outputs


def compare(
    artefact: str,
    run: Callable[..., dict[str, np.ndarray]],
    inputs: Sequence[np.ndarray],
    expected: dict[int, dict[str, np.ndarray]],
    interface: Interface,
    task: Any,
    share: float,
) -> Check:
    """Runs an export on all batch sizes.

    Args:
        artefact: name of the file or folder, for messages.
        run: its runner.
        inputs: of `Interface.samples`.
        expected: of `expected_outputs`.
        interface: of the task.
        task: the checkpoint's.
        share: the tolerance, as a share of the largest output or of 1; 0: the outputs must be equal.

    Raises:
        ExportError: the export does not run, or its outputs differ by more than the tolerance.
    """
    differences = []
    for size, ours in expected.items():
        try:
            found = {name: np.asarray(x) for name, x in run(*(x[:size] for x in inputs)).items()}
        except Exception as error:  # runtimes raise types of their own
            reason = " ".join(str(error).split())[:300]
            raise ExportError(f"{artefact} does not run with a batch of {size} ({reason}); leave its format out") from None
        differences.append(interface.compare(ours, found, task, share))
        if problem := differences[-1].problem:
            raise ExportError(f"{artefact} {problem}, with a batch of {size}; leave its format out")
    largest = max(each.size for each in differences)
    allowed = share * max(1.0, largest)
    for size, each in zip(expected, differences):
        if not each.error <= allowed:  # NaN fails, too
            raise ExportError(
                f"{artefact} differs from the checkpoint: with a batch of {size} by {each.error:.2g}, and at most {allowed:.2g} "
                "is allowed; leave its format out"
            )
    objects = None if differences[0].compared is None else sum(each.compared for each in differences)
    max_error = max(each.error for each in differences)
    return Check(artefact, tuple(expected), max_error, allowed, largest if objects is None else None, objects)
