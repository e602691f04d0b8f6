"""What the fused kernels cannot do, gradients of one's own in bfloat16 and over devices, and compilers without a device."""

import functools
import importlib.util
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_halo_attention import make_inputs, name

from halonet_jax.costs import hlo
from halonet_jax.ops import einsum_cpu, gpu, halo_attention, tpu

pytestmark = pytest.mark.filterwarnings("ignore:.*is interpreted on this device")
own_gradients = pytest.mark.parametrize("attend", (einsum_cpu.attend, tpu.attend, gpu.attend), ids=name)


@functools.cache
def script(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradients(implementation, inputs, cotangent, **options):
    f = functools.partial(halo_attention, implementation=implementation, **options)
    return jax.jit(lambda inputs, cotangent: jax.vjp(f, *inputs)[1](cotangent))(inputs, cotangent)


@pytest.mark.parametrize(
    "module, change, reason",
    (
        (tpu, {"h": 5}, "halo_size=5 is more than block_size=4"),
        (tpu, {"channels": 96}, "96 channels per head neither divide 128 nor fit in there with all 3 heads"),
        (tpu, {"height": 2000, "heads": 2, "channels": 64, "value_channels": 512}, "MiB of on-chip memory"),
        (gpu, {"b": 60, "h": 40, "height": 100, "width": 100}, "windows of 140 x 140 keys have more than 256"),
        (gpu, {"channels": 320}, "q has 320 channels per head, more than 256"),
    ),
)  # fmt: skip
def test_unsupported_gives_a_reason(module, change, reason):
    arguments = {"height": 8, "width": 8, "b": 4, "h": 1, "heads": 3, "channels": 8, "value_channels": 12, **change}
    inputs = jax.eval_shape(lambda: make_inputs(0, **arguments))
    options = {"block_size": arguments["b"], "halo_size": arguments["h"]}
    assert reason in module.unsupported(*inputs[:3], **options)
    with pytest.raises(ValueError, match=f'cannot do this: .*{reason}.*; use .*"auto"'):
        jax.eval_shape(functools.partial(halo_attention, implementation=module.attend, **options), *inputs)


@own_gradients
def test_bfloat16_gradients_stay_at_rounding(attend):
    """Against float32 on the same inputs: within a few roundings of the largest entry, as "xla" is."""
    inputs = [x.astype(jnp.bfloat16) for x in make_inputs(0, 8, 16, 8, 3, heads=4, channels=16, value_channels=16)]
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((1, 8, 16, 4, 16)), jnp.bfloat16)
    options = {"block_size": 8, "halo_size": 3}
    exact = gradients("reference", [x.astype(jnp.float32) for x in inputs], cotangent.astype(jnp.float32), **options)
    for ours, theirs in zip(gradients(attend, inputs, cotangent, **options), exact):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=2**-7 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("halo", (0, 2))
def test_every_byte_moves_once(monkeypatch, halo):
    """By the pipeline's rule: a block is copied where its index differs from that of the grid step before."""
    calls = []

    def pallas_call(kernel, *, grid, in_specs, out_specs, out_shape, **rest):
        def run(*arrays):
            calls.append((grid, (*zip(in_specs, arrays), *zip(out_specs, out_shape))))
            return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

        return run

    monkeypatch.setattr(tpu.pl, "pallas_call", pallas_call)
    inputs = make_inputs(0, 5, 9, 4, halo, batch=2, heads=4, channels=64, value_channels=64)
    gradients(tpu.attend, inputs, jnp.ones((2, 5, 9, 4, 64)), block_size=4, halo_size=halo)
    # Each is traced twice, compiled and interpreted.
    assert [grid for grid, _ in calls] == 2 * [(2, 2, 3 + (halo > 0))] + 2 * [(2, 2, 3 + 2 * (halo > 0))]
    for grid, arrays in calls:
        for spec, x in arrays:
            indices = [tuple(map(int, spec.index_map(*step))) for step in np.ndindex(grid)]
            copies = 1 + sum(a != b for a, b in itertools.pairwise(indices))
            assert copies * math.prod(n or 1 for n in spec.block_shape) == math.prod(x.shape)


