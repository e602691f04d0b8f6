"""A second task for the tests: where on a canvas a digit lies. Boxes are regressed, and the host computes their overlap."""

import jax
import jax.numpy as jnp
import numpy as np

from halonet_jax import data, tasks
from halonet_jax.training.task import Task

SIZE = 16


class Canvases:
    """Each scan of the digits, 8 pixels a side, on a black canvas at a place that its index fixes."""

    class_names = ()

    def __init__(self, split):
        self._digits = data.DigitsSource(split)

    def __len__(self):
        return len(self._digits)

    def name(self, index):
        return self._digits.name(index)

    def __getitem__(self, index):
        top, left = np.random.default_rng(index).integers(0, SIZE - 8, 2)
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        image[top : top + 8, left : left + 8] = self._digits[index]["image"]
        return {"image": image, "box": np.array([top, left, top + 8, left + 8], np.float32) / SIZE}


class Transform:
    fields = {"image": data.Field((SIZE, SIZE, 3), "uint8"), "box": data.Field((4,), "float32")}

    def __call__(self, record, rng):
        return record


class MeanOverlap:
    """Intersection over union of each predicted box with its own, computed on the host."""

    def __init__(self, source):
        assert isinstance(source, Canvases)
        self._overlaps = []

    def add(self, values):
        ours, theirs = values["predicted"][values["mask"]], values["box"][values["mask"]]
        sides = np.clip(np.minimum(ours[:, 2:], theirs[:, 2:]) - np.maximum(ours[:, :2], theirs[:, :2]), 0, None)
        area = lambda box: np.clip(box[:, 2:] - box[:, :2], 0, None).prod(1)
        self._overlaps.extend(sides.prod(1) / (area(ours) + area(theirs) - sides.prod(1)))

    def result(self):
        return {"mean_overlap": float(np.mean(self._overlaps)), "count": len(self._overlaps)}


def make_task(config, metadata):
    def init(rng):
        return {"kernel": jax.random.normal(rng, (SIZE * SIZE, 4)) / SIZE, "bias": jnp.zeros(4)}, {}

    def forward(params, batch):
        images = batch["image"][..., 0].reshape(len(batch["image"]), -1) / 255
        brightness = images / (images.sum(1, keepdims=True) + 1e-6)  # so that the centre of mass is linear
        return brightness * SIZE @ params["kernel"] + params["bias"]

    def loss(params, model_state, batch, rng):
        error = jnp.abs(forward(params, batch) - batch["box"]).mean()
        return error, (model_state, {"error": error})

    def predict(params, model_state, batch):
        return forward(params, batch)

    def metrics(boxes, batch):
        return {"predicted": boxes, "box": batch["box"], "mask": batch["mask"]}

    return Task(
        init, loss, predict, metrics, MeanOverlap, "mean_overlap", lambda training: Transform(), metadata,
        lambda: "a linear map from pixels to boxes",
    )  # fmt: skip


tasks.register("digit_boxes", tasks.Definition(
    open_source=lambda config, split, **options: Canvases(split),
    metadata=lambda config, source: {"class_names": [], "preprocessing": {"image_size": SIZE}},
    expected_metadata=lambda config: {"class_names": [], "preprocessing": {"image_size": SIZE}},
    make_task=make_task,
))  # fmt: skip
