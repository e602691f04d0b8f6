"""Which parameters a config freezes."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from halonet_jax.errors import ConfigError
from halonet_jax.models import freezing


def rule(patterns: tuple[str, ...], init: Callable) -> Callable[[Any], Any] | None:
    """Returns `Task.frozen` for the patterns of `config.model.freeze`, None where there are none.

    Args:
        patterns: as of `freezing.is_frozen`.
        init: as `Task.init`.

    Raises:
        ConfigError: a pattern matches no parameter.
    """
    if not patterns:
        return None
    if unmatched := freezing.unmatched(jax.eval_shape(init, jax.random.key(0))[0], patterns):
        raise ConfigError(
            f"model.freeze has {unmatched[0]!r}, which matches no parameter; patterns look like 'backbone/stage1_*', and "
            "models.create(...).init(...) shows all names"
        )
    return functools.partial(freezing.frozen, patterns=patterns)
