"""Format `stablehlo`: programs that JAX, and other users of StableHLO, run without this package.

Each file is one program for CPU, CUDA and TPU, for any batch size. On TPU it runs the fused kernels; on CUDA the einsum, since
`jax.export` takes no Triton kernels. Its first argument is the weights, as `safetensors` reads them from `model.safetensors`: as
constants of the program, XLA would compute with them in another order, and the logits would not be the checkpoint's, bit for bit.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export

from halonet_jax.errors import CheckpointError
from halonet_jax.exporting import checking
from halonet_jax.training.task import Task
from halonet_jax.weights import Loaded, load, portable

# Images as they are, uint8, or normalised by the caller, float32.
IMAGES, NORMALIZED = "model_uint8.stablehlo", "model_float32.stablehlo"
NAME, FILES, PACKAGES, EXTRA, EXACT = "stablehlo", (IMAGES, NORMALIZED, portable.WEIGHTS), (), "", False
PLATFORMS = ("cpu", "cuda", "tpu")


def write(folder: epath.Path, loaded: Loaded) -> None:
    """Writes both programs, and the weights where they are not there yet.

    Args:
        folder: where the files go.
        loaded: the model.
    """
    if not (folder / portable.WEIGHTS).exists():
        portable.write_weights(folder, loaded.variables)
    weights, structure = portable.named(loaded.variables), jax.tree.structure(loaded.variables)
    variables = lambda weights, names=tuple(weights): jax.tree.unflatten(structure, [weights[name] for name in names])

    def from_images(weights, images):
        held = variables(weights)
        return loaded.task.predict(held["params"], held["batch_stats"], {"image": images})

    def from_normalized(weights, images):
        return loaded.model.apply(variables(weights), images, train=False)

    height, width = loaded.image_shape
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    for name, function, dtype in ((IMAGES, from_images, jnp.uint8), (NORMALIZED, from_normalized, jnp.float32)):
        images = jax.ShapeDtypeStruct(export.symbolic_shape(f"batch, {height}, {width}, 3"), dtype)
        (folder / name).write_bytes(export.export(jax.jit(function), platforms=PLATFORMS)(abstract, images).serialize())


def runners(folder: epath.Path, task: Task) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Yields each program's name and its runner, on JAX's default device.

    Args:
        folder: an export.
        task: normalises for the program that takes normalised images.

    Raises:
        CheckpointError: a file is damaged, or of another version of JAX's format.
    """
    run = _open(folder / IMAGES)
    variables = load(str(folder), mesh=checking.cpu_mesh()).variables  # checked
    weights = {name: jnp.asarray(np.asarray(x)) for name, x in portable.named(variables).items()}
    yield IMAGES, lambda images: np.asarray(run(weights, images))
    normalize, run_normalized = jax.jit(lambda images: task.normalize(images).astype(jnp.float32)), _open(folder / NORMALIZED)
    yield NORMALIZED, lambda images: np.asarray(run_normalized(weights, normalize(images)))


def _open(path):
    try:
        return jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
    except Exception as error:  # of many types, by where the file is damaged
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is no program that this JAX reads ({reason}); export the model again") from None
