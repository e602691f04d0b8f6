"""A small data set of COCO's layout for the tests: sparse category ids, polygons, both kinds of run lengths, crowds."""

import json

import cv2
import numpy as np
from pycocotools import mask as codec

CATEGORIES = [{"id": 90, "name": "zebra"}, {"id": 1, "name": "person"}, {"id": 27, "name": "backpack"}]
SIZES = [(60, 80), (80, 60), (50, 50), (40, 90), (64, 64)]


def ellipse(rng, height, width):
    """A bool mask [height, width] with some pixels."""
    y, x = np.mgrid[:height, :width] + 0.5
    ry, rx = rng.uniform(0.1, 0.3, 2) * (height, width)
    cy, cx = rng.uniform(ry, height - ry), rng.uniform(rx, width - rx)
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1


def uncompressed(mask):
    flat = mask.ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    return {"size": list(mask.shape), "counts": np.diff(edges, prepend=0, append=len(flat)).tolist()}


def segmentation(mask, kind):
    if kind == "polygon":
        outline = max(cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0], key=len)
        return [(outline.ravel() + 0.5).astype(float).round(2).tolist()]
    if kind == "list":
        return uncompressed(mask)
    rle = codec.encode(np.asfortranarray(mask, np.uint8))
    return {**rle, "counts": rle["counts"].decode()}


def annotation(number, image_id, mask, category_id, kind="polygon", crowd=0):
    y, x = np.nonzero(mask)
    box = [float(v) for v in (x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1)]
    return {
        "id": number, "image_id": image_id, "category_id": category_id, "bbox": box, "area": float(mask.sum()),
        "iscrowd": crowd, "segmentation": segmentation(mask, kind),
    }  # fmt: skip


def content(seed=0, images=5):
    """The JSON file's content. The last image has no object, the one before it only a crowd."""
    rng = np.random.default_rng(seed)
    found = {"images": [], "annotations": [], "categories": CATEGORIES}
    for i in range(images):
        height, width = SIZES[i % len(SIZES)]
        image_id = 1000 - 37 * i
        found["images"].append({"id": image_id, "file_name": f"{image_id:06d}.png", "height": height, "width": width})
        if i == images - 1:
            continue
        for n in range(1 if i == images - 2 else 4):
            crowd = int(n == 0 and i >= images - 3)
            kind = "list" if crowd else ("polygon", "string", "polygon")[n % 3]
            category_id = CATEGORIES[int(rng.integers(3))]["id"]
            mask = ellipse(rng, height, width)
            found["annotations"].append(annotation(len(found["annotations"]) + 1, image_id, mask, category_id, kind, crowd))
    return found


def write(root, splits=("train2017", "val2017"), found=None):
    """Writes the layout below `root`; images are noise."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for seed, split in enumerate(splits):
        file = found or content(seed)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(file))
        (root / split).mkdir(exist_ok=True)
        for image in file["images"]:
            noise = np.random.default_rng(image["id"]).integers(0, 256, (image["height"], image["width"], 3), np.uint8)
            (root / split / image["file_name"]).write_bytes(cv2.imencode(".png", noise)[1].tobytes())
    return root
