"""The config of a row: its recipe at a scale, with its overrides."""

import difflib
import importlib.util
from pathlib import Path
from typing import Any

import ml_collections

from halonet_jax import config as config_lib
from halonet_jax.errors import ConfigError
from halonet_jax.studies import spec
from halonet_jax.studies.spec import Row, Study


def resolve(study: Study, row: Row, scale: str) -> tuple[ml_collections.ConfigDict, list[str]]:
    """Returns the config of a row, and the flags that make `halonet_jax.train` use it.

    Args:
        study: that the row is of.
        row: the row.
        scale: a key of `spec.SUFFIXES`.

    Raises:
        ConfigError: the recipe cannot be loaded, or has a fault.
    """
    path = row.recipes.get(scale, row.recipe)
    if not path:
        raise ConfigError(f"it has no recipe; write recipe='configs/NAME.py' in Row({row.label!r}, …)")
    suffix = spec.SUFFIXES[scale]
    config = _load_recipe(path, suffix.removeprefix(":"))
    own = {"tiny": row.tiny, "small": row.small}.get(scale)
    overrides = {**getattr(study, scale, {}), **(row.overrides if own is None else own)}
    for key, value in overrides.items():
        _set(config, key, value)
    config_lib.validate(config, 1)
    return config, [f"--config={path}{suffix}", *(f"--config.{key}={_text(value)}" for key, value in overrides.items())]


def _load_recipe(path, argument):
    file = Path(path)
    if not file.is_file():
        known = [str(other) for other in sorted(file.parent.glob("*.py"))]
        close = difflib.get_close_matches(path, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "start the study from the folder that holds configs/"
        raise ConfigError(f"recipe {path!r} is no file; {hint}")
    module_spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    try:
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        return module.get_config(argument) if argument else module.get_config()
    except (Exception, SystemExit) as error:  # whatever the recipe's own code does
        raise ConfigError(f"recipe {path}{':' if argument else ''}{argument}: {spec.reason(error)}") from None


def _set(config, key, value):
    *sections, name = key.split(".")
    node = config
    for section in sections:
        node = node.get(section) if isinstance(node, ml_collections.ConfigDict) else None
    if not isinstance(node, ml_collections.ConfigDict) or name not in node:
        raise ConfigError(f"the config has no key {key!r}; {spec.near(key, list(_keys(config)))[:200]}")
    try:
        node[name] = tuple(value) if isinstance(value, list) else value
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{key}={value!r} has the wrong type ({' '.join(str(error).split())[:150]}); give one like {node[name]!r}"
        ) from None


def _keys(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _text(value: Any) -> str:
    return repr(tuple(value)).replace(" ", "") if isinstance(value, (tuple, list)) else str(value)
