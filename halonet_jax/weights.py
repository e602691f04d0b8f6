"""One door for trained weights: everything a checkpoint needs to be used, without opening its training data."""

from typing import Any, NamedTuple

import jax
import ml_collections
from etils import epath

from halonet_jax import config as config_lib
from halonet_jax import tasks
from halonet_jax.errors import CheckpointError, ConfigError
from halonet_jax.runtime import workdir as workdir_lib
from halonet_jax.training import checkpoint, sharding
from halonet_jax.training.progress import Progress
from halonet_jax.training.task import Task


class Loaded(NamedTuple):
    """What `load` returns.

    Attributes:
        config: of the run, with training-only settings neutral: batch-norm groups, accumulation and `mesh.fsdp`.
        task: its `predict` takes `variables["params"]`, `variables["batch_stats"]` and a batch.
        variables: `{"params": …, "batch_stats": …}`, for `model.apply`.
        metadata: class names and preprocessing.
        step: of the checkpoint.
        weights: "raw" or "ema".
        folder: where it was loaded from.
    """

    config: ml_collections.ConfigDict
    task: Task
    variables: dict[str, Any]
    metadata: dict[str, Any]
    step: int
    weights: str
    folder: epath.Path


def load_config(folder: str) -> tuple[epath.Path, ml_collections.ConfigDict]:
    """Reads the config of a run.

    Args:
        folder: the workdir of a training run, local or `gs://`.

    Returns:
        The folder's full path, and the config.

    Raises:
        ConfigError: where the folder holds no config, or a damaged one.
    """
    path = workdir_lib.locate(str(folder))
    try:
        return path, config_lib.from_json((path / "config.json").read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"workdir {path} holds no config.json; give the --workdir of a training run") from None
    except OSError as error:
        raise ConfigError(f"{path / 'config.json'} cannot be read ({error}); give the --workdir of a training run") from None


def load(
    folder: str,
    step: int | str = "latest",
    weights: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Loaded:
    """Loads one checkpoint of a run.

        loaded = load("runs/digits", step="best", weights="ema")
        logits = loaded.task.predict(loaded.variables["params"], loaded.variables["batch_stats"], {"image": images})

    Args:
        folder: the workdir of a training run, local or `gs://`.
        step: a step number, "latest" or "best" (by the task's primary metric).
        weights: "raw", or "ema" for their moving average; None is "ema" where the run kept one.
        mesh: over whose devices the weights are copied; None is all devices of this run.

    Raises:
        ConfigError: for a folder without a run, or an argument that breaks a rule above.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    if weights not in ("raw", "ema", None):
        raise ConfigError(f"weights={weights!r} is unknown; use 'raw' or 'ema'")
    path, config = load_config(folder)
    config.mesh.fsdp = 1  # weights are small beside a training state
    config.model.bn_group_size, config.optimizer.accumulation_steps = 0, 1
    if config.model.attention_impl == "pallas":
        config.model.attention_impl = "auto"  # this may be another kind of device; parameters are the same
    mesh = mesh or sharding.make_mesh()
    checkpointer = checkpoint.Checkpointer(path / "checkpoints", read_only=True)
    try:
        number = _step_number(checkpointer, step)
        metadata = Progress.from_record(checkpointer.read_record(number)).metadata
        task = tasks.make_task(config, metadata)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, jax.P())),
            jax.eval_shape(task.init, jax.random.key(0)),
        )
        if weights is None:
            weights = "ema" if config.ema_decay else "raw"
        at_step, (params, model_state) = checkpointer.restore_weights(abstract, number, ema=weights == "ema")
    finally:
        checkpointer.close()
    return Loaded(config, task, {"params": params, "batch_stats": model_state}, metadata, at_step, weights, path)


def _step_number(checkpointer, step):
    if step == "latest":
        return None
    if step == "best":
        best = checkpointer.best_step()
        if best is None:
            raise CheckpointError(f"no checkpoint in {checkpointer.directory} was evaluated in training; use step 'latest'")
        return best
    if not str(step).isdigit():
        raise ConfigError(f"step={step!r} is no checkpoint; use a step number, 'latest' or 'best'")
    return int(step)
