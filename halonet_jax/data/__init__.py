"""Input: sources of images with labels or objects, their transforms, and batches as a function of the step."""

from halonet_jax.data import randaugment
from halonet_jax.data.classification import ClassificationTransform
from halonet_jax.data.coco import CocoSource
from halonet_jax.data.detection import DetectionImages, DetectionTransform
from halonet_jax.data.digits import DigitsSource
from halonet_jax.data.example import Field, Source, Transform
from halonet_jax.data.files import FileSource
from halonet_jax.data.folder import FolderSource
from halonet_jax.data.images import (
    center_crop,
    decode,
    eval_transform,
    height_and_width,
    horizontal_flip,
    random_resized_crop,
    resize,
    train_transform,
)
from halonet_jax.data.loader import Loader, eval_batches, train_batches
from halonet_jax.data.opening import open_source
from halonet_jax.data.scenes import DigitScenes, SceneObjects
from halonet_jax.data.tfds import NotPrepared, TfdsSource
from halonet_jax.errors import CorruptImage, DataError

__all__ = [
    "ClassificationTransform",
    "CocoSource",
    "CorruptImage",
    "DataError",
    "DetectionImages",
    "DetectionTransform",
    "DigitScenes",
    "DigitsSource",
    "Field",
    "FileSource",
    "FolderSource",
    "Loader",
    "NotPrepared",
    "SceneObjects",
    "Source",
    "TfdsSource",
    "Transform",
    "center_crop",
    "decode",
    "eval_batches",
    "eval_transform",
    "height_and_width",
    "horizontal_flip",
    "open_source",
    "random_resized_crop",
    "randaugment",
    "resize",
    "train_batches",
    "train_transform",
]
