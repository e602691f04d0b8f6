"""Studies: every run once, whatever ends a runner; the same report; mistakes in one line."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from entries import ROOT, TINY, command, environment, run

from halonet_jax import config as config_lib
from halonet_jax import errors
from halonet_jax.runtime import lease
from halonet_jax.studies import (
    Plot,
    Row,
    Study,
    devices,
    launch,
    measuring,
    pictures,
    plan,
    processes,
    report,
    results,
    runner,
    selection,
    spec,
)  # fmt: skip
from halonet_jax.studies.runner import Runner

FAKE = (sys.executable, str(ROOT / "tests" / "fake_train.py"))
DIGITS = "configs/digits.py"
FILE = """
from halonet_jax.studies import (
    Plot, Row, Study, devices, launch, measuring, pictures, plan, processes, report, results, runner, selection, spec,
)  # fmt: skip
RECIPE = "configs/digits.py"
STUDY = Study("A study", "Which?", "The first (table 1).", rows=(
    Row("b 4, h 1", RECIPE, {"model.block_size": 4}, published=79.9, source="table 1"),
    Row("before", RECIPE, counts=False),
    Row("after", RECIPE, {"label_smoothing": 0.0}, after="before"),
), seeds=(0, 1), plot=Plot("scatter"))
"""
ROWS, SEEDS = ("b-4-h-1", "before", "after"), (0, 1)


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("studies") / "study.py"
    path.write_text(FILE)
    return path


def rows(*more, **options):
    options = {"label": "one", "recipe": DIGITS} | options
    return Study("A study", rows=(Row(**options), *more), seeds=(0,))


def made(study, out, scale="imagenet"):
    spec.check(study, "study.py")
    return plan.make(study, "study.py", scale, str(out))


def perform(study, out, jobs=1, only=(), monkeypatch=None, faults=""):
    """Runs a study in this process with the fake training; its exit code and the lines it told."""
    if monkeypatch:
        monkeypatch.setenv("FAULTS", faults)
    lines, found = [], made(study, out)
    code = Runner(found, selection.select(found, only), jobs, tell=lines.append, train=FAKE).run()
    return code, lines, found


def start(file, out, *arguments):
    """Starts the study as a user does."""
    arguments = [*FAKE, f"--study={file}", f"--out={out}", "--scale=imagenet", *arguments]
    return subprocess.Popen(arguments, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def same_part(out):
    """What a report says that does not depend on time and machine, and the pictures."""
    text = (out / "report.md").read_text().partition(report.TIMES)[0]
    return text, *((out / f"report.{extension}").read_bytes() for extension in ("csv", "png", "svg"))


@pytest.fixture(scope="module")
def undisturbed(file, tmp_path_factory):
    """The folder of the study, run without a disturbance."""
    out = tmp_path_factory.mktemp("out") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        code, lines, found = perform(spec.load(str(file)), out)
        report.write(found)
    assert code == 0 and lines[-1].startswith("[6 of 6 done, 0 running, 0 failed] done: after, seed 1, top1 ")
    return out


def assert_each_ran_once(out):
    for row in ROWS:
        for seed in SEEDS:
            steps = (out / "runs" / row / f"seed{seed}" / "steps_done").read_text().split()
            again = len(steps) - len(set(steps))  # a kill between a step and its save repeats it
            assert sorted(set(map(int, steps))) == list(range(1, 11)) and again <= 3


# --- runners that die, stop, and share


def test_killed_and_stopped_runners_repeat_nothing(file, undisturbed, tmp_path):
    (tmp_path / "costs.json").write_bytes((undisturbed / "costs.json").read_bytes())
    draw = random.Random(4)
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start(file, tmp_path)
        process.stdout.readline()  # the first run has started
        time.sleep(draw.uniform(0.1, 1.0))
        process.send_signal(number)
        said, faults = process.communicate(timeout=30)
        assert process.returncode == (75 if number == signal.SIGTERM else -9), said + faults
    assert "stopped by SIGTERM; the same command goes on" in said
    finish(file, tmp_path, undisturbed)


def finish(file, out, undisturbed):
    """Goes on with the study in this process, and compares."""
    code, _, found = perform(spec.load(str(file)), out)
    report.write(found)
    assert code == 0
    assert_each_ran_once(out)
    assert same_part(out) == same_part(undisturbed)


def test_two_runners_on_one_folder(file, undisturbed, tmp_path):
    (tmp_path / "costs.json").write_bytes((undisturbed / "costs.json").read_bytes())
    process = start(file, tmp_path)
    assert "starting: " in process.stdout.readline()
    finish(file, tmp_path, undisturbed)
    said, faults = process.communicate(timeout=60)
    assert process.returncode == 0 and not faults and "6 of 6 runs done" in said, said + faults
    assert said.count("done: ") < 6  # this process had its share
    assert_each_ran_once(tmp_path)
    assert same_part(tmp_path) == same_part(undisturbed)


def test_finished_runs_never_run_again(file, undisturbed, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("steps_done")}
    code, lines, _ = perform(spec.load(str(file)), undisturbed)
    assert (code, lines) == (0, [])
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("steps_done")}


def test_claims_of_other_machines(tmp_path, monkeypatch):
    """One that is dead is taken over; one that lives is waited for."""
    monkeypatch.setattr(lease, "STALE", 0.5)
    monkeypatch.setattr(lease, "_POLL", 0.02)
    monkeypatch.setattr(runner, "LOOK_AGAIN", 0.1)
    found = made(rows(Row("two", DIGITS)), tmp_path)
    beats = [0, 0]

    def claim(index):
        folder = tmp_path / "claims" / found.runs[index].row.slug / "seed0"
        folder.mkdir(parents=True, exist_ok=True)
        holder = lease._Holder("x" * 32, "there", "there", 1, "1", "then", beats[index])
        (folder / "lease.new").write_text(json.dumps(dataclasses.asdict(holder)))
        (folder / "lease.new").replace(folder / "lease.json")

    def other_machine():
        while not ended.wait(0.05):
            beats[1] += 1
            claim(1)
            if beats[1] == 40:
                result = {"metrics": {"eval/top1": 0.5}, "images_per_second": None, "seconds": 1.0}
                results.write(found.runs[1].workdir / "result.json", json.dumps(result))

    claim(0)
    claim(1)
    found.runs[1].workdir.mkdir(parents=True)
    ended, lines = threading.Event(), []
    thread = threading.Thread(target=other_machine)
    thread.start()
    try:
        assert Runner(found, found.runs, tell=lines.append, train=FAKE).run() == 0
    finally:
        ended.set()
        thread.join()
    told = [line.partition("] ")[2].partition(", top1")[0] for line in lines]
    assert sorted(told) == [
        "another process runs two, seed 0",
        "done: one, seed 0",
        "done: two, seed 0",
        "starting: one, seed 0",
    ]
    assert not (found.runs[1].workdir / "steps_done").exists()


# --- rows that fail


def test_a_failed_row_does_not_stop_the_rest(file, tmp_path, monkeypatch):
    study = spec.load(str(file))
    code, lines, found = perform(study, tmp_path, jobs=2, monkeypatch=monkeypatch, faults="before:70")
    assert code == 1
    (line,) = (line for line in lines if "failed: before, seed 0" in line)
    assert "exit code 70: error: the loss is not finite (see" in line and "train.log)" in line
    assert any("failed: after, seed 1: it starts from before, seed 1, which failed" in line for line in lines)
    report.write(found, picture=False)
    text = (tmp_path / "report.md").read_text()
    assert "- before, seed 0: failed: error: the loss is not finite" in text and "| after | 0 of 2 | missing |" in text
    assert "| b 4, h 1 | 2 of 2 |" in text
    code, lines, _ = perform(study, tmp_path, monkeypatch=monkeypatch)  # a second start tries again
    assert code == 0 and sum(" done: " in line for line in lines) == 4


def test_what_may_go_on_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr("halonet_jax.studies.runner.POLL", 0.01)
    code, lines, _ = perform(rows(), tmp_path, monkeypatch=monkeypatch, faults="one:137")
    assert code == 1 and sum("starting again" in line for line in lines) == 4


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "seed0").write_text("")
    code, lines, _ = perform(rows(Row("two", DIGITS)), tmp_path)
    assert code == 1 and "failed: one, seed 0" in " ".join(lines) and "done: two" in " ".join(lines)


# --- the study file, rows and the selection


FAULTS = {
    "no such file": (None, "is no file"),
    "syntax": ("x = (", "has an error in line 1"),
    "its own error": ("x = 1\ny = 1 / 0", "has an error in line 2: ZeroDivisionError"),
    "no study": ("x = 1", "defines no STUDY"),
    "exits": ("raise SystemExit(3)", "line 1: SystemExit: 3"),
    "unknown field": ("from halonet_jax.studies import Row\nRow('a', reciep='b')", "line 2: TypeError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_file(fault, tmp_path):
    text, message = FAULTS[fault]
    if text:
        (tmp_path / "a.py").write_text(text)
    with pytest.raises(errors.ConfigError, match=message):
        spec.load(str(tmp_path / "a.py"))


@pytest.mark.parametrize("study, message", [
    (rows(Row("one")), "two rows have the label 'one'"),
    (rows(Row("One")), "name the same folder one"),
    (rows(label="½"), "no letter"),
    (Study("t"), "at least one Row"),
    (Study("t", rows=(Row("a"),), seeds=()), "whole numbers from 0"),
    (Study("t", rows=(Row("a"),), seeds=3), "whole numbers from 0"),
    (Study("t", rows=(Row("a"),), seeds=(1, 1)), "a seed twice"),
    (rows(published=0.799), "published=0.799 of row 'one' must be in percent"),
    (rows(overrides=None), "overrides=None of row 'one' must be a dict"),
    (rows(recipes={"tinny": DIGITS}), "did you mean 'tiny'"),
    (Study("t", rows=Row("a")), "at least one Row"),
    (rows(after="two"), "after of 'one' is 'two', which is no row"),
    (rows(Row("two", after="one"), after="two"), "waits for itself: one after two after one"),
    (Study("t", rows=(Row("abc"),), baseline="abd"), "did you mean 'abc'"),
    (Study("t", rows=(Row("a"),), plot=Plot("scatter", x="params")), "x='params' is unknown; did you mean 'parameters'"),
])  # fmt: skip
def test_faults_of_rows_together(study, message):
    with pytest.raises(errors.ConfigError, match=message):
        spec.check(study, "study.py")


@pytest.mark.parametrize("options, message", [
    ({"recipe": "configs/digit.py"}, "did you mean 'configs/digits.py'"),
    ({"recipe": ""}, "has no recipe"),
    ({"recipe": "halonet_jax/errors.py"}, "get_config"),
    ({"overrides": {"model.blok_size": 4}}, "no key 'model.blok_size'; did you mean 'model.block_size'"),
    ({"overrides": {"seed.x": 4}}, "no key 'seed.x'"),
    ({"overrides": {"model.block_size": "four"}}, "wrong type"),
    ({"overrides": {"num_epochs": -1.0}}, "num_epochs=-1.0 must be"),
    ({"overrides": {"model.name": "h9"}}, "'h9' is unknown"),
])  # fmt: skip
def test_a_broken_row_is_named_and_the_others_run(options, message, tmp_path):
    found = made(rows(Row("two", DIGITS), Row("three", DIGITS, after="one"), **options), tmp_path)
    assert message in found.broken["one"] and "\n" not in found.broken["one"]
    assert found.broken["three"] == "it starts from 'one', which has a fault"
    assert [run.name for run in found.runs] == ["two, seed 0"]


def test_changed_config_is_refused(tmp_path):
    perform(rows(), tmp_path)
    before = made(rows(), tmp_path)
    (before.runs[0].workdir / "config.json").write_text(config_lib.to_json(before.runs[0].config))
    made(rows(overrides={"data.num_threads": 1}), tmp_path)  # changes no result
    with pytest.raises(
        errors.ConfigError, match=r"another config \(num_epochs: 40.0 -> 2.0\); put the old .* or give another --out"
    ):
        made(rows(overrides={"num_epochs": 2.0}), tmp_path)


def test_only(file):
    found = plan.make(spec.load(str(file)), str(file), "imagenet", "/nowhere")
    names = lambda *only: [run.name for run in selection.select(found, only)]
    assert names("b 4, h 1") == names("b-4-h-1") == names("b 4*") == ["b 4, h 1, seed 0", "b 4, h 1, seed 1"]
    assert names("b 4, h 1/seed1,after/seed0") == names("after/seed0", "b-*/seed1") == ["b 4, h 1, seed 1", "after, seed 0"]
    for only, message in (("befor", "did you mean 'before'"), ("after/seed3", "the seeds are 0, 1")):
        with pytest.raises(errors.ConfigError, match=message):
            names(only)


def test_only_without_the_row_before(file, tmp_path):
    code, lines, _ = perform(spec.load(str(file)), tmp_path, only=["after/seed0"])
    assert code == 1 and "it starts from before, seed 0, which is not done and which --only leaves out" in lines[0]


def test_scales(tmp_path, monkeypatch):
    monkeypatch.setitem(spec.SUFFIXES, "tiny", ":smoke")
    row = Row("one", "none.py", {"num_epochs": 1.0}, tiny={"batch_size": 8}, recipes={"tiny": DIGITS})
    study = Study("A study", rows=(row,), seeds=(0,), tiny={"batch_size": 4, "label_smoothing": 0.0})
    (found,) = made(study, tmp_path, "tiny").runs
    assert found.arguments[0] == f"--config={DIGITS}:smoke" and "--config.batch_size=8" in found.arguments
    assert (found.config.batch_size, found.config.label_smoothing, found.config.num_epochs) == (8, 0.0, 0.05)
    (tmp_path / "study.json").write_text(json.dumps({"title": "A study", "scale": "tiny"}))
    with pytest.raises(errors.ConfigError, match="holds this study at scale tiny; give --scale=tiny, or another --out"):
        made(study, tmp_path)


# --- the report


def test_statistics():
    scores = lambda *values: results.Scores(values)
    found = results.compare(scores(11.0, 12.0, 13.0), scores(7.0, 8.0, 9.0))
    assert (found.difference, found.verdict) == (4.0, "yes")
    assert found.low == pytest.approx(1.733, abs=1e-3) and found.high == pytest.approx(6.267, abs=1e-3)  # t(4) = 2.776
    assert results.compare(scores(8.0, 12.0), scores(7.0, 9.0)).verdict == "no"
    assert results.compare(scores(8.0), scores(7.0, 9.0)).verdict.startswith("unknown")
    assert results.compare(scores(), scores(7.0)) is None
    assert pictures._front([(1, 5), (2, 4), (3, 6), (3, 7)], more=False) == [(1, 5), (3, 7)]
    assert pictures._front([(1, 5), (2, 6), (3, 4)], more=True) == [(2, 6), (3, 4)]


def test_report_beside_the_paper(undisturbed, tmp_path):
    text = (undisturbed / "report.md").read_text()
    assert "| row | seeds | top-1, % | parameters | multiply-adds | paper, % | ours − paper |" in text
    assert text.index("Run before, and not compared:") < text.index("| before |") < text.index("## Compared with b 4, h 1")
    assert "| abc |" in text.partition(report.TIMES)[2] and "2 of 2" in text
    assert (undisturbed / "runs.csv").read_text().count("\n") == 7


def test_report_of_nothing(file, tmp_path, monkeypatch):
    monkeypatch.setitem(spec.SUFFIXES, "tiny", ":smoke")
    report.write(plan.make(spec.load(str(file)), str(file), "tiny", str(tmp_path)))
    text = (tmp_path / "report.md").read_text()
    assert "0 of 6 runs are done" in text and "| b 4, h 1 | 0 of 2 | missing |" in text and "paper, ImageNet, %" in text
    assert "- b 4, h 1, seed 1: not done" in text


def test_speed_beside_the_paper(tmp_path, monkeypatch, capsys):
    study = Study("A study", rows=(Row("one", DIGITS, published_speed="1.9 × B7"), Row("two", DIGITS)), seeds=(0, 1))
    found = made(study, tmp_path)
    about = {"device": "1 × X", "batch_size": 8, "inference_seconds_per_image": 0.001, "train_seconds_per_image": 0.0042}

    def by_clock(run):
        if run.row.label == "two":
            raise RuntimeError("out of\nmemory")
        return about

    monkeypatch.setattr(measuring, "by_clock", by_clock)
    assert measuring.measure(found, found.runs, "") == 1
    assert capsys.readouterr().out.splitlines() == [
        "one: inference 1 ms/image, training step 4.2 ms/image on 1 × X, batch 8", "failed: two: out of memory",
    ]  # fmt: skip
    report.write(found, picture=False)
    assert "| one | – | 1 | 4.2 | 1 × X | 8 | 1.9 × B7 |" in (tmp_path / "report.md").read_text()


# --- clusters


def test_slurm(file, tmp_path, monkeypatch, capsys):
    found = plan.make(spec.load(str(file)), str(file), "imagenet", str(tmp_path / "out"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert launch.slurm(found, found.runs, "--ntasks-per-node=2 --gpus-per-node=2", False) == 0
    printed = capsys.readouterr().out
    script = tmp_path / "out" / "slurm_array.sh"
    assert f"sbatch --ntasks-per-node=2 --gpus-per-node=2 {script}" in printed and "2 runs start from runs" in printed
    assert "#SBATCH --array=0-3\n" in script.read_text()
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    job = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "3"}
    done = subprocess.run(["bash", script], env=os.environ | job, capture_output=True, text=True)
    assert done.returncode == 0 and f"--workdir={tmp_path}/out/runs/b-4-h-1/seed1 --config.seed=1" in done.stdout, done.stderr
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho no GPUs >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(errors.ConfigError, match="sbatch refused the job: no GPUs"):
        launch.slurm(found, found.runs, "", False)


def test_pod(file, capsys, tmp_path):
    found = plan.make(spec.load(str(file)), str(file), "imagenet", str(tmp_path))
    with pytest.raises(errors.ConfigError, match="give --out=gs://"):
        launch.pod(found, found.runs, "", False)
    study = rows()
    config = made(study, tmp_path).runs[0].config
    arguments = ("--config=configs/digits.py", "--workdir=gs://bucket/a b")
    (run_,) = [plan.Run(study.rows[0], 0, config, tmp_path / "none", arguments)]
    cloud = plan.Plan(study, "study.py", "imagenet", "gs://bucket", (run_,), {})
    assert launch.pod(cloud, [run_], "--name=h4", False) == 0
    printed = capsys.readouterr().out
    assert "scripts/launch/pod.sh resume --name=h4 -- --config=configs/digits.py '--workdir=gs://bucket/a b'" in printed


def test_cores_are_shared_out(monkeypatch):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core")
    shares = devices.share(2)
    cores = [set(own.split(",")) for _, own in shares]
    assert cores[0] and cores[1] and not cores[0] & cores[1]
    with pytest.raises(errors.ConfigError, match="CPU cores of this machine; use at most"):
        devices.share(4096)
    core = cores[1].pop()
    see = (sys.executable, "-c", "import os; print(os.sched_getaffinity(0))")
    done = subprocess.run(
        [sys.executable, "-I", processes.LAUNCHER, str(os.getpid()), core, *see], capture_output=True, text=True
    )
    assert done.stdout == f"{{{core}}}\n"


def test_launcher_without_a_parent():
    done = subprocess.run([sys.executable, "-I", processes.LAUNCHER, "1", "-", "false"])
    assert done.returncode == 75


# --- the command


def test_real_study(tmp_path):
    """Two rows in the real training loop, with a linear model. The config that a run sees is the one that was checked."""
    small = TINY | {"num_epochs": 1.0, "max_steps": 2, "eval_batch_size": 360}
    (tmp_path / "a.py").write_text(
        "from halonet_jax.studies import Row, Study\n"
        f"SMALL, RECIPE = {small}, {DIGITS!r}\n"
        "ROWS = (Row('crop', RECIPE, SMALL), Row('no crop', RECIPE, SMALL | {'data.crop_scale': (1.0, 1.0)}))\n"
        "STUDY = Study('Real', rows=ROWS, seeds=(0,))\n"
    )
    arguments = [f"--study={tmp_path}/a.py", "--scale=imagenet", f"--out={tmp_path}/out"]
    train = {"TRAIN": str(ROOT / "tests" / "linear_train.py")}
    done = subprocess.run([*FAKE, *arguments], cwd=ROOT, env=environment() | train, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and "2 of 2 runs done" in done.stdout, done.stdout + done.stderr
    found = plan.make(spec.load(str(tmp_path / "a.py")), "a.py", "imagenet", str(tmp_path / "out"))
    for each in found.runs:
        seen = config_lib.from_json((each.workdir / "config.json").read_bytes())
        assert config_lib.differences(seen, each.config) == []
    row = (tmp_path / "out" / "report.csv").read_text().splitlines()[1].split(",")
    assert row[:3] == ["crop", "1", "1"] and 0 <= float(row[3]) <= 100 and int(row[6]) > 1000


def test_mistakes_of_the_command(file, tmp_path):
    done = run(command("study", f"--study={file}", "--only=befor", "--scale=imagenet", f"--out={tmp_path}/out"), code=2)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and "did you mean 'before'" in done.stderr
    assert not (tmp_path / "out").exists()
