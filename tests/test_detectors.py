"""Detectors in predict, in exports and on the page: boxes and masks in the pixels of the files, equal to the evaluation's."""

import csv
import io
import json
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import small_detector
import toy_detector
import yaml
from entries import command, run
from PIL import Image
from pycocotools import mask as codec

import halonet_jax
from halonet_jax import data, demo, evaluate, export, exporting, predict
from halonet_jax.errors import ConfigError, DataError, ExportError, StorageError
from halonet_jax.exporting import checking
from halonet_jax.exporting import detection as exported_detection
from halonet_jax.predicting import detections, running, writers
from halonet_jax.predicting.results import DetectedObject, Detections
from halonet_jax.tasks import detection

MAKE_MODEL = detection.make_model


@pytest.fixture(scope="module")
def tiny():
    """All detectors of this process are tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, "make_model", small_detector.make_model)
        yield


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return toy_detector.write(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory):
    return evaluate.evaluate(model=folder, out=str(tmp_path_factory.mktemp("evaluated")), batch_size=8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The five scenes of the evaluation, then other files. "wide" is the upright "turned"."""
    made, scenes = tmp_path_factory.mktemp("photos"), data.open_source(toy_detector.config().data, "test")
    images = {f"{n}.png": scenes[n]["image"] for n in range(5)}
    images |= {"pixel.png": np.full((1, 1, 3), 200, np.uint8), "thin.png": np.full((300, 1, 3), 200, np.uint8)}
    wide = cv2.resize(np.hstack([images["0.png"], images["1.png"]]), (250, 130))
    images |= {"wide.png": wide, "gray.png": images["2.png"][..., 0]}
    for name, image in images.items():
        Image.fromarray(image).save(made / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(wide)).save(made / "turned.png", exif=exif)
    (made / "text.jpg").write_text("no image")
    return made


@pytest.fixture(scope="module")
def found(folder, photos, tmp_path_factory):
    """By file name, with pictures."""
    pictures = str(tmp_path_factory.mktemp("pictures"))
    results = predict.predict(folder, [photos], batch_size=8, min_score=0, pictures=pictures)
    return {result.file.rpartition("/")[2]: result for result in results}


def test_predictions_are_those_of_the_evaluation(found, evaluated):
    (path,) = (path for path in evaluated["files"] if path.endswith("_detections.json"))
    expected = {}
    for each in json.loads(Path(path).read_text()):
        values = each["category_id"], each["bbox"], each["score"], each["segmentation"]
        expected.setdefault(each["image_id"], []).append(values)
    first = min(expected)
    assert sum(map(len, expected.values())) > 20
    for n in range(5):
        assert expected[first + n] == [
            (toy_detector.NAMES.index(x.name) + 1, list(x.box), x.score, x.mask) for x in found[f"{n}.png"].objects
        ]


def test_boxes_and_masks_lie_in_the_upright_image(found):
    assert found["wide.png"].objects == found["turned.png"].objects
    for name, height, width in (("wide.png", 130, 250), ("turned.png", 130, 250), ("thin.png", 300, 1), ("pixel.png", 1, 1)):
        result = found[name]
        assert (result.height, result.width) == (height, width) and result.objects and not result.error
        for each in result.objects:
            x, y, w, h = each.box
            assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= width + 1e-9 and y + h <= height + 1e-9
            pixels = codec.decode(each.mask)
            assert pixels.shape == (height, width)
            rows, columns = np.nonzero(pixels)  # a pixel counts by its centre, which lies in the box
            assert not len(rows) or (rows.min() + 0.5 >= y and rows.max() + 0.5 <= y + h)
            assert not len(rows) or (columns.min() + 0.5 >= x and columns.max() + 0.5 <= x + w)
        scores = [each.score for each in result.objects]
        assert scores == sorted(scores, reverse=True)
    assert found["gray.png"].objects
    assert found["text.jpg"] == Detections(found["text.jpg"].file, error="no JPEG, PNG, WebP or BMP image in its 8 bytes")


def test_pictures_show_the_whole_image(found, photos):
    for name, size in (("wide.png", (260, 500)), ("turned.png", (260, 500)), ("pixel.png", (480, 480))):
        picture = cv2.imread(found[name].picture)
        assert picture.shape[:2] == size and re.search(rf"/\d\d_{name[:-4]}\.png$", found[name].picture)
    plain = cv2.resize(cv2.imread(str(photos / "wide.png")), (500, 260), interpolation=cv2.INTER_CUBIC)
    assert (np.abs(cv2.imread(found["wide.png"].picture).astype(int) - plain) > 30).mean() > 0.01
    assert found["text.jpg"].picture == ""


