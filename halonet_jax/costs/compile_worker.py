"""Compiles one step of a recipe for a TPU topology. `tpu_compile.py` starts it as a process and reads its output.

python -m halonet_jax.costs.compile_worker SPEC.json OUT_FOLDER

The spec holds `config` (as `config.to_json` writes it), `topology` with `topology_options`, `step` ("train" or "eval")
and `quick`. A quick compile ends once the compiler has assigned memory, before it generates machine code. That takes a
tenth of the time. Memory, FLOPs, bytes and collectives are known by then; estimated cycles are not. The worker writes
`about.json` (sizes of the state) into the folder. A compile that succeeds adds `program.txt` (the optimised program)
and `result.json` (its memory).
"""

import glob
import importlib.util
import json
import math
import os
import re
import sys
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    _spec, _out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    # Set before jax is imported, so that libtpu looks for neither TPUs nor the cloud's metadata server.
    os.environ.update(
        JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-8", TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )  # fmt: skip
    if _spec["quick"]:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" --xla_dump_to={_out / 'dump'}"

import jax  # noqa: E402  (after the variables above)
from jax.experimental import topologies  # noqa: E402

from halonet_jax import config as config_lib  # noqa: E402
from halonet_jax import tasks  # noqa: E402
from halonet_jax.training import programs, sharding  # noqa: E402

IMAGENET_TRAIN_IMAGES = 1_281_167
EXIT_BAD_TOPOLOGY = 2


def lower(config, topology: str, options: dict, step: str):
    """Lowers a step for a topology. Exits with `EXIT_BAD_TOPOLOGY` if libtpu does not know the topology.

    Args:
        config: a valid config.
        topology: the slice, such as "v5e:4x4".
        options: further arguments of `jax.experimental.topologies.get_topology_desc`.
        step: "train" or "eval".

    Returns:
        The lowered step (`jax.stages.Lowered`), its `Programs` and the topology's devices.
    """
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except jax.errors.JaxRuntimeError as error:
        print(str(error).partition(": ")[2] or error, file=sys.stderr)
        sys.exit(EXIT_BAD_TOPOLOGY)
    mesh = sharding.make_mesh(config.mesh.fsdp, devices)
    steps_per_epoch = IMAGENET_TRAIN_IMAGES / config.batch_size
    definition = tasks.find(config)
    task = definition.make_task(config, definition.expected_metadata(config))
    total_steps = max(1, round(config.num_epochs * steps_per_epoch), config.max_steps)
    program = programs.make_programs(config, task, mesh, total_steps, steps_per_epoch)
    batch_size = config.batch_size if step == "train" else config.eval_batch_size or config.batch_size
    batch = program.abstract_batch(task, batch_size, training=step == "train")
    if step == "train":
        traced = program.train_step.trace(program.abstract_state, batch)
    else:
        traced = program.eval_step.trace(program.abstract_state.weights()["eval"], batch)
    return traced.lower(lowering_platforms=("tpu",)), program, devices


def bytes_per_device(tree) -> int:
    """Returns the bytes that a tree takes on one device, without the padding of tiled layouts.

    Args:
        tree: pytree of `ShapeDtypeStruct` with shardings.
    """
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def describe(program, devices) -> dict:
    """Returns the facts that are known before compiling: devices, sizes of the state in bytes, versions.

    Args:
        program: a `Programs`.
        devices: the topology's devices.
    """
    state = program.abstract_state
    return {
        "num_devices": len(devices),
        "device_kind": devices[0].device_kind,
        "description": program.description,
        "param_bytes": bytes_per_device(state.params),
        "optimizer_bytes": bytes_per_device((state.step, state.opt_state, state.model_state)),
        "ema_bytes": bytes_per_device((state.ema_params, state.ema_model_state)),
        "versions": {"jax": jax.__version__, "libtpu": _libtpu_version()},
    }


def _libtpu_version():
    import libtpu

    return libtpu.__version__


def exit_after_memory_assignment(out: Path) -> None:
    """Watches the compiler's dump. Writes the results and ends the process as soon as memory is assigned.

    Args:
        out: the output folder, with the compiler's `dump`.
    """
    while True:
        time.sleep(0.5)
        done = glob.glob(f"{out}/dump/*.jit_*_step.*after_optimizations_after_buffer_assignment.txt")
        if not done:
            continue
        while "\nENTRY" not in (text := Path(done[0]).read_text()) or not text.rstrip().endswith("\n}"):
            time.sleep(0.5)  # still being written
        report = Path(done[0].replace("_after_buffer_assignment.txt", "-memory-usage-report.txt")).read_text()
        total = re.search(r"\(color=0\)\nTotal bytes: (\d+)", report).group(1)
        buffers = Path(done[0].replace("_after_buffer_assignment.txt", "-buffer-assignment.txt")).read_text()
        temp = re.findall(r"^allocation \d+: size (\d+), page \d+, preallocated-temp", buffers, re.M)
        write(out, text, {"peak_bytes": int(total), "temp_bytes": sum(map(int, temp)), "quick": True})
        os._exit(0)


def write(out: Path, text: str, result: dict) -> None:
    """Writes a compile's results.

    Args:
        out: the output folder.
        text: the optimised program.
        result: `peak_bytes`, `temp_bytes` and `quick`.
    """
    (out / "program.txt").write_text(text)
    (out / "result.json").write_text(json.dumps(result))


def main(spec: dict, out: Path) -> None:
    """Compiles a step and writes the results.

    Args:
        spec: the spec, see the top of this module.
        out: the output folder.
    """
    config = config_lib.from_json(json.dumps(spec["config"]))
    lowered, program, devices = lower(config, spec["topology"], spec["topology_options"], spec["step"])
    (out / "about.json").write_text(json.dumps(describe(program, devices)))
    if spec["quick"]:
        threading.Thread(target=exit_after_memory_assignment, args=(out,), daemon=True).start()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    write(out, compiled.as_text(), {"peak_bytes": peak, "temp_bytes": memory.temp_size_in_bytes, "quick": False})


if __name__ == "__main__":
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("libtpu is not installed")
    main(_spec, _out)
