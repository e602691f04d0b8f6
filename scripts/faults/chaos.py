"""Kills a training run at random moments until it completes, and compares it with an undisturbed run.

    python scripts/faults/chaos.py --workdir=runs/chaos                               # one process, 30 kills
    python scripts/faults/chaos.py --workdir=runs/chaos2 --processes=2 --devices=2  # two processes, two devices each
    python scripts/faults/chaos.py --workdir=runs/chaos3 --processes=2 --move       # some restarts on other meshes

Unknown arguments go to the training, after those of RECIPE. If a run completes before all kills are done, it is
compared, and another run starts. The script checks:

- Every start resumes from the newest finished checkpoint. No finished checkpoint is lost or damaged.
- The reports (without rates) and every array of the last checkpoint equal those of the undisturbed run, bit for bit.
- With --move, sums over devices change their order. Then the same steps must be reported, and losses must agree within
  --tolerance.

Exit code: 0 if all of this holds, 1 if not.
"""

import argparse
import collections
import json
import logging
import os
import pathlib
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
# The intervals of reports, evaluations and checkpoints are no multiples of each other.
RECIPE = [
    "--config=configs/digits.py", "--config.num_epochs=12", "--config.checkpoint_every_steps=7", "--config.log_every_steps=10",
    "--config.eval_every_epochs=3", "--config.model.bn_group_size=8",
]  # fmt: skip
VARYING = ("images_per_second", "input_wait")
MOVES = ((1, 1), (1, 2), (2, 1), (2, 2))  # processes, devices of each
# Exit codes that a kill may cause, of the process or of its peer: saved, peer lost, the signals themselves, JAX's
# abort.
EXPECTED = {0, 75, 69, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGABRT}
PATIENCE = 600  # seconds within which a start must make progress


class _Broken(Exception):
    """A condition of this script does not hold."""


class _Run:
    """One start of the training, on `processes` with `devices` each. The output goes to files."""

    def __init__(self, command, workdir, processes, devices):
        self.checkpoints = workdir / "checkpoints"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compile_cache")} | os.environ
        env = cache | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
        }
        self.processes, self._outputs = [], []
        for index in range(processes):
            join = [f"--coordinator_address=127.0.0.1:{port}", f"--process_id={index}", "--peer_timeout=20"]
            flags = [f"--workdir={workdir}", f"--num_processes={processes}", *(join if processes > 1 else [])]
            self._outputs.append(workdir.parent / f"output_{index}.txt")
            with open(self._outputs[-1], "w") as output:
                self.processes.append(
                    subprocess.Popen([*command, *flags], cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
                )

    def output(self, index=0):
        return self._outputs[index].read_text(errors="replace")

    def running(self):
        return [process for process in self.processes if process.poll() is None]

    def wait(self, seconds):
        """Waits for all processes to end, and kills those that do not. Returns the killed ones."""
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.05)
        left = self.running()
        for process in left:
            process.kill()
        for process in self.processes:
            process.wait()
        return left


def _finished_checkpoints(workdir):
    folder = workdir / "checkpoints"
    return {int(path.name) for path in folder.iterdir() if path.name.isdigit()} if folder.exists() else set()


# --- moments of a kill: each returns a function that is True once the moment has come, and seconds between its calls


def _during_a_save(run, rng, _):
    nth, seen = rng.randint(1, 4), set()

    def reached():
        seen.update(path.name.split(".")[0] for path in run.checkpoints.glob("*tmp*"))
        return len(seen) >= nth

    return reached, 0.0005


def _after_a_report(run, rng, _):
    nth, wait = rng.randint(1, 4), rng.uniform(0, 0.5)
    return lambda: run.output().count("  loss ") >= nth and time.sleep(wait) is None, 0.02


def _while_compiling(run, rng, _):
    wait = rng.uniform(0, 3)
    return lambda: " parameters, " in run.output() and time.sleep(wait) is None, 0.05


