"""Evaluates a run's checkpoint: exact counts, top-1 and top-5, printed and written as JSON.

python -m halonet_jax.evaluate --workdir=runs/digits [--ema] [--step=best] [--split=test] [--data_dir=…]
"""

import json
import re

import jax
from absl import flags

from halonet_jax import command_line, data, errors, tasks
from halonet_jax import config as config_lib
from halonet_jax.runtime import distributed
from halonet_jax.runtime import workdir as workdir_lib
from halonet_jax.training import checkpoint, sharding, step

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, as given to halonet_jax.train.")
_SPLIT = flags.DEFINE_string("split", None, "Split to evaluate; default: the config's data.eval_split.")
_EMA = flags.DEFINE_boolean("ema", False, "Evaluate the moving average of the weights rather than the weights.")
_STEP = flags.DEFINE_string("step", "latest", "Checkpoint: a step number, 'latest' or 'best'.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the data is, if not where it was in training.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Global batch size; it does not change the result.")


def main() -> int:
    """Entry point."""
    result = evaluate(_WORKDIR.value, _SPLIT.value, _EMA.value, _STEP.value, _DATA_DIR.value, _BATCH_SIZE.value)
    print(
        f"{result['split']} of step {result['step']}{' (EMA)' if result['ema'] else ''}: top-1 {result['top1']:.4f} "
        f"({result['top1_count']}/{result['count']}), top-5 {result['top5']:.4f} ({result['top5_count']}/{result['count']}), "
        f"loss {result['loss']:.4f}" + (f"; {result['corrupt']} corrupt images left out" if result["corrupt"] else "")
    )
    print(f"written to {result['path']}")
    return 0


def evaluate(
    workdir: str,
    split: str | None = None,
    ema: bool = False,
    at: str = "latest",
    data_dir: str | None = None,
    batch_size: int | None = None,
) -> dict:
    """Evaluates one checkpoint on one split and writes `workdir/eval_<split>_<step>[_ema].json`.

    Args:
        at: step of the checkpoint, "latest" or "best".

    Returns:
        What is written: split, step, ema, count, top1 and top5 as fractions and as counts, loss, corrupt, path.

    Raises:
        ConfigError, DataError, CheckpointError: for bad input.
    """
    workdir = workdir_lib.locate(workdir)
    if not (workdir / "config.json").exists():
        raise errors.ConfigError(f"workdir {workdir} holds no config.json; give the --workdir of a training run")
    config = config_lib.from_json((workdir / "config.json").read_text())
    split = split or config.data.eval_split
    config.data.dir = data_dir or config.data.dir
    config.mesh.fsdp = 1  # weights are small beside a training state
    sharding.use_cpu_cores(batch_size or config.eval_batch_size or config.batch_size)
    devices = jax.device_count()
    config.eval_batch_size = batch_size or -(-(config.eval_batch_size or config.batch_size) // devices) * devices
    config.batch_size = config.eval_batch_size
    config.model.bn_group_size, config.optimizer.accumulation_steps = 0, 1  # of training alone
    if config.model.attention_impl == "pallas":
        config.model.attention_impl = "auto"  # here may be another kind of device; parameters are the same
    config_lib.validate(config, devices)

    workdir_lib.use_compile_cache(workdir)
    with distributed.together("opening the data"):
        source = data.open_source(config.data, split)
    mesh = sharding.make_mesh()
    task = tasks.make_task(config, source.num_classes)
    checkpointer = checkpoint.Checkpointer(workdir / "checkpoints", read_only=True)
    abstract = jax.eval_shape(task.init, jax.random.key(0))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, jax.P())), abstract
    )
    at_step, weights = checkpointer.restore_weights(abstract, _step_number(checkpointer, at), ema=ema)
    with sharding.use(mesh):
        description = task.describe()
    if jax.process_index() == 0:
        print(f"  {description}", flush=True)

    eval_step = jax.jit(step.make_eval_step(task, mesh), out_shardings=jax.NamedSharding(mesh, jax.P()))
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    transform = data.ClassificationTransform(config.data, num_classes=source.num_classes, training=False)
    with data.eval_batches(source, transform, config.data, batch_size=config.eval_batch_size, **share) as batches:
        sums = step.evaluate(eval_step, {"eval": weights}, sharding.DeviceBatches(batches, mesh))["eval"]
        corrupt = int(distributed.gather(batches.num_corrupt).sum())
    if not sums["count"]:
        raise errors.DataError(f"no image of split {split!r} could be read, {corrupt} are corrupt; see the warnings above")
    path = workdir / f"eval_{re.sub('[^a-zA-Z0-9_-]+', '_', split)}_{at_step}{'_ema' if ema else ''}.json"
    result = {
        "split": split, "step": at_step, "ema": ema, "count": sums["count"], **step.means(sums), "top1_count": sums["top1"],
        "top5_count": sums["top5"], "corrupt": corrupt, "path": str(path),
    }  # fmt: skip
    if jax.process_index() == 0:
        try:
            path.write_text(json.dumps(result, indent=2))
        except OSError as error:
            raise errors.ConfigError(f"workdir {workdir} cannot be written ({error}); the result is {result}") from None
    return result


def _step_number(checkpointer, at):
    if at == "latest":
        return None
    if at == "best":
        best = checkpointer.best_step()
        if best is None:
            raise errors.CheckpointError(
                f"no checkpoint in {checkpointer.directory} was evaluated in training; use --step=latest"
            )
        return best
    if not at.isdigit():
        raise errors.ConfigError(f"step={at!r} is no checkpoint; use a step number, 'latest' or 'best'")
    return int(at)


if __name__ == "__main__":
    command_line.run(main, required_flags=("workdir",))
