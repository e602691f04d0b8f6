"""Every knob of a run: its meaning, unit, default and source; and the rules that a valid run obeys.

A recipe in `configs/` starts from `imagenet()` and states only what differs. `validate` runs before anything is compiled;
each of its messages names the value, the rule and the remedy.
"""

import difflib
import importlib.util
import json
import math
from pathlib import Path

import ml_collections
from ml_collections.config_dict import placeholder

from halonet_jax.errors import ConfigError
from halonet_jax.models import variants

DTYPES = ("float32", "bfloat16")
SOURCES = ("tfds", "folder", "digits")
OPTIMIZERS = ("sgd", "adamw", "lamb")
TASKS = ("classification",)


def imagenet() -> ml_collections.ConfigDict:
    """The base of every recipe: HaloNet on ImageNet from scratch (paper, section 4 and its appendix).

    "Not stated" marks what the paper leaves open; the value is then our choice.
    """
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.task = "classification"
    c.batch_size = 4096  # global, over all devices and hosts
    c.eval_batch_size = 0  # global; 0: as batch_size
    c.num_epochs = 350.0
    c.max_steps = 0  # ends the run early, schedule unchanged; 0: run all epochs
    c.label_smoothing = 0.1  # value not stated for training from scratch
    c.ema_decay = 0.9999  # implied ("Polyak averaging"), value not stated; 0: no EMA

    c.model = m = ml_collections.ConfigDict()
    m.name = "h0"
    m.dtype = "bfloat16"  # of activations; parameters and batch statistics stay float32
    m.stochastic_depth_rate = 0.0  # of the last block, rising linearly from 0; not stated
    m.dropout_rate = 0.0  # before the classifier; not stated
    m.bn_group_size = 64  # examples that share batch-norm statistics; 0: the (micro-)batch; not stated
    m.bn_momentum = 0.9  # of the running statistics; not stated
    m.bn_epsilon = 1e-5  # not stated
    m.zero_init_residual = True  # each block starts as its shortcut; not stated
    m.padding = "mask"  # out-of-image keys: "mask" or "zero"; not stated
    m.window = "neighborhood"  # "neighborhood" (the paper) or "centered" (SASA)
    m.attention_impl = (
        "auto"  # the fastest by device and shape; or "xla", "pallas" (fused kernels, for TPU and GPU), "reference"
    )
    m.remat = False  # recompute each block's activations in the backward pass
    m.scan = False  # lax.scan over a stage's equal blocks: small program, quick compile, more traffic (docs/performance.md)
    # None: as the named variant has it (models/variants.py says what each means).
    m.block_size = placeholder(int)
    m.halo_size = placeholder(int)
    m.stage_sizes = placeholder(tuple)
    m.base_width = placeholder(int)
    m.stem_width = placeholder(int)
    m.value_ratio = placeholder(float)
    m.expansion_ratio = placeholder(float)
    m.final_width = placeholder(int)
    m.stage_kinds = placeholder(tuple)
    m.num_heads = placeholder(tuple)
    m.stem = placeholder(str)
    m.se_kinds = placeholder(tuple)
    m.se_ratio = placeholder(float)
    m.activation = placeholder(str)

    c.data = d = ml_collections.ConfigDict()
    d.source = "tfds"  # "tfds", "folder" or "digits"
    d.name = "imagenet2012"  # TFDS dataset name
    d.dir = ""  # TFDS data_dir, or the image folder's root
    d.train_split = "train"
    d.eval_split = "validation"
    d.image_size = 256  # pixels, square
    d.eval_crop = 0.875  # side of the central crop over the shorter side; not stated, nor are the next three
    d.crop_scale = (0.08, 1.0)  # random resized crop: share of the area
    d.crop_ratio = (3 / 4, 4 / 3)  # random resized crop: width over height
    d.flip = True  # horizontal, with probability 1/2
    d.randaugment_layers = 2  # ops per image; not stated; 0: off
    d.randaugment_magnitude = 10.0
    d.randaugment_ops = ()  # names from data.randaugment.OPS; (): all
    d.mixup_alpha = 0.0  # Beta(alpha, alpha); 0: off
    d.cutmix_alpha = 0.0
    d.mean = (0.485, 0.456, 0.406)  # of RGB in [0, 1]; not stated, nor is the next
    d.std = (0.229, 0.224, 0.225)
    d.on_corrupt = "skip"  # an image that does not decode: "skip" (named and counted) or "stop"
    d.num_threads = 16  # reading and decoding, per host
    d.num_workers = 0  # processes besides; 0: threads alone
    d.prefetch = 4  # batches ready on the host

    c.optimizer = o = ml_collections.ConfigDict()
    o.name = "sgd"  # "sgd" (Nesterov), "adamw", "lamb"
    o.momentum = 0.9  # sgd; not stated
    o.b1 = 0.9  # adamw, lamb
    o.b2 = 0.999
    o.weight_decay = 2e-5  # of kernels; not of norms, biases and relative tables (the latter not stated)
    o.clip_norm = 0.0  # global gradient norm; 0: off
    o.accumulation_steps = 1  # micro-batches a step

    c.schedule = s = ml_collections.ConfigDict()
    s.learning_rate = 0.1  # peak, for learning_rate_batch_size images; scaled linearly to batch_size
    s.learning_rate_batch_size = 256  # 0: learning_rate as it stands
    s.warmup_epochs = 10.0  # linear from 0
    s.end_factor = 1 / 128  # of the peak, where the cosine ends

    c.mesh = ml_collections.ConfigDict()
    c.mesh.fsdp = 1  # devices that share one copy of parameters, optimizer state and EMA

    c.on_non_finite = (
        "stop"  # a loss or gradient that is NaN: "stop", or "skip": back to the last checkpoint, past the bad batches
    )
    c.tensorboard = True  # TensorBoard files beside metrics.jsonl; they need TensorFlow
    c.hang_timeout = 1800.0  # seconds without a step after which the process ends itself; 0: never
    c.profile_steps = ()  # (first, last): writes a profile of these steps to WORKDIR/profile

    c.log_every_steps = 100
    c.eval_every_epochs = 5.0  # 0: at the end only
    c.checkpoint_every_steps = 1000
    c.checkpoints_to_keep = 2  # the newest; the best by eval top-1 is kept besides
    return c.lock()


