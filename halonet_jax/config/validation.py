"""Checks a config before data is opened and programs are compiled."""

import difflib
import numbers
import shlex
from collections.abc import Mapping

import ml_collections

from halonet_jax.config import derived, knobs
from halonet_jax.config.rules import Choice
from halonet_jax.errors import ConfigError
from halonet_jax.models import variants


def validate(
    config: ml_collections.ConfigDict,
    device_count: int,
    sections: Mapping[str, tuple[knobs.Knob, ...]] = knobs.SECTIONS,
) -> None:
    """Checks every knob by its table, then the rules that involve several knobs or the devices.

    It does not check that the task exists: `halonet_jax.tasks` knows the names.

    Args:
        config: a whole config.
        device_count: number of devices of the run, over all hosts.
        sections: the tables of knobs, see `knobs.SECTIONS`.

    Raises:
        ConfigError: one line that states the value, the rule and the remedy.
    """
    for key in knobs.by_path(sections):
        check_knob(config, key, sections)
    _check_model(config)
    _check_schedule(config)
    if config.data.source == "coco" and config.task == "classification":
        raise ConfigError(
            "data.source='coco' has boxes, not classes of images; set --config.task=detection, or --config.data.source=folder"
        )
    if config.task == "detection":
        check_detection_data(config)
    if config.optimizer.name == "lamb" and config.model.scan:
        raise ConfigError(
            "optimizer.name='lamb' has one trust ratio for each array, and model.scan=True puts a stage's blocks into one; set "
            "--config.model.scan=False"
        )
    _check_batches(config, device_count)


def check_detection_data(config: ml_collections.ConfigDict) -> None:
    """Checks that a config's data is for detection.

    Args:
        config: a whole config.

    Raises:
        ConfigError: the source has no boxes, or the input is not square.
    """
    source, size = config.data.source, config.data.image_size
    if source not in ("coco", "digit_scenes"):
        raise ConfigError(
            f"data.source={source!r} has no boxes, which task='detection' needs; set --config.data.source=coco or digit_scenes"
        )
    if not isinstance(size, numbers.Integral):
        raise ConfigError(
            f"data.image_size={size} must be one side, of a square, for task='detection'; for example "
            f"--config.data.image_size={max(size)}"
        )


def show(value) -> str:
    """Returns `repr(value)` on one line, shortened to at most 80 characters.

    Args:
        value: any object. Python refuses to print integers of thousands of digits; these get a description.
    """
    try:
        text = " ".join(repr(value).split())  # a nested config prints over several lines
    except ValueError:
        text = f"<{type(value).__name__} too long to print>"
    except RecursionError:
        text = f"<{type(value).__name__} nested too deeply to print>"
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"


def check_knob(
    config: ml_collections.ConfigDict, key: str, sections: Mapping[str, tuple[knobs.Knob, ...]] = knobs.SECTIONS
) -> None:
    """Checks one knob by its table.

    Args:
        config: a config.
        key: full key of the knob, such as "data.image_size".
        sections: the tables of knobs, see `knobs.SECTIONS`.

    Raises:
        ConfigError: as `validate`.
    """
    knob, (*section, name) = knobs.by_path(sections)[key], key.split(".")
    try:
        value = (config[section[0]] if section else config)[name]
    except (KeyError, TypeError):
        raise ConfigError(f"the config lacks {key}; start the recipe from config.imagenet()") from None
    if knob.allowed.allows(value) or (value is None and knob.default is None):
        return
    if isinstance(knob.allowed, Choice):
        close = difflib.get_close_matches(str(value), knob.allowed.names, n=1) if isinstance(value, str) else ()
        hint = f"did you mean {close[0]!r}?" if close else f"use {knob.allowed.text}"
        raise ConfigError(f"{key}={show(value)} is unknown; {hint}")
    example = knob.example
    if example is None:
        example = variants.DEFAULTS.get(knob.key) if knob.default is None else knob.default
    raise ConfigError(
        f"{key}={show(value)} must be {knob.allowed.text}; for example --config.{key}={shlex.quote(str(example))}"
    )


def _check_model(config):
    architecture = {k: v for k, v in derived.model_options(config).items() if k in variants.DEFAULTS}
    try:
        variants.resolve(config.model.name, **architecture)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"config.model: {error}") from None


def _check_schedule(config):
    if config.num_epochs == 0 and config.max_steps == 0:
        raise ConfigError("num_epochs=0 trains nothing; set --config.num_epochs to more than 0")
    warmup = config.schedule.warmup_epochs
    if config.num_epochs and warmup > config.num_epochs:
        raise ConfigError(
            f"schedule.warmup_epochs={warmup} must be between 0 and num_epochs={config.num_epochs}; for example "
            f"--config.schedule.warmup_epochs={config.num_epochs / 10}"
        )
    milestones = config.schedule.milestones
    if milestones and milestones[0] < warmup:
        raise ConfigError(
            f"schedule.milestones={milestones} begins within the warm-up of {warmup} epochs; the first must be at least "
            f"schedule.warmup_epochs; for example --config.schedule.milestones='({warmup + 30},{warmup + 60})'"
        )


def _check_batches(config, device_count):
    if device_count % config.mesh.fsdp:
        divisors = [n for n in range(1, device_count + 1) if device_count % n == 0]
        raise ConfigError(f"mesh.fsdp={config.mesh.fsdp} does not divide {device_count} devices; use one of {divisors}")
    for key in ("batch_size", "eval_batch_size"):
        if config[key] % device_count:
            raise ConfigError(
                f"{key}={config[key]} does not divide over {device_count} devices; {_multiples(config[key], device_count)}"
            )
    steps, group = config.optimizer.accumulation_steps, config.model.bn_group_size
    if config.batch_size % (steps * device_count):
        raise ConfigError(
            f"batch_size={config.batch_size} does not divide into optimizer.accumulation_steps={steps} micro-batches over "
            f"{device_count} devices; {_multiples(config.batch_size, steps * device_count)}"
        )
    if group and config.batch_size // steps % group:
        raise ConfigError(
            f"model.bn_group_size={group} does not divide the {config.batch_size // steps} images of a (micro-)batch; "
            f"use a divisor of {config.batch_size // steps}, or 0 for statistics over all of it"
        )


def _multiples(value, of):
    below, above = value // of * of, -(-value // of) * of
    return f"use {below} or {above}" if below else f"use {above}"
