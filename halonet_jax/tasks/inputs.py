"""A run's input: the opened splits, and this process's share of every batch."""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from halonet_jax import data
from halonet_jax.training.task import Task


class Inputs:
    """Makes the loaders of a run.

    Args:
        config: the whole config; `data`, `seed` and the batch sizes are read.
        task: gives the transforms.
        train_source: the training split; None where only evaluation is wanted.
        eval_source: the evaluation split.
        flag: spells the command-line flag that sets a config key, for remedies; "" where the entry has none.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        task: Task,
        train_source: Any,
        eval_source: Any,
        flag: Callable[[str], str] = "--config.{}".format,
    ):
        self._config, self._task = config, task
        self._train_source, self._eval_source = train_source, eval_source
        self._share = {"process_index": jax.process_index(), "process_count": jax.process_count(), "flag": flag}

    @property
    def num_examples(self) -> int:
        """Of the training split."""
        return len(self._train_source)

    def train_batches(self, start_step: int) -> data.Loader:
        """Endless batches from that of step `start_step + 1` on."""
        return data.train_batches(
            self._train_source, self._task.transform(True), self._config.data, batch_size=self._config.batch_size,
            seed=self._config.seed, start_step=start_step, **self._share,
        )  # fmt: skip

    def eval_batches(self) -> data.Loader:
        """The evaluation split once, in order."""
        batch_size = self._config.eval_batch_size or self._config.batch_size
        return data.eval_batches(
            self._eval_source, self._task.transform(False), self._config.data, batch_size=batch_size, **self._share
        )  # fmt: skip
