"""The evaluator gives what pycocotools gives when it is called on files, for any batches."""

import contextlib
import importlib.util
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import toy_coco
from pycocotools import mask as codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from halonet_jax.data import annotations, masks
from halonet_jax.data.coco import CocoSource
from halonet_jax.errors import DataError
from halonet_jax.evaluating import files
from halonet_jax.tasks.coco_metrics import BACKENDS, CocoEvaluator

SIDE, MOST = 96, 12
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco") / "set"
    return CocoSource(str(toy_coco.write(root, ["val"], toy_coco.content(3, images=12))), "val")


def detect(source, noise, seed=0, size=28):
    """Rows of detections: the objects with noise, and some that are not there. Scores have ties."""
    rows = []
    for index in range(len(source)):
        rng = np.random.default_rng((seed, index))
        record = source.annotations.record(index)
        height, width = record["size"]
        scale = SIDE / max(height, width)
        row = {
            "index": np.int32(index), "mask": np.bool_(True), "scale": np.array([scale, scale], np.float32),
            "boxes": np.zeros((MOST, 4), np.float32), "scores": np.full(MOST, -np.inf, np.float32),
            "classes": np.zeros(MOST, np.int32), "valid": np.zeros(MOST, bool), "masks": np.zeros((MOST, size, size), np.float32),
        }  # fmt: skip
        own = np.flatnonzero(~record["crowd"])
        for place, n in enumerate([*own, *(own[:2] if noise else [])]):
            box = record["boxes"][n] + noise * rng.normal(0, 4, 4) * (place % 3)
            if (box[2:] - box[:2] < 1).any():
                continue
            row["boxes"][place], row["valid"][place] = box * scale, True
            row["classes"][place] = record["classes"][n] if not noise or place % 4 else rng.integers(3)
            row["scores"][place] = np.round(rng.uniform(0.2, 1), 1) if noise else 1
            row["masks"][place] = masks.in_frame(record["masks"][n], box, size)
        rows.append(row)
    return rows


def batches(rows, size, order=None):
    """Batches of `size`; the last one is filled with masked rows that repeat the first."""
    rows = [rows[i] for i in (order if order is not None else range(len(rows)))]
    rows += [{**rows[0], "mask": np.bool_(False)}] * (-len(rows) % size)
    for first in range(0, len(rows), size):
        yield {key: np.stack([row[key] for row in rows[first : first + size]]) for key in rows[0]}


def evaluate(source, rows, size=4, order=None, **options):
    evaluator = CocoEvaluator(source.annotations, **options)
    for batch in batches(rows, size, order):
        evaluator.add(batch)
    return evaluator


def by_pycocotools(tmp_path, path, results, kind, images=None, category=None):
    """The six numbers, from files; for one category alone if it is given."""
    results = [{k: v for k, v in r.items() if k != ("segmentation" if kind == "bbox" else "bbox")} for r in results]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), kind)
        if images is not None:
            evaluation.params.imgIds = images
        if category is not None:
            evaluation.params.catIds = [category]
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return evaluation.stats[:6]


@pytest.mark.parametrize("noise", [0, 1])
def test_equal_to_pycocotools_on_files(source, tmp_path, noise):
    evaluator = evaluate(source, detect(source, noise))
    evaluator.write(tmp_path / "ours.json")
    results = json.loads((tmp_path / "ours.json").read_text())
    found = evaluator.result()
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        expected = by_pycocotools(tmp_path, source._path, results, kind)
        np.testing.assert_allclose([found[f"{name}_{key}"] for key in NAMES], expected, rtol=0, atol=1e-12)
    assert found["count"] == 12
    assert (0.1 < found["box_ap"] < 0.9) if noise else found["box_ap"] == pytest.approx(1)


def test_ground_truth_as_detections_gives_1(source):
    found = evaluate(source, detect(source, 0, size=112)).result()
    assert found["box_ap"] == found["mask_ap50"] == pytest.approx(1) and found["mask_ap"] > 0.85
    rows = detect(source, 0, size=4)
    for row in rows:  # masks as they are, in pixels of the input
        record = source.annotations.record(int(row["index"]))
        del row["masks"]
        row["scale"], row["full_masks"] = np.ones(2, np.float32), np.zeros((MOST, SIDE, SIDE), bool)
        own = np.flatnonzero(~record["crowd"])
        height, width = record["size"]
        for place, n in enumerate(own):
            row["boxes"][place] = record["boxes"][n]
            row["full_masks"][place, :height, :width] = masks.bitmap(record["masks"][n], height, width)
    found = evaluate(source, rows).result()
    assert found["box_ap"] == found["mask_ap"] == pytest.approx(1)


