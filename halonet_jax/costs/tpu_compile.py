"""Compiles a recipe's steps for TPU slices without a TPU, and searches for settings that make them fit.

Each compile runs in its own process (`compile_worker.py`): libtpu serves one compile at a time, and a quick compile
ends early, together with its process.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_collections

from halonet_jax import config as config_lib
from halonet_jax import errors
from halonet_jax.costs import chips, hlo, hlo_cost

WORKER = Path(__file__).with_name("compile_worker.py")
EXIT_BAD_TOPOLOGY = 2  # the worker's exit code
# Parts of a detector's step, by the scopes in its program; of several that fit, the first counts.
DETECTOR_PARTS = {
    "RoIAlign": "align", "NMS": "nms", "proposals without NMS": "proposals", "targets of anchors": "anchor_targets",
    "targets of regions": "roi_targets", "halo attention": "attention", "backbone without it": "backbone", "pyramid": "fpn",
    "RPN head": "rpn_head", "box head": "box_head", "mask head": "mask_head",
}  # fmt: skip


class CompileFailed(RuntimeError):
    """The compiler failed for a reason other than memory."""


class Settings(NamedTuple):
    """The settings that may change to make a run fit.

    Attributes:
        batch_size: global batch size, in images.
        accumulation_steps: micro-batches per step.
        remat: recompute activations in the backward pass.
        fsdp: devices that share one copy of the state.
        scan: loop over the equal blocks of a stage.
    """

    batch_size: int
    accumulation_steps: int
    remat: bool
    fsdp: int
    scan: bool

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> "Settings":
        """Returns the settings of a config.

        Args:
            config: a whole config.
        """
        c = config
        return cls(c.batch_size, c.optimizer.accumulation_steps, c.model.remat, c.mesh.fsdp, c.model.scan)

    def apply(self, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
        """Returns a copy of a config with these settings.

        Args:
            config: a whole config.
        """
        config = ml_collections.ConfigDict(config.to_dict())
        config.batch_size, config.optimizer.accumulation_steps = self.batch_size, self.accumulation_steps
        config.model.remat, config.mesh.fsdp, config.model.scan = self.remat, self.fsdp, self.scan
        return config

    def flags(self, than: "Settings") -> str:
        """Returns the command-line flags that change `than` into these settings, separated by spaces.

        Args:
            than: the settings to start from.
        """
        keys = ("batch_size", "optimizer.accumulation_steps", "model.remat", "mesh.fsdp", "model.scan")
        changed = [f"--config.{key}={new}" for key, new, old in zip(keys, self, than) if new != old]
        return " ".join(changed)


def check(config: ml_collections.ConfigDict, topology: str) -> chips.Topology:
    """Finds mistakes before compiling, and returns the topology.

    Args:
        config: a whole config.
        topology: a slice, such as "v5e:4x4".

    Raises:
        ConfigError: the topology or the config is invalid, or libtpu is not installed.
    """
    try:
        parsed = chips.topology(topology)
    except ValueError as error:
        raise errors.ConfigError(f"--topology: {error}") from None
    if importlib.util.find_spec("libtpu") is None:
        raise errors.ConfigError("libtpu, TPU's compiler, is not installed; pip install 'halonet_jax[compile_check]'")
    config_lib.validate(config, parsed.num_devices)
    return parsed


def compile_step(config: ml_collections.ConfigDict, topology: str, step: str = "train", quick: bool = True) -> dict:
    """Compiles one step in a process of its own.

    Args:
        config: a valid config, see `check`.
        topology: a slice, such as "v5e:4x4".
        step: "train" or "eval".
        quick: stop before machine code. It takes a tenth of the time and gives no cycles.

    Returns:
        A record of JSON values. Figures are of one device.

        Always: `fits`, `seconds` (of the compile), `num_devices`, `description`, `param_bytes`, `optimizer_bytes` (with
        batch statistics), `ema_bytes`, `versions`.

        If the compile succeeds: `peak_bytes`, `temp_bytes`, `flops`, `bytes`, `cycles` (0 if `quick`), `kernel_flops`,
        `collectives`, `unknown_loops`; for a detector also `parts`, the FLOPs and bytes of each of `DETECTOR_PARTS`.

        If the compiler runs out of memory: `needed_bytes`, of temporaries alone.

    Raises:
        ConfigError: libtpu does not know the topology.
        CompileFailed: the compiler failed for another reason. The message is its last line.
    """
    chip = chips.topology(topology).chip
    spec = {
        "config": config.to_dict(), "topology": topology, "topology_options": chip.options, "step": step, "quick": quick,
    }  # fmt: skip
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="compile_for_tpu_") as folder:
        out = Path(folder)
        (out / "spec.json").write_text(json.dumps(spec))
        arguments = [sys.executable, str(WORKER), str(out / "spec.json"), folder]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        record = {"seconds": round(time.monotonic() - begin), "fits": False}
        if (out / "about.json").exists():
            record |= json.loads((out / "about.json").read_text())
        if done.returncode == 0:
            parts = DETECTOR_PARTS if config.task == "detection" else {}
            result, text = json.loads((out / "result.json").read_text()), (out / "program.txt").read_text()
            return record | _figures(chip, result, text, parts)
    needed = re.search(r"RESOURCE_EXHAUSTED.*?\(([\d.]+)([KMGT])\) exceeds available HBM", done.stderr, re.S)
    if needed:
        return record | {"needed_bytes": float(needed.group(1)) * 1024 ** " KMGT".index(needed.group(2))}
    last = ([line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"])[-1]
    if done.returncode == EXIT_BAD_TOPOLOGY:
        message = f"--topology: libtpu does not know {topology!r} ({last}); use a shape that Cloud offers, such as v5e:4x4"
        raise errors.ConfigError(message)
    raise CompileFailed(last)


def _figures(chip, result, text, parts):
    module = hlo.parse(text)
    by_part = {part: [cost.flops, cost.bytes] for part, cost in hlo_cost.by_part(module, parts).items()}
    return result | hlo_cost.cost(module)._asdict() | ({"parts": by_part} if parts else {}) | {
        "fits": result["peak_bytes"] <= chip.memory,
        "collectives": [tuple(collective) for collective in hlo.collectives(text)],
        "unknown_loops": hlo.unknown_loops(module),
    }  # fmt: skip


def make_fit(
    config: ml_collections.ConfigDict,
    topology: str,
    record: dict,
    tell: Callable[[str], None],
    compile_step: Callable[..., dict] = compile_step,
) -> list[tuple[Settings, dict]]:
    """Searches for settings that fit when the config's own do not, by compiling.

    It tries micro-batches without and with `model.remat`, because they keep the recipe's global batch. It halves the
    micro-batch until it fits, starting from the memory that the failed compile asked for. It tries to shard the state
    with `mesh.fsdp` only if the state takes more than a quarter of the memory.

    Args:
        config: the config that does not fit.
        topology: a slice, such as "v5e:4x4".
        record: what `compile_step` returned for it.
        tell: called with each line of progress.
        compile_step: a function like `compile_step`, for example one that stores the records.

    Returns:
        The settings that fit, as (settings, record), those with the least `chips.roofline_seconds` first.
    """
    here, parsed = Settings.of(config), chips.topology(topology)
    found = []

    def attempt(settings):
        tell(f"trying {settings.flags(here)} …")
        new = compile_step(settings.apply(config), topology)
        needs = new.get("peak_bytes") or new["needed_bytes"]
        tell(f"{'fits' if new['fits'] else 'does not fit'}: {needs / chips.GIB:.1f} GiB ({new['seconds']} s)")
        if new["fits"]:
            found.append((settings, new))
        return new

    state = sum(record.get(key, 0) for key in ("param_bytes", "optimizer_bytes", "ema_bytes"))
    if state > parsed.chip.memory / 4 and here.fsdp == 1:
        attempt(here._replace(fsdp=parsed.num_devices))
    for remat in sorted({here.remat, True}):
        last = record if remat == here.remat else attempt(here._replace(remat=remat))
        steps = here.accumulation_steps
        while not last["fits"]:
            needs = last.get("peak_bytes") or last["needed_bytes"]
            # Activations shrink with the micro-batch, the state does not. Halve it at least once.
            excess = (needs - state) / max(parsed.chip.memory - state, 1)
            factor = 2
            while factor < excess:
                factor *= 2
            steps *= factor
            if not _divides(config, steps, parsed.num_devices):
                break
            last = attempt(here._replace(accumulation_steps=steps, remat=remat))
    return sorted(found, key=lambda item: chips.roofline_seconds(parsed.chip, item[1]["flops"], item[1]["bytes"]))


def _divides(config, steps, num_devices):
    try:
        config_lib.validate(Settings.of(config)._replace(accumulation_steps=steps).apply(config), num_devices)
    except errors.ConfigError:
        return False
    return True
