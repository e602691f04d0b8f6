"""Starting from other weights: what is taken, resized and re-made, what stays frozen, and rates by depth."""

import fnmatch
import functools
import shutil

import cv2
import jax
import numpy as np
import pytest
from sklearn import datasets

from halonet_jax import config as config_lib
from halonet_jax import models, train, weights
from halonet_jax.detection import DETECTRON2, MaskRCNN
from halonet_jax.detection import model as detector
from halonet_jax.models import freezing
from halonet_jax.tasks import adapting
from halonet_jax.training import optimizer

SMALL = dict(base_width=8, stem_width=8, stage_sizes=(1, 1, 3, 1), num_heads=(1, 1, 1, 1), block_size=4, halo_size=1)


def small(num_classes=3, **change):
    return models.create("h1", num_classes=num_classes, **SMALL | change)


def variables_of(model, seed=0):
    found = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 32, 32, 3)), train=False))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.uniform(0.1, 1, x.shape).astype(x.dtype), found)


def named(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in found}


@pytest.mark.parametrize("scan", [(False, False), (True, False), (False, True)], ids=("plain", "unstacked", "stacked"))
def test_classes_are_kept_by_name_and_tables_interpolated(scan):
    source, target = small(3, scan=scan[0]), small(4, scan=scan[1], block_size=6, halo_size=2)
    old = variables_of(source)
    new, rows = adapting.adapt(old, source, target, ["ant", "bee", "cat"], ["cat", "dog", "ant", "eel"], 32)
    before, after = named(old), named(new)
    wanted = named(variables_of(target))
    assert {k: x.shape for k, x in after.items()} == {k: x.shape for k, x in wanted.items()}
    kernel, other = after["params/classifier/kernel"], before["params/classifier/kernel"]
    np.testing.assert_array_equal(kernel[:, [0, 2]], other[:, [2, 0]])
    assert not kernel[:, [1, 3]].any()
    name = "params/backbone/stage1_block1/attention/rel_rows"
    column = np.interp(np.linspace(0, 8, 15), np.arange(9), before[name][:, 0])
    np.testing.assert_allclose(after[name][:, 0], column, rtol=1e-6)
    np.testing.assert_array_equal(after["params/backbone/stem_conv/kernel"], before["params/backbone/stem_conv/kernel"])
    assert [how for _, how in rows][-1].startswith("2 of 4 classes kept by name")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"base_width": 16}, r"is \(8,\) in the weights to start from and \(16,\) by the config"),
        ({"stage_sizes": (1, 2, 3, 1)}, "backbone/stage2_block2 is absent from the weights to start from"),
        ({"stage_sizes": (1, 1, 2, 1)}, "backbone/stage3_block3 is only in the weights to start from"),
        (
            {"stage_kinds": ("conv",) + ("attention",) * 3},
            r"stage1_block1/attention/key/kernel is \(8, 8\) in the weights to start from and absent by the config",
        ),
        ({"positions": "absolute"}, "attention/abs_cols is absent in the weights to start from and there by the config"),
        ({"positions": "none"}, "attention/rel_cols is there in the weights to start from and absent by the config"),
    ],
)
def test_another_model_is_named(change, message):
    source = small()
    with pytest.raises(ValueError, match=message):
        adapting.adapt(variables_of(source), source, small(**change), ["a", "b", "c"], ["a", "b", "c"], 32)


def test_absolute_tables_are_interpolated_to_the_new_image_size():
    source, target = small(positions="absolute"), small(positions="absolute", scan=True)
    old = variables_of(source)
    new, rows = adapting.adapt(old, source, target, ["a", "b", "c"], ["a", "b", "c"], 48)
    wanted = jax.eval_shape(lambda: target.init(jax.random.key(0), np.zeros((1, 48, 48, 3)), train=False))
    assert jax.tree.map(np.shape, new) == jax.tree.map(np.shape, wanted)
    assert ("12 absolute tables", "interpolated to the new image size") in rows


@pytest.mark.parametrize("scan", [False, True])
def test_distances_count_blocks_from_the_top(scan):
    params = variables_of(small(scan=scan))["params"]
    distances = named(freezing.distances_from_top(params))
    assert distances["classifier/kernel"] == 0 and distances["backbone/stem_conv/kernel"] == 7
    assert distances["backbone/stage4_block1/conv1/kernel"] == 1 and distances["backbone/stage1_block1/conv1/kernel"] == 6
    third = [distances[f"backbone/stage3_block{n}/conv1/kernel"] for n in (1, 2, 3)] if not scan else [4]
    third += distances["backbone/stage3_blocks/conv1/kernel"].ravel().tolist() if scan else []
    assert third == [4, 3, 2]
    jax.tree.map(lambda x, d: np.broadcast_shapes(x.shape, np.shape(d)), params, freezing.distances_from_top(params))


def test_milestones():
    config = config_lib.imagenet()
    config.batch_size = config.schedule.learning_rate_batch_size = 10
    config.schedule.update(dict(milestones=(3.0, 5.0), warmup_epochs=1.0, learning_rate=1.0))
    rates = [float(optimizer.make_schedule(config, 80, 10.0)(step)) for step in (0, 5, 10, 29, 31, 49, 51, 79)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-5)


