"""Detection and instance segmentation with Mask R-CNN on any backbone of `models.create` (arXiv 2103.12731, section 4).

Labels of the data run from 0. The model's classes run from 1: class 0 is the background.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from halonet_jax import config as config_lib
from halonet_jax import data, detection, models
from halonet_jax.data import masks
from halonet_jax.detection import model as detector
from halonet_jax.errors import ConfigError
from halonet_jax.models import freezing
from halonet_jax.tasks import adapting, frozen, mixing
from halonet_jax.tasks.coco_metrics import CocoEvaluator
from halonet_jax.training.task import Task

_RECIPES = {"paper": detection.PAPER, "detectron2": detection.DETECTRON2}
_NUM_CLASSES = {"coco": 80, "digit_scenes": 10}  # for compile checks


def open_source(config: ml_collections.ConfigDict, split: str, **options) -> data.Source:
    """Opens one split of the configured data.

    Args:
        config: the whole config.
        split: name of the split, such as "train2017".
        **options: further arguments of `halonet_jax.data.open_source`.

    Returns:
        A source of the records of `halonet_jax.data.annotations`, with `annotations` of the whole split.

    Raises:
        ConfigError: the source has no boxes.
        DataError: the data cannot be used, or pycocotools is not installed.
    """
    config_lib.check_detection_data(config)
    masks.codec()  # now, not at the first evaluation
    source = data.open_source(config.data, split, **options)
    return data.SceneObjects(source) if isinstance(source, data.DigitScenes) else source


def metadata(config: ml_collections.ConfigDict, source: data.Source) -> dict:
    """Returns the class names of a source, and how evaluation prepares an image.

    Args:
        config: the whole config.
        source: a split of the data.

    Returns:
        JSON values: `class_names` (list of strings, in the order of the labels) and `preprocessing`.
    """
    return {"class_names": list(source.class_names), "preprocessing": _preprocessing(config)}


def expected_metadata(config: ml_collections.ConfigDict) -> dict:
    """Returns metadata with numbers for class names. It needs no data and serves compile checks.

    Args:
        config: the whole config.

    Returns:
        As `metadata`.
    """
    classes = range(len(set(config.data.classes)) or _NUM_CLASSES.get(config.data.source, 80))
    return {"class_names": [str(n) for n in classes], "preprocessing": _preprocessing(config)}


def _preprocessing(config):
    d = config.data
    return {
        "image_size": d.image_size, "resize": "the longer side to image_size, area averages or bilinear",
        "padding": "mean colour, bottom and right", "mean": list(d.mean), "std": list(d.std),
    }  # fmt: skip


def make_spec(config: ml_collections.ConfigDict, num_classes: int) -> detection.DetectionSpec:
    """Returns the detector's settings: those of the recipe, with what the config sets.

    Args:
        config: the whole config; its `detection` section is read.
        num_classes: of objects, without the background.

    Raises:
        ConfigError: a setting is out of range.
    """
    changes = {key: value for key, value in config.detection.items() if key != "recipe" and value is not None}
    if "candidates" in changes:
        changes["candidates_test"] = max(1, changes["candidates"] // 2)
    try:
        return dataclasses.replace(_RECIPES[config.detection.recipe], num_classes=num_classes + 1, **changes)
    except ValueError as error:
        raise ConfigError(f"config.detection: {error}") from None


def make_model(config: ml_collections.ConfigDict, num_classes: int) -> detection.MaskRCNN:
    """Returns the config's model.

    Args:
        config: the whole config.
        num_classes: of objects, without the background.

    Raises:
        ConfigError: the backbone makes no pyramid, or a setting is out of range.
    """
    backbone = models.create(num_classes=1, **config_lib.model_options(config)).backbone
    model = detection.MaskRCNN(backbone, make_spec(config, num_classes))
    try:
        model.strides  # noqa: B018 (it checks)
    except ValueError as error:
        raise ConfigError(f"model.name={config.model.name!r} is no backbone for detection: {error}") from None
    if any(block.positions == "absolute" for stage in backbone.stages for block in stage):
        raise ConfigError(
            "model.positions='absolute' ties a model to one image size, and a detector takes any; set "
            "--config.model.positions=relative"
        )
    return model


def make_task(config: ml_collections.ConfigDict, metadata: dict) -> Task:
    """Returns the detection task of a config.

    Batches hold the fields of `DetectionTransform`. Normalisation runs on the device. Evaluation gives detections of
    fixed size, which a `CocoEvaluator` compares with the annotations of the source.

    Args:
        config: the whole config.
        metadata: as `metadata` returns it. The number of class names is that of the objects' classes.
    """
    num_classes, data_config = len(metadata["class_names"]), config.data
    model = make_model(config, num_classes)

    def normalize(images):
        return mixing.normalize(images, data_config.mean, data_config.std, jnp.dtype(config.model.dtype))

    def normalized(batch):
        return {"image": normalize(batch["image"]), "size": batch["image_size"]}

    def init(rng):
        return detector.init(model, rng)

    def loss(params, model_state, batch, rng):
        objects = {key: batch[key] for key in ("boxes", "valid", "masks")} | {"classes": batch["labels"] + 1}
        return detector.losses(model, params, model_state, normalized(batch) | objects, rng)

    def predict(params, model_state, batch):
        return detector.detect(model, params, model_state, normalized(batch))

    def transform(training):
        return data.DetectionTransform(data_config, num_classes=num_classes, training=training)

    def describe():
        classifier = models.create(num_classes=1, **config_lib.model_options(config))
        height, width = data.height_and_width(data_config.image_size)
        return classifier.describe(config.batch_size // config.optimizer.accumulation_steps, height, width)

    def adapt(variables, other_model, other_metadata):
        if not hasattr(other_model, "backbone"):
            raise ValueError("it has no backbone; give a model that halonet_jax trained")
        found, rows = adapting.adapt_backbone(variables, other_model.backbone, model.backbone, data_config.image_size)
        return found, [*rows, ("pyramid and heads", "start at random")]

    return Task(
        init, loss, predict, metrics, evaluator=lambda source: CocoEvaluator(source.annotations), primary_metric="box_ap",
        transform=transform, metadata=metadata, describe=describe, model=model, normalize=normalize,
        frozen=frozen.rule(config, init), distances=freezing.distances_from_top, adapt=adapt,
    )  # fmt: skip


def metrics(found: detection.Found, batch: dict[str, jax.Array]) -> dict[str, Any]:
    """Returns what a `CocoEvaluator` takes.

    Args:
        found: detections of a batch.
        batch: an evaluation batch.
    """
    return {
        **{key: batch[key] for key in ("index", "mask", "scale")}, "boxes": found.boxes, "scores": found.scores,
        "classes": found.classes - 1, "valid": found.valid,
        "masks": jnp.round(255 * found.masks).astype(jnp.uint8),  # a quarter of the bytes for the way to the host
    }  # fmt: skip
