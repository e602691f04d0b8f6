"""A workdir with damaged or foreign files, one that another run holds, and one of an older version.

Runs have the linear model of `toy_boxes.py`, in this process. Damaged arrays and full disks: `test_faults.py`.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest
import toy_boxes  # noqa: F401  (registers the task)

from halonet_jax import config as config_lib
from halonet_jax import errors, evaluate, train, weights
from halonet_jax.runtime import lease, plots, reporting, storage
from halonet_jax.runtime import workdir as workdir_lib
from halonet_jax.training import checkpoint_files

DEEP = b"[" * 100_000 + b"]" * 100_000


def config(steps):
    """A run that saves after every second step and evaluates after every fourth."""
    config = config_lib.digits()
    config.task, config.batch_size, config.eval_batch_size, config.tensorboard = "digit_boxes", 360, 360, False
    config.max_steps, config.num_epochs, config.eval_every_epochs, config.schedule.warmup_epochs = steps, 100.0, 1.0, 0.0
    config.log_every_steps, config.checkpoint_every_steps, config.checkpoints_to_keep = 1, 2, 3
    return config


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of 8 steps with checkpoints 4, 6 and 8, of which 4 and 8 were evaluated."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    assert train.train(config(8), str(workdir)).step == 8
    assert sorted(path.name for path in (workdir / "checkpoints").glob("*/score.json")) == ["score.json"] * 2
    return workdir


@pytest.fixture(scope="module")
def whole(stopped, tmp_path_factory):
    """The reports of the same run, resumed without a fault."""
    workdir = shutil.copytree(stopped, tmp_path_factory.mktemp("whole") / "run")
    train.train(config(10), str(workdir))
    return numbers(workdir)


@pytest.fixture
def workdir(stopped, tmp_path):
    """A copy of that run, to be damaged and resumed."""
    return shutil.copytree(stopped, tmp_path / "run")


def numbers(workdir):
    """All reports, less rates."""
    reports = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in report.items() if key not in ("images_per_second", "input_wait")} for report in reports]


# --- damaged files


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace(path, content):
    """Puts bytes, a folder (None) or a link to nothing ("link") in a file's or folder's place."""
    remove(path)
    if content is None:
        path.mkdir()
    elif content == "link":
        path.symlink_to(path.parent / "nowhere" / "file")
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


OTHER_JSON = (b"", b"{", b"null", b"[5]", b'"text"', b"7" * 9999, b"1e999", b'{"a": NaN}', b"\xff\xfe{}", DEEP)
CONFIGS = (*OTHER_JSON, b'{"model": 5}', b'{"batch_size": "many"}', b'{"batch_size": 1e999}', b'{"no_such_knob": 1}', None, "link")


@pytest.mark.parametrize("content", CONFIGS, ids=lambda content: repr(content)[:20])
def test_damaged_config(content, workdir, caplog):
    """Training compares it with its own and writes it anew. An evaluation cannot do without it."""
    replace(workdir / "config.json", content)
    with pytest.raises(errors.ConfigError, match=r"config\.json") as found:
        evaluate.evaluate(str(workdir))
    assert len(str(found.value).splitlines()) == 1 and len(str(found.value)) < 600
    mine = workdir_lib.open_workdir(config(8), str(workdir))
    assert content == "link" or "cannot be compared with this workdir's last run" in caplog.text
    if content is None:
        with pytest.raises(errors.StorageError, match="move away what is in its place"):
            workdir_lib.record_run(config(8), mine, 1)
    else:
        workdir_lib.record_run(config(8), mine, 1)
        assert json.loads((workdir / "config.json").read_text())["max_steps"] == 8


LINES = (
    *OTHER_JSON[1:], b"{}", b'{"step": null}', b'{"step": "3"}', b'{"step": [3], "eval/mean_overlap": 1}', b'{"step": true}',
    b'{"step": 3.5}', b'{"step": 3, "eval/mean_overlap": {"a": 1}}', b'{"step": 3, "train/loss": "low"}',
    b'{"step": 3, "train/loss": ' + b"9" * 1000 + b"}", b'{"step": 3, "eval/mean\xff_overlap": 0.5}', 
    b'{"step": 3, "x": ' + DEEP + b"}", b'{"step": 3, "eval/mean_ove',
)  # fmt: skip


def test_lines_that_are_no_reports(workdir, whole, caplog):
    """They are left out, and a resumed run drops them."""
    path = workdir / "metrics.jsonl"
    newest = reporting.last_evaluation(workdir)
    assert newest["step"] == 8 and 0 <= newest["eval/mean_overlap"] <= 1
    good = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*LINES, *good, b"", *LINES]))
    assert len(reporting.read_metrics(workdir)) == len(good)
    assert caplog.text.count("has a torn line, left out") == 2 * len(LINES)
    assert reporting.last_evaluation(workdir) == newest
    plots.learning_curve([workdir], workdir / "curve.png", "mean_overlap")
    assert train.train(config(10), str(workdir)).step == 10
    assert numbers(workdir) == whole


SCORES = (*OTHER_JSON, b'{"step": 8, "score": 9.0, "checksum": 1}', b'{"score": 1}', None, "link")


@pytest.mark.parametrize("name", ["score.json", "metrics/metrics"])
def test_damaged_scores(name, workdir, whole):
    """A checkpoint whose score cannot be read counts as not evaluated. Whatever is wrong with it, runs go on."""
    for content in SCORES:
        for step in (4, 6):
            remove(workdir / "checkpoints" / str(step) / "score.json")
            (workdir / "checkpoints" / str(step) / "metrics").mkdir(exist_ok=True)
            replace(workdir / "checkpoints" / str(step) / name, content)
        assert weights.load(str(workdir), step="best").step == 8, content
        assert weights.load(str(workdir), step=4).step == 4
    result = train.train(config(10), str(workdir))
    assert result.step == 10 and result.best_step in (8, 10) and numbers(workdir) == whole


@pytest.mark.parametrize("content, ends", [(b"", True), ("link", True), (None, False)])
def test_something_in_the_place_of_damaged_checkpoints(content, ends, workdir):
    """It matters only where a checkpoint is to be set aside."""
    replace(workdir / "damaged_checkpoints", content)
    assert train.train(config(8), str(workdir)).step == 8
    (workdir / "checkpoints" / "8" / "position" / "metadata").write_text("{")
    if ends:
        with pytest.raises(errors.CheckpointError, match="cannot be set aside .*; move that file or link away, then"):
            train.train(config(8), str(workdir))
        (workdir / "damaged_checkpoints").unlink()
    assert train.train(config(8), str(workdir)).step == 8
    assert [path.name for path in (workdir / "damaged_checkpoints").iterdir()] == ["8"]


@pytest.mark.parametrize("content, remedy", [(b"", "move it away"), ("link", "make that folder, or delete the link")])
def test_something_in_the_place_of_checkpoints(content, remedy, workdir):
    replace(workdir / "checkpoints", content)
    for entry in (lambda: train.train(config(8), str(workdir)), lambda: evaluate.evaluate(str(workdir))):
        with pytest.raises(errors.ConfigError, match=remedy):
            entry()
    assert not (workdir / "lease.json").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.jsonl.tmp", "run.json"])
def test_folder_in_the_place_of_a_file(name, workdir):
    replace(workdir / name, None)
    message = f"{name.removesuffix('.tmp')} cannot be written .*move away what is in its place"
    with pytest.raises(errors.StorageError, match=message):
        train.train(config(8), str(workdir))


# --- older versions, other paths


def test_checkpoints_of_version_0_1_0(workdir, whole):
    """They kept class names and checksums in one object, and the score as the metric "top1" in a file of Orbax."""
    for path in (workdir / "checkpoints").iterdir():
        record, sums = checkpoint_files.read_record(path)
        record["class_names"] = record.pop("metadata")["class_names"]
        (path / "position" / "metadata").write_text(json.dumps(record | {"checksums": sums}))
        (path / "score.json").unlink(missing_ok=True)
        (path / "metrics").mkdir()
        scores = {"4": {"top1": 0.9}, "6": {}, "8": {"top1": 0.5}}  # 6 was not evaluated
        (path / "metrics" / "metrics").write_text(json.dumps(scores[path.name]))
    assert weights.load(str(workdir), step="best").step == 4
    assert train.train(config(10), str(workdir)).best_step == 4
    assert numbers(workdir) == whole
    # The best stays, and so do the newest; what this version saved has the new form.
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [4, 6, 8, 10]
    assert json.loads((workdir / "checkpoints" / "10" / "score.json").read_text())["step"] == 10


@pytest.mark.parametrize("name", ["~/run", "lr=[0.1,0.2] a*b?{c} %20 ü"])
def test_paths(name, stopped, whole, tmp_path, monkeypatch):
    """The home folder, and characters that libraries take for patterns: trained, resumed, evaluated and loaded there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / ("home/run" if name == "~/run" else name)
    shutil.copytree(stopped, path)
    result = train.train(config(10), name)
    assert result.workdir == str(path) and numbers(path) == whole
    assert evaluate.evaluate(name)["step"] == weights.load(name).step == 10
    assert reporting.last_evaluation(name)["step"] == 10
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("name, message", [
    ("", "workdir is empty"), ("a\\b", "has a backslash"), ("a\\b/run", "has a backslash"), ("~no_such_user/run", "leads nowhere"),
    ("\udcff", "leads nowhere"),
])  # fmt: skip
def test_paths_that_cannot_be(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for entry in (lambda: train.train(config(2), name), lambda: evaluate.evaluate(name), lambda: weights.load(name)):
        with pytest.raises(errors.ConfigError, match=message):
            entry()
    assert not list(tmp_path.iterdir())


def test_compile_cache_follows_the_workdir(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        for name in ("first", "second"):
            jax.clear_caches()
            train.train(config(2), str(tmp_path / name))
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / name / "compile_cache")
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "the user's"))
        workdir_lib.use_compile_cache(tmp_path / "third")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "the user's")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# --- the lease


