"""Summaries of models: what is counted, and the tables."""

import csv
import functools
import io
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from entries import ROOT, command, run

from halonet_jax import config as config_lib
from halonet_jax import models, summary
from halonet_jax.costs import counting
from halonet_jax.ops import reference

TINY = dict(num_classes=10, stage_sizes=(1, 3, 1, 1), base_width=16, stem_width=16, final_width=32, block_size=4, halo_size=1)


def trace(model, batch, size):
    """Shapes of the variables, and the forward pass as JAX lowers it and as it is traced."""
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    variables = jax.eval_shape(lambda images: model.init(jax.random.key(0), images, train=False), images)
    forward = jax.jit(lambda variables, images: model.apply(variables, images, train=False))
    return variables, forward.lower(variables, images), forward.trace(variables, images).jaxpr


@pytest.mark.parametrize("size, multiply_adds", [(224, 4.09e9), (256, 5.34e9)])
def test_resnet50_has_the_figures_that_are_published_of_it(size, multiply_adds):
    total = summary.summarize(models.create("resnet50"), size).total
    assert total.parameters == 25_557_032
    assert total.multiply_adds == pytest.approx(multiply_adds, rel=1e-3)
    if size == 224:
        assert total.activations == pytest.approx(11.1e6, rel=2e-3)  # timm's table


@pytest.mark.parametrize(
    "options", [{}, {"value_ratio": 2.0, "padding": "mask", "se_ratio": 0.25}, {"block_size": 3, "scan": True}]
)
def test_attention_counts_as_the_reference_computes_it(options):
    """The reference gathers a window for each query, and nothing else. Its blocks do not shrink: the maps are larger here."""
    options = TINY | {"padding": "zero"} | options
    # A function gets what every implementation but "reference" gets: all pixels as queries, where the stride does not
    # divide the block size.
    model = models.create("h1", **options, attention_impl=functools.partial(reference.attend))
    variables, _, jaxpr = trace(model, 2, 256)
    found = counting.products_of(jaxpr.jaxpr)
    counts = counting.count(model, 2, 256, 256)
    for key in ("multiply_adds", "activations"):
        assert getattr(counts.total, key) == sum(n for (_, kind), n in found.items() if kind == key)
    assert counts.total.parameters == sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))


def test_multiply_adds_are_half_the_flops_that_xla_counts():
    model = models.create("resnet50", **TINY | {"expansion_ratio": 4.0, "activation": "relu"})
    _, lowered, _ = trace(model, 1, 64)
    flops = lowered.compile().cost_analysis()["flops"]
    # XLA also counts norms and activation functions, and leaves out what convolutions do with padding.
    assert summary.summarize(model, 64).total.multiply_adds == pytest.approx(flops / 2, rel=0.05)


def test_stages_show_maps_windows_and_what_attends():
    specs = models.stages("h1", **{key: TINY[key] for key in ("stage_sizes", "base_width", "block_size", "halo_size")})
    conv = models.BlockSpec("conv", width=16, out_width=32)
    model = models.create("h1", 7, stages=[specs[0], [*specs[1], conv], *specs[2:]], stem_width=16)
    found = summary.summarize(model, 64, 96, batch=2)
    assert [stage.map for stage in found.stages] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [stage.windows for stage in found.stages] == [((6, 6),), ((6, 6),), ((6, 6),), ((4, 6),)]
    assert found.implementations == {"xla": 6}
    single = summary.summarize(model, 64, 96)
    assert (found.total.parameters, found.total.multiply_adds) == (single.total.parameters, 2 * single.total.multiply_adds)
    text, markdown = (summary.stage_table(found, name) for name in ("text", "markdown"))
    assert "2 images of 64×96, 7 classes" in text and "3 attention + 1 conv" in text and "xla for 6 of 6 layers" in text
    assert max(map(len, text.splitlines())) <= 100
    assert len({line.count("|") for line in markdown.splitlines() if line.startswith("|")}) == 1
    rows = list(csv.DictReader(io.StringIO(summary.stage_table(found, "csv"))))
    assert [row["part"] for row in rows] == ["stem", "1", "2", "3", "4", "head", "total"]
    assert sum(int(row["multiply_adds"]) for row in rows[:-1]) == int(rows[-1]["multiply_adds"]) == found.total.multiply_adds


def test_the_table_of_all_models_has_the_sizes_of_their_recipes(monkeypatch):
    recipes = {path.stem for path in pathlib.Path(ROOT, "configs").glob("*.py")} & set(models.names())
    assert len(recipes) > 10 and [summary.recipe_size(name) for name in ("haloregnetz_b", "halonet26t")] == [224, 256]
    for name in recipes:
        assert summary.recipe_size(name) == config_lib.sibling(pathlib.Path(ROOT, "configs", "h0.py"), name).data.image_size
    monkeypatch.setattr(models, "names", lambda: ("h0", "resnet50", "lamhalobotnet50ts_256"))
    found = summary.summarize_all()
    text = summary.model_table(found)
    assert max(map(len, text.splitlines())) <= 100
    rows = list(csv.DictReader(io.StringIO(summary.model_table(found, "csv"))))
    assert [(row["model"], row["image"], row["window"], row["attention"]) for row in rows] == [
        ("h0", "256", "14 14 14 14", "xla 16"), ("resnet50", "256", "", ""),
        ("lamhalobotnet50ts_256", "256", "– 13 14 8", "xla 4, λ 2"),
    ]  # fmt: skip
    assert int(rows[0]["parameters"]) == 5_485_352


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--image_size=0"], "--image_size='0' is no size in pixels; give SIDE or HEIGHTxWIDTH"),
        (["--model=/nowhere", "--config=configs/digits.py"], "--model and --config were both given"),
        (["--config=configs/digits.py", "--config.model.num_heads=(3,8,8,8)"], "config.model: stage 1"),
        (["--config=configs/nothing.py"], "--config cannot be read"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message):
    done = run(command("summary", *arguments), code=2)
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_command_shows_a_recipe():
    done = run(command("summary", "--config=configs/digits.py", "--format=csv", "--image_size=64x32"))
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["map"] for row in rows[1:5]] == ["16×8", "8×4", "4×2", "2×1"] and rows[5]["width"] == "10"
