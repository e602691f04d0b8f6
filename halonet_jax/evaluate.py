"""Evaluates a run's checkpoint: exact counts, printed and written as JSON.

    python -m halonet_jax.evaluate --workdir=runs/digits [--ema] [--step=best] [--split=test] [--data_dir=…] [--data_name=…]

In Python, `evaluate(workdir, …)` does the same and returns the result.
"""

import json
import re
import zlib

import jax
from absl import flags

from halonet_jax import command_line, tasks
from halonet_jax import config as config_lib
from halonet_jax.errors import ConfigError, DataError
from halonet_jax.runtime import distributed
from halonet_jax.runtime import workdir as workdir_lib
from halonet_jax.tasks.inputs import Inputs
from halonet_jax.training import evaluation, sharding, step
from halonet_jax.training.progress import check_classes
from halonet_jax.weights import load, load_config

# How this entry spells what training sets by --config. Remedies name no other setting.
_FLAGS = {"data.dir": "--data_dir", "data.eval_split": "--split", "data.name": "--data_name"}
_LABELS = {"top1": "top-1", "top5": "top-5"}


def evaluate(
    workdir: str,
    split: str | None = None,
    ema: bool = False,
    at: int | str = "latest",
    data_dir: str | None = None,
    batch_size: int | None = None,
    data_name: str | None = None,
) -> dict:
    """Evaluates one checkpoint on one split and writes `workdir/eval_<split>_<step>[_ema].json`.

    Other data than that of the run's config get a file of their own, whose name ends in a checksum of what was given.

    Args:
        workdir: folder of a training run.
        split: None: the config's `data.eval_split`.
        ema: whether to evaluate the moving average of the weights rather than the weights.
        at: step of the checkpoint, "latest" or "best".
        data_dir: where the data is; None: where it was in training.
        batch_size: global; it does not change the result. None: as in training.
        data_name: of the TFDS data set; None: that of training.

    Returns:
        What is written: split, step, ema, the data's source, name and dir, count, corrupt, path, and each metric of the task,
        with `<metric>_count` where it is a share of the examples.

    Raises:
        ConfigError, DataError, CheckpointError: for bad input. A data set with other classes than the checkpoint's is one.
    """
    path, config = load_config(workdir)
    sharding.use_cpu_cores(batch_size or config.eval_batch_size or config.batch_size)
    devices = jax.device_count()
    size = config.eval_batch_size or config.batch_size
    own = dict(config.data)
    config.data.dir = config.data.dir if data_dir is None else data_dir
    config.data.name = config.data.name if data_name is None else data_name
    split = config.data.eval_split = split or config.data.eval_split
    # What belongs to training alone must not stand in the way here.
    config.mesh.fsdp, config.model.bn_group_size, config.optimizer.accumulation_steps = 1, 0, 1
    config.eval_batch_size = batch_size or -(-size // devices) * devices
    config.batch_size = config.eval_batch_size
    if config.model.attention_impl == "pallas":
        config.model.attention_impl = "auto"
    config_lib.validate(config, devices)

    workdir_lib.use_compile_cache(path)
    mesh = sharding.make_mesh()
    loaded = load(str(path), at, "ema" if ema else "raw", mesh)
    task, definition = loaded.task, tasks.find(config)
    with distributed.together("opening the data"):
        source = definition.open_source(config, split, class_names=tuple(loaded.metadata.get("class_names", ())), flag=_flag)
        now = definition.metadata(config, source)
        check_classes(loaded.metadata, now, f"{path} was trained on", "by --data_dir, --data_name or --split")
    with sharding.use(mesh):
        description = task.describe()
    if jax.process_index() == 0:
        print(f"  {description}", flush=True)

    eval_step = jax.jit(step.make_eval_step(task, mesh), out_shardings=jax.NamedSharding(mesh, jax.P()))
    weights = {"eval": (loaded.variables["params"], loaded.variables["batch_stats"])}
    loader = Inputs(config, task, None, source, flag=_flag).eval_batches()
    with sharding.DeviceBatches(loader, mesh) as batches:
        evaluator = evaluation.evaluate(eval_step, task.evaluator, weights, batches)["eval"]
        corrupt = int(distributed.gather(loader.num_corrupt).sum())
    found = evaluator.result()
    if not found["count"]:
        raise DataError(f"no image of split {split!r} could be read, {corrupt} are corrupt; see the warnings above")

    about_data = {"source": config.data.source, "name": config.data.name, "dir": config.data.dir}
    other = "" if about_data == {key: own[key] for key in about_data} else f"_{zlib.crc32(json.dumps(about_data).encode()):08x}"
    name = f"eval_{re.sub('[^a-zA-Z0-9_-]+', '_', split)}_{loaded.step}{'_ema' if ema else ''}{other}.json"
    counts = {f"{key}_count": n for key, n in getattr(evaluator, "totals", {}).items() if isinstance(n, int) and key != "count"}
    result = {
        "split": split, "step": loaded.step, "ema": ema, "data": about_data, **found, **counts, "corrupt": corrupt,
        "path": str(path / name),
    }  # fmt: skip
    if jax.process_index() == 0:
        try:
            (path / name).write_text(json.dumps(result, indent=2))
        except OSError as error:
            raise ConfigError(f"workdir {path} cannot be written ({error}); the result is {result}") from None
    return result


def _flag(key):
    return _FLAGS.get(key, "")


def summary(result: dict) -> str:
    """One line for the terminal, from what `evaluate` returns."""
    other = ("split", "step", "ema", "data", "count", "corrupt", "path")
    parts = []
    for key, value in result.items():
        if key in other or key.endswith("_count"):
            continue
        count = f" ({result[f'{key}_count']}/{result['count']})" if f"{key}_count" in result else ""
        parts.append(f"{_LABELS.get(key, key)} {value:.4f}{count}")
    corrupt = f"; {result['corrupt']} corrupt images left out" if result["corrupt"] else ""
    return f"{result['split']} of step {result['step']}{' (EMA)' if result['ema'] else ''}: {', '.join(parts)}{corrupt}"


def define_flags() -> None:
    """Defines the flags of the command; not on import, so that several entries can be imported together."""
    flags.DEFINE_string("workdir", None, "Folder of the run, as given to halonet_jax.train.")
    flags.DEFINE_string("split", None, "Split to evaluate; default: the config's data.eval_split.")
    flags.DEFINE_boolean("ema", False, "Evaluate the moving average of the weights rather than the weights.")
    flags.DEFINE_string("step", "latest", "Checkpoint: a step number, 'latest' or 'best'.")
    flags.DEFINE_string("data_dir", None, "Where the data is, if not where it was in training.")
    flags.DEFINE_string("data_name", None, "TFDS data set, if not that of training; its classes must be the same.")
    flags.DEFINE_integer("batch_size", None, "Global batch size; it does not change the result.")


def main() -> int:
    """Runs the command and returns its exit code."""
    f = flags.FLAGS
    result = evaluate(f.workdir, f.split, f.ema, f.step, f.data_dir, f.batch_size, f.data_name)
    print(summary(result))
    print(f"written to {result['path']}")
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main, required_flags=("workdir",))