def test_the_best_objects_that_have_the_score():
    values = {
        "boxes": np.array([[2, 4, 6, 8], [0, 0, 0, 9], [1, 1, 9, 9], [3, 3, 5, 5]], np.float32), "classes": np.array([1, 0, 0, 1]),
        "scores": np.array([0.9, 0.8, 0.5, 0.4], np.float32), "valid": np.ones(4, bool), "masks": np.full((4, 2, 2), 255, np.uint8),
        "scale": np.array([0.5, 1], np.float32), "original_size": np.array([20, 10]),
    }  # fmt: skip
    for options, places in (
        ({"min_score": 0}, [0, 2, 3]),  # the second has no area
        ({"min_score": 0.5}, [0, 2]),  # at least, not more than
        ({"min_score": 0, "top": 2}, [0, 2]),
        ({"min_score": 1}, []),
    ):
        assert [each.place for each in detections.restore(values, "ab", **options)] == places
    first = detections.as_object(detections.restore(values, "ab", 0)[0], "ab")
    assert first.name == "b" and first.box == (4, 4, 4, 8) and codec.decode(first.mask)[5:11, 4:8].all()


OBJECT = DetectedObject('a "cat", big', 0.75, (1.5, 2.0, 30.25, 4.0), {"size": [48, 64], "counts": "abc"})
RESULTS = [Detections("a b.jpg", (OBJECT, OBJECT), 48, 64, picture="p/1.png"), Detections("c.jpg", (), 8, 9, picture="p/2.png")]


def test_formats():
    texts = {}
    for name in writers.FORMATS:
        out = io.StringIO()
        writer = writers.Writer(out, name, writers.DetectionLayout(0.5, pictures=True))
        for result in RESULTS:
            writer.add(result)
        writer.close()
        texts[name] = out.getvalue()
    line = '  0.750  a "cat", big  x 1.5, y 2.0, width 30.2, height 4.0'
    last = ["c.jpg (9 × 8)", "  nothing with a score of 0.5 or more"]
    assert texts["text"].splitlines() == ["a b.jpg (64 × 48)", line, line, *last]
    head, *rows = csv.reader(io.StringIO(texts["csv"]))
    assert head == ["file", "class", "score", "x", "y", "width", "height", "picture"]
    assert rows == [["a b.jpg", 'a "cat", big', "0.75", "1.5", "2", "30.25", "4", "p/1.png"]] * 2
    one, two = json.loads(texts["json"])
    assert one["detections"][0] == {"class": OBJECT.name, "score": 0.75, "box": [1.5, 2, 30.25, 4], "mask": OBJECT.mask}
    assert [two[key] for key in ("file", "height", "width", "detections", "picture")] == ["c.jpg", 8, 9, [], "p/2.png"]


@pytest.mark.parametrize("options, message", [
    ({"min_score": 2}, "min_score=2 must be between 0 and 1"),
    ({"min_score": float("nan")}, "min_score=nan must be between 0 and 1"),
    ({"top": 0}, "top=0 must be at least 1"),
    ({"attention": "x"}, "attention is for task='classification', and .* for 'detection'; leave attention out; pictures draws"),
    ({"places": [(0.5, 0.5)]}, r"places \(--at\) is for task='classification'"),
    ({"attention": "x", "heads": True}, "attention and heads are for task='classification', .*; leave them out"),
    ({"heads": True}, "heads is for task='classification'"),
    ({"pictures": "/dev/null/x"}, "cannot be made .* give another --pictures"),
])  # fmt: skip
def test_mistakes(folder, photos, options, message):
    with pytest.raises(ConfigError, match=message) as raised:
        predict.predict(folder, [photos / "0.png"], **options)
    assert "\n" not in str(raised.value)


def test_pictures_replace_no_image_and_take_long_names(photos, tmp_path):
    for name in ("x.png", "1_x.png"):
        (tmp_path / name).write_bytes((photos / "0.png").read_bytes())
    source = data.FileSource([tmp_path / "x.png", tmp_path / "1_x.png"])
    with pytest.raises(ConfigError, match="pictures=.* would replace the image .*1_x.png; give another folder"):
        running.PictureFolder(str(tmp_path), "pictures", source)
    pictures = running.PictureFolder(str(tmp_path / "pictures"), "pictures", source)
    for name in ("a" * 250, "\U0001f600" * 60, "\udcff" * 250):
        pictures.file(0, f"{name}.jpg").write_bytes(b"")


