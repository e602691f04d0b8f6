"""The train state: one plain pytree for steps, checkpoints and evaluation."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from halonet_jax.training.task import Task


@struct.dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
        step: int32 scalar, the number of optimizer steps taken. It also determines the position in the data and every
            random number of the next step.
        params: tree of parameters, float32.
        model_state: tree of batch statistics, float32.
        opt_state: the state of the optax optimizer.
        ema_params: exponential moving average of `params`; None if EMA is off.
        ema_model_state: exponential moving average of `model_state`; None if EMA is off.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: optax.OptState
    ema_params: Any
    ema_model_state: Any

    def weights(self) -> dict[str, tuple[Any, Any]]:
        """Returns the weights to evaluate: `{"eval": (params, model_state)}`, with EMA also "eval_ema"."""
        weights = {"eval": (self.params, self.model_state)}
        if self.ema_params is not None:
            weights["eval_ema"] = (self.ema_params, self.ema_model_state)
        return weights


def create(task: Task, optimizer: optax.GradientTransformation, rng: jax.Array, ema: bool) -> TrainState:
    """Returns the state before the first step. Jit it with output shardings to create the state sharded.

    Args:
        task: provides `init`.
        optimizer: from `optimizer.make_optimizer`.
        rng: random key of the initial parameters.
        ema: whether the state holds moving averages. They start as copies of the weights.
    """
    params, model_state = task.init(rng)
    # Copies, because the state is donated to the step and a buffer can be donated only once.
    copy = lambda tree: jax.tree.map(jnp.copy, tree) if ema else None
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, model_state=model_state, opt_state=optimizer.init(params),
        ema_params=copy(params), ema_model_state=copy(model_state),
    )  # fmt: skip


@jax.jit
def fingerprint(state: Any) -> tuple[jax.Array, jax.Array]:
    """Returns whether all arrays are finite, and a checksum of each array.

    The checksums are sums of integers. So they do not depend on the sharding.

    Args:
        state: pytree of at least one array of numbers or booleans.

    Returns:
        A bool scalar, and uint32 `[leaves]` in the order of `jax.tree.leaves`.
    """
    leaves = jax.tree.leaves(state)
    finite = jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()
    return finite, jnp.stack([_words(x).astype(jnp.uint32).sum(dtype=jnp.uint32) for x in leaves])


def _words(x):
    """Returns the bits of an array as unsigned integers of at most 32 bits."""
    if x.dtype == jnp.bool_:
        return x
    return jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32))
