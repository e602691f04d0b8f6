"""Values that are computed from a config."""

import math

import ml_collections


def model_options(config: ml_collections.ConfigDict) -> dict:
    """Returns the keyword arguments of `models.create`. Knobs that are None are left out: the variant sets them.

    Args:
        config: a whole config; its `model` section is read.
    """
    return {key: value for key, value in config.model.items() if value is not None}


def independent_parts(config: ml_collections.ConfigDict) -> int:
    """Returns the largest number of equal parts that a batch can be cut into, with no batch-norm group in two parts.

    Args:
        config: a whole config, which need not be valid.
    """
    micro_batch, group = config.batch_size // max(1, config.optimizer.accumulation_steps), config.model.bn_group_size
    groups = micro_batch // group if group > 0 and micro_batch % group == 0 else 1
    return math.gcd(groups, config.eval_batch_size) or 1
