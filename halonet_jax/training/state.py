"""The train state: one plain pytree that steps, checkpoints, EMA and export share."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from halonet_jax.training.task import Task


@struct.dataclass
class TrainState:
    """All that training changes.

    Attributes:
        step: int32 scalar, optimizer steps taken. It also fixes the data position and every random number of the next step.
        params: float32.
        model_state: batch statistics, float32.
        opt_state: optax's.
        ema_params: exponential moving average of `params`; None where EMA is off.
        ema_model_state: the same of `model_state`.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: optax.OptState
    ema_params: Any
    ema_model_state: Any

    def weights(self) -> dict[str, tuple[Any, Any]]:
        """What can be evaluated: `{"eval": (params, model_state), "eval_ema": …}`, the latter where there is an EMA."""
        weights = {"eval": (self.params, self.model_state)}
        if self.ema_params is not None:
            weights["eval_ema"] = (self.ema_params, self.ema_model_state)
        return weights


def create(task: Task, optimizer: optax.GradientTransformation, seed: int, ema: bool) -> TrainState:
    """The state before the first step. Jittable, so that it can be born sharded."""
    params, model_state = task.init(jax.random.key(seed))
    # Copies: the state is donated to the step, and a buffer can be donated once only.
    copy = lambda tree: jax.tree.map(jnp.copy, tree) if ema else None
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, model_state=model_state, opt_state=optimizer.init(params),
        ema_params=copy(params), ema_model_state=copy(model_state),
    )  # fmt: skip


@jax.jit
def fingerprint(state: Any) -> tuple[jax.Array, jax.Array]:
    """Returns whether all arrays are finite, and a checksum of each.

    The checksums are sums of integers, so that they do not depend on how arrays are cut over devices.

    Args:
        state: pytree of arrays of numbers or booleans, at least one.

    Returns:
        A boolean, and uint32 `[leaves]` in the order of `jax.tree.leaves`.
    """
    leaves = jax.tree.leaves(state)
    finite = jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()
    return finite, jnp.stack([_words(x).astype(jnp.uint32).sum(dtype=jnp.uint32) for x in leaves])


def _words(x):
    """The bits of an array as unsigned integers, of at most 32 bits each."""
    if x.dtype == jnp.bool_:
        return x
    return jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32))
