"""The implementation for CPUs, whose backward pass is its own, and whose output alone is computed in another way than with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_halo_attention import SIZES, VARIANTS, make_inputs

from halonet_jax.analysis import hlo
from halonet_jax.ops import halo_attention

CASES = [
    *((size, 1, VARIANTS[0]) for size in SIZES), *((size, 2, VARIANTS[1]) for size in SIZES[::2]),
    *((size, stride, VARIANTS[2]) for stride, size in zip((1, 2, 1, 2), SIZES[1::3])),
]  # fmt: skip


@pytest.mark.parametrize("size, stride, variant", CASES, ids=str)
def test_output_and_gradients_are_the_references(size, stride, variant):
    height, width, b, h = size
    options = dict(variant)
    inputs = make_inputs(0, height, width, b, h, stride, full_width=options.pop("full_width", False), batch=2)
    cotangent = np.random.default_rng(1).standard_normal(inputs[0].shape[:4] + (12,)).astype(np.float32)

    def run(implementation):
        f = functools.partial(
            halo_attention, block_size=b, halo_size=h, stride=stride, implementation=implementation, **options
        )
        out, vjp = jax.vjp(f, *inputs)
        return f(*inputs), out, *vjp(cotangent)

    fast, reference = jax.jit(lambda: (run("cpu"), run("reference")))()
    for name, ours, theirs in zip(("out alone", "out", "dq", "dk", "dv", "d rel_rows", "d rel_cols"), fast, reference):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0, err_msg=name)


def test_bfloat16_inputs_have_float32_softmax():
    q, k, v, *tables = make_inputs(0, 16, 16, 8, 3, channels=32, value_channels=16)
    inputs = [x.astype(jnp.bfloat16) for x in (8 * q, 2 * k, v, *tables)]
    run = lambda implementation, *inputs: jax.vjp(
        functools.partial(halo_attention, block_size=8, halo_size=3, implementation=implementation), *inputs
    )
    exact, exact_vjp = run("reference", *(x.astype(jnp.float32) for x in inputs))
    out, vjp = run("cpu", *inputs)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.02)
    for ours, theirs in zip(vjp(jnp.ones_like(out)), exact_vjp(jnp.ones_like(exact))):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=0.03 * float(abs(theirs).max()))


def test_batch_is_cut_over_devices_without_communication():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    cut = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    q, k, v, *tables = make_inputs(0, 9, 9, 4, 1, batch=4)
    f = functools.partial(halo_attention, block_size=4, halo_size=1, implementation="cpu")
    gradients = jax.jit(jax.grad(lambda q, k, v: (f(q, k, v, *tables) ** 2).sum(), argnums=(0, 1, 2)))
    compiled = gradients.lower(*map(cut, (q, k, v))).compile()
    assert not hlo.collectives(compiled.as_text())
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), gradients(*map(cut, (q, k, v))), gradients(q, k, v))
