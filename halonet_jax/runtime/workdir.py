"""The folder of a run: opens it, checks that all hosts share it, and describes the run in it."""

import json
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

_compile_cache = None  # the folder that `use_compile_cache` has set


def locate(workdir: str) -> epath.Path:
    """Returns the full path of a workdir. `~` is the home folder: shells do not expand it in `--workdir=~/run`.

    Args:
        workdir: local, or a URL such as `gs://BUCKET/RUN`.

    Raises:
        ConfigError: the path is empty, or cannot be resolved.
    """
    if not workdir:
        raise ConfigError("workdir is empty; give the folder of the run, such as --workdir=runs/digits")
    if "://" in workdir:
        return epath.Path(workdir)
    try:
        path = Path(workdir).expanduser() if workdir.startswith("~") else Path(workdir)  # "./~" is a folder named "~"
        return epath.Path(path.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # an unknown ~user, a loop of links, a null byte
        raise ConfigError(f"workdir {workdir!r} cannot be resolved ({error}); give another --workdir, such as ./run") from None


def open_workdir(config: ml_collections.ConfigDict, workdir: str) -> epath.Path:
    """Creates the folder of a run if it is missing. Warns of differences from the config of the run that it holds.

    Args:
        config: of this run.
        workdir: as for `locate`. All hosts must share it.

    Returns:
        The full path.

    Raises:
        ConfigError: the folder cannot be written, or is not the same for all hosts.
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
            if jax.process_index() > 0 and not probe.exists():
                raise ConfigError(
                    f"workdir {workdir} of process {jax.process_index()} is not that of process 0; give a folder that all hosts "
                    "share, such as gs://BUCKET/RUN"
                )
    finally:
        if jax.process_index() == 0:
            probe.unlink(missing_ok=True)  # a second run that is about to be refused may have deleted it
    _compare(config, workdir / "config.json")
    return workdir


def _compare(config, path):
    try:
        last = config_lib.from_json(path.read_bytes())
    except FileNotFoundError:
        return
    except (ConfigError, OSError) as error:
        logging.warning("The config cannot be compared with this workdir's last run: %s", error)
        return
    for line in config_lib.differences(last, config):
        logging.warning("The config differs from this workdir's last run: %s", line)


def use_compile_cache(workdir: epath.Path) -> None:
    """Keeps compiled programs in the workdir, so that a restart need not compile again.

    A cache that the user chose, as by JAX_COMPILATION_CACHE_DIR, is left as it is. A second run in the same process gets the
    cache of its own workdir.

    Args:
        workdir: of the run.
    """
    global _compile_cache
    if jax.config.jax_compilation_cache_dir in (None, "", _compile_cache):
        _compile_cache = str(workdir / "compile_cache")
        jax.config.update("jax_compilation_cache_dir", _compile_cache)
        compilation_cache.reset_cache()  # it keeps the folder of its first use


def record_run(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Writes `config.json`, the whole config, and `run.json`, what it ran with.

    Args:
        config: of this run.
        workdir: of the run.

    Raises:
        StorageError: a file cannot be written.
    """
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    about = {
        "python": platform.python_version(),
        "versions": {"halonet_jax": __version__} | {name: metadata.version(name) for name in packages},
        "git_revision": _revision(),
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
                f"{workdir / name} cannot be written ({storage.reason(error)}); {storage.remedy(error)}, then give the command "
                "again"
            ) from None


def _revision():
    root = Path(__file__).parents[2]
    if (root / "REVISION").exists():  # written by scripts/launch/pod.sh, which installs without git's folder
        return (root / "REVISION").read_text().strip()
    git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    return shutil.which("git") and subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