@pytest.mark.parametrize("milestones", [(), (3.0,)])
def test_warm_up_starts_at_a_share_of_the_peak(milestones):
    config = config_lib.imagenet()
    config.schedule.update(dict(milestones=milestones, warmup_epochs=1.0))
    peak = 0.1 * 4096 / 256
    for factor, expected in ((0.0, (0, 0.5, 1)), (0.2, (0.2, 0.6, 1)), (1.0, (1, 1, 1))):
        config.schedule.warmup_start_factor = factor
        schedule = optimizer.make_schedule(config, 80, 10.0)
        np.testing.assert_allclose([schedule(step) for step in (0, 5, 10)], np.multiply(expected, peak), rtol=1e-6)


# --- runs


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Folders of scanned digits: `low` has 0 to 2, `high` has 2 to 4."""
    folder, found = tmp_path_factory.mktemp("scans"), datasets.load_digits()
    for name, classes in (("low", (0, 1, 2)), ("high", (2, 3, 4))):
        for number in classes:
            images = found.images[found.target == number][:24]
            for n, image in enumerate(images):
                path = folder / name / ("val" if n % 3 == 0 else "train") / str(number) / f"{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), np.uint8(image * 15).repeat(2, 0).repeat(2, 1))
    return folder


def run(scans, workdir, name, **options):
    config = config_lib.digits()
    config.batch_size = config.eval_batch_size = 16
    config.max_steps, config.num_epochs, config.tensorboard, config.ema_decay = 4, 10.0, False, 0.0
    config.schedule.warmup_epochs, config.schedule.learning_rate, config.log_every_steps = 0.0, 0.5, 2
    config.data.update(dict(source="folder", dir=str(scans / name), eval_split="val", image_size=16))
    config.model.name = "h1"
    config.model.update(SMALL | dict(stage_sizes=(1, 1, 1, 1)))
    config.update_from_flattened_dict(options)
    return train.train(config, str(workdir))


def test_a_run_starts_from_another_and_a_resumed_one_from_itself(scans, tmp_path, capsys):
    first = run(scans, tmp_path / "first", "low")
    freeze = ("backbone/stem*", "backbone/stage1_*")
    options = {"init_from": str(tmp_path / "first"), "model.freeze": freeze, "optimizer.layer_decay": 0.5, "ema_decay": 0.5}
    run(scans, tmp_path / "second", "high", **options)
    printed = capsys.readouterr().out
    assert f"starting from {tmp_path}/first, step 4, raw weights:" in printed and "1 of 3 classes kept by name" in printed
    old, new = (named(weights.load(str(tmp_path / n), weights="raw").variables) for n in ("first", "second"))
    assert first.step == 4
    for name in old:
        is_frozen = any(fnmatch.fnmatchcase(name.partition("/")[2], pattern) for pattern in freeze)
        if is_frozen or name.endswith("/conv3/kernel"):  # a gradient may vanish elsewhere, as in attention to one pixel
            assert np.array_equal(old[name], new[name]) == is_frozen, name
    shutil.rmtree(tmp_path / "first")
    options |= {"max_steps": 6, "init_from": "", "model.bn_frozen": True}
    assert run(scans, tmp_path / "second", "high", **options).step == 6
    assert "starting from" not in capsys.readouterr().out
    last = named(weights.load(str(tmp_path / "second"), weights="raw").variables)
    kernel = "params/backbone/stage4_block1/conv3/kernel"
    assert not np.array_equal(last[kernel], new[kernel])
    norms = [name for name in last if "norm" in name]
    assert len(norms) > 40 and all(np.array_equal(last[name], new[name]) for name in norms)
    assert any(not np.array_equal(old[name], new[name]) for name in norms)


@pytest.mark.parametrize(
    "name, options", [("h4", {}), ("h4", {"scan": True}), ("lamhalobotnet50ts_256", {}), ("resnet50_se", {})]
)
def test_frozen_norms_are_all_norms_of_a_classifier(name, options):
    shapes = jax.eval_shape(
        lambda: models.create(name, **options).init(jax.random.key(0), np.zeros((1, 64, 64, 3)), train=False)
    )
    frozen = {key for key, value in named(freezing.frozen(shapes["params"], freezing.NORMS)).items() if value}
    stats = jax.tree.map(lambda x: 0, shapes["batch_stats"])
    folders = {key.rpartition("/")[0] for key in named(stats)}
    assert frozen == {f"{folder}/{part}" for folder in folders for part in ("scale", "bias")}


def test_norms_of_pyramid_and_heads_are_not_frozen():
    model = MaskRCNN(small().backbone, DETECTRON2)
    params, _ = jax.eval_shape(functools.partial(detector.init, model), jax.random.key(0))
    frozen = named(freezing.frozen(params, freezing.NORMS))
    assert {key.partition("/")[0] for key, value in frozen.items() if value} == {"backbone"}
    assert not frozen["fpn/lateral2_norm/scale"] and not frozen["mask_head/conv1_norm/bias"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"init_from": "/nowhere"}, "init_from='/nowhere': .*holds no config.json"),
        ({"model.bn_frozen": True}, "init_from='' starts at random; set --config.init_from, or --config.model.bn_frozen=False"),
        ({"model.freeze": ("stem*",)}, r"model.freeze has 'stem\*', which matches no parameter"),
        ({"schedule.milestones": (0.5,), "schedule.warmup_epochs": 1.0}, "begins within the warm-up of 1.0 epochs"),
    ],
)
def test_mistakes(scans, tmp_path, options, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        run(scans, tmp_path, "low", **options)
