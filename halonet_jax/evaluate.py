"""Evaluates a run's checkpoint, or an exported model: exact counts, printed and written as JSON.

    python -m halonet_jax.evaluate --workdir=runs/digits [--ema] [--step=best] [--split=test] [--data_dir=…] [--data_name=…]
    python -m halonet_jax.evaluate --model=exported [--format=onnx] [--out=results] [--split=test] …

An export runs in its own runtime: JAX, TensorFlow or onnxruntime. In Python, `evaluate(workdir, …)` does the same and returns
the result.
"""

import json
import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from halonet_jax import command_line, exporting, tasks
from halonet_jax import config as config_lib
from halonet_jax.errors import ConfigError, DataError
from halonet_jax.runtime import distributed
from halonet_jax.runtime import workdir as workdir_lib
from halonet_jax.tasks.inputs import Inputs
from halonet_jax.training import evaluation, sharding, step
from halonet_jax.training.progress import check_classes
from halonet_jax.training.task import Task
from halonet_jax.weights import hub, load, load_config, portable, timm

# How this entry spells what training sets by --config. Remedies name no other setting.
_FLAGS = {"data.dir": "--data_dir", "data.eval_split": "--split", "data.name": "--data_name"}
_LABELS = {"top1": "top-1", "top5": "top-5"}


def evaluate(
    workdir: str | None = None,
    split: str | None = None,
    ema: bool = False,
    at: int | str = "latest",
    data_dir: str | None = None,
    batch_size: int | None = None,
    data_name: str | None = None,
    model: str | None = None,
    format: str | None = None,
    out: str | None = None,
) -> dict:
    """Evaluates one model on one split and writes `eval_<split>_<step>[_ema].json`.

    Other data than that of the run's config get a file of their own, whose name ends in a checksum of what was given.

    Args:
        workdir: folder of a training run. The result goes there. None: `model` is given.
        split: None: the config's `data.eval_split`.
        ema: whether to evaluate the moving average of the weights rather than the weights. A `model` holds one of them.
        at: step of the checkpoint, "latest" or "best".
        data_dir: where the data is; None: where it was in training.
        batch_size: global; it does not change the result. None: as in training.
        data_name: of the TFDS data set; None: that of training.
        model: a folder that `halonet_jax.export` wrote, timm's weights, or another path of `halonet_jax.load`. The result
            goes beside that folder, with its name in front; that of a model on the hub goes into the current folder.
        format: which export of `model` to run; None: weights, or the first that is there.
        out: folder for the result, in place of the above.

    Returns:
        What is written: split, step, ema, the data's source, name and dir, count, corrupt, path, and each metric of the task,
        with `<metric>_count` where it is a share of the examples. For a `model`, its format too.

    Raises:
        ConfigError, DataError, CheckpointError: for bad input. A data set with other classes than the checkpoint's is one.
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
    own = dict(config.data)
    if exported and not own["dir"]:
        own["dir"] = data_dir or ""  # an export does not say where its data was
    _configure(config, split, data_dir, data_name, batch_size, one_device=format not in (None, "weights"))
    if not exported:
        workdir_lib.use_compile_cache(path)
    subject = _open(path, format, at, "ema" if ema else None if exported else "raw")
    split = config.data.eval_split
    evaluator, corrupt = _run(subject, config, split, path)
    found = evaluator.result()
    if not found["count"]:
        raise DataError(f"no image of split {split!r} could be read, {corrupt} are corrupt; see the warnings above")

    about_data = {"source": config.data.source, "name": config.data.name, "dir": config.data.dir}
    other = "" if about_data == {key: own[key] for key in about_data} else f"_{zlib.crc32(json.dumps(about_data).encode()):08x}"
    average = subject.weights == "ema"
    name = f"eval_{re.sub('[^a-zA-Z0-9_-]+', '_', split)}_{subject.step}{'_ema' if average else ''}{other}.json"
    if exported:
        name = f"{_label(model or workdir)}_{format}_{name}"
    folder = _result_folder(path, model, exported, out)
    counts = {f"{key}_count": n for key, n in getattr(evaluator, "totals", {}).items() if isinstance(n, int) and key != "count"}
    result = {
        "split": split, "step": subject.step, "ema": average, "data": about_data, **found, **counts, "corrupt": corrupt,
        "path": str(folder / name), **({"format": format} if exported else {}),
    }  # fmt: skip
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(result, indent=2))
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written ({error}); give another --out; the result is {result}") from None
    return result


class _Subject(NamedTuple):
    """What is evaluated: `eval_step(variables, batch)` gives a batch's metrics; batches are cut over `mesh`."""

    task: Task
    metadata: dict[str, Any]
    step: int
    weights: str
    eval_step: Callable
    variables: Any
    mesh: jax.sharding.Mesh


