"""`halonet_jax.train` and `halonet_jax.evaluate` as a user runs them: what they write and print, and what mistakes give."""

import json
import os
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
from entries import ROOT, checkpoints, command, evaluate, metrics, run, train, train_command

from halonet_jax import errors
from halonet_jax.training.progress import Progress

DIGITS = {
    "max_steps": 12, "log_every_steps": 5, "checkpoint_every_steps": 5, "profile_steps": "(7,8)", "tensorboard": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run on the digits, and what it printed."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train(workdir, **DIGITS)


# --- digits


def test_training_writes_all_that_it_promises(finished):
    workdir, done = finished
    reports = metrics(workdir)
    assert [report["step"] for report in reports] == [5, 10, 12, 12]
    for report in reports[:3]:
        assert report["images_per_second"] > 0 and 0 <= report["train/top1"] <= 1 and report["train/loss"] > 0
        assert {"train/grad_norm", "learning_rate", "epoch"} <= set(report)
    for name in ("eval", "eval_ema"):
        assert 0 <= reports[3][f"{name}/top1"] <= reports[3][f"{name}/top5"] <= 1 and reports[3][f"{name}/loss"] > 0
    assert reports[3]["eval/count"] == 360
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["base_width"] == 8 and config["max_steps"] == 12
    about = json.loads((workdir / "run.json").read_text())
    assert about["versions"]["jax"] and about["devices"] == ["cpu"]
    assert cv2.imread(str(workdir / "learning_curve.png")).shape[1] > 500
    (events,) = workdir.glob("events.out.tfevents.*")
    assert 0 <= reports[1]["input_wait"] <= 1 and reports[2]["data/corrupt"] == 0
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert b"train/loss" in events.read_bytes() and b"eval_ema/top1" in events.read_bytes()


def test_training_prints_progress_and_where_everything_is(finished):
    workdir, done = finished
    assert not done.stderr
    first, attention, started, *progress = done.stdout.splitlines()
    assert re.fullmatch(r"  attention on cpu: xla for \d+ of \d+ layers", attention)
    assert "1,437 images, 10 classes; step 0 of 12, batch 32 on 1 cpu" in first
    parts = re.findall(r"([a-z ]+?) (\d+\.\d)(?:,|$)", started.partition(": ")[2])
    assert [name.strip() for name, _ in parts] == [
        "imports and devices", "data", "state", "first batch", "compiling and the first step"
    ]  # fmt: skip
    total = float(re.search(r"first step done after (\d+\.\d) s", started).group(1))
    assert abs(total - sum(float(seconds) for _, seconds in parts)) < 0.5
    assert "img/s: 0:" in progress[0] and "to go, done about" in progress[0]
    assert (
        progress[1].startswith("step 5/12 (41%)  loss ") and "%  ETA 0:0" in progress[1] and "img/s  input wait" in progress[1]
    )
    assert f"results     {workdir}/metrics.jsonl" in done.stdout
    assert f"checkpoint  {workdir}/checkpoints/12" in done.stdout.splitlines()[-1]
    assert checkpoints(workdir) == [10, 12]


@pytest.mark.parametrize("arguments", [("--batch_size=7",), ("--ema", "--step=best", "--batch_size=48")])
def test_evaluation_repeats_what_training_found(finished, arguments):
    workdir, _ = finished
    report, name = metrics(workdir)[-1], "eval_ema" if "--ema" in arguments else "eval"
    result = evaluate(workdir, *arguments)
    assert (result["split"], result["step"], result["count"], result["corrupt"]) == ("test", 12, 360, 0)
    for score in ("top1", "top5"):
        assert result[score] == report[f"{name}/{score}"] == result[f"{score}_count"] / 360
    assert result["loss"] == pytest.approx(report[f"{name}/loss"], rel=1e-5)


def test_evaluation_of_another_split_on_more_devices(finished):
    workdir, _ = finished
    result = evaluate(workdir, "--split=train", "--step=10", devices=4)
    assert (result["split"], result["step"], result["count"]) == ("train", 10, 1437)
    assert result["path"] == f"{workdir}/eval_train_10.json"


def test_finished_run_has_nothing_left_to_do(finished):
    workdir, first = finished
    before = (workdir / "metrics.jsonl").read_text()
    done = train(workdir, **DIGITS)
    assert (workdir / "metrics.jsonl").read_text() == before
    assert "nothing to do, step 12 was the last: eval/top1 0." in done.stdout and not done.stderr
    assert done.stdout.splitlines()[-2:] == first.stdout.splitlines()[-2:]


# --- image folder


@pytest.fixture
def folder(tmp_path):
    """12 + 12 training images and 6 + 5 for evaluation, of several sizes and formats."""
    rng = np.random.default_rng(0)
    for split, counts in {"train": (12, 12), "val": (6, 5)}.items():
        for name, count in zip(("ant", "bee"), counts):
            path = tmp_path / "images" / split / name
            path.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 255, (20 + i, 50 - 2 * i, 3), np.uint8)
                assert cv2.imwrite(str(path / f"{i}.{('png', 'jpg', 'JPEG')[i % 3]}"), image)
    return tmp_path / "images"


