"""Writes a folder of exports. It appears at once, and only if every export in it computes what the checkpoint does."""

import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from halonet_jax import __version__
from halonet_jax.errors import ConfigError, ExportError, StorageError, UserError
from halonet_jax.exporting import card, checking, formats
from halonet_jax.runtime import storage
from halonet_jax.weights import Loaded, portable

REPORT = "export.json"


def write(
    loaded: Loaded, out: str | Path, names: Sequence[str], overwrite: bool = False, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Writes a model in one or more formats, and runs each of them back.

    Args:
        loaded: the model, on `checking.cpu_mesh`.
        out: the folder to make. It is local.
        names: of the formats.
        overwrite: whether to replace an export that is there.
        log: takes one line for each thing done.

    Returns:
        What `export.json` holds.

    Raises:
        ConfigError: a format is unknown or lacks a package, or `out` cannot be made.
        ExportError: a format does not serve the task, cannot be written, or does not compute what the checkpoint does.
        StorageError: a file cannot be written.
    """
    interface = formats.check(list(names), loaded.config.task, loaded.folder)
    out = check_out(out, overwrite)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        with jax.default_device(checking.cpu_mesh().devices.flat[0]):
            report = _fill(epath.Path(partial), loaded, interface, names, out.name, log)
        _put_in_place(partial, out)
    except OSError as error:
        raise StorageError(f"{out} cannot be written ({storage.reason(error)}); {storage.remedy(error)}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def check_out(out: str | Path, overwrite: bool) -> Path:
    """Returns the full path of a folder that may be written.

    Args:
        out: as of `write`.
        overwrite: as of `write`.

    Raises:
        ConfigError: it is not local, it exists, or it is no export that could be replaced.
    """
    if "://" in str(out):
        raise ConfigError(f"--out={out} is not local; give a local folder, and copy it there when it is done")
    path = Path(os.path.abspath(out))
    if not os.path.lexists(path):
        return path
    if path.is_symlink() or not (path / REPORT).is_file():
        raise ConfigError(f"--out={out} is no export, and --overwrite replaces exports alone; give another folder")
    if not overwrite:
        raise ConfigError(f"--out={out} exists; give another folder, or add --overwrite to replace it")
    return path


def _fill(folder, loaded, interface, names, title, log):
    begin = time.monotonic()
    inputs = interface.samples(*loaded.image_shape)
    expected = checking.expected_outputs(loaded, interface, inputs)
    log(f"checkpoint: {', '.join(interface.outputs)} of {len(inputs[0])} images in {time.monotonic() - begin:.1f} s")
    about = portable.Portable(loaded.config, loaded.metadata, loaded.step, loaded.weights, loaded.figures)
    portable.write_config(folder, about)
    share, checks = checking.tolerance(loaded), {}
    for number, name in enumerate(names, 1):
        format, begin = formats.FORMATS[name], time.monotonic()
        log(f"[{number}/{len(names)}] {name}: writing")
        try:
            format.write(folder, loaded, interface)
        except (UserError, OSError):
            raise
        except Exception as error:  # converters raise types of their own
            reason = " ".join(str(error).split())[:300]
            raise ExportError(
                f"{name}: the model cannot be converted ({type(error).__name__}: {reason}); leave {name} out of --format"
            ) from error
        size = sum(_size(folder / file) for file in format.FILES)
        log(f"[{number}/{len(names)}] {name}: {size / 1e6:.1f} MB in {time.monotonic() - begin:.1f} s; running it back")
        checks[name] = []
        for artefact, run in format.runners(folder, loaded.task, interface):
            found = checking.compare(artefact, run, inputs, expected, interface, loaded.task, 0.0 if format.EXACT else share)
            checks[name].append({key: value for key, value in found._asdict().items() if value is not None})
            log(f"[{number}/{len(names)}] {name}: {found}")
    report = {
        "halonet_jax": __version__, "step": loaded.step, "weights": loaded.weights, "dtype": loaded.config.model.dtype,
        "versions": _versions(names), "checks": checks,
    }  # fmt: skip
    (folder / REPORT).write_text(json.dumps(report, indent=2))
    (folder / card.FILE).write_text(card.make(loaded, names, title))
    return report


def _size(path):
    return sum(map(_size, path.iterdir())) if path.is_dir() else path.stat().length


def _versions(names):
    packages = ["jax", "jaxlib", "flax", *(package for name in names for package in formats.FORMATS[name].PACKAGES)]
    distributions = importlib.metadata.packages_distributions()
    return {name: importlib.metadata.version(distributions.get(name, [name])[0]) for name in packages}


def _put_in_place(partial, out):
    """Renames. An export that is there moves aside first, and back if that fails."""
    if not os.path.lexists(out):
        partial.rename(out)
        return
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
