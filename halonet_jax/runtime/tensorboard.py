"""Writes TensorBoard files with `clu`, which needs TensorFlow."""

import concurrent.futures
import os
from collections.abc import Callable
from typing import Any

from absl import logging
from etils import epath


class TensorBoard:
    """Writes the scalars of a run. If it cannot, it says so once, and the run goes on.

    TensorFlow is imported in a thread, because that takes seconds, in which the train step can compile.

    Args:
        folder: for the files.
    """

    def __init__(self, folder: str | epath.Path):
        thread = concurrent.futures.ThreadPoolExecutor(1, "halonet_jax TensorBoard")
        self._writer = thread.submit(_make_writer, folder)
        thread.shutdown(wait=False)  # the thread ends after this call

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars in the background.

        Args:
            step: the last step that is done.
            values: by name.
        """
        self._call(lambda writer: writer.write_scalars(step, values))

    def close(self) -> None:
        """Waits until everything is written, and ends the background thread."""
        self._call(lambda writer: writer.close())
        self._writer = None

    def _call(self, call: Callable[[Any], None]):
        if self._writer:
            try:
                call(self._writer.result())
            except Exception as error:  # of many types, some from the writer's thread
                self._writer = None
                reason = " ".join(str(error).split()) or type(error).__name__
                logging.warning("No more TensorBoard files, only metrics.jsonl: %s", reason)


def _make_writer(folder):
    import tensorflow as tf  # here, because it takes seconds and may be missing
    from clu import metric_writers

    tf.config.set_visible_devices([], "GPU")  # it must not take the GPU's memory
    return metric_writers.AsyncWriter(metric_writers.SummaryWriter(os.fspath(folder)))
