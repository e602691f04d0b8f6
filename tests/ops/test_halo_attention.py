"""Every implementation against the reference, and the reference against plain loops and known special cases."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from halonet_jax.ops import einsum, einsum_cpu, gpu, halo_attention, tpu

pytestmark = pytest.mark.filterwarnings("ignore:.*is interpreted on this device")


def make_inputs(seed, height, width, b, h, stride=1, heads=2, channels=8, value_channels=12, full_width=False, batch=1):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    table = 2 * b + 2 * h - 1, channels if full_width else channels // 2
    return (
        normal(batch, -(-height // stride), -(-width // stride), heads, channels), normal(batch, height, width, heads, channels),
        normal(batch, height, width, heads, value_channels), normal(*table), normal(*table),
    )  # fmt: skip


def loops(
    q, k, v, rel_rows, rel_cols, b, h, stride, window="neighborhood", padding="mask", logits_scale=None, table_offsets="pixels"
):  # fmt: skip
    """The definition in float64 and Python loops: independent of everything in the package."""
    q, k, v, rel_rows, rel_cols = (np.asarray(x, np.float64) for x in (q, k, v, rel_rows, rel_cols))
    batch, height, width, heads, channels = k.shape
    scale = channels**-0.5 if logits_scale is None else logits_scale
    half = rel_rows.shape[1]
    out = np.zeros(q.shape[:4] + v.shape[-1:])
    for n, i, j, head in np.ndindex(q.shape[:4]):
        y, x, query = i * stride, j * stride, q[n, i, j, head]
        logits, values = [], []
        for r in range(y // b * b - h, y // b * b + b + h):
            for s in range(x // b * b - h, x // b * b + b + h):
                inside = 0 <= r < height and 0 <= s < width
                if padding == "mask" and not inside or window == "centered" and max(abs(r - y), abs(s - x)) > h:
                    continue
                key = k[n, r, s, head] if inside else np.zeros(channels)
                row, col = r - y + b - 1 + h, s - x + b - 1 + h
                if table_offsets == "queries":
                    row, col = row + y % b - y % b // stride, col + x % b - x % b // stride
                position = query[:half] @ rel_rows[row] + query[-half:] @ rel_cols[col]
                logits.append(scale * (query @ key + position))
                values.append(v[n, r, s, head] if inside else np.zeros(v.shape[-1]))
        weights = np.exp(np.array(logits) - max(logits))
        out[n, i, j, head] = weights @ np.array(values) / weights.sum()
    return out


# height, width, b, h: divisible; ragged and not square; smaller than a block; one block; one pixel; per-pixel windows; halo
# wider than the block; no halo; odd block; halo wider than the map.
SIZES = (
    (8, 8, 4, 2), (7, 10, 4, 1), (3, 5, 8, 3), (4, 4, 4, 2), (1, 1, 4, 1), (5, 4, 1, 2), (6, 7, 2, 3), (6, 6, 3, 0), (7, 5, 3, 1),
    (4, 3, 2, 5),
)  # fmt: skip
VARIANTS = (
    {}, {"window": "centered", "full_width": True}, {"padding": "zero", "logits_scale": 0.3}
)  # fmt: skip


# What differs inside the TPU kernels, which are interpreted here: queries in whole rows of sublanes, and flat; blocks that the
# stride does not divide; one block; one pixel; no halo; halo as wide as the block, and wider than the map; several chunks of heads,
# and groups in a chunk.
WIDE = {"heads": 4, "channels": 64, "value_channels": 12}, {"heads": 3, "channels": 8, "value_channels": 80}
PALLAS_TPU = (
    ((9, 16, 8, 3), 1, {}), ((7, 10, 4, 1), 1, VARIANTS[1]), ((7, 5, 3, 1), 2, VARIANTS[1]), ((5, 9, 4, 1), 1, WIDE[0]),
    ((3, 5, 8, 3), 2, {}), ((3, 5, 8, 3), 1, VARIANTS[2]), ((1, 1, 4, 1), 1, {}), ((6, 6, 3, 0), 1, {}), ((3, 4, 1, 1), 1, {}),
    ((3, 2, 4, 4), 2, {"padding": "zero"}), ((9, 7, 4, 2), 2, VARIANTS[2]), ((4, 4, 4, 2), 1, VARIANTS[1]),
    ((5, 9, 4, 1), 2, WIDE[1]),
)  # fmt: skip
# And inside the GPU kernels: several tiles of keys and blocks; a spare code and none; a halo wider than the block; channels that
# are no powers of two.
PALLAS_GPU = (
    ((9, 16, 8, 3), 1, {}), ((7, 10, 4, 1), 2, VARIANTS[1]), ((8, 8, 4, 2), 2, VARIANTS[2]), ((7, 5, 3, 1), 2, VARIANTS[1]),
    ((3, 5, 8, 3), 1, {}), ((1, 1, 4, 1), 1, {}), ((6, 7, 2, 3), 1, VARIANTS[2]),
    ((5, 9, 4, 1), 1, {"heads": 3, "channels": 24, "value_channels": 80}),
)  # fmt: skip
EINSUM = [(size, stride, VARIANTS[n % 3]) for n, (size, stride) in enumerate(itertools.product(SIZES, (1, 2)))]
CASES = [(attend, *case) for attend in (einsum.attend, einsum_cpu.attend) for case in EINSUM]
TIMM = {"padding": "zero", "table_offsets": "queries", "full_width": True}
CASES += [(attend, (9, 8, 4, 2), 2, TIMM) for attend in (einsum.attend, einsum_cpu.attend, tpu.attend, gpu.attend)]
CASES += [(attend, (6, 7, 6, 1), 3, TIMM | {"window": "centered"}) for attend in (einsum.attend, gpu.attend)]
CASES += [(tpu.attend, *case) for case in PALLAS_TPU] + [(gpu.attend, *case) for case in PALLAS_GPU]


def name(value):
    """Of a test's parameter: an implementation goes by its module."""
    return value.__module__.rpartition(".")[2] if callable(value) else str(value)


