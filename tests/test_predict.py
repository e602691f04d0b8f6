"""Prediction of image files, attention pictures, and the page to try a model on; all with one tiny run on the digits."""

import csv
import io
import json
import struct
import zlib

import cv2
import jax
import numpy as np
import pytest
from entries import command, run, train
from PIL import Image

from halonet_jax import data, demo, demo_viewers, errors, predict, weights
from halonet_jax.data import images
from halonet_jax.predicting import writers
from halonet_jax.weights import portable

NAMES = [str(n) for n in range(10)]


def encode(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, file_format, **options)
    return buffer.getvalue()


def enormous_png(side=30_000):
    """A complete PNG of a few bytes whose header claims many pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(folder, max_steps=12)
    return folder


@pytest.fixture(scope="module")
def loaded(workdir):
    return weights.load(str(workdir))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Files of all kinds, by name; "z/" holds a folder of them."""
    folder = tmp_path_factory.mktemp("photos")
    scans = [cv2.resize(data.DigitsSource("test")[n]["image"], (40, 56)) for n in range(4)]
    cmyk = io.BytesIO()
    Image.fromarray(scans[1]).convert("CMYK").save(cmyk, "JPEG")
    files = {
        "a.png": encode(scans[0]),
        "b_turned.png": encode(np.rot90(scans[0]), exif=turned(6)),
        "c_cmyk.jpg": cmyk.getvalue(),
        "d_empty.jpg": b"",
        "e_enormous.png": enormous_png(),
        "f_truncated.jpg": encode(scans[2], "JPEG")[:-200],
        "g_16bit.png": cv2.imencode(".png", scans[3].astype(np.uint16) * 257)[1].tobytes(),
        "h_animated.webp": encode(scans[0], "WEBP", save_all=True, append_images=[Image.fromarray(scans[1])], lossless=True),
        "notes.txt": b"no image",
        ".hidden.png": encode(scans[0]),
        "@eaDir/a.png": encode(scans[0]),
        "z/last.BMP": encode(scans[3], "BMP"),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "z" / "loop").symlink_to(folder)
    return folder


GOOD = ["a.png", "b_turned.png", "c_cmyk.jpg", "g_16bit.png", "h_animated.webp", "z/last.BMP"]
BROKEN = {
    "d_empty.jpg": "the file is empty", "e_enormous.png": "30000 x 30000 pixels, more than data.max_pixels=134217728",
    "f_truncated.jpg": "truncated JPEG",
}  # fmt: skip


