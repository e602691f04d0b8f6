"""The contract between a task and the training loop. Each task is a value of the type `Task`."""

import dataclasses
from collections.abc import Callable
from typing import Any

from halonet_jax.training.evaluation import Evaluator, SumEvaluator


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with its loss, its input and its evaluation.

    `params` and `model_state` are pytrees of arrays. A forward pass changes `model_state`, the batch statistics. A
    batch is a dict of arrays with the batch axis first. It has the fields of `transform`. Evaluation batches also have
    a bool `mask` `[B]`, which is False for padding.

    Attributes:
        init: `(rng) -> (params, model_state)`.
        loss: `(params, model_state, batch, rng) -> (loss, (model_state, metrics))`, in training mode. Loss and metrics
            are float32 means over the batch.
        predict: `(params, model_state, batch) -> outputs`, in evaluation mode.
        metrics: `(outputs, batch) -> tree of arrays`, compiled together with `predict`. For `SumEvaluator` the arrays
            are sums over the examples in `mask`. A task's own evaluator may take others, such as boxes and scores per
            example.
        evaluator: `(source) -> Evaluator`, for the source of a split. The evaluator takes those arrays on the host and
            returns the result of the split. Its `result` may take minutes.
        primary_metric: key of that result. It ranks checkpoints and is drawn in curves. Higher is better.
        transform: `(training) -> halonet_jax.data.Transform`. The transform turns a source's record into the fields of
            a row. Its `fields` give the shapes and dtypes of a batch.
        metadata: JSON values that a checkpoint stores, so that it can be used without the training data: `class_names`
            and `preprocessing`.
        describe: `() -> str`, a line that is printed at the start of a run: the implementation that the devices use.
        model: the Flax module, for features and for surgery on its variables; None where there is none.
        normalize: `(images) -> inputs`, from a batch's uint8 images to what `model` takes; None where there is none.
        frozen: `(params) -> tree of bools`: which parameters are not trained; None: all are.
        distances: `(params) -> tree`: layers between each parameter and the output, for `optimizer.layer_decay`.
        adapt: `(variables, model, metadata) -> (variables, rows)`: makes another model's variables fit this task, for
            `init_from`. What it leaves out starts at random. Rows are `(what, how)` texts for the terminal. Raises
            ValueError for what does not fit.
    """

    init: Callable[..., tuple[Any, Any]]
    loss: Callable[..., tuple[Any, tuple[Any, dict]]] | None
    predict: Callable[..., Any] | None
    metrics: Callable[..., Any] | None
    evaluator: Callable[[Any], Evaluator] = lambda source: SumEvaluator()
    primary_metric: str = "loss"
    transform: Callable[[bool], Any] | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    describe: Callable[[], str] = lambda: ""
    model: Any = None
    normalize: Callable[[Any], Any] | None = None
    frozen: Callable[[Any], Any] | None = None
    distances: Callable[[Any], Any] | None = None
    adapt: Callable[..., Any] | None = None