def _anywhere(run, rng, duration):
    end = time.monotonic() + rng.uniform(0, duration)
    return lambda: time.monotonic() > end, 0.02


MOMENTS = (_during_a_save, _during_a_save, _after_a_report, _while_compiling, _anywhere)  # saves matter most


def _disturb(run, rng, duration):
    """Kills once. Returns (signal, processes, moment), or None if the run ended before."""
    moment = rng.choice(MOMENTS)
    number = rng.choice((signal.SIGKILL, signal.SIGTERM))
    some = rng.sample(run.processes, rng.choice((1, len(run.processes))))
    reached, pause = moment(run, rng, duration)
    deadline = time.monotonic() + PATIENCE
    while len(run.running()) == len(run.processes) and not reached():
        if time.monotonic() > deadline:
            raise _Broken(f"nothing happened in {PATIENCE} s:\n{run.output()}")
        time.sleep(pause)
    if len(run.running()) < len(run.processes):
        return None
    for process in some:
        process.send_signal(number)
    who = "the process" if len(run.processes) == 1 else "one process" if len(some) == 1 else "all processes"
    return number.name, who, moment.__name__.strip("_").replace("_", " ")


def _one_run(command, layout, workdir, rng, kills, duration, moves):
    """Starts the training again and again until it completes. Returns the kills and the number of starts."""
    done, starts, newest = [], 0, 0
    while True:
        starts += 1
        here = rng.choice(MOVES) if moves and rng.random() < 0.5 else layout
        run = _Run(command, workdir, *here)
        try:
            kill = _disturb(run, rng, duration) if len(done) < kills else None
            late = run.wait(PATIENCE)
        finally:
            run.wait(0)
        codes, text = [process.returncode for process in run.processes], run.output()
        resumed = re.search(r"step (\d+) of \d+", text)
        if resumed and int(resumed[1]) != newest:
            raise _Broken(f"resumed from step {resumed[1]} instead of checkpoint {newest}\n{text}")
        steps = _finished_checkpoints(workdir)
        if max(steps, default=0) < newest or (workdir / "damaged_checkpoints").exists():
            raise _Broken(f"checkpoint {newest} was lost or damaged; left are {sorted(steps)}\n{text}")
        newest = max(steps, default=0)
        if kill:
            done.append(kill)
            forced = f", {len(late)} did not end and were killed" if late else ""
            print(
                f"  {len(done):3}  {kill[0]} to {kill[1]} {kill[2]}, on {here[0]} x {here[1]}: codes {codes}, newest checkpoint "
                f"{newest}{forced}",
                flush=True,
            )
        # During start-up, a process may wait long for one that is gone.
        if set(codes) - EXPECTED or (late and not (kill and kill[2] == "anywhere")):
            raise _Broken(
                f"exit codes {codes}, {len(late)} did not end\n" + "\n".join(run.output(index) for index in range(len(codes)))
            )
        if set(codes) == {0}:
            return done, starts
        if not kill:
            raise _Broken(f"ended by itself with {codes}\n{text}")


def _reports(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in VARYING} for line in lines]


def _arrays(workdir):
    os.environ["JAX_PLATFORMS"] = "cpu"
    logging.getLogger("absl").setLevel(logging.ERROR)
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    path = workdir / "checkpoints" / str(max(_finished_checkpoints(workdir))) / "state"
    reader = ocp.PyTreeCheckpointer()
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(path).item_metadata.tree)
    tree = reader.restore(path, restore_args=as_numpy)
    return {jax.tree_util.keystr(key): value for key, value in jax.tree_util.tree_leaves_with_path(tree)}


