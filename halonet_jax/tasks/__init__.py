"""Tasks by name. A definition opens a task's data and makes the `Task` that the training loop runs."""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections

from halonet_jax.errors import ConfigError
from halonet_jax.tasks import classification, detection
from halonet_jax.training.task import Task


class Definition(NamedTuple):
    """How a task opens its data and makes its `Task`. `config.task` names a definition.

    Attributes:
        open_source: `(config, split, class_names=None, flag=…) -> Source`. With `class_names`, the source's labels must
            mean these classes. `flag` maps a config key to its command-line flag, for error messages. Where there is
            `scored`, it also takes `multi_label`: whether an image may have several labels.
        metadata: `(config, source) -> dict`, the `Task.metadata` of a run on this source.
        expected_metadata: `(config) -> dict`, the same without opening data, for compile checks.
        make_task: `(config, metadata) -> Task`.
        scored: `(task, config, scoring) -> Task`: the task with another evaluation, a `halonet_jax.tasks.scoring.Scoring`.
            None where a task has one evaluation.
    """

    open_source: Callable[..., Any]
    metadata: Callable[..., dict]
    expected_metadata: Callable[[ml_collections.ConfigDict], dict]
    make_task: Callable[[ml_collections.ConfigDict, dict], Task]
    scored: Callable[..., Task] | None = None


_DEFINITIONS = {
    "classification": Definition(
        classification.open_source,
        classification.metadata,
        classification.expected_metadata,
        classification.make_task,
        classification.scored,
    ),
    "detection": Definition(detection.open_source, detection.metadata, detection.expected_metadata, detection.make_task),
}


def register(name: str, definition: Definition) -> None:
    """Adds a task, or replaces the task of this name.

    Args:
        name: the value of `config.task` that selects it.
        definition: how its data is opened and its `Task` is made.
    """
    _DEFINITIONS[name] = definition


def find(config: ml_collections.ConfigDict) -> Definition:
    """Returns the definition that `config.task` names.

    Args:
        config: a whole config.

    Raises:
        ConfigError: the name is unknown.
    """
    if config.task not in _DEFINITIONS:
        close = difflib.get_close_matches(str(config.task), _DEFINITIONS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(_DEFINITIONS)}"
        raise ConfigError(f"task={config.task!r} is unknown; {hint}")
    return _DEFINITIONS[config.task]


def make_task(config: ml_collections.ConfigDict, metadata: dict) -> Task:
    """Returns the task of a config.

    Args:
        config: a whole config.
        metadata: the metadata of the data or of a checkpoint, as `Definition.metadata` returns it.

    Raises:
        ConfigError: `config.task` is unknown.
    """
    return find(config).make_task(config, metadata)
