"""What an exported program takes and returns, by task. All formats have the same names."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from halonet_jax.training.task import Task


@dataclasses.dataclass(frozen=True)
class Difference:
    """How an export's outputs differ from the checkpoint's.

    Attributes:
        error: the largest difference, in the unit of the tolerance.
        size: the largest magnitude of the checkpoint's outputs; the tolerance is a share of it, or of 1 if it is less.
        problem: what is wrong beside that; "" if nothing is.
        compared: number of objects; None of classifiers.
    """

    error: float
    size: float = 1.0
    problem: str = ""
    compared: int | None = None


@dataclasses.dataclass(frozen=True)
class Interface:
    """The interface of one task.

    Attributes:
        inputs: field of a batch by the name of the input. The first are the images.
        outputs: names of the outputs.
        formats: those that can hold the program.
        pack: from what `Task.predict` returns to the outputs by name.
        unpack: the way back.
        apply: `(model, variables, *inputs) -> what Task.predict returns`, of normalised images.
        plain: `(model) -> model` of the same outputs and of operations that other runtimes know.
        samples: `(height, width) -> inputs`, NumPy arrays of `checking.BATCH_SIZES`' most images, to compare on.
        compare: `(expected, found, task, tolerance) -> Difference`, of outputs by name. With a tolerance of 0, any
            difference is an error.
    """

    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    formats: tuple[str, ...]
    pack: Callable[[Any], dict[str, Any]]
    unpack: Callable[[Mapping[str, Any]], Any]
    apply: Callable[..., Any]
    plain: Callable[[Any], Any]
    samples: Callable[[int, int], tuple[np.ndarray, ...]]
    compare: Callable[..., Difference]

    def predict(self, task: Task, variables: Any, *inputs: Any) -> dict[str, Any]:
        """Returns the outputs by name.

        Args:
            task: the model's.
            variables: `{"params": …, "batch_stats": …}`.
            *inputs: arrays, in the order of `inputs`.
        """
        batch = dict(zip(self.inputs.values(), inputs, strict=True))
        return self.pack(task.predict(variables["params"], variables["batch_stats"], batch))

    def predict_plainly(self, task: Task, variables: Any, *inputs: Any) -> dict[str, Any]:
        """Returns the outputs by name, by operations that other runtimes know.

        Args:
            task: as of `predict`.
            variables: likewise.
            *inputs: likewise.
        """
        images, *rest = inputs
        return self.pack(self.apply(self.plain(task.model), variables, task.normalize(images), *rest))

    def predict_normalized(self, task: Task, variables: Any, *inputs: Any) -> dict[str, Any]:
        """Returns the outputs by name, of images that `task.normalize` has normalised.

        Args:
            task: as of `predict`.
            variables: likewise.
            *inputs: likewise.
        """
        return self.pack(self.apply(task.model, variables, *inputs))

    def abstract(self, task: Task, batch: Any, images: Any = jnp.uint8) -> list[jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the inputs.

        Args:
            task: as of `predict`.
            batch: number of images, or a symbol for it.
            images: dtype of the images.
        """
        fields = [task.transform(False).fields[name] for name in self.inputs.values()]
        dtypes = [images, *(field.dtype for field in fields[1:])]
        return [jax.ShapeDtypeStruct((batch, *field.shape), dtype) for field, dtype in zip(fields, dtypes)]

    def of_batch(self, batch: Mapping[str, Any]) -> list[np.ndarray]:
        """Returns the inputs that a batch holds.

        Args:
            batch: with the fields of the task's transform.
        """
        return [np.asarray(batch[name]) for name in self.inputs.values()]


def alone(outputs: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Returns a single output as it is, and several by name: what a program returns that has no names for outputs.

    Args:
        outputs: by name.
        names: of all outputs.
    """
    return outputs[names[0]] if len(names) == 1 else dict(outputs)


def named(returned: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the outputs by name, as NumPy arrays, of what `alone` gave.

    Args:
        returned: by a program.
        names: of all outputs.
    """
    found = {names[0]: returned} if len(names) == 1 else returned
    return {name: np.asarray(found[name]) for name in names}
