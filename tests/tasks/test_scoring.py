"""How predictions are scored, against a plain count in NumPy."""

import jax
import numpy as np
import pytest

from halonet_jax.tasks.scoring import ConfusionEvaluator, Scoring, make_metrics

NUM_CLASSES, BATCH = 12, 8


def batches(seed, several=False):
    """Three batches with ties, NaN and infinities; the last is half padding."""
    rng = np.random.default_rng(seed)
    for number in range(3):
        logits = rng.integers(-3, 4, (BATCH, NUM_CLASSES)).astype(np.float32)
        logits[0], logits[1, 3], logits[2, 5] = 1.0, np.nan, np.inf
        logits[3] = -np.inf
        label = rng.integers(0, NUM_CLASSES, BATCH).astype(np.int32)
        logits[4:, :][np.arange(BATCH - 4), label[4:]] += rng.choice([0, 0.5, 9], BATCH - 4)
        labels = {"labels": rng.random((BATCH, NUM_CLASSES)) < 0.12} if several else {"label": label}
        yield logits, labels | {"mask": np.arange(BATCH) < (BATCH if number < 2 else 4)}


def rank(logits, truth, classes):
    """Number of other classes that the best label does not beat strictly."""
    best = np.max([logits[c] for c in truth])  # NaN where one is NaN
    return sum(not logits[c] < best for c in classes if c not in truth)


def score(scoring, several=False):
    metrics, totals = jax.jit(make_metrics(NUM_CLASSES, scoring)), {}
    for seed in range(5):
        for logits, batch in batches(seed, several):
            for key, value in metrics(logits, batch).items():
                totals[key] = totals.get(key, 0) + value
    return {key: int(totals[key]) for key in ("count", "top1", "top5")}


@pytest.mark.parametrize("classes", (None, (11, 0, 5, 7, 2, 3, 8)))
def test_one_label(classes):
    among = range(NUM_CLASSES) if classes is None else classes
    outside = [c for c in range(NUM_CLASSES) if c not in among]
    expected, totals = {"count": 0, "top1": 0, "top5": 0}, {"count": 0, "top1": 0, "top5": 0, "loss": 0.0}
    metrics, loss = jax.jit(make_metrics(NUM_CLASSES, Scoring(classes))), 0.0
    for seed in range(5):
        for logits, batch in batches(seed):
            logits = np.where(np.isfinite(logits), logits, 0) if seed == 4 else logits
            batch["mask"] = batch["mask"] & ~np.isin(batch["label"], outside)
            for key, value in metrics(logits, batch).items():
                totals[key] += np.asarray(value) if key != "loss" or seed == 4 else 0
            for row, label in zip(logits[batch["mask"]], batch["label"][batch["mask"]]):
                place = rank(row, [label], among)
                for key, most in (("count", NUM_CLASSES), ("top1", 1), ("top5", 5)):
                    expected[key] += place < most
                loss += np.log(np.exp(row[list(among)] - row[label]).sum()) if seed == 4 else 0
    assert {key: totals[key] for key in expected} == expected and 0 < expected["top1"] < expected["top5"] < expected["count"]
    assert totals["loss"] == pytest.approx(loss, rel=1e-5)


def test_several_labels():
    """Any label is right, and an image without one does not count."""
    expected = {"count": 0, "top1": 0, "top5": 0}
    for seed in range(5):
        for logits, batch in batches(seed, several=True):
            for row, labels in zip(logits[batch["mask"]], batch["labels"][batch["mask"]]):
                if labels.any():
                    place = rank(row, np.flatnonzero(labels), range(NUM_CLASSES))
                    for key, most in (("count", NUM_CLASSES), ("top1", 1), ("top5", 5)):
                        expected[key] += place < most
    assert score(Scoring(multi_label=True), several=True) == expected and 0 < expected["top1"] < expected["count"] < 100


def test_one_of_several_labels_is_that_label():
    one_label, any_label = (jax.jit(make_metrics(NUM_CLASSES, Scoring(multi_label=several))) for several in (False, True))
    for logits, batch in batches(7):
        several = {"labels": np.arange(NUM_CLASSES) == batch["label"][:, None], "mask": batch["mask"]}
        one, same = one_label(logits, batch), any_label(logits, several)
        assert all(one[key] == same[key] for key in same) and set(one) - set(same) == {"loss"}


@pytest.mark.parametrize("classes", (None, tuple(range(NUM_CLASSES))[::-1]))
def test_confusion_matrix(classes):
    """What is right by top-1 is on the diagonal, ties and NaN are not; padding is nowhere."""
    places = {c: place for place, c in enumerate(classes or range(NUM_CLASSES))}
    metrics, evaluator = jax.jit(make_metrics(NUM_CLASSES, Scoring(classes, per_class=True))), ConfusionEvaluator(NUM_CLASSES)
    right, counted = np.zeros((2, NUM_CLASSES), int)
    for seed in range(5):
        for logits, batch in batches(seed):
            evaluator.add(jax.device_get(metrics(logits, batch)))
            for row, label in zip(logits[batch["mask"]], batch["label"][batch["mask"]]):
                right[places[label]] += rank(row, [label], range(NUM_CLASSES)) < 1
                counted[places[label]] += 1
    confusion, result = evaluator.confusion, evaluator.result()
    np.testing.assert_array_equal(confusion.diagonal(), right)
    np.testing.assert_array_equal(confusion.sum(1), counted)
    assert confusion.sum() == result["count"] == 5 * 20 and confusion.trace() == evaluator.totals["top1"] > 0
    count = confusion.sum(1)
    assert result["mean_class_accuracy"] == pytest.approx(np.mean(confusion.diagonal()[count > 0] / count[count > 0]))


def test_a_wrong_prediction_is_in_its_place():
    logits = np.array([[0, 5, 1], [9, 0, 0], [0, 1, 2]], np.float32)
    batch = {"label": np.array([0, 0, 1], np.int32), "mask": np.array([True, True, True])}
    evaluator = ConfusionEvaluator(3)
    evaluator.add(jax.device_get(jax.jit(make_metrics(3, Scoring(per_class=True)))(logits, batch)))
    np.testing.assert_array_equal(evaluator.confusion, [[1, 1, 0], [0, 0, 1], [0, 0, 0]])
