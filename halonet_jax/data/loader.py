"""Batches for one process, loaded ahead by Grain. Which rows a batch holds is the law that `rows` states."""

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator

import grain
import numpy as np
from absl import flags, logging

from halonet_jax.data.example import Source, Transform
from halonet_jax.data.rows import EvalExamples, Examples, Row, TrainExamples
from halonet_jax.errors import DataError

ON_CORRUPT = ("skip", "stop")


def train_batches(
    source: Source,
    transform: Transform,
    options,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    flag: Callable[[str], str] = "--config.{}".format,
) -> "Loader":
    """Returns endless shuffled, augmented batches: each of `transform.fields` as an array [local, ...].

    An example that fails is replaced by the next one of the source (with on_corrupt="skip").

    Args:
        source: the examples.
        transform: makes a row of a record; gets a random generator.
        options: the config's `data` block; `on_corrupt`, `num_threads`, `num_workers` and `prefetch` are read.
        batch_size: global; local = batch_size / process_count.
        seed: of order and augmentation, >= 0.
        start_step: step of the first batch, >= 0.
        process_index: number of this process; it gets its rows alone.
        process_count: number of processes that share a batch.
        flag: spells the command-line flag that sets a config key, for remedies; "" where the entry has none.

    Raises:
        DataError: for sizes that do not fit, an empty source, unknown options; later, from `next`: for a corrupt example
            (with on_corrupt="stop"), sixteen corrupt ones in a row, what the transform calls fatal, or a worker process
            that died.
    """
    if seed < 0 or start_step < 0:
        raise DataError(f"seed {seed} and start_step {start_step} must be 0 or more")
    _check(source, options, batch_size, process_index, process_count)
    shape = (batch_size, process_index, process_count, max(options.num_workers, 1))
    examples = TrainExamples(source, transform, *shape, _stop_advice(options, flag), seed=seed, start_step=start_step)
    return Loader(examples, options)


def eval_batches(
    source: Source,
    transform: Transform,
    options,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    flag: Callable[[str], str] = "--config.{}".format,
) -> "Loader":
    """Returns every example once over all processes, in order; `len()` batches, equally many on every process.

    Batches hold each of `transform.fields` as an array [local, ...], and `mask`, bool [local]: False for the zero rows
    that fill the last batch and for examples that fail (with on_corrupt="skip").

    Args:
        source: the examples.
        transform: makes a row of a record; gets None for the random generator.
        options: as for `train_batches`.
        batch_size: global; local = batch_size / process_count.
        process_index: number of this process; it gets its rows alone.
        process_count: number of processes that share a batch.
        flag: as for `train_batches`.

    Raises:
        DataError: as `train_batches` does, except for corrupt examples in a row; also for a field called "mask".
    """
    if "mask" in transform.fields:
        raise DataError("a field of the transform is called 'mask', which evaluation adds itself; rename the field")
    _check(source, options, batch_size, process_index, process_count)
    shape = (batch_size, process_index, process_count, max(options.num_workers, 1))
    return Loader(EvalExamples(source, transform, *shape, _stop_advice(options, flag)), options)


class Loader:
    """An iterator over batches that loads ahead in the background; close it, or use it in a `with` statement.

    Attributes:
        num_corrupt: examples replaced (train) or masked (eval) in the batches handed out so far.
        corrupt: the reason for each of them, by name.
    """

    def __init__(self, examples: Examples, options):
        self.num_corrupt = 0
        self.corrupt: dict[str, str] = {}
        self._examples = examples
        self._num_given = 0
        self._running = [iter(_pipeline(examples, options))]
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
        if batch["fatal"]:
            self.close()
            raise DataError(batch["fatal"])
        self._num_given += 1
        self.num_corrupt += sum(bool(pairs) for pairs in batch["corrupt"])
        for name, reason in (pair for pairs in batch["corrupt"] for pair in pairs):
            if name not in self.corrupt:
                self.corrupt[name] = reason
                logging.warning("Skipped corrupt image %s: %s", name, reason)
        return batch["fields"]

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


def _stack(rows: list[Row]) -> dict:
    return {
        "fields": {name: np.stack([row.fields[name] for row in rows]) for name in rows[0].fields},
        "corrupt": [row.corrupt for row in rows],
        "fatal": next((row.fatal for row in rows if row.fatal), ""),
    }


def _stack_with_mask(rows: list[Row]) -> dict:
    batch = _stack(rows)
    batch["fields"]["mask"] = np.array([row.mask for row in rows], bool)
    return batch


def _own(batch: dict) -> dict:
    """Copies arrays out of the worker's shared memory, so that keeping a batch keeps no block of it."""
    return batch | {"fields": {name: np.array(array) for name, array in batch["fields"].items()}}


def _start_worker(worker: int, workers: int):
    # Ctrl-C, and a scheduler's SIGTERM to all processes, are for the main process, which needs batches to finish its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def end_with_parent():  # which may be killed; Grain's workers would stay for ever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _pipeline(examples: Examples, options) -> grain.IterDataset:
    if not flags.FLAGS.is_parsed():
        # Grain's worker processes read absl flags. Outside absl.app.run nobody parses them: their defaults hold.
        flags.FLAGS.mark_as_parsed()
    workers = examples.num_streams
    reading = grain.ReadOptions(
        num_threads=-(-options.num_threads // workers),
        prefetch_buffer_size=max(options.prefetch * examples.local_size // workers, 1),
    )
    stack = _stack if examples.num_batches is None else _stack_with_mask
    dataset = grain.MapDataset.source(examples).to_iter_dataset(reading).batch(examples.local_size, batch_fn=stack)
    if options.num_workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(options.num_workers), _start_worker).map(_own)
    # One more batch, so that stacking and copying happen beside the caller's work.
    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=1)


def _check(source, options, batch_size, process_index, process_count):
    if not len(source):
        raise DataError("the source holds no example; check data.dir and the split")
    if batch_size < 1 or batch_size % process_count:
        raise DataError(
            f"batch_size {batch_size} must be a positive multiple of the {process_count} processes;"
            f" use {max(batch_size // process_count, 1) * process_count}"
        )
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index {process_index} must lie in [0, {process_count})")
    if options.on_corrupt not in ON_CORRUPT:
        raise DataError(f"data.on_corrupt {options.on_corrupt!r} is unknown; use one of {', '.join(ON_CORRUPT)}")


def _stop_advice(options, flag):
    if options.on_corrupt == "skip":
        return None
    skip = flag("data.on_corrupt")
    return f"replace the file, or go on without it: {skip}=skip" if skip else "replace the file"
