"""What a run does where something breaks: what it says, what it keeps, and that the same command goes on from there.

Most runs have a linear model, see `linear_train.py`. Tested elsewhere: mistakes in flags, config and data, broken images
(`test_entries.py`, `data/test_sources.py`, `data/test_loader.py`), another model or other data on resume, diverging training,
signals to one process, also while it compiles (`test_resume.py`).
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from entries import (
    ROOT,
    checkpoints,
    command,
    environment,
    join_flags,
    metrics,
    run,
    start,
    start_processes,
    train,
    train_command,
    wait_for,
)  # fmt: skip

from halonet_jax.runtime import distributed, lease
from halonet_jax.training import checkpoint_files

STEPS = 20
RUN = {
    "entry": "tests/linear_train.py", "max_steps": STEPS, "log_every_steps": 4, "checkpoint_every_steps": 4,
    "eval_every_epochs": 0.0,
}  # fmt: skip
ENDLESS = RUN | {"max_steps": 10**6, "num_epochs": 1e5, "log_every_steps": 50, "checkpoint_every_steps": 100}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The reports of a run without a fault."""
    workdir = tmp_path_factory.mktemp("whole")
    train(workdir, **RUN)
    return numbers(workdir)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of 12 steps, with checkpoints 8 and 12."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    train(workdir, **(RUN | {"max_steps": 12}))
    assert checkpoints(workdir) == [8, 12]
    return workdir


@pytest.fixture
def workdir(stopped, tmp_path):
    """A copy of that run, to be damaged and resumed."""
    return shutil.copytree(stopped, tmp_path / "run")


def numbers(workdir, until=STEPS):
    """The reports of training, less rates."""
    varying = ("images_per_second", "input_wait")
    reports = [report for report in metrics(workdir) if "train/loss" in report and report["step"] <= until]
    return [{key: value for key, value in report.items() if key not in varying} for report in reports]


def error(done):
    """The last line, which is the message."""
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: "), done.stderr
    return line


def until(process, text):
    assert any(text in line for line in process.stdout), process.stderr.read()


# --- files of the workdir


def lose_arrays(checkpoint):
    shutil.rmtree(checkpoint / "state" / "d")


