"""The check whether a recipe fits a TPU slice: its search, its answers to bad input, and one small program compiled for a TPU."""

import importlib.util
import shutil
import sys

import entries
import pytest

from halonet_jax import config as config_lib
from halonet_jax.costs import chips, tpu_compile, tpu_records, tpu_table

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[compile_check]'"
)


def script(*arguments, code=0):
    return entries.run([sys.executable, "scripts/tpu/compile_for_tpu.py", *arguments], code)


@needs_libtpu
def test_a_small_model_compiles_for_a_tpu():
    small = (
        "--config.batch_size=16", "--config.eval_batch_size=16", "--config.data.image_size=16", "--config.model.base_width=8",
        "--config.model.stem_width=8", "--config.model.stage_sizes=(1,1,1,1)",
        "--config.model.stage_kinds=('conv','conv','conv','conv')",
    )  # fmt: skip
    out = script("--config=configs/digits.py", "--topology=v5e:2x2", "--quick", *small).stdout
    assert "4 chips, 4 devices" in out and "VERDICT: fits" in out and "\nattention on TPU v5 lite: none\n" in out
    assert out.count("TFLOP in matrix units") == 2 and "all-reduce" in out
    assert "of 15.8 GiB" in out and "estimated time" not in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=configs/h4.py"], "--topology is missing"),
        (["--topology=v5e:2x2"], "--config is missing"),
        (["--config=configs/h4.py", "--topology=v9:2x2"], "names an unknown chip; use one of v3, v4, v5e, v5p, v6e"),
        (["--config=configs/h4.py", "--topology=v5e"], "write for example v5e:4x4"),
        (["--config=configs/h4.py", "--topology=v5e:2x2", "--config.modle.scan=True"], "no key 'modle'"),
        pytest.param(
            ["--config=configs/h4.py", "--topology=v5e:2x2", "--config.batch_size=7"],
            "batch_size=7 does not divide over 4 devices; use 4 or 8", marks=needs_libtpu,
        ),
        pytest.param(
            ["--config=configs/h4.py", "--topology=v5e:3x3", "--config.batch_size=576"],
            "libtpu does not know 'v5e:3x3'", marks=needs_libtpu,
        ),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line(arguments, message):
    error = script(*arguments, code=2).stderr.strip()
    assert message in error and error.splitlines()[-1].startswith("error: ")


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(tpu_compile.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(config_lib.ConfigError, match="libtpu, TPU's compiler, is not installed; pip install"):
        tpu_compile.check(config_lib.imagenet(), "v5e:2x2")


def _fake_compiler(per_image, state, remat_share):
    """Memory in GiB that grows with the images that a device holds at once."""
    tried = []

    def compile_step(config, topology):
        settings = tpu_compile.Settings.of(config)
        tried.append(settings)
        images = config.batch_size / settings.accumulation_steps / chips.topology(topology).num_devices
        peak = state + images * per_image * (remat_share if settings.remat else 1)
        work = {"flops": 0, "bytes": 1e9 * (1 + settings.remat)}
        return work | {"fits": peak <= 15.75, "peak_bytes": peak * chips.GIB, "param_bytes": state * chips.GIB, "seconds": 0}

    return compile_step, tried


def test_the_search_finds_the_largest_micro_batch_and_remat():
    config = config_lib.imagenet()
    compile_step, tried = _fake_compiler(per_image=1, state=0.5, remat_share=0.5)
    record = compile_step(config, "v5e:8x8")  # 64 images, 64.5 GiB
    found = tpu_compile.make_fit(config, "v5e:8x8", record, lambda text: None, compile_step)
    here = tpu_compile.Settings.of(config)
    settings = [settings.flags(here) for settings, _ in found]
    assert settings == [
        "--config.optimizer.accumulation_steps=8", "--config.optimizer.accumulation_steps=4 --config.model.remat=True"
    ]  # fmt: skip
    assert len(tried) <= 6


def test_the_search_ends_where_nothing_fits():
    config = config_lib.imagenet()
    compile_step, tried = _fake_compiler(per_image=1, state=20, remat_share=0.5)
    record = compile_step(config, "v5e:8x8")
    assert tpu_compile.make_fit(config, "v5e:8x8", record, lambda text: None, compile_step) == []
    assert any(settings.fsdp == 64 for settings in tried)


def test_the_table_goes_on_where_it_stopped_and_says_what_is_missing(tmp_path, monkeypatch):
    compiled = []

    def compile_step(config, topology, step, quick):
        compiled.append((config.model.name, topology, quick))
        work = {"flops": 2e12, "bytes": 1e11, "cycles": 0 if quick else 1.5e9, "seconds": 0}
        return work | {"fits": True, "peak_bytes": 2**32}

    monkeypatch.setattr(tpu_records, "RECORDS", tmp_path / "records.json")
    monkeypatch.setattr(tpu_table, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(tpu_table, "work", lambda: [("h7", "v5e-128", False), ("h7", "v5e-128", True)])
    monkeypatch.setattr(tpu_records.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(tpu_compile, "compile_step", compile_step)
    for _ in range(2):
        assert tpu_table.main(minutes=0, quick=False) == 0
    assert compiled == [("h7", "v5e:8x16", True), ("h7", "v5e:8x16", False)]
    rows = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| `h7`")]
    # One second a step: 350 epochs of 1,281,167 images at 4,096 a second are 30.4 hours, 3,892 on 128 chips.
    assert rows[:2] == ["| `h7` | fits |  | 4.00 | 2.00 | 100 | 122 |", "| `h7` | 1000 | 4,096 | 30.4 | 3,892 |  |"]
    assert all("not compiled yet" in row for row in rows[2:]) and len(rows) == 6


def test_detectors_have_rows_and_the_parts_of_a_step(tmp_path, monkeypatch):
    def compile_step(config, topology, step, quick):
        assert (config.task, config.batch_size, step, quick) == ("detection", 64, "train", True)
        parts = {"RoIAlign": [1e12, 1e10], "other": [3e12, 4e10]}
        work = {"flops": 4e12, "bytes": 5e10, "cycles": 0, "parts": parts, "collectives": [["all-reduce", 5, 98e6]]}
        return work | {"fits": topology == "v5e:4x8", "peak_bytes": 2**32, "temp_bytes": 2**31, "seconds": 0}

    monkeypatch.setattr(tpu_records, "RECORDS", tmp_path / "records.json")
    monkeypatch.setattr(tpu_table, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(tpu_table, "work", lambda: [("coco_r50_se_halo", "v5e-32", False)])
    monkeypatch.setattr(tpu_records.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(tpu_compile, "compile_step", compile_step)
    assert tpu_table.main(minutes=0, quick=True) == 0
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert "| `coco_r50_se_halo` | v5e-32 | fits |  | 4.00 | 4.00 | 50 | 61 |" in lines
    assert "| `coco_r50` | v5e-32 | not compiled yet |  |  |  |  |  |" in lines
    assert "| RoIAlign | 1.00 | 10.0 | 20% |" in lines and any("5 × all-reduce, 98 MB together" in line for line in lines)


def test_the_stamp_covers_every_layer_of_a_step_and_sibling_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_records.metadata, "version", lambda name: "1.0")
    for folder in ("configs", "halonet_jax"):
        shutil.copytree(tpu_records.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(tpu_records, "ROOT", tmp_path)
    store = tpu_records.Store()
    stamps = [store.code("h7_conv1")]
    package = "halonet_jax"
    for path in ("ops/einsum.py", "models/layers.py", "tasks/mixing.py", "config/knobs.py", "training/step.py"):
        (tmp_path / package / path).open("a").write("\n")
        stamps.append(store.code("h7_conv1"))
    h7 = tmp_path / "configs" / "h7.py"
    h7.write_text(h7.read_text().replace("return ", "config.ema_decay = 0.5\n    return "))
    stamps.append(store.code("h7_conv1"))
    assert len(set(stamps)) == len(stamps)
    (tmp_path / package / "training" / "checkpoint.py").open("a").write("\n")
    detector = store.code("coco_r50")
    (tmp_path / package / "detection" / "nms.py").open("a").write("\n")
    assert store.code("h7_conv1") == stamps[-1] and store.code("coco_r50") != detector
