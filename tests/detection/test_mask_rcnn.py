"""The whole network: its parts, parameters, losses and detections, on one device and on four."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet_jax import models
from halonet_jax.costs import hlo
from halonet_jax.detection import DETECTRON2, PAPER, MaskRCNN, heads, paste
from halonet_jax.detection import model as detector
from halonet_jax.models import layers
from halonet_jax.training import sharding

SMALL = dict(
    num_classes=4, width=8, rpn_samples=16, candidates=24, candidates_test=20, proposals=16, roi_samples=16, box_bins=3,
    box_dense=(8,), mask_bins=4, mask_convs=1, detections=6, detection_candidates=40, min_score=0.2, roi_base_size=64.0,
)  # fmt: skip


def make(recipe=PAPER, **changes):
    stages = models.stages("resnet50", stage_sizes=(1, 1, 1, 1), base_width=8, expansion_ratio=1.0)[:2]
    backbone = models.create("resnet50", stages=stages, stem_width=8, bn_group_size=1).backbone
    return MaskRCNN(backbone, dataclasses.replace(recipe, **SMALL | changes))


def shapes(model):
    return jax.eval_shape(functools.partial(detector.init, model), jax.random.key(0))


@functools.cache
def variables(model):
    """Parameters and statistics without compiling `init`; large enough that no two scores are equal."""
    rng = np.random.default_rng(0)
    draw = lambda path, x: np.ones(x.shape) if path[-1].key == "var" else rng.standard_normal(x.shape) * x.shape[-1] ** -0.5
    return jax.tree_util.tree_map_with_path(lambda path, x: jnp.asarray(draw(path, x), x.dtype), shapes(model))


def make_batch(count=4, objects=(3, 0, 1, 2)):
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 30, (count, 3, 2))
    return {
        "image": rng.standard_normal((count, 64, 80, 3)).astype(np.float32),
        "size": np.array([[64, 80], [50, 80], [64, 60], [40, 40]], np.float32)[:count],
        "boxes": np.concatenate([corner, corner + rng.uniform(8, 30, (count, 3, 2))], -1).astype(np.float32),
        "classes": rng.integers(1, 4, (count, 3)).astype(np.int32),
        "valid": np.arange(3) < np.array(objects)[:, None],
        "masks": rng.integers(0, 2, (count, 3, 12, 12)).astype(np.uint8),
    }


# Backbone without its classifier of 2,049,000. A 3x3 convolution of the width has 589,824, its bias 256, a norm 512.
#   FPN   lateral (256 + 512 + 1024 + 2048) 256, with 4 biases or norms; a convolution and a norm for each output
#   RPN   convolutions with biases; (3 + 12) (256 + 1)
#   box   convolutions with norms; 49 (256) 1024 + 1024, 1024^2 + 1024; 5 classes (1024 + 1)
#   mask  four convolutions with biases or norms; 4 (256^2) + 256; classes (256 + 1)
COUNTS = {
    "resnet50_se_halo": (
        PAPER,
        23_837_328,
        {"fpn": 3_935_744, "rpn_head": 593_935, "box_head": 14_362_055, "mask_head": 2_646_107},
    ),
    "resnet50": (
        DETECTRON2,
        23_508_032,
        {"fpn": 3_346_432, "rpn_head": 1_184_015, "box_head": 15_622_549, "mask_head": 2_644_561},
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    recipe, backbone, rest = COUNTS[name]
    params, _ = shapes(MaskRCNN(models.create(name).backbone, recipe))
    assert {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in params.items()} == rest | {"backbone": backbone}


def test_scores_and_boxes_are_in_the_order_of_the_anchors():
    head = heads.RPNHead(width=1, convs=0, anchors=3)
    maps = [jnp.arange(6.0).reshape(1, 2, 3, 1), jnp.full((1, 1, 1, 1), 7.0)]
    zeros = lambda n: {"kernel": jnp.zeros((1, 1, 1, n)), "bias": jnp.zeros(n)}
    score, box = zeros(3), zeros(12)
    score["kernel"], box["kernel"] = score["kernel"].at[0, 0, 0].set(jnp.array([1, 10, 100])), box["kernel"] + jnp.arange(12.0)
    logits, deltas = head.apply({"params": {"score": score, "box": box}}, maps)
    pixels = np.array([0, 1, 2, 3, 4, 5, 7])
    np.testing.assert_array_equal(logits[0], np.outer(pixels, [1, 10, 100]).reshape(-1))
    np.testing.assert_array_equal(deltas[0], (pixels[:, None, None] * np.arange(12).reshape(3, 4)).reshape(-1, 4))


@pytest.mark.parametrize("extra_level", ("conv", "pool", "none"))
def test_pyramid_adds_coarse_maps_to_fine_ones(extra_level):
    """With kernels that copy, each pixel is the sum of those above it; odd maps are cropped."""
    norm = functools.partial(layers.BatchNorm, use_running_average=True, epsilon=0.0)
    fpn = heads.FPN(1, extra_level)
    maps = [jnp.arange(15.0).reshape(1, 3, 5, 1), 100 * jnp.arange(6.0).reshape(1, 2, 3, 1)]
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: x if path[-1].key != "kernel" else jnp.zeros_like(x).at[x.shape[0] // 2, x.shape[0] // 2].set(1),
        fpn.init(jax.random.key(0), maps, norm),
    )
    fine, coarse, *extra = fpn.apply(variables, maps, norm)
    np.testing.assert_allclose(coarse, maps[1])
    np.testing.assert_allclose(
        fine[0, ..., 0], np.arange(15).reshape(3, 5) + 100 * np.array([[0, 0, 1, 1, 2]] * 2 + [[3, 3, 4, 4, 5]])
    )
    assert len(extra) == (extra_level != "none")
    if extra:
        np.testing.assert_allclose(extra[0][0, ..., 0], [[0, 200]])


def test_upsample_is_a_transposed_convolution():
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 4, 5), (2, 2, 5, 6), (6,)))
    params = {"pixels": {"kernel": kernel.transpose(2, 0, 1, 3).reshape(5, 24)}, "bias": bias}
    expected = jax.lax.conv_transpose(x, kernel[::-1, ::-1], (2, 2), "VALID", transpose_kernel=False) + bias
    found = heads.Upsample(6).apply({"params": params}, x)
    assert found.shape == (2, 6, 8, 6)
    by_hand = np.einsum("bhwc,yxcd->bhywxd", x, kernel).reshape(2, 6, 8, 6) + bias
    np.testing.assert_allclose(found, by_hand, atol=1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@functools.cache
def step(devices):
    """Compiled loss with gradients on a mesh, and what it gives for batches with and without objects."""
    model, mesh = make(extra_level="none"), sharding.make_mesh(1, jax.devices()[:devices])
    gradient = jax.value_and_grad(functools.partial(detector.losses, model), has_aux=True)
    cut, whole = jax.NamedSharding(mesh, sharding.BATCH), jax.NamedSharding(mesh, jax.P())
    arguments = (*variables(model), make_batch(), jax.random.key(0))
    with sharding.use(mesh):
        compiled = jax.jit(gradient, in_shardings=(whole, whole, cut, whole), out_shardings=whole).lower(*arguments).compile()
    place = lambda *arguments: compiled(*(jax.device_put(x, s) for x, s in zip(arguments, (whole, whole, cut, whole))))
    without = make_batch(objects=(0, 0, 0, 0))
    return compiled.as_text(), place(*arguments), place(*arguments[:2], without, arguments[3])


def test_losses_and_gradients_are_finite_with_and_without_objects():
    _, *results = step(1)
    for objects, ((loss, (state, parts)), gradients) in zip((True, False), results):
        assert set(parts) == {"rpn_score", "rpn_box", "class", "box", "mask"}
        np.testing.assert_allclose(loss, sum(parts.values()), rtol=1e-6)
        assert all((parts[name] > 0) == (objects or name in ("rpn_score", "class")) for name in parts)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves((gradients, state)))
        if objects:
            dead = {name for name, g in flat(gradients).items() if not np.any(g)}
            assert not dead
    assert not jax.tree.all(jax.tree.map(np.array_equal, results[0][0][1][0], variables(make(extra_level="none"))[1]))


def flat(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_sharded_equals_unsharded_and_moves_gradients_alone():
    (one, *expected), (text, *actual) = step(1), step(4)
    for ours, theirs in zip(actual, expected):
        for (name, a), b in zip(flat(ours).items(), flat(theirs).values()):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4 * max(1, np.abs(b).max()), err_msg=name)
    assert not hlo.collectives(one)
    moved = {c.kind: c for c in hlo.collectives(text)}
    summed = sum(x.nbytes for x in jax.tree.leaves(variables(make(extra_level="none"))))
    assert set(moved) == {"all-reduce"}
    # Gradients and statistics, once, those of the head that the levels share too. The others are sums of losses.
    assert moved["all-reduce"].count <= 5 and summed < moved["all-reduce"].bytes < summed + 256


def test_detections_of_an_image_do_not_depend_on_its_batch():
    model, batch = make(), {key: value for key, value in make_batch().items() if key in ("image", "size")}
    mesh = sharding.make_mesh(1)
    place = lambda batch: jax.device_put(batch, jax.NamedSharding(mesh, sharding.BATCH))
    with sharding.use(mesh):
        detect = jax.jit(functools.partial(detector.detect, model, *variables(model))).lower(place(batch)).compile()
    assert not hlo.collectives(detect.as_text())
    found = detect(place(batch))
    for n in range(4):
        alike = detect(place({key: np.stack([value[n]] * 4) for key, value in batch.items()}))
        for ours, theirs in zip(found, alike):
            np.testing.assert_array_equal(theirs, np.stack([ours[n]] * 4))
    valid, boxes, size = np.asarray(found.valid), np.asarray(found.boxes), batch["size"]
    assert valid.sum() > 8 and found.masks.shape == (4, 6, 8, 8)
    assert (np.asarray(found.scores)[valid] >= 0.2).all() and set(np.asarray(found.classes)[valid].tolist()) <= {1, 2, 3}
    assert (boxes >= 0).all() and (boxes[..., 2:] <= size[:, None]).all()
    for padding in found:
        assert not np.asarray(padding)[~valid].any()


def test_the_other_recipe_traces():
    model = make(DETECTRON2, align_samples=0)
    arguments = *shapes(model), make_batch()
    with sharding.use(sharding.make_mesh(1, jax.devices()[:1])):  # one form of each operator is traced, not all
        loss, (state, parts) = jax.eval_shape(functools.partial(detector.losses, model), *arguments, jax.random.key(0))
        found = jax.eval_shape(functools.partial(detector.detect, model), *arguments)
    assert loss.shape == () and len(parts) == 5 and "conv1_norm" in state["mask_head"] and "lateral2_norm" in state["fpn"]
    assert found.masks.shape == (4, 6, 8, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_classes": 1}, "num_classes=1 must be a whole number of at least 2; for example num_classes=91"),
        ({"anchor_ratios": (1.0, -2.0)}, r"anchor_ratios\[1\]=-2.0 must be a finite number between 0.001 and 1000"),
        ({"extra_level": "cnov"}, "extra_level='cnov' is unknown; did you mean conv"),
        (
            {"rpn_negative_iou": 0.8},
            "rpn_negative_iou=0.8 must not exceed rpn_positive_iou=0.7; for example rpn_negative_iou=0.3",
        ),
        ({"detection_candidates": 5}, "detection_candidates=5 must be at least detections=6; .* detection_candidates=120"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_backbone_must_halve_its_maps():
    stages = models.stages("resnet50", stage_sizes=(1, 1, 1, 1))
    flat = [*stages[:3], [dataclasses.replace(stages[3][0], stride=1)]]
    with pytest.raises(ValueError, match=r"stages have strides \[1, 2, 2, 1\]; each after the first must have 2"):
        detector.init(MaskRCNN(models.create("resnet50", stages=flat).backbone), jax.random.key(0))


def test_paste():
    """A mask of 2 x 2 in a box of 4 x 4 px: the edge between its pixels is in the middle of the box."""
    left = paste(np.array([[1, 0], [1, 0]]), np.array([2, 1, 6, 5]), 8, 7)
    expected = np.zeros((8, 7), bool)
    expected[2:6, 1:3] = True
    np.testing.assert_array_equal(left, expected)
    assert paste(np.ones((28, 28)), np.array([-5.0, -5, 100, 3]), 6, 9).sum() == 6 * 3  # beyond the image
    assert not paste(np.ones((28, 28)), np.array([3, 3, 3, 9]), 6, 9).any()
    fine = paste(np.full((2, 2), 0.6), np.array([1.0, 1, 3, 3]), 4, 4, threshold=0.55)
    assert fine.sum() == 4
