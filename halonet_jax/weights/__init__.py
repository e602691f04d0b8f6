"""One door for trained weights: everything a checkpoint needs to be used, without opening its training data."""

import dataclasses
import functools
from typing import Any

import jax
import ml_collections
from etils import epath

from halonet_jax import config as config_lib
from halonet_jax import tasks
from halonet_jax.errors import CheckpointError, ConfigError
from halonet_jax.runtime import reporting
from halonet_jax.runtime import workdir as workdir_lib
from halonet_jax.training import checkpoint, sharding
from halonet_jax.training.progress import Progress
from halonet_jax.training.task import Task
from halonet_jax.weights import hub, portable, timm


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What `load` returns.

    Attributes:
        config: of the run, with training-only settings neutral: batch-norm groups, accumulation and `mesh.fsdp`.
        task: its `predict` takes `variables["params"]`, `variables["batch_stats"]` and a batch.
        variables: `{"params": …, "batch_stats": …}`, for `model.apply`.
        metadata: class names and preprocessing.
        step: of the checkpoint.
        weights: "raw" or "ema".
        folder: where it was loaded from.
        figures: the evaluation of that step in training, by metric; empty where there was none.
    """

    config: ml_collections.ConfigDict
    task: Task
    variables: dict[str, Any]
    metadata: dict[str, Any]
    step: int
    weights: str
    folder: epath.Path
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The Flax module: `model.apply(variables, normalised_images, train=False)`."""
        return self.task.model

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images that the model was trained for."""
        return self.task.transform(False).fields["image"].shape[:2]

    def logits(self, images: Any) -> jax.Array:
        """Returns the logits `[B, num_classes]`, float32.

        Args:
            images: uint8 `[B, H, W, 3]`, RGB. The paper's evaluation crops them to `metadata["preprocessing"]["image_size"]`.

        Raises:
            ConfigError: the model detects objects.
        """
        self._check_classifies("logits")
        return self._predict(self.variables, {"image": images})

    def features(self, images: Any) -> tuple[jax.Array, ...]:
        """Returns the maps of the four stages, at strides 4, 8, 16 and 32.

        Args:
            images: as of `logits`.

        Raises:
            ConfigError: the model detects objects.
        """
        self._check_classifies("features")
        return self._features(self.variables, images)

    def _check_classifies(self, what):
        if self.config.task == "detection":
            raise ConfigError(
                f"{what} are of classifiers, and {self.folder} was trained for task='detection'; task.predict takes its variables "
                "and a batch"
            )

    @functools.cached_property
    def _predict(self):
        return jax.jit(lambda variables, batch: self.task.predict(variables["params"], variables["batch_stats"], batch))

    @functools.cached_property
    def _features(self):
        return jax.jit(lambda variables, images: self.model.apply(variables, self.task.normalize(images), method="features"))


def load_config(folder: str, files: tuple[str, ...] = hub.WEIGHTS) -> tuple[epath.Path, ml_collections.ConfigDict]:
    """Reads the config of a run or of a portable folder, or makes that of timm's weights.

    Args:
        folder: a path as `load` takes it, or a folder of any of the formats that `halonet_jax.export` writes.
        files: patterns of the files to download where it is on the hub.

    Returns:
        The folder's full path, and the config.

    Raises:
        ConfigError: the folder holds no config, or a damaged one.
        CheckpointError: the folder is portable and its config is damaged, or timm's weights are none that we know.
    """
    path = locate(folder, files)
    if timm.is_timm(path):
        return path, timm.read_config(path)
    if portable.has_config(path):
        return path, portable.read_config(path).config
    try:
        return path, config_lib.from_json((path / "config.json").read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"{path} holds no config.json; give the workdir of a training run, or a folder that halonet_jax.export wrote"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path / 'config.json'} cannot be read ({error}); give the workdir of a training run") from None


def locate(path: str, files: tuple[str, ...] = hub.WEIGHTS) -> epath.Path:
    """Returns the folder of a model, downloaded where it is on the hub.

    Args:
        path: as `load` takes it.
        files: patterns of the files to download.
    """
    return hub.download(path, files) if hub.is_hub_name(str(path)) else workdir_lib.locate(str(path))


def load(
    path: str,
    step: int | str = "latest",
    weights: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    architecture: str | None = None,
) -> Loaded:
    """Loads trained weights with everything that is needed to use them.

        loaded = halonet_jax.load("runs/digits", step="best")
        logits = loaded.logits(images)  # uint8 [B, H, W, 3]

    Args:
        path: the workdir of a training run, local or `gs://`; a folder that `halonet_jax.export` wrote with
            `--format=weights`; a file of weights of one of timm's halo models, safetensors or `torch.save`; or a folder of
            weights, ours or timm's, on the Hugging Face hub, `hf://OWNER/NAME[@REVISION]`.
        step: of a workdir: a step number, "latest" or "best" (by the task's primary metric).
        weights: of a workdir: "raw", or "ema" for their moving average; None is "ema" where the run kept one.
        mesh: the weights are copied to each of its devices; None is all devices of this run.
        architecture: of timm's weights, one of `halonet_jax.weights.timm.NAMES`. None: what their `config.json` says, or
            the one whose arrays the file has.

    Raises:
        ConfigError: there is no model at `path`, or an argument breaks a rule above.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    if weights not in ("raw", "ema", None):
        raise ConfigError(f"weights={weights!r} is unknown; use 'raw' or 'ema'")
    mesh = mesh or sharding.make_mesh()
    folder = locate(path)
    if timm.is_timm(folder):
        return _load_timm(folder, step, weights, architecture, mesh)
    if architecture is not None:
        raise ConfigError(f"architecture={architecture!r} is for timm's weights, and {folder} holds none; leave it out")
    if portable.is_portable(folder) or portable.has_config(folder):
        return _load_portable(folder, step, weights, mesh)
    folder, config = load_config(str(folder))
    _neutralize(config)
    checkpointer = checkpoint.Checkpointer(folder / "checkpoints", read_only=True)
    try:
        number = _step_number(checkpointer, step)
        metadata = Progress.from_record(checkpointer.read_record(number)).metadata
        task = tasks.make_task(config, metadata)
        if weights is None:
            weights = "ema" if config.ema_decay else "raw"
        abstract = _abstract(task, mesh)
        at_step, state = checkpointer.restore_weights((abstract["params"], abstract["batch_stats"]), number, ema=weights == "ema")
    finally:
        checkpointer.close()
    variables = dict(zip(("params", "batch_stats"), state))
    prefix = "eval_ema/" if weights == "ema" else "eval/"
    reports = [report for report in reporting.read_metrics(folder) if report.get("step") == at_step]
    figures = {key.removeprefix(prefix): x for report in reports for key, x in report.items() if key.startswith(prefix)}
    return Loaded(config, task, variables, metadata, at_step, weights, folder, figures)


def _load_portable(folder, step, weights, mesh):
    about = portable.read_config(folder)
    portable.check_holds(folder, about, step, weights)
    _neutralize(about.config)
    task = tasks.make_task(about.config, about.metadata)
    if not portable.is_portable(folder):
        raise CheckpointError(f"{folder} holds no {portable.WEIGHTS}; export it with weights among the --format")
    variables = portable.read_variables(folder, _abstract(task, mesh))
    return Loaded(about.config, task, variables, about.metadata, about.step, about.weights, folder, about.figures)


def _load_timm(path, step, weights, architecture, mesh):
    found = timm.load(path, architecture)
    metadata = tasks.find(found.config).expected_metadata(found.config) | {"class_names": found.class_names}
    portable.check_holds(path, portable.Portable(found.config, metadata, 0, "raw", {}), step, weights)
    _neutralize(found.config)
    task = tasks.make_task(found.config, metadata)
    variables = jax.tree.map(lambda like, x: jax.device_put(x, like.sharding), _abstract(task, mesh), found.variables)
    return Loaded(found.config, task, variables, metadata, 0, "raw", path)


def _neutralize(config):
    config.mesh.fsdp = 1  # weights are small beside a training state
    config.model.bn_group_size, config.optimizer.accumulation_steps = 0, 1
    if config.model.attention_impl == "pallas":
        config.model.attention_impl = "auto"  # this may be another kind of device; parameters are the same


def _abstract(task, mesh):
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, jax.P()))
    return dict(zip(("params", "batch_stats"), jax.tree.map(place, jax.eval_shape(task.init, jax.random.key(0)))))


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
