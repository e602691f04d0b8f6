"""`evaluate --suite=imagenet` on stand-ins: exact counts against NumPy, what is missing, and mistakes in one line."""

import functools
import json
import os
import pickle
import re
import subprocess
import sys
import types

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from entries import ROOT
from etils import epath
from imagenet_stand_ins import ALL, LEVELS, LOGITS, NAMES, REAL, SETS, SUBSETS

from halonet_jax import config as config_lib
from halonet_jax import evaluate
from halonet_jax.errors import ConfigError, DataError, UserError
from halonet_jax.evaluating import suite, tables
from halonet_jax.evaluating.imagenet import ALEXNET_ERRORS
from halonet_jax.tasks import classification
from halonet_jax.weights import portable


class Levels(nn.Module):
    """Answers with the row of a table that belongs to the image's gray level."""

    num_classes: int

    def describe(self, *image_shape):
        return "a table"

    @nn.compact
    def __call__(self, images, train):
        table = self.param("table", nn.initializers.zeros, (LEVELS, self.num_classes))
        gray = images.mean(axis=(1, 2))[:, 0] * 255  # the config's mean is 0, and its standard deviation 1
        return table[jnp.clip(jnp.round((gray - 5) / 10).astype(int), 0, LEVELS - 1)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    code = f"from tfds_sets import imagenet_sets; imagenet_sets.prepare_all({str(folder)!r})"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests" / "data", check=True, env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
    )  # fmt: skip
    return str(folder)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Writes an exported folder with the first classes of the table; returns its path."""
    monkeypatch.setattr(classification, "make_model", lambda config, num_classes: Levels(num_classes))

    def write(num_classes=1000, names=NAMES):
        config = config_lib.digits()
        config.data.source, config.data.name, config.data.eval_split = "tfds", "imagenet2012", "validation"
        config.data.mean, config.data.std = (0.0,) * 3, (1.0,) * 3
        metadata = {"class_names": list(names[:num_classes]), "preprocessing": {"image_size": 16}}
        folder = epath.Path(tmp_path / "model")
        folder.mkdir()
        variables = {"params": {"table": LOGITS[:, :num_classes]}, "batch_stats": {}}
        portable.write(folder, portable.Portable(config, metadata, 7, "ema", {}), variables)
        return str(folder)

    return write


def oracle(name, among=ALL, k=1):
    """Numbers of images that have a label, and of those where one is among the best k."""
    _, _, labels, examples = SETS[name]
    labelled = [(level, truth) for level, truth in examples if truth]
    best = [set(np.asarray(among)[np.argsort(-LOGITS[level, among])][:k].tolist()) for level, _ in labelled]
    return len(labelled), sum(bool(found & set(truth)) for found, (_, truth) in zip(best, labelled))


@pytest.mark.parametrize("all_classes", (False, True))
def test_counts_are_exact(all_classes, model, data_dir, tmp_path, capsys):
    """Batches of 8 on four devices, which no set fills."""
    result = evaluate.evaluate_suite("imagenet", model=model(), data_dir=data_dir, batch_size=8, all_classes=all_classes)
    assert {entry["name"] for entry in result["sets"]} == set(SETS)
    for entry in result["sets"]:
        name = entry["name"]
        among = ALL if all_classes or name not in SUBSETS else [NAMES.index(x) for x in SUBSETS[name]]
        assert entry["classes"] == len(among)
        (count, top1), (_, top5) = oracle(name, among), oracle(name, among, k=5)
        assert (entry["count"], entry["top1_count"], entry["top5_count"]) == (count, top1, top5), name
        assert entry["top1"] == top1 / count and 0 < top1 < count
        assert entry.get("unlabelled") == (len(SETS[name][3]) - count if SETS[name][2] == REAL else None)
    restricted = {name: oracle(name, [NAMES.index(x) for x in SUBSETS[name]]) for name in SUBSETS}
    assert all(restricted[name] != oracle(name) for name in SUBSETS), "the stand-ins do not tell 200 classes from 1,000"

    gaussian, snow = result["corruptions"]["gaussian_noise"], result["corruptions"]["snow"]
    assert gaussian["errors"] == pytest.approx({"1": 0.2, "2": 0.3, "3": 0.4, "4": 0.5, "5": 0.6})
    assert gaussian["corruption_error"] == pytest.approx(0.4 / 0.886428)
    assert snow["errors"] == pytest.approx({"3": 0.3}) and snow["corruption_error"] is None
    assert result["mean_error"] == pytest.approx((0.2 + 0.3 + 0.4 + 0.5 + 0.6 + 0.3) / 6) and result["mce"] is None

    stem = f"model_weights_eval_suite_imagenet_7_ema{'_all_classes' if all_classes else ''}"
    assert result["path"] == f"{tmp_path}/{stem}.json" and json.loads((tmp_path / f"{stem}.json").read_text()) == result
    for text in (tables.text(result), (tmp_path / f"{stem}.md").read_text()):
        assert "6 of 75 sets; mCE needs all 75" in text
        assert ("200 classes" in text) == (not all_classes) and "any label is right" in text and "without a label" in text
    assert "ImageNet-R: top-1" in capsys.readouterr().out


def test_what_is_missing_is_named_with_its_command(model, data_dir):
    result = evaluate.evaluate_suite("imagenet", model=model(), data_dir=data_dir, split="[:4]")
    assert all(entry["split"].endswith("[:4]") and entry["count"] <= 4 for entry in result["sets"])
    missing = [entry["name"] for entry in result["missing"]]
    assert missing[:2] == ["imagenet_v2/threshold-0.7", "imagenet_sketch"] and len(missing) == 2 + 69
    lines = tables.text(result).splitlines()
    where = f"data_dir='{data_dir}', file_format='array_record').download_and_prepare()\""
    sketch = lines[lines.index("  imagenet_sketch") + 1]
    assert sketch == f"    python -c \"import tensorflow_datasets as tfds; tfds.builder('imagenet_sketch', {where}"
    loop = lines[lines.index("  imagenet2012_corrupted, 69 of 75") + 1 :]
    assert "ILSVRC2012_img_val.tar" in loop[0] and "train" not in loop.pop(0)
    assert loop[0].startswith("    for name in shot_noise_1 ") and "snow_3 " not in loop[0] and "snow_4 " in loop[0]
    shell = "\n".join(loop[:3]).replace("python -c", "echo")
    commands = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(commands) == 69 and "tfds.builder('imagenet2012_corrupted/shot_noise_1', data_dir=" in commands[0]


def test_all_corruptions_give_mce():
    """A model with AlexNet's errors has an mCE of 100 %."""
    top1 = {one.name: 1.0 for one in suite.SUITES["imagenet"]}
    top1 |= {f"imagenet2012_corrupted/{kind}_{i}": 1 - error for kind, error in ALEXNET_ERRORS.items() for i in range(1, 6)}
    found = suite.corruption_errors(top1)
    assert len(top1) == 8 + 75 and found["mce"] == pytest.approx(1)
    assert found["mean_error"] == pytest.approx(np.mean(list(ALEXNET_ERRORS.values())))
    assert "corruptions" not in tables.text(
        {"suite": "imagenet", "model": "m", "step": 1, "ema": False, "sets": [], "missing": []} | suite.corruption_errors({})
    )


