"""A detector on a data set of COCO's layout, trained and evaluated over two processes: exact counts, and one process's results.
`predict` and an export give the same.

The split's ids and names are its own, and its last batch is ragged.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import small_detector
import toy_coco
from entries import command, join_flags, metrics, start, wait_for

from halonet_jax import evaluate, export, predict
from halonet_jax.tasks import detection

ENTRY = "tests/small_detector.py"
CONFIG = {
    "data.source": "coco", "data.train_split": "learn", "data.eval_split": "check", "data.image_size": 48, "batch_size": 4,
    "eval_batch_size": 4, "max_steps": 2, "tensorboard": False, "model.bn_group_size": 1, "detection.mask_convs": 0,
    "detection.box_dense": "(8,)",
}  # fmt: skip


def on_two_processes(*arguments):
    done = wait_for([start([*command(ENTRY, *arguments), *flags], devices=2) for flags in join_flags(2)])
    assert [process.returncode for process in done] == [0, 0], done
    return done


def evaluated(workdir):
    """What an evaluation wrote: its JSON, the detections, and the rows of the table."""
    stem = workdir / "eval_check_2"
    found, detections = (json.loads(stem.with_name(f"{stem.name}{end}.json").read_text()) for end in ("", "_detections"))
    return found, detections, list(csv.DictReader(stem.with_name(f"{stem.name}_per_class.csv").open()))


def test_two_processes_train_and_evaluate_like_one_which_predicts_and_exports(tmp_path, monkeypatch):
    root, workdir = tmp_path / "coco", tmp_path / "run"
    toy_coco.write(root, ["learn"], toy_coco.content(3, images=10))
    truth = toy_coco.content(4, images=10)
    toy_coco.write(root, ["check"], truth)
    overrides = [f"--config.{key}={value}" for key, value in (CONFIG | {"data.dir": root}).items()]
    first, second = on_two_processes(
        "train", "--config=configs/digit_scenes_mask_rcnn.py:smoke", f"--workdir={workdir}", *overrides
    )
    assert "8 images, 3 classes; step 0 of 2, batch 4 on 4 cpu device(s) on 2 hosts" in first.stdout
    assert "step" not in second.stdout  # one writer
    in_training = metrics(workdir)[-1]

    on_two_processes("evaluate", f"--workdir={workdir}", "--per_class")
    found, detections, rows = evaluated(workdir)
    monkeypatch.setattr(detection, "make_model", small_detector.make_model)
    evaluate.evaluate(str(workdir), out=str(tmp_path), per_class=True)
    alone, their_detections, their_rows = evaluated(tmp_path)

    assert found["count"] == alone["count"] == in_training["eval/count"] == 10 and found["corrupt"] == 0
    keys = [key for key in found if key.startswith(("box_", "mask_"))]
    assert len(keys) == 12
    for key in keys:
        assert found[key] == in_training[f"eval/{key}"] == pytest.approx(alone[key], abs=1e-6), key
    assert [d["image_id"] for d in detections] == [d["image_id"] for d in their_detections]
    np.testing.assert_allclose([d["bbox"] for d in detections], [d["bbox"] for d in their_detections], atol=0.01)
    assert {d["category_id"] for d in detections} <= {1, 27, 90}
    assert len({d["image_id"] for d in detections}) == 10  # each has some

    names = {c["id"]: c["name"] for c in truth["categories"]}
    counted = [names[a["category_id"]] for a in truth["annotations"] if not a["iscrowd"]]
    assert [(row["class"], int(row["objects"])) for row in rows] == [
        (name, counted.count(name)) for _, name in sorted(names.items())
    ]
    for key in ("box_ap", "mask_ap", "box_ap50", "mask_ap50"):
        shares = [float(row[key]) for row in rows if row[key]]
        assert np.mean(shares) == pytest.approx(found[key], abs=1e-12)
    assert their_rows[0].keys() == rows[0].keys() == {"class", "objects", "box_ap", "box_ap50", "mask_ap", "mask_ap50"}

    category_of = {c["name"]: c["id"] for c in truth["categories"]}
    predicted = [
        (int(Path(image.file).stem), category_of[each.name], list(each.box), each.score, each.mask["counts"])
        for image in predict.predict(str(workdir), [root / "check"], min_score=0)
        for each in image.objects
    ]
    assert sorted(predicted) == sorted(
        (d["image_id"], d["category_id"], d["bbox"], d["score"], d["segmentation"]["counts"]) for d in their_detections
    )
    export.export(str(workdir), tmp_path / "exported", log=lambda line: None)
    of_export = evaluate.evaluate(model=str(tmp_path / "exported"), data_dir=str(root))
    assert {key: of_export[key] for key in keys} == {key: alone[key] for key in keys}
