"""Shared code of the benchmarks: timing contestants in turns, PyTorch's device, and tables of ratios."""

import contextlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves GPU memory to PyTorch

import jax
import numpy as np
import rival_cudnn
from absl import app

from halonet_jax.ops import einsum, einsum_cpu, gpu, tpu
from halonet_jax.training import sharding

# Each platform's implementations, for the argument `implementation` of halonet_jax.
OURS = {
    "cpu": {"einsum_cpu": einsum_cpu.attend, "einsum": einsum.attend},
    "gpu": {"einsum": einsum.attend, "fused GPU": gpu.attend, "through cuDNN's attention": rival_cudnn.attend},
    "tpu": {"einsum": einsum.attend, "fused TPU": tpu.attend},
}
SLOW_SECONDS = 2.0  # a call that takes longer is repeated fewer times
QUEUED_SECONDS = 0.02  # length of a queue of calls on an accelerator; it hides the time to start a call
PEERS = {"torch": "torch", "timm": "timm", "halonet_pytorch": "halonet-pytorch"}  # module: distribution


class Case(NamedTuple):
    """One contestant.

    Attributes:
        name: its name in the table.
        make: builds the contestant and returns a function that starts one call. If either raises, the table gives the
            error instead of a figure.
        wait: takes the result of a call and blocks until the call is done.
    """

    name: str
    make: Callable[[], Callable[[], Any]]
    wait: Callable[[Any], Any] = jax.block_until_ready


class Timing(NamedTuple):
    """The times of one contestant.

    Attributes:
        seconds: seconds per call, one number for each round. Empty if the contestant failed.
        reason: the failure; "" without one.
    """

    seconds: list[float]
    reason: str = ""

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return float(np.median(self.seconds))


def mesh() -> jax.sharding.Mesh:
    """Returns a mesh of one accelerator, or of all CPU devices. PyTorch, too, uses one accelerator or all cores."""
    return sharding.make_mesh(devices=jax.devices() if jax.default_backend() == "cpu" else jax.devices()[:1])


def place(tree: Any, cut: bool) -> Any:
    """Puts arrays on the devices of `mesh`.

    Args:
        tree: pytree of arrays.
        cut: True cuts them along their first axis; False puts them whole on each device.
    """
    return jax.device_put(tree, jax.NamedSharding(mesh(), sharding.BATCH if cut else jax.P()))


def ours(first: str, reference: bool) -> dict[str, Any]:
    """Returns halonet_jax's implementations on this device: name in the table, and value of `implementation`.

    Args:
        first: name of the implementation to put first.
        reference: whether to include the reference.
    """
    found = {name: name for name in (first, "reference")[: 1 + reference]}
    return {f"halonet_jax {name}": value for name, value in (found | OURS[jax.default_backend()]).items()}


def measure(cases: list[Case], repeats: int, label: str) -> dict[str, Timing]:
    """Times all cases in turns, so that other load on the machine affects all alike.

    The first call compiles and is not timed. Cases slower than `SLOW_SECONDS` run at most three rounds.

    Args:
        cases: the contestants.
        repeats: number of rounds. Each round runs every case once.
        label: shown with the progress.

    Returns:
        The timings by the name of the case.
    """
    progress = Progress(label, len(cases) * (repeats + 1))
    timings, ready = {}, []  # ready: (case, function that starts a call, calls to queue, rounds)
    for case in cases:
        progress.at(f"preparing {case.name}")
        timings[case.name] = Timing([])
        try:
            start = case.make()
            case.wait(start())
            once = _seconds(case, start, 1)
        except Exception as error:  # the table shows why a contestant failed, and the others go on
            timings[case.name] = Timing([], first_line(error))
            progress.done(repeats + 1)
            continue
        calls = 1 if jax.default_backend() == "cpu" else max(1, round(QUEUED_SECONDS / once))
        rounds = min(repeats, 3) if once > SLOW_SECONDS else repeats
        ready.append((case, start, calls, rounds))
        progress.done(1 + repeats - rounds)
    for turn in range(repeats):
        for case, start, calls, rounds in ready if turn % 2 else ready[::-1]:
            if turn < rounds:
                progress.at(case.name)
                time.sleep(0.01)  # threads of the case before may still spin
                timings[case.name].seconds.append(_seconds(case, start, calls))
                progress.done(1)
    progress.close()
    return timings


def _seconds(case, start, calls):
    begin = time.perf_counter()
    for _ in range(calls):
        out = start()
    case.wait(out)
    return (time.perf_counter() - begin) / calls


def first_line(error: Exception) -> str:
    """Returns the line with which a table explains a failure.

    Args:
        error: the failure.
    """
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; pip install -e '.[bench]'"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:150] if lines else ''}"


