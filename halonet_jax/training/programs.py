"""The programs of a run: state creation, train step and eval step, with the sharding of their arrays.

Training and the sizing for TPU slices both build their programs here. So they compile the same programs.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from halonet_jax.training import optimizer, sharding, state, step
from halonet_jax.training.task import Task


class Programs(NamedTuple):
    """Jitted programs, not yet compiled. `train_step.lower(abstract_state, abstract_batch).compile()` needs no device.

    Attributes:
        mesh: the devices that the programs are for.
        schedule: learning rate by step.
        abstract_state: the train state as `ShapeDtypeStruct`s with shardings.
        create_state: `() -> state`. The state is created with its final sharding.
        train_step: `(state, batch) -> (state, metrics)`. It donates the state.
        eval_step: `((params, model_state), batch) -> tree` of `Task.metrics`, whole on every device.
        description: a line of `Task.describe`, for the start of a run.
    """

    mesh: jax.sharding.Mesh
    schedule: optax.Schedule
    abstract_state: state.TrainState
    create_state: Callable[[], state.TrainState]
    train_step: Callable
    eval_step: Callable
    description: str

    def abstract_batch(self, task: Task, batch_size: int, training: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns a global batch of the task's fields as `ShapeDtypeStruct`s, cut over the mesh.

        Args:
            task: its transform gives the fields.
            batch_size: examples, over all devices. The number of devices must divide it.
            training: True for a training batch; False for an evaluation batch, which also has a bool `mask` [B].
        """
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
    """Returns the programs of a config on a mesh. The mesh may be of a topology without real devices.

    Args:
        config: the whole config.
        task: the task of the config.
        mesh: from `sharding.make_mesh`.
        total_steps: steps of the whole schedule.
        steps_per_epoch: converts the warm-up from epochs to steps.
    """
    schedule = optimizer.make_schedule(config, total_steps, steps_per_epoch)
    tx = optimizer.make_optimizer(config, schedule, task)

    def create_state(key_data):
        return state.create(task, tx, jax.random.wrap_key_data(key_data), ema=config.ema_decay > 0)

    # An argument rather than a constant, so that the runs of all seeds share one compiled program.
    key_data = np.asarray(jax.random.key_data(jax.random.key(config.seed)))
    abstract_state = jax.eval_shape(create_state, key_data)
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
        create_state=functools.partial(jax.jit(create_state, out_shardings=state_sharding), key_data),
        train_step=jax.jit(
            train_step, in_shardings=(state_sharding, jax.NamedSharding(mesh, sharding.BATCH)),
            out_shardings=(state_sharding, everywhere), donate_argnums=0,
        ),
        eval_step=jax.jit(step.make_eval_step(task, mesh), out_shardings=everywhere),
        description=description,
    )  # fmt: skip
