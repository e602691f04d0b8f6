"""Which parameters a config freezes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from halonet_jax import config as config_lib
from halonet_jax.errors import ConfigError
from halonet_jax.models import freezing


def rule(config: ml_collections.ConfigDict, init: Callable) -> Callable[[Any], Any] | None:
    """Returns `Task.frozen` for `model.freeze` and `model.bn_frozen`, None where they freeze nothing.

    Args:
        config: the whole config.
        init: as `Task.init`.

    Raises:
        ConfigError: a pattern matches no parameter.
    """
    patterns, given = config_lib.frozen_patterns(config), config.model.freeze
    if not patterns:
        return None
    if given and (unmatched := freezing.unmatched(jax.eval_shape(init, jax.random.key(0))[0], given)):
        raise ConfigError(
            f"model.freeze has {unmatched[0]!r}, which matches no parameter; patterns look like 'backbone/stage1_*', and "
            "models.create(...).init(...) shows all names"
        )
    return functools.partial(freezing.frozen, patterns=patterns)
