"""The train step and the evaluation step, as pure functions of the state and a batch."""

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
    """Returns the train step, `(state, batch) -> (state, metrics)`. Jit it and donate the state.

    Metrics are float32 scalars: those of the task, "loss", "grad_norm" and "update_norm". Random numbers depend only on
    the seed and the step.

    Args:
        task: provides the loss.
        optimizer: from `optimizer.make_optimizer`.
        seed: of mixup, CutMix, dropout and stochastic depth.
        ema_decay: decay of the moving average of the weights, below 1; 0: no average.
        accumulation_steps: number of micro-batches. It must divide the batch.
        mesh: if given, sharded weights are gathered for use, and kernels are cut over the mesh.
    """

    def train_step(state, batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, model_state, metrics = _gradients(task, state, batch, rng, accumulation_steps, mesh)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = (state.ema_params, state.ema_model_state)
        if ema_decay:
            # The decay ramps up with (step + 1) / (step + 10), so that the average forgets the random start.
            decay = jnp.minimum(ema_decay, (state.step + 1) / (state.step + 10))
            ema = optax.incremental_update((params, model_state), ema, 1 - decay)
        state = TrainState(state.step + 1, params, model_state, opt_state, *ema)
        return state, {**metrics, "grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}

    return train_step


def _gradients(task, state, batch, rng, accumulation_steps, mesh):
    """Returns gradients, new model state and metrics of the batch, averaged over its micro-batches."""

    def compute(batch, rng):
        loss = lambda params: task.loss(_gathered(params, mesh), state.model_state, batch, rng)
        with sharding.use(mesh):
            (loss, (model_state, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return (grads, model_state), {"loss": loss, **metrics}

    if accumulation_steps == 1:
        sums, metrics = compute(batch, rng)
        return *sums, metrics

    # Micro-batch j takes the rows j, j + steps, …. So every device has its part of each micro-batch among its own rows.
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
    """Gathers whole weights on every device. Without this, the compiler would move activations to the shards."""
    return params if mesh is None else jax.lax.with_sharding_constraint(params, jax.NamedSharding(mesh, jax.P()))


def make_eval_step(task: Task, mesh: jax.sharding.Mesh | None = None) -> Callable[[Any, dict], dict]:
    """Returns the evaluation step, `((params, model_state), batch) -> tree` of `Task.metrics`.

    Jit it with an output sharding that puts the tree whole on every device.

    Args:
        task: provides `predict` and `metrics`.
        mesh: as in `make_train_step`.
    """

    def eval_step(weights, batch):
        params, model_state = weights
        with sharding.use(mesh):
            return task.metrics(task.predict(_gathered(params, mesh), model_state, batch), batch)

    return eval_step