def test_the_class_lists_are_of_imagenet():
    assert all(len(set(names)) == 200 and set(names) < set(NAMES) for names in SUBSETS.values())
    assert len(set(SUBSETS["imagenet_a"]) & set(SUBSETS["imagenet_r"])) == 86


def test_a_set_that_cannot_be_read_is_named_and_the_rest_goes_on(model, data_dir, tmp_path):
    """A file whose labels are not of the set's 200 classes, and one that is cut off."""
    for name in ("imagenet2012", "imagenet_a", "imagenet_r"):
        (source,) = epath.Path(data_dir).glob(f"{name}/*")
        (tmp_path / "tfds" / name).mkdir(parents=True)
        (tmp_path / "tfds" / name / source.name).symlink_to(source)
    path = tmp_path / "tfds" / "imagenet_a" / "0.1.0"
    path.unlink()
    path.symlink_to(epath.Path(data_dir) / "imagenet_r" / "0.2.0")
    result = evaluate.evaluate_suite("imagenet", model=model(), data_dir=str(tmp_path / "tfds"))
    reasons = {entry["name"]: entry["reason"] for entry in result["missing"]}
    assert {entry["name"] for entry in result["sets"]} == {"imagenet2012", "imagenet_r"} and "imagenet_a" in reasons


@pytest.mark.parametrize("arguments, message", [
    ({"name": "imagnet"}, "suite 'imagnet' is unknown; use imagenet"),
    ({"split": "validation"}, "--split=validation cannot be, since each set of a suite has its own split"),
    ({"num_classes": 10}, "needs a model of ImageNet's 1,000 classes, and"),
    ({"names": NAMES[::-1]}, "and they differ in their order; the suite needs a model whose classes are ImageNet's WordNet ids"),
    ({"names": [f"class {i}" for i in range(1000)]}, "and they differ in class 0, class 1, class 10, class 100, class 101; the"),
    ({"model": None}, "give either --workdir"),
])  # fmt: skip
def test_mistakes(arguments, message, model, data_dir):
    kind = {key: arguments[key] for key in ("num_classes", "names") if key in arguments}
    arguments = {key: value for key, value in arguments.items() if key not in kind}
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        evaluate.evaluate_suite(**{"name": "imagenet", "model": model(**kind), "data_dir": data_dir} | arguments)
    assert "\n" not in str(error.value)


