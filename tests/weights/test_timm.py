"""timm's weights without timm: its recorded numbers, damaged and foreign files, the hub's folders, preprocessing."""

import functools
import json
import pickle

import jax
import numpy as np
import pytest
import safetensors.numpy
import timm_cases
from PIL import Image

from halonet_jax import config as config_lib
from halonet_jax import errors, models, weights
from halonet_jax.data import images
from halonet_jax.weights import hub, timm

RECORDED = json.loads(timm_cases.FILE.read_text())


@functools.cache
def tiny(case):
    """Our model, and timm's arrays for it."""
    _, name, options = timm_cases.CASES[case]
    return models.create(name, 3, **options), {k: timm_cases.array(k, tuple(s)) for k, s in RECORDED[case]["shapes"].items()}


@pytest.mark.parametrize("case", timm_cases.CASES)
def test_logits_and_maps_are_timms(case):
    size = timm_cases.CASES[case][0]
    model, state = tiny(case)
    variables = timm.convert(state, model)
    apply = functools.partial(model.apply, variables)
    logits, maps = jax.jit(lambda x: (apply(x, train=False), apply(x, method="features")))(timm_cases.images(size))
    np.testing.assert_allclose(logits, RECORDED[case]["logits"], atol=1e-4, rtol=0)
    for x, recorded in zip(timm_cases.thinned(maps), RECORDED[case]["maps"], strict=True):
        np.testing.assert_allclose(x.ravel(), recorded, atol=1e-4, rtol=0)


@functools.cache
def arrays(name):
    """Small numbers for each array of one of timm's models, with 3 classes."""
    return {rule.key: np.full(rule.shape, 0.01, np.float32) for rule in timm.rules(models.create(name, 3))}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("stages.2.1.self_attn.kv.weight"), r"lacks stages\.2\.1\.self_attn\.kv\.weight \(1 in all\)"),
        (lambda state: state.update(extra=np.zeros(3, np.float32)), r"has the unknown array extra \(1 in all\)"),
        (
            lambda state: state.update({"stages.3.0.self_attn.pos_embed.width_rel": np.zeros((27, 64), np.float32)}),
            r"stages\.3\.0\.self_attn\.pos_embed\.width_rel has shape \[27, 64\], where halonet26t has \[23, 64\]",
        ),
        (lambda state: state["head.fc.bias"].fill(np.nan), r"head\.fc\.bias holds values that are not finite"),
        (lambda state: state.update({"head.fc.bias": np.zeros(3, np.int32)}), r"head\.fc\.bias holds .* no floats"),
        (lambda state: state.pop("head.fc.weight"), r"has no head\.fc\.weight \[classes, channels\]"),
    ],
)
def test_an_array_that_does_not_fit_is_named(tmp_path, change, message):
    state = {key: x.copy() for key, x in arrays("halonet26t").items()}
    change(state)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors.numpy.save(state))
    with pytest.raises(errors.CheckpointError, match=message) as raised:
        weights.load(str(path), architecture="halonet26t")
    assert "\n" not in str(raised.value)


def test_a_file_tells_its_architecture(tmp_path):
    path = tmp_path / "weights.safetensors"
    counters = {"module.stem.conv1.bn.num_batches_tracked": np.zeros((), np.int64)}
    path.write_bytes(safetensors.numpy.save({f"module.{key}": x for key, x in arrays("haloregnetz_b").items()} | counters))
    loaded = weights.load(str(path))
    data = loaded.config.data
    assert loaded.config.model.name == "haloregnetz_b" and loaded.config.model.padding is None
    assert loaded.model.backbone.padding == "zero" and loaded.config.model.dtype == "float32"
    assert (data.image_size, data.eval_crop, data.mean, data.interpolation) == (224, 0.94, (0.5, 0.5, 0.5), "bicubic")
    assert loaded.metadata["class_names"] == ["0", "1", "2"]
    assert "bicubic" in loaded.metadata["preprocessing"]["interpolation"]
    with pytest.raises(errors.CheckpointError, match=r"lacks stem\.conv1\.conv\.weight .* so that it is no halonet26t"):
        weights.load(str(path), architecture="halonet26t")
    with pytest.raises(errors.ConfigError, match="architecture='h1' is none of timm's halo models; use one of halonet26t"):
        weights.load(str(path), architecture="h1")
    with pytest.raises(errors.ConfigError, match="step='7', but .* holds step 0 alone"):
        weights.load(str(path), step="7")


