"""The model that is evaluated: a run's checkpoint, or an export in its own runtime."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath

from halonet_jax import config as config_lib
from halonet_jax import exporting, tasks
from halonet_jax.errors import ConfigError
from halonet_jax.runtime import workdir as workdir_lib
from halonet_jax.training import sharding, step
from halonet_jax.training.task import Task
from halonet_jax.weights import hub, load, load_config, portable, timm

# How the entry spells what training sets by --config. Remedies name no other setting.
_FLAGS = {
    "data.dir": "--data_dir", "data.eval_split": "--split", "data.name": "--data_name", "data.label_key": "--label_key",
}  # fmt: skip


def flag(key: str) -> str:
    """Returns the entry's flag that sets a config key; "" where it has none.

    Args:
        key: such as "data.dir".
    """
    return _FLAGS.get(key, "")


class Subject(NamedTuple):
    """What is evaluated.

    Attributes:
        path: of the run's folder or the model.
        name: of an export or a model, for file names, such as "digits_onnx"; "" for a run.
        format: of an export; None for a run.
        folder: where results go.
        config: the run's, with what evaluation changes. `passes.run` reads its data block, which may change between passes.
        trained_on: the data block of training.
        task: as it was trained.
        metadata: class names and preprocessing.
        step: of the checkpoint.
        weights: "raw" or "ema".
        program: `(task) -> ((variables, batch) -> tree)`, a compiled evaluation step with the metrics of that task.
        variables: its first argument.
        mesh: that batches are cut over.
    """

    path: epath.Path
    name: str
    format: str | None
    folder: epath.Path
    config: ml_collections.ConfigDict
    trained_on: dict[str, Any]
    task: Task
    metadata: dict[str, Any]
    step: int
    weights: str
    program: Callable[[Task], Callable]
    variables: Any
    mesh: jax.sharding.Mesh


def open_subject(
    workdir: str | None,
    model: str | None,
    format: str | None,
    at: int | str,
    ema: bool,
    batch_size: int | None,
    data: Mapping[str, str | None],
    out: str | None,
) -> Subject:
    """Opens a checkpoint or an export. JAX's devices are chosen here.

    Args:
        workdir: folder of a training run; None: `model` is given.
        model: an exported folder, timm's weights, or another path of `halonet_jax.load`.
        format: which export of `model` to run; None: weights, or the first that is there.
        at: step of the checkpoint, "latest" or "best".
        ema: whether to take the moving average of a run's weights.
        batch_size: global; None: as in training.
        data: what changes in the config's data block, by key; None leaves a key as it is.
        out: folder for results; None: the workdir, or beside the export.

    Raises:
        ConfigError, CheckpointError: there is no such model, or an argument breaks a rule.
    """
    if (workdir is None) == (model is None):
        raise ConfigError("give either --workdir, the folder of a run, or --model, an exported folder or a name on the hub")
    path, config = load_config(model if workdir is None else workdir, exporting.patterns(format))
    imported = timm.is_timm(path)
    exported = portable.has_config(path) or imported
    if format is not None and not exported:
        raise ConfigError(f"--format={format} is for exports, and {path} is a workdir; leave --format out")
    if imported and format not in (None, "weights"):
        raise ConfigError(f"--format={format} is for exports, and {path} holds timm's weights; leave --format out")
    format = "weights" if imported else exporting.find(path, format) if exported else None
    trained_on = dict(config.data)
    if exported and not trained_on["dir"]:
        trained_on["dir"] = data["dir"] or ""  # an export does not say where its data was
    _configure(config, data, batch_size, one_device=format not in (None, "weights"))
    if not exported:
        workdir_lib.use_compile_cache(path)
    weights = "ema" if ema else None if exported else "raw"
    opened = (_open_weights if format in (None, "weights") else _open_export)(path, format, at, weights)
    return Subject(
        path=path, name=f"{_label(model or workdir)}_{format}" if exported else "", format=format,
        folder=_result_folder(path, model, exported, out), config=config, trained_on=trained_on, **opened,
    )  # fmt: skip


def _configure(config, data, batch_size, one_device):
    """Sets what the evaluation changes in a run's config, and checks it."""
    size = config.eval_batch_size or config.batch_size
    if not one_device:
        sharding.use_cpu_cores(batch_size or size)
    devices = 1 if one_device else jax.device_count()
    config.data.update({key: value for key, value in data.items() if value is not None})
    # What belongs to training alone must not stand in the way here.
    config.mesh.fsdp, config.model.bn_group_size, config.optimizer.accumulation_steps = 1, 0, 1
    config.eval_batch_size = batch_size or -(-size // devices) * devices
    config.batch_size = config.eval_batch_size
    if config.model.attention_impl == "pallas":
        config.model.attention_impl = "auto"
    config_lib.validate(config, devices)


def _open_weights(path, format, at, weights):
    mesh = sharding.make_mesh()
    loaded = load(str(path), at, weights, mesh)
    variables = loaded.variables["params"], loaded.variables["batch_stats"]
    program = lambda task: jax.jit(step.make_eval_step(task, mesh), out_shardings=jax.NamedSharding(mesh, jax.P()))
    return {
        "task": loaded.task, "metadata": loaded.metadata, "step": loaded.step, "weights": loaded.weights,
        "program": program, "variables": variables, "mesh": mesh,
    }  # fmt: skip


def _open_export(path, format, at, weights):
    if jax.process_count() > 1:
        raise ConfigError(f"format {format} runs in one process, and there are {jax.process_count()}; start one")
    about = portable.read_config(path)
    portable.check_holds(path, about, at, weights)
    task = tasks.make_task(about.config, about.metadata)
    predict = exporting.open_predict(path, format, about.config.task, task)

    def program(task):
        metrics = jax.jit(task.metrics)
        return lambda _, batch: metrics(jax.tree.map(jnp.asarray, predict(batch)), batch)

    return {
        "task": task, "metadata": about.metadata, "step": about.step, "weights": about.weights, "program": program,
        "variables": None, "mesh": sharding.make_mesh(devices=jax.local_devices()[:1]),
    }  # fmt: skip


def _result_folder(path, model, exported, out):
    """A run's results go into its workdir. Exports stay as they were published, and the hub's cache is not ours."""
    if out is not None:
        return workdir_lib.locate(out)
    if not exported:
        return path
    return workdir_lib.locate(".") if hub.is_hub_name(model or "") else path.parent


def _label(model):
    """Name of an export, for a file name."""
    name = model.removeprefix(hub.PREFIX) if hub.is_hub_name(model) else workdir_lib.locate(model).name
    return re.sub("[^a-zA-Z0-9_.-]+", "_", name)
