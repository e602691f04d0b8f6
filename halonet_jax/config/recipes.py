"""The base configs for the files in `configs/`, and functions that derive one config from another."""

import difflib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import ml_collections

from halonet_jax.config import knobs
from halonet_jax.errors import ConfigError
from halonet_jax.models import variants


def imagenet(sections: Mapping[str, tuple[knobs.Knob, ...]] = knobs.SECTIONS) -> ml_collections.ConfigDict:
    """Returns the base of the ImageNet recipes: HaloNet-H0 from scratch (arXiv 2103.12731, section 4 and appendix).

    Args:
        sections: the tables of knobs, see `knobs.SECTIONS`.
    """
    return knobs.build(sections)


def digits() -> ml_collections.ConfigDict:
    """Returns the base of runs on scikit-learn's digits. They need no download and take minutes on a laptop."""
    config = imagenet()
    config.batch_size = 64
    config.data.source = "digits"
    config.data.name = "digits"
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.eval_crop = 1.0
    config.data.crop_scale = (0.8, 1.0)
    config.data.crop_ratio = (0.85, 1.18)
    config.data.flip = False
    config.data.randaugment_layers = 0
    config.data.mean = (0.5, 0.5, 0.5)
    config.data.std = (0.5, 0.5, 0.5)
    config.data.num_threads = 2
    config.model.dtype = "float32"
    config.model.bn_group_size = 0
    return config


def sibling(recipe: str | Path, name: str) -> ml_collections.ConfigDict:
    """Returns the config of another recipe in the same folder, for recipes that build on it.

    Args:
        recipe: path of a file in the folder; a recipe passes `__file__`.
        name: the other recipe's file name without ".py".

    Raises:
        ConfigError: the folder has no such recipe.
    """
    path = Path(recipe).with_name(f"{name}.py")
    if not path.is_file():
        known = sorted(other.stem for other in path.parent.glob("*.py"))
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known) or 'none: the folder has no recipes'}"
        raise ConfigError(f"recipe {name!r} is not in {path.parent}; {hint}")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def with_argument(config: ml_collections.ConfigDict, argument: str) -> ml_collections.ConfigDict:
    """Applies the argument of a recipe, the part after the colon in `--config=configs/h4.py:smoke`.

    Args:
        config: a recipe's config; "smoke" changes it in place.
        argument: "" or "smoke".

    Returns:
        `config`.

    Raises:
        ConfigError: another argument.
    """
    if argument not in ("", "smoke"):
        raise ConfigError(f"config argument {argument!r} is unknown; write ':smoke' or nothing after the file name")
    return smoke(config) if argument == "smoke" else config


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Shrinks a recipe so that it runs in seconds on a CPU: narrow, with few blocks and steps, on the digits.

    Args:
        config: the recipe's config, changed in place.

    Returns:
        `config`.
    """
    config.data = digits().data
    config.data.image_size = 64
    config.batch_size = 16
    config.eval_batch_size = 64
    config.num_epochs = 0.05
    config.max_steps = 4
    config.schedule.warmup_epochs = 0.0
    config.eval_every_epochs = 0.0
    config.checkpoint_every_steps = 2
    config.log_every_steps = 1
    config.model.dtype = "float32"
    config.model.bn_group_size = 0
    config.model.stage_sizes = (1, 1, 2, 1)
    config.model.base_width = 16
    config.model.stem_width = 16
    config.model.final_width = 32 if variants.VARIANTS[config.model.name]["final_width"] else 0
    return config
