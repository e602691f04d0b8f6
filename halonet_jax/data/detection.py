"""What detection does with one image and its objects before they join a batch."""

from typing import Any, NamedTuple

import cv2
import numpy as np

from halonet_jax.data import images, masks, orientation
from halonet_jax.data.example import Field
from halonet_jax.errors import CorruptImage, DataError

MASK_SIZE = 112  # side of a mask in its object's frame


class Geometry(NamedTuple):
    """How an image comes into the square input: scaled, cut, mirrored, and padded at the bottom and on the right.

    Attributes:
        scaled: height and width of the whole image after scaling, pixels.
        scale: of y and x: scaled over original pixels.
        offset: first row and column of the part that is kept.
        size: height and width of that part.
        flip: whether it is mirrored left to right.
    """

    scaled: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[int, int]
    size: tuple[int, int]
    flip: bool

    def image(self, image: np.ndarray, side: int, fill: tuple[int, int, int]) -> np.ndarray:
        """Returns the input of uint8 [side, side, 3].

        Args:
            image: uint8 [h, w, 3].
            side: of the input.
            fill: colour of the padding.
        """
        smaller = self.scaled[0] < image.shape[0]
        how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
        if self.scaled != image.shape[:2]:
            image = cv2.resize(image, self.scaled[::-1], interpolation=how)
        (top, left), (height, width) = self.offset, self.size
        part = image[top : top + height, left : left + width]
        out = np.empty((side, side, 3), np.uint8)
        out[:height, :width] = part[:, ::-1] if self.flip else part
        out[height:], out[:height, width:] = fill, fill
        return out

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Returns where the visible parts of boxes lie in the input, float32 [n, 4]; parts outside have no area.

        Args:
            boxes: [n, 4]: y0, x0, y1, x1, pixels of the image.
        """
        out = np.asarray(boxes, np.float64).reshape(-1, 4) * np.tile(self.scale, 2) - np.tile(self.offset, 2)
        out = np.clip(out, 0, np.tile(self.size, 2))
        if self.flip:
            out[:, [1, 3]] = self.size[1] - out[:, [3, 1]]
        return out.astype(np.float32)

    def frame(self, box: np.ndarray) -> np.ndarray:
        """Returns where a box of the input lies in the image: y0, x0, y1, x1.

        Args:
            box: [4], pixels of the input.
        """
        y0, x0, y1, x1 = np.asarray(box, np.float64)
        if self.flip:
            x0, x1 = self.size[1] - x1, self.size[1] - x0
        return (np.array([y0, x0, y1, x1]) + np.tile(self.offset, 2)) / np.tile(self.scale, 2)


class DetectionTransform:
    """Brings an image to the input's size, and its objects to arrays of fixed shapes.

    Training: the image is scaled to fit the input, times a factor drawn from `scale_jitter`; a part of the input's size is
    cut out where it is larger; and it is mirrored with probability 1/2. Evaluation: it is scaled to fit. The rest, at the
    bottom and on the right, is the mean colour, which is zero once it is normalised. As in the paper's detection code
    (tensorflow/tpu, models/official/detection), but scaling down averages areas.

    Boxes are cut at the input's border. An object is left out where less than a pixel of a side of its box, or nothing of
    its mask, is visible; crowds always are. Of more than `max_objects`, the first ones stay. The others' rows are zeros.

    Args:
        data_config: the config's `data` block: `image_size`, `max_objects`, `scale_jitter`, `flip`, `mean` and
            `max_pixels` are read. Its values are copied.
        num_classes: classes run from 0 to `num_classes - 1`.
        training: whether to augment, and to give masks.
        with_masks: give masks in training.

    Attributes:
        fields: `image`, uint8 [S, S, 3] for S = `image_size`; `image_size`, float32 [2], height and width of what is not
            padding, pixels. For M = `max_objects`: `boxes`, float32 [M, 4], y0, x0, y1, x1 in pixels of the input;
            `labels`, int32 [M], the objects' classes, from 0; `valid`, bool [M], False for rows without object. In
            training `masks`, uint8 [M, 112, 112], 0 or 1, each in the frame of its box; all 0 for an object without
            mask. In evaluation `scale`, float32 [2]: pixels of the input over pixels of the image, y and x; and `index`,
            int32 [], the record's.
    """

    def __init__(self, data_config, *, num_classes: int, training: bool, with_masks: bool = True):
        c = data_config
        self.num_classes, self.training, self.with_masks = num_classes, training, with_masks and training
        self.image_size, self.max_objects, self.max_pixels = c.image_size, c.max_objects, c.max_pixels
        self.scale_jitter, self.flip = tuple(c.scale_jitter), c.flip
        self.fill = tuple(int(np.clip(round(255 * mean), 0, 255)) for mean in c.mean)
        side, count = c.image_size, c.max_objects
        self.fields = {
            "image": Field((side, side, 3), "uint8"), "image_size": Field((2,), "float32"),
            "boxes": Field((count, 4), "float32"), "labels": Field((count,), "int32"), "valid": Field((count,), "bool"),
        }  # fmt: skip
        if self.with_masks:
            self.fields["masks"] = Field((count, MASK_SIZE, MASK_SIZE), "uint8")
        if not training:
            self.fields |= {"scale": Field((2,), "float32"), "index": Field((), "int32")}

    def __call__(self, record: dict[str, Any], rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """Returns the fields of one record.

        Args:
            record: see `halonet_jax.data.annotations`.
            rng: draws scale, part and flip. None: as in evaluation.

        Raises:
            CorruptImage: for an image that does not decode, or of another size than its annotations are for.
            DataError: for a class out of range.
        """
        image = self._decode(record)
        geometry = self.geometry(*image.shape[:2], rng)
        row = {name: np.zeros(field.shape, field.dtype) for name, field in self.fields.items()}
        row["image"] = geometry.image(image, self.image_size, self.fill)
        row["image_size"] = np.array(geometry.size, np.float32)
        if not self.training:
            row["scale"], row["index"] = np.array(geometry.scale, np.float32), np.int32(record["index"])
        classes = np.asarray(record["classes"])
        if len(classes) and (classes.min() < 0 or classes.max() >= self.num_classes):
            raise DataError(f"the classes {classes.min()} to {classes.max()} are not all between 0 and {self.num_classes - 1}")
        boxes, used = geometry.boxes(record["boxes"]), 0
        visible = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1) & ~np.asarray(record.get("crowd", np.zeros(len(boxes), bool)))
        for n in np.flatnonzero(visible):
            if used == self.max_objects:
                break
            if self.with_masks and record["masks"][n] is not None:
                mask = masks.in_frame(record["masks"][n], geometry.frame(boxes[n]), MASK_SIZE)
                if not mask.any():
                    continue
                row["masks"][used] = mask[:, ::-1] if geometry.flip else mask
            row["boxes"][used], row["labels"][used], row["valid"][used] = boxes[n], classes[n], True
            used += 1
        return row

    def geometry(self, height: int, width: int, rng: np.random.Generator | None) -> Geometry:
        """Draws how an image comes into the input.

        Args:
            height: of the image, pixels.
            width: likewise.
            rng: see `__call__`.
        """
        augments = self.training and rng is not None
        factor = rng.uniform(*self.scale_jitter) if augments else 1.0
        scale = factor * self.image_size / max(height, width)
        scaled = max(1, round(height * scale)), max(1, round(width * scale))
        size = min(scaled[0], self.image_size), min(scaled[1], self.image_size)
        offset = tuple(int(rng.integers(whole - part + 1)) if augments else 0 for whole, part in zip(scaled, size))
        flip = bool(augments and self.flip and rng.random() < 0.5)
        return Geometry(scaled, (scaled[0] / height, scaled[1] / width), offset, size, flip)

    def _decode(self, record):
        image = record["image"]
        if not isinstance(image, bytes):
            return image
        encoded, image = image, images.decode(image, self.max_pixels)
        size = record.get("size", image.shape[:2])
        if image.shape[:2] != size:  # annotated as it is seen, not as it is stored
            image = orientation.turn(image, orientation.read(encoded))
        if image.shape[:2] != size:
            (h, w), (height, width) = image.shape[:2], size
            raise CorruptImage(f"it is {w} x {h} pixels, and its annotations are for {width} x {height}")
        return image


class DetectionImages:
    """What detection does with an image of which nothing is known: as `DetectionTransform` in evaluation.

    The image is turned upright, as its EXIF orientation says.

    Args:
        data_config: the config's `data` block: `image_size`, `mean` and `max_pixels` are read. Its values are copied.

    Attributes:
        fields: `image`, `image_size`, `scale` and `index` of `DetectionTransform`; and `original_size`, int32 [2], height
            and width of the upright image, pixels.
    """

    def __init__(self, data_config):
        self._inner = DetectionTransform(data_config, num_classes=1, training=False)
        self.fields = {name: self._inner.fields[name] for name in ("image", "image_size", "scale", "index")}
        self.fields["original_size"] = Field((2,), "int32")

    def __call__(self, record: dict[str, Any], rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """Returns the fields of one record.

        Args:
            record: `image`, an encoded file, and `index`, its number.
            rng: has no effect.

        Raises:
            CorruptImage: for an image that does not decode; the message is the reason.
        """
        image = images.decode(record["image"], self._inner.max_pixels, upright=True)
        row = self._inner({"image": image, "index": record["index"], "classes": (), "boxes": ()}, None)
        return {name: row[name] for name in self.fields if name in row} | {"original_size": np.array(image.shape[:2], np.int32)}
