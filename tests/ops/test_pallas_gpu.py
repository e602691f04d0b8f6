"""What the GPU kernels cannot do, their gradients in bfloat16, over several devices, and lowered for CUDA."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_halo_attention import make_inputs

from halonet_jax.analysis import hlo
from halonet_jax.ops import halo_attention, pallas_gpu


def gradients(implementation, inputs, cotangent, **options):
    f = functools.partial(halo_attention, implementation=implementation, **options)
    return jax.jit(lambda inputs, cotangent: jax.vjp(f, *inputs)[1](cotangent))(inputs, cotangent)


@functools.cache
def script(name):
    path = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "change, reason",
    (
        ({"b": 60, "h": 40}, "windows of 140 x 140 keys have more than 256 rows and columns"),
        ({"channels": 320}, "q has 320 channels per head, more than 256"),
        ({"dtype": jnp.float16}, "q is float16, not float32 or bfloat16"),
    ),
)
def test_unsupported_gives_a_reason(change, reason):
    arguments = {"height": 100, "width": 100, "b": 4, "h": 1, "heads": 3, "channels": 8, "value_channels": 12, **change}
    dtype = arguments.pop("dtype", jnp.float32)
    inputs = jax.eval_shape(lambda: [x.astype(dtype) for x in make_inputs(0, **arguments)])
    options = {"block_size": arguments["b"], "halo_size": arguments["h"]}
    assert reason in pallas_gpu.unsupported(*inputs[:3], **options)
    with pytest.raises(ValueError, match=f'cannot do this: .*{reason}.*; use "blocked"'):
        jax.eval_shape(functools.partial(halo_attention, implementation="pallas_gpu", **options), *inputs)


def test_bfloat16_gradients_stay_at_rounding():
    """Against float32 on the same inputs: within a few roundings of the largest entry, as "blocked" is."""
    inputs = [x.astype(jnp.bfloat16) for x in make_inputs(0, 8, 16, 8, 3, heads=2, channels=16, value_channels=16)]
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((1, 8, 16, 2, 16)), jnp.bfloat16)
    options = {"block_size": 8, "halo_size": 3}
    exact = gradients("reference", [x.astype(jnp.float32) for x in inputs], cotangent.astype(jnp.float32), **options)
    for ours, theirs in zip(gradients("pallas_gpu", inputs, cotangent, **options), exact):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=2**-7 * np.abs(theirs).max(), rtol=0)


def test_each_device_attends_its_part_of_the_batch():
    """Nothing is gathered; what is reduced are the tables' gradients."""
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    inputs = make_inputs(0, 8, 4, 4, 1, batch=4)
    cotangent = jnp.ones((*inputs[0].shape[:4], 12))
    cut, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P(("data", "fsdp")), jax.P()))
    placed = jax.device_put((inputs, cotangent), ((cut, cut, cut, whole, whole), cut))

    def run(inputs, cotangent):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gradients("pallas_gpu", inputs, cotangent, block_size=4, halo_size=1)

    compiled = jax.jit(run).lower(*placed).compile()
    assert {collective.kind for collective in hlo.collectives(compiled.as_text())} == {"all-reduce"}
    results = compiled(*placed)
    assert [result.sharding.spec for result in results[:3]] == [jax.P(("data", "fsdp"))] * 3
    expected = gradients("pallas_gpu", inputs, cotangent, block_size=4, halo_size=1)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=0), results, expected)


@pytest.mark.parametrize(
    "layer, dtype, options",
    (
        ("h1 stage 1 stride 1", "bfloat16", {}), ("h4 stage 1 stride 1", "float32", {"window": "centered"}),
        ("h5 stage 4 stride 2", "float32", {}), ("h7 stage 4 stride 1", "bfloat16", {"padding": "zero"}),
    ),
)  # fmt: skip
def test_lowers_for_cuda(layer, dtype, options):
    """Triton's types, shapes and powers of two; no GPU is needed, and none is used. The script does all layers."""
    check = script("check_gpu_kernels")
    kernels = check.lower(**check.layers([layer[:2]])[layer], dtype=dtype, **options)
    assert [name for name, *_ in kernels] == [f"halo_attention_{name}_kernel" for name in ("forward", "dq", "dkv")]


@pytest.mark.parametrize(
    "stride, options", ((1, {}), (2, {"window": "centered"}), (2, {"padding": "zero", "logits_scale": 0.3}))
)
def test_rival_agrees(stride, options):
    inputs = make_inputs(0, 7, 10, 4, 1, stride)
    attend = functools.partial(script("rival_cudnn").attend, implementation="xla")
    ours, theirs = (f(*inputs, block_size=4, halo_size=1, stride=stride, **options) for f in (halo_attention, attend))
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
