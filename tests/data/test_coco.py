"""Data sets of COCO's layout: what a source holds, that each broken entry is named, and that each remedy works."""

import copy
import json
import pickle
import re
import sys

import numpy as np
import pytest
import toy_coco
from pycocotools import mask as codec
from pycocotools.coco import COCO

from halonet_jax import config as config_lib
from halonet_jax import data
from halonet_jax.data import coco_parsing, masks
from halonet_jax.data.coco import CocoSource


@pytest.fixture
def root(tmp_path):
    return toy_coco.write(tmp_path / "set")


def config(root, **overrides):
    c = config_lib.imagenet().data
    c.update({"source": "coco", "dir": str(root), "train_split": "train2017", "eval_split": "val2017", **overrides})
    return c


def error(c, split="val2017"):
    with pytest.raises(data.DataError) as raised:
        data.open_source(c, split)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def with_annotations(root, *changes, split="val2017"):
    """Writes a split whose first annotations are changed, one by each of `changes`."""
    found = toy_coco.content(1)
    for annotation, change in zip(found["annotations"], changes):
        change(annotation)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(found))


def test_records_are_those_of_the_file(root):
    source = data.open_source(config(root), "val2017")
    reference = COCO(str(root / "annotations" / "instances_val2017.json"))
    assert source.class_names == ("person", "backpack", "zebra") and source.annotations.category_ids.tolist() == [1, 27, 90]
    assert len(source) == 5 and source.broken == []
    for index in range(5):
        record, image_id = source[index], int(source.annotations.image_ids[index])
        assert record["index"] == index and source.name(index) == f"{root}/val2017/{image_id:06d}.png"
        image = reference.imgs[image_id]
        assert record["size"] == (image["height"], image["width"]) == data.decode(record["image"]).shape[:2]
        theirs = reference.imgToAnns[image_id]
        x, y, w, h = np.array([a["bbox"] for a in theirs]).reshape(-1, 4).T
        np.testing.assert_allclose(record["boxes"], np.stack([y, x, y + h, x + w], 1))
        assert [source.annotations.category_ids[c] for c in record["classes"]] == [a["category_id"] for a in theirs]
        assert record["crowd"].tolist() == [bool(a["iscrowd"]) for a in theirs]
        for mask, annotation in zip(record["masks"], theirs):
            np.testing.assert_array_equal(masks.bitmap(mask, *record["size"]), reference.annToMask(annotation))


def test_to_coco_gives_back_the_file(root):
    found, file = data.open_source(config(root), "val2017").annotations.to_coco(), toy_coco.content(1)
    assert found["categories"] == sorted(file["categories"], key=lambda c: c["id"]) and found["images"] == file["images"]
    for ours, theirs in zip(found["annotations"], file["annotations"], strict=True):
        if isinstance(theirs["segmentation"], dict):
            counts = theirs["segmentation"]["counts"]
            rle = ours.pop("segmentation")["counts"]
            theirs = {key: value for key, value in theirs.items() if key != "segmentation"}
            expected = masks.run_lengths(rle).tolist() if isinstance(counts, list) else rle.decode()
            assert expected == counts
        assert ours == theirs


def test_training_leaves_out_crowds_and_images_without_objects(root):
    source = data.open_source(config(root), "train2017")
    assert len(source) == 3 and not source.annotations.crowd.any()
    assert len(data.open_source(config(root, train_split="other"), "train2017")) == 5


def test_pickled_source_gives_the_same_records(root):
    source = data.open_source(config(root), "train2017")
    again = pickle.loads(pickle.dumps(source))
    for index in range(len(source)):
        a, b = source[index], again[index]
        assert a["image"] == b["image"] and np.array_equal(a["boxes"], b["boxes"])
        assert [masks.bitmap(m, *a["size"]).sum() for m in a["masks"]] == [
            masks.bitmap(m, *b["size"]).sum() for m in b["masks"]
        ]