def _compare(workdir, undisturbed):
    """Compares two runs bit for bit. Returns a summary."""
    ours, theirs = _reports(workdir), _reports(undisturbed)
    if ours != theirs:
        wrong = next((pair for pair in zip(ours, theirs) if pair[0] != pair[1]), (len(ours), len(theirs)))
        raise _Broken(f"reports differ, first: {wrong[0]}\nand {wrong[1]}")
    ours_at_end, theirs_at_end = _arrays(workdir), _arrays(undisturbed)
    wrong = [name for name, x in theirs_at_end.items() if x.tobytes() != ours_at_end[name].tobytes()]
    if wrong or ours_at_end.keys() != theirs_at_end.keys():
        raise _Broken(f"{len(wrong)} arrays of the last checkpoint differ: {wrong[:5]}")
    last = max(_finished_checkpoints(workdir))
    return f"{len(ours)} reports and {len(ours_at_end)} arrays of checkpoint {last} equal, bit for bit"


def _compare_losses(workdir, undisturbed, tolerance):
    ours, theirs = _reports(workdir), _reports(undisturbed)
    if [line["step"] for line in ours] != [line["step"] for line in theirs]:
        raise _Broken("the runs report different steps")
    off = [
        abs(x[key] / y[key] - 1)
        for x, y in zip(ours, theirs)
        for key in ("train/loss", "eval/loss", "eval_ema/loss", "learning_rate", "epoch")
        if key in y
    ]
    if max(off) > tolerance:
        raise _Broken(f"losses differ by up to {max(off):.1e} of their value, more than {tolerance:g}")
    return f"{len(ours)} reports: losses equal to {max(off):.1e} of their value"


def main():
    """Parses the arguments, kills and compares. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="new folder for the runs")
    parser.add_argument("--kills", type=int, default=30, help="number of kills, over all runs")
    parser.add_argument(
        "--seed", type=int, default=0, help="of moments, signals and meshes; timing still differs"
    )
    parser.add_argument("--processes", type=int, default=1, help="number of processes of a run")
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices of each process")
    parser.add_argument(
        "--move", action="store_true", help="restart half of the time on other numbers of processes and devices"
    )
    parser.add_argument("--tolerance", type=float, default=1e-2, help="largest relative difference of losses with --move")
    parser.add_argument("--program", default="-m halonet_jax.train", help="arguments of Python that start the training")
    flags, training = parser.parse_known_args()
    if flags.workdir.expanduser().exists():
        parser.error(f"{flags.workdir} exists; give another --workdir")
    workdir, layout = flags.workdir.expanduser().resolve(), (flags.processes, flags.devices)
    workdir.mkdir(parents=True)
    command = [sys.executable, *shlex.split(flags.program), *RECIPE, *training]
    rng, kills, starts, compared, begin = random.Random(flags.seed), [], 0, [], time.monotonic()
    try:
        _one_run(command, layout, workdir / "undisturbed", rng, 0, 0, False)
        duration = time.monotonic() - begin
        print(f"undisturbed on {layout[0]} x {layout[1]}: {duration:.0f} s", flush=True)
        while len(kills) < flags.kills:
            disturbed = workdir / f"disturbed_{len(compared)}"
            done, tried = _one_run(command, layout, disturbed, rng, flags.kills - len(kills), duration, flags.move)
            kills, starts = kills + done, starts + tried
            undisturbed = workdir / "undisturbed"
            compared.append(
                _compare_losses(disturbed, undisturbed, flags.tolerance) if flags.move else _compare(disturbed, undisturbed)
            )
            print(f"run {len(compared)} is done after {len(done)} kills: {compared[-1]}", flush=True)
    except _Broken as broken:
        print(f"BROKEN: {broken}", flush=True)
        return 1
    print(f"\n{'signal':8} {'to':14} {'moment':16} kills")
    for (number, who, moment), count in sorted(collections.Counter(kills).items()):
        print(f"{number:8} {who:14} {moment:16} {count:5}")
    print(f"{len(kills)} kills, {starts} starts, {len(compared)} runs completed in {time.monotonic() - begin:.0f} s")
    print("every start resumed from the newest finished checkpoint; none was lost or damaged")
    return 0


if __name__ == "__main__":
    sys.exit(main())
