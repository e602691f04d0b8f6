"""The base configs for the files in `configs/`, and functions that derive one config from another."""

import difflib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import ml_collections

from halonet_jax.config import derived, knobs
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


def digit_scenes() -> ml_collections.ConfigDict:
    """Returns the base of runs on scenes of scikit-learn's digits, see `data/scenes.py`. They need no download."""
    config = digits()
    config.data.source = "digit_scenes"
    config.data.name = "digit_scenes"
    config.data.image_size = 64
    config.data.crop_scale = (1.0, 1.0)
    config.data.crop_ratio = (1.0, 1.0)
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
        config: a recipe's config; an argument changes it in place.
        argument: "", or one of `ARGUMENTS`.

    Returns:
        `config`.

    Raises:
        ConfigError: another argument, or a model that cannot be shrunk.
    """
    if not argument:
        return config
    if argument not in ARGUMENTS:
        choices = ", ".join(f"':{name}'" for name in ARGUMENTS)
        raise ConfigError(f"config argument {argument!r} is unknown; write {choices} or nothing after the file name")
    return ARGUMENTS[argument](config)


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Shrinks a recipe so that it runs in seconds on a CPU: narrow, with few blocks and steps, on the digits.

    A detector runs on digit scenes, and needs up to a minute, most of it to compile.

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
    config.model.bn_frozen = False  # its weights are random
    config.model.stage_sizes = (1, 1, 2, 1)
    config.model.base_width = 16
    config.model.stem_width = 16
    config.model.final_width = 32 if variants.VARIANTS[config.model.name]["final_width"] else 0
    return _smoke_detector(config) if config.task == "detection" else config


def _smoke_detector(config):
    config.data = digit_scenes().data
    config.data.scene_label, config.data.max_objects = "largest", 5
    config.data.num_train_scenes, config.data.num_eval_scenes = 64, 8
    config.batch_size, config.eval_batch_size, config.num_epochs, config.max_steps = 4, 4, 1.0, 2
    config.schedule.milestones = ()
    d = config.detection
    d.width, d.anchor_size, d.roi_base_size = 16, 4.0, 64.0
    d.candidates, d.proposals, d.roi_samples, d.detections = 64, 32, 16, 10
    d.box_dense, d.mask_convs = (32,), 1
    return config


def tiny(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Shrinks a recipe for a study on one CPU core: its shape at a quarter of the size, on digit scenes, in minutes.

    Image size, widths and heads are divided by 4, depths by 3, block and halo size by 2. Ratios, kinds, stem, activation,
    label smoothing and stochastic depth stay the recipe's. There is no RandAugment.

    Args:
        config: the recipe's config, changed in place.

    Returns:
        `config`.

    Raises:
        ConfigError: the model lists its blocks, as timm's do.
    """
    _shrink(config, 4, config.data.image_size // 4)
    config.data.num_train_scenes = 15_360
    config.data.scene_difficulty = 0.2
    config.data.randaugment_layers = 0  # runs are too short for it
    config.batch_size, config.eval_batch_size = 32, 128  # small batches: more steps from the few scenes that a core can see
    config.num_epochs = 1.0
    config.schedule.warmup_epochs = 0.1
    config.ema_decay = 0.95
    return config


def small(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """As `tiny`, for one GPU: widths and heads are divided by 2, images have 128 pixels, runs are longer, and RandAugment stays.

    Args:
        config: the recipe's config, changed in place.

    Returns:
        `config`.

    Raises:
        ConfigError: the model lists its blocks, as timm's do.
    """
    _shrink(config, 2, 128)
    config.data.num_train_scenes = 50_000
    config.data.scene_size = 128
    config.data.scene_difficulty = 0.5
    config.batch_size = 128
    config.num_epochs = 30.0
    config.schedule.warmup_epochs = 1.0
    config.ema_decay = 0.99
    return config


# Arguments of recipes.
ARGUMENTS = {"smoke": smoke, "tiny": tiny, "small": small}

# RandAugment's operations that leave a scene's label valid at any strength: geometric ones move digits off the canvas;
# posterize, solarize and brightness make them as bright as what is behind them.
_SCENE_OPS = ("auto_contrast", "equalize", "invert", "color", "contrast", "sharpness")


def _shrink(config, divisor, image_size):
    if config.task != "classification":
        raise ConfigError(
            f"':tiny' and ':small' shrink recipes of task='classification', and this one is of {config.task!r}; write ':smoke', or "
            "use configs/digit_scenes_mask_rcnn.py"
        )
    given = {key: value for key, value in derived.model_options(config).items() if key in variants.DEFAULTS}
    try:
        v = variants.resolve(config.model.name, **given)
    except ValueError as error:
        raise ConfigError(f"config.model: {error}") from None
    if "stages" in v:
        raise ConfigError(
            f"model.name={config.model.name!r} lists its blocks and cannot be shrunk; write ':smoke' after another recipe"
        )
    m, layers, magnitude = config.model, config.data.randaugment_layers, config.data.randaugment_magnitude
    m.base_width, m.stem_width = max(1, v["base_width"] // divisor), max(1, v["stem_width"] // divisor)
    m.final_width = v["final_width"] // divisor
    m.num_heads = tuple(max(1, heads // divisor) for heads in v["num_heads"])
    m.stage_sizes = tuple(max(1, round(depth / 3)) for depth in v["stage_sizes"])
    m.block_size, m.halo_size = max(1, round(v["block_size"] / 2)), -(-v["halo_size"] // 2)
    m.dtype, m.bn_group_size, m.bn_frozen = "float32", 0, False
    config.data = digit_scenes().data.copy_and_resolve_references()
    config.data.image_size = image_size
    config.data.randaugment_layers, config.data.randaugment_magnitude = layers, magnitude
    config.data.randaugment_ops = _SCENE_OPS if layers else ()
    config.eval_batch_size, config.max_steps = 0, 0
    config.tensorboard = False
    config.log_every_steps, config.checkpoint_every_steps, config.eval_every_epochs = 50, 1000, 0.0
    config.optimizer = imagenet().optimizer.copy_and_resolve_references()
    config.optimizer.name, config.optimizer.weight_decay = "adamw", 0.01
    config.schedule = imagenet().schedule.copy_and_resolve_references()
    config.schedule.learning_rate, config.schedule.learning_rate_batch_size = 3e-3, 0
