"""How a classifier's predictions are scored: by one label or several, among all classes or some, in total or by class."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from halonet_jax.training.evaluation import SumEvaluator


class Scoring(NamedTuple):
    """How a split is scored. The default is training's own evaluation.

    Attributes:
        classes: labels of the classes that predictions are chosen from; None: all. Images must be of these classes.
        multi_label: batches hold `labels`, bool `[B, K]`, in place of `label`. A prediction is right where it is any of an
            image's labels. Images without a label do not count.
        per_class: also count the predictions of each class, see `ConfusionEvaluator`. Not with `multi_label`.
    """

    classes: tuple[int, ...] | None = None
    multi_label: bool = False
    per_class: bool = False


TRAINING = Scoring()


def make_metrics(num_classes: int, scoring: Scoring = TRAINING) -> Callable[[Any, dict], dict]:
    """Returns a task's `metrics`, `(logits, batch) -> dict` of sums over the batch.

    Sums are "count", "top1" and "top5" (int32 numbers of examples) and, with one label, "loss" (cross-entropy). Ties and
    NaN count against the model, so that a constant or broken output scores nothing.

    Args:
        num_classes: K, the width of the logits.
        scoring: how to score. With `per_class`, the dict also has `label` and `predicted`, int32 `[B]`, as places among
            `classes`, and `counted`, bool `[B]`. A prediction that a tie or NaN spoils is one of the other classes.
    """
    classes = None if scoring.classes is None else np.asarray(scoring.classes)

    def metrics(logits, batch):
        mask = batch["mask"]
        if classes is not None:
            logits = logits[:, classes]
        if scoring.multi_label:
            labels = batch["labels"] if classes is None else batch["labels"][:, classes]
            mask = mask & labels.any(-1)
            best = jnp.where(labels, logits, -jnp.inf).max(-1, keepdims=True)
            rank = (~(logits < best) & ~labels).sum(-1)
            return _sums(mask, rank)
        label = batch["label"]
        if classes is not None:
            label = jnp.asarray(_places(classes, num_classes))[label]
        at_label = jnp.take_along_axis(logits, label[:, None], axis=1)
        rank = (~(logits < at_label)).sum(-1) - 1
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        found = _sums(mask, rank) | {"loss": jnp.where(mask, cross_entropy, 0).sum()}
        if scoring.per_class:
            others = jnp.where(jnp.arange(logits.shape[-1]) == label[:, None], -jnp.inf, logits).argmax(-1)
            others = jnp.where(others == label, (label + 1) % logits.shape[-1], others)  # all others are -inf
            found |= {"label": label, "predicted": jnp.where(rank < 1, label, others), "counted": mask}
        return found

    return metrics


def _sums(mask, rank):
    return {"count": mask.sum(), "top1": (mask & (rank < 1)).sum(), "top5": (mask & (rank < 5)).sum()}


def _places(classes, num_classes):
    places = np.zeros(num_classes, np.int32)
    places[classes] = np.arange(len(classes))
    return places


class ConfusionEvaluator(SumEvaluator):
    """Sums, and how often each class was predicted for each.

    Args:
        num_classes: that predictions are chosen from.

    Attributes:
        confusion: int64 `[label, predicted]`: numbers of examples.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.confusion = np.zeros((num_classes, num_classes), np.int64)

    def add(self, values: dict[str, np.ndarray]) -> None:
        """Adds a batch's sums and its predictions."""
        values = dict(values)
        label, predicted, counted = (np.asarray(values.pop(key)) for key in ("label", "predicted", "counted"))
        np.add.at(self.confusion, (label[counted], predicted[counted]), 1)
        super().add(values)

    def result(self) -> dict[str, float | int]:
        """As of `SumEvaluator`, and "mean_class_accuracy", over the classes that the split has."""
        count = self.confusion.sum(1)
        present = count > 0
        if not present.any():
            return super().result()
        accuracy = self.confusion.diagonal()[present] / count[present]
        return super().result() | {"mean_class_accuracy": float(accuracy.mean())}
