"""What the page of `halonet_jax.demo` asks of a model, apart from HTTP."""

import base64
import collections
import secrets
import threading
from typing import Any

import cv2
import jax
import ml_collections
import numpy as np

from halonet_jax import attention_maps, data, detection_pictures
from halonet_jax.errors import ConfigError
from halonet_jax.predicting import detections
from halonet_jax.weights import Loaded

KEPT_IMAGES = 16
_TOP = 5
_LARGEST_SIDE = 1280  # of a picture with objects, pixels: it travels to the page


def make(loaded: Loaded, max_pixels: int, min_score: float | None = None) -> "ClassViewer | ObjectViewer":
    """Returns the viewer of a model.

    Args:
        loaded: from `halonet_jax.load`.
        max_pixels: most pixels of an image, height times width.
        min_score: of a detector: objects with a lower score are left out; None: 0.5.

    Raises:
        ConfigError: the page does not serve the model's task, or `min_score` is for a detector, or not between 0 and 1.
        DataError: the model is a detector, and pycocotools is not installed.
    """
    task, options = loaded.config.task, loaded.config.data.copy_and_resolve_references()
    options.max_pixels = min(options.max_pixels, max_pixels)
    if task == "detection":
        return ObjectViewer(loaded, options, detections.least_score(min_score))
    if task != "classification":
        raise ConfigError(
            f"the page serves task='classification' and 'detection', and {loaded.folder} was trained for {task!r}; what serves "
            "all tasks is halonet_jax.evaluate"
        )
    if min_score is not None:
        raise ConfigError(
            f"min_score is for task='detection', and {loaded.folder} was trained for {task!r}; leave min_score out"
        )
    return ClassViewer(loaded, options)


def about(loaded: Loaded, name: str | None = None) -> dict[str, Any]:
    """Returns what the page's head says of a model, as JSON values.

    Args:
        loaded: from `halonet_jax.load`.
        name: what the page calls the model; None: the name of its folder.
    """
    height, width = loaded.image_shape
    return {
        "name": name or loaded.folder.name, "task": loaded.config.task, "architecture": loaded.config.model.name,
        "step": loaded.step, "weights": loaded.weights, "classes": len(loaded.metadata["class_names"]), "height": height,
        "width": width, "figures": loaded.figures,
    }  # fmt: skip


class ClassViewer:
    """Of a classifier: its classes, and what it attends to. Its methods may be called from several threads.

    Args:
        loaded: from `halonet_jax.load`; a model of `halonet_jax.models`.
        options: the data block of its config.

    Raises:
        ConfigError: the model is of another kind.
    """

    def __init__(self, loaded: Loaded, options: ml_collections.ConfigDict):
        self._capture = attention_maps.Capture(loaded)
        self._names = loaded.metadata["class_names"]
        self._transform = data.ClassificationTransform(options, num_classes=len(self._names), training=False, upright=True)
        self._captured: collections.OrderedDict[str, attention_maps.Captured] = collections.OrderedDict()
        self._lock = threading.Lock()  # one image at a time, so that memory does not grow with the number of requests

    def look_at(self, encoded: bytes) -> dict[str, Any]:
        """Returns the most probable classes of an image, and the crop that the model sees, as JSON values.

        Args:
            encoded: a JPEG, PNG, WebP or BMP file.

        Raises:
            CorruptImage: the image cannot be decoded, or is too large.
        """
        with self._lock:
            image = self._transform({"image": encoded, "label": 0}, None)["image"]
            captured = self._capture(image)
            token = secrets.token_urlsafe(16)
            self._captured[token] = captured
            if len(self._captured) > KEPT_IMAGES:
                self._captured.popitem(last=False)
        probabilities = np.exp(captured.logits - captured.logits.max())
        probabilities /= probabilities.sum()
        best = np.argsort(-probabilities, kind="stable")[:_TOP]
        return {
            "token": token,
            "classes": [{"class": self._names[n], "probability": float(probabilities[n])} for n in best],
            "picture": _data_url(image),
            "place": captured.strongest(1)[0],
            "layers": [
                {"stage": found.layer.stage, "block": found.layer.block, "heads": found.layer.num_heads}
                for found in captured.layers
            ],
        }

    def attention(self, token: str, row: float, column: float) -> list[dict[str, Any]]:
        """Returns what a place attends to in each attention layer, as JSON values.

        Args:
            token: of an image, as `look_at` returned it.
            row: share of the crop's height, 0 to 1.
            column: share of its width, 0 to 1.

        Raises:
            KeyError: the image is not kept any more.
        """
        with self._lock:
            captured = self._captured[token]
            self._captured.move_to_end(token)
        found = [layer.at(row, column) for layer in captured.layers]
        return [
            {"weights": np.round(seen.weights, 5).tolist(), "query": seen.query, "block": seen.block, "window": seen.window}
            for seen in found
        ]


class ObjectViewer:
    """Of a detector: the image with its objects. Its methods may be called from several threads.

    Args:
        loaded: from `halonet_jax.load`.
        options: the data block of its config.
        min_score: objects with a lower score are left out.

    Raises:
        DataError: pycocotools is not installed.
    """

    def __init__(self, loaded: Loaded, options: ml_collections.ConfigDict, min_score: float):
        self._names, self._min_score, self._max_pixels = loaded.metadata["class_names"], min_score, options.max_pixels
        self._detector = detections.Detector(loaded, options)
        self._variables = jax.device_put(loaded.variables, jax.devices()[0])  # one image does not divide over several
        self._run = jax.jit(lambda v, batch: self._detector.outputs(v["params"], v["batch_stats"], batch))
        self._lock = threading.Lock()  # one image at a time

    def look_at(self, encoded: bytes) -> dict[str, Any]:
        """Returns the objects of an image, and the image with them, as JSON values.

        Args:
            encoded: a JPEG, PNG, WebP or BMP file.

        Raises:
            CorruptImage: the image cannot be decoded, or is too large.
        """
        with self._lock:
            row = self._detector.transform({"image": encoded, "index": 0})
            batch = {name: x[None] for name, x in row.items()} | {"mask": np.ones(1, bool)}
            values = {name: x[0] for name, x in jax.device_get(self._run(self._variables, batch)).items()}
            image = data.decode(encoded, self._max_pixels, upright=True)
        found = detections.restore(values, self._names, self._min_score)
        share = min(1.0, _LARGEST_SIDE / max(image.shape[:2]))
        if share < 1:
            size = [max(1, round(share * side)) for side in image.shape[1::-1]]  # cv2's own rounding makes a thin side 0
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        shown = [each._replace(box=tuple(share * x for x in each.box)) for each in found]
        return {
            "objects": [
                {"class": self._names[each.label], "score": each.score, "color": _hex(detection_pictures.color(each.label))}
                for each in found
            ],
            "min_score": self._min_score,
            "picture": _data_url(detections.draw(image, shown, values["masks"], self._names)),
            "layers": [],
        }  # fmt: skip

    def attention(self, token: str, row: float, column: float) -> list[dict[str, Any]]:
        """Raises KeyError: no image is kept."""
        raise KeyError(token)


def _hex(rgb):
    return "#" + bytes(rgb).hex()


def _data_url(image):
    return "data:image/png;base64," + base64.b64encode(cv2.imencode(".png", image[..., ::-1])[1].tobytes()).decode()
