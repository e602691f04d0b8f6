"""What classification does with one labelled image before it joins a batch."""

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
        upright: whether encoded images are turned as their EXIF orientation says. None: those of an image folder are; TFDS
            images are not, so that ImageNet's accuracy stays comparable: published figures ignore the orientation.

    Attributes:
        fields: `image`, uint8 [height, width, 3], and `label`, int32 [].

    Raises:
        DataError: for an unknown name in `randaugment_ops`.
    """

    def __init__(self, data_config, *, num_classes: int, training: bool, upright: bool | None = None):
        c = data_config
        randaugment.check_ops(c.randaugment_ops)
        self.num_classes, self.training = num_classes, training
        self.upright = c.source == "folder" if upright is None else upright
        self.image_size, self.eval_crop, self.max_pixels = images.height_and_width(c.image_size), c.eval_crop, c.max_pixels
        self.interpolation = c.interpolation
        self.crop_scale, self.crop_ratio, self.flip = tuple(c.crop_scale), tuple(c.crop_ratio), c.flip
        self.randaugment_layers, self.randaugment_magnitude = c.randaugment_layers, c.randaugment_magnitude
        self.randaugment_ops = tuple(c.randaugment_ops)
        self.fields = {"image": Field((*self.image_size, 3), "uint8"), "label": Field((), "int32")}

    def __call__(self, record: dict[str, Any], rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """Returns `image` and `label` of one record.

        Args:
            record: `image`, an encoded file or uint8 [h, w, 3], and `label`, an int.
            rng: draws crop, flip and RandAugment. None: the central crop, in training as well.

        Raises:
            CorruptImage: for an image that does not decode; the message is the reason.
            DataError: for a label out of range.
        """
        image, label = record["image"], int(record["label"])
        if isinstance(image, bytes):
            image = images.decode(image, self.max_pixels, self.upright)
        elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
            raise CorruptImage(f"an array {image.dtype}{list(image.shape)} instead of uint8[h, w, 3]")
        if not 0 <= label < self.num_classes:
            raise DataError(f"label {label} is not between 0 and {self.num_classes - 1}; choose a labelled split")
        if self.training and rng is not None:
            image = images.train_transform(image, rng, self)
        else:
            image = images.eval_transform(image, self)
        return {"image": image, "label": np.int32(label)}
