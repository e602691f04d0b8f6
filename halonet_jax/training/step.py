"""The train step and the evaluation pass, as pure functions over the state."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from halonet_jax.training.state import TrainState
from halonet_jax.training.task import Task


def make_train_step(
    task: Task, optimizer: optax.GradientTransformation, *, seed: int, ema_decay: float, accumulation_steps: int = 1
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """`(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    Metrics are float32 scalars: the task's, "loss", "grad_norm" and "update_norm"; all are finite as long as the new parameters
    are. Random numbers depend on the seed and the step alone.
    """

    def train_step(state, batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, model_state, metrics = _gradients(task, state, batch, rng, accumulation_steps)
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


def _gradients(task, state, batch, rng, accumulation_steps):
    """Mean gradients, new model state and mean metrics of the batch, or of its micro-batches one after the other."""

    def compute(model_state, batch, rng):
        (loss, (model_state, metrics)), grads = jax.value_and_grad(task.loss, has_aux=True)(
            state.params, model_state, batch, rng
        )
        return grads, model_state, {"loss": loss, **metrics}

    if accumulation_steps == 1:
        return compute(state.model_state, batch, rng)

    # Micro-batch j takes rows j, j + steps, …: then every device finds its part of it among its own rows.
    split = lambda x: x.reshape(x.shape[0] // accumulation_steps, accumulation_steps, *x.shape[1:]).swapaxes(0, 1)

    def body(carry, xs):
        model_state, sums = carry
        micro_batch, micro_step = xs
        grads, model_state, metrics = compute(model_state, micro_batch, jax.random.fold_in(rng, micro_step))
        return (model_state, jax.tree.map(jnp.add, sums, (grads, metrics))), None

    micro_batches = (jax.tree.map(split, batch), jnp.arange(accumulation_steps))
    shapes = jax.eval_shape(compute, state.model_state, jax.tree.map(lambda x: x[0], micro_batches[0]), rng)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[2]))
    (model_state, sums), _ = jax.lax.scan(body, (state.model_state, zeros), micro_batches)
    grads, metrics = jax.tree.map(lambda x: x / accumulation_steps, sums)
    return grads, model_state, metrics


def make_eval_step(task: Task) -> Callable[[Any, dict], dict]:
    """`((params, model_state), batch) -> sums`, see `Task.metrics`; to be jitted."""
    return lambda weights, batch: task.metrics(task.predict(*weights, batch), batch)


def evaluate(eval_step: Callable, weights: dict[str, Any], batches: Iterable[dict]) -> dict[str, dict[str, float | int]]:
    """One pass over `batches` for all of `weights`; returns the sums of each, exact where they are counts."""
    totals = {name: {} for name in weights}

    def add(sums):
        for name, values in jax.device_get(sums).items():
            for key, value in values.items():
                totals[name][key] = totals[name].get(key, 0) + np.asarray(value).item()

    previous = {}  # fetched only once the next batch is dispatched, so that the device never waits
    for batch in batches:
        sums = {name: eval_step(weight, batch) for name, weight in weights.items()}
        add(previous)
        previous = sums
    add(previous)
    return totals


def means(sums: dict[str, float | int]) -> dict[str, float]:
    """Sums over examples divided by their "count"."""
    count = max(sums.get("count", 0), 1)
    return {key: value / count for key, value in sums.items() if key != "count"}
