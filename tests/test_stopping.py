"""How soon a run ends after SIGTERM, wherever it is; and that it ends by itself where something hangs."""

import os
import signal
import time

import pytest
from entries import checkpoints, metrics, start, train, train_command

SECONDS = 10  # docs/reliability.md states them
RUN = {
    "entry": "tests/linear_train.py", "max_steps": 8, "log_every_steps": 2, "checkpoint_every_steps": 100,
    "eval_every_epochs": 0.0,
}  # fmt: skip


def stop(workdir, text, environment, **config):
    """Starts a run, sends SIGTERM one second after a line with `text`, and returns its output."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        process = start(train_command(workdir, **(RUN | config)))
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            break
    time.sleep(1)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert time.monotonic() - begin < SECONDS, (seen, output, errors)
    assert process.returncode == 75 and "the same command resumes" in output, (seen, output, errors)
    return output


@pytest.fixture
def blocked(tmp_path, image_file):
    """A folder of images of which one never answers, as on a mount that is gone."""
    for split in ("train", "val"):
        for name in "ab":
            for i in range(16):
                image_file(tmp_path / "data" / split / name / f"{i}.png")
    (tmp_path / "data/train/a/3.png").unlink()
    os.mkfifo(tmp_path / "data/train/a/3.png")
    return {"data__source": "folder", "data__dir": tmp_path / "data", "data__eval_split": "val"}


@pytest.fixture
def image_file():
    import cv2
    import numpy as np

    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.zeros((16, 16, 3), np.uint8))

    return write


def test_stop_before_the_first_batch(tmp_path, blocked):
    output = stop(tmp_path / "run", "no attention", {}, **blocked)
    assert "nothing to save" in output


def test_stop_while_the_first_step_compiles(tmp_path):
    output = stop(tmp_path / "run", "no attention", {"SLOW_COMPILE": "60"})
    assert "nothing to save" in output


def test_stop_during_an_evaluation_which_the_resumed_run_makes_up_for(tmp_path):
    output = stop(tmp_path / "run", "step 8/8 (100%)", {"SLOW_EVALUATION": "0.5"})
    assert "saved step 8" in output and checkpoints(tmp_path / "run") == [8]
    assert not any("eval/top1" in report for report in metrics(tmp_path / "run"))
    train(tmp_path / "run", **RUN)
    train(tmp_path / "whole", **RUN)
    ours, whole = (
        [{k: v for k, v in report.items() if k not in ("images_per_second", "input_wait")} for report in metrics(folder)]
        for folder in (tmp_path / "run", tmp_path / "whole")
    )
    assert ours == whole and ours[-1]["eval/count"] == 360


def test_watchdog_acts_on_a_first_batch_that_never_comes(tmp_path, blocked):
    process = start(train_command(tmp_path / "run", **(RUN | blocked | {"hang_timeout": 4})))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 69 and "made no progress in waiting for the first batch" in errors.splitlines()[-1]