@pytest.mark.parametrize("implementation, size, stride, variant", CASES, ids=name)
def test_implementations_agree_forward_and_backward(implementation, size, stride, variant):
    height, width, b, h = size
    shape = {key: variant[key] for key in ("full_width", "heads", "channels", "value_channels") if key in variant}
    options = {key: value for key, value in variant.items() if key not in shape}
    inputs = make_inputs(0, height, width, b, h, stride, **shape)
    cotangent = np.random.default_rng(1).standard_normal((*inputs[0].shape[:4], inputs[2].shape[-1])).astype(np.float32)

    def run(implementation):
        f = functools.partial(
            halo_attention, block_size=b, halo_size=h, stride=stride, implementation=implementation, **options
        )
        out, vjp = jax.vjp(f, *inputs)
        return f(*inputs), out, *vjp(cotangent)  # the output alone may be computed in another way

    fast, reference = jax.jit(lambda: (run(implementation), run("reference")))()
    np.testing.assert_allclose(reference[0], loops(*inputs, b, h, stride, **options), atol=1e-5, rtol=0)
    for name, ours, theirs in zip(("out alone", "out", "dq", "dk", "dv", "d rel_rows", "d rel_cols"), fast, reference):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("implementation", (einsum.attend, einsum_cpu.attend, tpu.attend, gpu.attend), ids=name)
