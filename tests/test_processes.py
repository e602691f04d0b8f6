"""Runs over several processes, on loopback: the losses and the counts of one process, and runs that move between meshes.

That the same processes give the same bits, through kills too, is what test_faults.py::test_chaos holds.
"""

import csv
import json

import pytest
from entries import command, join_flags, metrics, start, train, train_processes, wait_for

STEPS = 20
# Batch-norm groups lie within a device of each mesh; 360 test images do not fill batches of 32.
RUN = {"max_steps": STEPS, "log_every_steps": 1, "checkpoint_every_steps": 10, "model__bn_group_size": 8}
# Sums over devices are in another order; a step amplifies what the one before it rounded.
TOLERANCE = 1e-4


def reports(workdir):
    """Training reports by step, and the last evaluation."""
    lines = metrics(workdir)
    trained = {line["step"]: line for line in lines if "train/loss" in line}
    assert list(trained) == list(range(1, STEPS + 1)) and len(lines) == len({(r["step"], "eval/top1" in r) for r in lines})
    return trained, lines[-1]


def assert_same_numbers(workdir, other):
    (ours, our_evaluation), (theirs, their_evaluation) = reports(workdir), reports(other)
    for step in theirs:
        assert ours[step]["train/loss"] == pytest.approx(theirs[step]["train/loss"], rel=TOLERANCE), step
        assert ours[step]["learning_rate"] == theirs[step]["learning_rate"]
    assert our_evaluation["eval/count"] == their_evaluation["eval/count"] == 360
    for key in ("eval/top1", "eval/top5", "eval_ema/top1", "eval_ema/top5"):
        assert our_evaluation[key] == their_evaluation[key], key


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, one device."""
    workdir = tmp_path_factory.mktemp("alone")
    train(workdir, **RUN)
    return workdir


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two processes of two devices, and what they printed."""
    workdir = tmp_path_factory.mktemp("pair")
    return workdir, train_processes(workdir, processes=2, devices=2, **RUN)


def test_four_devices_then_one(alone, tmp_path):
    """Four devices, of which two share a state, give one device's losses; one device resumes what they saved."""
    train(tmp_path, devices=4, **(RUN | {"max_steps": 10, "mesh__fsdp": 2}))
    assert "fsdp" in (tmp_path / "checkpoints" / "10" / "state" / "_sharding").read_text()
    train(tmp_path, **RUN)
    assert_same_numbers(tmp_path, alone)


def test_two_processes_of_two_devices(alone, pair):
    workdir, (first, second) = pair
    assert_same_numbers(workdir, alone)
    assert "batch 32 on 4 cpu device(s) on 2 hosts, 16 images each, mesh {'data': 4, 'fsdp': 1}" in first.stdout
    assert "step" not in second.stdout and not second.stderr.replace(first.stderr, "")  # one writer
    assert json.loads((workdir / "run.json").read_text())["processes"] == 2


def test_four_processes_then_two_devices(tmp_path):
    """What four processes of one device save, one process of two devices resumes; `fsdp` may change on the way.

    With a linear model, since every process compiles.
    """
    linear = RUN | {"entry": "tests/linear_train.py", "model__base_width": 32}
    train(tmp_path / "alone", **linear)
    train_processes(tmp_path / "run", processes=4, devices=1, **(linear | {"max_steps": 10, "mesh__fsdp": 2}))
    train(tmp_path / "run", devices=2, **linear)
    assert_same_numbers(tmp_path / "run", tmp_path / "alone")


def test_evaluation_over_two_processes(alone, pair):
    """Exact counts, with a last batch that the images do not fill."""
    workdir, _ = pair
    arguments = command("evaluate", f"--workdir={workdir}", "--batch_size=100", "--per_class")
    done = wait_for([start([*arguments, *flags], devices=2) for flags in join_flags(2)])
    assert [process.returncode for process in done] == [0, 0], done
    result = json.loads((workdir / f"eval_test_{STEPS}.json").read_text())
    _, evaluation = reports(workdir)
    assert result["count"] == 360 and result["top1_count"] == round(360 * evaluation["eval/top1"])
    (_, *rows) = csv.reader((workdir / f"eval_test_{STEPS}_per_class.csv").open())
    assert [sum(int(row[column]) for row in rows) for column in (1, 2)] == [360, result["top1_count"]]
    assert (workdir / f"eval_test_{STEPS}_confusion.png").exists()