def test_the_command_predicts_in_order_and_names_what_is_broken(workdir, loaded, photos, tmp_path):
    (tmp_path / "animated.gif").write_bytes(encode(np.zeros((9, 9), np.uint8), "GIF"))
    out, pictures = tmp_path / "out.json", tmp_path / "pictures"
    done = run(
        command(
            "predict", str(photos / "z" / "last.BMP"), f"--model={workdir}", str(photos), "--top=3", "--format=json",
            f"--out={out}", str(tmp_path / "animated.gif"), "--batch_size=4", f"--attention={pictures}", "--at=0.3,0.9",
        ),
        code=1, devices=2,
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert [record["file"] for record in found] == [str(photos / name) for name in ["z/last.BMP", *GOOD]]
    assert not done.stdout
    for name, reason in {**BROKEN, "animated.gif": "no JPEG, PNG, WebP or BMP image"}.items():
        assert any(name in line and reason in line for line in done.stderr.splitlines()), name
    assert "11 images in 0:" in done.stderr and "skipped 4 that cannot be read" in done.stderr
    # As the evaluation sees the file.
    image = images.eval_transform(data.decode((photos / "a.png").read_bytes()), loaded.config.data)
    logits = np.asarray(loaded.logits(image[None])[0], float)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    expected = [
        {"class": NAMES[n], "probability": pytest.approx(probabilities[n], abs=1e-5)} for n in np.argsort(-probabilities)[:3]
    ]
    assert found[1]["classes"] == expected
    paths = [record["attention"] for record in found]  # numbered by the file's place
    assert paths == sorted(map(str, pictures.iterdir())) and paths[1].endswith("02_a.png")


def test_attention_pictures_show_every_query_and_head(loaded, photos, tmp_path):
    heights, outlines = [], []
    for heads in (False, True):
        (found,) = predict.predict(loaded, [photos / "a.png"], attention=str(tmp_path / str(heads)), heads=heads)
        picture = cv2.imread(found.attention)
        heights.append(picture.shape[0])
        outlines.append((picture == (0xFF, 0xF0, 0x5F)).all(-1).sum())
    layers = loaded.model.backbone.attention_layers(16, 16)
    rows = 1 + max(layer.num_heads for layer in layers)
    assert heights[1] / heights[0] == pytest.approx(rows, rel=0.15)
    assert outlines[0] > 1000 and outlines[1] > 3 * outlines[0]


def test_a_turned_photograph_is_predicted_like_the_upright_one(loaded, photos):
    upright, stored = predict.predict(loaded, [photos / "a.png", photos / "b_turned.png"])
    assert upright.classes == stored.classes and not stored.error


def test_neither_the_batch_size_nor_the_kind_of_folder_changes_a_prediction(loaded, workdir, photos, tmp_path):
    about = portable.Portable(loaded.config, loaded.metadata, loaded.step, loaded.weights, {})
    portable.write(tmp_path, about, loaded.variables)
    expected = list(predict.predict(loaded, [photos], batch_size=16))
    assert [p.file for p in expected if not p.error] == [str(photos / name) for name in GOOD]
    assert {p.file.removeprefix(f"{photos}/"): p.error for p in expected if p.error} == {
        name: next(p.error for p in expected if name in p.file and reason in p.error) for name, reason in BROKEN.items()
    }
    for model in (str(workdir), str(tmp_path)):
        for one, other in zip(predict.predict(model, [photos], top=99, batch_size=3), expected, strict=True):
            assert one.file == other.file and one.error == other.error and len(one.classes) in (0, 10)
            np.testing.assert_allclose([p for _, p in one.classes[:5]], [p for _, p in other.classes], atol=1e-6)


PREDICTIONS = [
    predict.Prediction("a b.jpg", (("cat, tabby", 0.75), ('"dog"', 0.25))),
    predict.Prediction("c.jpg", (('"dog"', 1.0), ("cat, tabby", 0.0))),
]


@pytest.mark.parametrize("predictions", [PREDICTIONS, []], ids=["two", "none"])
@pytest.mark.parametrize("file_format", predict.FORMATS)
def test_formats(file_format, predictions):
    out = io.StringIO()
    writer = writers.Writer(out, file_format, writers.ClassLayout(2, attention=False))
    for prediction in predictions:
        writer.add(prediction)
    writer.close()
    if file_format == "json":
        found = [(r["file"], tuple((c["class"], c["probability"]) for c in r["classes"])) for r in json.loads(out.getvalue())]
    elif file_format == "csv":
        head, *rows = csv.reader(io.StringIO(out.getvalue()))
        assert head == ["file", "class1", "probability1", "class2", "probability2"]
        found = [(name, ((a, float(p)), (b, float(q)))) for name, a, p, b, q in rows]
    else:
        expected = [
            "a b.jpg",
            "   75.00%  cat, tabby",
            '   25.00%  "dog"',
            "c.jpg",
            '  100.00%  "dog"',
            "    0.00%  cat, tabby",
        ]
        assert out.getvalue().splitlines() == expected[: 3 * len(predictions)]
        return
    assert found == [(p.file, p.classes) for p in predictions]


@pytest.mark.parametrize(
    "images, options, message",
    [
        (["{folder}/a.png", "{folder}/missing.jpg"], {}, "missing.jpg' does not exist"),
        (["{folder}/none"], {}, "none' holds no image"),
        (["/dev/null"], {}, "neither a file nor a folder"),
        ([], {}, "no image was given"),
        (["{folder}/a.png"], {"top": 0}, "top=0 must be at least 1"),
        (["{folder}/a.png"], {"batch_size": 0}, "batch_size=0 must be at least 1"),
        (["{folder}/a.png"], {"places": [(0.5, 1.5)], "attention": "x"}, "must be a row and a column between 0 and 1"),
        (["{folder}/a.png"], {"attention": "/dev/null/x"}, "cannot be made"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_the_first_image(loaded, photos, images, options, message):
    (photos / "none").mkdir(exist_ok=True)
    with pytest.raises(errors.UserError, match=message):
        predict.predict(loaded, [name.format(folder=photos) for name in images], **options)


def test_a_model_without_attention_leaves_no_folder(loaded, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(type(loaded.model.backbone), "attention_layers", lambda *_: [])
    with pytest.raises(errors.ConfigError, match="without attention to draw; leave --attention out"):
        predict.predict(loaded, photos / "a.png", attention=str(tmp_path / "pictures"))
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [((), "give image files or folders after the flags"), (("README.md", "--at=1,1"), "--at needs --attention=DIR")],
    ids=["nothing", "at"],
)
def test_mistakes_in_the_command_are_one_line(workdir, arguments, message):
    done = run(command("predict", f"--model={workdir}", *arguments), code=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


# --- the page


@pytest.fixture(scope="module")
def page(loaded):
    testclient = pytest.importorskip("starlette.testclient", exc_type=ImportError)
    app = demo.make_app(loaded, max_upload_mb=0.05)
    return testclient.TestClient(app, base_url="http://localhost:8000")


def test_the_page_classifies_an_image_and_shows_its_attention(page, loaded, photos):
    assert "<title>HaloNet</title>" in page.get("/").text
    assert [page.get("/about").json()[key] for key in ("classes", "height", "width")] == [10, 16, 16]
    found = page.post("/classify", content=(photos / "b_turned.png").read_bytes()).json()
    (prediction,) = predict.predict(loaded, [photos / "a.png"])
    assert [c["class"] for c in found["classes"]] == [name for name, _ in prediction.classes]
    np.testing.assert_allclose([c["probability"] for c in found["classes"]], [p for _, p in prediction.classes], atol=1e-6)
    assert found["picture"].startswith("data:image/png;base64,")
    seen = page.get("/attention", params={"token": found["token"], "row": 1, "column": 0.2}).json()
    assert [layer["stage"] for layer in found["layers"]] == [1, 2, 3, 4] and len(seen) == 4
    for layer, attended in zip(found["layers"], seen):
        sums = np.asarray(attended["weights"]).sum((1, 2))
        np.testing.assert_allclose(sums, np.ones(layer["heads"]), atol=1e-3)
        top, left, bottom, right = attended["query"]
        assert top < 1 <= bottom + 0.5 and left <= 0.2 < right + 0.5


def test_the_page_tells_what_is_wrong(page, photos):
    for content, status, message in (
        (b"", 400, "the file is empty"),
        ((photos / "f_truncated.jpg").read_bytes(), 400, "truncated JPEG"),
        (enormous_png(), 400, "30000 x 30000 pixels, more than"),
        (bytes(60_000), 413, "larger than 0.05 MB"),
        ((bytes(20_000) for _ in range(5)), 413, "larger than 0.05 MB"),  # without a content-length
    ):
        answer = page.post("/classify", content=content)
        assert answer.status_code == status and message in answer.json()["error"]
    for query, status in (
        ({"token": "x", "row": 0, "column": 0}, 404),
        ({"token": "x", "row": "nan", "column": 0}, 400),
        ({}, 400),
    ):
        answer = page.get("/attention", params=query)
        assert answer.status_code == status and answer.json()["error"]


def test_the_page_serves_no_other_site_and_forgets_old_images(page, photos):
    assert page.get("/about", headers={"Host": "attacker.example"}).status_code == 400
    assert "default-src 'none'" in page.get("/").headers["Content-Security-Policy"]
    content = (photos / "a.png").read_bytes()
    first, *_, last = [page.post("/classify", content=content).json()["token"] for _ in range(demo_viewers.KEPT_IMAGES + 1)]
    status = [page.get("/attention", params={"token": token, "row": 0, "column": 0}).status_code for token in (first, last)]
    assert status == [404, 200]


def test_summary_of_a_trained_model(workdir, loaded):
    done = run(command("summary", f"--model={workdir}", "--format=csv"))
    rows = {row["part"]: row for row in csv.DictReader(io.StringIO(done.stdout))}
    assert rows["1"]["map"] == "4×4" and rows["head"]["width"] == "10"
    assert int(rows["total"]["parameters"]) == sum(x.size for x in jax.tree.leaves(loaded.variables["params"]))
