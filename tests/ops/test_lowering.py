"""Programs for platforms that are not at hand: what decides which attention they hold."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_halo_attention import make_inputs

from halonet_jax import models
from halonet_jax.ops import halo_attention

KERNEL = "tpu_custom_call"


@pytest.fixture(scope="module")
def model():
    """A small model with attention, a convolution, max pooling and dense layers; its variables; images."""
    model = models.create(
        "h1", num_classes=5, stage_sizes=(1, 1, 1, 1), stage_kinds=("attention", "conv", "conv", "attention"), base_width=16,
        stem_width=8,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((3, 40, 24, 3)), jnp.float32)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    variables = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.1, 0.3, x.shape), x.dtype), shapes)
    return functools.partial(model.apply, train=False), variables, images


def export(model, platforms, batch="batch"):
    apply, variables, images = model
    shape = jax.export.symbolic_shape(f"{batch}, 40, 24, 3")
    return jax.export.export(jax.jit(apply), platforms=platforms)(variables, jax.ShapeDtypeStruct(shape, images.dtype))


def test_one_export_for_cpu_and_tpu(model):
    """It holds TPU's kernels; on a CPU it gives what the model gives, for every batch size and after a trip to disk."""
    apply, variables, images = model
    exported = export(model, ["cpu", "tpu"])
    assert exported.mlir_module().count(KERNEL) == 2  # one for each attention layer
    loaded = jax.export.deserialize(exported.serialize())
    for batch in (1, 3):
        ours, expected = loaded.call(variables, images[:batch]), apply(variables, images[:batch])
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_an_export_for_cuda_takes_the_einsum(model):
    """`jax.export` refuses Triton's custom call."""
    assert "custom_call" not in export(model, ["cuda"], batch=2).mlir_module()


@pytest.mark.parametrize("kind, kernels", (("TPU v5 lite", 2), ("TPU v3", 0)))
def test_the_chip_of_the_mesh_decides(model, kind, kernels):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        text = export(model, ["tpu"], batch=4).mlir_module()
    assert text.count(KERNEL) == kernels


@pytest.mark.parametrize("implementation", ("auto", "pallas"))
def test_gradients_for_cpu_and_tpu(implementation):
    """The program for TPU holds the kernels of the backward pass; on a CPU it gives the reference's gradients."""
    inputs = make_inputs(0, 8, 6, 4, 1, batch=2)
    loss = lambda implementation, *inputs: jnp.sin(
        halo_attention(*inputs, block_size=4, halo_size=1, implementation=implementation)
    ).sum()
    gradient = lambda implementation: jax.jit(jax.grad(functools.partial(loss, implementation), argnums=range(5)))
    slow = pytest.warns(match="is interpreted") if implementation == "pallas" else contextlib.nullcontext()
    with slow:
        exported = jax.export.export(gradient(implementation), platforms=["cpu", "tpu"])(*inputs)
    assert "halo_attention_backward" in exported.mlir_module()
    for ours, expected in zip(exported.call(*inputs), gradient("reference")(*inputs)):
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)
