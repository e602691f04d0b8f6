"""Values that are computed from a config."""

import math

import ml_collections

from halonet_jax.models import freezing


def model_options(config: ml_collections.ConfigDict) -> dict:
    """Returns the keyword arguments of `models.create`. Knobs that are None are left out: the variant sets them.

    `freeze` is that of `frozen_patterns`.

    Args:
        config: a whole config; its `model` section is read.
    """
    options = {key: value for key, value in config.model.items() if key != "bn_frozen" and value is not None}
    return options | {"freeze": frozen_patterns(config)}


def frozen_patterns(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Returns the patterns of all parameters that are not trained: those of `model.freeze`, and norms by `model.bn_frozen`.

    Args:
        config: a whole config; its `model` section is read.
    """
    return config.model.freeze + (freezing.NORMS if config.model.bn_frozen else ())


def independent_parts(config: ml_collections.ConfigDict) -> int:
    """Returns the largest number of equal parts that a batch can be cut into, with no batch-norm group in two parts.

    Args:
        config: a whole config, which need not be valid.
    """
    micro_batch, group = config.batch_size // max(1, config.optimizer.accumulation_steps), config.model.bn_group_size
    groups = micro_batch // group if group > 0 and micro_batch % group == 0 else 1
    return math.gcd(groups, config.eval_batch_size) or 1
