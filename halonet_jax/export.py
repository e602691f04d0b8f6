r"""Exports a trained model: weights with a model card, StableHLO, TensorFlow's SavedModel, ONNX.

    python -m halonet_jax.export --workdir=runs/digits --out=exported --format=weights,stablehlo,savedmodel,onnx \
        [--step=best] [--weights=ema|raw] [--dtype=float32|bfloat16] [--overwrite]

Each format is run back in its own runtime, and compared with the checkpoint, before the folder appears. `--model` takes any
path of `halonet_jax.load` in place of a workdir. In Python, `export(model, out, …)` does the same.
"""

import dataclasses
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from halonet_jax import command_line, exporting, tasks
from halonet_jax.errors import ConfigError
from halonet_jax.exporting import checking
from halonet_jax.runtime import workdir as workdir_lib
from halonet_jax.weights import load, load_config

_DTYPES = tuple(checking.TOLERANCES)


def export(
    model: str,
    out: str | Path,
    formats: Sequence[str] = ("weights",),
    step: int | str = "latest",
    weights: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Writes a model in one or more formats into a new folder.

    Args:
        model: path as of `halonet_jax.load`.
        out: the folder to make. It is local.
        formats: one or more of "weights", "stablehlo", "savedmodel" and "onnx".
        step: of a workdir: a step number, "latest" or "best".
        weights: of a workdir: "raw" or "ema"; None: "ema" where the run kept one.
        dtype: that the exported model computes in, "float32" or "bfloat16"; None: as in training. Weights are float32.
        overwrite: whether to replace an export that is there.
        log: takes one line for each thing done.

    Returns:
        What `export.json` holds: versions, and for each format what was compared and the largest error.

    Raises:
        ConfigError: an argument breaks a rule above, or a package is missing.
        CheckpointError: there is no such checkpoint, or it is damaged.
        ExportError: a format cannot be written, or does not compute what the checkpoint does.
        StorageError: a file cannot be written.
    """
    path, config = load_config(model)
    exporting.formats.check(list(formats), config.task, path)
    exporting.folder.check_out(out, overwrite)
    if dtype not in (*_DTYPES, None):
        raise ConfigError(f"dtype={dtype!r} is unknown; use one of {', '.join(_DTYPES)}")
    if (folder := Path(model) / "checkpoints").is_dir():
        workdir_lib.use_compile_cache(folder.parent.resolve())  # a second export of the run starts in less time
    loaded = load(model, step, weights, checking.cpu_mesh())
    if dtype not in (None, loaded.config.model.dtype):
        config = loaded.config.copy_and_resolve_references()
        config.model.dtype = dtype
        loaded = dataclasses.replace(loaded, config=config, task=tasks.make_task(config, loaded.metadata))
    return exporting.write(loaded, out, formats, overwrite, log)


def define_flags() -> None:
    """Defines the flags of the command; not on import, so that several entries can be imported together."""
    flags.DEFINE_string("workdir", None, "Folder of the run, as given to halonet_jax.train.")
    flags.DEFINE_string("model", None, "In place of --workdir: an exported folder with weights, or hf://OWNER/NAME[@REVISION].")
    flags.DEFINE_string("out", None, "Folder to make.")
    flags.DEFINE_list("format", ["weights"], f"One or more of {','.join(exporting.FORMATS)}.")
    flags.DEFINE_string("step", "latest", "Checkpoint: a step number, 'latest' or 'best'.")
    flags.DEFINE_enum("weights", None, ["raw", "ema"], "Default: the moving average (ema) where the run kept one.")
    flags.DEFINE_enum("dtype", None, _DTYPES, "What the exported model computes in; default: as in training.")
    flags.DEFINE_boolean("overwrite", False, "Replace the export in --out.")


def main() -> int:
    """Runs the command and returns its exit code."""
    f = flags.FLAGS
    if (f.workdir is None) == (f.model is None):
        raise ConfigError("give either --workdir, the folder of a run, or --model, a folder or a name on the hub")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the half-written folder goes
    log = lambda line: print(f"  {line}", flush=True)
    export(f.workdir or f.model, f.out, f.format, f.step, f.weights, f.dtype, f.overwrite, log)
    print(f"written to {Path(f.out).absolute()}")
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main, required_flags=("out",))
