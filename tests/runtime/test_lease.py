"""One run at a time in a workdir; a killed one does not stand in the way."""

import concurrent.futures
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from halonet_jax.errors import ConfigError
from halonet_jax.runtime import lease

HOLD = "import sys, time; from etils import epath; from halonet_jax.runtime import lease\nlease.BEAT = 0.1\n" + (
    "with lease.hold(epath.Path(sys.argv[1])): print('held', flush=True); time.sleep(float(sys.argv[2]))"
)


def start(workdir, seconds):
    """Starts a process that holds the lease."""
    arguments = [sys.executable, "-c", HOLD, str(workdir), str(seconds)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n", process.stderr.read()
    return process


def content(workdir):
    return json.loads((workdir / "run.lease").read_text())


def elsewhere(workdir, token="other", **changes):
    """A lease of a process on another machine."""
    other = {"host": "node7", "pid": 17, "started": "today", "machine": "node7 …", "token": token, "beat": 0} | changes
    temporary = workdir / f"{token}.tmp"
    temporary.write_text(json.dumps(other))
    temporary.replace(workdir / "run.lease")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "EXPIRES", 1.0)


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    process = start(tmp_path, 600)
    held = content(tmp_path)
    message = f"in use by process {process.pid} on {held['host']}, started {held['started'][:10]}.*; stop that run or wait"
    for _ in range(2):
        with pytest.raises(ConfigError, match=message), lease.hold(tmp_path):
            pass
    process.kill()  # and not waited for: a process that has ended, but is listed
    while lease._process_started(process.pid) is not None:
        time.sleep(0.01)
    with lease.hold(tmp_path):
        assert content(tmp_path)["pid"] == os.getpid()
        with pytest.raises(ConfigError, match="in use"), lease.hold(tmp_path):  # by another run of this very process
            pass
    process.communicate()
    assert not list(tmp_path.iterdir())
    assert not any("lease" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("torn", [b"", b"{", b"[]", b"\xff", b'{"pid": 1}', b"[" * 100_000])
def test_a_damaged_lease_holds_nothing(tmp_path, torn):
    (tmp_path / "run.lease").write_bytes(torn)
    with lease.hold(tmp_path):
        assert content(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("changes", [{"pid": os.getpid(), "process_started": "0"}, {"pid": None}, {"pid": "x"}, {"pid": 2**40}])
def test_a_number_that_now_is_another_process(tmp_path, changes):
    elsewhere(tmp_path, machine=lease._machine(), **changes)
    with lease.hold(tmp_path):
        assert content(tmp_path)["token"] != "other"


def test_a_run_elsewhere_counts_as_dead_without_a_sign_of_life(tmp_path, caplog):
    elsewhere(tmp_path)
    begin = time.monotonic()
    with lease.hold(tmp_path):
        assert time.monotonic() - begin > 0.8 and "waiting up to 1 s" in caplog.text
    elsewhere(tmp_path)
    os.utime(tmp_path / "run.lease", (1e9, 1e9))  # long ago: it does not wait
    caplog.clear()
    with lease.hold(tmp_path):
        assert not caplog.text


def test_a_run_elsewhere_that_lives_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRES", 30.0)
    elsewhere(tmp_path)
    beat = threading.Timer(0.5, elsewhere, (tmp_path,), {"beat": 1})
    beat.start()
    with pytest.raises(ConfigError, match="in use by process 17 on node7, started today"), lease.hold(tmp_path):
        pass
    beat.join()


def test_a_suspended_run_that_lost_its_lease_ends(tmp_path):
    process = start(tmp_path, 600)
    elsewhere(tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 74 and "lost the lease" in errors and content(tmp_path)["token"] == "other"


def test_of_two_at_once_one_gets_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "SETTLE", 1.0)
    barrier, entered = threading.Barrier(2), []

    def run():
        barrier.wait()
        try:
            with lease.hold(tmp_path):
                entered.append(1)
                barrier.wait(60)
        except ConfigError:
            barrier.wait(60)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(run), pool.submit(run)]:
            done.result()
    assert entered == [1]


def test_a_folder_in_place_of_the_lease(tmp_path):
    (tmp_path / "run.lease").mkdir()
    with pytest.raises(ConfigError, match="cannot be written .*; move away what is in its place"), lease.hold(tmp_path):
        pass