def test_a_folder_of_the_hub(tmp_path, monkeypatch):
    """As `timm` writes it: `config.json` names the architecture and says how images are prepared."""
    (tmp_path / "model.safetensors").write_bytes(safetensors.numpy.save(arrays("halonet26t")))
    about = {"architecture": "halonet26t", "pretrained_cfg": {"input_size": [3, 288, 224], "crop_pct": 1.0}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    asked = []
    monkeypatch.setattr(hub, "download", lambda path, files: asked.append(path) or tmp_path)
    loaded = weights.load("hf://timm/halonet26t.a1h_in1k")
    assert asked == ["hf://timm/halonet26t.a1h_in1k"] and loaded.config.model.name == "halonet26t"
    assert (loaded.config.data.image_size, loaded.config.data.eval_crop, loaded.image_shape) == ((288, 224), 1.0, (288, 224))
    path, config = weights.load_config("hf://timm/halonet26t.a1h_in1k")  # as evaluation does first
    assert path == tmp_path and config.model.name == "halonet26t" and config.data.image_size == (288, 224)
    (tmp_path / "config.json").write_text(json.dumps(about | {"pretrained_cfg": {"mean": "dark"}}))
    with pytest.raises(errors.ConfigError, match="pretrained_cfg of config.json has damaged preprocessing"):
        weights.load("hf://timm/halonet26t.a1h_in1k")


def test_files_that_are_no_weights(tmp_path):
    class Evil:
        def __reduce__(self):
            return pytest.fail, ("a pickle was executed",)

    for name, content in (
        ("pickle.pth", pickle.dumps(Evil())), ("text.safetensors", b"hello"), ("long.safetensors", b"\xff" * 16),
        ("empty.bin", b""), ("absent.pt", None),
    ):  # fmt: skip
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises((errors.CheckpointError, errors.ConfigError), match=name) as raised:
            weights.load(str(tmp_path / name))
        assert "\n" not in str(raised.value)


def test_thousand_classes_have_imagenets_names():
    names = timm._class_names(1000)
    assert names[0] == "n01440764" and names == sorted(names) and len(set(names)) == 1000


@pytest.mark.parametrize("height, width", [(300, 401), (517, 280), (272, 272), (60, 90)])
def test_preprocessing_is_timms(height, width):
    """By torchvision's rules: the shorter side to 272, the longer in proportion, rounded down, then the central 256."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    config = timm.make_config("halonet50ts")
    found = images.eval_transform(image, config.data)
    scale = 272 / min(height, width)
    size = [272 if n == min(height, width) else int(272 * n / min(height, width)) for n in (width, height)]
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    top, left = (int(round((n - 256) / 2)) for n in resized.shape[:2])
    np.testing.assert_array_equal(found, resized[top : top + 256, left : left + 256])
    assert scale * max(height, width) - 1 < max(size) <= scale * max(height, width) + 1e-9
    crop = images.train_transform(image, np.random.default_rng(1), config.data)
    assert crop.shape == (256, 256, 3)


def test_stage_options_do_not_act_on_listed_blocks():
    with pytest.raises(ValueError, match=r"base_width=32 has no effect on halonet50ts, which lists its blocks; .*models\.stages"):
        models.create("halonet50ts", base_width=32)
    stages = models.stages("halo2botnet50ts_256", block_size=4, halo_size=1)
    assert {(b.block_size, b.halo_size) for stage in stages for b in stage if b.kind == "attention"} == {(4, 1), (8, 0)}
    config = config_lib.imagenet()
    config.model.name, config.model.se_ratio = "halonet50ts", 0.5
    with pytest.raises(errors.ConfigError, match="config.model: se_ratio=0.5 has no effect on halonet50ts"):
        config_lib.validate(config, 1)