def flip_bits(checkpoint):
    for path in (checkpoint / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def change_checksum(checkpoint):
    record, sums = checkpoint_files.read_record(checkpoint)
    sums["params/Dense_0/kernel"] ^= 1
    (checkpoint / "position" / "metadata").write_text(json.dumps(checkpoint_files.pack_record(record, sums)))


def cut_position(checkpoint):
    path = checkpoint / "position" / "metadata"
    path.write_text(path.read_text()[:100])


@pytest.mark.parametrize("damage, reason", [
    (lose_arrays, "NOT_FOUND: "),
    (flip_bits, ""),
    (change_checksum, "checksum of params/Dense_0/kernel is wrong (1 arrays differ from what was saved)"),
    (cut_position, ""),
])  # fmt: skip
def test_damaged_checkpoint_is_set_aside_for_the_one_before(workdir, whole, damage, reason):
    damage(workdir / "checkpoints" / "12")
    done = train(workdir, **RUN)
    assert f"Checkpoint 12 is damaged ({reason}" in done.stderr and "Going back to checkpoint 8" in done.stderr
    assert "step 8 of 20" in done.stdout
    assert [path.name for path in (workdir / "damaged_checkpoints").iterdir()] == ["12"]
    assert numbers(workdir) == whole


def test_no_good_checkpoint_ends_the_run_before_it_starts_anew(workdir, whole):
    for step in (8, 12):
        lose_arrays(workdir / "checkpoints" / str(step))
    message = error(train(workdir, code=2, **RUN))
    assert f"checkpoint 8 is damaged, and there is none before it; it was set aside in {workdir}/damaged_checkpoints" in message
    assert "The same command now starts from the beginning" in message
    done = train(workdir, **RUN)
    assert "step 0 of 20" in done.stdout and numbers(workdir) == whole
    assert (workdir / "metrics.jsonl.bak").exists()


def test_torn_files_of_the_workdir_are_written_anew(workdir, whole):
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(config[:100])
    assert "config.json is torn" in error(run(command("evaluate", f"--workdir={workdir}"), code=2))
    with open(workdir / "metrics.jsonl", "ab") as file:
        file.write(b'[5]\n{"step": 13, "tra\xff\0\0\0\0')
    done = train(workdir, **RUN)
    assert "cannot be compared with this workdir's last run: config.json is torn" in done.stderr
    assert done.stderr.count("has a torn line, left out") == 2
    assert json.loads((workdir / "config.json").read_text())["max_steps"] == STEPS and numbers(workdir) == whole


# --- the disk


def train_with_files_up_to(size, workdir, **config):
    """A run on a disk that takes no more: writes beyond `size` bytes of a file fail, as they do on a full one."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    done = subprocess.run(
        train_command(workdir, **(RUN | config)), cwd=ROOT, env=environment(), capture_output=True, text=True, preexec_fn=limit
    )
    assert done.returncode == 74, done.stderr
    return done


def test_full_disk_while_saving(workdir, whole):
    message = error(train_with_files_up_to(16_000, workdir))
    assert f"a checkpoint could not be written to {workdir}/checkpoints: " in message and "File too large" in message, message
    assert f"The last good one is {workdir}/checkpoints/12; make room, then the same command resumes" in message
    assert checkpoints(workdir) == [8, 12]
    assert "step 12 of 20" in train(workdir, **RUN).stdout
    assert numbers(workdir) == whole and checkpoints(workdir) == [16, 20]


def test_full_disk_at_the_start(workdir):
    message = error(train_with_files_up_to(1000, workdir))
    assert f"{workdir}/config.json cannot be written ([Errno 27] File too large); make room" in message


def test_full_disk_while_reporting(workdir):
    size = (workdir / "config.json").stat().st_size + 100
    message = error(train_with_files_up_to(size, workdir, log_every_steps=1, checkpoint_every_steps=100))
    assert f"{workdir}/metrics.jsonl cannot be written" in message and "the last checkpoint is safe: make room" in message
    assert checkpoints(workdir) == [8, 12]


# --- a batch that makes the loss NaN


@pytest.fixture
def poison(monkeypatch):
    monkeypatch.setenv("POISON", "1224")  # an image of step 10


def test_bad_batch_stops_the_run(poison, tmp_path):
    message = error(train(tmp_path, code=70, **RUN))
    assert "step 10: loss is nan" in message and f"Last good checkpoint: {tmp_path}/checkpoints/8." in message
    assert "on_non_finite=skip" in message and checkpoints(tmp_path) == [4, 8]


def test_bad_batch_is_skipped(poison, tmp_path, whole):
    config = RUN | {"on_non_finite": "skip"}
    done = train(tmp_path / "run", **config)
    assert "step 10: loss is nan, gradient norm nan. Back to checkpoint 8, past 2 batches" in done.stderr
    ours = numbers(tmp_path / "run")
    assert [report["step"] for report in ours] == [4, 8, 12, 16, 20] and ours[:2] == whole[:2]
    assert all(report["train/loss"] != other["train/loss"] for report, other in zip(ours[2:], whole[2:]))
    # Which batches were left out is part of every checkpoint: a resumed run leaves them out too.
    train(tmp_path / "resumed", **(config | {"max_steps": 16}))
    done = train(tmp_path / "resumed", **config)
    assert "step 16 of 20" in done.stdout and "loss is nan" not in done.stderr
    assert numbers(tmp_path / "resumed") == ours


# --- data workers


def workers(process):
    """Process ids of its data workers."""
    listed = subprocess.run(
        ["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    rows = [line.split(maxsplit=2) for line in listed[1:]]
    return [int(pid) for pid, parent, args in rows if int(parent) == process.pid and "spawn_main" in args]


def runs(pid):
    """Whether it is there, and no zombie that nobody waits for."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_dead_data_worker_ends_the_run_with_its_state_saved(tmp_path):
    process = start(train_command(tmp_path, **(ENDLESS | {"data__num_workers": 1})))
    until(process, "step 50/")
    (worker,) = workers(process)
    os.kill(worker, signal.SIGKILL)
    (done,) = wait_for([process])
    step = max(checkpoints(tmp_path))
    assert done.returncode == 2
    message = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "a data worker process died, as where memory runs out" in message and "data.num_workers" in message
    assert f"Step {step} is saved; the same command resumes" in message and step >= 50 and "Traceback" not in done.stderr
    assert f"step {step} of {step + 5}" in train(tmp_path, **(ENDLESS | {"max_steps": step + 5})).stdout


def test_signal_to_all_processes_of_a_run_is_the_main_ones(tmp_path):
    """Ctrl-C on a terminal reaches data workers too, as does the SIGTERM of some schedulers."""
    arguments = train_command(tmp_path, **(ENDLESS | {"data__num_workers": 1}))
    process = start(arguments, start_new_session=True)
    until(process, "step 50/")
    os.killpg(process.pid, signal.SIGINT)
    (done,) = wait_for([process])
    assert done.returncode == 75 and "Traceback" not in done.stderr, done.stderr
    assert f"SIGINT: saved step {max(checkpoints(tmp_path))} after" in done.stdout


def test_data_workers_end_with_a_killed_run(tmp_path):
    process = start(train_command(tmp_path, **(ENDLESS | {"data__num_workers": 1})))
    until(process, "step 50/")
    (worker,) = workers(process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while runs(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs(worker)


# --- several processes


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_process_ends_the_others(killed, tmp_path):
    processes = start_processes(tmp_path, devices=1, **ENDLESS)
    until(processes[0], "step 150/")
    processes[killed].kill()
    survivor = wait_for(processes)[1 - killed]
    # By the collective that fails, or aborted by JAX's own coordination.
    assert survivor.returncode in (69, -signal.SIGABRT), survivor
    if survivor.returncode == 69:
        message = error(survivor)
        assert f"process {1 - killed} lost another one, or the network: " in message and "the same command resumes" in message
    step = max(checkpoints(tmp_path))
    assert (
        f"step {step} of {step + 10}" in train(tmp_path, **(ENDLESS | {"max_steps": step + 10})).stdout
    )  # here by one process


@pytest.mark.parametrize("moment", ["parameters", "step 50/"])
def test_sigterm_to_one_process_stops_all_after_the_same_step(moment, workdir):
    processes = start_processes(workdir, devices=1, **ENDLESS)
    until(processes[0], moment)
    processes[1].terminate()
    done = wait_for(processes)
    assert [process.returncode for process in done] == [75, 75], done
    step = max(checkpoints(workdir))
    assert f"SIGTERM: saved step {step} after" in done[0].stdout
    assert step > 50 if moment == "step 50/" else step < 50


def test_hung_process_is_noticed(tmp_path):
    processes = start_processes(tmp_path, devices=1, peer_timeout=300, **(ENDLESS | {"hang_timeout": 15.0}))
    until(processes[0], "step 150/")
    processes[1].send_signal(signal.SIGSTOP)
    processes[0].wait(300)
    processes[1].kill()
    done = wait_for(processes)[0]
    assert done.returncode == 69
    assert "reporting.py" in done.stderr  # where every thread stood
    assert re.match(r"error: process 0 made no progress in .* for \d+ s, more than hang_timeout=15", done.stderr.splitlines()[-1])
    assert max(checkpoints(tmp_path)) >= 100


def test_processes_that_do_not_belong_together(tmp_path):
    """Another config, and another workdir, each named by both, at once."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for others, ours, codes, message in [
        ({"batch_size": 64}, folders[:1] * 2, (2, 2), "process 1 has another config or version than process 0"),
        (
            {},
            folders,
            (69, 2),
            f"workdir {folders[1]} of process 1 is not that of process 0; give a folder that all hosts share",
        ),
    ]:
        commands = [train_command(folder, **(RUN | config)) for folder, config in zip(ours, ({}, others))]
        done = wait_for([start([*arguments, *flags]) for arguments, flags in zip(commands, join_flags(2))])
        assert tuple(process.returncode for process in done) == codes, done
        assert message in error(done[1]) and error(done[0]).startswith("error: process 1 ")
        assert not any((folder / "checkpoints").exists() for folder in folders)


def test_workdir_in_use(workdir):
    held = lease.Lease(workdir)
    held.acquire()
    try:
        done = wait_for(start_processes(workdir, devices=1, **RUN))
    finally:
        held.release()
    assert [process.returncode for process in done] == [2, 69], done
    assert f"workdir {workdir} is in use by another run (host " in error(done[0])
    assert "process 0 failed in taking the lease of the workdir; its output says why" in error(done[1])


@pytest.mark.parametrize("arguments, message", [
    ({"process_id": 1}, "--coordinator_address and --num_processes missing; give all of "),
    ({"process_id": 2, "num_processes": 2, "coordinator_address": "localhost:1"}, "process_id=2 must lie between 0 and 1"),
    ({"process_id": 0, "num_processes": 2, "coordinator_address": "localhost"}, "must be HOST:PORT, such as 10.0.0.2:8476"),
])  # fmt: skip
def test_flags_of_processes(arguments, message):
    with pytest.raises(distributed.DistributedError, match=message):
        distributed.initialize(**arguments)


def test_chaos(tmp_path):
    """The short form of the script whose long form docs/reliability.md reports."""
    config = [argument for argument in train_command(tmp_path, **RUN) if argument.startswith("--config.")]
    config += ["--config.max_steps=60", "--config.eval_every_epochs=0.4"]
    arguments = [f"--workdir={tmp_path}/chaos", "--kills=2", "--processes=2", "--program=tests/linear_train.py", *config]
    done = run([sys.executable, "scripts/faults/chaos.py", *arguments])
    assert "31 arrays of checkpoint 60 equal, bit for bit" in done.stdout and "2 kills" in done.stdout
