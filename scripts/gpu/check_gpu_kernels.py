"""Checks the GPU kernels of halo attention without a GPU: every layer of H0 to H7, forward and backward.

    python scripts/gpu/check_gpu_kernels.py                                       # lowers for CUDA in a minute
    pip install triton && python scripts/gpu/check_gpu_kernels.py --compile=80,90  # also compiles for A100 and H100

Lowering shows that JAX can express the kernels in Triton's language: shapes, types and powers of two. `--compile` uses
Triton's own compiler, of a release close to the one in JAX. It gives registers, spilled memory and shared memory for
each architecture. Nothing runs here. The tests in tests/ops check the numbers by interpretation. Speed needs a GPU.
"""

import importlib.util
import re
import subprocess
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from halonet_jax.costs import floors
from halonet_jax.ops import halo_attention

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # by compute capability (CUDA C++ guide)
_MODELS = flags.DEFINE_list("models", ["h0", "h1", "h2", "h3", "h4", "h5", "h6", "h7"], "Models, of the recipes in configs/.")
flags.register_validator("models", lambda names: set(names) <= set(floors.IMAGE_SIZES), "known: h0 to h7")
_DTYPES = flags.DEFINE_list("dtypes", ["bfloat16", "float32"], "Dtypes of the computation.")
_COMPILE = flags.DEFINE_list("compile", [], "Compute capabilities to compile for: 80 (A100), 89 (L4, RTX 40), 90 (H100).")
_BATCH = flags.DEFINE_integer("batch", 8, "Images.")


def _main(_):
    failed = 0
    for name, layer in layers(_MODELS.value).items():
        for dtype in _DTYPES.value:
            kernels = lower(**layer, dtype=dtype, batch=_BATCH.value)
            for kernel, module, warps, stages in kernels:
                line = f"{name} {dtype} {kernel}: {warps} warps, {stages} stages"
                for capability in map(int, _COMPILE.value):
                    registers, spilled, shared = _compile_triton(module, capability, warps, stages)
                    bad = shared > SHARED_KIB[capability] * 1024
                    failed += bad
                    line += (
                        f" | sm_{capability} {registers} registers, {spilled} B spilled, {shared / 1024:.0f} KiB{' !' * bad}"
                    )
                print(line, flush=True)
    return failed and 1


def layers(models) -> dict[str, dict]:
    """Returns the attention layers of models, each shape once.

    Args:
        models: names of models, such as ["h0", "h4"].

    Returns:
        Keyword arguments of `lower`, by a name such as "h4 stage 1 stride 1".
    """
    found = {}
    for model in models:
        for n in floors.attention_layers(model):
            shape = dict(
                size=n.height, stride=n.stride, heads=n.num_heads, channels=n.channels // n.num_heads,
                values=n.value_channels // n.num_heads, block_size=n.block_size, halo_size=n.halo_size,
            )  # fmt: skip
            if shape not in found.values():
                found[f"{model} stage {n.stage} stride {n.stride}"] = shape
    return found


def lower(*, size, heads, channels, values, block_size, halo_size, stride, dtype, batch=1, **options):
    """Lowers the forward and the backward pass for CUDA.

    Args:
        size: side of the map of keys, in pixels.
        heads: number of heads.
        channels: of queries and keys, per head.
        values: channels of the values, per head.
        block_size: side of a block of queries, in pixels.
        halo_size: border around the block, in pixels.
        stride: of the queries.
        dtype: of queries, keys and values.
        batch: images.
        **options: further arguments of `halo_attention`.

    Returns:
        (name, module as MLIR bytecode, warps, stages) of each kernel.
    """
    small, table = -(-size // stride), (2 * block_size + 2 * halo_size - 1, channels // 2)
    shapes = (batch, small, small, heads, channels), (batch, size, size, heads, channels), (batch, size, size, heads, values)
    arrays = *(jax.ShapeDtypeStruct(s, dtype) for s in shapes), *(jax.ShapeDtypeStruct(table, jnp.float32),) * 2

    def loss(*arrays):
        out = halo_attention(
            *arrays, block_size=block_size, halo_size=halo_size, stride=stride, implementation="pallas", **options
        )
        return out.astype(jnp.float32).sum()

    # Newer JAX needs the GPU's name, though the result is the same for all.
    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=gpu)):
        text = jax.jit(jax.grad(loss, argnums=range(5))).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    unescape = lambda s: re.sub(rb"\\([0-9A-F]{2})|\\\\", lambda m: bytes.fromhex(m[1].decode()) if m[1] else b"\\", s.encode())
    pattern = r'ir = "([^"]*)", name = "([^"]*)", num_stages = (\d+) : i32, num_warps = (\d+) : i32'
    return [(name, unescape(ir), int(warps), int(stages)) for ir, name, stages, warps in re.findall(pattern, text)]


def _compile_triton(module: bytes, capability: int, warps: int, stages: int):
    """Returns registers and spilled bytes of a thread, and bytes of shared memory of a program."""
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("error: --compile needs Triton; pip install triton")
    import triton
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget, Language
    from triton.compiler.compiler import make_backend

    warnings.simplefilter("ignore")
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": warps, "num_stages": stages}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ttir")
        path.write_text(_as_text(module))
        backend, context, passes = make_backend(target), ir.context(), {}
        ir.load_dialects(context)
        backend.load_dialects(context)
        parsed = ir.parse_mlir_module(str(path), context)
        parsed.context = context
        backend.add_stages(passes, backend.parse_options(dict(options)), Language.TRITON)
        path.write_text(str(passes["ttir"](parsed, {})))  # `triton.compile` skips this step
        kernel = triton.compile(str(path), target=target, options=options)
        path.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack), kernel.metadata.shared


def _as_text(module):
    """Returns MLIR as text. Only the build of MLIR that wrote bytecode can read it."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    with ir.Context() as context:
        dialect.register_dialect(context)
        context.load_all_available_dialects()
        return ir.Module.parse(module).operation.get_asm()


if __name__ == "__main__":
    app.run(_main)