@pytest.fixture
def source(tmp_path):
    (tmp_path / "image.png").write_bytes(b"kept")
    return data.FileSource(tmp_path / "image.png")


@pytest.mark.parametrize("out, error, message", [
    ("/dev/full", StorageError, r"/dev/full cannot be written \(.*No space left on device\); make room"),
    ("image.png", DataError, "--out=.*image.png would replace that image; give another file"),
    ("none/x.json", DataError, "--out=.*x.json cannot be written .* give another file"),
    (None, DataError, "stdout is closed; give --out=FILE"),
])  # fmt: skip
def test_results_that_cannot_be_written(source, tmp_path, monkeypatch, out, error, message):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(error, match=message):
        predict._write(iter(RESULTS), writers.DetectionLayout(0.5, False), "json", out and str(tmp_path / out), source)
    assert (tmp_path / "image.png").read_bytes() == b"kept"


@pytest.mark.parametrize("file_format", writers.FORMATS)
def test_stdout_is_utf8_whatever_the_locale(source, monkeypatch, file_format):
    written, name = io.BytesIO(), "\u65e5\U0001f600\udcff"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    results = [Detections(name, (OBJECT,), 48, 64)]
    assert predict._write(iter(results), writers.DetectionLayout(0.5, False), file_format, None, source) == 0
    if file_format == "json":
        assert json.loads(written.getvalue().decode())[0]["file"] == name
    else:
        assert name.encode(errors="surrogateescape") in written.getvalue()


def test_the_command(photos, tmp_path, monkeypatch):
    """With a model as its config makes it."""
    monkeypatch.setattr(detection, "make_model", MAKE_MODEL)
    model, out = toy_detector.write(tmp_path), tmp_path / "out.json"
    done = run(
        command(
            "predict", f"--model={model}", str(photos / "wide.png"), str(photos / "text.jpg"), "--format=json", f"--out={out}",
            f"--pictures={tmp_path / 'pictures'}", "--min_score=0.1", "--top=3",
        ), code=1,
    )  # fmt: skip
    assert "text.jpg: no JPEG, PNG, WebP or BMP image" in done.stderr and "skipped 1 that cannot be read" in done.stderr
    (record,) = json.loads(out.read_text())
    assert len(record["detections"]) == 3 and codec.decode(record["detections"][0]["mask"]).shape == (130, 250)
    assert record["picture"] == str(tmp_path / "pictures" / "1_wide.png")
    assert record["detections"][0]["class"] in toy_detector.NAMES


# --- exports


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("exported") / "toy", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checking, "BATCH_SIZES", (5,))  # each size is a program of its own
        export.export(folder, out, ["weights", "stablehlo", "savedmodel"], log=lines.append)
    return out, lines


@pytest.mark.parametrize("name", ("weights", "stablehlo", "savedmodel"))
def test_an_export_finds_what_the_checkpoint_does(name, exported, evaluated, tmp_path):
    out, lines = exported
    checks = json.loads((out / "export.json").read_text())["checks"][name]
    for check in checks:
        assert check["objects"] > 20 and check["max_error"] <= check["tolerance"] == (0 if name == "weights" else 1e-4)
        assert any(f"{check['artefact']}: largest error {check['max_error']:.2g} of {check['objects']} obj" in x for x in lines)
    assert halonet_jax.load(str(out)).metadata["class_names"] == toy_detector.NAMES
    result = evaluate.evaluate(model=str(out), format=name, out=str(tmp_path), batch_size=8)
    for key in ("box_ap", "mask_ap", "box_ap50", "mask_ap50", "count"):
        assert result[key] == pytest.approx(evaluated[key], abs=0 if name == "weights" else 1e-3)
    ours, theirs = (json.loads(Path(found["files"][0]).read_text()) for found in (result, evaluated))
    assert len(ours) == len(theirs) > 20
    np.testing.assert_allclose([x["score"] for x in ours], [x["score"] for x in theirs], atol=1e-4)


