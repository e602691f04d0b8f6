"""Every model held to one contract; parameter counts pinned to the paper's structure."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from halonet_jax import models
from halonet_jax.models import layers, transfer

# Worked out by arithmetic from the paper's tables; H7's hybrids include squeeze-and-excitation, whose ratio is our choice.
PARAMETERS = {
    "h0": 5_485_352, "h1": 8_081_288, "h2": 9_384_488, "h3": 11_817_928, "h4": 19_079_944, "h5": 30_679_016,
    "h6": 43_417_096, "h7": 67_393_288, "h7_conv1": 67_337_164, "h7_conv12": 67_117_060, "h7_conv123": 59_521_316,
    "halonet50": 18_017_576, "resnet50": 25_557_032, "h4_base128": 85_138_760, "h4_base128_conv12": 87_002_280,
    "h4_base128_patch4": 85_132_424,
    # ResNets with 25,557,032 and 44,549,160 parameters, and SE: 2 c (c / 8) + c / 8 + c in each block of c channels, that
    # is 16,672, 66,112, 263,296 and 1,050,880 by stage. Attention takes 3 (512^2) + 2 (21) (8) in place of 9 (512^2).
    "resnet50_se": 30_603_912, "resnet50_se_halo": 25_886_328, "resnet101_se": 54_072_072, "resnet101_se_halo": 49_354_488,
}  # fmt: skip
# As timm counts them: with rows of relative tables that it never reads, and ours do not have.
TIMM_PARAMETERS = {
    "halonet_h1": 8_100_056, "halonet26t": 12_480_288, "halonet50ts": 22_733_280, "sehalonet33ts": 13_691_712,
    "eca_halonext26ts": 10_756_885, "haloregnetz_b": 11_680_072, "halo2botnet50ts_256": 22_635_360,
    "lamhalobotnet50ts_256": 22_569_824,
}  # fmt: skip
SMALL = dict(num_classes=5, stage_sizes=(1, 1, 1, 1), base_width=16, stem_width=8)


def count(variables):
    return sum(x.size for x in jax.tree.leaves(variables["params"]))


def init(model, images):
    """Variables without compiling the model: shapes by tracing, values at random."""
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    rng = np.random.default_rng(0)
    draw = lambda path, x: np.ones(x.shape) if path[-1].key == "var" else rng.standard_normal(x.shape) * x.size**-0.25
    return jax.tree_util.tree_map_with_path(lambda path, x: jnp.asarray(draw(path, x), x.dtype), shapes)


def images(batch=4, height=48, width=48):
    return jnp.asarray(np.random.default_rng(0).standard_normal((batch, height, width, 3)), jnp.float32)


def test_every_model_is_pinned():
    assert {*PARAMETERS, *TIMM_PARAMETERS} == set(models.names())


@pytest.mark.parametrize("name, parameters", (PARAMETERS | TIMM_PARAMETERS).items())
def test_parameter_count(name, parameters):
    model = models.create(name)
    init = functools.partial(model.init, train=False)
    found = count(jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 64, 64, 3))))
    if name in TIMM_PARAMETERS:  # two tables with 2h more rows in each attention layer
        found += sum(4 * b.halo_size * b.channels // b.num_heads for s in model.backbone.stages for b in s if b.kind == "attention")
    assert found == parameters


def test_detection_backbone_with_global_attention():
    """Block size 32 is a stage of 1,024 px at once: tables of 69 rows in place of 21, in three blocks."""
    create = functools.partial(models.create, "resnet50_se_halo")
    shapes = lambda model: jax.eval_shape(lambda: model.init(jax.random.key(0), images(1), train=False))
    assert count(shapes(create(block_size=32))) - count(shapes(create())) == 3 * 2 * (69 - 21) * 8


@pytest.mark.parametrize("name", ("h3", "h7_conv12", "h4_base128_patch4", "resnet50"))
def test_bfloat16_on_a_map_that_no_block_divides(name):
    """Shapes, dtypes and statistics that move. (Gradients: `test_configs.py::test_smoke_recipe_forward_and_backward`.)"""
    model = models.create(name, **SMALL, final_width=24, dtype="bfloat16")
    x = images(height=50, width=42)
    variables = init(model, x)
    logits, updates = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))(variables, x)
    assert logits.shape == (4, 5) and logits.dtype == jnp.float32 and jnp.isfinite(logits).all()
    maps = jax.eval_shape(functools.partial(model.apply, method="features"), variables, x)
    assert [m.shape[1:3] for m in maps] == [(13, 11), (7, 6), (4, 3), (2, 2)]
    assert {m.dtype for m in maps} == {jnp.dtype("bfloat16")}
    assert not jax.tree.all(jax.tree.map(jnp.array_equal, variables["batch_stats"], updates["batch_stats"]))


@functools.cache
def three_blocks(**change):
    """Variables, loss with new statistics, and gradients of a small H1 with three equal blocks."""
    model, x = models.create("h1", **SMALL | {"stage_sizes": (1, 1, 3, 1)}, **change), images()
    plain = init(models.create("h1", **SMALL | {"stage_sizes": (1, 1, 3, 1)}), x)
    variables = transfer.stack_blocks(plain, model.backbone.stages) if change.get("scan") else plain
    assert jax.tree.map(jnp.shape, init(model, x)) == jax.tree.map(jnp.shape, variables)

    def loss(variables):
        logits, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return (logits**2).sum(), updates

    return plain, *jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)


@pytest.mark.parametrize("change", ({"scan": True}, {"scan": True, "remat": True}), ids=str)
def test_scan_and_remat_change_no_number(change):
    variables, (expected, updates), gradients = three_blocks()
    _, (actual, other_updates), other_gradients = three_blocks(**change)
    stack = functools.partial(transfer.stack_blocks, stages=models.stages("h1", stage_sizes=(1, 1, 3, 1), base_width=16))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=2e-3)  # batch norm of few pixels amplifies rounding
    close(actual, expected)
    jax.tree.map(close, other_updates, stack(updates))
    jax.tree.map(close, other_gradients["params"], stack(gradients)["params"])


def test_reference_attention_gives_the_same_model():
    x = images()
    fast, slow = (models.create("h0", **SMALL, attention_impl=impl) for impl in ("xla", "reference"))
    variables = init(fast, x)
    np.testing.assert_allclose(fast.apply(variables, x, train=False), slow.apply(variables, x, train=False), atol=1e-4)


def test_attention_layer_in_a_model_of_ones_own():
    layer = models.HaloAttention(channels=16, num_heads=2, value_channels=24, block_size=4, halo_size=1, stride=2)
    x = jnp.ones((1, 9, 7, 6))
    variables = layer.init(jax.random.key(0), x)
    assert layer.apply(variables, x).shape == (1, 5, 4, 24)
    assert variables["params"]["rel_rows"].shape == (9, 4)


@pytest.mark.parametrize("group_size", (0, 2, 4))
def test_batch_norm_groups(group_size):
    """Each group is normalised by itself; the running statistics move by the mean over groups."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 3, 2)) * [3, 1] + 5, jnp.float32)
    norm = layers.BatchNorm(use_running_average=False, group_size=group_size, momentum=0.75)
    y, updates = norm.apply(norm.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    groups = x.reshape(-1, group_size or 4, 3, 3, 2)
    expected = (groups - groups.mean((1, 2, 3), keepdims=True)) / jnp.sqrt(groups.var((1, 2, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, expected.reshape(x.shape), atol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.25 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"], 0.75 + 0.25 * groups.var((1, 2, 3)).mean(0), rtol=1e-4)


def test_stochastic_depth_drops_whole_examples_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 3))
    y = layers.stochastic_depth(x, 0.25, jax.random.key(0))
    per_example = y.reshape(4000, -1)
    assert ((per_example == 0).all(1) | (jnp.abs(per_example - 4 / 3) < 1e-6).all(1)).all()
    assert abs(y.mean() - 1) < 0.03


@pytest.mark.parametrize("option", ("dropout_rate", "stochastic_depth_rate"))
def test_regularisers_act_in_training_alone(option):
    x = images()
    model = models.create("h1", **SMALL, **{option: 0.5})
    variables = init(model, x)
    apply = lambda seed, train: model.apply(
        variables, x, train=train, rngs={"dropout": jax.random.key(seed)}, mutable=["batch_stats"]
    )[0]
    assert not np.allclose(apply(0, True), apply(1, True))
    np.testing.assert_array_equal(apply(0, False), apply(1, False))


@functools.cache
def in_mode(train, use_running_average):
    """Logits and maps of one model without dropout, with the statistics after each, and whether these moved."""
    x, model = images(), models.create("h1", **SMALL, final_width=8)
    variables = init(model, x)

    @jax.jit
    def apply(variables):
        options = dict(use_running_average=use_running_average, mutable=["batch_stats"])
        return model.apply(variables, x, train, **options), model.apply(variables, x, train, method="features", **options)

    outputs = apply(variables)
    moved = not jax.tree.all(jax.tree.map(jnp.array_equal, outputs[0][1]["batch_stats"], variables["batch_stats"]))
    return outputs, moved


@pytest.mark.parametrize(
    "mode, like, moves",
    [((True, None), (False, False), True), ((True, True), (False, None), False), ((False, True), (False, None), False)],
)
def test_batch_norm_mode_is_apart_from_dropout(mode, like, moves):
    """Without dropout, logits and statistics depend on `use_running_average` alone, in backbone and final norm."""
    (actual, moved), (expected, _) = in_mode(*mode), in_mode(*like)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert moved == moves


def test_dropout_with_running_statistics():
    x = images()
    model = models.create("h1", **SMALL, dropout_rate=0.5)
    variables = init(model, x)
    frozen = jax.jit(functools.partial(model.apply, variables, x, use_running_average=True), static_argnames="train")
    dropped = frozen(train=True, rngs={"dropout": jax.random.key(0)})  # raises if statistics would move
    assert not np.allclose(dropped, frozen(train=False))


@pytest.mark.parametrize(
    "name, overrides, message",
    (
        ("h9", {}, "model 'h9' is unknown; use one of h0, h1,"),
        ("halonet", {}, "model 'halonet' is unknown; did you mean halonet50"),
        (4, {}, "model 4 is unknown; use one of h0, h1,"),
        ("h0", {"blocksize": 8}, "'blocksize' is unknown; did you mean block_size"),
        ("h0", {"bn_groupsize": 8}, "'bn_groupsize' is unknown; did you mean bn_group_size"),
        ("h0", {"num_classes": 0}, "num_classes=0 must be a whole number of at least 1"),
        ("h0", {"base_width": 20}, "stage 1 is 20 wide .* num_heads=4 must divide 20 .* multiple of 8, or another num_heads"),
        ("h0", {"base_width": -64}, "base_width=-64 must be a whole number of at least 1; for example base_width=64"),
        ("h0", {"value_ratio": 1.3}, "stage 1 is 64 wide .* value_ratio=1.3 gives 83.2 channels .* for example value_ratio=1.0"),
        ("h0", {"value_ratio": 65 / 64}, "num_heads=4 must divide 65 channels of values; .* a multiple of 4"),
        ("h0", {"value_ratio": float("nan")}, "value_ratio=nan must be a finite number between 0.001 and 1000"),
        ("h0", {"value_ratio": 1e308}, "value_ratio=1e.308 must be"),
        ("h0", {"bn_epsilon": float("inf")}, "bn_epsilon=inf must be a finite number of at least 0"),
        ("h0", {"expansion_ratio": 0.01}, "expansion_ratio=0.01 gives stage 1 less than one channel .* use 0.016 or more"),
        ("h0", {"stage_sizes": (1, 2)}, "stage_sizes=.1, 2. must be a tuple of 4 entries; for example stage_sizes=.3, 3,"),
        ("h0", {"stage_sizes": 3}, "stage_sizes=3 must be a tuple of 4 entries"),
        ("h0", {"stage_sizes": (3, 3, 2.5, 3)}, r"stage_sizes\[2\]=2.5 must be a whole number of at least 1"),
        ("h0", {"stage_kinds": "conv"}, "stage_kinds='conv' must be a tuple of 4 entries"),
        ("h0", {"stage_kinds": ("halo",) * 4}, r"stage_kinds\[0\]='halo' is unknown; use one of attention, conv"),
        ("h0", {"num_heads": (4, 8, 0, 8)}, r"num_heads\[2\]=0 must be a whole number of at least 1"),
        ("h0", {"num_heads": (4, 8, -8, 8)}, r"num_heads\[2\]=-8 must be"),
        ("h0", {"num_heads": (4, 8, "8", 8)}, r"num_heads\[2\]='8' must be"),
        ("h0", {"num_heads": (4, 8, 3, 8)}, "stage 3 is 256 wide .* num_heads=3 must divide 256 .* multiple of 6"),
        ("h0", {"block_size": 0}, "block_size=0 must be a whole number of at least 1; for example block_size=8"),
        ("h0", {"block_size": 8.0}, "block_size=8.0 must be a whole number"),
        ("h0", {"block_size": None}, "block_size=None must be a whole number"),
        ("h0", {"halo_size": -1}, "halo_size=-1 must be a whole number of at least 0; for example halo_size=3"),
        ("h0", {"stem": ""}, "stem='' is unknown; use one of conv, patch"),
        ("h0", {"activation": "gelu"}, "activation='gelu' is unknown; did you mean relu"),
        ("h0", {"se_ratio": 2}, "se_ratio=2 must be a finite number between 0 and 1"),
        ("h0", {"se_kinds": ("atention",)}, r"se_kinds\[0\]='atention' is unknown; did you mean attention"),
        ("h0", {"se_kinds": "conv"}, "se_kinds='conv' must be a tuple of 0 to 2 entries"),
        ("h0", {"se_ratio": 0.1, "se_kinds": ("conv",)}, "se_ratio=0.1 acts in no block: .* add one of them to se_kinds, or"),
        ("h0", {"stochastic_depth_rate": 1}, "stochastic_depth_rate=1 must be less than 1"),
        ("h0", {"dropout_rate": "0.1"}, "dropout_rate='0.1' must be a finite number of at least 0"),
        ("h0", {"bn_group_size": -1}, "bn_group_size=-1 must be a whole number of at least 0"),
        ("h0", {"padding": "reflect"}, "padding='reflect' is unknown; use one of mask, zero"),
        ("h0", {"window": "centred"}, "window='centred' is unknown; did you mean centered"),
        ("h0", {"attention_impl": "cuda"}, "attention_impl='cuda' is unknown; use one of auto, xla,"),
        ("h0", {"dtype": "float16"}, "dtype='float16' is unknown; use one of float32, bfloat16"),
        ("h0", {"dtype": "half precision"}, "dtype='half precision' is unknown"),
        ("h0", {"scan": "yes"}, "scan='yes' must be True or False"),
    ),
)
def test_bad_arguments_name_value_rule_and_remedy(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, **overrides)


@pytest.mark.parametrize("shape", [(48, 48, 3), (2, 0, 48, 3), (1, 2, 48, 48, 3)])
def test_images_of_no_use_are_a_plain_error(shape):
    model = models.create("h1", **SMALL)
    with pytest.raises(ValueError, match=r"images have shape .* must be \[batch, height, width, channels\]"):
        jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize("height, width", [(1, 1), (3, 70)])
def test_images_of_any_other_size_fit(height, width):
    model = models.create("h1", **SMALL)
    variables = init(model, images())  # of another size
    apply = jax.jit(functools.partial(model.apply, train=False))
    assert jnp.isfinite(apply(variables, images(1, height, width))).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 0}, "num_heads=0 must be a whole number of at least 1"),
        ({"num_heads": 3}, "num_heads=3 must divide 16 channels of queries into even parts; use a width that is a multiple of 6"),
        ({"value_channels": 0}, "value_channels=0 must be a whole number of at least 1"),
        ({"block_size": 0}, "block_size=0 must be a whole number of at least 1"),
        ({"halo_size": 0.5}, "halo_size=0.5 must be a whole number of at least 0"),
    ],
)
def test_bad_attributes_of_the_layer(change, message):
    layer = models.HaloAttention(**dict(channels=16, num_heads=2, block_size=4, halo_size=1) | change)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 8, 8, 16)))


