"""What classification does with one labelled image before it joins a batch."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from halonet_jax.data import images, randaugment
from halonet_jax.data.example import Field
from halonet_jax.errors import CorruptImage, DataError


class ClassificationTransform:
    """Decodes, crops and augments an image, and checks its label.

    Args:
        data_config: the config's `data` block. Its values are copied: later changes have no effect.
        num_classes: labels run from 0 to `num_classes - 1`.
        training: True: random crop, flip and RandAugment, as configured. False: central crop.
        multi_label: whether an image may have any number of labels.
        allowed: labels that may occur; None: all.
        upright: whether encoded images are turned as their EXIF orientation says. None: those of an image folder are; TFDS
            images are not, so that ImageNet's accuracy stays comparable: published figures ignore the orientation.

    Attributes:
        fields: `image`, uint8 [height, width, 3], and `label`, int32 [], or `labels`, bool [num_classes].

    Raises:
        DataError: for an unknown name in `randaugment_ops`.
    """

    def __init__(
        self,
        data_config,
        *,
        num_classes: int,
        training: bool,
        upright: bool | None = None,
        multi_label: bool = False,
        allowed: Iterable[int] | None = None,
    ):
        c = data_config
        randaugment.check_ops(c.randaugment_ops)
        self.num_classes, self.training, self.multi_label = num_classes, training, multi_label
        self.allowed = None if allowed is None else frozenset(allowed)
        self.upright = c.source == "folder" if upright is None else upright
        self.image_size, self.eval_crop, self.max_pixels = images.height_and_width(c.image_size), c.eval_crop, c.max_pixels
        self.interpolation = c.interpolation
        self.crop_scale, self.crop_ratio, self.flip = tuple(c.crop_scale), tuple(c.crop_ratio), c.flip
        self.randaugment_layers, self.randaugment_magnitude = c.randaugment_layers, c.randaugment_magnitude
        self.randaugment_ops = tuple(c.randaugment_ops)
        self.fields = {"image": Field((*self.image_size, 3), "uint8")}
        self.fields |= {"labels": Field((num_classes,), "bool")} if multi_label else {"label": Field((), "int32")}

    def __call__(self, record: dict[str, Any], rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """Returns `image`, and `label` or `labels`, of one record.

        Args:
            record: `image`, an encoded file or uint8 [h, w, 3], and `label`, an int, or `labels`, ints.
            rng: draws crop, flip and RandAugment. None: the central crop, in training as well.

        Raises:
            CorruptImage: for an image that does not decode; the message is the reason.
            DataError: for a label out of range, or not among `allowed`.
        """
        image, labels = record["image"], [int(x) for x in (record["labels"] if self.multi_label else (record["label"],))]
        if isinstance(image, bytes):
            image = images.decode(image, self.max_pixels, self.upright)
        elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
            raise CorruptImage(f"an array {image.dtype}{list(image.shape)} instead of uint8[h, w, 3]")
        for label in labels:
            if not 0 <= label < self.num_classes:
                raise DataError(f"label {label} is not between 0 and {self.num_classes - 1}; choose a labelled split")
            if self.allowed is not None and label not in self.allowed:
                raise DataError(f"label {label} is none of the {len(self.allowed)} classes that this set should have")
        if self.training and rng is not None:
            image = images.train_transform(image, rng, self)
        else:
            image = images.eval_transform(image, self)
        if not self.multi_label:
            return {"image": image, "label": np.int32(labels[0])}
        return {"image": image, "labels": np.isin(np.arange(self.num_classes), labels)}