@pytest.fixture
def quick(monkeypatch):
    """Heartbeats in hundredths of a second."""
    for name, seconds in (("HEARTBEAT", 0.05), ("STALE", 1.0), ("_POLL", 0.02), ("_SETTLE", 0.02)):
        monkeypatch.setattr(lease, name, seconds)


def files(workdir):
    return {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def test_second_run_is_refused(workdir):
    held = lease.Lease(workdir)
    held.acquire()
    before = files(workdir)
    with pytest.raises(errors.ConfigError) as found:
        train.train(config(10), str(workdir))
    message = str(found.value)
    assert f"in use by another run (host {os.uname().nodename}, process {os.getpid()}, started 20" in message
    assert "give another --workdir, or wait until that run ends" in message
    assert files(workdir) == before
    held.release()
    assert not [thread for thread in threading.enumerate() if "lease" in thread.name]
    assert train.train(config(10), str(workdir)).step == 10
    assert not list(workdir.glob("lease*"))


def test_of_many_that_start_at_once_one_wins(tmp_path, quick):
    """Each in turn finds no lease, a dead one, and a torn one."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    holder = lease._Holder("x", "here", lease._machine(), dead.pid, "5", "then")
    for content in (None, json.dumps(dataclasses.asdict(holder)), "", "{", "[]", '{"id": 5}', DEEP.decode()):
        if content is not None:
            (tmp_path / "lease.json").write_text(content)
        leases, won, barrier = [lease.Lease(tmp_path) for _ in range(8)], [], threading.Barrier(8)

        def take(one, won=won, barrier=barrier):
            barrier.wait()
            try:
                one.acquire()
                won.append(one)
            except errors.ConfigError as error:
                assert "in use" in str(error)

        threads = [threading.Thread(target=take, args=(one,)) for one in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1, content
        for one in leases:
            one.release()
        assert not list(tmp_path.iterdir())


HOLD = """
import sys
from etils import epath
from halonet_jax.runtime import lease
lease.Lease(epath.Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_killed_run_holds_nobody_up(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGSTOP)  # it lives, whatever its heartbeat says
    with pytest.raises(errors.ConfigError, match=f"process {process.pid}, started"):
        lease.Lease(tmp_path).acquire()
    process.kill()
    process.wait()
    begin = time.monotonic()
    held = lease.Lease(tmp_path)
    held.acquire()
    assert time.monotonic() - begin < 1
    held.release()


def test_run_on_another_machine_is_judged_by_its_heartbeat(tmp_path, quick, monkeypatch, caplog):
    theirs = lease.Lease(tmp_path)
    monkeypatch.setattr(lease, "_machine", lambda: "another machine")
    theirs.acquire()
    monkeypatch.undo()
    monkeypatch.setattr(lease, "STALE", 0.5)
    monkeypatch.setattr(lease, "_POLL", 0.02)
    looks = []
    with pytest.raises(errors.ConfigError, match="is in use by another run"):
        lease.Lease(tmp_path).acquire(lambda: looks.append(1))
    assert looks and "Waiting up to" in caplog.text
    monkeypatch.setattr(theirs, "_renew", lambda: None)  # as where it died, or was suspended
    ours = lease.Lease(tmp_path)
    ours.acquire()
    monkeypatch.undo()
    theirs._renew()
    with pytest.raises(errors.StorageError, match="another run took over workdir .*leave the workdir to the other run"):
        theirs.check()
    theirs.release()  # which leaves the other's lease alone
    assert json.loads((tmp_path / "lease.json").read_text())["id"] == ours._mine.id
    ours.check()
    ours.release()


def test_release_ends_a_wait(tmp_path, monkeypatch):
    holder = lease._Holder("x", "elsewhere", "another machine", 1, "5", "then")
    (tmp_path / "lease.json").write_text(json.dumps(dataclasses.asdict(holder)))
    waiting, watched = lease.Lease(tmp_path), threading.Event()
    monkeypatch.setattr(lease, "_POLL", 60)
    ended = []

    def wait():
        with pytest.raises(errors.Stopped):
            waiting.acquire(watched.set)
        ended.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    assert watched.wait(10)
    waiting.release()
    thread.join(10)
    assert ended and json.loads((tmp_path / "lease.json").read_text())["id"] == "x"


def test_deleted_lease_is_written_again(tmp_path, quick):
    held = lease.Lease(tmp_path)
    held.acquire()
    (tmp_path / "lease.json").unlink()
    deadline = time.monotonic() + 10
    while not (tmp_path / "lease.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(errors.ConfigError, match="in use"):
        lease.Lease(tmp_path).acquire()
    held.release()
    assert not list(tmp_path.iterdir())


# --- what reports share with checkpoints


def test_collected_metrics_are_a_copy():
    metrics = reporting.StepMetrics()
    metrics.append(1, {"loss": jax.numpy.ones(()), "grad_norm": jax.numpy.ones(())})
    saved = metrics.collected()
    metrics.append(2, {"loss": jax.numpy.ones(()), "grad_norm": jax.numpy.ones(())})
    metrics.collected()[0]["loss"] = 9.0
    assert saved == [{"loss": 1.0, "grad_norm": 1.0}] and metrics.pop_means() == {"train/loss": 1.0, "train/grad_norm": 1.0}


def test_start_up_is_told_once(capsys):
    clock = reporting.StartUpClock()
    clock.lap("data")
    clock.finish("first step")
    clock.lap("first batch")  # after a roll-back
    clock.finish("first step")
    assert capsys.readouterr().out.count("first step done after") == 1


@pytest.mark.parametrize("error, remedy", [
    (OSError(28, "No space left on device"), "make room"),
    (OSError(30, "Read-only file system"), "permission"),
    (PermissionError(13, "Permission denied"), "permission"),
    (IsADirectoryError(21, "Is a directory"), "move away"),
    (ValueError("RESOURCE_EXHAUSTED: No space left on device"), "make room"),
    (OSError(5, "Input/output error"), "see that the storage works"),
])  # fmt: skip
def test_remedies(error, remedy):
    assert remedy in storage.remedy(error)
