"""The contract between a task (a model with its loss) and the training loop."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Task(NamedTuple):
    """Four pure functions and a word on them; classification and detection are two values of this type.

    `params` and `model_state` are pytrees of arrays, the latter what a forward pass changes (batch statistics). `batch` is
    the loader's dict of arrays with the batch axis first; in evaluation it holds `mask` `[B]`, False for padding.

    Attributes:
        init: `(rng) -> (params, model_state)`.
        loss: `(params, model_state, batch, rng) -> (loss, (model_state, metrics))`, in training mode; loss and metrics are
            float32 means over the batch.
        predict: `(params, model_state, batch) -> outputs`, in evaluation mode.
        metrics: `(outputs, batch) -> dict` of sums over the examples in `mask`, with their number under "count". Means are
            had by division after the last batch, so that they are exact for any batch size and number of devices.
        describe: `() -> str`, a line for the start of a run on what the devices of the mesh that is set will do.
    """

    init: Callable[..., tuple[Any, Any]]
    loss: Callable[..., tuple[Any, tuple[Any, dict]]]
    predict: Callable[..., Any]
    metrics: Callable[..., dict]
    describe: Callable[[], str] = lambda: ""
