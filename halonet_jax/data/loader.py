"""Batches for one process, loaded ahead by Grain; every batch is a function of its step alone.

The law: row r of the global batch at step s has position g = s * batch_size + r. Epoch e = g // n is a permutation of
the n examples, drawn from (seed, e); the example at g is that of place g % n, and its augmentation is drawn from
(seed, e, example). Process p of P holds the p-th run of rows. So neither the step a run starts from, nor threads,
worker processes or the number of processes change a batch, and epochs follow one another without a remainder.
"""

import sys
import types
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np
from absl import flags, logging

from halonet_jax.data import randaugment, transforms
from halonet_jax.data.errors import CorruptImage, DataError
from halonet_jax.data.sources import Source

ON_CORRUPT = ("skip", "stop")
_REPLACEMENT_TRIES = 16
_SHUFFLE_ROUNDS = 4  # of the permutation's Feistel network; Grain's own choice


def train_batches(
    source: Source,
    data_config,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> "Loader":
    """Endless shuffled, augmented batches: `image` uint8 [local, H, W, 3] and `label` int32 [local].

    An image that cannot be read or decoded is replaced by the next of the source (with on_corrupt="skip").

    Args:
        source: the examples.
        data_config: the config's `data` block.
        batch_size: global; local = batch_size / process_count.
        seed: of order and augmentation, >= 0.
        start_step: step of the first batch.
        process_index: which rows: those of this process.
        process_count: over how many processes a batch is spread.

    Raises:
        DataError: for sizes that do not fit, an empty source, unknown names; later, from `next`: for a corrupt image
            (with on_corrupt="stop"), sixteen corrupt ones in a row, or a label out of range.
    """
    if seed < 0 or start_step < 0:
        raise DataError(f"seed {seed} and start_step {start_step} must be 0 or more")
    _check(source, data_config, batch_size, process_index, process_count)
    examples = _TrainExamples(source, data_config, batch_size, process_index, process_count)
    examples.seed, examples.start_step = seed, start_step
    return Loader(examples)


def eval_batches(
    source: Source,
    data_config,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> "Loader":
    """Every example once over all processes, in order; `len()` batches, equally many on every process.

    Batches are as `train_batches` has them plus `mask`, bool [local]: False for the zero rows that fill the last batch
    and for images that cannot be read or decoded (with on_corrupt="skip").

    Args and raises: as `train_batches`.
    """
    _check(source, data_config, batch_size, process_index, process_count)
    return Loader(_EvalExamples(source, data_config, batch_size, process_index, process_count))


class Loader:
    """An iterator over batches that loads ahead in the background; close it, or use it in a `with` statement.

    Attributes:
        num_corrupt: examples replaced (train) or masked (eval) in the batches handed out so far.
    """

    def __init__(self, examples: "_Examples"):
        self.num_corrupt = 0
        self._named = set()
        self._examples = examples
        self._num_given = 0
        self._iterator = iter(_pipeline(examples))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __len__(self) -> int:
        if self._examples.num_batches is None:
            raise TypeError("train batches are endless; only eval batches have a length")
        return self._examples.num_batches

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None or self._num_given == self._examples.num_batches:
            self.close()
            raise StopIteration
        batch = next(self._iterator)
        fatal, corrupt = batch.pop("fatal"), batch.pop("corrupt")
        if fatal:
            self.close()
            raise DataError(fatal)
        self._num_given += 1
        self.num_corrupt += sum(bool(c) for c in corrupt)
        for name, reason in (pair for pairs in corrupt for pair in pairs):
            if name not in self._named:
                self._named.add(name)
                logging.warning("Skipped corrupt image %s: %s", name, reason)
        return batch

    def close(self):
        """Ends the background threads and processes; no more batches come."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception):
        self.close()


class _Row(NamedTuple):
    """One example on its way into a batch. Faults travel with it, so that they reach the caller at their batch."""

    image: np.ndarray
    label: int
    mask: bool = True
    corrupt: tuple[tuple[str, str], ...] = ()  # (name, reason) of each image that failed for this row
    fatal: str = ""


class _Examples:
    """This process's rows as a random-access sequence, batch after batch."""

    num_batches: int | None = None  # None: endless

    def __init__(self, source, data_config, batch_size, process_index, process_count):
        self.source = source
        # A plain copy: the caller may change its config, and a ConfigDict is slow to read.
        fields = data_config.to_dict() if hasattr(data_config, "to_dict") else vars(data_config)
        self.config = types.SimpleNamespace(**fields)
        self.batch_size = batch_size
        self.local_size = batch_size // process_count
        self.first_row = process_index * self.local_size
        self.num_workers = self.config.num_workers

    def __len__(self) -> int:
        if self.num_batches is None:
            return sys.maxsize
        # The same number for every worker; the Loader leaves the surplus unread.
        return -(-self.num_batches // max(self.num_workers, 1)) * max(self.num_workers, 1) * self.local_size

    def __getitem__(self, place: int) -> _Row:
        # Grain deals places to worker processes in turn. Each must build whole batches, so places are numbered in
        # such a way that worker w's own sequence runs through batches w, w + W, ...
        workers = max(self.num_workers, 1)
        nth, worker = divmod(place, workers)
        step = nth // self.local_size * workers + worker
        return self.row(step * self.batch_size + self.first_row + nth % self.local_size)

    def row(self, position: int) -> _Row:
        """The row at global position `position`."""
        raise NotImplementedError

    def blank(self, **fields) -> _Row:
        size = self.config.image_size
        return _Row(np.zeros((size, size, 3), np.uint8), 0, False, **fields)

    def read(self, index: int, transform) -> _Row:
        """Reads, decodes and transforms example `index`; a row with `corrupt` or `fatal` where that fails."""
        try:
            example = self.source[index]
            image = example.image
            image = transforms.decode(image) if isinstance(image, bytes) else image
        except (CorruptImage, OSError) as e:
            name, reason = self.source.name(index), str(e)
            if self.config.on_corrupt == "skip":
                return self.blank(corrupt=((name, reason),))
            remedy = "replace the file, or go on without it: --config.data.on_corrupt=skip"
            return self.blank(fatal=f"corrupt image {name}: {reason}; {remedy}")
        if not 0 <= example.label < self.source.num_classes:
            rule = f"labels run from 0 to {self.source.num_classes - 1}"
            return self.blank(fatal=f"{example.name} has label {example.label}; {rule}: choose a labelled split")
        return _Row(transform(image), example.label)


class _TrainExamples(_Examples):
    seed: int
    start_step: int

    def row(self, position: int) -> _Row:
        n = len(self.source)
        epoch, place = divmod(position + self.start_step * self.batch_size, n)
        shuffle_seed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
        index = grain.experimental.index_shuffle(place, n - 1, shuffle_seed, _SHUFFLE_ROUNDS)
        corrupt = ()
        for candidate in ((index + i) % n for i in range(_REPLACEMENT_TRIES)):
            rng = np.random.default_rng((self.seed, epoch, candidate))
            row = self.read(candidate, lambda image: transforms.train_transform(image, rng, self.config))  # noqa: B023
            if not row.corrupt:
                return row._replace(corrupt=corrupt)
            corrupt += row.corrupt
        name, reason = corrupt[0]
        return self.blank(
            fatal=f"{len(corrupt)} images in a row from {name} on are corrupt (the first: {reason}); check the data set"
        )


class _EvalExamples(_Examples):
    def __init__(self, source, data_config, batch_size, process_index, process_count):
        super().__init__(source, data_config, batch_size, process_index, process_count)
        self.num_batches = -(-len(source) // batch_size)

    def row(self, position: int) -> _Row:
        if position >= len(self.source):
            return self.blank()
        return self.read(position, lambda image: transforms.eval_transform(image, self.config))


def _train_batch(rows: list[_Row]) -> dict:
    return {
        "image": np.stack([row.image for row in rows]),
        "label": np.array([row.label for row in rows], np.int32),
        "corrupt": [row.corrupt for row in rows],
        "fatal": next((row.fatal for row in rows if row.fatal), ""),
    }


def _eval_batch(rows: list[_Row]) -> dict:
    return _train_batch(rows) | {"mask": np.array([row.mask for row in rows], bool)}


def _own(batch: dict) -> dict:
    """Copies arrays out of the worker's shared memory, so that keeping a batch keeps no block of it."""
    return {k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}


def _pipeline(examples: _Examples) -> grain.IterDataset:
    if not flags.FLAGS.is_parsed():
        # Grain reads its options from absl flags. Outside absl.app.run nobody parses them: their defaults hold.
        flags.FLAGS.mark_as_parsed()
    c, workers = examples.config, max(examples.num_workers, 1)
    options = grain.ReadOptions(
        num_threads=-(-c.num_threads // workers),
        prefetch_buffer_size=max(c.prefetch * examples.local_size // workers, 1),
    )
    batch = _train_batch if examples.num_batches is None else _eval_batch
    dataset = grain.MapDataset.source(examples).to_iter_dataset(options).batch(examples.local_size, batch_fn=batch)
    if examples.num_workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(examples.num_workers)).map(_own)
    # One more batch, so that stacking and copying happen beside the caller's work.
    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=1)


def _check(source, data_config, batch_size, process_index, process_count):
    if not len(source):
        raise DataError("the source holds no example; check data.dir and the split")
    if batch_size < 1 or batch_size % process_count:
        raise DataError(
            f"batch_size {batch_size} must be a positive multiple of the {process_count} processes;"
            f" use {max(batch_size // process_count, 1) * process_count}"
        )
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index {process_index} must lie in [0, {process_count})")
    if data_config.on_corrupt not in ON_CORRUPT:
        raise DataError(f"data.on_corrupt {data_config.on_corrupt!r} is unknown; use one of {', '.join(ON_CORRUPT)}")
    randaugment.check_ops(data_config.randaugment_ops)
