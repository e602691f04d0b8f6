"""The input of a run: the opened splits, and the part of every batch that this process loads."""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from halonet_jax import data
from halonet_jax.training.task import Task


class Inputs:
    """Makes the loaders of a run.

    Args:
        config: the whole config. Only `data`, `seed` and the batch sizes are read.
        task: provides the transforms.
        train_source: the training split. None is enough for evaluation.
        eval_source: the evaluation split.
        flag: spells the command-line flag that sets a config key, for remedies; "" where the entry has none.

    Attributes:
        eval_source: as given.
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
        self._train_source, self.eval_source = train_source, eval_source
        self._share = {"process_index": jax.process_index(), "process_count": jax.process_count(), "flag": flag}

    @property
    def num_examples(self) -> int:
        """Number of examples in the training split."""
        return len(self._train_source)

    def train_batches(self, start_step: int) -> data.Loader:
        """Returns endless training batches.

        Args:
            start_step: number of steps done. The first batch is that of step `start_step + 1`.
        """
        return data.train_batches(
            self._train_source, self._task.transform(True), self._config.data, batch_size=self._config.batch_size,
            seed=self._config.seed, start_step=start_step, **self._share,
        )  # fmt: skip

    def eval_batches(self) -> data.Loader:
        """Returns the batches of one pass over the evaluation split, in order."""
        batch_size = self._config.eval_batch_size or self._config.batch_size
        return data.eval_batches(
            self.eval_source, self._task.transform(False), self._config.data, batch_size=batch_size, **self._share
        )  # fmt: skip