@own_gradients
def test_each_device_attends_its_part_of_the_batch(attend):
    """Nothing is gathered; what is reduced are the tables' gradients."""
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    inputs = make_inputs(0, 8, 4, 4, 1, batch=4)
    cotangent = jnp.ones((*inputs[0].shape[:4], 12))
    cut, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P(("data", "fsdp")), jax.P()))
    placed = jax.device_put((inputs, cotangent), ((cut, cut, cut, whole, whole), cut))

    def run(inputs, cotangent):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gradients(attend, inputs, cotangent, block_size=4, halo_size=1)

    compiled = jax.jit(run).lower(*placed).compile()
    assert {collective.kind for collective in hlo.collectives(compiled.as_text())} == {"all-reduce"}
    results = compiled(*placed)
    assert [result.sharding.spec for result in results[:3]] == [jax.P(("data", "fsdp"))] * 3
    expected = gradients(attend, inputs, cotangent, block_size=4, halo_size=1)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=0), results, expected)


@pytest.mark.parametrize("attend", (tpu.attend, gpu.attend), ids=name)
def test_vmap_adds_a_batch_axis(attend):
    """Also where an input has none."""
    inputs = make_inputs(0, 4, 4, 4, 1, batch=2)
    f = functools.partial(halo_attention, block_size=4, halo_size=1, implementation=attend)
    mapped = jax.jit(jax.vmap(f, in_axes=(0, None, 1, None, None)))
    q, k, v, *tables = inputs
    out = mapped(jnp.stack([q, 2 * q]), k, jnp.stack([v, v + 1], axis=1), *tables)
    np.testing.assert_allclose(out, jnp.stack([f(q, k, v, *tables), f(2 * q, k, v + 1, *tables)]), atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_compiles_for_tpu():
    """Over two chips, forward and backward, in a process of its own: libtpu changes how signals are handled."""
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from halonet_jax.ops import halo_attention
mesh = jax.sharding.Mesh(np.array(topologies.get_topology_desc("v5e:2x2", "tpu").devices[:2]), ("data",))
def place(*shape, spec=jax.P("data")):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))
def loss(*inputs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return halo_attention(*inputs, block_size=8, halo_size=3, implementation="pallas").astype(jnp.float32).sum()
pixels, table = place(2, 16, 16, 4, 16), place(21, 8, spec=jax.P())
traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).trace(pixels, pixels, pixels, table, table)
text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
assert "halo_attention_backward" in text and "tpu_custom_call" in text and "all-gather" not in text
"""
    environment = dict(
        os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-8",
        TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "layer, dtype, options",
    (
        ("h1 stage 1 stride 1", "bfloat16", {}), ("h4 stage 1 stride 1", "float32", {"window": "centered"}),
        ("h5 stage 4 stride 2", "float32", {}), ("h7 stage 4 stride 1", "bfloat16", {"padding": "zero"}),
    ),
)  # fmt: skip
def test_lowers_for_cuda(layer, dtype, options):
    """Triton's types, shapes and powers of two; no GPU is needed, and none is used. The script does all layers."""
    check = script("gpu/check_gpu_kernels")
    kernels = check.lower(**check.layers([layer[:2]])[layer], dtype=dtype, **options)
    assert [name for name, *_ in kernels] == [f"halo_attention_{name}_kernel" for name in ("forward", "dq", "dkv")]


@pytest.mark.parametrize(
    "stride, options", ((1, {}), (2, {"window": "centered"}), (2, {"padding": "zero", "logits_scale": 0.3}))
)
def test_rival_agrees(stride, options):
    inputs = make_inputs(0, 7, 10, 4, 1, stride)
    attend = functools.partial(script("bench/rival_cudnn").attend, implementation="xla")
    run = functools.partial(halo_attention, *inputs, block_size=4, halo_size=1, stride=stride, **options)
    ours, theirs = run(), run(implementation=attend)
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
