"""The programs of a run: state creation, train step and eval step, with the sharding of their arrays.

Training and the check whether a recipe fits a TPU slice build their programs here, so both compile the same ones.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from halonet_jax.training import optimizer, sharding, state, step
from halonet_jax.training.task import Task


class Programs(NamedTuple):
    """Jitted, not yet compiled; `train_step.lower(abstract_state, abstract_batch).compile()` needs no device.

    Attributes:
        schedule: learning rate by step.
        abstract_state: the train state as `ShapeDtypeStruct`s with shardings.
        create_state: `() -> state`, created with its final sharding.
        train_step: `(state, batch) -> (state, metrics)`; donates the state.
        eval_step: `((params, model_state), batch) -> tree` of `Task.metrics`, on every device.
        description: of what the mesh's devices will do, `Task.describe`.
    """

    mesh: jax.sharding.Mesh
    schedule: optax.Schedule
    abstract_state: state.TrainState
    create_state: Callable[[], state.TrainState]
    train_step: Callable
    eval_step: Callable
    description: str

    def abstract_batch(self, task: Task, batch_size: int, training: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
        """A global batch of the task's fields, cut over the mesh; with the `mask` that evaluation adds."""
        fields = {name: (field.shape, field.dtype) for name, field in task.transform(training).fields.items()}
        if not training:
            fields["mask"] = ((), "bool")
        cut = jax.NamedSharding(self.mesh, sharding.BATCH)
        return {
            name: jax.ShapeDtypeStruct((batch_size, *shape), jnp.dtype(dtype), sharding=cut)
            for name, (shape, dtype) in fields.items()
        }


def make_programs(
    config: ml_collections.ConfigDict, task: Task, mesh: jax.sharding.Mesh, total_steps: int, steps_per_epoch: float
) -> Programs:
    """The programs of a config on a mesh. Its devices may be those of a topology that is not at hand.

    Args:
        config: the whole config.
        task: the config's.
        mesh: from `sharding.make_mesh`.
        total_steps: of the whole schedule.
        steps_per_epoch: for the warm-up, which is given in epochs.
    """
    schedule = optimizer.make_schedule(config, total_steps, steps_per_epoch)
    tx = optimizer.make_optimizer(config, schedule)
    create_state = functools.partial(state.create, task, tx, config.seed, ema=config.ema_decay > 0)
    abstract_state = jax.eval_shape(create_state)
    state_sharding = sharding.state_sharding(mesh, abstract_state)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    everywhere = jax.NamedSharding(mesh, jax.P())
    train_step = step.make_train_step(
        task, tx, seed=config.seed, ema_decay=config.ema_decay, accumulation_steps=config.optimizer.accumulation_steps,
        mesh=mesh,
    )  # fmt: skip
    with sharding.use(mesh):
        description = task.describe()
    return Programs(
        mesh=mesh,
        schedule=schedule,
        abstract_state=jax.tree.map(place, abstract_state, state_sharding),
        create_state=jax.jit(create_state, out_shardings=state_sharding),
        train_step=jax.jit(
            train_step, in_shardings=(state_sharding, jax.NamedSharding(mesh, sharding.BATCH)),
            out_shardings=(state_sharding, everywhere), donate_argnums=0,
        ),
        eval_step=jax.jit(step.make_eval_step(task, mesh), out_shardings=everywhere),
        description=description,
    )  # fmt: skip
