"""Image classification with label smoothing, mixup and CutMix."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import optax

from halonet_jax import config as config_lib
from halonet_jax import data, models
from halonet_jax.models import freezing
from halonet_jax.tasks import adapting, mixing
from halonet_jax.training.task import Task

# For compile checks. Other sources count as ImageNet.
_NUM_CLASSES = {"imagenet2012": 1000, "digits": 10}


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
    device. Evaluation sums "count", "top1" and "top5" (int32 numbers of examples) and "loss" (cross-entropy without
    smoothing).

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
        variables = {"params": freezing.stop_gradients(params, config.model.freeze), "batch_stats": model_state}
        logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": dropout_rng})
        top1 = (logits.argmax(-1) == batch["label"]).mean(dtype=jnp.float32)
        return optax.softmax_cross_entropy(logits, labels).mean(), (updates["batch_stats"], {"top1": top1})

    def predict(params, model_state, batch):
        return model.apply({"params": params, "batch_stats": model_state}, normalize(batch["image"]), train=False)

    def metrics(logits, batch):
        mask, label = batch["mask"], batch["label"]
        # Ties and NaN count against the model, so that a constant or broken output scores nothing.
        at_label = jnp.take_along_axis(logits, label[:, None], axis=1)
        rank = (~(logits < at_label)).sum(-1) - 1
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return {
            "count": mask.sum(),
            "top1": (mask & (rank < 1)).sum(),
            "top5": (mask & (rank < 5)).sum(),
            "loss": jnp.where(mask, cross_entropy, 0).sum(),
        }

    if config.model.freeze and (unmatched := freezing.unmatched(jax.eval_shape(init, jax.random.key(0))[0], config.model.freeze)):
        raise config_lib.ConfigError(
            f"model.freeze has {unmatched[0]!r}, which matches no parameter; patterns look like 'backbone/stage1_*', and "
            "models.create(...).init(...) shows all names"
        )

    def transform(training):
        return data.ClassificationTransform(data_config, num_classes=num_classes, training=training)

    def describe():
        return model.describe(config.batch_size // config.optimizer.accumulation_steps, height, width)

    def adapt(variables, other_model, other_metadata):
        return adapting.adapt(variables, other_model, model, other_metadata["class_names"], metadata["class_names"])

    return Task(
        init, loss, predict, metrics, primary_metric="top1", transform=transform, metadata=metadata, describe=describe,
        model=model, normalize=normalize, distances=freezing.distances_from_top, adapt=adapt,
        frozen=functools.partial(freezing.frozen, patterns=config.model.freeze) if config.model.freeze else None,
    )  # fmt: skip
