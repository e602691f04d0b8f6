"""Exports: each format computes what the checkpoint does, folders appear whole or not at all, and hostile folders give one line."""

import csv
import json
import pickle
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml
from entries import ROOT, command, run, train
from etils import epath

import halonet_jax
from halonet_jax import data, evaluate, export, exporting
from halonet_jax.errors import CheckpointError, ConfigError, ExportError, UserError
from halonet_jax.exporting import checking, savedmodel, stablehlo
from halonet_jax.weights import hub, portable

FORMATS = ("weights", "stablehlo", "savedmodel")
KERNEL = "tpu_custom_call"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A tiny run on the digits, with a moving average. Blocks do not divide the map of 6 × 5 pixels that the attention sees."""
    folder = tmp_path_factory.mktemp("run") / "workdir"
    model = {"stage_kinds": "('attention', 'conv', 'conv', 'conv')", "block_size": 4, "halo_size": 1, "final_width": 32}
    options = {"data__image_size": "(24,20)", **{f"model__{key}": value for key, value in model.items()}}
    train(folder, max_steps=8, ema_decay=0.9, **options)
    return folder


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """The run's moving average in all formats that need no extra, and the lines that the export printed."""
    folder, lines = tmp_path_factory.mktemp("exported") / "digits", []
    export.export(str(workdir), folder, FORMATS, step="best", log=lines.append)
    return folder, lines


@pytest.fixture(scope="module")
def loaded(workdir):
    """The run's checkpoint, to write several times: its program is compiled once."""
    return halonet_jax.load(str(workdir), mesh=checking.cpu_mesh())


@pytest.fixture(scope="module")
def counts(workdir):
    return evaluate.evaluate(str(workdir), ema=True)


@pytest.fixture(scope="module")
def expected_confusion(loaded):
    """Of the checkpoint, counted in NumPy."""
    source, transform = data.open_source(loaded.config.data, "test"), loaded.task.transform(False)
    rows = [transform(source[index], None) for index in range(len(source))]
    predicted = np.asarray(loaded.logits(np.stack([row["image"] for row in rows]))).argmax(-1)
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, ([int(row["label"]) for row in rows], predicted), 1)
    return confusion


def test_progress_and_measured_errors(exported):
    folder, lines = exported
    checks = json.loads((folder / "export.json").read_text())["checks"]
    assert tuple(checks) == FORMATS
    for name, limit in zip(FORMATS, (0, 0, 1e-5)):
        for check in checks[name]:
            assert check["batch_sizes"] == [1, 2, 5] and check["max_logit"] > 0.1
            assert check["max_error"] <= limit and check["max_error"] <= check["tolerance"]
            assert any(f"{name}: {check['artefact']}: largest error {check['max_error']:.2g}" in line for line in lines)
    assert not list(folder.parent.glob(".*"))


@pytest.mark.parametrize("name", (*FORMATS, "onnx"))
def test_an_export_gives_the_counts_of_the_checkpoint(name, exported, workdir, counts, expected_confusion, tmp_path):
    folder = exported[0]
    if name == "onnx":
        pytest.importorskip("jax2onnx")
        pytest.importorskip("onnxruntime")
        folder = tmp_path / "digits"
        export.export(str(workdir), folder, ["onnx"])
    result = evaluate.evaluate(model=str(folder), format=name, out=str(tmp_path / "results"), batch_size=28, per_class=True)
    assert result["format"] == name and result["ema"] and result["count"] == 360
    assert [result[f"{key}_count"] for key in ("top1", "top5")] == [counts[f"{key}_count"] for key in ("top1", "top5")]
    assert result["loss"] == pytest.approx(counts["loss"], abs=1e-6)
    assert result["path"] == f"{tmp_path}/results/digits_{name}_eval_test_8_ema.json"
    assert evaluate.summary(result).startswith(f"{name}, test of step 8 (EMA): ")
    stem = f"{tmp_path}/results/digits_{name}_eval_test_8_ema"
    files = [f"{stem}_per_class.csv", f"{stem}_confusion.csv", f"{stem}_confusion.png"]
    assert result["files"] == files and (tmp_path / files[2]).stat().st_size > 10_000
    (_, *classes), (_, *matrix) = (list(csv.reader(epath.Path(path).read_text().splitlines())) for path in files[:2])
    confusion = np.array([row[1:] for row in matrix], int)
    np.testing.assert_array_equal(confusion, expected_confusion)
    assert [row[0] for row in classes] == [row[0] for row in matrix] == [str(digit) for digit in range(10)]
    assert [[int(x) for x in row[1:3]] for row in classes] == list(map(list, zip(confusion.sum(1), confusion.diagonal())))
    assert [float(row[3]) for row in classes] == pytest.approx(confusion.diagonal() / confusion.sum(1))


