"""Reads a file of COCO's format (`instances_*.json`) into flat arrays, and names what is broken in it."""

import gc
import json
import math
import mmap
from typing import Any

import numpy as np

from halonet_jax.data import masks
from halonet_jax.data.annotations import Annotations, Image, Object
from halonet_jax.errors import DataError

_LARGEST_SIDE = 2**20
_CATEGORIES_BYTES = 2**24


class _Broken(Exception):
    """An entry cannot be used; the message is the reason."""


def read(path: str, *, training: bool) -> tuple[Annotations, list[tuple[str, str]]]:
    """Reads a file and leaves out its broken entries.

    Args:
        path: of the JSON file.
        training: leave out crowds, then images without objects; keep polygons as float32.

    Returns:
        The annotations, and what was broken: pairs of a name and a reason.

    Raises:
        DataError: the file is missing or is not of COCO's format.
    """
    content = _load(path)
    categories = _categories(content, path)
    broken: list[tuple[str, str]] = []
    images, places = _images(content, path, broken)
    objects: list[list[Object]] = [[] for _ in images]
    labels = {category_id: label for label, (category_id, _) in enumerate(categories)}
    dtype = np.float32 if training else np.float64
    annotations = content["annotations"]
    for number in range(len(annotations)):
        annotation, annotations[number] = annotations[number], None  # its memory is free before the next one needs some
        try:
            place = places.get(_whole(annotation, "image_id"))
            if place is None:
                raise _Broken(f"its image {annotation['image_id']!r} is not among the usable images")
            if not (training and annotation.get("iscrowd")):
                objects[place].append(_object(annotation, images[place], labels, dtype))
        except _Broken as error:
            broken.append((_name("annotation", number, annotation), str(error)))
    kept = [(image, found) for image, found in zip(images, objects) if found or not training]
    ids, names = zip(*categories)
    return Annotations(kept, names, ids, dtype), broken


def class_names(path: str) -> tuple[str, ...] | None:
    """Returns the names of a file's categories in the order of labels, without reading the rest of it.

    Args:
        path: of the JSON file.

    Returns:
        The names; None where the file has no categories that can be read.
    """
    key = b'"categories"'
    with open(path, "rb") as f:
        size = f.seek(0, 2)
        content = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        at = content.rfind(key)
        while at >= 0:
            text = content[at + len(key) : at + _CATEGORIES_BYTES].decode(errors="replace").lstrip(" \t\r\n:")
            try:
                found, _ = json.JSONDecoder().raw_decode(text)
                names = {entry["id"]: entry["name"] for entry in found}
                return tuple(names[category_id] for category_id in sorted(names))
            except (ValueError, TypeError, KeyError, RecursionError):
                at = content.rfind(key, 0, at)
    return None


def _load(path):
    was_enabled = gc.isenabled()
    gc.disable()  # millions of objects, none of them garbage: the collector would double the time
    try:
        with open(path, "rb") as f:
            content = json.load(f)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise DataError(f"{path} is no JSON or torn ({where}); fetch or write the file again") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, numbers of thousands of digits
        raise DataError(f"{path} is no JSON or torn ({' '.join(str(error).split())}); fetch or write the file again") from None
    finally:
        if was_enabled:
            gc.enable()
    for key in ("images", "annotations", "categories"):
        found = content.get(key) if isinstance(content, dict) else None
        if not isinstance(found, list):
            raise DataError(
                f"{path} has no list {key!r}; a file of COCO's format is an object with the lists images, annotations and"
                " categories (files of test sets have no annotations): choose another split or file"
            )
    return content


def _categories(content, path):
    """Pairs of id and name in the order of ids, which is the order of labels."""
    found = {}
    for number, category in enumerate(content["categories"]):
        try:
            category_id = _whole(category, "id")
            if not isinstance(category.get("name"), str):
                raise _Broken("it has no name")
            if category_id in found:
                raise _Broken(f"id {category_id} occurs twice")
        except _Broken as error:
            raise DataError(f"{path}: {_name('category', number, category)}: {error}; mend the file") from None
        found[category_id] = category["name"]
    if not found:
        raise DataError(f"{path} has no category; every annotation needs one: add them to its list 'categories'")
    return sorted(found.items())


def _images(content, path, broken):
    """The usable images, and their places by id."""
    images, places = [], {}
    for number, entry in enumerate(content["images"]):
        try:
            image_id = _whole(entry, "id")
            if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
                raise _Broken("it has no file_name")
            height, width = _whole(entry, "height"), _whole(entry, "width")
            if not (0 < height <= _LARGEST_SIDE and 0 < width <= _LARGEST_SIDE):
                raise _Broken(f"its size is {width} x {height} pixels")
        except _Broken as error:
            broken.append((_name("image", number, entry), str(error)))
            continue
        if image_id in places:
            raise DataError(
                f"{path}: the image id {image_id} occurs twice, so that annotations are ambiguous; renumber the images"
            )
        places[image_id] = len(images)
        images.append(Image(image_id, entry["file_name"], height, width))
    return images, places


