"""The contract between a task and the training loop. Classification and detection are two values of one type."""

import dataclasses
from collections.abc import Callable
from typing import Any

from halonet_jax.training.evaluation import Evaluator, SumEvaluator


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with its loss, its input and its evaluation.

    `params` and `model_state` are pytrees of arrays. `model_state` is what a forward pass changes: batch statistics. A batch
    is a dict of arrays with the batch axis first: the fields of `transform`, and in evaluation `mask` `[B]`, False for padding.

    Attributes:
        init: `(rng) -> (params, model_state)`.
        loss: `(params, model_state, batch, rng) -> (loss, (model_state, metrics))`, in training mode. Loss and metrics are
            float32 means over the batch.
        predict: `(params, model_state, batch) -> outputs`, in evaluation mode.
        metrics: `(outputs, batch) -> tree of arrays`, compiled with `predict`. Sums over the examples in `mask` for
            `SumEvaluator`; whatever arrays the task's own evaluator takes otherwise, such as boxes and scores per example.
        evaluator: `() -> Evaluator`, which takes those arrays on the host and gives the result of a whole split.
        primary_metric: key of that result by which the best checkpoint is kept and curves are drawn. More is better.
        transform: `(training) -> Transform`, from a source's record to the fields of a row; a `halonet_jax.data.Transform`.
            Its `fields` give the shapes and dtypes of a batch.
        metadata: JSON values that a checkpoint carries, so that it can be used without the training data: `class_names` and
            `preprocessing`.
        describe: `() -> str`, a line for the start of a run: what the devices of the current mesh will do.
    """

    init: Callable[..., tuple[Any, Any]]
    loss: Callable[..., tuple[Any, tuple[Any, dict]]] | None
    predict: Callable[..., Any] | None
    metrics: Callable[..., Any] | None
    evaluator: Callable[[], Evaluator] = SumEvaluator
    primary_metric: str = "loss"
    transform: Callable[[bool], Any] | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    describe: Callable[[], str] = lambda: ""
