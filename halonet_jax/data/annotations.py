"""Objects of a data set of images as flat arrays, which are small to pickle, and as a dict in COCO's format.

The record of a detection source has these fields:

- `image`: an encoded file (bytes) or uint8 [h, w, 3];
- `index`: number of the example within the source, int;
- `boxes`: float [n, 4], y0, x0, y1, x1 of the n objects in pixels of the image; pixel (y, x) covers [y, y + 1) × [x, x + 1);
- `classes`: int [n], positions in the source's `class_names`;
- `masks`: n segmentations (see `masks`), or bool or uint8 [n, h, w];
- `crowd`, bool [n], where the source has crowds: a box around many objects;
- `size`, (height, width) that the boxes are for, where the image is encoded.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from halonet_jax.data import masks


class Object(NamedTuple):
    """One object of an image.

    Attributes:
        box: x, y, width, height, pixels, as COCO orders them.
        label: position in `class_names`.
        crowd: whether it stands for many objects.
        area: of its mask, pixels.
        segmentation: see `masks`.
    """

    box: tuple[float, float, float, float]
    label: int
    crowd: bool
    area: float
    segmentation: Any


class Image(NamedTuple):
    """One image without its objects.

    Attributes:
        id: whole number that names it in COCO's files.
        file: path below the folder of images; "" where there is none.
        height: pixels.
        width: pixels.
    """

    id: int
    file: str
    height: int
    width: int


class Annotations:
    """The images of a split with their objects.

    Args:
        images: each with its objects.
        class_names: what labels mean.
        category_ids: of the labels in COCO's files. None: 1, 2, ....
        dtype: of polygons. float64 keeps them exact, for evaluation.

    Attributes:
        class_names: tuple of K strings.
        category_ids: int64 [K].
        image_ids: int64 [I].
        sizes: int32 [I, 2], heights and widths in pixels.
        first: int64 [I + 1]; the objects of image i are `first[i]` to `first[i + 1]`.
        boxes: float64 [N, 4]: x, y, width, height.
        labels: int32 [N].
        crowd: bool [N].
        areas: float64 [N], pixels.
    """

    def __init__(
        self, images: Iterable[tuple[Image, list[Object]]], class_names: Iterable[str], category_ids=None, dtype=np.float64
    ):
        self.class_names = tuple(class_names)
        self.category_ids = np.asarray(range(1, len(self.class_names) + 1) if category_ids is None else category_ids, np.int64)
        about, counts, objects = [], [], []
        for image, its_objects in images:
            about.append(image)
            counts.append(len(its_objects))
            objects += its_objects
        self.image_ids = np.array([image.id for image in about], np.int64)
        self.sizes = np.array([(image.height, image.width) for image in about], np.int32).reshape(-1, 2)
        self.first = _starts(counts)
        files = [image.file.encode("utf-8", "surrogateescape") for image in about]
        self._file_starts, self._files = _starts(map(len, files)), b"".join(files)
        self.boxes = np.array([o.box for o in objects], np.float64).reshape(-1, 4)
        self.labels = np.array([o.label for o in objects], np.int32)
        self.crowd = np.array([o.crowd for o in objects], bool)
        self.areas = np.array([o.area for o in objects], np.float64)
        polygons = [o.segmentation if isinstance(o.segmentation, list) else [] for o in objects]
        flat = [polygon for its_polygons in polygons for polygon in its_polygons]
        self._polygon_starts, self._point_starts = _starts(map(len, polygons)), _starts(map(len, flat))
        self._points = np.concatenate([*flat, np.zeros((0, 2))]).astype(dtype)
        counts = [o.segmentation["counts"] if isinstance(o.segmentation, dict) else b"" for o in objects]
        self._rle_starts, self._rles = _starts(map(len, counts)), b"".join(counts)

    def __len__(self) -> int:
        return len(self.image_ids)

    def file(self, index: int) -> str:
        """Returns the path of an image below the folder of images.

        Args:
            index: number of the image.
        """
        return self._files[self._file_starts[index] : self._file_starts[index + 1]].decode("utf-8", "surrogateescape")

    def segmentation(self, number: int, height: int, width: int) -> Any:
        """Returns the segmentation of an object: polygons, run lengths or None.

        Args:
            number: of the object, among all.
            height: of its image, pixels.
            width: likewise.
        """
        first, end = self._polygon_starts[number : number + 2]
        if end > first:
            return [self._points[self._point_starts[p] : self._point_starts[p + 1]] for p in range(first, end)]
        counts = self._rles[self._rle_starts[number] : self._rle_starts[number + 1]]
        return {"size": [height, width], "counts": counts} if counts else None

    def record(self, index: int) -> dict[str, Any]:
        """Returns the record of an image (see the top of this module), without the image.

        Args:
            index: number of the image.
        """
        place = slice(*self.first[index : index + 2])
        height, width = map(int, self.sizes[index])
        corners = self.boxes[place][:, [1, 0, 1, 0]]
        corners[:, 2:] += self.boxes[place][:, [3, 2]]
        return {
            "index": index, "size": (height, width), "boxes": corners.astype(np.float32), "classes": self.labels[place],
            "crowd": self.crowd[place],
            "masks": [self.segmentation(n, height, width) for n in range(place.start, place.stop)],
        }  # fmt: skip

    def relabel(self, class_names: tuple[str, ...], category_ids: list[int]) -> None:
        """Gives labels other meanings; objects keep their categories.

        Args:
            class_names: the new meanings.
            category_ids: their ids, those that objects have among them.
        """
        position = {category_id: label for label, category_id in enumerate(category_ids)}
        new = np.array([position[i] for i in self.category_ids.tolist()], np.int32)
        self.labels = new[self.labels]
        self.class_names, self.category_ids = class_names, np.array(category_ids, np.int64)

    @property
    def has_masks(self) -> bool:
        """Whether any object has a mask."""
        return bool(len(self._points) or self._rles)

    def to_coco(self) -> dict[str, Any]:
        """Returns images, annotations and categories as COCO's format has them. Annotations count from 1."""
        annotations = []
        for image_id, (height, width), first, end in zip(
            self.image_ids.tolist(), self.sizes.tolist(), self.first, self.first[1:]
        ):
            for n in range(first, end):
                annotation = {
                    "id": len(annotations) + 1, "image_id": image_id, "category_id": int(self.category_ids[self.labels[n]]),
                    "bbox": self.boxes[n].tolist(), "area": float(self.areas[n]), "iscrowd": int(self.crowd[n]),
                }  # fmt: skip
                if (segmentation := self.segmentation(n, height, width)) is not None:
                    polygons = isinstance(segmentation, list)
                    annotation["segmentation"] = [p.ravel().tolist() for p in segmentation] if polygons else segmentation
                annotations.append(annotation)
        images = [
            {"id": image_id, "file_name": self.file(i), "height": height, "width": width}
            for i, (image_id, (height, width)) in enumerate(zip(self.image_ids.tolist(), self.sizes.tolist()))
        ]
        categories = [{"id": i, "name": name} for i, name in zip(self.category_ids.tolist(), self.class_names)]
        return {"images": images, "annotations": annotations, "categories": categories}


def of_records(records: Iterable[dict[str, Any]], class_names: Iterable[str]) -> Annotations:
    """Collects the annotations of records whose images are arrays, such as drawn scenes; the images' ids are 1, 2, ....

    Args:
        records: see the top of this module.
        class_names: what classes mean.
    """

    def images():
        for index, record in enumerate(records):
            height, width = record["image"].shape[:2]
            crowd = record.get("crowd", np.zeros(len(record["boxes"]), bool))
            objects = []
            for (y0, x0, y1, x1), label, mask, is_crowd in zip(
                np.asarray(record["boxes"], np.float64).tolist(), record["classes"], record["masks"], crowd
            ):
                rle = None if mask is None else masks.to_rle(mask, height, width)
                area = (y1 - y0) * (x1 - x0) if rle is None else float(masks.codec().area(rle))
                objects.append(Object((x0, y0, x1 - x0, y1 - y0), int(label), bool(is_crowd), area, rle))
            yield Image(index + 1, "", height, width), objects

    return Annotations(images(), class_names)


def _starts(lengths):
    return np.concatenate([[0], np.cumsum(np.fromiter(lengths, np.int64))]).astype(np.int64)
