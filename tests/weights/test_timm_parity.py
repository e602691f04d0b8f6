"""timm's models against ours, with the same random weights. It needs torch and timm, and is skipped without them."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image

from halonet_jax import data, weights
from halonet_jax.models import timm as architectures
from halonet_jax.weights import timm as importer

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")


def randomised(name, seed=0):
    """timm's model in which every array is random: its own start hides attention behind zeros.

    Branches add less to their shortcuts than they might. Otherwise the deep models are so steep that float32 of timm's is
    further than 1e-4 from its own float64.
    """
    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False).eval()
    with torch.no_grad():
        for key, x in model.state_dict().items():
            if key.endswith("running_var"):
                x.uniform_(0.5, 2)
            elif key.endswith("running_mean"):
                x.normal_(std=0.3)
            elif key.endswith("conv_lambda.weight"):
                x.normal_(std=0.02)
            elif key == "head.fc.weight":
                x.normal_(std=0.05)
            elif x.ndim == 1 and key.endswith("weight"):
                x.uniform_(0.5, 1.5).mul_(0.6 if "conv3_1x1" in key else 1)
            elif x.ndim == 1 and x.is_floating_point():
                x.normal_(std=0.2)
    return model


@pytest.mark.parametrize("name", architectures.MODELS)
def test_logits_and_features(name, tmp_path):
    theirs = randomised(name)
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": theirs.state_dict()}, path)
    ours = weights.load(str(path))
    assert ours.config.model.name == name and ours.metadata["class_names"][0] == "n01440764"
    cfg, size = theirs.pretrained_cfg, ours.config.data.image_size
    assert (size, ours.config.data.eval_crop) == (cfg["input_size"][-1], cfg["crop_pct"])
    assert (ours.config.data.mean, ours.config.data.std) == (cfg["mean"], cfg["std"])

    images = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
    maps = []
    for stage in theirs.stages:
        stage.register_forward_hook(lambda module, args, out: maps.append(out.permute(0, 2, 3, 1).numpy()))
    with torch.no_grad():
        logits = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    apply = functools.partial(ours.model.apply, ours.variables)
    found = jax.jit(lambda x: (apply(x, train=False), apply(x, method="features")))(images)
    errors = [float(np.abs(np.asarray(x) - y).max()) for x, y in zip((found[0], *found[1]), (logits, *maps), strict=True)]
    sizes = [float(x.std()) for x in (logits, *maps)]
    print(name, "errors of logits and maps:", *(f"{x:.1e}" for x in errors), "std:", *(f"{x:.2g}" for x in sizes))
    assert max(errors) <= 1e-4


@pytest.mark.parametrize("height, width", [(300, 401), (517, 280), (60, 90), (256, 300)])
@pytest.mark.parametrize("size", [None, (256, 192), (200, 320)])
@pytest.mark.parametrize("name", ["halonet26t", "halonet50ts", "haloregnetz_b"])
def test_preprocessing(name, size, height, width):
    """Within 1 of 255 of timm's own evaluation transform; both are Pillow's filter, so that nothing differs."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    cfg = timm.create_model(name).pretrained_cfg
    kwargs = {"interpolation": "bicubic", "crop_pct": cfg["crop_pct"], "mean": (0, 0, 0), "std": (1, 1, 1)}
    config = importer.make_config(name, {"input_size": (3, *size)} if size else None).data
    transform = timm.data.create_transform((3, *size) if size else cfg["input_size"], is_training=False, **kwargs)
    theirs = transform(Image.fromarray(image)).permute(1, 2, 0).numpy() * 255
    ours = data.eval_transform(image, config)
    assert np.abs(ours - theirs).max() < 0.01
