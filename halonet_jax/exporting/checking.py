"""Runs an export in its own runtime and compares its logits with the checkpoint's."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from halonet_jax.errors import ConfigError, ExportError
from halonet_jax.training import sharding
from halonet_jax.weights import Loaded

BATCH_SIZES = (1, 2, 5)
# Largest difference of a logit, as a share of the largest logit or of 1, whichever is more. Runtimes sum in other orders.
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.05}


class Check(NamedTuple):
    """What was compared.

    Attributes:
        artefact: the file or folder that was run.
        batch_sizes: of the images that it was run on.
        max_error: largest difference of a logit.
        tolerance: largest difference that is allowed.
        max_logit: largest magnitude of the checkpoint's logits.
    """

    artefact: str
    batch_sizes: tuple[int, ...]
    max_error: float
    tolerance: float
    max_logit: float


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


def sample_images(height: int, width: int) -> np.ndarray:
    """Returns images to compare on: noise, coarse noise, a gradient, and two blank ones, which loaders pad batches with.

    Args:
        height: in pixels.
        width: in pixels.

    Returns:
        uint8 [5, height, width, 3]
    """
    rng = np.random.default_rng(0)
    images = np.zeros((max(BATCH_SIZES), height, width, 3), np.uint8)
    images[0] = rng.integers(0, 256, (height, width, 3))
    coarse = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3))
    images[1] = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
    images[2] = np.linspace(0, 255, height)[:, None, None]
    return images


def expected_logits(loaded: Loaded, images: np.ndarray) -> dict[int, np.ndarray]:
    """Returns the checkpoint's logits of the first images, by batch size.

    Args:
        loaded: the checkpoint, on `cpu_mesh`.
        images: of `sample_images`.

    Raises:
        ExportError: a logit is not finite.
    """
    logits = {size: np.asarray(loaded.logits(images[:size])) for size in BATCH_SIZES}
    if not all(np.isfinite(x).all() for x in logits.values()):
        raise ExportError(f"step {loaded.step} of {loaded.folder} gives logits that are not finite; choose another --step")
    return logits


def compare(
    artefact: str, run: Callable[[np.ndarray], np.ndarray], images: np.ndarray, expected: dict[int, np.ndarray], share: float
) -> Check:
    """Runs an export on all batch sizes.

    Args:
        artefact: name of the file or folder, for messages.
        run: its runner.
        images: uint8 [B, height, width, 3].
        expected: of `expected_logits`.
        share: the tolerance, as a share of the largest logit or of 1.

    Raises:
        ExportError: the export does not run, or its logits differ by more than the tolerance.
    """
    max_logit = max(float(np.abs(x).max()) for x in expected.values())
    tolerance, max_error = share * max(1.0, max_logit), 0.0
    for size, ours in expected.items():
        try:
            found = np.asarray(run(images[:size]))
        except Exception as error:  # runtimes raise types of their own
            reason = " ".join(str(error).split())[:300]
            raise ExportError(f"{artefact} does not run with a batch of {size} ({reason}); leave its format out") from None
        if found.shape != ours.shape:
            raise ExportError(f"{artefact} gives logits {list(found.shape)} instead of {list(ours.shape)}; leave its format out")
        error = float(np.abs(found - ours).max())
        if not error <= tolerance:  # NaN fails, too
            raise ExportError(
                f"{artefact} differs from the checkpoint: with a batch of {size} by {error:.2g}, and at most {tolerance:.2g} is "
                "allowed; leave its format out"
            )
        max_error = max(max_error, error)
    return Check(artefact, tuple(expected), max_error, tolerance, max_logit)
