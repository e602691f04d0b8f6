"""What the tests of the entries share: they run them as a user does, in processes of their own."""

import atexit
import concurrent.futures
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
# One cache of compiled programs for all processes of a test session: most of them run the same few programs.
CACHE = tempfile.mkdtemp(prefix="halonet_jax_cache_")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

# The digits recipe, tiny. final_width makes one kernel large enough to be shared out over `fsdp`.
TINY = {
    "batch_size": 32, "data.image_size": 16, "model.base_width": 8, "model.stem_width": 8, "model.final_width": 512,
    "schedule.warmup_epochs": 0.0,
    "tensorboard": False,  # TensorFlow takes seconds to import
}  # fmt: skip


def environment(devices=1):
    """The environment of an entry's process, less what this test process was given. With 0, the entry chooses the devices."""
    given = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"}
    return given | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}" if devices else "",
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def command(entry, *arguments):
    """The argument list of `python -m halonet_jax.<entry>`; or of a script."""
    return [sys.executable, *([entry] if entry.endswith(".py") else ["-m", f"halonet_jax.{entry}"]), *arguments]


def train_command(workdir, entry="train", **config):
    """Tiny training; keys of `config` have "__" for the dot."""
    overrides = TINY | {key.replace("__", "."): value for key, value in config.items()}
    overrides = [f"--config.{key}={value}" for key, value in overrides.items()]
    return command(entry, "--config=configs/digits.py", f"--workdir={workdir}", *overrides)


def run(arguments, code=0, devices=1):
    """Runs a command to its end and checks its exit code."""
    done = subprocess.run(arguments, cwd=ROOT, env=environment(devices), capture_output=True, text=True)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def train(workdir, code=0, devices=1, **config):
    return run(train_command(workdir, **config), code, devices)


def start(arguments, devices=1, **options):
    """Starts a command; its output goes to pipes."""
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, cwd=ROOT, env=environment(devices), stdout=pipe, stderr=pipe, text=True, **options)


def join_flags(processes, peer_timeout=20):
    """For each process of a run over loopback, the flags by which it joins the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = [f"--coordinator_address={address}", f"--num_processes={processes}", f"--peer_timeout={peer_timeout}"]
    return [[*shared, f"--process_id={index}"] for index in range(processes)]


def start_processes(workdir, processes=2, devices=2, peer_timeout=20, **config):
    """Starts tiny training on several processes of `devices` each."""
    arguments = train_command(workdir, **config)
    return [start([*arguments, *flags], devices) for flags in join_flags(processes, peer_timeout)]


def wait_for(processes, timeout=300):
    """Reads what started processes print until all have ended; after `timeout` seconds, or where the test fails, kills them."""
    try:
        with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:  # at once, so that none waits for a full pipe
            outputs = list(pool.map(lambda process: process.communicate(timeout=timeout), processes))
    finally:
        for process in processes:
            process.kill()
    return [subprocess.CompletedProcess(p.args, p.returncode, *output) for p, output in zip(processes, outputs)]


def train_processes(workdir, processes=2, devices=2, code=0, **config):
    """Runs tiny training on several processes to their end and checks their exit codes."""
    done = wait_for(start_processes(workdir, processes, devices, **config))
    for index, process in enumerate(done):
        assert process.returncode == code, (
            f"process {index}: exit code {process.returncode}\n{process.stdout}\n{process.stderr}"
        )
        assert "Traceback" not in process.stderr
    return done


def evaluate(workdir, *arguments, devices=1):
    """Runs the evaluation and returns what it wrote."""
    done = run(command("evaluate", f"--workdir={workdir}", *arguments), devices=devices)
    return json.loads(pathlib.Path(done.stdout.split("written to ")[1].strip()).read_text())


def metrics(workdir):
    """The reports of a run, in order."""
    return [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def checkpoints(workdir):
    """Steps of the finished checkpoints."""
    return sorted(int(path.name) for path in (pathlib.Path(workdir) / "checkpoints").iterdir() if path.name.isdigit())
