"""Detection as a task: the digit scenes' recipe, shrunk, through the real loop; and what it refuses in one line."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import small_detector
import toy_coco

from halonet_jax import attention_maps, data, models, predict, tasks, train, weights
from halonet_jax import config as config_lib
from halonet_jax.detection import Found
from halonet_jax.errors import ConfigError, DataError
from halonet_jax.tasks import detection
from halonet_jax.training.evaluation import SumEvaluator

ROOT = Path(__file__).parent.parent.parent
PICTURE = str(ROOT / "docs" / "demo.png")


def recipe():
    config = config_lib.sibling(ROOT / "configs" / "any.py", "digit_scenes_mask_rcnn")
    return config_lib.with_argument(config, "smoke")


def make_task(config, classes=10):
    return tasks.make_task(config, {"class_names": [str(n) for n in range(classes)], "preprocessing": {}})


def test_trains_and_evaluates_and_predicts(tmp_path, monkeypatch):
    monkeypatch.setattr(detection, "make_model", small_detector.make_model)
    config, workdir = recipe(), tmp_path / "run"
    config.data.image_size = config.data.scene_size = 48
    config.model.bn_group_size, config.tensorboard = 1, False
    config.detection.mask_convs, config.detection.box_dense = 0, (8,)
    result = train.train(config, str(workdir))
    assert result.exit_code == 0 and result.metrics["eval/count"] == 8
    assert {"eval/box_ap", "eval/mask_ap", "eval/box_ap_small"} <= set(result.metrics)
    reports = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {f"train/{name}" for name in ("loss", "rpn_score", "rpn_box", "class", "box", "mask")}
    assert sum(losses <= set(report) and np.isfinite([report[key] for key in losses]).all() for report in reports) == 2
    loaded, image = weights.load(str(workdir)), np.zeros((1, 48, 48, 3), np.uint8)
    (found,) = predict.predict(loaded, [PICTURE])
    assert found.file == PICTURE and min(found.height, found.width) > 48 and not found.error
    for error, message, call in (
        (ConfigError, "logits are of classifiers", lambda: loaded.logits(image)),
        (ConfigError, "features are of classifiers", lambda: loaded.features(image)),
        (ConfigError, "attention maps need .* a MaskRCNN", lambda: attention_maps.Capture(loaded)),
    ):
        with pytest.raises(error, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("source", ("digit_scenes", "coco"))
def test_perfect_detections_have_ap_1(source, tmp_path):
    """Labels from 0, classes from 1, boxes in pixels of the input, masks as bytes: the ways out and in agree."""
    config, split = recipe(), "test"
    config.data.image_size = 96  # the scenes have 64
    if source == "coco":
        config.data.source, config.data.dir, split = "coco", str(toy_coco.write(tmp_path)), "val2017"
        config.data.train_split, config.data.eval_split = "train2017", "val2017"
    source = tasks.find(config).open_source(config, split)
    task = tasks.make_task(config, tasks.find(config).metadata(config, source))
    evaluator = task.evaluator(source)
    training = data.DetectionTransform(config.data, num_classes=source.num_classes, training=True)
    with data.eval_batches(source, task.transform(False), config.data, batch_size=3) as batches:
        for batch in batches:
            masks = np.stack([training(source[int(index)], None)["masks"] for index in batch["index"]]).astype(np.float32)
            found = Found(batch["boxes"], np.ones((3, 5)), batch["labels"] + 1, batch["valid"], masks)
            evaluator.add(jax.device_get(task.metrics(found, batch)))
    result = evaluator.result()
    assert result["count"] == len(source) and result["box_ap"] > 0.99 and result["mask_ap"] > 0.9
    assert {row["class"] for row in evaluator.per_class()} == set(task.metadata["class_names"])


def test_starts_from_a_classifiers_backbone():
    config = recipe()
    options = config_lib.model_options(config)
    classifier = models.create(num_classes=3, **options)
    abstract = jax.eval_shape(lambda: classifier.init(jax.random.key(0), np.zeros((1, 64, 64, 3)), train=False))
    variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), abstract)
    found, rows = make_task(config).adapt(variables, classifier, {"class_names": ["a", "b", "c"]})
    shapes = jax.eval_shape(make_task(config).init, jax.random.key(0))
    for tree, ours in zip((found["params"], found["batch_stats"]), shapes):
        assert set(tree) == {"backbone"}
        assert jax.tree.map(np.shape, tree["backbone"]) == jax.tree.map(np.shape, ours["backbone"])
    assert rows[-1] == ("pyramid and heads", "start at random")
    with pytest.raises(ValueError, match="it has no backbone"):
        make_task(config).adapt({}, None, {})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data.image_size": (64, 96)}, "must be one side, of a square, .* --config.data.image_size=96"),
        ({"data.source": "folder"}, "data.source='folder' has no boxes.*--config.data.source=coco or digit_scenes"),
        ({"data.source": "coco"}, "data.dir '' is no folder; set --config.data.dir"),
        ({"data.source": "coco", "data.classes": ("cat",)}, "data.classes=.* does not work with data.source=coco"),
    ],
)
def test_data_without_boxes_is_refused(change, message):
    config = recipe()
    config.update_from_flattened_dict(change)
    with pytest.raises((ConfigError, DataError), match=message) as raised:
        config_lib.validate(config, 1)
        tasks.find(config).open_source(config, "test")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.positions": "absolute"}, "set --config.model.positions=relative"),
        ({"model.freeze": ("backbone/stem9*",)}, "matches no parameter"),
    ],
)
def test_models_that_do_not_detect_are_refused(change, message):
    config = recipe()
    config.update_from_flattened_dict(change)
    with pytest.raises(ConfigError, match=message):
        make_task(config)


@pytest.mark.parametrize("recipe_name", ("paper", "detectron2"))
def test_knobs_reach_the_detector(recipe_name):
    config = config_lib.imagenet()
    config.detection.recipe = recipe_name
    assert detection.make_spec(config, 80).width == 256
    config.detection.width, config.detection.candidates = 8, 30
    spec = detection.make_spec(config, 7)
    assert (spec.width, spec.candidates, spec.candidates_test, spec.num_classes) == (8, 30, 15, 8)
    assert (spec.norms == "all") == (recipe_name == "detectron2")


def test_other_tasks_ignore_the_source():
    assert isinstance(tasks.make_task(config_lib.digits(), {"class_names": ["a"]}).evaluator(None), SumEvaluator)
