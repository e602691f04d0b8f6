"""Every row of every batch, as a function of its position alone.

The law: row r of the global batch at step s has position g = s * batch_size + r. Epoch e = g // n is a permutation of
the n examples, drawn from (seed, e); the example at g is that of place g % n, and its augmentation is drawn from
(seed, e, example). Process p of P holds the p-th run of rows. So neither the step a run starts from, nor threads,
worker processes or the number of processes change a batch, and epochs follow one another without a remainder.
"""

import sys
import types
from typing import NamedTuple

import grain
import numpy as np

from halonet_jax.data import images
from halonet_jax.errors import CorruptImage

_REPLACEMENT_TRIES = 16
_SHUFFLE_ROUNDS = 4  # of the permutation's Feistel network; Grain's own choice


class Row(NamedTuple):
    """One example on its way into a batch. Faults travel with it, so that they reach the caller at their batch."""

    image: np.ndarray
    label: int
    mask: bool = True
    corrupt: tuple[tuple[str, str], ...] = ()  # (name, reason) of each image that failed for this row
    fatal: str = ""


class Examples:
    """This process's rows as a random-access sequence, batch after batch.

    Attributes:
        num_batches: None: endless.
    """

    def __init__(self, source, data_config, batch_size, process_index, process_count):
        self.source = source
        # A plain copy: the caller may change its config, and a ConfigDict is slow to read.
        fields = data_config.to_dict() if hasattr(data_config, "to_dict") else vars(data_config)
        self.config = types.SimpleNamespace(**fields)
        self.batch_size = batch_size
        self.local_size = batch_size // process_count
        self.first_row = process_index * self.local_size
        self.num_streams = max(self.config.num_workers, 1)
        self.num_batches: int | None = None

    def __len__(self) -> int:
        if self.num_batches is None:
            return sys.maxsize
        # As many batches for every worker; the loader leaves the surplus unread.
        return -(-self.num_batches // self.num_streams) * self.num_streams * self.local_size

    def __getitem__(self, place: int) -> Row:
        # Grain deals places to W worker processes in turn. Each must build whole batches, so places are numbered in
        # such a way that worker w's own sequence runs through batches w, w + W, ...
        nth, worker = divmod(place, self.num_streams)
        step = nth // self.local_size * self.num_streams + worker
        return self.row(step * self.batch_size + self.first_row + nth % self.local_size)

    def row(self, position: int) -> Row:
        """The row at global position `position`."""
        raise NotImplementedError

    def read(self, index: int) -> Row:
        """Example `index`, decoded; where that fails, a blank row with `corrupt` or `fatal`."""
        try:
            image, label, name = self.source[index]
            image = images.decode(image) if isinstance(image, bytes) else image
        except (CorruptImage, OSError) as e:
            name, reason = self.source.name(index), str(e)
            if self.config.on_corrupt == "skip":
                return self.blank(corrupt=((name, reason),))
            remedy = "replace the file, or go on without it: --config.data.on_corrupt=skip"
            return self.blank(fatal=f"corrupt image {name}: {reason}; {remedy}")
        if not 0 <= label < self.source.num_classes:
            rule = f"labels run from 0 to {self.source.num_classes - 1}"
            return self.blank(fatal=f"{name} has label {label}; {rule}: choose a labelled split")
        return Row(image, label)

    def blank(self, **fields) -> Row:
        """A row of zeros."""
        size = self.config.image_size
        return Row(np.zeros((size, size, 3), np.uint8), 0, False, **fields)


class TrainExamples(Examples):
    """Shuffled and augmented, epoch after epoch; `first_position` is where batch 0 starts."""

    def __init__(self, *args, seed: int, start_step: int):
        super().__init__(*args)
        self.seed = seed
        self.first_position = start_step * self.batch_size

    def row(self, position: int) -> Row:
        n = len(self.source)
        epoch, place = divmod(self.first_position + position, n)
        shuffle_seed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
        index = grain.experimental.index_shuffle(place, n - 1, shuffle_seed, _SHUFFLE_ROUNDS)
        corrupt = ()
        for candidate in range(index, index + _REPLACEMENT_TRIES):
            row = self.read(candidate % n)
            corrupt += row.corrupt
            if row.fatal:
                return row
            if row.mask:
                rng = np.random.default_rng((self.seed, epoch, candidate % n))
                image = images.train_transform(row.image, rng, self.config)
                return row._replace(image=image, corrupt=corrupt)
        name, reason = corrupt[0]
        return self.blank(
            fatal=f"{len(corrupt)} images in a row from {name} on are corrupt (the first: {reason}); check the data set"
        )


class EvalExamples(Examples):
    """In the source's order, then blank rows to the end of the last batch."""

    def __init__(self, *args):
        super().__init__(*args)
        self.num_batches = -(-len(self.source) // self.batch_size)

    def row(self, position: int) -> Row:
        if position >= len(self.source):
            return self.blank()
        row = self.read(position)
        return row._replace(image=images.eval_transform(row.image, self.config)) if row.mask else row
