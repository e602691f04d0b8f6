"""Takes image files through a model, in batches that are loaded in the background, as in evaluation."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from halonet_jax import data
from halonet_jax.errors import ConfigError
from halonet_jax.predicting.writers import Layout
from halonet_jax.training import sharding
from halonet_jax.weights import Loaded

_LARGEST_BATCH = 64  # per device: more is no faster, and takes memory
_LONGEST_STEM = 50  # characters: file systems take 255 bytes, a character has up to 4, and the number comes on top


class Kind(Protocol):
    """What a kind of model provides.

    Attributes:
        transform: makes a row of an image's record.
        layout: how results look.
    """

    transform: data.Transform
    layout: Layout

    def outputs(self, params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Computes what `result` needs of a batch; compiled. All arrays have the images first."""
        ...

    def result(self, number: int, name: str, values: dict[str, np.ndarray]) -> Any:
        """Returns what the model says of one image: its number among the files, its path, and its row of `outputs`."""
        ...

    def broken(self, name: str, reason: str) -> Any:
        """Returns what stands for a broken file."""
        ...


def batch_size(loaded: Loaded, count: int, given: int | None) -> int:
    """Returns the number of images per step, a multiple of the number of devices.

    Args:
        loaded: the model.
        count: of the images.
        given: by the user; None: as in the run's evaluation. More than there are images would be padding.
    """
    devices = jax.device_count()
    usual = min(loaded.config.eval_batch_size or loaded.config.batch_size, _LARGEST_BATCH * devices)
    return -(-min(given or usual, count) // devices) * devices


def run(loaded: Loaded, source: data.FileSource, kind: Kind, batch_size: int) -> Iterator[Any]:
    """Yields a result for each image, in order.

    Args:
        loaded: the model.
        source: the images.
        kind: of the model.
        batch_size: images per step.
    """
    mesh = sharding.make_mesh()

    def step(variables, batch):
        with sharding.use(mesh):
            return kind.outputs(variables["params"], variables["batch_stats"], batch)

    step = jax.jit(step, out_shardings=jax.NamedSharding(mesh, jax.P()))
    options = loaded.config.data.copy_and_resolve_references()
    options.on_corrupt = "skip"
    loader = data.eval_batches(source, kind.transform, options, batch_size=batch_size)

    def results(start, mask, outputs):
        mask, outputs = jax.device_get((mask, outputs))
        for row in range(min(batch_size, len(source) - start)):
            name = source.name(start + row)
            if mask[row]:
                yield kind.result(start + row, name, {key: values[row] for key, values in outputs.items()})
            else:
                yield kind.broken(name, loader.corrupt.get(name, "it cannot be read"))

    with sharding.DeviceBatches(loader, mesh) as batches:
        previous = None  # fetched once the next batch is dispatched, so that the device never waits
        for number, batch in enumerate(batches):
            current = number * batch_size, batch["mask"], step(loaded.variables, batch)
            if previous:
                yield from results(*previous)
            previous = current
        if previous:
            yield from results(*previous)


class PictureFolder:
    """A folder for one picture per image, made where it is missing.

    Args:
        path: of the folder.
        flag: that names it, for messages.
        source: the images.

    Raises:
        ConfigError: it cannot be made, or a picture would replace one of the images.
    """

    def __init__(self, path: str, flag: str, source: data.FileSource):
        self._path, self._digits = Path(path), len(str(len(source)))
        names = [source.name(n) for n in range(len(source))]
        images = set(map(os.path.realpath, names))
        for number, name in enumerate(names):
            if os.path.realpath(self.file(number, name)) in images:
                raise ConfigError(f"{flag}={path} would replace the image {self.file(number, name)}; give another folder")
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the folder {path} cannot be made ({error.strerror}); give another --{flag}") from None

    def file(self, number: int, name: str) -> Path:
        """Returns the path of an image's picture. It starts with the image's number, since folders may share names.

        Args:
            number: of the image, from 0.
            name: its path.
        """
        return self._path / f"{number + 1:0{self._digits}d}_{Path(name).stem[:_LONGEST_STEM]}.png"
