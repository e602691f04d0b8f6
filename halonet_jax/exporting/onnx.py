"""Format `onnx`, by `jax2onnx`: one file, which onnxruntime and other runtimes run.

The model takes `images`, uint8 `[batch, size, size, 3]`, and returns `logits`, float32.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from halonet_jax.errors import CheckpointError, ExportError
from halonet_jax.exporting import checking
from halonet_jax.training import sharding
from halonet_jax.training.task import Task
from halonet_jax.weights import Loaded

FILE = "model.onnx"
NAME, FILES, PACKAGES, EXTRA, EXACT = "onnx", (FILE,), ("jax2onnx", "onnxruntime"), "onnx", False
_LIMIT = 2**31  # bytes: of a protobuf message


def write(folder: epath.Path, loaded: Loaded) -> None:
    """Writes the model.

    Args:
        folder: where the file goes.
        loaded: the model. It computes in float32.

    Raises:
        ExportError: it does not, or is too large.
    """
    import jax2onnx

    if loaded.config.model.dtype != "float32":
        raise ExportError(f"onnx: the model computes in {loaded.config.model.dtype}, ONNX in float32; add --dtype=float32")
    # The reference attention has a softmax over two axes, which jax2onnx does not convert.
    model = loaded.model.clone(backbone=loaded.model.backbone.clone(attention_impl="xla", remat=False))
    variables, size, mesh = jax.tree.map(np.asarray, loaded.variables), loaded.config.data.image_size, checking.cpu_mesh()

    def predict(images):
        # With a mesh the platform is known, and the program holds no choice of platform, which jax2onnx does not convert.
        with sharding.use(mesh):
            return model.apply(variables, loaded.task.normalize(images), train=False)

    with _quiet():
        converted = jax2onnx.to_onnx(
            predict, [jax.ShapeDtypeStruct(("batch", size, size, 3), jnp.uint8)], model_name="halonet_jax",
            input_names=["images"], output_names=["logits"],
        )  # fmt: skip
    if converted.ByteSize() >= _LIMIT:
        raise ExportError(f"onnx: the model has {converted.ByteSize()} bytes, ONNX takes {_LIMIT}; leave onnx out of --format")
    # All in one file: with weights in a second one, the file could not be renamed.
    (folder / FILE).write_bytes(converted.SerializeToString())


@contextlib.contextmanager
def _quiet():
    """jax2onnx prints what it tries, and onnx_ir warns of every shape that a later pass fills in. What it raises says enough."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def runners(folder: epath.Path, task: Task) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Yields the file's name and its runner, in onnxruntime on a CPU.

    Args:
        folder: an export.
        task: not needed: the model normalises.

    Raises:
        CheckpointError: the file is damaged.
    """
    del task
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # otherwise a line for every constant that it drops
    try:
        session = onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of types of its own
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder / FILE} is no model that onnxruntime reads ({reason}); export the model again") from None
    yield FILE, lambda images: session.run(["logits"], {"images": images})[0]
