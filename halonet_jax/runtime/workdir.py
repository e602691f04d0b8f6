"""The folder of a run: opened, checked to be shared by all hosts, and described."""

import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import jax
import ml_collections
from absl import logging
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from halonet_jax import __version__
from halonet_jax import config as config_lib
from halonet_jax.errors import ConfigError, StorageError
from halonet_jax.runtime import distributed, storage

_compile_cache = None  # the folder that `use_compile_cache` chose


def locate(workdir: str) -> epath.Path:
    """Returns the path of a workdir: absolute where it is local, with `~` and `~user` expanded.

    Args:
        workdir: local or `gs://`, as a user gives it.

    Raises:
        ConfigError: it is empty, its `~user` has no home folder, or it holds a character that TensorStore cannot write below.
    """
    if not workdir:
        raise ConfigError("workdir is empty; give --workdir=FOLDER")
    try:
        path = epath.Path(workdir if "://" in workdir else Path(workdir).expanduser().resolve())
        str(path).encode()
    except (RuntimeError, ValueError) as error:  # of expanduser; links in a circle; no UTF-8
        raise ConfigError(f"workdir {workdir!r} leads nowhere ({storage.reason(error)}); give another --workdir") from None
    if "\\" in str(path):
        raise ConfigError(f"workdir {path} has a backslash, below which no checkpoint can be written; give another --workdir")
    return path


def open_workdir(config: ml_collections.ConfigDict, workdir: str) -> epath.Path:
    """Creates the folder where it is missing, and warns of differences between the config and that of its last run.

    Args:
        config: of the run that starts.
        workdir: local or `gs://`, as a user gives it.

    Returns:
        The path, see `locate`.

    Raises:
        ConfigError: the folder cannot be written, or is not the same one on all hosts.
        DistributedError: another process raised such an error.
    """
    workdir = locate(workdir)
    probe = workdir / ".writable"
    with distributed.together("opening the workdir"):
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                probe.write_text("")
        except OSError as error:
            raise ConfigError(
                f"workdir {workdir} cannot be written ({storage.reason(error)}); {storage.remedy(error)}, or give another --workdir"
            ) from None
    try:
        with distributed.together("opening the workdir"):
            if not probe.exists():
                raise ConfigError(
                    f"workdir {workdir} of process {jax.process_index()} is not that of process 0; give a folder that all hosts "
                    "share, such as gs://BUCKET/RUN"
                )
    finally:
        if jax.process_index() == 0:
            probe.unlink(missing_ok=True)
    _warn_of_differences(config, workdir / "config.json")
    return workdir


def _warn_of_differences(config, path):
    try:
        last = config_lib.from_json(path.read_bytes())
    except FileNotFoundError:
        return
    except (ConfigError, OSError) as error:
        logging.warning("The config cannot be compared with this workdir's last run: %s", storage.reason(error))
    else:
        for line in config_lib.differences(last, config):
            logging.warning("The config differs from this workdir's last run: %s", line)


def use_compile_cache(workdir: epath.Path) -> None:
    """Keeps compiled programs in the workdir, so that a restart need not compile again.

    A folder that the user gave to JAX, as by JAX_COMPILATION_CACHE_DIR, goes first.

    Args:
        workdir: of the run that starts. A later call for another workdir moves the cache there.
    """
    global _compile_cache
    if jax.config.jax_compilation_cache_dir in (None, "", _compile_cache):
        _compile_cache = str(workdir / "compile_cache")
        jax.config.update("jax_compilation_cache_dir", _compile_cache)
        compilation_cache.reset_cache()  # else JAX goes on with the folder that it used first


def record_run(config: ml_collections.ConfigDict, workdir: epath.Path, last_step: int) -> None:
    """Writes the config, the last step, and the versions and devices that it runs with.

    Args:
        config: of the run.
        workdir: its folder.
        last_step: at which the run will end.

    Raises:
        StorageError: a file cannot be written.
    """
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    about = {
        "python": platform.python_version(),
        "versions": {"halonet_jax": __version__} | {name: metadata.version(name) for name in packages},
        "git_revision": _revision(),
        "last_step": last_step,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
    }
    for name, text in (("config.json", config_lib.to_json(config)), ("run.json", json.dumps(about, indent=2))):
        temporary = workdir / f"{name}.tmp"  # a kill then leaves the old file or the new one
        try:
            temporary.write_text(text)
            temporary.replace(workdir / name)
        except OSError as error:
            raise StorageError(
                f"{workdir / name} cannot be written ({storage.reason(error)}); {storage.remedy(error)}, then "
                "give the command again"
            ) from None


def _revision():
    root = Path(__file__).parents[2]
    if (root / "REVISION").exists():  # written by scripts/launch/pod.sh, which installs without git's folder
        return (root / "REVISION").read_text().strip()
    git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    return shutil.which("git") and subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