@pytest.mark.parametrize("size", [1, 3, 8, 12, 16])
def test_batches_and_order_do_not_matter(source, size):
    rows = detect(source, 1)
    expected = evaluate(source, rows, 4)
    other = evaluate(source, rows, size, np.random.default_rng(size).permutation(12))
    assert other.result() == expected.result() and other.detections() == expected.detections()
    assert other.per_class() == expected.per_class()


def test_crowds_neither_help_nor_harm(source):
    rows = detect(source, 0)
    at = next(i for i in range(12) if source.annotations.record(i)["crowd"].any())
    record, row = source.annotations.record(at), rows[at]
    n = int(np.flatnonzero(record["crowd"])[0])
    extra = int(row["valid"].sum())
    row["boxes"][extra : extra + 3] = record["boxes"][n] * row["scale"][0]  # three detections within one crowd
    row["masks"][extra : extra + 3] = masks.in_frame(record["masks"][n], record["boxes"][n], 28)
    row["classes"][extra : extra + 3], row["scores"][extra : extra + 3], row["valid"][extra : extra + 3] = (
        record["classes"][n],
        1,
        True,
    )
    assert evaluate(source, rows).result()["box_ap"] == pytest.approx(1)
    row["classes"][extra : extra + 3] = (record["classes"][n] + 1) % 3  # of another class, they are false
    assert evaluate(source, rows).result()["box_ap"] < 0.99


def test_images_without_objects_or_detections(source, tmp_path):
    rows = detect(source, 0)
    best = evaluate(source, rows).result()["box_ap"]
    empty = len(rows) - 1
    rows[empty]["boxes"][0], rows[empty]["scores"][0], rows[empty]["valid"][0] = (2, 2, 40, 40), 1, True
    false_one = evaluate(source, rows).result()["box_ap"]
    assert false_one < best
    rows[0]["valid"][:] = False
    evaluator = evaluate(source, rows)
    expected = by_pycocotools(tmp_path, source._path, evaluator.detections(), "bbox")
    np.testing.assert_allclose(evaluator.result()["box_ap"], expected[0], atol=1e-12)
    for row in rows:
        row["valid"][:] = False
    found = evaluate(source, rows).result()
    assert found["box_ap"] == found["mask_ap"] == 0 and found["count"] == 12
    nothing = CocoEvaluator(source.annotations)
    assert nothing.result() == {**{f"box_{name}": -1 for name in NAMES}, "count": 0}
    assert nothing.detections() == []


def test_images_that_were_masked_do_not_count(source, tmp_path):
    rows = detect(source, 1)
    rows[2]["mask"] = np.bool_(False)
    evaluator = evaluate(source, rows)
    images = [i for n, i in enumerate(source.annotations.image_ids.tolist()) if n != 2]
    expected = by_pycocotools(tmp_path, source._path, evaluator.detections(), "bbox", images)
    np.testing.assert_allclose([evaluator.result()[f"box_{key}"] for key in NAMES], expected, atol=1e-12)
    assert evaluator.result()["count"] == 11


def test_broken_detections_are_left_out(source):
    rows = detect(source, 0)
    expected = evaluate(source, rows).result()
    for row in rows:
        free = np.flatnonzero(~row["valid"])[:5]
        row["valid"][free], row["scores"][free], row["classes"][free] = True, (np.nan, 1, 1, 1, 1), (0, 0, 0, 3, -1)
        row["boxes"][free] = ((1, 1, 9, 9), (1, np.inf, np.nan, 9), (900, 900, 990, 990), (1, 1, 9, 9), (1, 1, 9, 9))
    assert evaluate(source, rows).result() == expected


