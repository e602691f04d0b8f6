"""Surgery on real models' variables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_blocks import MIXED

from halonet_jax import models
from halonet_jax.models import transfer

IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((1, 33, 38, 3)), jnp.float32)
SMALL = dict(stage_sizes=(1, 3, 1, 1), base_width=16, stem_width=8)
CREATE = {
    "mixed stages": functools.partial(models.create, "h1", 5, stages=MIXED, stem_width=8),
    "equal blocks": functools.partial(models.create, "h1", 5, **SMALL),
}
each_kind = pytest.mark.parametrize("create", CREATE.values(), ids=CREATE)


def abstract(model):
    return jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), IMAGES)


def variables_of(model):
    rng = np.random.default_rng(0)
    draw = lambda path, x: np.ones(x.shape) if path[-1].key == "var" else rng.standard_normal(x.shape) * x.size**-0.25
    return jax.tree_util.tree_map_with_path(lambda path, x: jnp.asarray(draw(path, x), x.dtype), abstract(model))


def assert_tree_of(variables, model):
    """The model takes these variables: names, shapes and dtypes."""
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract(model))


@each_kind
def test_stacked_and_unstacked_variables(create):
    unrolled, scanned = create(scan=False), create(scan=True)
    variables = variables_of(unrolled)
    stacked = transfer.stack_blocks(variables, unrolled.backbone.stages)
    assert_tree_of(stacked, scanned)
    back = transfer.unstack_blocks(stacked, unrolled.backbone.stages)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_scanned_and_unrolled_models_agree():
    """Stages mix blocks here; `test_models.py` compares models of equal blocks, with their gradients."""
    unrolled, scanned = (CREATE["mixed stages"](scan=scan) for scan in (False, True))
    variables = variables_of(unrolled)
    stacked = transfer.stack_blocks(variables, unrolled.backbone.stages)
    logits = lambda model, variables: jax.jit(functools.partial(model.apply, train=False))(variables, IMAGES)
    np.testing.assert_allclose(logits(scanned, stacked), logits(unrolled, variables), rtol=1e-4, atol=1e-5)


def test_classifier_of_zeros():
    old = variables_of(models.create("h1", 5, **SMALL, final_width=8))
    new = transfer.replace_classifier(old, 7)
    assert_tree_of(new, models.create("h1", 7, **SMALL, final_width=8))
    assert not any(leaf.any() for leaf in jax.tree.leaves(new["params"]["classifier"]))
    kept = lambda variables: {**variables, "params": {k: v for k, v in variables["params"].items() if k != "classifier"}}
    jax.tree.map(np.testing.assert_array_equal, kept(new), kept(old))
    assert old["params"]["classifier"]["bias"].shape == (5,)


@pytest.mark.parametrize("old, new", [((8, 2), (12, 2)), ((12, 2), (16, 1)), ((8, 3), (4, 1)), ((1, 0), (4, 1)), ((4, 1), (1, 0))])
def test_tables_are_interpolated(old, new):
    old_rows, new_rows = (2 * b + 2 * h - 1 for b, h in (old, new))
    table = jnp.asarray(np.random.default_rng(0).standard_normal((3, old_rows, 4)), jnp.float32)
    # Offsets from -1 to 1, whatever the number of rows; a single row is offset 0.
    offsets = lambda rows: np.linspace(-1, 1, rows) if rows > 1 else np.zeros(1)
    expected = np.empty((3, new_rows, 4))
    for at in np.ndindex(3, 4):
        expected[at[0], :, at[1]] = np.interp(offsets(new_rows), offsets(old_rows), table[at[0], :, at[1]])
    np.testing.assert_allclose(transfer.resize_table(table, new_rows), expected, atol=1e-6)


@pytest.mark.parametrize("scan", (False, True))
def test_a_model_with_other_blocks_and_halos(scan):
    old, new = (models.create("h1", 5, **SMALL, scan=scan, block_size=b, halo_size=h) for b, h in ((4, 1), (6, 2)))
    variables = variables_of(old)
    resized = transfer.resize_relative_tables(variables, new.backbone.stages)
    assert_tree_of(resized, new)
    # The operator sees the offsets' ends and middle as before.
    name = "stage2_blocks" if scan else "stage2_block3"
    before, after = (v["params"]["backbone"][name]["attention"]["rel_cols"] for v in (variables, resized))
    ends_and_middle = lambda table: table[..., [0, table.shape[-2] // 2, -1], :]
    np.testing.assert_allclose(ends_and_middle(after), ends_and_middle(before), rtol=1e-6)


@each_kind
def test_tables_of_the_right_size_are_unchanged(create):
    for scan in (False, True):
        variables = variables_of(create(scan=scan))
        resized = transfer.resize_relative_tables(variables, create().backbone.stages)
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b, resized, variables))


def test_shapes_of_abstract_variables():
    old, new = (models.create("h1", n, **SMALL, block_size=b, scan=scan) for n, b, scan in ((5, 4, False), (3, 6, True)))

    def convert(variables):
        variables = transfer.stack_blocks(transfer.replace_classifier(variables, 3), old.backbone.stages)
        return transfer.resize_relative_tables(variables, new.backbone.stages)

    assert_tree_of(jax.eval_shape(convert, abstract(old)), new)


H1, CONVS = models.stages("h1", **SMALL), models.stages("h1", **SMALL, stage_kinds=("conv",) * 4)


@pytest.mark.parametrize(
    "function, argument, message",
    [
        (transfer.stack_blocks, models.stages("h1"), "lacks stage1_block2, .* and has nothing which stages does not"),
        (transfer.unstack_blocks, H1, "lacks stage2_blocks, and has stage2_block2, stage2_block3 which stages does not have"),
        (transfer.resize_relative_tables, CONVS, "stage1_block1 is no block of kind='conv', as stages has it; give model.backb"),
        (transfer.replace_classifier, 0, "num_classes=0 must be a whole number of at least 1"),
    ],
)
def test_what_does_not_fit(function, argument, message):
    with pytest.raises(ValueError, match=message):
        function(variables_of(models.create("h1", 5, **SMALL)), argument)


@pytest.mark.parametrize("function, argument", [(transfer.stack_blocks, H1), (transfer.replace_classifier, 3)])
def test_variables_of_something_else(function, argument):
    with pytest.raises(ValueError, match="give the variables of a models.HaloNet"):
        function({"params": {"kernel": jnp.zeros(3)}}, argument)


def test_blocks_that_only_seem_equal_are_not_stacked():
    variables = variables_of(models.create("h1", 5, **SMALL))
    block = variables["params"]["backbone"]["stage2_block2"]
    block["conv3"] = {"kernel": block["conv3"]["kernel"][..., 1:]}
    with pytest.raises(ValueError, match="the arrays of stage2_block2, stage2_block3 differ in number or shape"):
        transfer.stack_blocks(variables, H1)


def test_blocks_that_cover_the_map_compute_the_same():
    """2b + 2h stays, so that the tables do; in 16 pixels, no layer has a map of more than 4."""
    create = functools.partial(models.create, "h1", 5, stage_sizes=(1, 1, 1, 1), base_width=16, stem_width=8)
    old, new = create(block_size=4, halo_size=1), create(block_size=5, halo_size=0)
    variables = variables_of(old)
    resized = transfer.resize_relative_tables(variables, new.backbone.stages)
    jax.tree.map(np.testing.assert_array_equal, resized, variables)
    logits = [model.apply(variables, IMAGES[:, :16, :16], train=False) for model in (old, new)]
    assert np.ptp(logits[0]) > 0.1
    np.testing.assert_allclose(*logits, atol=1e-5)