NAN, INF = float("nan"), float("inf")
BROKEN = {
    "box outside": (lambda a: a.update(bbox=[500, 2, 5, 5]), "its box (500, 2) to (505, 7) is outside the image of 80 x 60"),
    "box left of the image": (lambda a: a.update(bbox=[-9, 2, 9, 5]), "outside the image"),
    "no area": (lambda a: a.update(bbox=[5, 5, 0, 9]), "its box of 0 x 9 pixels has no area"),
    "negative": (lambda a: a.update(bbox=[5, 5, -3, 9]), "has no area"),
    "nan": (lambda a: a.update(bbox=[5, NAN, 3, 9]), "bbox has a number that is not finite"),
    "infinite": (lambda a: a.update(bbox=[5, 5, INF, 9]), "not finite"),
    "huge": (lambda a: a.update(bbox=[5, 5, 10**400, 9]), "not finite"),
    "three numbers": (lambda a: a.update(bbox=[5, 5, 9]), "bbox is [5, 5, 9] instead of x, y, width, height"),
    "text": (lambda a: a.update(bbox=["5", 5, 9, 9]), "instead of numbers"),
    "no bbox": (lambda a: a.pop("bbox"), "it has no bbox"),
    "unknown image": (lambda a: a.update(image_id=5), "its image 5 is not among the usable images"),
    "no image": (lambda a: a.pop("image_id"), "it has no image_id"),
    "image as text": (lambda a: a.update(image_id="1000"), "its image_id is '1000' instead of a whole number"),
    "unknown category": (lambda a: a.update(category_id=2), "its category 2 is unknown"),
    "no category": (lambda a: a.pop("category_id"), "it has no category_id"),
    "iscrowd": (lambda a: a.update(iscrowd="no"), "iscrowd is 'no' instead of 0 or 1"),
    "area": (lambda a: a.update(area=-4), "its area is -4"),
    "area nan": (lambda a: a.update(area=NAN), "area has a number that is not finite"),
    "two points": (lambda a: a.update(segmentation=[[1, 2, 3, 4]]), "a polygon has 4 coordinates; an even number from 6 on"),
    "odd": (lambda a: a.update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "a polygon has 7 coordinates"),
    "flat": (lambda a: a.update(segmentation=[1, 2, 3, 4, 5, 6]), "segmentation is no list of polygons"),
    "polygon text": (lambda a: a.update(segmentation=[["1", 2, 3, 4, 5, 6]]), "a polygon is ['1', 2, 3, 4, 5, 6] instead of"),
    "polygon pairs": (
        lambda a: a.update(segmentation=[[[1, 2], [3, 4], [5, 6], [7, 8], [9, 9], [1, 1]]]),
        "instead of numbers",
    ),
    "polygon huge": (lambda a: a.update(segmentation=[[1, 2, 3, 4, 5, 10**400]]), "instead of numbers"),
    "polygon nan": (lambda a: a.update(segmentation=[[1, 2, 3, 4, 5, NAN]]), "a polygon has a number that is not finite"),
    "polygon far": (lambda a: a.update(segmentation=[[1, 2, 3, 4, 5, 1e9]]), "a polygon reaches far outside the image"),
    "rle size": (lambda a: a.update(segmentation={"size": [9, 9], "counts": [81]}), "for a size of [9, 9] instead of [60, 80]"),
    "rle sum": (lambda a: a.update(segmentation={"size": [60, 80], "counts": [9]}), "sum to 9 instead of the image's 4800"),
    "rle sign": (lambda a: a.update(segmentation={"size": [60, 80], "counts": [4801, -1]}), "no whole number from 0 on"),
    "rle text": (lambda a: a.update(segmentation={"size": [60, 80], "counts": "~~"}), "run lengths are damaged"),
    "rle cut": (lambda a: a["segmentation"].update(counts=a["segmentation"]["counts"][:-2]), "run lengths"),
    "rle nothing": (lambda a: a.update(segmentation={"size": [60, 80]}), "the counts of its run lengths are None"),
    "segmentation": (lambda a: a.update(segmentation="x"), "segmentation is 'x' instead of polygons or run lengths"),
    "no object": (None, "annotation 1: it is 7 instead of an object"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_annotation_is_named_and_left_out_or_stops(root, case):
    change, reason = BROKEN[case]
    number = 1  # with run lengths, of image 1000
    found = toy_coco.content(1)
    if change is None:
        found["annotations"][number] = 7
    else:
        change(found["annotations"][number])
        reason = f"annotation of id 2: {reason}" if reason.startswith(("it", "b")) else reason
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(found))
    message = error(config(root, on_corrupt="stop"))
    assert reason in message and message.endswith("; mend the file, or go on without: --config.data.on_corrupt=skip")
    source = data.open_source(config(root), "val2017")
    assert len(source.broken) == 1 and reason in ": ".join(source.broken[0])
    assert len(source.annotations.labels) == len(found["annotations"]) - 1 and len(source) == 5


def test_missing_values_that_have_a_default(root):
    drop = lambda *keys: lambda a: [a.pop(key) for key in keys]
    with_annotations(
        root, drop("iscrowd", "id"), drop("area"), drop("area", "segmentation"), lambda a: a.update(segmentation=[])
    )
    source = data.open_source(config(root), "val2017")
    file = toy_coco.content(1)["annotations"]
    assert source.broken == [] and not source.annotations.crowd[0] and source.annotations.areas[1] == file[1]["area"]
    assert source.annotations.areas[2] == file[2]["bbox"][2] * file[2]["bbox"][3]
    assert source[0]["masks"][2:] == [None, None]


@pytest.mark.parametrize("change, reason", [
    (lambda i: i.pop("id"), "image 1: it has no id"),
    (lambda i: i.update(id=True), "its id is True instead of a whole number"),
    (lambda i: i.pop("file_name"), "it has no file_name"),
    (lambda i: i.update(width=0), "its size is 0 x 80 pixels"),
    (lambda i: i.update(height="80"), "its height is '80' instead of a whole number"),
])  # fmt: skip
def test_broken_image_takes_its_annotations_along(root, change, reason):
    found = toy_coco.content(1)
    change(found["images"][1])
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(found))
    source = data.open_source(config(root), "val2017")
    assert len(source) == 4 and len(source.broken) == 5 and reason in ": ".join(source.broken[0])


