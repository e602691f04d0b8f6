"""The paper's ablations: absolute positions or none, width of queries (r_qk), pooling after attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet_jax import models
from halonet_jax.costs import counting
from halonet_jax.models import BlockSpec, transfer
from halonet_jax.ops import reference

TINY = dict(
    num_classes=3, stage_sizes=(1, 1, 1, 1), base_width=8, stem_width=8, num_heads=(2, 2, 2, 2), block_size=4, halo_size=1
)
BLOCK = BlockSpec("attention", width=8, out_width=8, num_heads=2, block_size=4, halo_size=1)


def shapes(model, height, width=None):
    images = jax.ShapeDtypeStruct((1, height, width or height, 3), jnp.float32)
    return jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)


def filled(tree, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda path, x: np.ones(x.shape) if path[-1].key == "var" else rng.standard_normal(x.shape) * x.size**-0.25
    return jax.tree_util.tree_map_with_path(lambda path, x: jnp.asarray(draw(path, x), x.dtype), tree)


def expected_layer(params, x, b, h, heads, stride, pool):
    """The layer without relative tables in NumPy, one query after the other."""
    q, k, v = ((x @ params[name]["kernel"]).reshape(*x.shape[:2], heads, -1) for name in ("query", "key", "value"))
    if "abs_rows" in params:
        for r, s in np.ndindex(x.shape[:2]):
            k[r, s] += np.concatenate([params["abs_rows"][r], params["abs_cols"][s]])
    out = np.zeros(v.shape)
    for y, z, n in np.ndindex(q.shape[:3]):
        rows, cols = (
            range(max(i // b * b - h, 0), min(i // b * b + b + h, size)) for i, size in ((y, len(x)), (z, x.shape[1]))
        )
        logits, values = [], []
        for r in rows:
            for s in cols:
                logits.append(q[y, z, n] @ k[r, s, n] * q.shape[-1] ** -0.5)
                values.append(v[r, s, n])
        weights = np.exp(np.array(logits) - max(logits))
        out[y, z, n] = weights @ np.array(values) / weights.sum()
    out = out.reshape(*out.shape[:2], -1)
    if not pool:
        return out[::stride, ::stride]
    return np.array([
        [out[i : i + stride, j : j + stride].mean((0, 1)) for j in range(0, out.shape[1], stride)]
        for i in range(0, len(out), stride)
    ])  # fmt: skip


@pytest.mark.parametrize(
    "size, options",
    [
        ((7, 6), dict(positions="absolute", stride=2)),
        ((7, 5), dict(positions="none", stride=2, pool=True, channels=24)),
    ],
    ids=str,
)
def test_a_layer_is_what_numpy_computes(size, options):
    """All gradients are finite, and none is zero throughout."""
    settings = dict(channels=8, value_channels=12, num_heads=2, block_size=4, halo_size=1) | options
    layer = models.HaloAttention(**settings)
    x = np.random.default_rng(0).standard_normal((1, *size, 6)).astype(np.float32)
    params = filled(jax.eval_shape(layer.init, jax.random.key(0), x))["params"]
    f = lambda params, x: layer.apply({"params": params}, x)
    out, vjp = jax.vjp(jax.jit(f), params, x)
    stride, pool = settings.get("stride", 1), settings.get("pool", False)
    expected = expected_layer(jax.tree.map(np.asarray, params), x[0], 4, 1, 2, stride, pool)
    assert out.shape[1:3] == (-(-size[0] // stride), -(-size[1] // stride))
    np.testing.assert_allclose(out[0], expected, atol=1e-5)
    for name, gradient in jax.tree_util.tree_leaves_with_path(vjp(jnp.cos(jnp.arange(out.size)).reshape(out.shape))):
        assert jnp.isfinite(gradient).all() and gradient.any(), name


def test_a_model_with_all_options_trains():
    """In bfloat16, with a loop and recomputation, on maps that neither blocks nor squares divide."""
    height, width, next_block = 26, 37, dataclasses.replace(BLOCK, positions="absolute", query_width=16)
    stages = [[dataclasses.replace(next_block, stride=2, pool=True), next_block]]
    model = models.create("h1", 3, stages=stages, stem="patch", stem_width=8, dtype="bfloat16", scan=True, remat=True)
    variables = filled(shapes(model, height, width))
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, height, width, 3)), jnp.float32)

    @jax.jit
    def gradients(params):
        loss = lambda params: (
            model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])[0] ** 2
        ).sum()
        return jax.grad(loss)(params)

    assert all(jnp.isfinite(x.astype(jnp.float32)).all() for x in jax.tree.leaves(gradients(variables["params"])))


def test_pooled_maps_are_as_large_as_strided_ones():
    sizes = dict(stage_sizes=(1, 2, 1, 1), stage_kinds=("conv", "attention", "attention", "conv"))
    strided, pooled = (models.create("h7", **sizes, downsampling=way) for way in ("strided", "pooled"))
    ours, theirs = (counting.count(model, 1, 101, 150) for model in (strided, pooled))
    assert ours.maps == theirs.maps == ((26, 38), (13, 19), (7, 10), (4, 5))
    assert ours.total.parameters == theirs.total.parameters and ours.total.multiply_adds < theirs.total.multiply_adds
    assert [[spec.pool for spec in stage] for stage in pooled.backbone.stages] == [[False], [True, False], [True], [False]]


def test_parameters_by_arithmetic():
    """HaloNet-50: 16 channels per head, so that tables have 8; widths 64 to 512 in 3, 4, 6 and 3 blocks; b 8, h 3."""
    widths = [width for width, depth in zip((64, 128, 256, 512), (3, 4, 6, 3)) for _ in range(depth)]
    # Queries and keys get 5.5 c more channels from c; so do the tables, of which there are two with half of a head's.
    wide = sum(2 * int(5.5 * width) * width + (2 * 8 + 2 * 3 - 1) * int(5.5 * 16) for width in widths)
    model = models.create("halonet50", query_ratio=6.5, scan=True)
    assert sum(x.size for x in jax.tree.leaves(shapes(model, 64)["params"])) == 18_017_576 + wide
    # Maps at 256 px: 64 pixels per side in stage 1 and in the first block of stage 2, and so on.
    absolute = models.create("halonet50", positions="absolute", stage_sizes=(1, 1, 1, 1))
    named = jax.tree_util.tree_leaves_with_path(shapes(absolute, 256)["params"])
    tables = {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in named if len(path) == 4}
    tables = {name: shape for name, shape in tables.items() if name.endswith(("_rows", "_cols"))}
    assert tables == {
        f"backbone/stage{n}_block1/attention/abs_{axis}": (side, 8)
        for n, side in enumerate((64, 64, 32, 16), start=1) for axis in ("cols", "rows")
    }  # fmt: skip


def test_multiply_adds_are_those_of_the_reference():
    """Blocks do not shrink: maps are larger here."""
    options = TINY | dict(padding="zero", positions="none", query_ratio=2.0, downsampling="pooled", block_size=3)
    model = models.create("h1", **options, attention_impl=functools.partial(reference.attend))
    images = jax.ShapeDtypeStruct((2, 128, 128, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(functools.partial(model.apply, train=False))(shapes(model, 128), images).jaxpr
    found, counts = counting.products_of(jaxpr), counting.count(model, 2, 128, 128).total
    for key in ("multiply_adds", "activations"):
        assert getattr(counts, key) == sum(n for (_, kind), n in found.items() if kind == key)


@pytest.mark.parametrize("scan", [False, True])
def test_absolute_tables_are_interpolated_for_other_images(scan):
    block = dataclasses.replace(BLOCK, positions="absolute")
    stages = [[dataclasses.replace(block, stride=2), block]]
    model = models.create("h1", 3, stages=stages, stem="patch", stem_width=8, scan=scan)
    old = filled(shapes(model, 64))
    with pytest.raises(ValueError, match=r"the map has 24 rows, and abs_rows has embeddings of 16: .*resize_absolute_tables"):
        jax.eval_shape(functools.partial(model.apply, train=False), old, jnp.zeros((1, 96, 72, 3)))
    new = transfer.resize_absolute_tables(old, model.backbone, 96, 72)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, shapes(model, 96, 72))
    tables = [tree["params"]["backbone"]["stage1_block1"]["attention"]["abs_cols"] for tree in (old, new)]
    expected = np.interp(np.linspace(0, 15, 18), np.arange(16), tables[0][:, 0])
    np.testing.assert_allclose(tables[1][:, 0], expected, atol=1e-6)
    same = transfer.resize_relative_tables(old, model.backbone.stages)  # there are none
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, same, old))


def test_tables_of_another_kind_do_not_fit():
    absolute, none = (models.create("h1", **TINY, positions=kind) for kind in ("absolute", "none"))
    with pytest.raises(ValueError, match="stage1_block1 has no positions='none', as stages has it; give model.backbone.stages"):
        transfer.resize_relative_tables(filled(shapes(absolute, 32)), none.backbone.stages)


@pytest.mark.parametrize(
    "function, message",
    [
        (
            lambda: models.create("h0", positions="learned"),
            "positions='learned' is unknown; use one of relative, absolute, none",
        ),
        (lambda: models.create("h0", positions=None), "positions=None is unknown"),
        (lambda: models.create("h0", downsampling="pool"), "downsampling='pool' is unknown; did you mean pooled"),
        (lambda: models.create("h0", query_ratio=0), "query_ratio=0 must be a finite number between 0.001 and 1000"),
        (lambda: models.create("h0", query_ratio=1.3), "query_ratio=1.3 gives 83.2 channels of queries; .* query_ratio=1.0"),
        (lambda: models.create("h0", query_ratio=65 / 64), "num_heads=4 must divide 65 channels of queries into even parts"),
        (lambda: models.create("resnet50", positions="none"), "positions='none' acts in no block: .* set positions='relative'"),
        (
            lambda: models.create("h0", downsampling="pooled", stage_kinds=("attention", "conv", "conv", "conv")),
            "downsampling='pooled' acts in no block: .* no attention in stages 2 to 4",
        ),
        (lambda: models.create("halonet26t", positions="none"), "positions='none' has no effect on halonet26t"),
        (lambda: models.create("h1", stages=[[BLOCK]], query_ratio=2.0), "query_ratio=2.0 has no effect beside stages"),
        (lambda: dataclasses.replace(BLOCK, positions="no"), "positions='no' is unknown; did you mean none"),
        (lambda: dataclasses.replace(BLOCK, positions="none", full_tables=True), "full_tables=True is about relative tables"),
        (
            lambda: BlockSpec("conv", 8, 8, positions="absolute"),
            "positions='absolute' must be 'relative' in a block of kind='conv'",
        ),
    ],
)
def test_mistakes_name_value_rule_and_remedy(function, message):
    with pytest.raises(ValueError, match=message):
        function()