def test_the_result_of_a_model_on_the_hub_does_not_go_into_its_cache(exported, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "download", lambda path, files: asked.append(files) or epath.Path(exported[0]))
    monkeypatch.chdir(tmp_path)
    result = evaluate.evaluate(model="hf://owner/name@v1", format="stablehlo", batch_size=28)
    assert result["path"] == f"{tmp_path}/owner_name_v1_stablehlo_eval_test_8_ema.json"
    assert asked == [("config.json", *stablehlo.FILES, *(f"{name}/*" for name in stablehlo.FILES))]
    assert [path.name for path in tmp_path.iterdir()] == ["owner_name_v1_stablehlo_eval_test_8_ema.json"]


@pytest.mark.parametrize("name", (stablehlo.IMAGES, stablehlo.NORMALIZED))
def test_one_program_for_all_platforms_and_batch_sizes(name, exported):
    program = jax.export.deserialize(bytearray((exported[0] / name).read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert program.in_avals[-1].shape[1:] == (24, 20, 3) and not isinstance(program.in_avals[-1].shape[0], int)
    assert program.mlir_module().count(KERNEL) == 1  # TPU's, for the attention layer


def test_weights_are_written_bit_for_bit(exported, workdir):
    ours, theirs = halonet_jax.load(str(exported[0])), halonet_jax.load(str(workdir))
    jax.tree.map(np.testing.assert_array_equal, ours.variables, theirs.variables)
    assert ours.metadata == theirs.metadata and (ours.step, ours.weights) == (8, "ema")


def test_the_card(exported, counts):
    _, front_matter, text = (exported[0] / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(front_matter)
    assert about["library_name"] == "halonet_jax" and about["pipeline_tag"] == "image-classification"
    (result,) = about["model-index"][0]["results"]
    assert result["dataset"] == {"type": "digits", "name": "digits", "split": "test"}
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert values["top-1"] == pytest.approx(100 * counts["top1"], abs=1e-3) and "count" not in values
    assert "**the paper's** h1, not this model" in text and "79.9 %" in text and "`base_width=8`" in text
    assert all(f"{name}:\n\n```python" in text for name in FORMATS)


def test_names_cannot_break_out_of_the_card(exported):
    loaded = halonet_jax.load(str(exported[0]))
    loaded.config.data.source, loaded.config.data.name = "tfds", 'x"\nlicense: mit\n---\n<script>'
    text = exporting.card.make(loaded, ["weights"], "a: [b]\n- c")
    about = yaml.safe_load(text.split("---\n", 2)[1])
    assert about["model-index"][0]["name"] == "a: [b]\n- c" and "license" not in about
    assert about["model-index"][0]["results"][0]["dataset"]["name"] == loaded.config.data.name
    assert "\n<script>" not in text.split("---\n\n", 1)[1]


def test_no_path_of_this_machine_is_published(loaded, tmp_path):
    config = loaded.config.copy_and_resolve_references()
    config.data.source, config.data.dir, config.init_from = "folder", "/home/me/photos", "/home/me/runs/first"
    about = portable.Portable(config, loaded.metadata, loaded.step, loaded.weights, loaded.figures)
    portable.write(epath.Path(tmp_path), about, loaded.variables)
    assert "/home/me" not in (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match=r"data.source='folder' needs the folder that holds .*; set --data_dir=PATH$"):
        evaluate.evaluate(model=str(tmp_path))


# --- the command


def test_the_command(workdir, tmp_path):
    out = tmp_path / "out"
    done = run(command("export", f"--workdir={workdir}", f"--out={out}", "--weights=raw", "--step=8"))
    assert "[1/1] weights: model.safetensors: largest error 0 of logits" in done.stdout
    assert done.stdout.splitlines()[-1] == f"written to {out}" and not done.stderr
    assert json.loads((out / "export.json").read_text())["weights"] == "raw"
    with pytest.raises(ConfigError, match="exists; give another folder, or add --overwrite to replace it"):
        export.export(str(workdir), out)


def broken_runners(run_back):
    def runners(folder, task, interface):
        yield "savedmodel", lambda images: {"logits": run_back(images)}

    return runners


@pytest.mark.parametrize("run_back, message", [
    (lambda images: np.ones((len(images), 10), np.float32), "differs from the checkpoint: with a batch of 1 by"),
    (lambda images: np.full((len(images), 10), np.nan, np.float32), "differs from the checkpoint: with a batch of 1 by nan"),
    (lambda images: np.ones((5, 10), np.float32), "gives logits [5, 10] instead of [1, 10]"),
    (lambda images: 1 / 0, "does not run with a batch of 1 (division by zero)"),
])  # fmt: skip
def test_a_wrong_export_leaves_nothing_and_replaces_nothing(run_back, message, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(savedmodel, "write", lambda folder, loaded, interface: (folder / "savedmodel").mkdir())
    monkeypatch.setattr(savedmodel, "runners", broken_runners(run_back))
    with pytest.raises(ExportError, match=re.escape(message)):
        exporting.write(loaded, tmp_path / "new" / "out", ["savedmodel"])
    assert not list(tmp_path.glob("new/*"))
    old = tmp_path / "old"
    old.mkdir()
    (old / "export.json").write_text("{}")
    with pytest.raises(ExportError):
        exporting.write(loaded, old, ["savedmodel"], overwrite=True)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["export.json"]


def test_overwrite_replaces_exports_alone(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(
        exporting.FORMATS["weights"], "runners", broken_runners(lambda images: np.asarray(loaded.logits(images)))
    )
    out = tmp_path / "out"
    out.mkdir()
    (out / "photo.jpg").write_text("mine")
    with pytest.raises(ConfigError, match="is no export, and --overwrite replaces exports alone"):
        exporting.write(loaded, out, ["weights"], overwrite=True)
    (out / "export.json").write_text("{}")
    exporting.write(loaded, out, ["weights"], overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "export.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("arguments, message", [
    ({"formats": ["weigths"]}, "format 'weigths' is unknown"),
    ({"formats": []}, "no format is given"),
    ({"formats": ["weights", "weights"]}, "is given 2 times"),
    ({"formats": ["onnx"]}, "format onnx needs no_such_package; pip install -e '.[onnx]'"),
    ({"out": "gs://bucket/out"}, "--out=gs://bucket/out is not local"),
    ({"dtype": "float16"}, "dtype='float16' is unknown; use one of float32, bfloat16"),
    ({"model": "/no/such/run"}, "holds no config.json"),
    ({"step": 3}, "no checkpoint of step 3"),
])  # fmt: skip
def test_mistakes(arguments, message, workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting.FORMATS["onnx"], "PACKAGES", ("json", "no_such_package"))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        export.export(**{"model": str(workdir), "out": tmp_path / "out", "formats": ["weights"]} | arguments)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, message", [
    ({"format": "onnx"}, "holds no model.onnx; use --format=weights or --format=stablehlo or --format=savedmodel, or export"),
    ({"format": "stablehlo", "at": 3}, "step=3, but"),
    ({"workdir": "runs/x"}, "give either --workdir"),
    ({"split": "val", "format": "stablehlo"}, "digits has no split 'val'"),
    ({"label_key": "digit"}, "data.label_key='digit' is for TFDS data sets, and data.source is 'digits'; leave --label_key out"),
])  # fmt: skip
def test_mistakes_in_an_evaluation(arguments, message, exported):
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate.evaluate(**{"model": str(exported[0])} | arguments)


# --- folders of strangers


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def edited_config(change):
    def edit(folder):
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return edit


def edited_weights(change):
    def edit(folder):
        arrays = safetensors.numpy.load_file(folder / "model.safetensors")
        change(arrays)
        safetensors.numpy.save_file(arrays, folder / "model.safetensors")

    return edit


def replaced(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def lying_header(folder):
    """The header says that an array is longer than the file."""
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    max(header.values(), key=lambda entry: entry["data_offsets"][1])["data_offsets"][1] += 2**40
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


KERNEL_NAME = "params/classifier/kernel"
HOSTILE = {
    "pickle": (replaced("model.safetensors", pickle.dumps(Bomb())), "is no safetensors file"),
    "empty weights": (replaced("model.safetensors", b""), "is no safetensors file"),
    "header longer than the file": (replaced("model.safetensors", (2**60).to_bytes(8, "little")), "is no safetensors file"),
    "lying header": (lying_header, "is no safetensors file"),
    "NaN": (edited_weights(lambda x: x.update({KERNEL_NAME: x[KERNEL_NAME] * np.float32("nan")})), "are not finite in params/"),
    "wrong shape": (edited_weights(lambda x: x.update({KERNEL_NAME: x[KERNEL_NAME].T.copy()})), "float32[10, 32] there and"),
    "wrong dtype": (edited_weights(lambda x: x.update({KERNEL_NAME: x[KERNEL_NAME].astype(np.int8)})), "int8[32, 10] there and"),
    "missing array": (edited_weights(lambda x: x.pop(KERNEL_NAME)), "is absent there and"),
    "more arrays": (edited_weights(lambda x: x.update(evil=np.zeros(3, np.float32))), "evil is float32[3] there and absent by"),
    "no JSON": (replaced("config.json", b"{" * 100_000), "is no JSON"),
    "other JSON": (replaced("config.json", b"[]"), 'does not say "format"'),
    "later version": (edited_config(lambda c: c.update(format_version=99)), "format_version 99"),
    "unknown key": (edited_config(lambda c: c["config"].update(evil=1)), "does not know: 'evil'"),
    "wrong type": (edited_config(lambda c: c["config"]["model"].update(stem_width="64")), "model.stem_width='64', which must be"),
    "wrong value": (edited_config(lambda c: c["config"]["model"].update(stem_width=-1)), "model.stem_width=-1 must be"),
    "huge model": (edited_config(lambda c: c["config"]["model"].update(stem_width=10**6)), "model.stem_width=1000000 must be"),
    "unknown task": (edited_config(lambda c: c["config"].update(task="evil")), "task='evil' is unknown"),
    "no config": (edited_config(lambda c: c.update(config=[])), "config must be an object"),
    "no classes": (edited_config(lambda c: c["metadata"].update(class_names=[])), "must be a list of texts that is not empty"),
    "path in a class name": (
        edited_config(lambda c: c["metadata"]["class_names"].__setitem__(3, "../../etc/passwd")),
        "'../../etc/passwd' has a '..' part",
    ),
    "line end in a class name": (
        edited_config(lambda c: c["metadata"]["class_names"].__setitem__(3, "cat\nerror")), "'cat\\nerror' has a '..' part or"
    ),
    "other classes": (edited_config(lambda c: c["metadata"]["class_names"].pop()), "is float32[10] there and float32[9] by the"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_folder_gives_one_line(what, exported, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((exported[0] / name).read_bytes())
    edit, message = HOSTILE[what]
    edit(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        halonet_jax.load(str(tmp_path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize("name, message", [
    ("model_uint8.stablehlo", "is no program"), ("savedmodel/saved_model.pb", "is no SavedModel")
])  # fmt: skip
def test_a_damaged_program_gives_one_line(name, message, exported, tmp_path):
    (tmp_path / "savedmodel").mkdir()
    (tmp_path / "config.json").write_bytes((exported[0] / "config.json").read_bytes())
    (tmp_path / name).write_bytes((exported[0] / name).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=message) as error:
        evaluate.evaluate(model=str(tmp_path))
    assert "\n" not in str(error.value)


# --- the documentation


def test_snippets_of_the_documentation(exported, monkeypatch):
    """All of them, in order, in one namespace, in the folder that they name; the frozen weights stay as they are."""
    monkeypatch.chdir(exported[0].parent)
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 20, 3), np.uint8)
    names = {"images": images, "labels": np.array([0, 1, 2])}
    text = (ROOT / "docs" / "export.md").read_text().replace("exported/", "digits/").replace('"exported"', '"digits"')
    for snippet in re.findall("```python\n(.*?)```", text, re.DOTALL):
        if "onnxruntime" not in snippet:
            exec(snippet, names)
    for key in ("stablehlo_logits", "tensorflow_logits"):
        np.testing.assert_allclose(names[key], names["logits"], atol=1e-5)
    assert names["linen_logits"].shape == (3, 5) and list(names["linen_variables"]["params"]) == ["Dense_0"]
    assert names["train_step"](names["nnx_model"], names["optimizer"], images, names["labels"]) < names["value"]
    backbone = {key: getattr(names["nnx_model"].backbone, key) for key in names["model"].variables["params"]}
    bridged = names["nnx"].bridge.variables.nnx_attrs_to_linen_vars(backbone)
    jax.tree.map(np.testing.assert_array_equal, bridged["params"], names["model"].variables["params"])
