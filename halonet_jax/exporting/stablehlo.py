"""Format `stablehlo`: programs that JAX, and other users of StableHLO, run without this package.

Each file is one program for CPU, CUDA and TPU, for any batch size, with the weights inside. On TPU it runs the fused kernels; on
CUDA the einsum, since `jax.export` takes no Triton kernels.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export

from halonet_jax.errors import CheckpointError
from halonet_jax.training.task import Task
from halonet_jax.weights import Loaded

# Images as they are, uint8, or normalised by the caller, float32.
IMAGES, NORMALIZED = "model_uint8.stablehlo", "model_float32.stablehlo"
NAME, FILES, PACKAGES, EXTRA, EXACT = "stablehlo", (IMAGES, NORMALIZED), (), "", False
PLATFORMS = ("cpu", "cuda", "tpu")


def write(folder: epath.Path, loaded: Loaded) -> None:
    """Writes both programs.

    Args:
        folder: where the files go.
        loaded: the model.
    """
    # As NumPy arrays, the weights are constants of no device. Behind the barrier XLA does not compute with them while it
    # compiles: that takes long, and rounds otherwise than the checkpoint's own program.
    variables = jax.tree.map(np.asarray, loaded.variables)
    weights = lambda: jax.lax.optimization_barrier(jax.tree.map(jnp.asarray, variables))

    def from_images(images):
        held = weights()
        return loaded.task.predict(held["params"], held["batch_stats"], {"image": images})

    def from_normalized(images):
        return loaded.model.apply(weights(), images, train=False)

    size = loaded.config.data.image_size
    for name, function, dtype in ((IMAGES, from_images, jnp.uint8), (NORMALIZED, from_normalized, jnp.float32)):
        images = jax.ShapeDtypeStruct(export.symbolic_shape(f"batch, {size}, {size}, 3"), dtype)
        (folder / name).write_bytes(export.export(jax.jit(function), platforms=PLATFORMS)(images).serialize())


def runners(folder: epath.Path, task: Task) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Yields each file's name and its runner, on JAX's default device.

    Args:
        folder: an export.
        task: normalises for the program that takes normalised images.

    Raises:
        CheckpointError: a file is damaged, or of another version of JAX's format.
    """
    run = _open(folder / IMAGES)
    yield IMAGES, lambda images: np.asarray(run(images))
    normalize, run_normalized = jax.jit(lambda images: task.normalize(images).astype(jnp.float32)), _open(folder / NORMALIZED)
    yield NORMALIZED, lambda images: np.asarray(run_normalized(normalize(images)))


def _open(path):
    try:
        return jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
    except Exception as error:  # of many types, by where the file is damaged
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is no program that this JAX reads ({reason}); export the model again") from None