def test_the_card_of_a_detector(exported):
    _, front_matter, text = (exported[0] / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(front_matter)
    assert about["pipeline_tag"] == "object-detection"
    metrics = about["model-index"][0]["results"][0]["metrics"]
    assert [(metric["name"], metric["value"]) for metric in metrics] == [("box_ap", 0.25)]
    assert "`sizes`, float32 `[batch, 2]`" in text and "(top, left, bottom, right)" in text and "the paper's" not in text[400:]
    assert all(f"{name}:\n\n```python" in text for name in ("weights", "stablehlo", "savedmodel"))


def test_formats_that_hold_no_detector_are_refused_before_they_ask_for_a_package(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting.FORMATS["onnx"], "PACKAGES", ("no_such_package",))
    with pytest.raises(
        ExportError, match="onnx does not serve task='detection', .*; use one or more of weights,stablehlo,save"
    ):
        export.export(folder, tmp_path / "out", ["weights", "onnx"])
    assert not list(tmp_path.iterdir())


def outputs(**changes):
    """Twenty objects of one image."""
    rng = np.random.default_rng(0)
    made = {
        "boxes": rng.uniform(0, 48, (1, 20, 4)), "scores": np.sort(rng.uniform(size=(1, 20)))[:, ::-1],
        "classes": np.arange(20)[None] % 4, "valid": np.ones((1, 20), bool), "masks": rng.uniform(size=(1, 20, 3, 3)),
    }  # fmt: skip
    return made | changes


@pytest.mark.parametrize("changes, problem", [
    ({}, ""),
    ({name: outputs()[name][:, ::-1] for name in outputs()}, ""),  # another order
    ({"valid": np.arange(20)[None] < 19}, ""),  # one is at the limit of a comparison
    ({"valid": np.arange(20)[None] < 17}, "finds other objects: "),
    ({"boxes": outputs()["boxes"] + 1}, "finds other objects: 20 of 20 have no counterpart"),
    ({"classes": outputs()["classes"] + 1}, "finds other objects"),
    ({"masks": outputs()["masks"] * np.nan}, "finds other objects"),
    ({"boxes": np.zeros((1, 9, 4))}, "gives boxes [1, 9, 4] instead of [1, 20, 4]"),
])  # fmt: skip
def test_what_counts_as_the_same_objects(changes, problem, folder):
    task = halonet_jax.load(folder).task
    difference = exported_detection.INTERFACE.compare(outputs(), outputs(**changes), task, 1e-4)
    assert difference.problem.startswith(problem) and bool(difference.problem) == bool(problem)
    exact = exported_detection.INTERFACE.compare(outputs(), outputs(**changes), task, 0.0)
    assert (exact.error == 0) == (not changes)


def test_an_export_that_finds_nothing_is_wrong(folder):
    one, none = outputs(valid=np.arange(20)[None] < 1), outputs(valid=np.zeros((1, 20), bool))
    task = halonet_jax.load(folder).task
    assert "1 of 1 have no counterpart" in exported_detection.INTERFACE.compare(one, none, task, 1e-4).problem
    assert not exported_detection.INTERFACE.compare(none, none, task, 1e-4).problem


# --- the page


def test_the_page_shows_objects(folder, found, photos):
    testclient = pytest.importorskip("starlette.testclient", exc_type=ImportError)
    page = testclient.TestClient(demo.make_app(halonet_jax.load(folder), min_score=0.3), base_url="http://localhost:8000")
    about = page.get("/about").json()
    assert about["task"] == "detection" and about["figures"]["box_ap"] == 0.25
    answer = page.post("/classify", content=(photos / "turned.png").read_bytes()).json()
    expected = [each for each in found["wide.png"].objects if each.score >= 0.3]
    assert [each["class"] for each in answer["objects"]] == [each.name for each in expected] and expected
    np.testing.assert_allclose([each["score"] for each in answer["objects"]], [each.score for each in expected], atol=1e-5)
    assert all(re.fullmatch("#[0-9a-f]{6}", each["color"]) for each in answer["objects"])
    assert answer["picture"].startswith("data:image/png;base64,") and answer["layers"] == [] and answer["min_score"] == 0.3
    thin = cv2.imencode(".png", np.zeros((1, 5000, 3), np.uint8))[1].tobytes()  # smaller on the page
    assert page.post("/classify", content=thin).status_code == 200
    with pytest.raises(ConfigError, match="min_score=nan must be between 0 and 1"):
        demo.make_app(halonet_jax.load(folder), min_score=float("nan"))
    for content, message in ((b"", "the file is empty"), (b"text", "no JPEG, PNG, WebP or BMP image")):
        answer = page.post("/classify", content=content)
        assert answer.status_code == 400 and message in answer.json()["error"]
    assert page.get("/attention", params={"token": "x", "row": 0, "column": 0}).status_code == 404
