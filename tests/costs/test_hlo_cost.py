"""FLOPs and bytes of compiled programs against what is known of them."""

import jax
import jax.numpy as jnp
import pytest

from halonet_jax.costs import chips, hlo, hlo_cost


def _cost(function, *arguments):
    return hlo_cost.cost(hlo.parse(jax.jit(function).lower(*arguments).compile().as_text()))


def test_products_in_nested_loops():
    def inner(x, w):
        return x @ w, None

    def outer(x, w):
        x, _ = jax.lax.scan(inner, x, w)
        return x, None

    x, w = jnp.ones((24, 32)), jnp.ones((5, 3, 32, 32))
    cost = _cost(lambda x, w: jax.lax.scan(outer, x, w)[0], x, w)
    assert cost.flops == 5 * 3 * 2 * 24 * 32 * 32
    # A slice costs its own size; with whole stacks in every turn there would be 13 times the weights.
    assert w.nbytes <= cost.bytes < 9 * w.nbytes
    assert cost.cycles == 0


def test_parts_by_scope_add_up():
    def loss(x, w):
        with jax.named_scope("first"):
            x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x)
        with jax.named_scope("second"):
            return jnp.square(x @ w).sum()

    x, w = jnp.ones((24, 32)), jnp.ones((32, 32))
    module = hlo.parse(jax.jit(jax.grad(loss, 1)).lower(x, w).compile().as_text())
    parts = hlo_cost.by_part(module, {"one": "first", "two": "second", "three": "fir"})
    product = 2 * 24 * 32 * 32
    assert [parts[name].flops for name in ("one", "two", "three")] == [9 * product, 3 * product, 0]
    assert hlo_cost.cost(module) == tuple(map(sum, zip(*parts.values())))


def test_a_batched_product_and_its_gradient():
    x, y = jnp.ones((4, 8, 16)), jnp.ones((4, 16, 32))
    product = lambda x, y: jnp.einsum("bij,bjk->bik", x, y).sum()
    assert _cost(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), x, y).flops == 2 * 4 * 8 * 16 * 32
    assert _cost(jax.grad(product, (0, 1)), x, y).flops == 2 * 2 * 4 * 8 * 16 * 32


@pytest.mark.parametrize("stride, padding, groups", [(1, 0, 1), (2, 1, 1), (1, 1, 4)])
def test_convolutions_count_what_falls_on_the_map(stride, padding, groups):
    x, w = jnp.ones((2, 9, 9, 8)), jnp.ones((3, 3, 8 // groups, 16))
    cost = _cost(
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        ), x, w,
    )  # fmt: skip
    size = (9 + 2 * padding - 3) // stride + 1
    inside = sum(0 <= stride * i + k - padding < 9 for i in range(size) for k in range(3))
    assert cost.flops == 2 * inside**2 * 2 * (8 // groups) * 16


# As TPU writes it. Eight 64 x 72 by 72 x 196 products; memory space 1 is on the chip.
TPU_TEXT = """HloModule jit_f, is_scheduled=true

%fused (p0: bf16[8,64,72], p1: bf16[8,196,72]) -> f32[8,64,196] {
  %p0 = bf16[8,64,72]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[8,196,72]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %product = f32[8,64,196]{2,1,0:T(8,128)S(1)} convolution(%p0, %p1), window={size=8 stride=7 lhs_dilate=8}, \
dim_labels=0bf_0oi->0bf
}

%slicing (p: bf16[8,256,72]) -> bf16[8,196,72] {
  %p = bf16[8,256,72]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %part = bf16[8,196,72]{2,1,0:T(8,128)(2,1)S(1)} slice(%p), slice={[0:8], [0:196], [0:72]}
}

ENTRY %main (a: bf16[8,64,72], b: bf16[8,256,72]) -> f32[8,64,196] {
  %a = bf16[8,64,72]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8,256,72]{2,1,0:T(8,128)(2,1)} parameter(1)
  %start = ((bf16[8,256,72]{2,1,0:T(8,128)(2,1)}), bf16[8,196,72]{2,1,0:T(8,128)(2,1)S(1)}, \
s32[]{:S(2)}) async-start(%b), calls=%slicing
  %done = bf16[8,196,72]{2,1,0:T(8,128)(2,1)S(1)} async-done(%start)
  %c = f32[8,64,196]{2,1,0:T(8,128)S(1)} fusion(%a, %done), kind=kOutput, calls=%fused, \
backend_config={"estimated_cycles":"1234"}
  %k = f32[8,64,196]{2,1,0:T(8,128)S(1)} custom-call(%c), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"cost_estimate":{"bytes_accessed":"9","flops":"500","transcendentals":"1"}}}
  %out = (f32[8,64,196]{2,1,0:T(8,128)}, f32[8,64,196]{2,1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%k)
  ROOT %copied = f32[8,64,196]{2,1,0:T(8,128)} copy-done(%out)
}
"""


def test_tpu_products_memory_spaces_and_cycles():
    cost = hlo_cost.cost(hlo.parse(TPU_TEXT))
    assert cost.flops == 2 * 8 * 64 * 72 * 196 + 500 and cost.kernel_flops == 500
    read_a, read_slice, written = 2 * 8 * 64 * 128, 2 * 8 * 200 * 128, 4 * 8 * 64 * 256  # padded to tiles of 8 by 128
    assert cost.bytes == read_a + read_slice + written
    assert cost.cycles == 1234


def test_estimates():
    chip = chips.CHIPS["v5e"]
    assert chips.roofline_seconds(chip, 197e12, 819e8) == 1
    assert chips.roofline_seconds(chip, 197e11, 819e9) == 1
    assert chips.step_seconds(chip, 1e12, 1e9, cycles=3e9) == 2
    assert chips.step_seconds(chip, 1e12, 1e9, cycles=3e9, kernel_flops=197e12) == 3
    assert chips.step_seconds(chip, 1e12, 1e9, cycles=0) is None


def test_topologies():
    assert chips.topology("v5e:8x16").num_devices == 128
    assert chips.topology("v3:8x8").num_devices == 128  # 64 chips
    assert chips.topology("v4:4x4x4").num_devices == 64
    for name, hint in (("v5:2x2", "did you mean"), ("tpu", "write for example v5e:4x4"), ("v9z:2x2", "use one of v3")):
        with pytest.raises(ValueError, match=hint):
            chips.topology(name)
