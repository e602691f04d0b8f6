"""Starts the runs of a study on a cluster: one array job of Slurm, or one command for a TPU slice after the other."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from halonet_jax.errors import ConfigError
from halonet_jax.studies import results
from halonet_jax.studies.plan import Plan, Run

SCRIPTS = Path(__file__).parents[2] / "scripts" / "launch"
_ARRAY = """#!/usr/bin/env bash
# Task N runs the Nth line of RUNS through slurm.sbatch, which requeues it until it is done. Written by halonet_jax.study.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --cpus-per-task=12
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={out}/slurm-%A_%a.log
RUNS=(
{runs}
)
: "${{JAX_COMPILATION_CACHE_DIR:={out}/compile_cache}}" && export JAX_COMPILATION_CACHE_DIR
eval "exec bash {script} ${{RUNS[$SLURM_ARRAY_TASK_ID]}}"
"""


def slurm(plan: Plan, runs: Sequence[Run], arguments: str, yes: bool) -> int:
    """Submits one array job; without sbatch, it writes the job and prints the command.

    Args:
        plan: the study.
        runs: those wanted.
        arguments: further ones of sbatch.
        yes: not used: submitting starts nothing that costs before it is allotted.

    Returns:
        The exit code.

    Raises:
        ConfigError: the folder is not one that nodes can share, or sbatch refuses the job.
    """
    if "://" in str(plan.out):
        raise ConfigError(f"--out={plan.out}: Slurm's nodes need a folder that they share; give one")
    ready = _ready(runs)
    if not ready:
        return 0
    (plan.out / "compile_cache").mkdir(parents=True, exist_ok=True)
    lines = "\n".join(f"  {shlex.quote(shlex.join(run.arguments))}" for run in ready)
    quote = lambda path: shlex.quote(str(path))
    script = plan.out / "slurm_array.sh"
    out = str(plan.out)
    if any(mark in out for mark in " \t'\"$`"):  # #SBATCH lines are not read by a shell
        raise ConfigError(f"--out={out} has a blank or a quote, which Slurm's options cannot hold; give another --out")
    results.write(
        script,
        _ARRAY.format(
            name=f"study-{Path(plan.path).stem}",
            last=len(ready) - 1,
            out=out,
            runs=lines,
            script=quote(SCRIPTS / "slurm.sbatch"),
        ),
    )
    command = ["sbatch", *(shlex.split(arguments) or ("--ntasks-per-node=8", "--gpus-per-node=8")), str(script)]
    print(f"{len(ready)} runs in {script}", flush=True)
    if not shutil.which("sbatch"):
        print(f"sbatch is not installed here; on the cluster, from this folder, run\n  {shlex.join(command)}", flush=True)
        return 0
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {' '.join(done.stderr.split())}; see --launch_args and {script}")
    print(f"{done.stdout.strip()}; `{plan.command} --report` shows what is done", flush=True)
    return 0


def pod(plan: Plan, runs: Sequence[Run], arguments: str, yes: bool) -> int:
    """Prints the commands that run on a TPU slice, in order; with `yes`, runs them.

    Args:
        plan: the study.
        runs: those wanted.
        arguments: of `pod.sh resume`, such as "--name=h4 --zone=us-west4-a --accelerator-type=v5litepod-16".
        yes: run them.

    Returns:
        0, or 1 if a command failed.

    Raises:
        ConfigError: the folder is not one that all hosts share.
    """
    if "://" not in str(plan.out):
        raise ConfigError(
            f"--out={plan.out}: the hosts of a slice share no folder of this machine; give --out=gs://BUCKET/FOLDER"
        )
    given = shlex.split(arguments) or ["--name=NAME", "--zone=ZONE", "--accelerator-type=TYPE"]
    code = 0
    for run in sorted((run for run in runs if not results.result(run)), key=_depth):
        command = [str(SCRIPTS / "pod.sh"), "resume", *given, "--", *run.arguments]
        print(f"# {run.name}\n{shlex.join(command)}", flush=True)
        if not yes:
            continue
        if run.parent and not results.result(run.parent):
            print(f"failed: {run.name}: it starts from {run.parent.name}, which is not done", flush=True)
            code = 1
            continue
        done = subprocess.run(command, check=False)
        results.harvest([run])
        if done.returncode:
            print(f"failed: {run.name}: exit code {done.returncode}", flush=True)
            code = 1
    return code


def _depth(run):
    return 0 if run.parent is None else 1 + _depth(run.parent)


def _ready(runs):
    """The runs that are not done and whose parents are."""
    left = [run for run in runs if not results.result(run)]
    ready = [run for run in left if run.parent is None or results.result(run.parent)]
    if len(ready) < len(left):
        print(
            f"{len(left) - len(ready)} runs start from runs that are not done: give the same command again after them",
            flush=True,
        )
    if not left:
        print("all runs are done", flush=True)
    return ready
