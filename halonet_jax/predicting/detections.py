"""Detectors: the objects of an image, in its own pixels, and pictures of them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import jax
import ml_collections
import numpy as np

from halonet_jax import data, detection_pictures
from halonet_jax.data import masks, restoring
from halonet_jax.errors import ConfigError, StorageError
from halonet_jax.predicting.results import DetectedObject, Detections
from halonet_jax.predicting.running import PictureFolder
from halonet_jax.predicting.writers import DetectionLayout
from halonet_jax.runtime import storage
from halonet_jax.weights import Loaded

DEFAULT_MIN_SCORE = 0.5
_FIELDS = ("boxes", "scores", "classes", "valid", "masks")


def least_score(given: float | None) -> float:
    """Returns the score that objects need.

    Args:
        given: by the user; None: the default.

    Raises:
        ConfigError: it is not between 0 and 1.
    """
    if given is not None and not 0 <= given <= 1:
        raise ConfigError(f"min_score={given:g} must be between 0 and 1, such as {DEFAULT_MIN_SCORE:g}")
    return DEFAULT_MIN_SCORE if given is None else given


class Detector:
    """What a detector reads of an image and computes. Boxes and masks are those of the evaluation, by the same functions.

    Args:
        loaded: the model.
        options: the data block of its config.

    Attributes:
        transform: as in evaluation; images are turned upright.

    Raises:
        DataError: pycocotools is not installed.
    """

    def __init__(self, loaded: Loaded, options: ml_collections.ConfigDict):
        masks.codec()  # now, not at the first image
        self._task, self.transform = loaded.task, data.DetectionImages(options)

    def outputs(self, params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the detections as the evaluation gets them, and the size of the original images, int32 `[B, 2]`."""
        found = self._task.metrics(self._task.predict(params, batch_stats, batch), batch)
        return found | {"original_size": batch["original_size"]}


class ObjectsOfImages(Detector):
    """See `running.Kind`.

    Args:
        loaded: the model.
        source: the images, which pictures are drawn on.
        top: most objects per image; None: all that have `min_score`.
        min_score: objects below are left out.
        pictures: for the pictures; None: there are none.

    Attributes:
        layout: how results look.
    """

    def __init__(
        self, loaded: Loaded, source: data.FileSource, top: int | None, min_score: float, pictures: PictureFolder | None
    ):
        super().__init__(loaded, loaded.config.data)
        self._names, self._max_pixels = loaded.metadata["class_names"], loaded.config.data.max_pixels
        self._source, self._top, self._pictures, self._min_score = source, top, pictures, min_score
        self.layout = DetectionLayout(min_score, pictures is not None)

    def result(self, number: int, name: str, values: dict[str, np.ndarray]) -> Detections:
        """Returns the objects of one image, and draws its picture."""
        height, width = values["original_size"].tolist()
        kept = restore(values, self._names, self._min_score, self._top)
        picture = self._draw(number, name, kept, values["masks"]) if self._pictures else ""
        return Detections(name, tuple(as_object(each, self._names) for each in kept), height, width, picture=picture)

    def broken(self, name: str, reason: str) -> Detections:
        """Returns the detections that stand for a broken file."""
        return Detections(name, error=reason)

    def _draw(self, number, name, kept, probabilities):
        image = data.decode(self._source[number]["image"], self._max_pixels, upright=True)
        path = self._pictures.file(number, name)
        png = cv2.imencode(".png", draw(image, kept, probabilities, self._names)[..., ::-1])[1]
        try:
            path.write_bytes(png.tobytes())
        except OSError as error:
            raise StorageError(f"{path} cannot be written ({storage.reason(error)}); {storage.remedy(error)}") from None
        return str(path)


def restore(
    values: Mapping[str, np.ndarray], class_names: Sequence[str], min_score: float, top: int | None = None
) -> list[restoring.Restored]:
    """Returns the objects of one image, in its pixels, by falling score.

    Args:
        values: a row of `Detector.outputs`.
        class_names: by label.
        min_score: objects below are left out.
        top: most objects; None: all.
    """
    one_image = {key: values[key] for key in _FIELDS}
    one_image["valid"] = values["valid"] & (values["scores"] >= min_score)
    found = restoring.restore(one_image, values["scale"], *values["original_size"].tolist(), len(class_names))
    return list(itertools.islice(found, top))  # one mask after the other is made, so that the rest costs nothing


def as_object(restored: restoring.Restored, class_names: list[str]) -> DetectedObject:
    """Returns an object as users see it.

    Args:
        restored: in pixels of its image.
        class_names: by label.
    """
    y0, x0, y1, x1 = restored.box
    mask = {"size": list(restored.mask["size"]), "counts": restored.mask["counts"].decode()}
    return DetectedObject(class_names[restored.label], restored.score, (x0, y0, x1 - x0, y1 - y0), mask)


def draw(image: np.ndarray, objects: list[restoring.Restored], probabilities: np.ndarray, class_names: list[str]) -> np.ndarray:
    """Returns an image with boxes, masks, classes and scores; a small one is enlarged.

    Args:
        image: uint8 [h, w, 3], upright.
        objects: in its pixels.
        probabilities: masks [D, m, m] in the frames of the boxes, uint8, by `Restored.place`.
        class_names: by label.
    """
    return detection_pictures.draw(
        image, np.array([each.box for each in objects]), [each.label for each in objects], class_names=class_names,
        scores=[each.score for each in objects],
        masks=[probabilities[each.place].astype(np.float32) / 255 for each in objects],
    )  # fmt: skip
