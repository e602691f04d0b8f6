"""Format `savedmodel`: TensorFlow's own, by `jax2tf`. It runs in plain TensorFlow and in TensorFlow Serving.

The signature `serving_default` takes and returns what the task's `Interface` names. It holds a program for CPU and one for CUDA.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath

from halonet_jax.errors import CheckpointError
from halonet_jax.exporting.interface import Interface
from halonet_jax.training.task import Task
from halonet_jax.weights import Loaded

FOLDER, SIGNATURE = "savedmodel", "serving_default"
NAME, FILES, PACKAGES, EXTRA, EXACT = "savedmodel", (FOLDER,), ("tensorflow",), "", False
PLATFORMS = ("cpu", "cuda")


def write(folder: epath.Path, loaded: Loaded, interface: Interface) -> None:
    """Writes the SavedModel.

    Args:
        folder: where its folder goes.
        loaded: the model.
        interface: of its task.
    """
    from jax.experimental import jax2tf

    tf = _tensorflow()
    inputs = interface.abstract(loaded.task, None)
    shapes = [", ".join(["batch", *map(str, x.shape[1:])]) for x in inputs]
    converted = jax2tf.convert(
        lambda variables, *inputs: interface.predict_plainly(loaded.task, variables, *inputs),
        polymorphic_shapes=[None, *shapes], with_gradient=False, native_serialization_platforms=PLATFORMS,
    )  # fmt: skip
    module = tf.Module()
    module.weights = jax.tree.map(lambda x: tf.Variable(np.asarray(x), trainable=False), loaded.variables)
    specs = [tf.TensorSpec(x.shape, tf.as_dtype(x.dtype), name=name) for name, x in zip(interface.inputs, inputs)]
    serve = tf.function(lambda *inputs: converted(_plain(module.weights), *inputs), input_signature=specs, autograph=False)
    tf.saved_model.save(module, str(folder / FOLDER), signatures={SIGNATURE: serve.get_concrete_function()})


def runners(folder: epath.Path, task: Task, interface: Interface) -> Iterator[tuple[str, Callable[..., dict[str, np.ndarray]]]]:
    """Yields the folder's name and its runner, in TensorFlow.

    Args:
        folder: an export.
        task: not needed: the model normalises.
        interface: of the task.

    Raises:
        CheckpointError: the folder is damaged.
    """
    del task
    tf = _tensorflow()
    try:
        model = tf.saved_model.load(str(folder / FOLDER))
        serve = model.signatures[SIGNATURE]
    except Exception as error:  # TensorFlow raises many types
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder / FOLDER} is no SavedModel of ours ({reason}); export the model again") from None

    def run(*inputs, model=model):  # `model` stays alive with the runner: its variables go with it
        found = serve(**{name: tf.constant(x) for name, x in zip(interface.inputs, inputs)})
        return {name: x.numpy() for name, x in found.items()}

    yield FOLDER, run


def _plain(tree):
    """A tracked module wraps dicts in types that JAX does not know as trees."""
    return {key: _plain(value) for key, value in tree.items()} if hasattr(tree, "items") else tree


def _tensorflow():
    """TensorFlow, which must leave the memory of a GPU to JAX."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow as tf
    with contextlib.suppress(RuntimeError):  # it has started: whoever started it has chosen its devices
        tf.config.set_visible_devices([], "GPU")
    return tf
