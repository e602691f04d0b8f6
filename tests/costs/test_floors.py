"""The floors of halo attention, against counting by brute force and by hand."""

import itertools

import pytest

from halonet_jax.costs import floors


@pytest.mark.parametrize("size, b, h, stride", [(8, 4, 1, 1), (7, 3, 2, 2), (4, 8, 3, 1)])
def test_work_is_what_counting_gives(size, b, h, stride):
    layer = floors.Layer(2, size, size + 2, heads=2, channels=8, value_channels=12, block_size=b, halo_size=h, stride=stride)
    near = lambda key, query: query // b * b - h <= key < query // b * b + b + h
    queries = list(itertools.product(range(0, layer.height, stride), range(0, layer.width, stride)))
    keys = list(itertools.product(range(layer.height), range(layer.width)))
    pairs = 2 * sum(near(r, y) and near(s, x) for y, x in queries for r, s in keys)
    rows = 2 * sum(near(r, y) for y, _ in queries for r in range(layer.height))
    cols = 2 * sum(near(s, x) for _, x in queries for s in range(layer.width))
    work = floors.forward(layer)
    assert work.exponentials == 2 * pairs
    assert work.multiply_adds == (8 + 12) * pairs + 4 * (rows + cols)
    tables = 2 * 4 * (2 * b + 2 * h - 1) * 2
    assert work.size == 2 * 2 * (len(queries) * (8 + 12) + len(keys) * (8 + 12)) + tables
    assert floors.backward(layer).multiply_adds == (3 * 8 + 2 * 12) * pairs + 3 * 4 * (rows + cols)


def test_layers_without_relative_tables_have_no_work_for_positions():
    layer = floors.Layer(2, 8, 8, heads=2, channels=8, value_channels=12, block_size=4, halo_size=1, relative=False)
    pairs = 2 * (2 * 4 * 5) ** 2  # images, then by axis: blocks, queries of each, keys of each
    for work, products in ((floors.forward(layer), 8 + 12), (floors.backward(layer), 3 * 8 + 2 * 12)):
        assert work.multiply_adds == products * pairs
    assert floors.forward(layer).size == 2 * 2 * 2 * 64 * (8 + 12)


def test_layers_and_rates():
    assert floors.layer("h7s3", 2) == floors.Layer(2, 38, 38, 8, 256, 1024, 10, 3)
    work = floors.Work(size=3350, multiply_adds=0, exponentials=0)
    assert work.seconds(floors.rates("NVIDIA H100 80GB HBM3"))["bytes"] == pytest.approx(1e-9)
    assert floors.rates("cpu") is None
    with pytest.raises(ValueError, match="h4s1"):
        floors.layer("h4", 1)