def _cut(text):
    return text[: len(text) // 2]


@pytest.mark.parametrize("change, message", [
    (_cut, "is no JSON or torn (line 1, column"),
    (lambda text: "", "is no JSON or torn"),
    (lambda text: "\udcff" + text, "is no JSON or torn"),
    (lambda text: "[" * 10**5, "is no JSON or torn"),
    (lambda text: "[]", "has no list 'images'"),
    (lambda text: text.replace('"annotations"', '"info"'), "has no list 'annotations'"),
    (lambda text: text.replace('"name": "zebra"', '"names": "zebra"'), "category of id 90: it has no name; mend the file"),
    (lambda text: text.replace('"id": 27', '"id": 90'), "category of id 90: id 90 occurs twice"),
    (lambda text: text.replace('"id": 963', '"id": 1000'), "image id 1000 occurs twice"),
    (lambda text: re.sub(r'"images": \[.*?\]', '"images": []', text), "has no usable image; choose another split"),
])  # fmt: skip
def test_unusable_file(root, change, message):
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(change(path.read_text()), errors="surrogateescape")
    assert message in error(config(root))


def _follow(c, message):
    """Sets what a message proposes."""
    for key, value in re.findall(r"--config\.data\.(\w+)=(\S+)", message.split(": ")[-1].split("; ")[-1]):
        c[key] = value
    return c


def test_each_remedy_of_the_layout_works(root, tmp_path):
    def mended(c, split="val2017"):
        for _ in range(3):
            try:
                return len(data.open_source(c, c.eval_split if split == "val2017" else c.train_split))
            except data.DataError as e:
                _follow(c, str(e))
        raise AssertionError(error(c))

    assert "set --config.data.dir to the folder" in error(config(tmp_path / "none"))
    assert mended(config(root, eval_split="validation")) == 5
    assert mended(config(root, eval_split="validation", dir=str(root.parent))) == 5
    assert mended(config(root / "annotations")) == 5
    assert mended(config(root, train_split="train"), "train") == 3
    (root / "images").mkdir()
    (root / "val2017").rename(root / "images" / "val2017")
    assert mended(config(root)) == 5
    other = tmp_path / "other"
    for split in ("train", "valid"):  # files beside the images
        toy_coco.write(other, [split])
        (other / "annotations" / f"instances_{split}.json").rename(other / split / "_annotations.coco.json")
    (other / "annotations").rmdir()
    c = config(other, train_split="train", eval_split="valid")
    assert mended(c) == 5
    assert c.annotations == "{split}/_annotations.coco.json" and len(data.open_source(c, "train")) == 3


def test_the_folder_must_be_set():
    with pytest.raises(data.DataError, match="data.dir.* set --config.data.dir"):
        data.open_source(config(""), "val2017")


def test_images_that_are_missing(root):
    source = data.open_source(config(root), "val2017")
    (root / "val2017" / "001000.png").unlink()
    with pytest.raises(data.CorruptImage, match="cannot be read"):
        source[0]
    for path in root.glob("*/*.png"):
        path.unlink()
    assert "has none of the images such as 001000.png; put them there, or set --config.data.images" in error(config(root))


def test_labels_mean_the_train_splits_classes(root):
    found = toy_coco.content(1)
    found["categories"] = [{"id": 5, "name": "zebra"}, {"id": 7, "name": "person"}, {"id": 9, "name": "backpack"}]
    ids = {90: 5, 1: 7, 27: 9}
    names = {c["id"]: c["name"] for c in found["categories"]}
    for annotation in found["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(found))
    assert coco_parsing.class_names(str(path)) == ("zebra", "person", "backpack")
    for source in (
        data.open_source(config(root), "val2017"),
        data.open_source(config(root), "val2017", class_names=("backpack", "bird", "zebra", "person")),
    ):
        assert [source.class_names[label] for label in source.annotations.labels] == [
            names[a["category_id"]] for a in found["annotations"]
        ]
        assert [a["category_id"] for a in source.annotations.to_coco()["annotations"]] == [
            a["category_id"] for a in found["annotations"]
        ]
    with pytest.raises(data.DataError, match="must mean 2 classes.*has 3, and it has backpack; set --config.data.dir"):
        data.open_source(config(root), "val2017", class_names=("zebra", "person"))


def test_run_lengths_are_pycocotools_own():
    rng = np.random.default_rng(0)
    for density in (0, 0.001, 0.3, 1):
        mask = rng.random((300, 411)) < density
        rle = codec.encode(np.asfortranarray(mask, np.uint8))
        assert masks.run_lengths(rle["counts"]).tolist() == toy_coco.uncompressed(mask)["counts"]


def test_without_pycocotools_the_run_ends_with_the_remedy(root, monkeypatch):
    source = data.open_source(config(root, image_size=64), "train2017")
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    transform = data.DetectionTransform(config(root, image_size=64), num_classes=3, training=True)
    with (
        data.train_batches(source, transform, config(root, num_threads=1), batch_size=2, seed=0) as loader,
        pytest.raises(data.DataError, match=r"pip install -e '.\[detection\]'"),
    ):
        next(loader)


def test_worker_processes_and_loader(root):
    c = config(root, image_size=64, num_threads=1, num_workers=1)
    source = CocoSource(str(root), "val2017")
    transform = data.DetectionTransform(c, num_classes=3, training=False)
    batches = {}
    for workers in (0, 1):
        c.num_workers = workers
        with data.eval_batches(source, transform, c, batch_size=4) as loader:
            batches[workers] = [copy.deepcopy(batch) for batch in loader]
    assert [batch["mask"].tolist() for batch in batches[0]] == [[True] * 4, [True, False, False, False]]
    for a, b in zip(batches[0], batches[1], strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
