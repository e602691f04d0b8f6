"""The formats by name, and what they have in common."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from halonet_jax.errors import CheckpointError, ConfigError, ExportError
from halonet_jax.exporting import classification, detection, onnx, savedmodel, stablehlo, weights
from halonet_jax.exporting.interface import Interface
from halonet_jax.training.task import Task
from halonet_jax.weights import Loaded, portable

# (*inputs) -> outputs by name, see `Interface`
Runner = Callable[..., dict[str, np.ndarray]]
_INTERFACES = {"classification": classification.INTERFACE, "detection": detection.INTERFACE}


class Format(Protocol):
    """What the module of a format provides.

    Attributes:
        NAME: the value of `--format` that selects it.
        FILES: files or folders that it writes; the first says that a folder holds the format.
        PACKAGES: modules that it imports beside those that training needs.
        EXTRA: the extra of setup.py that installs them.
        EXACT: whether its outputs are the checkpoint's, bit for bit.
    """

    NAME: str
    FILES: tuple[str, ...]
    PACKAGES: tuple[str, ...]
    EXTRA: str
    EXACT: bool

    def write(self, folder: epath.Path, loaded: Loaded, interface: Interface) -> None:
        """Writes the model's files into an existing folder."""
        ...

    def runners(self, folder: epath.Path, task: Task, interface: Interface) -> Iterator[tuple[str, Runner]]:
        """Opens one file after the other, in the format's own runtime. The first is the one that `evaluate` runs."""
        ...


FORMATS: dict[str, Format] = {module.NAME: module for module in (weights, stablehlo, savedmodel, onnx)}


def check(names: Sequence[str], task: str, what: Any) -> Interface:
    """Checks that formats exist, serve a task, and that what they need is installed. Returns the task's interface.

    Args:
        names: of formats.
        task: name of the task.
        what: the model, for messages.

    Raises:
        ConfigError: no name is given, one is unknown or given twice, or a package is missing.
        ExportError: the task cannot be exported, or not in one of the formats.
    """
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"format {name!r} is unknown; use one or more of {','.join(FORMATS)}")
        if names.count(name) > 1:
            raise ConfigError(f"format {name!r} is given {names.count(name)} times; give it once")
    if not names:
        raise ConfigError(f"no format is given; use one or more of {','.join(FORMATS)}")
    interface = interface_of(task, what)
    for name in names:
        if name not in interface.formats:
            raise ExportError(
                f"format {name} does not serve task={task!r}, which {what} was trained for; use one or more of "
                f"{','.join(interface.formats)}"
            )
        check_installed(FORMATS[name])
    return interface


def check_installed(format: Format) -> None:
    """Checks that the packages of a format are installed.

    Args:
        format: one of `FORMATS`.

    Raises:
        ConfigError: one is missing; the message has pip's command.
    """
    missing = [name for name in format.PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        command = f"pip install -e '.[{format.EXTRA}]'" if format.EXTRA else f"pip install {' '.join(missing)}"
        raise ConfigError(f"format {format.NAME} needs {' and '.join(missing)}; {command}")


def patterns(name: str | None) -> tuple[str, ...]:
    """Returns the patterns of the files that an evaluation needs from the hub.

    Args:
        name: of a format; None: weights.
    """
    files = FORMATS[name].FILES if name in FORMATS else weights.FILES
    return (portable.CONFIG, *files, *(f"{file}/*" for file in files))


def find(folder: epath.Path, name: str | None = None) -> str:
    """Returns the name of the format to open: the given one, or the first that the folder holds.

    Args:
        folder: an export.
        name: of a format; None: any.

    Raises:
        ConfigError: the name is unknown.
        CheckpointError: the folder does not hold the format, or holds none.
    """
    if name is not None and name not in FORMATS:
        raise ConfigError(f"format {name!r} is unknown; use one of {', '.join(FORMATS)}")
    present = [format.NAME for format in FORMATS.values() if (folder / format.FILES[0]).exists()]
    if name is None and present:
        return present[0]
    if name not in present:
        what = f"no {FORMATS[name].FILES[0]}" if name else "no model"
        remedy = f"use {' or '.join(f'--format={other}' for other in present)}, or " if present else ""
        raise CheckpointError(f"{folder} holds {what}; {remedy}export the model with halonet_jax.export")
    return name


def interface_of(task: str, what: Any) -> Interface:
    """Returns the interface of a task.

    Args:
        task: name of the task.
        what: the model, for messages.

    Raises:
        ExportError: the task has none.
    """
    if task not in _INTERFACES:
        known = " and ".join(map(repr, _INTERFACES))
        raise ExportError(
            f"export serves task={known}, and {what} was trained for {task!r}; what serves all tasks is halonet_jax.evaluate"
        )
    return _INTERFACES[task]


def open_predict(folder: epath.Path, name: str, task_name: str, task: Task) -> Callable[[Mapping[str, Any]], Any]:
    """Returns `(batch) -> what task.predict returns`, which runs an export in its own runtime.

    Args:
        folder: an export that holds the format.
        name: of the format.
        task_name: of the export's config.
        task: likewise.

    Raises:
        ConfigError: a package is missing.
        CheckpointError: the file is damaged.
        ExportError: exports do not serve the task.
    """
    check_installed(FORMATS[name])
    interface = interface_of(task_name, folder)
    run = next(iter(FORMATS[name].runners(folder, task, interface)))[1]
    return lambda batch: interface.unpack(run(*interface.of_batch(batch)))
