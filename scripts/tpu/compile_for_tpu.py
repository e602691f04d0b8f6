"""Says whether a recipe fits a TPU slice and estimates its speed. Compiles the real steps for the slice, without a TPU.

    pip install -e ".[compile_check]"
    python scripts/tpu/compile_for_tpu.py --config=configs/h4.py --topology=v5e:8x16 [--config.KEY=VALUE …] [--quick]
    python scripts/tpu/compile_for_tpu.py --table [--table_minutes=60]

It compiles the programs that training runs (`halonet_jax.training.programs`). Memory, FLOPs, bytes and collectives are
known after about a minute (four for a detector), before machine code. For a detector, FLOPs and bytes are also given by
part. The estimate of time needs machine code, which takes five to fifteen minutes more, and longer for a detector;
`--quick` leaves it out. Machine code is compiled with `model.scan=True`, because it would take several times as long
without it. FLOPs do not change with it, memory does. If the train step does not fit, the script searches for settings
that do.

`--table` compiles the missing rows of docs/tpu_sizing.md, the most important first, and writes the file. You can stop
it; the next run continues.

Exit codes: 0 fits; 1 does not fit; 2 bad input; 3 the compiler failed.
"""

import sys
import time
from collections.abc import Callable

import ml_collections
from absl import flags
from ml_collections import config_flags

from halonet_jax import command_line, data
from halonet_jax.costs import chips, tpu_compile, tpu_table

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Recipe, such as configs/h4.py.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Slice by its chips, such as v5e:4x4, v4:4x4x4 or v3:8x8.")
_QUICK = flags.DEFINE_bool("quick", False, "Only memory, FLOPs, bytes and collectives.")
_TABLE = flags.DEFINE_bool("table", False, "Continue docs/tpu_sizing.md.")
_TABLE_MINUTES = flags.DEFINE_float("table_minutes", 0, "Start no compile after this many minutes; 0: no limit.")


def main() -> int:
    """Runs the command that the flags ask for. Returns the exit code.

    Raises:
        UsageError: a flag is missing.
    """
    if _TABLE.value:
        return tpu_table.main(_TABLE_MINUTES.value, _QUICK.value)
    for name, value in (("config", _CONFIG.value), ("topology", _TOPOLOGY.value)):
        if value is None:
            raise command_line.UsageError(f"--{name} is missing: {flags.FLAGS[name].help}")
    try:
        return _check(_CONFIG.value, _TOPOLOGY.value, _QUICK.value)
    except tpu_compile.CompileFailed as error:
        print(f"error: the compiler failed: {error}", file=sys.stderr)
        return 3


def _check(config: ml_collections.ConfigDict, topology: str, quick: bool) -> int:
    """Compiles and prints. If the train step does not fit, searches for settings that do."""
    begin = time.monotonic()
    tell = lambda text: print(f"[{time.monotonic() - begin:4.0f} s] {text}", flush=True)
    parsed = tpu_compile.check(config, topology)
    chip = parsed.chip
    size = "×".join(str(side) for side in data.height_and_width(config.data.image_size))
    cores = " of two cores" if chip.cores_per_device == 2 else ""
    print(
        f"{config.model.name}, {size} px, batch {config.batch_size} on {topology}: {parsed.num_chips} chips, "
        f"{parsed.num_devices} devices ({'cores' if chip.devices_per_chip == 2 else 'chips' + cores}), "
        f"{config.batch_size // parsed.num_devices} images each; figures are of one device",
        flush=True,
    )
    held = config.batch_size // config.optimizer.accumulation_steps // parsed.num_devices
    if (group := config.model.bn_group_size) and held % group:
        print(
            f"note: batch-norm groups of {group} images span devices, because a device holds {held} at once. Every norm then makes "
            f"all-reduces; --config.model.bn_group_size={held} avoids them"
        )
    tell("compiling the train step, up to memory assignment …")
    train = tpu_compile.compile_step(config, topology, "train")
    tell("compiling the eval step, up to memory assignment …")
    evaluation = tpu_compile.compile_step(config, topology, "eval")
    tell("done")
    print(train["description"])
    eval_batch_size = config.eval_batch_size or config.batch_size
    _report("train step", train, chip)
    _report("eval step", evaluation, chip)
    if not train["fits"]:
        print("The train step does not fit; searching for settings that do …", flush=True)
        _print_remedies(tpu_compile.make_fit(config, topology, train, tell), tpu_compile.Settings.of(config), chip)
        return 1
    if not quick:
        _estimate_time(config, topology, tell)
    if not evaluation["fits"]:
        print(f"VERDICT: training fits, evaluation does not; set --config.eval_batch_size below {eval_batch_size}")
        return 1
    print("VERDICT: fits")
    return 0


