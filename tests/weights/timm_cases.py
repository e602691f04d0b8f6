"""Tiny networks of timm's kind, by which `test_timm.py` holds our conversion to timm's own numbers.

`python tests/weights/timm_cases.py`, where torch and timm are installed, writes these numbers anew. Arrays and images are
drawn by name, so that the file holds only timm's keys, shapes and results.
"""

import json
import zlib
from pathlib import Path

import numpy as np

from halonet_jax.models import BlockSpec

FILE = Path(__file__).with_name("timm_cases.json")
_HALO = dict(num_heads=2, block_size=4, halo_size=1, full_tables=True)
_ECA = dict(gate="eca", gate_size=3, groups=2)
_LINEAR = dict(shortcut="identity", last_activation=False)
_NARROW = _HALO | dict(block_size=3, query_width=16)

# Ours: image size, base model, options of `models.create`.
CASES = {
    # Adjacent queries, global attention, squeeze-and-excitation before the last convolution, tiered stem, final convolution.
    "halo": (32, "sehalonet33ts", dict(stem="tiered", stem_width=16, final_width=24, stages=(
        (BlockSpec("conv", 8, 32, gate="se", gate_size=8),),
        (BlockSpec("attention", 16, 64, 2, adjacent_queries=True, **_HALO), BlockSpec("attention", 16, 64, **_HALO)),
        (BlockSpec("attention", 16, 64, num_heads=2, block_size=4, halo_size=0, full_tables=True),),
    ))),
    # ECA, groups, narrow queries, a lambda layer, h1's stem, ReLU.
    "lambda": (32, "halonet_h1", dict(stem_width=16, stages=(
        (BlockSpec("conv", 8, 32, **_ECA),),
        (BlockSpec("conv", 16, 64, 2, **_ECA | {"groups": 4}), BlockSpec("attention", 16, 64, query_width=8, **_HALO)),
        (BlockSpec("lambda", 16, 64, num_heads=2, query_width=8, context_size=3),),
    ))),
    # Attention that is pooled, no shortcuts where shapes change, sums without activation, a stem of one convolution.
    "regnet": (24, "haloregnetz_b", dict(stem_width=8, final_width=24, stages=(
        (
            BlockSpec("conv", 24, 16, 2, groups=6, gate="se", gate_size=8, **_LINEAR),
            BlockSpec("conv", 48, 16, groups=12, gate="se", gate_size=16, **_LINEAR),
        ),
        (
            BlockSpec("attention", 48, 16, 2, pool=True, **_NARROW, **_LINEAR),
            BlockSpec("attention", 48, 16, **_NARROW, **_LINEAR),
        ),
    ))),
}  # fmt: skip


def array(key, shape):
    """The array of that name in every case, random."""
    rng = np.random.RandomState(zlib.crc32(key.encode()))
    if key.endswith("running_var"):
        x = rng.uniform(0.5, 2, shape)
    elif len(shape) == 1:
        x = rng.uniform(0.5, 1.5, shape) if key.endswith("weight") else rng.standard_normal(shape) * 0.3
    else:
        x = rng.standard_normal(shape) * np.prod(shape[1:]) ** -0.5 * (0.3 if "conv_lambda" in key else 1.4)
    return x.astype(np.float32)


def images(size):
    return np.random.RandomState(0).standard_normal((2, size, size, 3)).astype(np.float32)


def thinned(maps):
    """What of the maps is recorded: the second image, every fourth channel."""
    return [np.asarray(x)[1, ..., ::4] for x in maps]


def _record():
    import timm.models.byobnet as byobnet
    import torch

    def block(kind, channels, stride, depth=1, ratio=0.25, group=0, layer="halo", **options):
        attention = dict(self_attn_layer=layer, self_attn_kwargs=options) if kind == "self_attn" else {}
        return byobnet.ByoBlockCfg(kind, d=depth, c=channels, s=stride, gs=group, br=ratio, **attention)

    halo = dict(num_heads=2, block_size=4, halo_size=1)
    pooled = dict(num_heads=2, block_size=3, halo_size=1, dim_head=8)
    configs = {
        "halo": dict(
            blocks=(
                block("bottle", 32, 1), block("self_attn", 64, 2, 2, **halo),
                block("self_attn", 64, 1, layer="bottleneck", num_heads=2),
            ), stem_chs=16, stem_type="tiered", stem_pool="maxpool", act_layer="silu", num_features=24, attn_layer="se",
        ),
        "lambda": dict(
            blocks=(
                block("bottle", 32, 1, group=4),
                (block("bottle", 64, 2, group=4), block("self_attn", 64, 1, **halo, dim_head=4)),
                block("self_attn", 64, 1, layer="lambda", num_heads=2, dim_head=4, r=3),
            ), stem_chs=16, stem_type="7x7", stem_pool="maxpool", act_layer="relu", attn_layer="eca",
        ),
        "regnet": dict(
            blocks=(block("bottle", 16, 2, 2, ratio=3, group=4), block("self_attn", 16, 2, 2, ratio=3, **pooled)),
            stem_chs=8, stem_pool="", downsample="", num_features=24, act_layer="silu", attn_layer="se",
            attn_kwargs=dict(rd_ratio=0.25), block_kwargs=dict(bottle_in=True, linear_out=True),
        ),
    }  # fmt: skip
    found = {}
    for name, config in configs.items():
        size = CASES[name][0]
        model = byobnet.ByobNet(byobnet.ByoModelCfg(**config), num_classes=3, img_size=size).eval().double()
        state = {key: x for key, x in model.state_dict().items() if x.is_floating_point()}
        with torch.no_grad():
            for key, x in state.items():
                x.copy_(torch.from_numpy(array(key, tuple(x.shape))))
            x = model.stem(torch.from_numpy(images(size).transpose(0, 3, 1, 2)).double())
            maps = [x := stage(x) for stage in model.stages]
            logits = model.forward_head(model.final_conv(x)).numpy()
        found[name] = {
            "shapes": {key: tuple(x.shape) for key, x in state.items()}, "logits": logits.round(6).tolist(),
            "maps": [x.round(6).ravel().tolist() for x in thinned(x.permute(0, 2, 3, 1) for x in maps)],
        }  # fmt: skip
    FILE.write_text(json.dumps(found, separators=(",", ":")))


if __name__ == "__main__":
    _record()
