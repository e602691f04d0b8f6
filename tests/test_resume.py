"""A run that is killed and started again ends with the very numbers of a run that never was."""

import itertools
import random
import shutil
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from entries import checkpoints, command, evaluate, metrics, run, start, train, train_command

# Reports, evaluations and checkpoints at steps that are no multiples of one another.
STEPS = 30
RUN = {"max_steps": STEPS, "log_every_steps": 5, "checkpoint_every_steps": 3, "eval_every_epochs": 0.2}

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info")  # Orbax's, on a restore without a target


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    train(workdir, **RUN)
    return workdir


def numbers(workdir):
    """All that a resumed run must repeat, by step and kind of report."""
    varying = ("images_per_second", "input_wait")
    return [{key: value for key, value in report.items() if key not in varying} for report in metrics(workdir)]


def arrays(workdir, step=STEPS):
    return ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")


def assert_same_run(workdir, other):
    assert numbers(workdir) == numbers(other)
    a, b = (jax.tree_util.tree_leaves_with_path(arrays(w)) for w in (workdir, other))
    assert len(a) == len(b) > 100 and {path[0].key for path, _ in a} >= {"params", "model_state", "opt_state", "ema_params"}
    for (path, x), (_, y) in zip(a, b):
        assert x.dtype == y.dtype and np.array_equal(x, y), jax.tree_util.keystr(path)


def until_line(text):
    """Waits for an output line that holds `text`."""

    def wait(process, workdir):
        assert any(text in line for line in process.stdout), process.stderr.read()

    return wait


def until_saving(nth):
    """Waits for the nth checkpoint that is on its way to the disk."""

    def wait(process, workdir):
        seen = set()
        while process.poll() is None and len(seen) < nth:
            seen.update(path.name.split(".")[0] for path in (workdir / "checkpoints").glob("*tmp*"))
            time.sleep(0.0005)

    return wait


def test_interrupted_runs_end_as_the_uninterrupted_one(uninterrupted, tmp_path):
    """Killed during a save and after a report; stopped by signals while it compiles and between steps.

    Many more moments: `test_faults.py::test_chaos`.
    """
    rng = random.Random(1)
    interruptions = [
        (signal.SIGKILL, until_saving(rng.randint(2, 3))),
        (signal.SIGTERM, until_line("parameters")),
        (signal.SIGINT, until_line("first step done")),
        (signal.SIGKILL, until_line("  loss ")),
    ]
    came_in_time, reached = 0, {0}
    for number, wait in interruptions:
        with start(train_command(tmp_path, **RUN)) as process:
            wait(process, tmp_path)
            process.send_signal(number)
            output, errors = process.communicate()
        steps = checkpoints(tmp_path)
        came_in_time += process.returncode != 0
        if number == signal.SIGKILL:
            with open(tmp_path / "metrics.jsonl", "a") as file:  # as a kill in the middle of a write leaves it
                file.write('{"step": 17, "train/lo')
        elif process.returncode:
            assert process.returncode == 75 and "the same command resumes" in output, (output, errors)
            if "nothing to save" in output:  # at once, rather than after minutes of compiling
                assert wait is interruptions[1][1] and "first step done" not in output and steps[-1] == max(reached)
            else:
                assert steps[-1] > max(reached) and f"{number.name}: saved step {steps[-1]} after" in output
        reached.add(max(steps, default=0))
    assert came_in_time >= 3 and len(reached) >= 3, "the interruptions came too late to test anything"
    done = train(tmp_path, **RUN)
    assert f"step {steps[-1]} of {STEPS}" in done.stdout
    assert_same_run(tmp_path, uninterrupted)


def test_best_checkpoint_survives_worse_ones(uninterrupted, tmp_path):
    """It stays beside the newest over a resume, though the resumed run gets worse."""
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    done = train(workdir, **(RUN | {"max_steps": STEPS + 12, "schedule__learning_rate": 3.0, "checkpoints_to_keep": 2}))
    assert "schedule.learning_rate: 0.003 -> 3.0" in done.stderr
    accuracies = {report["step"]: report["eval_ema/top1"] for report in metrics(workdir) if "eval_ema/top1" in report}
    best = max(accuracies, key=lambda step: (accuracies[step], step))
    assert best <= STEPS < max(accuracies)
    assert checkpoints(workdir) == [best, STEPS + 9, STEPS + 12]
    result = evaluate(workdir, "--ema", "--step=best", "--batch_size=50")
    assert (result["step"], result["top1"]) == (best, accuracies[best])


def test_evaluation_of_a_damaged_checkpoint_names_the_others(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / str(STEPS) / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    message = run(command("evaluate", f"--workdir={tmp_path}/run"), code=2).stderr.splitlines()[-1]
    assert message.startswith(f"error: {tmp_path}/run/checkpoints/{STEPS} is damaged (") and "give another --step: " in message


def test_non_finite_loss_stops_and_leaves_the_good_checkpoint(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    config = RUN | {
        "max_steps": STEPS + 9,
        "checkpoint_every_steps": 1,
        "checkpoints_to_keep": 9,
        "schedule__learning_rate": 1e6,
    }
    done = train(tmp_path / "run", code=70, **config)
    last = checkpoints(tmp_path / "run")[-1]
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: step ") and "schedule.learning_rate" in error
    assert f"Last good checkpoint: {tmp_path}/run/checkpoints/{last}." in error
    for step in checkpoints(tmp_path / "run"):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(arrays(tmp_path / "run", step))), step
    assert arrays(tmp_path / "run", last)["step"] == last
    assert all(np.isfinite(v) for r in metrics(tmp_path / "run") for v in r.values() if v is not None)


def test_other_model_is_refused_and_the_workdir_left_alone(uninterrupted):
    state = lambda: {
        p: p.stat().st_mtime_ns for p in itertools.chain(uninterrupted.glob("*"), uninterrupted.rglob("checkpoints/*"))
    }
    before = state()
    done = train(uninterrupted, code=2, **(RUN | {"model__base_width": 16}))
    assert "model.base_width: 8 -> 16" in done.stderr
    assert "does not fit the config" in done.stderr.splitlines()[-1] and "another workdir" in done.stderr
    assert state() == before
