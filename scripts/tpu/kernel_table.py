"""Compiles the fused attention kernels of every layer of HaloNet H0 to H7 for TPU chips, without a TPU.

    pip install -e ".[compile_check]"
    python scripts/tpu/kernel_table.py --chips=v5e,v5p [--models=h1,h4] [--batch=2] [--traffic]

For each shape it prints whether the forward and the backward pass compile, their on-chip memory, and the compile time.

`--traffic` adds the bytes to and from main memory, in MB:

- kernels: of the kernels, by their specs.
- layer: of the whole layer, including XLA's work around the kernels, by the compiler.
- xla: of `ops.einsum`, by the compiler.
- least: q, k, v and the tables read once, and the output written once. For the backward pass, also q, k, v, the tables
  and the output's gradient read once, and all gradients written once.

The gradient includes both passes. Use a batch of 64 or more with `--traffic`: the compiler puts small arrays into
on-chip memory and does not count their bytes.
"""

import functools
import math
import os
import re
import sys
import time

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.update(
    TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-8", TPU_WORKER_HOSTNAMES="localhost", JAX_PLATFORMS="cpu"
)  # fmt: skip

import jax  # noqa: E402  (after the variables above)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from halonet_jax.costs import chips, floors, hlo, hlo_cost  # noqa: E402
from halonet_jax.ops import einsum, halo_attention, tpu  # noqa: E402

_CHIPS = flags.DEFINE_list("chips", ["v4", "v5e", "v5p", "v6e"], "Chips to compile for.")
_MODELS = flags.DEFINE_list("models", ["h0", "h1", "h2", "h3", "h4", "h5", "h6", "h7"], "Models.")
flags.register_validator("models", lambda names: set(names) <= set(floors.IMAGE_SIZES), "known: h0 to h7")
flags.register_validator("chips", lambda names: set(names) <= set(SLICES), "known: v3, v4, v5e, v5p, v6e")
_BATCH = flags.DEFINE_integer("batch", 2, "Images on the chip.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ("bfloat16", "float32"), "Dtype of q, k and v.")
_TRAFFIC = flags.DEFINE_bool("traffic", False, "Also count bytes of main memory.")

SLICES = {"v3": "2x2", "v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2"}


def _layers(model: str) -> list[tuple[str, dict]]:
    """Returns the attention layers of a model, each shape of a stage once: name, and arguments of `_report`."""
    found = {}
    for n in floors.attention_layers(model):
        shape = dict(
            size=n.height, stride=n.stride, heads=n.num_heads, channels=n.channels // n.num_heads,
            values=n.value_channels // n.num_heads, block_size=n.block_size, halo_size=n.halo_size,
        )  # fmt: skip
        found[f"{model} stage {n.stage}{', first' if n.stride > 1 else ''}"] = shape
    return list(found.items())


def _main(_) -> int:
    failed = 0
    for name in _CHIPS.value:
        chip = chips.CHIPS[name]
        device = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{SLICES[name]}", **chip.options).devices[0]
        seen = {}
        for label, shape in (layer for model in _MODELS.value for layer in _layers(model)):
            key = tuple(shape.values())
            if key in seen:
                print(f"{name} {label:18s} as {seen[key]}", flush=True)
                continue
            seen[key] = label
            with jax.sharding.use_abstract_mesh(jax.sharding.Mesh([device], "data").abstract_mesh):
                text, ok = _report(device, **shape)
            failed += not ok
            print(f"{name} {label:18s} {' '.join(f'{k}={v}' for k, v in shape.items())}: {text}", flush=True)
    return 1 if failed else 0


def _report(device, size, stride, heads, channels, values, block_size, halo_size) -> tuple[str, bool]:
    """Compiles one shape for the current mesh. Returns a line, and whether it compiles or is left to XLA."""
    dtype, batch = jnp.dtype(_DTYPE.value), _BATCH.value
    out_size = -(-size // stride)
    place = lambda shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))
    # As in a model, all heads are in one axis, and the layer reshapes.
    pixels, queries = (batch, size, size), (batch, out_size, out_size)
    table = place((2 * block_size + 2 * halo_size - 1, channels // 2))
    inputs = *(place((*at, heads * n)) for at, n in ((queries, channels), (pixels, channels), (pixels, values))), table, table
    cotangent = place((*queries, heads * values))
    options = dict(block_size=block_size, halo_size=halo_size, stride=stride)

    def attend(implementation, q, k, v, *tables):
        q, k, v = (x.reshape(*x.shape[:3], heads, -1) for x in (q, k, v))
        return halo_attention(q, k, v, *tables, **options, implementation=implementation).reshape(*queries, -1)

    def gradient(implementation, cotangent, *inputs):
        return jax.vjp(functools.partial(attend, implementation), *inputs)[1](cotangent)

    split = [jax.ShapeDtypeStruct((*x.shape[:3], heads, x.shape[3] // heads), dtype) for x in inputs[:3]]
    if reason := tpu.unsupported(*split, **options):
        return f"left to xla: {reason}", True
    begin = time.monotonic()
    try:
        text = _compiled_text(gradient, tpu.attend, cotangent, *inputs)
    except jax.errors.JaxRuntimeError as error:
        first = re.search(r"\d+\.\d+M[^.]*of[^.]*\d+\.\d+M|[Ee]xceeded[^.]*\.\d+M|.{0,200}", str(error)).group()
        return f"DOES NOT COMPILE: {first}", False
    seconds = time.monotonic() - begin
    used = {
        kind: int(size) / 2**20
        for kind, size in re.findall(
            r'%halo_attention_(\w+)[.\d]* = .*"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', text
        )
    }
    plan = tpu.make_plan(*split, **options, centered=False, masked=True, logits_scale=1.0)
    words = [f"compiles in {seconds:.0f} s"]
    words += [
        f"{kind} {used[kind]:.1f} MiB of VMEM, {tpu.vmem_estimate(plan, kind == 'backward') / 2**20:.1f} estimated"
        for kind in ("forward", "backward")
    ]
    if _TRAFFIC.value:
        small = sum(math.prod(x.shape) * x.dtype.itemsize for x in inputs)
        out = math.prod(cotangent.shape) * dtype.itemsize
        for kind, function, arguments, least in (
            ("forward", attend, inputs, small + out), ("gradient", gradient, (cotangent, *inputs), 3 * small + 2 * out)
        ):  # fmt: skip
            ours, theirs = (hlo.parse(_compiled_text(function, a, *arguments)) for a in (tpu.attend, einsum.attend))
            kernels = sum(
                array.padded_bytes
                for computation in ours.computations.values()
                for call in computation.values()
                if call.opcode == "custom-call" and "halo_attention_" in call.name
                for name in (call.name, *call.operands)
                for array in hlo.arrays(computation[name].shape)
            )
            sizes = (kernels, hlo_cost.cost(ours).bytes, hlo_cost.cost(theirs).bytes, least)
            words.append(kind + " MB: kernels {:.0f}, layer {:.0f}, xla {:.0f}, least {:.0f}".format(*np.array(sizes) / 1e6))
    return "; ".join(words), True


def _compiled_text(function, implementation, *arguments) -> str:
    traced = jax.jit(functools.partial(function, implementation)).trace(*arguments)
    return traced.lower(lowering_platforms=("tpu",)).compile().as_text()


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(_main(argv)))