def test_without_tables_there_is_no_position_term(implementation):
    """Output and gradients are those of tables of zeros."""
    q, k, v, *tables = make_inputs(0, 5, 6, 4, 1, 2)
    f = functools.partial(halo_attention, block_size=4, halo_size=1, stride=2, padding="zero")
    zeros = [0 * table for table in tables]
    run = lambda f: jax.jit(jax.value_and_grad(lambda *x: (f(*x) ** 2).sum(), argnums=(0, 1, 2)))(q, k, v)
    ours = run(lambda *x: f(*x, None, None, implementation=implementation))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-5), ours,
        run(lambda *x: f(*x, *zeros, implementation="reference")),
    )  # fmt: skip
    with pytest.raises(ValueError, match="rel_cols=None leaves rel_rows without its pair; give both tables, or None for both"):
        f(q, k, v, tables[0], None)


@pytest.mark.parametrize("implementation, examples", ((einsum.attend, 3), (einsum_cpu.attend, 3), (tpu.attend, 2)), ids=name)
def test_error_against_float64_on_random_shapes(implementation, examples):
    """Of the output and of all gradients, relative to the largest entry of each. docs/performance.md has more shapes: 1.2e-6."""

    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True)
    @hypothesis.given(st.data())
    def check(data):
        draw = lambda low, high: data.draw(st.integers(low, high))
        height, width, b, stride = draw(1, 13), draw(1, 13), draw(1, 8), draw(1, 2)
        h = draw(0, 4 if implementation is not tpu.attend else min(4, b))
        options = {
            "padding": data.draw(st.sampled_from(("mask", "zero"))),
            "window": data.draw(st.sampled_from(("neighborhood", "centered"))),
        }
        heads, channels, value_channels = draw(1, 3), 2 * draw(1, 4), draw(1, 5)
        inputs = make_inputs(draw(0, 9), height, width, b, h, stride, heads, channels, value_channels, data.draw(st.booleans()))
        f = functools.partial(halo_attention, block_size=b, halo_size=h, stride=stride, **options)
        for name, error in errors_against_float64(functools.partial(f, implementation=implementation), f, inputs).items():
            assert error < 5e-6, name

    check()


def errors_against_float64(f, definition, inputs):
    """Largest errors over the largest entries; a gradient that is 0 but for rounding counts by the inputs' own size, which is 1."""

    def run(f, *inputs):
        out, vjp = jax.vjp(f, *inputs)
        return out, *vjp(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    ours = jax.jit(functools.partial(run, f))(*inputs)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in inputs]
        exact = jax.jit(functools.partial(run, functools.partial(definition, implementation="reference")))(*wide)
    names = ("out", "dq", "dk", "dv", "d rel_rows", "d rel_cols")
    return {
        name: float(np.abs(np.asarray(x) - np.asarray(y)).max() / max(np.abs(np.asarray(y)).max(), 1))
        for name, x, y in zip(names, ours, exact)
    }


def test_block_over_the_map_is_global_attention():
    q, k, v, rel_rows, rel_cols = make_inputs(0, 5, 6, 8, 3)
    out = halo_attention(q, k, v, 0 * rel_rows, 0 * rel_cols, block_size=8, halo_size=3)
    q, k, v = (x.reshape(1, 30, *x.shape[3:]) for x in (q, k, v))
    weights = jax.nn.softmax(jnp.einsum("bqnd,bknd->bnqk", q, k) * 8**-0.5)
    np.testing.assert_allclose(out.reshape(1, 30, 2, 12), jnp.einsum("bnqk,bkne->bqne", weights, v), atol=1e-5)


@pytest.mark.parametrize("shift", (4, 8))
def test_equivariant_to_shifts_by_the_block(shift):
    """The paper, section 2: blocks break translational equivariance except for shifts by the block size."""
    inputs = make_inputs(0, 32, 8, 8, 2)
    f = functools.partial(halo_attention, block_size=8, halo_size=2)
    moved = f(*(jnp.roll(x, shift, axis=1) for x in inputs[:3]), *inputs[3:])
    same = np.allclose(moved[:, 16:17], jnp.roll(f(*inputs), shift, axis=1)[:, 16:17], atol=1e-4)
    assert same == (shift == 8)