class Progress:
    """Progress on stderr, with the remaining time: one line on a terminal, a new line every ten seconds in a file.

    Args:
        label: start of the line.
        total: number of units of work.
    """

    def __init__(self, label, total):
        self.label, self.total, self.count, self.begin, self.written = label, total, 0, time.monotonic(), 0.0

    def at(self, what: str):
        """Shows the current activity, `what`."""
        now = time.monotonic()
        if not sys.stderr.isatty() and now - self.written < 10:
            return
        self.written = now
        eta = f", ETA {(now - self.begin) / self.count * (self.total - self.count):.0f} s" if self.count else ""
        start, end = ("\r\033[K", "") if sys.stderr.isatty() else ("", "\n")
        print(f"{start}{self.label}: {self.count}/{self.total}{eta}: {what}", end=end, file=sys.stderr, flush=True)

    def done(self, count: int):
        """Adds `count` finished units of work."""
        self.count += count

    def close(self):
        """Clears the line on a terminal."""
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def ratio(timing: Timing, base: Timing) -> float | None:
    """Returns the median over the rounds of a case's time over the time of `base` in the same round.

    Args:
        timing: of the case.
        base: of the case to compare with.

    Returns:
        The ratio; None if either case failed.
    """
    if not (timing.seconds and base.seconds):
        return None
    return float(np.median([mine / other for mine, other in zip(timing.seconds, base.seconds)]))


def milliseconds(seconds: float) -> str:
    """Returns `seconds` as milliseconds with two decimals."""
    return f"{1e3 * seconds:.2f}"


def table(
    title: str, columns: dict[str, dict[str, Timing]], base: str, notes: dict[str, str] | None = None,
    unit: str = "ms", show: Callable[[float], str] = milliseconds,
) -> str:  # fmt: skip
    """Returns a Markdown table of medians and ratios, one row for each case.

    Args:
        title: the line above the table.
        columns: the timings, `{column: {case: timing}}`.
        base: the case that the ratios compare with.
        notes: text for the last column, by case; None: no such column.
        unit: of the figures.
        show: turns seconds into a figure in `unit`.
    """
    lines = [title, "", "| |" + "".join(f" {name}, {unit} | × |" for name in columns) + (" |" if notes else "")]
    lines.append("|---|" + "--:|--:|" * len(columns) + ("---|" if notes else ""))
    reasons = []
    for case in next(iter(columns.values())):
        row = f"| {case} |"
        for column, timings in columns.items():
            timing, times = timings[case], ratio(timings[case], timings[base])
            row += f" {show(timing.median)} |" if timing.seconds else " – |"
            row += f" {times:.2f} |" if times else " |"
            if timing.reason:
                reasons.append(f"{case}, {column}: {timing.reason}")
        lines.append(row + (f" {notes.get(case, '')} |" if notes else ""))
    return "\n".join([*lines, "", *(f"Not measured: {reason}" for reason in reasons), ""])


def records(columns: dict[str, dict[str, Timing]], base: str, **about) -> list[dict]:
    """Returns the contents of `table` as JSON objects, one for each case and column, with every time in seconds.

    Args:
        columns: the timings, `{column: {case: timing}}`.
        base: the case that the ratios compare with.
        **about: further entries of each object.
    """
    return [
        {**about, "case": case, "what": column, "ratio": ratio(timing, timings[base]), **timing._asdict()}
        for column, timings in columns.items()
        for case, timing in timings.items()
    ]


def machine(*distributions: str) -> dict:
    """Describes the machine: devices, cores, load average of the last minute, time, versions.

    Args:
        *distributions: packages whose versions to add.
    """
    versions = {}
    for name in ("jax", "jaxlib", "flax", "torch", "timm", "halonet-pytorch", *distributions):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "device": jax.devices()[0].device_kind, "backend": jax.default_backend(), "cores": len(os.sched_getaffinity(0)),
        "devices": mesh().size,
        "load": round(os.getloadavg()[0], 2), "time": time.strftime("%Y-%m-%d %H:%M:%S"), "versions": versions,
    }  # fmt: skip


def check_json(path: str) -> None:
    """Checks, before minutes of timing, that the folder of the output file exists.

    Args:
        path: the file; "": none.

    Raises:
        UsageError: the folder does not exist.
    """
    if path and not os.path.isdir(os.path.dirname(path) or "."):
        raise app.UsageError(f"--json={path}: the folder does not exist; make it, or give another file")


def write_json(path: str, results: list[dict], about: dict) -> None:
    """Writes `{"machine": …, "load_after": …, "results": [records…]}` to a file.

    Args:
        path: the file.
        results: from `records`.
        about: from `machine`.
    """
    with open(path, "w") as file:
        json.dump({"machine": about, "load_after": round(os.getloadavg()[0], 2), "results": results}, file, indent=1)
        file.write("\n")


def torch_device(dtype: str):
    """Returns PyTorch's module, device and dtype. The device is the GPU if JAX uses one, else the CPU.

    On a GPU, float32 products use TF32, as JAX's do.

    Args:
        dtype: name of the dtype, such as "bfloat16".

    Raises:
        RuntimeError: JAX uses an accelerator that PyTorch cannot use.
    """
    import torch

    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} has no device like JAX's {jax.devices()[0].device_kind}")
    on_gpu = jax.default_backend() != "cpu"
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    return torch, torch.device("cuda" if on_gpu else "cpu"), getattr(torch, dtype)


def torch_wait(out):
    """Waits for PyTorch's GPU. On a CPU, calls return when they are done.

    Args:
        out: the result of the call, which is not used.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
