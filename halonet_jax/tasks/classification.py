"""Image classification with label smoothing, mixup and cutmix."""

import jax
import jax.numpy as jnp
import ml_collections
import optax

from halonet_jax import config as config_lib
from halonet_jax import models
from halonet_jax.tasks import mixing
from halonet_jax.training.task import Task


def make_model(config: ml_collections.ConfigDict, num_classes: int) -> models.HaloNet:
    """The config's model."""
    return models.create(num_classes=num_classes, **config_lib.model_options(config))


def make_task(config: ml_collections.ConfigDict, num_classes: int) -> Task:
    """The task of a config. Batches hold uint8 `image` `[B, H, W, 3]` and int32 `label` `[B]`.

    Normalisation, mixup and cutmix run on the device. Evaluation sums are "count", "top1", "top5" (int32 numbers of
    examples) and "loss" (cross-entropy without smoothing).
    """
    model, data = make_model(config, num_classes), config.data

    def preprocess(images):
        return mixing.normalize(images, data.mean, data.std, jnp.dtype(config.model.dtype))

    def init(rng):
        size = data.image_size
        variables = model.init(rng, jnp.zeros((1, size, size, 3)), train=False)
        return variables["params"], variables.get("batch_stats", {})

    def loss(params, model_state, batch, rng):
        mix_rng, dropout_rng = jax.random.split(rng)
        images, labels = preprocess(batch["image"]), jax.nn.one_hot(batch["label"], num_classes)
        labels = optax.smooth_labels(labels, config.label_smoothing)
        images, labels = mixing.mix(mix_rng, images, labels, data.mixup_alpha, data.cutmix_alpha)
        variables = {"params": params, "batch_stats": model_state}
        logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": dropout_rng})
        top1 = (logits.argmax(-1) == batch["label"]).mean(dtype=jnp.float32)
        return optax.softmax_cross_entropy(logits, labels).mean(), (updates["batch_stats"], {"top1": top1})

    def predict(params, model_state, batch):
        return model.apply({"params": params, "batch_stats": model_state}, preprocess(batch["image"]), train=False)

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

    def describe():
        return model.describe(config.batch_size // config.optimizer.accumulation_steps, data.image_size, data.image_size)

    return Task(init, loss, predict, metrics, describe)
