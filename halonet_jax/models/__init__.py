"""HaloNet models: `create("h4")` and the layer `HaloAttention`, in Flax Linen."""

import inspect

import jax.numpy as jnp

from halonet_jax.models import variants
from halonet_jax.models.halonet import Backbone, HaloNet, stack_blocks, unstack_blocks
from halonet_jax.models.layers import HaloAttention

__all__ = ["Backbone", "HaloAttention", "HaloNet", "create", "names", "stack_blocks", "unstack_blocks"]

_BACKBONE_FIELDS = tuple(inspect.signature(Backbone).parameters)


def names() -> tuple[str, ...]:
    """The names that `create` knows."""
    return tuple(variants.VARIANTS)


def create(name: str, num_classes: int = 1000, **overrides) -> HaloNet:
    """Builds a model of the paper.

        model = create("h4")
        variables = model.init(jax.random.key(0), images, train=False)  # images [batch, height, width, 3]
        logits = model.apply(variables, images, train=False)  # float32 [batch, num_classes]

    Training needs `mutable=["batch_stats"]` and, with dropout or stochastic depth, `rngs={"dropout": key}`.

    Args:
        name: one of `names()`.
        num_classes: width of the classifier.
        **overrides: any key of `variants.DEFAULTS` (the architecture), or of `dropout_rate`, `stochastic_depth_rate`,
            `bn_group_size`, `bn_momentum`, `bn_epsilon`, `zero_init_residual`, `padding`, `window`, `attention_impl`,
            `dtype` (of activations: "float32" or "bfloat16"), `remat`, `scan`.

    Raises:
        ValueError: for an unknown name or key, or an impossible combination.
    """
    head = {"dropout_rate": overrides.pop("dropout_rate", 0.0)}
    run = {key: overrides.pop(key) for key in tuple(overrides) if key in _BACKBONE_FIELDS and key not in variants.DEFAULTS}
    run["dtype"] = jnp.dtype(run.get("dtype", "float32"))
    architecture = variants.resolve(name, **overrides)
    head["final_width"] = architecture.pop("final_width")
    return HaloNet(backbone=Backbone(**architecture, **run), num_classes=num_classes, **head)
