"""The state that a run starts from: random, or the weights of another model (`config.init_from`)."""

from typing import Any

import jax
import ml_collections
import numpy as np

from halonet_jax import weights
from halonet_jax.errors import ConfigError, UserError
from halonet_jax.training.programs import Programs
from halonet_jax.training.state import TrainState
from halonet_jax.training.task import Task


def create(config: ml_collections.ConfigDict, task: Task, program: Programs) -> TrainState:
    """Creates the state of step 0, sharded, and prints what was taken from `init_from`.

    A resumed run does not come here: it never reads `init_from` again.

    Args:
        config: the run's; `init_from` is read, as `weights.load` takes it, or "" for random weights.
        task: what the weights must fit.
        program: the run's.

    Raises:
        ConfigError: there is no model at `init_from`, it does not fit the task, or norms are frozen at random weights.
        CheckpointError: the weights are damaged.
    """
    init_from = config.init_from
    if config.model.bn_frozen and not init_from:
        raise ConfigError(
            "model.bn_frozen=True keeps the batch norms of trained weights, and init_from='' starts at random; set "
            "--config.init_from, or --config.model.bn_frozen=False"
        )
    state = program.create_state()
    if not init_from:
        return state
    if task.adapt is None:
        raise ConfigError(f"init_from={init_from!r} is set, but this task cannot start from another model; leave init_from out")
    try:
        loaded = weights.load(init_from, mesh=program.mesh)
    except UserError as error:
        raise type(error)(f"init_from={init_from!r}: {error}") from None
    variables = {**loaded.variables, "params": jax.tree.map(np.asarray, loaded.variables["params"])}
    try:
        found, rows = task.adapt(variables, loaded.model, loaded.metadata)
    except ValueError as error:
        raise ConfigError(f"init_from={init_from!r} does not fit: {error}") from None
    if jax.process_index() == 0:
        print(f"starting from {loaded.folder}, step {loaded.step}, {loaded.weights} weights:")
        width = max(len(what) for what, _ in rows)
        print("\n".join(f"  {what:{width}}  {how}" for what, how in rows), flush=True)
    params = _place(found["params"], state.params)
    model_state = _place(found["batch_stats"], state.model_state)
    state = state.replace(params=params, model_state=model_state)
    if state.ema_params is not None:  # buffers of its own: the state is donated
        ema = _place(found["params"], state.ema_params), _place(found["batch_stats"], state.ema_model_state)
        state = state.replace(ema_params=ema[0], ema_model_state=ema[1])
    return state


def _place(tree: Any, like: Any) -> Any:
    """Puts arrays where those of `like` are. Parts that `tree` lacks stay as they are in `like`."""
    parts = {name: like[name] for name in tree}
    return {**like, **jax.tree.map(lambda x, old: jax.device_put(np.array(x), old.sharding), dict(tree), parts)}
