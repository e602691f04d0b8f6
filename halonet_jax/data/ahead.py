"""Batches that are loaded ahead by Grain's threads or worker processes, and a thread that hands them over."""

import contextlib
import queue
import threading
import time

import grain
import numpy as np
from absl import flags

from halonet_jax.data.rows import Examples, Row
from halonet_jax.data.workers import Workers


class WorkerDied(Exception):
    """A worker process ended by itself."""


class Ahead:
    """Loads batches ahead, from the first call of `next` to `close`.

    Args:
        examples: this process's rows.
        options: as for `halonet_jax.data.train_batches`.
    """

    _POLL = 0.5  # seconds between looks at whether the loader was closed or a worker has gone
    _GONE = 5.0  # seconds without a batch after which a worker that is gone counts as dead; an error of its own comes first
    _GRACE = 2.0  # seconds for threads and workers to end by themselves

    def __init__(self, examples: Examples, options):
        self._num_workers, self._num_given = options.num_workers, 0
        self._workers = Workers(examples) if options.num_workers else None
        self._iterator = iter(_pipeline(examples, options, self._workers))
        # One more batch, so that stacking and copying happen beside the caller's work.
        self._queue, self._ended = queue.Queue(1), threading.Event()
        self._thread, self._lock = None, threading.Lock()

    def next(self) -> dict:
        """Returns the next batch: `fields`, `corrupt` and `fatal` of its rows.

        Raises:
            StopIteration: at the end, or once it is closed.
            WorkerDied: if a worker process ended by itself.
        """
        with self._lock:
            if self._thread is None and not self._ended.is_set():
                self._thread = threading.Thread(target=self._read, name="halonet_jax loader", daemon=True)
                self._thread.start()
        gone_since = None
        while not self._ended.is_set():
            with contextlib.suppress(queue.Empty):
                batch, error = self._queue.get(timeout=self._POLL)
                if error is not None:
                    raise error
                self._num_given += 1
                if self._workers and self._num_given == self._num_workers:
                    self._workers.all_started()
                return batch
            if self._workers and self._workers.any_gone():
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since > self._GONE:
                    raise WorkerDied
        raise StopIteration

    def close(self) -> None:
        """Ends threads and processes within seconds."""
        with self._lock:
            iterator, self._iterator = self._iterator, None
            self._ended.set()
        if iterator is None:
            return
        # First the thread, which may be starting a worker: one that Grain does not know of yet would go on.
        if not self._join(self._thread) and self._workers:
            self._workers.kill()
            self._join(self._thread)
        closing = threading.Thread(target=iterator.close, name="halonet_jax loader's end", daemon=True)
        closing.start()
        if not self._join(closing) and self._workers:
            self._workers.kill()
            self._join(closing)
        if self._workers:
            self._workers.close()

    def _join(self, thread):
        """Whether a thread has ended within the grace period."""
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(self._GRACE)
        return not thread.is_alive()

    def _read(self):
        iterator = self._iterator
        while iterator is not None and not self._ended.is_set():
            try:
                item = next(iterator), None
            except Exception as error:
                died = isinstance(error, RuntimeError) and "terminated unexpectedly" in str(error)  # Grain's words
                item = None, WorkerDied() if died else error
            while not self._ended.is_set():
                with contextlib.suppress(queue.Full):
                    self._queue.put(item, timeout=self._POLL)
                    break
            if item[1] is not None:
                return


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


def _pipeline(examples, options, workers) -> grain.IterDataset:
    if not flags.FLAGS.is_parsed():
        # Grain's worker processes read absl flags. Outside absl.app.run nobody parses them: their defaults hold.
        flags.FLAGS.mark_as_parsed()
    streams = examples.num_streams
    reading = grain.ReadOptions(
        num_threads=-(-options.num_threads // streams),
        prefetch_buffer_size=max(options.prefetch * examples.local_size // streams, 1),
    )
    stack = _stack if examples.num_batches is None else _stack_with_mask
    rows = grain.MapDataset.source(examples if workers is None else workers.examples).to_iter_dataset(reading)
    dataset = rows.batch(examples.local_size, batch_fn=stack)
    if workers is None:
        return dataset
    return dataset.mp_prefetch(grain.MultiprocessingOptions(options.num_workers), workers.start).map(_own)