def two_classes(source, folder, **more):
    data = {"source": source, "dir": folder, "name": "tiny_images"}
    run = {"batch_size": 8, "eval_batch_size": 4, "max_steps": 4, "log_every_steps": 2, "num_epochs": 4.0}
    return run | {f"data__{key}": value for key, value in (data | more).items()}


def assert_counts(workdir, count, corrupt, *arguments):
    """Training's evaluation, in batches of four, and the evaluation's own agree."""
    report, result = metrics(workdir)[-1], evaluate(workdir, *arguments)
    assert (report["eval/count"], report["eval/corrupt"]) == (result["count"], result["corrupt"]) == (count, corrupt)
    assert result["top1"] == report["eval/top1"] == result["top1_count"] / count
    assert result["top5_count"] == count  # of two classes


def test_image_folder(folder, tmp_path):
    done = train(tmp_path / "run", **two_classes("folder", folder, eval_split="val"))
    assert "24 images, 2 classes" in done.stdout
    moved = folder.rename(tmp_path / "moved")
    assert_counts(tmp_path / "run", 11, 0, "--batch_size=3", f"--data_dir={moved}")


def test_corrupt_images_are_named_and_counted(folder, tmp_path):
    bad = [folder / "train" / "ant" / "0.png", folder / "val" / "bee" / "1.jpg"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    config = two_classes("folder", folder, eval_split="val")
    done = train(tmp_path / "run", **config)
    assert all(f"Skipped corrupt image {path}" in done.stderr for path in bad)
    assert metrics(tmp_path / "run")[1]["data/corrupt"] >= 1
    assert_counts(tmp_path / "run", 10, 1, "--batch_size=3")
    done = train(tmp_path / "stopped", code=2, **config | {"data__on_corrupt": "stop"})
    assert len(done.stderr.splitlines()) == 1 and f"corrupt image {bad[0]}" in done.stderr and "on_corrupt=skip" in done.stderr


# --- TFDS


PREPARE = """
import sys
import tensorflow_datasets as tfds
from tfds_sets import tiny_images
tfds.builder("tiny_images", data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


def test_tfds(tmp_path):
    """A prepared set needs its name and folder alone: the entries do not see the code that made it."""
    subprocess.run([sys.executable, "-c", PREPARE, str(tmp_path / "tfds")], cwd=ROOT / "tests" / "data", check=True)
    done = train(tmp_path / "run", **two_classes("tfds", tmp_path / "tfds", eval_split="validation"))
    assert "20 images, 2 classes" in done.stdout and not done.stderr
    assert_counts(tmp_path / "run", 7, 0, "--batch_size=3", "--split=validation[:100%]")


# --- mistakes


MISTAKES = {
    "unknown key": ({"modle.name": "h0"}, "no key 'modle'; did you mean \"model\""),
    "unknown nested key": ({"model.nme": "h0"}, "no key 'nme'; did you mean \"name\""),
    "unknown model": ({"model.name": "h9"}, "'h9' is unknown; use one of h0, h1"),
    "unknown operation": ({"data.randaugment_ops": "('colour',)"}, "'colour' is unknown; did you mean color"),
    "wrong type": ({"batch_size": "abc"}, "--config.batch_size=abc"),
    "tiny images": ({"data.image_size": 4}, "data.image_size=4 must be a whole number between 8"),
    "unknown split": ({"data.eval_split": "val"}, "no split 'val'; its splits are train, test"),
    "missing folder": ({"data.source": "folder", "data.dir": "/no/such"}, "data.dir '/no/such' is no folder"),
    "unknown data set": ({"data.source": "tfds", "data.name": "tiny_imgs"}, "'tiny_imgs' is neither a TFDS data set"),
    "nothing to train": ({"num_epochs": 0.0}, "num_epochs=0"),
}


def one_line(done):
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and not done.stdout
    return line


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_config_are_told_in_one_line(mistake, tmp_path):
    overrides, message = MISTAKES[mistake]
    overrides = [f"--config.{key}={value}" for key, value in overrides.items()]
    done = run(command("train", "--config=configs/digits.py", f"--workdir={tmp_path}/run", *overrides), code=2)
    assert message in one_line(done)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--config=configs/digits.py"], "--workdir is missing"),
    (["--workdir=x"], "--config is missing"),
    (["--config=configs/none.py", "--workdir=x"], "No such file or directory: 'configs/none.py'"),
    (["--config=configs/digits.py:smok", "--workdir=x"], "'smok' is unknown; write ':smoke', ':tiny', ':small' or nothing"),
    (["--config=halonet_jax/errors.py", "--workdir=x"], "without get_config()"),
    (["--config=configs/digits.py", "--workdir=x", "stray"], "unknown argument 'stray'"),
    (["--config=configs/digits.py", "--workdir=x", "--batch_size=8"], "'batch_size'"),
    (["--config=configs/digits.py", "--workdir=README.md/run"], "README.md/run cannot be written"),
])  # fmt: skip
def test_mistakes_in_the_flags_are_told_in_one_line(arguments, message):
    assert message in one_line(run(command("train", *arguments), code=2))
    assert not (ROOT / "x").exists()


def test_batch_that_devices_do_not_divide(tmp_path):
    done = run(train_command(tmp_path / "run", batch_size=100), code=2, devices=8)
    assert "batch_size=100 does not divide over 8 devices; use 96 or 104" in one_line(done)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="there is one core")
def test_each_core_is_a_device(tmp_path):
    cores = len(os.sched_getaffinity(0))
    for group, expected in ((1, max(n for n in range(1, cores + 1) if 32 % n == 0)), (32, 1)):
        done = train(tmp_path, 2, devices=0, model__bn_group_size=group, mesh__fsdp=1000)
        assert f"mesh.fsdp=1000 does not divide {expected} devices" in done.stderr


@pytest.mark.parametrize("arguments, message", [
    (["--split=val"], "digits has no split 'val'"),
    (["--step=3"], "no checkpoint of step 3"),
    (["--step=last"], "step='last' is no checkpoint"),
    (["--batch_size=-1"], "batch_size=-1 must be"),
])  # fmt: skip
def test_mistakes_in_an_evaluation(finished, arguments, message):
    done = run(command("evaluate", f"--workdir={finished[0]}", *arguments), code=2)
    assert message in one_line(done)


def test_evaluation_without_a_run_or_a_checkpoint(finished, tmp_path):
    evaluate_there = command("evaluate", f"--workdir={tmp_path}")
    assert "holds no config.json" in one_line(run(evaluate_there, code=2))
    (tmp_path / "config.json").write_text((finished[0] / "config.json").read_text())
    assert "no checkpoint in" in one_line(run(evaluate_there, code=2))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_other_data_on_resume(caplog):
    saved = Progress({"class_names": ["ant", "bee"]}, num_examples=24, batch_size=32, skipped_batches=3)
    now = Progress({"class_names": ["bee", "zebra"]}, num_examples=24, batch_size=32)
    with pytest.raises(errors.CheckpointError, match="was trained on 2 classes, the data has 2, and they differ in ant, zebra"):
        saved.continue_with(now)
    continued = saved.continue_with(Progress(saved.metadata, num_examples=32, batch_size=32))
    assert "num_examples was 24 and is now 32" in caplog.text
    assert (continued.num_examples, continued.skipped_batches) == (32, 3)