def _configure(config, split, data_dir, data_name, batch_size, one_device):
    """Sets what the evaluation changes in a run's config, and checks it. JAX's devices are chosen here."""
    size = config.eval_batch_size or config.batch_size
    if not one_device:
        sharding.use_cpu_cores(batch_size or size)
    devices = 1 if one_device else jax.device_count()
    config.data.dir = config.data.dir if data_dir is None else data_dir
    config.data.name = config.data.name if data_name is None else data_name
    config.data.eval_split = split or config.data.eval_split
    # What belongs to training alone must not stand in the way here.
    config.mesh.fsdp, config.model.bn_group_size, config.optimizer.accumulation_steps = 1, 0, 1
    config.eval_batch_size = batch_size or -(-size // devices) * devices
    config.batch_size = config.eval_batch_size
    if config.model.attention_impl == "pallas":
        config.model.attention_impl = "auto"
    config_lib.validate(config, devices)


def _open(path, format, step_name, weights):
    """Opens a checkpoint or an export."""
    if format in (None, "weights"):
        mesh = sharding.make_mesh()
        loaded = load(str(path), step_name, weights, mesh)
        variables = loaded.variables["params"], loaded.variables["batch_stats"]
        eval_step = jax.jit(step.make_eval_step(loaded.task, mesh), out_shardings=jax.NamedSharding(mesh, jax.P()))
        return _Subject(loaded.task, loaded.metadata, loaded.step, loaded.weights, eval_step, variables, mesh)
    if jax.process_count() > 1:
        raise ConfigError(f"format {format} runs in one process, and there are {jax.process_count()}; start one")
    about = portable.read_config(path)
    portable.check_holds(path, about, step_name, weights)
    task = tasks.make_task(about.config, about.metadata)
    run, metrics = exporting.open_runner(path, format, task), jax.jit(task.metrics)
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    eval_step = lambda _, batch: metrics(jnp.asarray(run(np.asarray(batch["image"]))), batch)
    return _Subject(task, about.metadata, about.step, about.weights, eval_step, None, mesh)


def _run(subject, config, split, path):
    """Evaluates on the split and returns the evaluator and the number of corrupt images."""
    definition = tasks.find(config)
    with distributed.together("opening the data"):
        names = tuple(subject.metadata.get("class_names", ()))
        source = definition.open_source(config, split, class_names=names, flag=_flag)
        now = definition.metadata(config, source)
        check_classes(subject.metadata, now, f"{path} was trained on", "by --data_dir, --data_name or --split")
    if subject.variables is not None:
        with sharding.use(subject.mesh):
            description = subject.task.describe()
        if jax.process_index() == 0:
            print(f"  {description}", flush=True)
    loader = Inputs(config, subject.task, None, source, flag=_flag).eval_batches()
    with sharding.DeviceBatches(loader, subject.mesh) as batches:
        evaluators = evaluation.evaluate(subject.eval_step, subject.task.evaluator, {"eval": subject.variables}, batches)
        return evaluators["eval"], int(distributed.gather(loader.num_corrupt).sum())


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


def _flag(key):
    return _FLAGS.get(key, "")


def summary(result: dict) -> str:
    """One line for the terminal, from what `evaluate` returns."""
    other = ("split", "step", "ema", "data", "count", "corrupt", "path", "format")
    parts = []
    for key, value in result.items():
        if key in other or key.endswith("_count"):
            continue
        count = f" ({result[f'{key}_count']}/{result['count']})" if f"{key}_count" in result else ""
        parts.append(f"{_LABELS.get(key, key)} {value:.4f}{count}")
    corrupt = f"; {result['corrupt']} corrupt images left out" if result["corrupt"] else ""
    export = f"{result['format']}, " if "format" in result else ""
    return f"{export}{result['split']} of step {result['step']}{' (EMA)' if result['ema'] else ''}: {', '.join(parts)}{corrupt}"


def define_flags() -> None:
    """Defines the flags of the command; not on import, so that several entries can be imported together."""
    flags.DEFINE_string("workdir", None, "Folder of the run, as given to halonet_jax.train.")
    flags.DEFINE_string("model", None, "In place of --workdir: an exported folder, or hf://OWNER/NAME[@REVISION].")
    flags.DEFINE_enum("format", None, list(exporting.FORMATS), "Which export of --model; default: weights, or the first there is.")
    flags.DEFINE_string("out", None, "Folder for the result; default: the workdir, or beside the export.")
    flags.DEFINE_string("split", None, "Split to evaluate; default: the config's data.eval_split.")
    flags.DEFINE_boolean("ema", False, "Evaluate the moving average of the weights rather than the weights.")
    flags.DEFINE_string("step", "latest", "Checkpoint: a step number, 'latest' or 'best'.")
    flags.DEFINE_string("data_dir", None, "Where the data is, if not where it was in training.")
    flags.DEFINE_string("data_name", None, "TFDS data set, if not that of training; its classes must be the same.")
    flags.DEFINE_integer("batch_size", None, "Global batch size; it does not change the result.")


def main() -> int:
    """Runs the command and returns its exit code."""
    f = flags.FLAGS
    result = evaluate(
        f.workdir, f.split, f.ema, f.step, f.data_dir, f.batch_size, f.data_name, f.model, f.format, f.out
    )  # fmt: skip
    print(summary(result))
    print(f"written to {result['path']}")
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
