"""Models on the Hugging Face hub, named `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`."""

import re

from etils import epath

from halonet_jax.errors import CheckpointError, ConfigError

PREFIX = "hf://"
WEIGHTS = ("config.json", "*.safetensors")  # the files that `halonet_jax.load` reads
_REMEDY = "give hf://OWNER/NAME or hf://OWNER/NAME@REVISION"


def is_hub_name(path: str) -> bool:
    """Returns whether a path names a model on the hub.

    Args:
        path: as `halonet_jax.load` takes it.
    """
    return path.startswith(PREFIX)


def parse(path: str) -> tuple[str, str | None]:
    """Returns "OWNER/NAME" and the revision, None for the newest.

    Args:
        path: starts with "hf://".

    Raises:
        ConfigError: the rest is no name.
    """
    name, at, revision = path.removeprefix(PREFIX).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name or (at and not re.fullmatch(r"[\w./-]+", revision)):
        raise ConfigError(f"{path!r} is no name on the hub; {_REMEDY}")
    return name, revision or None


def download(path: str, patterns: tuple[str, ...] = WEIGHTS) -> epath.Path:
    """Downloads the files of a model, or finds them in the hub's cache, and returns their folder.

    Args:
        path: starts with "hf://".
        patterns: of the files that are wanted.

    Raises:
        ConfigError: the name is none, or `huggingface_hub` is not installed.
        CheckpointError: the model cannot be downloaded.
    """
    name, revision = parse(path)
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ConfigError(f"{path} needs the package huggingface_hub; pip install -e '.[hub]'") from None
    try:
        return epath.Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # of many types: no network, no such model, no permission
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} cannot be downloaded ({reason}); see that the name is right and the network works") from None
