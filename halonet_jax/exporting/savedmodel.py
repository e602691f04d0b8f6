"""Format `savedmodel`: TensorFlow's own, by `jax2tf`. It runs in plain TensorFlow and in TensorFlow Serving.

The signature `serving_default` takes `images`, uint8 `[batch, height, width, 3]`, and returns `logits`, float32. It holds a
program for CPU and one for CUDA.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath

from halonet_jax.errors import CheckpointError
from halonet_jax.training.task import Task
from halonet_jax.weights import Loaded

FOLDER, SIGNATURE = "savedmodel", "serving_default"
NAME, FILES, PACKAGES, EXTRA, EXACT = "savedmodel", (FOLDER,), ("tensorflow",), "", False
PLATFORMS = ("cpu", "cuda")


def write(folder: epath.Path, loaded: Loaded) -> None:
    """Writes the SavedModel.

    Args:
        folder: where its folder goes.
        loaded: the model.
    """
    from jax.experimental import jax2tf

    tf = _tensorflow()
    height, width = loaded.image_shape

    def predict(variables, images):
        return loaded.task.predict(variables["params"], variables["batch_stats"], {"image": images})

    converted = jax2tf.convert(
        predict, polymorphic_shapes=[None, f"batch, {height}, {width}, 3"], with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )  # fmt: skip
    module = tf.Module()
    module.weights = jax.tree.map(lambda x: tf.Variable(np.asarray(x), trainable=False), loaded.variables)
    images = tf.TensorSpec((None, height, width, 3), tf.uint8, name="images")
    serve = tf.function(
        lambda images: {"logits": converted(_plain(module.weights), images)}, input_signature=[images], autograph=False
    )
    tf.saved_model.save(module, str(folder / FOLDER), signatures={SIGNATURE: serve.get_concrete_function()})


def runners(folder: epath.Path, task: Task) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Yields the folder's name and its runner, in TensorFlow.

    Args:
        folder: an export.
        task: not needed: the model normalises.

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
    # `model` stays alive with the runner: its variables go with it.
    yield FOLDER, lambda images, model=model: serve(images=tf.constant(images))["logits"].numpy()


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
