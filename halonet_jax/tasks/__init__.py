"""Tasks: a model and its loss, behind the contract of `halonet_jax.training.task`."""

import ml_collections

from halonet_jax.tasks import classification
from halonet_jax.training.task import Task

_MAKERS = {"classification": classification.make_task}  # config.TASKS has the same names


def make_task(config: ml_collections.ConfigDict, num_classes: int) -> Task:
    """The task that `config.task` names."""
    return _MAKERS[config.task](config, num_classes)