def tpu(kind, *sizes, axis_type=jax.sharding.AxisType.Auto):
    """A mesh of chips that are not at hand."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=2 if kind == "TPU v4" else 1, platform="tpu")
    names = ("data", "fsdp")[: len(sizes)]
    return jax.sharding.AbstractMesh(sizes, names, axis_types=(axis_type,) * len(sizes), abstract_device=device)


@pytest.mark.parametrize(
    "mesh, name, options, expected",
    (
        (tpu("TPU v5 lite", 2, 2), "h1", {}, "attention on TPU v5 lite: pallas for 19 of 19 layers"),
        (tpu("TPU v5 lite", 2, 2), "h1", {"attention_impl": "xla"}, "attention on TPU v5 lite: xla for 19 of 19 layers"),
        (tpu("TPU v5 lite", 3), "h1", {}, "xla for 19 of 19 layers (stages 1, 2, 3, 4: a batch of 8 does not divide"),
        (tpu("TPU v4", 4), "h1", {"block_size": 32, "halo_size": 16, "scan": True}, "MiB of on-chip memory, of 16)"),
        (tpu("TPU v3", 4), "h1", {}, "xla for 19 of 19 layers (stages 1, 2, 3, 4: kernels with bfloat16 products do not compile"),
        (tpu("TPU v5 lite", 4, axis_type=jax.sharding.AxisType.Explicit), "h1", {},
         "the mesh has Explicit axes; give jax.make_mesh axis_types="),
        (tpu("TPU v5 lite", 4), "resnet50", {}, "attention on TPU v5 lite: none"),
        (tpu("TPU v5 lite", 4), "halonet26t", {}, "attention on TPU v5 lite: pallas for 3 of 3 layers"),
        (tpu("TPU v5 lite", 4), "halonet26t", {"window": "centered"}, "stage 4: windows centred on strided queries need tables by"),
        (tpu("TPU v5 lite", 4), "haloregnetz_b", {}, "(stages 3, 4: 24 channels per head neither divide 128 nor fit in there"),
        (None, "h1", {}, "attention on cpu: xla for 19 of 19 layers"),
        (None, "h1", {"attention_impl": "pallas", "halo_size": 9},
         "xla for 17 of 19 layers (stages 1, 2, 3, 4: halo_size=9 is more than block_size=8, so that windows reach beyond the next "
         "block); pallas for 2 of 19 layers"),
    ),
    ids=str,
)  # fmt: skip
def test_attention_is_chosen_by_the_devices_that_a_program_is_for(mesh, name, options, expected):
    with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh):
        assert expected in models.create(name, **options, dtype="bfloat16").describe(8, 256, 256)


def test_a_layer_that_the_fused_kernels_cannot_do_falls_back(caplog):
    layer = layers.HaloAttention(16, num_heads=2, block_size=2, halo_size=3, implementation="pallas")
    x = jnp.zeros((1, 8, 8, 16))
    jax.eval_shape(layer.apply, jax.eval_shape(layer.init, jax.random.key(0), x), x)
    assert '"xla" instead of "pallas": halo_size=3 is more than block_size=2' in caplog.text


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 1)])
def test_max_pool_is_flax(size):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    flax_pool = lambda x: nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    (ours, our_vjp), (theirs, their_vjp) = (jax.vjp(pool, x) for pool in (layers.max_pool, flax_pool))
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(our_vjp(ours)[0], their_vjp(theirs)[0], rtol=1e-6)


@pytest.mark.parametrize("kernel_size, stride", [(1, 1), (1, 2), (3, 2)])
def test_convolutions_are_flax(kernel_size, stride):
    x, kernel_shape = jax.random.normal(jax.random.key(0), (2, 5, 6, 3)), (kernel_size, kernel_size, 3, 4)
    conv = lambda **options: nn.Conv(
        4, kernel_shape[:2], (stride, stride), padding=kernel_size // 2, use_bias=False, **options
    ).apply({"params": {"kernel": jnp.ones(kernel_shape)}}, x)  # fmt: skip
    np.testing.assert_allclose(conv(conv_general_dilated=layers.conv_general_dilated), conv(), rtol=1e-5)
