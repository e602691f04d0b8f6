"""HaloNet models: `create("h4")` and the layer `HaloAttention`, in Flax Linen."""

import inspect
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from halonet_jax.models import blocks, checks, freezing, transfer, variants
from halonet_jax.models.blocks import BlockSpec
from halonet_jax.models.halonet import Backbone, HaloNet
from halonet_jax.models.layers import HaloAttention
from halonet_jax.ops.halo_attention import WINDOWS
from halonet_jax.ops.selection import NAMES

__all__ = ["Backbone", "BlockSpec", "HaloAttention", "HaloNet", "create", "freezing", "names", "stages", "transfer"]

# What `create` takes beside the architecture: settings of `Backbone`, with their defaults, and of `HaloNet`.
_SETTINGS = {
    key: parameter.default
    for key, parameter in inspect.signature(Backbone).parameters.items()
    if parameter.default is not parameter.empty and key not in (*variants.DEFAULTS, "parent", "name")
} | {"dropout_rate": 0.0}
_DTYPES = ("float32", "bfloat16", "float64")


def names() -> tuple[str, ...]:
    """Returns the names that `create` knows."""
    return tuple(variants.VARIANTS)


def stages(name: str, **overrides) -> blocks.Stages:
    """Returns the blocks of a model, to look at or to change for `create`.

    Args:
        name: one of `names()`.
        **overrides: any key of `variants.DEFAULTS`.

    Returns:
        A tuple for each stage, with a `BlockSpec` for each of its blocks.

    Raises:
        ValueError: for an unknown name or key, or an impossible value or combination.
    """
    return variants.stages(variants.resolve(name, **overrides))


def create(
    name: str, num_classes: int = 1000, *, stages: Sequence[Sequence[BlockSpec]] | None = None, **overrides
) -> HaloNet:
    """Builds a model of the paper or of timm, or one with other blocks.

        model = create("h4")
        variables = model.init(jax.random.key(0), images, train=False)  # images [batch, height, width, 3]
        logits = model.apply(variables, images, train=False)  # float32 [batch, num_classes]

    Training needs `mutable=["batch_stats"]` and, with dropout or stochastic depth, `rngs={"dropout": key}`.

    Args:
        name: one of `names()`.
        num_classes: width of the classifier.
        stages: for each stage its blocks, in place of the model's own. A stage may mix blocks of all kinds. None: the
            model's own.
        **overrides: any key of `variants.DEFAULTS` (the architecture), or of `dropout_rate`, `stochastic_depth_rate`,
            `bn_group_size`, `bn_momentum`, `bn_epsilon`, `zero_init_residual`, `window`, `attention_impl`,
            `dtype` (of activations: "float32" or "bfloat16"), `remat`, `scan`, `freeze`.

    Raises:
        ValueError: for an unknown name or key, or an impossible value or combination.
    """
    checks.whole("num_classes", num_classes, 1)
    settings = {key: overrides.pop(key, default) for key, default in _SETTINGS.items()}
    unknown = sorted(set(overrides) - set(variants.DEFAULTS))
    if unknown:
        known = (*variants.DEFAULTS, *_SETTINGS, "stages")
        raise ValueError(f"model option {unknown[0]!r} is unknown; {checks.nearest(unknown[0], known)}")
    _check_settings(settings)
    variant = variants.resolve(name, **overrides)
    if stages is None:
        stages = variants.stages(variant)
    elif replaced := [key for key in variants.STAGE_OPTIONS if key in overrides]:
        key = replaced[0]
        raise ValueError(f"{key}={overrides[key]!r} has no effect beside stages; set it in the blocks, or leave it out")
    dropout_rate = settings.pop("dropout_rate")
    backbone = Backbone(
        stages=blocks.as_stages(stages), stem=variant["stem"], stem_width=variant["stem_width"],
        activation=variant["activation"], padding=variant["padding"], **settings | {"dtype": jnp.dtype(settings["dtype"])},
    )  # fmt: skip
    return HaloNet(backbone=backbone, num_classes=num_classes, final_width=variant["final_width"], dropout_rate=dropout_rate)


def _check_settings(settings: dict[str, Any]):
    for key in ("dropout_rate", "stochastic_depth_rate"):
        checks.real(key, settings[key], 0)
        if settings[key] >= 1:
            raise ValueError(f"{key}={settings[key]!r} must be less than 1, where nothing would be left; for example {key}=0.1")
    checks.whole("bn_group_size", settings["bn_group_size"], 0)
    checks.real("bn_momentum", settings["bn_momentum"], 0, 1)
    checks.real("bn_epsilon", settings["bn_epsilon"], 0)
    checks.choice("window", settings["window"], WINDOWS)
    if not callable(settings["attention_impl"]):
        checks.choice("attention_impl", settings["attention_impl"], NAMES)
    for key in ("zero_init_residual", "remat", "scan"):
        if not isinstance(settings[key], bool):
            raise ValueError(f"{key}={settings[key]!r} must be True or False")
    if not isinstance(settings["freeze"], tuple) or not all(isinstance(pattern, str) for pattern in settings["freeze"]):
        raise ValueError(f"freeze={settings['freeze']!r} must be a tuple of patterns; for example freeze=('backbone/stem*',)")
    try:
        known = jnp.dtype(settings["dtype"]).name in _DTYPES
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"dtype={settings['dtype']!r} is unknown; use one of {', '.join(_DTYPES)}")