def test_stride_keeps_every_second_query_of_the_same_neighborhoods():
    q, k, v, *tables = make_inputs(0, 9, 7, 4, 1)
    f = functools.partial(halo_attention, block_size=4, halo_size=1)
    np.testing.assert_allclose(f(q[:, ::2, ::2], k, v, *tables, stride=2), f(q, k, v, *tables)[:, ::2, ::2], atol=1e-6)


@pytest.mark.parametrize("implementation", (einsum.attend, einsum_cpu.attend, tpu.attend, gpu.attend), ids=name)
def test_bfloat16_inputs_have_float32_softmax(implementation):
    """Error stays at the rounding of weights and output, with logits near 60 where bfloat16 has steps of 0.25."""
    q, k, v, rel_rows, rel_cols = make_inputs(0, 16, 16, 8, 3, channels=32, value_channels=16)
    inputs = [x.astype(jnp.bfloat16) for x in (8 * q, 2 * k, v, rel_rows, rel_cols)]
    f = functools.partial(halo_attention, block_size=8, halo_size=3)
    out = f(*inputs, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    exact = f(*(x.astype(jnp.float32) for x in inputs), implementation="reference")
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.02)


def test_logits_of_a_whole_map_never_stand():
    """Temporary memory of the compiled gradient stays below the logits of the whole map, and so below the unmapped form's."""
    inputs = make_inputs(0, 128, 16, 8, 3, heads=4, channels=16, value_channels=16)
    attend = functools.partial(halo_attention, block_size=8, halo_size=3, implementation=einsum.attend)
    gradient = jax.jit(jax.grad(lambda *x: attend(*x).sum(), argnums=(0, 1, 2, 3, 4)))
    logits_bytes = 128 * 16 * 4 * 14**2 * 4
    assert gradient.lower(*inputs).compile().memory_analysis().temp_size_in_bytes < logits_bytes


@pytest.mark.parametrize(
    "change, message",
    (
        ({"block_size": 0}, "block_size=0 must be an integer of at least 1"),
        ({"halo_size": 1.5}, "halo_size=1.5"),
        ({"logits_scale": 0.0}, "logits_scale=0.0 must be more than 0"),
        ({"window": "round"}, "window='round' is unknown; use one of neighborhood, centered"),
        ({"padding": "wrap"}, "padding='wrap'"),
        ({"implementation": "fast"}, "implementation='fast'"),
        ({"stride": 2}, r"q has shape .* with k of shape .* and stride=2 it must be"),
        ({"table_offsets": "blocks"}, "table_offsets='blocks' is unknown; use one of pixels, queries"),
        ({"table_offsets": "queries", "stride": 3}, "needs a block_size that stride=3 divides, not 4; .* block_size=6"),
        ({"halo_size": 2}, r"both must be \(11, 4\) or \(11, 8\)"),
    ),
)
def test_bad_arguments_name_value_and_rule(change, message):
    inputs = make_inputs(0, 8, 8, 4, 1)
    with pytest.raises(ValueError, match=message):
        halo_attention(*inputs, **{"block_size": 4, "halo_size": 1, **change})


def test_dtypes():
    """float64 has all gradients in float64 (of `einsum_cpu`'s own backward pass, too); float16 could not hold what masks."""
    with jax.enable_x64(True):
        inputs = [jnp.asarray(np.asarray(x), jnp.float64) for x in make_inputs(0, 5, 6, 4, 1)]
        attend = functools.partial(halo_attention, block_size=4, halo_size=1, implementation=einsum_cpu.attend)
        gradients = jax.grad(lambda *x: attend(*x).sum(), argnums=range(5))(*inputs)
        assert {x.dtype for x in gradients} == {np.dtype("float64")}
    with pytest.raises(ValueError, match="q is float16; it must be float32 or bfloat16"):
        halo_attention(*(x.astype(jnp.float16) for x in make_inputs(0, 8, 8, 4, 1)), block_size=4, halo_size=1)
