"""The entries as functions of one process: any task, any number of runs, and nothing left behind."""

import json
import threading

import pytest
import toy_boxes  # noqa: F401  (registers the task)

from halonet_jax import config as config_lib
from halonet_jax import data, evaluate, train, weights
from halonet_jax.errors import ConfigError


def boxes_config(**options):
    config = config_lib.digits()
    config.task, config.batch_size, config.eval_batch_size, config.num_epochs = "digit_boxes", 64, 80, 4.0
    config.eval_every_epochs, config.log_every_steps, config.checkpoint_every_steps = 1.0, 20, 50
    config.ema_decay, config.tensorboard = 0.5, False
    config.optimizer.name, config.optimizer.weight_decay = "adamw", 0.0
    config.schedule.learning_rate, config.schedule.learning_rate_batch_size, config.schedule.warmup_epochs = 0.03, 0, 0.0
    config.update_from_flattened_dict(options)
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of this process, in two workdirs, and the threads that were there after each."""
    folder, found = tmp_path_factory.mktemp("runs"), []
    before = set(threading.enumerate())
    for name in ("first", "second"):
        result = train.train(boxes_config(), str(folder / name))
        found.append((result, folder / name, set(threading.enumerate()) - before))
    return found


def reports(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_another_task_trains_evaluates_and_keeps_its_best(runs):
    """A metric that the host computes from arrays, under its own name, through the real loop."""
    result, workdir, _ = runs[0]
    by_step = {report["step"]: report for report in reports(workdir) if "eval/count" in report}
    scores = {step: report["eval_ema/mean_overlap"] for step, report in by_step.items()}
    assert len(scores) == 4 and all(report["eval/count"] == 360 for report in by_step.values())
    assert result.exit_code == 0 and result.step == max(scores) == 90
    assert scores[90] > max(0.5, scores[min(scores)])
    assert result.best_step == max(scores, key=lambda step: (scores[step], step))
    assert (workdir / "learning_curve.png").stat().st_size > 10_000
    again = evaluate.evaluate(str(workdir), ema=True, at="best", batch_size=48)
    assert again["count"] == 360 and again["mean_overlap"] == pytest.approx(scores[result.best_step], abs=1e-6)
    assert "mean_overlap" in evaluate.summary(again) and "top" not in evaluate.summary(again)
    for entry in (
        lambda: evaluate.evaluate(str(workdir), per_class=True),
        lambda: evaluate.evaluate_suite("imagenet", str(workdir)),
    ):
        with pytest.raises(ConfigError, match="is for classification.*, and the model's task is 'digit_boxes'; leave --"):
            entry()


def test_two_runs_in_one_process_leave_no_thread_of_ours(runs):
    (first, *_), (second, *_) = runs
    assert first.metrics == second.metrics
    for _, _, threads in runs:
        ours = [thread.name for thread in threads if "halonet" in thread.name or "ThreadPool" in thread.name]
        assert not ours
    assert len(runs[1][2]) <= len(runs[0][2]), "each run leaves more threads"


def test_weights_load_without_the_training_data(runs, monkeypatch):
    monkeypatch.setattr(data, "open_source", None)
    result, workdir, _ = runs[0]
    loaded = weights.load(str(workdir), step="best", weights="ema")
    assert loaded.step == result.best_step and loaded.weights == "ema"
    assert loaded.metadata["preprocessing"] == {"image_size": toy_boxes.SIZE}
    assert set(loaded.variables["params"]) == {"kernel", "bias"}
    for arguments, message in (({"weights": "best"}, "use 'raw' or 'ema'"), ({"step": "newest"}, "use a step number")):
        with pytest.raises(config_lib.ConfigError, match=message):
            weights.load(str(workdir), **arguments)
