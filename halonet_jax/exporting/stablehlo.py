"""Format `stablehlo`: programs that JAX, and other users of StableHLO, run without this package.

Each file is one program for CPU, CUDA and TPU, for any batch size. On TPU it runs the fused kernels; on CUDA the einsum, since
`jax.export` takes no Triton kernels. Its first argument is the weights, as `safetensors` reads them from `model.safetensors`: as
constants of the program, XLA would compute with them in another order, and the outputs would not be the checkpoint's, bit for
bit. Inputs and outputs are those of the task's `Interface`; a program of one output returns it alone, others return a dict.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export

from halonet_jax.errors import CheckpointError
from halonet_jax.exporting import checking
from halonet_jax.exporting.interface import Interface, alone, named
from halonet_jax.training.task import Task
from halonet_jax.weights import Loaded, load, portable

# Images as they are, uint8, or normalised by the caller, float32.
IMAGES, NORMALIZED = "model_uint8.stablehlo", "model_float32.stablehlo"
NAME, FILES, PACKAGES, EXTRA, EXACT = "stablehlo", (IMAGES, NORMALIZED, portable.WEIGHTS), (), "", False
PLATFORMS = ("cpu", "cuda", "tpu")


def write(folder: epath.Path, loaded: Loaded, interface: Interface) -> None:
    """Writes both programs, and the weights where they are not there yet.

    Args:
        folder: where the files go.
        loaded: the model.
        interface: of its task.
    """
    if not (folder / portable.WEIGHTS).exists():
        portable.write_weights(folder, loaded.variables)
    weights, structure = portable.named(loaded.variables), jax.tree.structure(loaded.variables)
    variables = lambda weights, names=tuple(weights): jax.tree.unflatten(structure, [weights[name] for name in names])

    def program(predict):
        return lambda weights, *inputs: alone(predict(loaded.task, variables(weights), *inputs), interface.outputs)

    (batch,) = export.symbolic_shape("batch")
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    for name, predict, dtype in (
        (IMAGES, interface.predict, jnp.uint8),
        (NORMALIZED, interface.predict_normalized, jnp.float32),
    ):
        inputs = interface.abstract(loaded.task, batch, dtype)
        exported = export.export(jax.jit(program(predict)), platforms=PLATFORMS)(abstract, *inputs)
        (folder / name).write_bytes(exported.serialize())


def runners(folder: epath.Path, task: Task, interface: Interface) -> Iterator[tuple[str, Callable[..., dict[str, np.ndarray]]]]:
    """Yields each program's name and its runner, on JAX's default device.

    Args:
        folder: an export.
        task: normalises for the program that takes normalised images.
        interface: of the task.

    Raises:
        CheckpointError: a file is damaged, or of another version of JAX's format.
    """
    run = _open(folder / IMAGES)
    variables = load(str(folder), mesh=checking.cpu_mesh()).variables  # checked
    weights = {name: jnp.asarray(np.asarray(x)) for name, x in portable.named(variables).items()}
    yield IMAGES, lambda *inputs: named(run(weights, *inputs), interface.outputs)
    normalize, run_normalized = jax.jit(lambda images: task.normalize(images).astype(jnp.float32)), _open(folder / NORMALIZED)
    yield NORMALIZED, lambda images, *rest: named(run_normalized(weights, normalize(images), *rest), interface.outputs)


def _open(path):
    try:
        return jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
    except Exception as error:  # of many types, by where the file is damaged
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is no program that this JAX reads ({reason}); export the model again") from None
