"""Every recipe loads, validates and, shrunk, has a loss and gradients; every rule between knobs has its message."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet_jax import config as config_lib
from halonet_jax import data, models, tasks
from halonet_jax.costs import floors
from halonet_jax.models import timm, variants
from halonet_jax.training import optimizer

EVERY = sorted(path.stem for path in (Path(__file__).parent.parent / "configs").glob("*.py"))

DETECTORS = [name for name in EVERY if name.startswith("coco") or "mask_rcnn" in name]  # tests/tasks/test_detection.py runs one
RECIPES = [name for name in EVERY if name not in DETECTORS]
# One of each stem, kind of block and way of training. The others are traced, not compiled: they differ in sizes.
RUN = ("finetune", "h1", "h4_base128_patch4", "h7_conv12", "resnet50_se_halo")


def load(name, argument=""):
    recipe = Path(__file__).parent.parent / "configs" / "any.py"
    config = config_lib.sibling(recipe, name)
    return config_lib.with_argument(config, argument)


def test_every_model_of_the_paper_has_a_recipe():
    shared = {"resnet50_se", "resnet101_se", "resnet101_se_halo"}  # resnet50_se_halo's
    assert set(models.names()) - set(timm.MODELS) - shared <= set(RECIPES)
    text = (Path(__file__).parent.parent / "configs" / "resnet50_se_halo.py").read_text()
    assert all(name in text for name in shared)


@pytest.mark.parametrize("name", EVERY)
def test_recipe(name):
    config = load(name)
    config.data.dir = config.data.dir or "DIR"  # what the user gives
    config_lib.validate(config, device_count=512 if config.batch_size >= 512 else 1)
    assert config_lib.differences(config, config_lib.from_json(config_lib.to_json(config))) == []
    assert floors.IMAGE_SIZES.get(name, config.data.image_size) == config.data.image_size
    assert f"configs/{name}.py" in (Path(__file__).parent.parent / "configs" / f"{name}.py").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_smoke_recipe_forward_and_backward(name):
    config = load(name, "smoke")
    config_lib.validate(config, device_count=4)
    task = tasks.make_task(config, tasks.find(config).expected_metadata(config))
    draw = lambda x: jnp.asarray(np.random.default_rng(0).standard_normal(x.shape) * x.size**-0.25, x.dtype)
    params, model_state = jax.tree.map(draw, jax.eval_shape(task.init, jax.random.key(0)))
    source = data.open_source(config.data, "train")
    with data.train_batches(source, task.transform(True), config.data, batch_size=4, seed=0) as batches:
        batch = next(batches)
    gradient = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    shapes = jax.eval_shape(gradient, params, model_state, batch, jax.random.key(0))
    assert shapes[0][0].shape == () and all(g.shape == p.shape for g, p in zip(*map(jax.tree.leaves, (shapes[1], params))))
    if name not in RUN:
        return
    (loss, _), gradients = gradient(params, model_state, batch, jax.random.key(0))
    assert np.isfinite(loss) and all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(gradients))


# The parts' parameters are worked out in tests/detection/test_mask_rcnn.py, the backbones' in tests/models/test_models.py.
PARAMETERS = {
    "coco_r50": 44_992_053, "coco_r50_se": 50_038_933, "coco_r50_se_halo": 45_321_349, "coco_r50_se_halo_b32": 45_323_653,
    "coco_r101_se": 73_507_093, "coco_r101_se_halo": 68_789_509, "coco_r50_lsj": 46_305_589, "coco_r101_lsj": 65_297_717,
    "digit_scenes_mask_rcnn": 421_077,
}  # fmt: skip


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_have_their_shapes(name):
    """They take too long to compile to run each."""
    for config, most in (load(name), PARAMETERS[name]), (load(name, "smoke"), 10**6):
        config_lib.validate(config, device_count=4)
        task = tasks.make_task(config, tasks.find(config).expected_metadata(config))
        shapes = jax.eval_shape(task.init, jax.random.key(0))[0]
        assert set(shapes) == {"backbone", "fpn", "rpn_head", "box_head", "mask_head"}
        count = sum(x.size for x in jax.tree.leaves(shapes))
        assert count == most or count < most == 10**6
    with pytest.raises(config_lib.ConfigError, match="':tiny' and ':small' shrink recipes of task='classification'"):
        load(name, "tiny")


@pytest.mark.parametrize("name, start, first, second, last", [
    ("coco_r50_se_halo", 2 / 300, 60_000, 65_000, 67_500), ("coco_r101_lsj", 0.0067, 163_889, 177_546, 184_375),
])  # fmt: skip
def test_steps_of_the_detectors(name, start, first, second, last):
    config = load(name)
    per_epoch = 117_266 / config.batch_size
    assert [round(epoch * per_epoch) for epoch in (config.num_epochs, config.schedule.warmup_epochs)] == [last, 500]
    schedule = optimizer.make_schedule(config, last, per_epoch)
    np.testing.assert_allclose([schedule(step) for step in (0, 250, 500, first - 1, first, second - 1, second)],
                               [start, (start + 0.1) / 2, 0.1, 0.1, 0.01, 0.01, 0.001], rtol=1e-5)  # fmt: skip


@pytest.mark.parametrize("argument, divisor", [("tiny", 4), ("small", 2)])
@pytest.mark.parametrize("name", RECIPES)
def test_shrunk_recipes_keep_their_shape(name, argument, divisor):
    whole, config = load(name), load(name, argument)
    config_lib.validate(config, device_count=1)
    options = {key: value for key, value in config_lib.model_options(whole).items() if key in variants.DEFAULTS}
    v, m = variants.resolve(whole.model.name, **options), config.model
    for key in ("base_width", "stem_width", "final_width"):
        assert m[key] == v[key] / divisor
    assert all(heads == max(1, given // divisor) for heads, given in zip(m.num_heads, v["num_heads"]))
    assert all(abs(depth - given / 3) <= 0.5 or depth == 1 for depth, given in zip(m.stage_sizes, v["stage_sizes"]))
    assert abs(2 * m.block_size - v["block_size"]) <= 1 and 0 <= 2 * m.halo_size - v["halo_size"] <= 1
    assert config.data.image_size == (whole.data.image_size // 4 if argument == "tiny" else 128)
    layers = 0 if argument == "tiny" else whole.data.randaugment_layers
    assert config.data.source == "digit_scenes" and config.data.randaugment_layers == layers
    assert config.label_smoothing == whole.label_smoothing
    for key in ("name", "stochastic_depth_rate", "value_ratio", "expansion_ratio", "stem", "scan"):
        assert m[key] == whole.model[key]


BAD = (
    ("batch_size", 100, 8, "batch_size=100 does not divide over 8 devices; use 96 or 104"),
    ("eval_batch_size", 30, 4, "eval_batch_size=30 does not divide over 4 devices; use 28 or 32"),
    ("optimizer.accumulation_steps", 3, 1, "batch_size=4096 does not divide into optimizer.accumulation_steps=3"),
    ("model.bn_group_size", 48, 1, "model.bn_group_size=48 does not divide the 4096 images"),
    ("mesh.fsdp", 3, 8, r"mesh.fsdp=3 does not divide 8 devices; use one of \[1, 2, 4, 8\]"),
    ("model.name", "h8", 1, "model.name='h8' is unknown; use one of h0"),
    ("model.dtype", "float16", 1, "model.dtype='float16' is unknown; did you mean 'bfloat16'"),
    ("model.base_width", 4, 1, "stage 1 is 4 wide"),
    ("optimizer.name", "adam", 1, "did you mean 'adamw'"),
    ("data.source", "imagenet", 1, "use one of tfds, folder, digits"),
    ("optimizer.name", "lamb", 1, "set --config.model.scan=False"),
    ("data.source", "coco", 1, "has boxes, not classes of images; set --config.task=detection, or --config.data.source=folder"),
    ("task", "detection", 1, "data.source='tfds' has no boxes, which task='detection' needs; set --config.data.source=coco or"),
    ("model.stem", "pacth", 1, "stem='pacth' is unknown"),
    ("model.stage_kinds", ("conv", "conv", "conv", "atention"), 1, "'atention' is unknown; did you mean attention"),
    ("data.image_size", 10**9, 1, "8 and 8192, or a tuple .height, width. of two; for example --config.data.image_size=256"),
    ("schedule.warmup_epochs", 400.0, 1, "schedule.warmup_epochs=400.0 must be between 0 and num_epochs=350.0"),
    ("num_epochs", 0.0, 1, "num_epochs=0 trains nothing"),
)


@pytest.mark.parametrize("key, value, devices, message", BAD, ids=[f"{key}={value}" for key, value, *_ in BAD])
def test_validation_names_value_rule_and_remedy(key, value, devices, message):
    config = config_lib.imagenet()
    config.model.scan = True
    config.update_from_flattened_dict({key: value})
    with pytest.raises(config_lib.ConfigError, match=message):
        config_lib.validate(config, devices)


def test_models_that_list_their_blocks_are_not_shrunk():
    config = config_lib.imagenet()
    config.model.name = timm_name = next(iter(timm.MODELS))
    with pytest.raises(config_lib.ConfigError, match=f"model.name='{timm_name}' lists its blocks and cannot be shrunk"):
        config_lib.with_argument(config, "tiny")


def test_unknown_keys_and_recipes_fail():
    with pytest.raises(AttributeError, match="Did you mean.*learning_rate"):
        config_lib.imagenet().schedule.learning_rat = 0.1
    with pytest.raises(config_lib.ConfigError, match="'smok' is unknown"):
        config_lib.with_argument(config_lib.imagenet(), "smok")
    with pytest.raises(config_lib.ConfigError, match="recipe 'h4_base182' is not in .*; did you mean 'h4_base128'"):
        load("h4_base182")


@pytest.mark.parametrize("batch_size, steps, group, eval_batch_size, parts", [
    (4096, 1, 64, 0, 64), (4096, 8, 64, 0, 8), (64, 1, 0, 0, 1), (64, 1, 16, 6, 2), (100, 1, 64, 0, 1), (0, 0, -1, 0, 1),
])  # fmt: skip
def test_parts_of_a_batch_that_share_no_statistics(batch_size, steps, group, eval_batch_size, parts):
    config = config_lib.imagenet()
    config.batch_size, config.optimizer.accumulation_steps, config.eval_batch_size = batch_size, steps, eval_batch_size
    config.model.bn_group_size = group
    assert config_lib.independent_parts(config) == parts
