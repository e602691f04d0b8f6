"""Attention maps against the operator that they explain."""

import jax
import numpy as np
import pytest
from etils import epath

from halonet_jax import attention_maps, models, weights
from halonet_jax import config as config_lib
from halonet_jax.errors import ConfigError
from halonet_jax.models import BlockSpec
from halonet_jax.training.task import Task


def loaded_model(block_size=4, halo_size=1, blocks=1, block=None, size=(32, 32), **options):
    """A model of two stages, the second with stride 2, and random weights."""
    attention = dict(width=8, out_width=8, num_heads=2, block_size=block_size, halo_size=halo_size, **block or {})
    stages = [[BlockSpec("attention", **attention)] * blocks, [BlockSpec("attention", stride=2, **attention)]]
    model = models.create("h1", 3, stages=stages, stem="patch", stem_width=8, final_width=0, **options)
    variables = jax.jit(lambda: model.init(jax.random.key(0), np.zeros((1, *size, 3), np.float32), train=False))()
    noise = np.random.default_rng(1)
    variables["params"] = jax.tree.map(lambda x: x + 0.2 * noise.normal(size=x.shape).astype("float32"), variables["params"])
    task = Task(None, None, None, None, model=model, normalize=lambda images: images / np.float32(128) - 1)
    return weights.Loaded(config_lib.digits(), task, variables, {}, 0, "raw", epath.Path("model"))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(block_size=3, halo_size=2, padding="zero", blocks=3, scan=True),  # the stride does not divide the block
        dict(halo_size=2, window="centered", remat=True),
        dict(padding="zero", block={"full_tables": True, "adjacent_queries": True}),
        dict(block={"positions": "absolute", "query_width": 16}),
        dict(block={"positions": "none", "pool": True}, padding="zero"),
    ],
    ids=["mask", "zero", "centered", "timm", "absolute", "none"],
)  # fmt: skip
def test_weights_times_values_are_what_each_layer_gives(options):
    loaded = loaded_model(**options, size=(28, 44))
    image = np.random.default_rng(0).integers(0, 256, (28, 44, 3), np.uint8)
    captured = attention_maps.Capture(loaded)(image)
    assert [found.layer for found in captured.layers] == loaded.model.backbone.attention_layers(28, 44)
    assert [found.layer.stage for found in captured.by_stage()] == [1, 2]
    logits = jax.jit(lambda: loaded.model.apply(loaded.variables, loaded.task.normalize(image[None]), train=False))()
    np.testing.assert_allclose(captured.logits, logits[0], rtol=1e-4, atol=1e-4)
    for found in captured.layers:
        for i, j in np.ndindex(found.q.shape[:2]):
            np.testing.assert_allclose(found.attended(i, j), found.output[i, j], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(found.of_query(i, j).weights.sum((1, 2)), 1, atol=1e-5)


def test_places_and_boxes_are_shares_of_the_image():
    loaded = loaded_model()
    captured = attention_maps.Capture(loaded)(np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8))
    first, second = captured.layers  # maps of 8 x 16; the second layer's queries are on every second pixel
    seen = first.at(0.99, 0.3)
    assert (
        seen.query == (7 / 8, 4 / 16, 1, 5 / 16)
        and seen.block == (0.5, 0.25, 1, 0.5)
        and seen.window == (3 / 8, 3 / 16, 9 / 8, 9 / 16)
    )
    assert seen.weights.shape == (first.layer.num_heads, 6, 6) and not seen.weights[:, -1].any()  # below the map
    assert second.at(0.99, 0.3).query == (6 / 8, 4 / 16, 7 / 8, 5 / 16)
    assert first.at(1, 1).query[2:] == (1, 1)
    (row, column), *others = captured.strongest(3)
    i, j = int(row * captured.strength.shape[0]), int(column * captured.strength.shape[1])
    assert captured.strength[i, j] == captured.strength.max() and len(set(others)) == 2


def test_what_is_no_image_is_refused():
    capture = attention_maps.Capture(loaded_model())
    with pytest.raises(ConfigError, match=r"float64\[4, 4, 3\]; it must be uint8\[height, width, 3\]"):
        capture(np.zeros((4, 4, 3)))
