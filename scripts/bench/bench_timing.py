"""What the benchmarks share: timing rivals in turns, PyTorch's side of it, and tables of ratios."""

import contextlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants some of a GPU's memory, too

import jax
import numpy as np
import rival_cudnn
from absl import app

from halonet_jax.ops import einsum, einsum_cpu, gpu, tpu
from halonet_jax.training import sharding

# What there is by platform, for halonet_jax's `implementation`.
OURS = {
    "cpu": {"einsum_cpu": einsum_cpu.attend, "einsum": einsum.attend},
    "gpu": {"einsum": einsum.attend, "fused GPU": gpu.attend, "through cuDNN's attention": rival_cudnn.attend},
    "tpu": {"einsum": einsum.attend, "fused TPU": tpu.attend},
}
SLOW_SECONDS = 2.0  # a call that takes longer is repeated fewer times
QUEUED_SECONDS = 0.02  # of calls, before waiting on accelerators: their start is not what is measured
PEERS = {"torch": "torch", "timm": "timm", "halonet_pytorch": "halonet-pytorch"}  # module: distribution


class Case(NamedTuple):
    """One contestant.

    Attributes:
        name: as the table shows it.
        make: builds it and returns what starts one call, whose result `wait` takes. What either raises is the reason why the
            table has no figure.
        wait: blocks until a call is done.
    """

    name: str
    make: Callable[[], Callable[[], Any]]
    wait: Callable[[Any], Any] = jax.block_until_ready


class Timing(NamedTuple):
    """Seconds a call, in the order of the rounds; empty where there is only a reason."""

    seconds: list[float]
    reason: str = ""

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


def mesh() -> jax.sharding.Mesh:
    """One accelerator, or all that `sharding.use_cpu_cores` made of a CPU: PyTorch, too, has one accelerator, or all cores."""
    return sharding.make_mesh(devices=jax.devices() if jax.default_backend() == "cpu" else jax.devices()[:1])


def place(tree: Any, cut: bool) -> Any:
    """Arrays on the devices of `mesh`, cut along their first axis or whole on each."""
    return jax.device_put(tree, jax.NamedSharding(mesh(), sharding.BATCH if cut else jax.P()))


def ours(first: str, reference: bool) -> dict[str, Any]:
    """halonet_jax's implementations on this device, `first` first: what a table calls them, and what the layer takes."""
    found = {name: name for name in (first, "reference")[: 1 + reference]}
    return {f"halonet_jax {name}": value for name, value in (found | OURS[jax.default_backend()]).items()}


def measure(cases: list[Case], repeats: int, label: str) -> dict[str, Timing]:
    """Times all cases in turns, so that what else the machine does hits all alike. The first call, which compiles, is not timed."""
    progress = Progress(label, len(cases) * (repeats + 1))
    timings, ready = {}, []  # ready: (case, what starts it, calls to queue, rounds)
    for case in cases:
        progress.at(f"preparing {case.name}")
        timings[case.name] = Timing([])
        try:
            start = case.make()
            case.wait(start())
            once = _seconds(case, start, 1)
        except Exception as error:  # whatever a peer dies of is to be told, and the rest to go on
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
    """The reason that a table gives."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; pip install -e '.[bench]'"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:150] if lines else ''}"


class Progress:
    """One line on stderr: where the run is, and for how long still. Where stderr is a file, a line every ten seconds."""

    def __init__(self, label, total):
        self.label, self.total, self.count, self.begin, self.written = label, total, 0, time.monotonic(), 0.0

    def at(self, what: str):
        now = time.monotonic()
        if not sys.stderr.isatty() and now - self.written < 10:
            return
        self.written = now
        eta = f", ETA {(now - self.begin) / self.count * (self.total - self.count):.0f} s" if self.count else ""
        start, end = ("\r\033[K", "") if sys.stderr.isatty() else ("", "\n")
        print(f"{start}{self.label}: {self.count}/{self.total}{eta}: {what}", end=end, file=sys.stderr, flush=True)

    def done(self, count: int):
        self.count += count

    def close(self):
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def ratio(timing: Timing, base: Timing) -> float | None:
    """Median over the rounds of this case's time over that of `base` in the same round."""
    if not (timing.seconds and base.seconds):
        return None
    return float(np.median([mine / other for mine, other in zip(timing.seconds, base.seconds)]))


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def table(
    title: str, columns: dict[str, dict[str, Timing]], base: str, notes: dict[str, str] | None = None,
    unit: str = "ms", show: Callable[[float], str] = milliseconds,
) -> str:  # fmt: skip
    """Medians (by `show`, in `unit`) and ratios to `base` of each case, `columns` being `{what: {case: timing}}`; Markdown."""
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
    """The same as JSON: one object a case and column, with every time in seconds."""
    return [
        {**about, "case": case, "what": column, "ratio": ratio(timing, timings[base]), **timing._asdict()}
        for column, timings in columns.items()
        for case, timing in timings.items()
    ]


def machine(*distributions: str) -> dict:
    """What the figures were taken on; `load` is the number of processes that wanted to run in the last minute."""
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
    """Before minutes of timing: the file's folder must be there."""
    if path and not os.path.isdir(os.path.dirname(path) or "."):
        raise app.UsageError(f"--json={path}: there is no such folder; make it, or give another file")


def write_json(path: str, results: list[dict], about: dict) -> None:
    """`{"machine": …, "load_after": …, "results": [records…]}`."""
    with open(path, "w") as file:
        json.dump({"machine": about, "load_after": round(os.getloadavg()[0], 2), "results": results}, file, indent=1)
        file.write("\n")


def torch_device(dtype: str):
    """`(torch, device, dtype)`; the GPU where JAX has one and PyTorch, too, with float32 products as JAX does them there (TF32)."""
    import torch

    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} has no device like JAX's {jax.devices()[0].device_kind}")
    on_gpu = jax.default_backend() != "cpu"
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    return torch, torch.device("cuda" if on_gpu else "cpu"), getattr(torch, dtype)


def torch_wait(out):
    """Waits for PyTorch's GPU; on a CPU calls return when they are done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
