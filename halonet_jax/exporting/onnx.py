"""Format `onnx`, by `jax2onnx`: one file, which onnxruntime and other runtimes run.

The model takes and returns what the task's `Interface` names. It serves classifiers: jax2onnx does not convert the loops of a
detector.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath

from halonet_jax.errors import CheckpointError, ExportError
from halonet_jax.exporting import checking
from halonet_jax.exporting.interface import Interface
from halonet_jax.models import transfer
from halonet_jax.training import sharding
from halonet_jax.training.task import Task
from halonet_jax.weights import Loaded

FILE = "model.onnx"
NAME, FILES, PACKAGES, EXTRA, EXACT = "onnx", (FILE,), ("jax2onnx", "onnxruntime"), "onnx", False
_LIMIT = 2**31  # bytes: of a protobuf message


def write(folder: epath.Path, loaded: Loaded, interface: Interface) -> None:
    """Writes the model.

    Args:
        folder: where the file goes.
        loaded: the model. It computes in float32.
        interface: of its task.

    Raises:
        ExportError: it does not, or is too large.
    """
    with _quiet():
        import jax2onnx

    if loaded.config.model.dtype != "float32":
        raise ExportError(f"onnx: the model computes in {loaded.config.model.dtype}, ONNX in float32; add --dtype=float32")
    # jax2onnx converts neither the reference attention, with its softmax over two axes, nor loops over blocks.
    backbone, variables = loaded.model.backbone, jax.tree.map(np.asarray, loaded.variables)
    if backbone.scan:
        variables = jax.tree.map(np.asarray, transfer.unstack_blocks(variables, backbone.stages))
    model = loaded.model.clone(backbone=backbone.clone(attention_impl="xla", remat=False, scan=False))
    mesh = checking.cpu_mesh()

    def predict(images):
        # With a mesh the platform is known, and the program holds no choice of platform, which jax2onnx does not convert.
        with sharding.use(mesh):
            return interface.apply(model, variables, loaded.task.normalize(images))

    with _quiet():
        converted = jax2onnx.to_onnx(
            predict, interface.abstract(loaded.task, "batch"), model_name="halonet_jax", input_names=list(interface.inputs),
            output_names=list(interface.outputs),
        )  # fmt: skip
    if converted.ByteSize() >= _LIMIT:
        raise ExportError(f"onnx: the model has {converted.ByteSize()} bytes, ONNX takes {_LIMIT}; leave onnx out of --format")
    # All in one file: with weights in a second one, the file could not be renamed.
    (folder / FILE).write_bytes(converted.SerializeToString())


@contextlib.contextmanager
def _quiet():
    """jax2onnx and onnx_ir print and log pages on what they try and leave out. What they raise says enough."""
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def runners(folder: epath.Path, task: Task, interface: Interface) -> Iterator[tuple[str, Callable[..., dict[str, np.ndarray]]]]:
    """Yields the file's name and its runner, in onnxruntime on a CPU.

    Args:
        folder: an export.
        task: not needed: the model normalises.
        interface: of the task.

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
    names = interface.outputs
    yield FILE, lambda *inputs: dict(zip(names, session.run(list(names), dict(zip(interface.inputs, inputs)))))
