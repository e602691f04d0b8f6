"""Image classification with label smoothing, mixup and CutMix."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import optax

from halonet_jax import config as config_lib
from halonet_jax import data, models
from halonet_jax.models import freezing
from halonet_jax.tasks import adapting, frozen, mixing, scoring
from halonet_jax.training.task import Task

# For compile checks. Other sources count as ImageNet.
_NUM_CLASSES = {"imagenet2012": 1000, "digits": 10, "digit_scenes": 10}


def open_source(config: ml_collections.ConfigDict, split: str, **options) -> data.Source:
    """Opens one split of the configured data.

    Args:
        config: the whole config.
        split: name of the split, such as "train".
        **options: further arguments of `halonet_jax.data.open_source`.

    Raises:
        DataError: the data cannot be used, or RandAugment does not know an operation of `config.data.randaugment_ops`.
    """
    data.randaugment.check_ops(config.data.randaugment_ops)
    return data.open_source(config.data, split, **options)


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
    name = config.data.name if config.data.source == "tfds" else config.data.source
    classes = range(len(set(config.data.classes)) or _NUM_CLASSES.get(name, 1000))
    return {"class_names": [str(n) for n in classes], "preprocessing": _preprocessing(config)}


# In words, for those who use the model elsewhere.
_INTERPOLATIONS = {"area_bicubic": "area, then bicubic", "bicubic": "antialiased bicubic of the image, then crop"}


def _preprocessing(config):
    d = config.data
    size = list(d.image_size) if isinstance(d.image_size, tuple) else d.image_size  # as JSON gives it back
    return {
        "image_size": size, "eval_crop": d.eval_crop, "interpolation": _INTERPOLATIONS[d.interpolation],
        "mean": list(d.mean), "std": list(d.std),
    }  # fmt: skip


def make_model(config: ml_collections.ConfigDict, num_classes: int) -> models.HaloNet:
    """Returns the config's model.

    Args:
        config: the whole config.
        num_classes: width of the classifier.
    """
    return models.create(num_classes=num_classes, **config_lib.model_options(config))


def make_task(config: ml_collections.ConfigDict, metadata: dict) -> Task:
    """Returns the classification task of a config.

    Batches hold uint8 `image` `[B, H, W, 3]` and int32 `label` `[B]`. Normalisation, mixup and CutMix run on the
    device. `scoring.make_metrics` says what evaluation sums; `scored` makes it count in another way.

    Args:
        config: the whole config.
        metadata: as `metadata` returns it. The number of class names is the width of the classifier.
    """
    num_classes, data_config = len(metadata["class_names"]), config.data
    model = make_model(config, num_classes)
    height, width = data.height_and_width(data_config.image_size)

    def normalize(images):
        return mixing.normalize(images, data_config.mean, data_config.std, jnp.dtype(config.model.dtype))

    def init(rng):
        variables = model.init(rng, jnp.zeros((1, height, width, 3)), train=False)
        return variables["params"], variables.get("batch_stats", {})

    def loss(params, model_state, batch, rng):
        mix_rng, dropout_rng = jax.random.split(rng)
        images, labels = normalize(batch["image"]), jax.nn.one_hot(batch["label"], num_classes)
        labels = optax.smooth_labels(labels, config.label_smoothing)
        images, labels = mixing.mix(mix_rng, images, labels, data_config.mixup_alpha, data_config.cutmix_alpha)
        variables = {"params": freezing.stop_gradients(params, config_lib.frozen_patterns(config)), "batch_stats": model_state}
        logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": dropout_rng})
        top1 = (logits.argmax(-1) == batch["label"]).mean(dtype=jnp.float32)
        return optax.softmax_cross_entropy(logits, labels).mean(), (updates["batch_stats"], {"top1": top1})

    def predict(params, model_state, batch):
        return model.apply({"params": params, "batch_stats": model_state}, normalize(batch["image"]), train=False)

    def transform(training):
        return data.ClassificationTransform(data_config, num_classes=num_classes, training=training)

    def describe():
        return model.describe(config.batch_size // config.optimizer.accumulation_steps, height, width)

    def adapt(variables, other_model, other_metadata):
        classes = other_metadata["class_names"], metadata["class_names"]
        return adapting.adapt(variables, other_model, model, *classes, data_config.image_size)

    return Task(
        init, loss, predict, scoring.make_metrics(num_classes), primary_metric="top1", transform=transform,
        metadata=metadata, describe=describe, model=model, normalize=normalize, distances=freezing.distances_from_top, adapt=adapt,
        frozen=frozen.rule(config, init),
    )  # fmt: skip


def scored(task: Task, config: ml_collections.ConfigDict, how: scoring.Scoring) -> Task:
    """Returns a task with another evaluation; the model is the same.

    Args:
        task: as `make_task` returns it.
        config: the whole config. The data may be another than that of `task`.
        how: to score.
    """
    num_classes = len(task.metadata["class_names"])
    transform = data.ClassificationTransform(
        config.data, num_classes=num_classes, training=False, multi_label=how.multi_label, allowed=how.classes
    )
    confusion = lambda source: scoring.ConfusionEvaluator(len(how.classes or range(num_classes)))
    return dataclasses.replace(
        task, metrics=scoring.make_metrics(num_classes, how), transform=lambda training: transform,
        evaluator=confusion if how.per_class else task.evaluator,
    )  # fmt: skip