def _object(annotation, image, labels, dtype):
    label = labels.get(_whole(annotation, "category_id"))
    if label is None:
        raise _Broken(f"its category {annotation['category_id']} is unknown")
    crowd = annotation.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise _Broken(f"iscrowd is {_short(crowd)} instead of 0 or 1")
    box = _numbers(annotation.get("bbox"), "bbox")
    if len(box) != 4:
        raise _Broken(f"bbox is {_short(annotation.get('bbox'))} instead of x, y, width, height")
    x, y, width, height = box
    if not (width > 0 and height > 0):
        raise _Broken(f"its box of {width:g} x {height:g} pixels has no area")
    if x >= image.width or y >= image.height or x + width <= 0 or y + height <= 0:
        where = f"({x:g}, {y:g}) to ({x + width:g}, {y + height:g})"
        raise _Broken(f"its box {where} is outside the image of {image.width} x {image.height} pixels")
    segmentation = _segmentation(annotation.get("segmentation"), image, dtype)
    area = annotation.get("area")
    if area is None:
        area = width * height
        if segmentation is not None:
            area = float(masks.codec().area(masks.to_rle(segmentation, image.height, image.width)))
    area = _numbers([area], "area")[0]
    if area < 0:
        raise _Broken(f"its area is {area:g}")
    return Object((x, y, width, height), label, bool(crowd), area, segmentation)


def _segmentation(value, image, dtype):
    if value is None or value == []:
        return None
    if isinstance(value, dict):
        return {"size": [image.height, image.width], "counts": _counts(value, image)}
    if not isinstance(value, list):
        raise _Broken(f"segmentation is {_short(value)} instead of polygons or run lengths")
    return [_polygon(polygon, image).astype(dtype) for polygon in value]


def _polygon(value, image):
    """Points, float64 [k, 2]. On NumPy alone: a data set has millions of them."""
    if not isinstance(value, list):
        raise _Broken("segmentation is no list of polygons; each is a list of x, y, x, y, ...")
    if len(value) < 6 or len(value) % 2:
        raise _Broken(f"a polygon has {len(value)} coordinates; an even number from 6 on is needed")
    try:
        points = np.array(value)
    except ValueError:
        points = np.zeros(0, object)
    if points.ndim != 1 or points.dtype.kind not in "if":
        raise _Broken(f"a polygon is {_short(value)} instead of numbers")
    points = points.astype(np.float64).reshape(-1, 2)
    if not math.isfinite(points.sum()):
        raise _Broken("a polygon has a number that is not finite")
    for numbers, length in ((value[::2], image.width), (value[1::2], image.height)):
        if min(numbers) < -length or max(numbers) > 2 * length:
            raise _Broken(f"a polygon reaches far outside the image of {image.width} x {image.height} pixels")
    return points


def _counts(value, image):
    """Checked here, because a decoder in C would write past the end of its picture."""
    size, counts = value.get("size"), value.get("counts")
    if size != [image.height, image.width]:
        raise _Broken(f"its run lengths are for a size of {_short(size)} instead of [{image.height}, {image.width}]")
    if isinstance(counts, list):
        if not all(isinstance(count, int) and 0 <= count < 2**31 for count in counts):
            raise _Broken("a run length is no whole number from 0 on")
        lengths = np.array(counts, np.int64)
    elif isinstance(counts, str):
        try:
            lengths = masks.run_lengths(counts.encode())
        except ValueError as error:
            raise _Broken(f"its run lengths are damaged: {error}") from None
    else:
        raise _Broken(f"the counts of its run lengths are {_short(counts)} instead of a list or a string")
    if not len(lengths) or lengths.min() < 0 or lengths.sum() != image.height * image.width:
        raise _Broken(f"its run lengths sum to {lengths.sum()} instead of the image's {image.height * image.width} pixels")
    if isinstance(counts, str):
        return counts.encode()
    return masks.codec().frPyObjects({"size": size, "counts": counts}, image.height, image.width)["counts"]


def _numbers(values: Any, what: str) -> list[float]:
    """Finite numbers."""
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise _Broken(f"{what} is {_short(values)} instead of numbers" if values is not None else f"it has no {what}")
    try:
        values = [float(value) for value in values]
    except OverflowError:
        values = [math.inf]
    if not math.isfinite(sum(map(abs, values))):
        raise _Broken(f"{what} has a number that is not finite")
    return values


def _whole(entry: Any, key: str) -> int:
    if not isinstance(entry, dict):
        raise _Broken(f"it is {_short(entry)} instead of an object")
    value = entry.get(key)
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise _Broken(f"it has no {key}" if value is None else f"its {key} is {_short(value)} instead of a whole number")
    return value


def _name(kind, number, entry):
    entry_id = entry.get("id") if isinstance(entry, dict) else None
    return f"{kind} {number}" if entry_id is None else f"{kind} of id {_short(entry_id)}"


def _short(value):
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 60 else f"{text[:57]}..."
