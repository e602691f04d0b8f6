"""The portable folder of a model: `model.safetensors` and `config.json`. It needs no workdir and no training data.

    model.safetensors   every array by its path, such as "params/backbone/stem_conv/kernel"
    config.json         the training config, class names and preprocessing, and where the weights come from
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import safetensors
import safetensors.flax
from etils import epath

from halonet_jax import __version__
from halonet_jax import config as config_lib
from halonet_jax.errors import CheckpointError, ConfigError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT_VERSION = 1
_REMEDY = "export the model again with halonet_jax.export"


class Portable(NamedTuple):
    """What a portable folder says of its model.

    Attributes:
        config: of the run that trained it.
        metadata: the task's: class names and preprocessing.
        step: of the checkpoint.
        weights: "raw" or "ema".
        figures: the run's evaluation of that step, by metric; may be empty.
    """

    config: ml_collections.ConfigDict
    metadata: dict[str, Any]
    step: int
    weights: str
    figures: dict[str, float]


def is_portable(folder: epath.Path) -> bool:
    """Returns whether a folder holds a portable model.

    Args:
        folder: any path.
    """
    return (folder / WEIGHTS).exists()


def named(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path, such as "params/backbone/stem_conv/kernel", in the order of `jax.tree.leaves`.

    Args:
        tree: such as `Loaded.variables`.
    """
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def has_config(folder: epath.Path) -> bool:
    """Returns whether a folder holds the `config.json` of a portable model, which differs from that of a run.

    Args:
        folder: any path.
    """
    try:
        content = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "format" in content and "format_version" in content


def write(folder: epath.Path, about: Portable, variables: Mapping[str, Any]) -> None:
    """Writes both files into an existing folder.

    Args:
        folder: where they go.
        about: what `config.json` will say.
        variables: `{"params": …, "batch_stats": …}`, trees of arrays.

    Raises:
        OSError: a file cannot be written.
    """
    write_weights(folder, variables)
    write_config(folder, about)


def write_weights(folder: epath.Path, variables: Mapping[str, Any]) -> None:
    """Writes `model.safetensors`.

    Args:
        folder: where it goes.
        variables: `{"params": …, "batch_stats": …}`, trees of arrays.

    Raises:
        OSError: the file cannot be written.
    """
    arrays = {name: jax.numpy.asarray(np.asarray(leaf)) for name, leaf in named(variables).items()}
    (folder / WEIGHTS).write_bytes(safetensors.flax.save(arrays))


def write_config(folder: epath.Path, about: Portable) -> None:
    """Writes `config.json`. It names no path of this machine: `data.dir` and `init_from` are left out.

    Args:
        folder: where it goes.
        about: what it will say.

    Raises:
        OSError: the file cannot be written.
    """
    config = about.config.to_dict()
    config["init_from"] = config["data"]["dir"] = ""  # paths of this machine; the folder may be published
    content = {
        "format": "halonet_jax", "format_version": FORMAT_VERSION, "halonet_jax": __version__, "step": about.step,
        "weights": about.weights, "figures": about.figures, "metadata": about.metadata, "config": config,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(content, indent=2))


def read_config(folder: epath.Path) -> Portable:
    """Reads `config.json`.

    Args:
        folder: of a portable model.

    Raises:
        CheckpointError: the file is missing, damaged, or of a later version; a class name is unsafe to use in a path or on a
            page; or the config has an unknown knob, or a value that its rule does not allow.
    """
    path = folder / CONFIG
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {_REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({' '.join(str(error).split())[:200]}); {_REMEDY}") from None
    if not isinstance(content, dict) or content.get("format") != "halonet_jax":
        raise CheckpointError(f'{path} does not say "format": "halonet_jax"; give the folder that halonet_jax.export wrote')
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {content.get('format_version')!r}, and this version reads {FORMAT_VERSION}; update "
            "halonet_jax, or export the model again"
        )
    metadata, figures = content.get("metadata"), content.get("figures")
    names = metadata.get("class_names") if isinstance(metadata, dict) else None
    problem = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        problem = "metadata.class_names must be a list of texts that is not empty"
    elif unsafe := [name for name in names if not _is_safe(name)]:
        problem = f"the class name {unsafe[0][:80]!r} has a '..' part or characters that do not print"
    elif not isinstance(metadata.get("preprocessing"), dict):
        problem = "metadata.preprocessing must be an object"
    elif not isinstance(content.get("config"), dict):
        problem = "config must be an object"
    elif type(content.get("step")) is not int or content.get("weights") not in ("raw", "ema") or not isinstance(figures, dict):
        problem = "step must be a whole number, weights 'raw' or 'ema', figures an object"
    if problem:
        raise CheckpointError(f"{path} is damaged: {problem}; {_REMEDY}")
    try:
        config = config_lib.from_json(json.dumps(content.get("config")))
        config_lib.validate(config, device_count=1)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return Portable(config, metadata, content["step"], content["weights"], figures)


def check_holds(folder: epath.Path, about: Portable, step: int | str, weights: str | None) -> None:
    """Checks that a portable folder holds what was asked for. It holds one checkpoint.

    Args:
        folder: for messages.
        about: of the folder.
        step: as of `halonet_jax.load`.
        weights: likewise.

    Raises:
        ConfigError: it holds another step or other weights.
    """
    for name, given, there in (("step", step, str(about.step)), ("weights", weights, about.weights)):
        if given not in (None, "latest", "best") and str(given) != there:
            raise ConfigError(f"{name}={given!r}, but {folder} holds {name} {there} alone; leave {name} out")


def read_variables(folder: epath.Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Reads `model.safetensors`. Nothing in it is ever executed.

    Args:
        folder: of a portable model.
        abstract: trees of `ShapeDtypeStruct`s with the shardings that the arrays shall have.

    Raises:
        CheckpointError: the file is damaged, holds values that are not finite, or its arrays are not those of `abstract`.
    """
    path = folder / WEIGHTS
    try:
        arrays = safetensors.flax.load(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {_REMEDY}") from None
    except Exception as error:  # the library raises several types, by what is wrong in the header
        raise CheckpointError(f"{path} is no safetensors file ({' '.join(str(error).split())[:200]}); {_REMEDY}") from None
    wanted = named(abstract)
    show = lambda x: "absent" if x is None else f"{x.dtype}{list(x.shape)}"
    wrong = [
        name for name in sorted(wanted | arrays)
        if name not in wanted or name not in arrays or show(arrays[name]) != show(wanted[name])
    ]  # fmt: skip
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{path} does not fit its config.json: {name} is {show(arrays.get(name))} there and {show(wanted.get(name))} by the "
            f"config ({len(wrong)} arrays differ); {_REMEDY}"
        )
    broken = [name for name, x in arrays.items() if not np.isfinite(np.asarray(x)).all()]
    if broken:
        raise CheckpointError(f"{path} has values that are not finite in {broken[0]} ({len(broken)} arrays); {_REMEDY}")
    leaves = [jax.device_put(arrays[name], x.sharding) for name, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _is_safe(name):
    """Class names come from strangers, and become names of files, columns and lines. Some data sets have a "/" in theirs."""
    return name.isprintable() and ".." not in re.split(r"[/\\]", name)
