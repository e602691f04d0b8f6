"""The train step and the evaluation step, as pure functions over the state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from halonet_jax.training import sharding
from halonet_jax.training.state import TrainState
from halonet_jax.training.task import Task


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema_decay: float,
    accumulation_steps: int = 1,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """`(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    Metrics are float32 scalars: the task's, "loss", "grad_norm" and "update_norm". Random numbers depend on the seed and the
    step alone. With a `mesh`, weights that are shared out over it are gathered for use, and kernels are cut over it.
    """

    def train_step(state, batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, model_state, metrics = _gradients(task, state, batch, rng, accumulation_steps, mesh)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = (state.ema_params, state.ema_model_state)
        if ema_decay:
            # The ramp lets the average forget the random start: it is at most (step + 1) / (step + 10).
            decay = jnp.minimum(ema_decay, (state.step + 1) / (state.step + 10))
            ema = optax.incremental_update((params, model_state), ema, 1 - decay)
        state = TrainState(state.step + 1, params, model_state, opt_state, *ema)
        return state, {**metrics, "grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}

    return train_step


def _gradients(task, state, batch, rng, accumulation_steps, mesh):
    """Gradients, new model state and metrics of the batch: those of its micro-batches, averaged."""

    def compute(batch, rng):
        loss = lambda params: task.loss(_gathered(params, mesh), state.model_state, batch, rng)
        with sharding.use(mesh):
            (loss, (model_state, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return (grads, model_state), {"loss": loss, **metrics}

    if accumulation_steps == 1:
        sums, metrics = compute(batch, rng)
        return *sums, metrics

    # Micro-batch j takes rows j, j + steps, …: then every device finds its part of it among its own rows.
    split = lambda x: x.reshape(x.shape[0] // accumulation_steps, accumulation_steps, *x.shape[1:]).swapaxes(0, 1)

    def body(sums, xs):
        micro_batch, micro_step = xs
        terms, metrics = compute(micro_batch, jax.random.fold_in(rng, micro_step))
        return jax.tree.map(jnp.add, sums, terms), metrics

    zeros = jax.tree.map(jnp.zeros_like, (state.params, state.model_state))
    sums, metrics = jax.lax.scan(body, zeros, (jax.tree.map(split, batch), jnp.arange(accumulation_steps)))
    grads, model_state = jax.tree.map(lambda x: x / accumulation_steps, sums)
    return grads, model_state, jax.tree.map(lambda x: x.mean(0), metrics)


def _gathered(params, mesh):
    """Whole weights on every device. Left to itself, the compiler would move activations to the shards, batches at a time."""
    return params if mesh is None else jax.lax.with_sharding_constraint(params, jax.NamedSharding(mesh, jax.P()))


def make_eval_step(task: Task, mesh: jax.sharding.Mesh | None = None) -> Callable[[Any, dict], dict]:
    """`((params, model_state), batch) -> Task.metrics's tree`, to be jitted with that tree on every device.

    Args:
        task: whose `predict` and `metrics` it runs.
        mesh: as in `make_train_step`.
    """

    def eval_step(weights, batch):
        params, model_state = weights
        with sharding.use(mesh):
            return task.metrics(task.predict(_gathered(params, mesh), model_state, batch), batch)

    return eval_step
