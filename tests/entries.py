"""What the tests of the entries share: they run them as a user does, in processes of their own."""

import atexit
import json
import os
import pathlib
import shutil
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
}  # fmt: skip


def environment(devices=1):
    """The environment of an entry's process, less what this test process was given."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def command(entry, *arguments):
    """The argument list of `python -m halonet_jax.<entry>`."""
    return [sys.executable, "-m", f"halonet_jax.{entry}", *arguments]


def train_command(workdir, **config):
    """Tiny training; keys of `config` have "__" for the dot."""
    overrides = TINY | {key.replace("__", "."): value for key, value in config.items()}
    overrides = [f"--config.{key}={value}" for key, value in overrides.items()]
    return command("train", "--config=configs/digits.py", f"--workdir={workdir}", *overrides)


def run(arguments, code=0, devices=1):
    """Runs a command to its end and checks its exit code."""
    done = subprocess.run(arguments, cwd=ROOT, env=environment(devices), capture_output=True, text=True)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def train(workdir, code=0, devices=1, **config):
    return run(train_command(workdir, **config), code, devices)


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