def test_nothing_is_prepared(model, tmp_path):
    with pytest.raises(DataError, match="no set of suite imagenet can be evaluated in .*; set --data_dir, or prepare") as error:
        evaluate.evaluate_suite("imagenet", model=model(), data_dir=str(tmp_path / "empty"))
    assert "tfds.builder('imagenet2012', " in str(error.value)


@pytest.fixture
def command(monkeypatch):
    """Runs the command in this process and returns its exit code."""

    def run(*arguments):
        values = flags.FlagValues()
        define = {key: functools.partial(getattr(flags, key), flag_values=values) for key in dir(flags) if "DEFINE_" in key}
        monkeypatch.setattr(evaluate, "flags", types.SimpleNamespace(FLAGS=values, **define))
        evaluate.define_flags()
        values(["evaluate", *arguments])
        return evaluate.main()

    return run


def test_exit_code_of_the_command(command, model, data_dir, capsys, monkeypatch):
    arguments = [f"--model={model()}", f"--data_dir={data_dir}", "--suite=imagenet", "--split=[:2]"]
    assert command(*arguments) == 3
    assert "Not evaluated:" in (out := capsys.readouterr().out) and "written to " in out
    monkeypatch.setattr(suite, "SUITES", {"imagenet": suite.SUITES["imagenet"][:2]})
    assert command(*arguments) == 0
    assert "Not evaluated:" not in capsys.readouterr().out
    for extra in ("--data_name=imagenet_a", "--label_key=real_label", "--per_class"):
        with pytest.raises(ConfigError, match=f"{extra.split('=')[0]} is for one data set, and --suite=imagenet names its own"):
            command(*arguments, extra)
    with pytest.raises(ConfigError, match="--all_classes is for --suite"):
        command(arguments[0], "--all_classes")


# --- one set with any label


def test_label_key_of_one_set(model, data_dir):
    """Together with another name; the JSON says which images were left out."""
    arguments = {"model": model(), "data_dir": data_dir, "data_name": "imagenet2012_real"}
    result = evaluate.evaluate(**arguments, label_key="real_label", batch_size=8)
    count, top1 = oracle("imagenet2012_real")
    assert (result["count"], result["top1_count"], result["unlabelled"]) == (count, top1, 23 - count)
    assert result["data"]["label_key"] == "real_label" and "loss" not in result
    assert f"{23 - count} images without a label left out" in evaluate.summary(result)
    single = evaluate.evaluate(**arguments, label_key="original_label", batch_size=8, per_class=True)
    assert single["count"] == 23 and single["path"] != result["path"] and len(single["files"]) == 3
    examples = SETS["imagenet2012_real"][3]
    assert single["top1_count"] == sum(LOGITS[level].argmax() == (labels or [0])[0] for level, labels in examples)


@pytest.mark.parametrize("arguments, message", [
    ({}, "'label' is no feature of TFDS data set 'imagenet2012_real', whose features are image, original_label, real_label, "
         "file_name; set --label_key to original_label or real_label"),
    ({"label_key": "file_name"}, "'file_name' is no class label of TFDS data set"),
    ({"label_key": "image"}, "'image' is no class label of TFDS data set"),
    ({"label_key": ""}, "data.label_key='' must be"),
    ({"label_key": "real_label", "per_class": True}, "holds several; set --label_key to original_label, or leave --per_class out"),
    ({"label_key": "real_label", "split": "test"}, "has no split 'test'; its splits are validation: set --split=validation"),
])  # fmt: skip
def test_mistakes_in_a_label_key(arguments, message, model, data_dir):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        evaluate.evaluate(**{"model": model(), "data_dir": data_dir, "data_name": "imagenet2012_real"} | arguments)
    assert "\n" not in str(error.value)


def test_training_needs_one_label(data_dir):
    config = config_lib.digits()
    config.data.update({"source": "tfds", "name": "imagenet2012_real", "dir": data_dir, "label_key": "real_label"})
    with pytest.raises(DataError, match="holds several labels for an image, and one is needed; set --config.data.label_key to"):
        classification.open_source(config, "validation")
    config.data.label_key = "original_label"
    source = classification.open_source(config, "validation")
    assert len(source) == 23 and pickle.loads(pickle.dumps(source))[5] == source[5]
    config.data.source = "digits"
    with pytest.raises(
        DataError, match="data.label_key='original_label' is for TFDS data sets, and data.source is 'digits'; leave"
    ):
        classification.open_source(config, "test")