def digits() -> ml_collections.ConfigDict:
    """Base of runs on the embedded digits: small, offline, minutes on a laptop."""
    c = imagenet()
    c.batch_size = 64
    c.data.source = "digits"
    c.data.name = "digits"
    c.data.eval_split = "test"
    c.data.image_size = 32
    c.data.eval_crop = 1.0
    c.data.crop_scale = (0.8, 1.0)
    c.data.crop_ratio = (0.85, 1.18)
    c.data.flip = False
    c.data.randaugment_layers = 0
    c.data.mean = (0.5, 0.5, 0.5)
    c.data.std = (0.5, 0.5, 0.5)
    c.data.num_threads = 2
    c.model.dtype = "float32"
    c.model.bn_group_size = 0
    return c


def sibling(recipe: str, name: str) -> ml_collections.ConfigDict:
    """The config of the recipe `name` in the folder of the file `recipe`, for recipes that build on another."""
    spec = importlib.util.spec_from_file_location(name, Path(recipe).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def with_argument(config: ml_collections.ConfigDict, argument: str) -> ml_collections.ConfigDict:
    """Applies what follows the colon in `--config=configs/h4.py:smoke`: nothing, or "smoke".

    Raises:
        ConfigError: for any other argument.
    """
    if argument not in ("", "smoke"):
        raise ConfigError(f"config argument {argument!r} is unknown; write ':smoke' or nothing after the file name")
    return smoke(config) if argument == "smoke" else config


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Shrinks a recipe to seconds on a CPU: its structure on the digits, narrow, with few blocks and steps."""
    small = digits()
    config.data = small.data.copy_and_resolve_references()
    config.data.image_size = 64
    config.batch_size = 16
    config.eval_batch_size = 64
    config.num_epochs = 0.05
    config.max_steps = 4
    config.schedule.warmup_epochs = 0.0
    config.eval_every_epochs = 0.0
    config.checkpoint_every_steps = 2
    config.log_every_steps = 1
    m = config.model
    m.dtype = "float32"
    m.bn_group_size = 0
    m.stage_sizes = (1, 1, 2, 1)
    m.base_width = 16
    m.stem_width = 16
    m.final_width = 32 if variants.VARIANTS[m.name]["final_width"] else 0
    return config


def model_options(config: ml_collections.ConfigDict) -> dict:
    """The keyword arguments of `models.create`, name included: what the recipe sets, less what it leaves to the variant."""
    return {key: value for key, value in config.model.items() if value is not None}


def to_json(config: ml_collections.ConfigDict) -> str:
    """The resolved config, for `from_json`."""
    return json.dumps(config.to_dict(), indent=2)


def from_json(text: str) -> ml_collections.ConfigDict:
    """Rebuilds a config from `to_json`'s text.

    Raises:
        ConfigError: for a key that this version does not know, and for text that is no config.
    """

    def tuples(value):  # JSON has lists alone
        if isinstance(value, dict):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    config = imagenet()
    try:
        with config.ignore_type():
            config.update(tuples(json.loads(text)))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.json is torn ({error}); the training command, given again, writes it anew") from None
    except (AttributeError, KeyError) as error:
        raise ConfigError(f"the config has a key that this version does not know: {str(error).splitlines()[0]}") from None
    return config


def differences(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> list[str]:
    """One line for each key whose value differs: "model.name: 'h0' -> 'h4'"."""
    old, new = _flatten(old), _flatten(new)
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old | new) if old.get(key) != new.get(key)]


def _flatten(config, prefix=""):
    flat = {}
    for key, value in config.items():
        flat.update(
            _flatten(value, f"{prefix}{key}.") if isinstance(value, ml_collections.ConfigDict) else {prefix + key: value}
        )
    return flat


def validate(config: ml_collections.ConfigDict, device_count: int) -> None:
    """Checks all that can be known before data is opened and programs are compiled.

    Raises:
        ConfigError: naming the value, the rule and the remedy.
    """
    _one_of(config, "task", TASKS)
    _one_of(config, "model.dtype", DTYPES)
    _one_of(config, "model.padding", ("mask", "zero"))
    _one_of(config, "model.window", ("neighborhood", "centered"))
    _one_of(config, "model.attention_impl", ("auto", "xla", "pallas", "reference"))
    _one_of(config, "data.source", SOURCES)
    _one_of(config, "data.on_corrupt", ("skip", "stop"))
    _one_of(config, "optimizer.name", OPTIMIZERS)
    _one_of(config, "on_non_finite", ("stop", "skip"))
    try:
        architecture = {k: v for k, v in model_options(config).items() if k in variants.DEFAULTS}
        variants.resolve(config.model.name, **architecture)
    except ValueError as error:
        raise ConfigError(f"config.model: {error}") from None

    if config.num_epochs == 0 and config.max_steps == 0:
        raise ConfigError("num_epochs=0 trains nothing; set --config.num_epochs to more than 0")
    for key, least, most in (
        ("seed", 0, None), ("batch_size", 1, None), ("eval_batch_size", 0, None), ("num_epochs", 0, None), ("max_steps", 0, None),
        ("label_smoothing", 0, 0.999), ("ema_decay", 0, 0.999999), ("model.stochastic_depth_rate", 0, 0.999),
        ("model.dropout_rate", 0, 0.999), ("model.bn_group_size", 0, None), ("model.bn_momentum", 0, 0.999999),
        ("data.image_size", 8, None), ("data.eval_crop", 0.01, 1), ("data.randaugment_layers", 0, None),
        ("data.randaugment_magnitude", 0, None), ("data.mixup_alpha", 0, None), ("data.cutmix_alpha", 0, None),
        ("data.num_threads", 1, None), ("data.num_workers", 0, None), ("data.prefetch", 1, None),
        ("optimizer.accumulation_steps", 1, None), ("optimizer.momentum", 0, 0.999999), ("optimizer.b1", 0, 0.999999),
        ("optimizer.b2", 0, 0.999999), ("model.bn_epsilon", 0, 1), ("optimizer.clip_norm", 0, None),
        ("optimizer.weight_decay", 0, None),
        ("schedule.learning_rate", 0, None), ("schedule.learning_rate_batch_size", 0, None),
        ("schedule.warmup_epochs", 0, config.num_epochs or None), ("schedule.end_factor", 0, 1), ("mesh.fsdp", 1, None),
        ("log_every_steps", 1, None), ("eval_every_epochs", 0, None), ("checkpoint_every_steps", 1, None),
        ("checkpoints_to_keep", 1, None), ("hang_timeout", 0, None),
    ):  # fmt: skip
        _in_range(config, key, least, most)
    for key in ("data.crop_scale", "data.crop_ratio"):
        value = _get(config, key)
        if len(value) != 2 or not 0 < value[0] <= value[1]:
            raise ConfigError(f"{key}={value!r} must be two numbers above 0, the smaller one first")
    window = config.profile_steps
    if window and (len(window) != 2 or not all(isinstance(n, int) for n in window) or not 1 <= window[0] <= window[1]):
        raise ConfigError(f"profile_steps={window!r} must be the first and the last step to profile, such as '(100,110)'")
    if config.data.source == "folder" and not config.data.dir:
        raise ConfigError("data.source='folder' needs the folder that holds <split>/<class>/*.jpg; set --config.data.dir=PATH")
    if any(len(v) != 3 for v in (config.data.mean, config.data.std)) or min(config.data.std) <= 0:
        raise ConfigError(
            f"data.mean={config.data.mean} and data.std={config.data.std} must be three numbers each, std above 0"
        )
    if config.optimizer.name == "lamb" and config.model.scan:
        raise ConfigError(
            "optimizer.name='lamb' has one trust ratio for each array, and model.scan=True puts a stage's blocks into one; set "
            "--config.model.scan=False"
        )
    _check_batches(config, device_count)


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


def independent_parts(config: ml_collections.ConfigDict) -> int:
    """How many devices every batch divides over so that none shares batch-norm statistics with another."""
    micro_batch, group = config.batch_size // max(1, config.optimizer.accumulation_steps), config.model.bn_group_size
    groups = micro_batch // group if group > 0 and micro_batch % group == 0 else 1
    return math.gcd(groups, config.eval_batch_size) or 1


def _multiples(value, of):
    below, above = value // of * of, -(-value // of) * of
    return f"use {below} or {above}" if below else f"use {above}"


def _get(config, key):
    for part in key.split("."):
        config = config[part]
    return config


def _one_of(config, key, known):
    value = _get(config, key)
    if value not in known:
        close = difflib.get_close_matches(str(value), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"
        raise ConfigError(f"{key}={value!r} is unknown; {hint}")


def _in_range(config, key, least, most):
    value = _get(config, key)
    if not (least <= value and (most is None or value <= most)):  # so that NaN fails
        rule = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ConfigError(f"{key}={value!r} must be {rule}")
