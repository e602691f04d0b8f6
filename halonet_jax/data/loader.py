"""Batches for one process, loaded ahead by Grain. Which rows a batch holds is the law that `rows` states."""

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags, logging

from halonet_jax.data import randaugment
from halonet_jax.data.example import Source
from halonet_jax.data.rows import EvalExamples, Examples, Row, TrainExamples
from halonet_jax.errors import DataError

ON_CORRUPT = ("skip", "stop")


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
            (with on_corrupt="stop"), sixteen corrupt ones in a row, a label out of range, or a worker process that died.
    """
    if seed < 0 or start_step < 0:
        raise DataError(f"seed {seed} and start_step {start_step} must be 0 or more")
    _check(source, data_config, batch_size, process_index, process_count)
    shape = (batch_size, process_index, process_count)
    return Loader(TrainExamples(source, data_config, *shape, seed=seed, start_step=start_step))


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
    return Loader(EvalExamples(source, data_config, batch_size, process_index, process_count))


class Loader:
    """An iterator over batches that loads ahead in the background; close it, or use it in a `with` statement.

    Attributes:
        num_corrupt: examples replaced (train) or masked (eval) in the batches handed out so far.
    """

    def __init__(self, examples: Examples):
        self.num_corrupt = 0
        self._named = set()
        self._examples = examples
        self._num_given = 0
        self._running = [iter(_pipeline(examples))]
        # An open loader is closed before the interpreter's exit; Grain's own clean-up comes too late there.
        weakref.finalize(self, _end, self._running)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __len__(self) -> int:
        if self._examples.num_batches is None:
            raise TypeError("train batches are endless; only eval batches have a length")
        return self._examples.num_batches

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._running or self._num_given == self._examples.num_batches:
            self.close()
            raise StopIteration
        batch = self._next()
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

    def _next(self):
        try:
            return next(self._running[0])
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):  # Grain's words
                raise
        # Outside of the handler: an error that held on to Grain's iterator would keep its semaphores until after the run.
        self.close()
        raise DataError(
            "a data worker process died, as where memory runs out (see the kernel's log); use a smaller data.num_workers or "
            "data.prefetch, or more memory"
        )

    def close(self):
        """Ends the background threads and processes; no more batches come."""
        _end(self._running)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception):
        self.close()


def _end(running: list[grain.DatasetIterator]):
    while running:
        running.pop().close()


def _train_batch(rows: list[Row]) -> dict:
    return {
        "image": np.stack([row.image for row in rows]),
        "label": np.array([row.label for row in rows], np.int32),
        "corrupt": [row.corrupt for row in rows],
        "fatal": next((row.fatal for row in rows if row.fatal), ""),
    }


def _eval_batch(rows: list[Row]) -> dict:
    return _train_batch(rows) | {"mask": np.array([row.mask for row in rows], bool)}


def _own(batch: dict) -> dict:
    """Copies arrays out of the worker's shared memory, so that keeping a batch keeps no block of it."""
    return {k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}


def _start_worker(worker: int, workers: int):
    # Ctrl-C, and a scheduler's SIGTERM to all processes, are for the main process, which needs batches to finish its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def end_with_parent():  # which may be killed; Grain's workers would stay for ever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _pipeline(examples: Examples) -> grain.IterDataset:
    if not flags.FLAGS.is_parsed():
        # Grain's worker processes read absl flags. Outside absl.app.run nobody parses them: their defaults hold.
        flags.FLAGS.mark_as_parsed()
    c, workers = examples.config, examples.num_streams
    options = grain.ReadOptions(
        num_threads=-(-c.num_threads // workers),
        prefetch_buffer_size=max(c.prefetch * examples.local_size // workers, 1),
    )
    batch = _train_batch if examples.num_batches is None else _eval_batch
    dataset = grain.MapDataset.source(examples).to_iter_dataset(options).batch(examples.local_size, batch_fn=batch)
    if c.num_workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(c.num_workers), _start_worker).map(_own)
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
