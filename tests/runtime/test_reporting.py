"""Reports: written, read back whatever stands between them, and drawn for any metric."""

import jax.numpy as jnp
import numpy as np
import pytest

from halonet_jax import errors
from halonet_jax.runtime import plots, profiling, reporting

TORN = [
    b'{"step": 3, "train/lo', b"5", b"[1, 2]", b'"text"', b"null", b"{}", b'{"step": null}', b'{"step": "7"}', b'{"step": true}',
    b'{"step": 1.5}', b'{"step": -1}', b'{"step": 4, "eval/top1": "high"}', b'{"step": 4, "eval/top1": [1]}',
    b'{"step": 4, "eval/top1": 1' + b"0" * 400 + b"}", b'{"step": ' + b"9" * 5000 + b"}", b"[" * 100_000, b"\xff\xfe\0",
    b'{"step": 4, "a": {"b": 1}}',
]  # fmt: skip


def reporter(workdir, start_step=0, **options):
    return reporting.Reporter(workdir, start_step=start_step, last_step=9, batch_size=4, **options)


@pytest.mark.parametrize("torn", TORN, ids=lambda line: line[:30].decode(errors="replace"))
def test_what_is_no_report_is_left_out(tmp_path, torn, caplog):
    good = [b'{"step": 1, "train/loss": 2.0}', b'{"step": 2, "train/loss": null, "eval/ap": 0.25}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good[0], torn, good[1], b"", torn]))
    expected = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": None, "eval/ap": 0.25}]
    assert reporting.read_metrics(tmp_path) == expected and caplog.text.count("has a torn line, left out") == 2
    assert reporting.last_evaluation(tmp_path) == expected[1]
    plots.learning_curve([tmp_path], tmp_path / "curve.png", "ap")
    reporter(tmp_path, start_step=2).close()
    caplog.clear()
    assert reporting.read_metrics(tmp_path) == expected and not caplog.text


def test_reports_after_the_checkpoint_are_dropped(tmp_path):
    lines = ['{"step": 1, "train/loss": 2.0}', '{"step": 2, "train/loss": 1.0}', '{"step": 3, "train/lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    reporter(tmp_path, start_step=1).close()
    assert reporting.read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.0}]
    reporter(tmp_path).close()
    assert reporting.read_metrics(tmp_path) == []
    assert (tmp_path / "metrics.jsonl.bak").read_text() == '{"step": 1, "train/loss": 2.0}\n'


@pytest.mark.parametrize("metric, label", [("top1", "top-1"), ("mean_overlap", "mean overlap")])
def test_an_evaluation_is_printed_by_its_primary_metric(tmp_path, capsys, metric, label):
    ours = reporter(tmp_path, primary_metric=metric)
    ours.evaluation(5, {f"eval/{metric}": 0.5, f"eval_ema/{metric}": 0.25, "eval/other": np.inf, "eval/count": 8})
    ours.close()
    assert capsys.readouterr().out == f"step 5/9  eval {label} 0.5000  eval_ema {label} 0.2500  (8 images)\n"
    assert reporting.last_evaluation(tmp_path)["eval/other"] is None


def test_a_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(errors.StorageError, match="cannot be written .*: move away what is in its place, then"):
        reporter(tmp_path)


def test_step_metrics_name_the_first_bad_step():
    metrics = reporting.StepMetrics([{"loss": 1.0, "grad_norm": 1.0}])
    for at_step, loss in ((7, 3.0), (8, np.inf), (9, np.nan)):
        metrics.append(at_step, {"loss": jnp.asarray(loss), "grad_norm": jnp.asarray(1.0)})
    with pytest.raises(errors.NonFiniteLoss, match="step 8: loss is inf"):
        metrics.pop_means()


def test_step_metrics_of_a_checkpoint_stay_as_they_were():
    metrics = reporting.StepMetrics()
    value = {"loss": jnp.asarray(2.0), "grad_norm": jnp.asarray(1.0)}
    metrics.append(1, value)
    saved = metrics.collected()
    metrics.append(2, value)
    assert len(metrics.collected()) == 2 and len(saved) == 1


def test_the_time_to_the_first_step_is_printed_once(capsys):
    clock = profiling.StartUpClock()
    for _ in range(2):  # again after a roll-back
        clock.lap("first batch")
        clock.finish("first step")
    assert capsys.readouterr().out.count("first step done after") == 1