def _print_remedies(found: list, here: tpu_compile.Settings, chip: chips.Chip) -> None:
    """Prints the verdict for a train step that does not fit."""
    if not found:
        print("VERDICT: does not fit, and no settings that were tried fit; use a larger slice, or chips with more memory")
        return
    print(f"VERDICT: does not fit. These settings were compiled and fit, with their memory of {_gib(chip.memory)}:")
    for settings, record in found:
        least = 1e3 * chips.roofline_seconds(chip, record["flops"], record["bytes"])
        print(f"  {settings.flags(here):70s} {_gib(record['peak_bytes'])}, at least {least:.0f} ms a step")
    print("  or use a slice so large that a device holds no more images than such a micro-batch")


def _estimate_time(config: ml_collections.ConfigDict, topology: str, tell: Callable[[str], None]) -> None:
    """Compiles the train step to machine code and prints the time that its cycles take."""
    chip = chips.topology(topology).chip
    config, scan = config.copy_and_resolve_references(), config.model.scan
    config.model.scan |= config.optimizer.name != "lamb"  # LAMB does not work with it
    with_scan = ", with --config.model.scan=True" if config.model.scan > scan else ""
    tell(f"compiling the train step to machine code{with_scan}; this takes minutes …")
    record = tpu_compile.compile_step(config, topology, "train", quick=False)
    tell("done")
    if "cycles" not in record:
        print(f"  no estimate of time: {with_scan.strip(', ')} the step needs {_gib(record['needed_bytes'])} and does not fit")
        return
    seconds = chips.step_seconds(chip, *(record.get(key, 0) for key in ("flops", "bytes", "cycles", "kernel_flops")))
    print(
        f"estimated time     {1e3 * seconds:.3g} ms a step, {config.batch_size / seconds:.4g} images/s on the slice\n"
        f"  from the backend's estimated cycles, loops multiplied, at {chip.clock / 1e9:g} GHz; attention kernels count as\n"
        f"  their FLOPs at the peak; collectives, gathers and max pooling's gradient are left out; for work that memory bounds\n"
        f"  the estimate may be {1 / chip.add_share:.1f} times too long"
    )


def _report(name: str, record: dict, chip: chips.Chip) -> None:
    """Prints the figures of a step."""
    print(f"{name}:")
    if "peak_bytes" not in record:
        print(f"  memory         {_gib(record['needed_bytes'])} for activations alone, of {_gib(chip.memory)}")
        return
    print(
        f"  memory         {_gib(record['peak_bytes'])} of {_gib(chip.memory)}: parameters {_gib(record['param_bytes'])}, "
        f"optimizer and statistics {_gib(record['optimizer_bytes'])}, EMA {_gib(record['ema_bytes'])}, "
        f"temporaries {_gib(record['temp_bytes'])}"
    )
    print(
        f"  work           {record['flops'] / 1e12:.3g} TFLOP in matrix units, {record['bytes'] / 1e9:.3g} GB to and from memory"
    )
    for kind, count, size in record["collectives"]:
        print(f"  {kind:14s} {count} times, {size / 1e6:.2f} MB")
    for part, (flops, size) in record.get("parts", {}).items():
        print(f"    {part:22s} {flops / 1e12:.3g} TFLOP, {size / 1e9:.3g} GB")
    for loop in record["unknown_loops"]:
        print(f"  warning: {loop} repeats an unknown number of times and is counted once")
    least = chips.roofline_seconds(chip, record["flops"], record["bytes"])
    print(
        f"  least time     {1e3 * least:.3g} ms: the larger of FLOPs over {chip.flops / 1e12:g} TFLOP/s and bytes over "
        f"{chip.bandwidth / 1e9:g} GB/s"
    )


def _gib(size):
    return f"{size / chips.GIB:.3g} GiB"


if __name__ == "__main__":
    command_line.run(main)
