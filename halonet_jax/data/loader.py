"""Batches for one process, loaded ahead by Grain. Which rows a batch holds is the law that `rows` states."""

import weakref
from collections.abc import Callable, Iterator

import numpy as np
from absl import logging

from halonet_jax.data.ahead import Ahead, WorkerDied
from halonet_jax.data.example import Source, Transform
from halonet_jax.data.rows import EvalExamples, Examples, TrainExamples
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
    _check(source, options, batch_size, process_index, process_count, flag)
    shape = (batch_size, process_index, process_count, max(options.num_workers, 1))
    examples = TrainExamples(source, transform, *shape, _stop_advice(options, flag), seed=seed, start_step=start_step)
    return Loader(examples, options, flag)


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
    _check(source, options, batch_size, process_index, process_count, flag)
    shape = (batch_size, process_index, process_count, max(options.num_workers, 1))
    return Loader(EvalExamples(source, transform, *shape, _stop_advice(options, flag)), options, flag)


class Loader:
    """An iterator over batches that loads ahead in the background; close it, or use it in a `with` statement.

    Args:
        examples: this process's rows.
        options: as for `train_batches`.
        flag: as for `train_batches`.

    Attributes:
        num_corrupt: examples replaced (train) or masked (eval) in the batches handed out so far.
        corrupt: the reason for each of them, by name.

    Raises:
        DataError: if data workers are asked for and the folder for temporary files cannot be written.
    """

    def __init__(self, examples: Examples, options, flag: Callable[[str], str] = "--config.{}".format):
        self.num_corrupt = 0
        self.corrupt: dict[str, str] = {}
        self._examples, self._flag = examples, flag
        self._num_given = 0
        self._ahead = Ahead(examples, options)
        # An open loader is closed before the interpreter's exit; Grain's own clean-up comes too late there.
        weakref.finalize(self, self._ahead.close)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __len__(self) -> int:
        if self._examples.num_batches is None:
            raise TypeError("train batches are endless; only eval batches have a length")
        return self._examples.num_batches

    def __next__(self) -> dict[str, np.ndarray]:
        if self._num_given == self._examples.num_batches:
            self.close()
            raise StopIteration
        try:
            batch = self._ahead.next()
        except WorkerDied:
            batch = None
        # Outside of the handler: an error that held on to Grain's iterator would keep its semaphores until after the run.
        if batch is None:
            self.close()
            raise DataError(self._worker_died())
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

    def _worker_died(self):
        settings = [self._flag(key) for key in ("data.num_workers", "data.prefetch") if self._flag(key)]
        smaller = f"use a smaller {' or '.join(settings)}, or more memory" if settings else "free memory and start again"
        return f"a data worker process died, as where memory runs out (see the kernel's log); {smaller}"

    def close(self) -> None:
        """Ends the background threads and processes within seconds; no more batches come. It may be called again.

        A call of `next` that waits in another thread ends with StopIteration. Worker processes that do not end by
        themselves are killed. A thread that hangs in a read cannot be ended: it ends with its read.
        """
        self._ahead.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception):
        self.close()


def _check(source, options, batch_size, process_index, process_count, flag):
    if not len(source):
        setting = flag("data.dir")
        raise DataError(f"the source holds no example; choose another split{f' or {setting}' if setting else ''}")
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
