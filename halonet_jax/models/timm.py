"""timm's halo models, block by block (byobnet.py and byoanet.py of pytorch-image-models 1.0.31).

They differ from the paper's in their conventions: keys outside of the map are zeros, each relative table has all channels
of a head, and strided queries count as adjacent. `weights.timm` converts their trained weights.
"""

import itertools

from halonet_jax.models.blocks import BlockSpec, Stages

RESNET_WIDTHS = (256, 512, 1024, 2048)
_KINDS = {"c": "conv", "h": "attention", "m": "attention", "l": "lambda"}


def _multiple_of_8(width: float, least: int = 8) -> int:
    return max(least, int(width + 4) // 8 * 8)


def _stages(
    patterns, *, widths=RESNET_WIDTHS, mid=lambda stage, inputs: 64 * 2**stage, strides=(1, 2, 2, 2), inputs=64,
    heads=(8, 8, 8, 8), block_size=8, halo_size=3, query_width=None, gate=None, group_width=None, pool=False, **every,
) -> Stages:  # fmt: skip
    """Returns the blocks of a model.

    Args:
        patterns: for each stage a letter for each block: c 3x3 convolution, h halo attention, m attention over the whole
            map of 256 px images, l lambda layer.
        widths: of the stages' outputs.
        mid: function from the stage, from 0, and the width of the block's input to the spatial layer's width.
        strides: of the stages' first blocks.
        inputs: width of the stem's output.
        heads: of the stages' halo attention.
        block_size: of halo attention.
        halo_size: of halo attention.
        query_width: function from the spatial layer's width to that of queries; None: the same.
        gate: function from the spatial layer's width to `gate` and `gate_size` of a convolution.
        group_width: channels in a group of a 3x3 convolution; None: one group.
        pool: as of `BlockSpec`, for halo attention.
        **every: further fields of all blocks.
    """
    stages = []
    for stage, (pattern, width) in enumerate(zip(patterns, widths)):
        blocks = []
        for letter, stride in zip(pattern, itertools.chain([strides[stage]], itertools.repeat(1))):
            channels = mid(stage, inputs)
            if letter == "c":
                rest = {"groups": channels // group_width} if group_width else {}
                rest |= gate(channels) if gate else {}
            elif letter == "l":
                rest = {"num_heads": 4, "query_width": 64, "context_size": 13}
            elif letter == "m":
                rest = {"num_heads": 4, "block_size": 8, "halo_size": 0, "full_tables": True}
            else:
                rest = dict(num_heads=heads[stage], block_size=block_size, halo_size=halo_size, full_tables=True)
                rest |= {"query_width": query_width(channels)} if query_width else {}
                rest |= ({"pool": True} if pool else {"adjacent_queries": True}) if stride > 1 else {}
            blocks.append(BlockSpec(_KINDS[letter], channels, width, stride, **rest, **every))
            inputs = width
        stages.append(tuple(blocks))
    return tuple(stages)


def _squeeze_excite(ratio):
    return lambda channels: {"gate": "se", "gate_size": _multiple_of_8(channels * ratio)}


def _model(stages, stem="tiered", stem_width=64, activation="silu", final_width=0):
    return {
        "stages": stages, "stem": stem, "stem_width": stem_width, "activation": activation, "final_width": final_width,
        "padding": "zero",
    }  # fmt: skip


MODELS = {
    "halonet26t": _model(_stages(("cc", "cc", "ch", "hh"), halo_size=2), activation="relu"),
    "halonet50ts": _model(_stages(("ccc", "ccch", "chchch", "chc"), heads=(4, 4, 8, 8))),
    "halonet_h1": _model(
        _stages(("hhh", "hhh", "h" * 10, "hhh"), widths=(64, 128, 256, 512)), stem="conv", activation="relu"
    ),
    "sehalonet33ts": _model(
        _stages(("cc", "cch", "cch", "hh"), widths=(256, 512, 1024, 1536), gate=_squeeze_excite(1 / 16)),
        stem="tiered_conv", final_width=1280,
    ),
    "eca_halonext26ts": _model(
        _stages(
            ("cc", "cc", "ch", "hh"), halo_size=2, group_width=16, query_width=lambda channels: 128,
            gate=lambda channels: {"gate": "eca", "gate_size": 3 if channels == 64 else 5},
        )
    ),
    "haloregnetz_b": _model(
        _stages(
            ("cc", "c" * 6, "ccch" * 3, "hh"), widths=(48, 96, 192, 288), mid=lambda stage, inputs: 3 * inputs,
            strides=(2, 2, 2, 2), inputs=32, block_size=7, halo_size=2, group_width=16, gate=_squeeze_excite(1 / 4), pool=True,
            query_width=lambda channels: _multiple_of_8(0.33 * channels), shortcut="identity", last_activation=False,
        ),
        stem="conv3", stem_width=32, final_width=1536,
    ),
    "halo2botnet50ts_256": _model(_stages(("ccc", "chch", "chchch", "cmc")), stem="tiered_conv"),
    "lamhalobotnet50ts_256": _model(_stages(("ccc", "clcl", "chchch", "cmc")), stem="tiered_conv"),
}  # fmt: skip
