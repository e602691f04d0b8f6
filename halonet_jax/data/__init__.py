"""Input: sources of labelled images, their transforms, batches as a function of the step, and mixing on the device."""

from halonet_jax.data import randaugment
from halonet_jax.data.errors import CorruptImage, DataError
from halonet_jax.data.example import Example, Source
from halonet_jax.data.folder import FolderSource
from halonet_jax.data.loader import Loader, eval_batches, train_batches
from halonet_jax.data.mixing import cutmix, mix, mixup, normalize
from halonet_jax.data.records import TfdsSource
from halonet_jax.data.sources import DigitsSource, open_source
from halonet_jax.data.transforms import (
    center_crop,
    decode,
    eval_transform,
    horizontal_flip,
    random_resized_crop,
    resize,
    train_transform,
)

__all__ = [
    "CorruptImage",
    "DataError",
    "DigitsSource",
    "Example",
    "FolderSource",
    "Loader",
    "Source",
    "TfdsSource",
    "center_crop",
    "cutmix",
    "decode",
    "eval_batches",
    "eval_transform",
    "horizontal_flip",
    "mix",
    "mixup",
    "normalize",
    "open_source",
    "random_resized_crop",
    "randaugment",
    "resize",
    "train_batches",
    "train_transform",
]
