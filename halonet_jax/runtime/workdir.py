"""The folder of a run: opened, checked to be shared by all hosts, and described."""

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

from halonet_jax import __version__
from halonet_jax import config as config_lib
from halonet_jax.errors import ConfigError, StorageError
from halonet_jax.runtime import distributed


def locate(workdir: str) -> epath.Path:
    """The path as Orbax wants it: absolute where it is local."""
    return epath.Path(workdir if "://" in workdir else Path(workdir).resolve())


def open_workdir(config: ml_collections.ConfigDict, workdir: str) -> epath.Path:
    """Makes the folder where it is missing; names what in the config differs from the run that it holds.

    Raises:
        ConfigError: where it cannot be written, or is not one and the same folder for all hosts.
    """
    workdir = locate(workdir)
    probe = workdir / ".writable"
    with distributed.together("opening the workdir"):
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                probe.write_text("")
        except OSError as error:
            raise ConfigError(f"workdir {workdir} cannot be written ({error}); give another --workdir") from None
    try:
        with distributed.together("opening the workdir"):
            if not probe.exists():
                raise ConfigError(
                    f"workdir {workdir} of process {jax.process_index()} is not that of process 0; give a folder that all hosts "
                    "share, such as gs://BUCKET/RUN"
                )
    finally:
        if jax.process_index() == 0:
            probe.unlink()
    if (workdir / "config.json").exists():
        try:
            last = config_lib.from_json((workdir / "config.json").read_text())
        except ConfigError as error:
            logging.warning("The config cannot be compared with this workdir's last run: %s", error)
        else:
            for line in config_lib.differences(last, config):
                logging.warning("The config differs from this workdir's last run: %s", line)
    return workdir


def use_compile_cache(workdir: epath.Path) -> None:
    """Keeps compiled programs in the workdir, so that a restart need not compile again; JAX_COMPILATION_CACHE_DIR goes first."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compile_cache"))


def record_run(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Writes the resolved config, and what it ran with; raises StorageError where it cannot."""
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
                f"{workdir / name} cannot be written ({error}); make room, then give the command again"
            ) from None


def _revision():
    root = Path(__file__).parents[2]
    if (root / "REVISION").exists():  # written by scripts/launch/pod.sh, which installs without git's folder
        return (root / "REVISION").read_text().strip()
    git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    return shutil.which("git") and subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