def test_per_class(source, tmp_path):
    """Each class as if it were alone; a class without objects has -1 and no part in the mean."""
    rows, annotated = detect(source, 1), source.annotations
    evaluator = evaluate(source, rows)
    table, found = evaluator.per_class(), evaluator.result()
    assert [row["class"] for row in table] == list(source.class_names)
    assert [row["objects"] for row in table] == np.bincount(annotated.labels[~annotated.crowd], minlength=3).tolist()
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        for row, category in zip(table, annotated.category_ids.tolist()):
            expected = by_pycocotools(tmp_path, source._path, evaluator.detections(), kind, category=category)
            np.testing.assert_allclose([row[f"{name}_ap"], row[f"{name}_ap50"]], expected[:2], rtol=0, atol=1e-12)
        for key in (f"{name}_ap", f"{name}_ap50"):
            assert np.mean([row[key] for row in table]) == pytest.approx(found[key], abs=1e-12)

    records = [{**annotated.record(n), "image": np.zeros((*annotated.sizes[n], 3), np.uint8)} for n in range(12)]
    evaluator = evaluate(SimpleNamespace(annotations=annotations.of_records(records, (*source.class_names, "bird"))), rows)
    table, found = evaluator.per_class(), evaluator.result()
    assert table[3] == {"class": "bird", "objects": 0, "box_ap": -1, "box_ap50": -1, "mask_ap": -1, "mask_ap50": -1}
    assert np.mean([row["mask_ap"] for row in table[:3]]) == pytest.approx(found["mask_ap"], abs=1e-12)
    head, *lines = files.table(table).splitlines()
    assert head == "class,objects,box_ap,box_ap50,mask_ap,mask_ap50"
    assert lines[3] == "bird,0,,,," and not any(",," in line for line in lines[:3])


def test_boxes_alone_and_bytes_for_masks(source):
    rows = detect(source, 1)
    expected = evaluate(source, rows).result()
    as_bytes = [{**row, "masks": (row["masks"] * 255).astype(np.uint8)} for row in rows]
    assert evaluate(source, as_bytes).result() == expected
    boxes = evaluate(source, [{k: v for k, v in row.items() if k != "masks"} for row in rows])
    assert boxes.result() == {k: v for k, v in expected.items() if not k.startswith("mask")}
    assert "segmentation" not in boxes.detections()[0] and "mask_ap" not in boxes.per_class()[0]


def test_objects_without_masks_leave_boxes_alone(source):
    record = source.annotations.record(0)
    record = {**record, "image": np.zeros((*record["size"], 3), np.uint8), "masks": [None, *record["masks"][1:]]}
    evaluator = CocoEvaluator(annotations.of_records([record], source.class_names))
    evaluator.add(next(batches(detect(source, 0)[:1], 1)))
    assert evaluator.result()["box_ap"] == pytest.approx(1) and "mask_ap" not in evaluator.result()


def test_results_in_cocos_format(source):
    rows = detect(source, 0)
    found = evaluate(source, rows).detections()
    first = found[0]
    assert set(first) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert first["image_id"] == source.annotations.image_ids[0] and first["category_id"] in (1, 27, 90)
    x, y, w, h = first["bbox"]
    np.testing.assert_allclose(source.annotations.boxes[0], (x, y, w, h), atol=1e-3)
    assert codec.decode(first["segmentation"]).shape == tuple(source.annotations.sizes[0])


def test_drawn_records(source):
    records = [
        {**source.annotations.record(i), "image": np.zeros((*source.annotations.sizes[i], 3), np.uint8)} for i in range(12)
    ]
    drawn = annotations.of_records(records, source.class_names)
    ours, theirs = CocoEvaluator(drawn), CocoEvaluator(source.annotations)
    for batch in batches(detect(source, 1), 4):
        ours.add(batch), theirs.add(batch)
    # The order of images by their ids decides between equal scores; these are the other way round.
    assert ours.result()["box_ap"] == pytest.approx(theirs.result()["box_ap"], abs=0.05)


def test_back_ends(source):
    with pytest.raises(DataError, match="use one of pycocotools, faster_coco_eval"):
        CocoEvaluator(source.annotations, "tpu")
    if importlib.util.find_spec("faster_coco_eval") is None:
        with pytest.raises(DataError, match="pip install faster-coco-eval"):
            CocoEvaluator(source.annotations, BACKENDS[1])
        return
    rows = detect(source, 1)
    expected, found = evaluate(source, rows).result(), evaluate(source, rows, backend=BACKENDS[1]).result()
    assert found == pytest.approx(expected, abs=1e-12)
