"""Shares this machine's cores or GPUs out to several runs at a time."""

import os
import subprocess
import sys

from halonet_jax.errors import ConfigError

_PROBE = "import jax; print('devices', jax.default_backend(), jax.local_device_count())"


def share(jobs: int) -> list[tuple[dict[str, str], str]]:
    """Returns the environment variables and the cores ("0,2", or "-" for all) of each job.

    Args:
        jobs: runs at a time.

    Raises:
        ConfigError: there are fewer cores or GPUs than jobs, or JAX finds no device.
    """
    if jobs == 1:
        return [({}, "-")]
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("devices ")]
    if not found:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"--jobs={jobs}: JAX finds no device ({last}); see that `import jax; jax.devices()` works")
    platform, count = found[0][0], int(found[0][1])
    if platform == "cpu":
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        _check(jobs, len(cores), "CPU cores")
        shares = [cores[len(cores) * job // jobs : len(cores) * (job + 1) // jobs] for job in range(jobs)]
        # A run makes each core that it sees a device; where it cannot see its share, it must be told.
        told = {} if hasattr(os, "sched_getaffinity") else {"JAX_NUM_CPU_DEVICES": "1"}
        return [(told | ({"JAX_NUM_CPU_DEVICES": "1"} if len(own) == 1 else {}), ",".join(map(str, own))) for own in shares]
    if platform == "tpu":
        raise ConfigError(f"--jobs={jobs}: a TPU takes one run at a time; leave --jobs out")
    _check(jobs, count, "GPUs")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") or ",".join(map(str, range(count)))
    visible = visible.split(",")
    return [({"CUDA_VISIBLE_DEVICES": ",".join(visible[job::jobs])}, "-") for job in range(jobs)]


def _check(jobs, count, what):
    if jobs > count:
        raise ConfigError(f"--jobs={jobs} is more than the {count} {what} of this machine; use at most {count}")
