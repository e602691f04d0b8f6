"""Evaluation: one pass over a split for one or more sets of weights. Training and `halonet_jax.evaluate` share it."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import numpy as np


class Evaluator(Protocol):
    """Accumulates, on the host, what `Task.metrics` gives for each batch.

    Every process gets the metrics of the whole global batch, so every process computes the same result.
    """

    def add(self, values: Any) -> None:
        """Takes one batch's metrics: the tree of `Task.metrics`, as NumPy arrays."""
        ...

    def result(self) -> dict[str, float | int]:
        """The metrics of all batches, with the number of examples under "count"."""
        ...


class SumEvaluator:
    """Means over examples, from sums that are made on the device. Exact for any batch size and number of devices.

    Attributes:
        totals: the sums so far by name; counts are exact integers.
    """

    def __init__(self):
        self.totals: dict[str, float | int] = {"count": 0}

    def add(self, values: dict[str, np.ndarray]) -> None:
        """Adds scalar sums over a batch's examples; their number is under "count"."""
        for key, value in values.items():
            self.totals[key] = self.totals.get(key, 0) + np.asarray(value).item()

    def result(self) -> dict[str, float | int]:
        """Each sum divided by the count, and the count. Only the count where it is 0."""
        count = self.totals["count"]
        means = {key: value / count for key, value in self.totals.items() if key != "count"} if count else {}
        return {**means, "count": count}


def evaluate(
    eval_step: Callable,
    evaluator: Callable[[Any], Evaluator],
    source: Any,
    weights: dict[str, Any],
    batches: Iterable[dict],
    call: Callable[[Callable], Any] = lambda function: function(),
) -> dict[str, Evaluator]:
    """Runs `eval_step` on every batch for all of `weights`.

    Args:
        eval_step: `(weights, batch) -> tree`, as `step.make_eval_step` makes it.
        evaluator: makes one accumulator for `source`; called once for each entry of `weights`.
        source: of the split, which may hold what outputs are compared with.
        weights: `(params, model_state)` by name.
        batches: global batches with a "mask".
        call: runs a function that may block (compiling, waiting for a device) and returns its result. Training passes one
            that a stop request interrupts.

    Returns:
        The evaluators, by the names of `weights`.
    """
    evaluators = {name: call(lambda: evaluator(source)) for name in weights}

    def add(outputs):
        for name, values in call(lambda: jax.device_get(outputs)).items():
            evaluators[name].add(values)

    previous = {}  # fetched once the next batch is dispatched, so that the device never waits
    for batch in batches:
        outputs = call(lambda batch=batch: {name: eval_step(weight, batch) for name, weight in weights.items()})
        add(previous)
        previous = outputs
    add(previous)
    return evaluators
