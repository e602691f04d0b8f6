"""Tasks by name. A definition opens a task's data and makes a `Task`, which the training loop serves."""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections

from halonet_jax.errors import ConfigError
from halonet_jax.tasks import classification
from halonet_jax.training.task import Task


class Definition(NamedTuple):
    """What `config.task` names.

    Attributes:
        open_source: `(config, split, class_names=None, flag=…) -> Source`. With `class_names`, labels must mean these classes.
            `flag` spells the command-line flag of a config key, for remedies in messages.
        metadata: `(config, source) -> dict`, the `Task.metadata` of a run on this source.
        expected_metadata: `(config) -> dict`, the same without opening data, for compile checks.
        make_task: `(config, metadata) -> Task`.
    """

    open_source: Callable[..., Any]
    metadata: Callable[..., dict]
    expected_metadata: Callable[[ml_collections.ConfigDict], dict]
    make_task: Callable[[ml_collections.ConfigDict, dict], Task]


_DEFINITIONS = {
    "classification": Definition(
        classification.open_source, classification.metadata, classification.expected_metadata, classification.make_task
    )
}


def register(name: str, definition: Definition) -> None:
    """Adds a task, or replaces the one of this name: `config.task = name` then uses it."""
    _DEFINITIONS[name] = definition


def find(config: ml_collections.ConfigDict) -> Definition:
    """The definition that `config.task` names.

    Raises:
        ConfigError: for an unknown name.
    """
    if config.task not in _DEFINITIONS:
        close = difflib.get_close_matches(str(config.task), _DEFINITIONS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(_DEFINITIONS)}"
        raise ConfigError(f"task={config.task!r} is unknown; {hint}")
    return _DEFINITIONS[config.task]


def make_task(config: ml_collections.ConfigDict, metadata: dict) -> Task:
    """The task of a config, for data or a checkpoint with this metadata."""
    return find(config).make_task(config, metadata)
