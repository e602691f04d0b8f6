"""Stages of block specifications: what they say is what the network does; stages that mix kinds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from halonet_jax import models
from halonet_jax.models import BlockSpec, HaloAttention, blocks

CONV = BlockSpec("conv", width=8, out_width=16)
HALO = BlockSpec("attention", width=8, out_width=16, num_heads=2, block_size=4, halo_size=1, value_width=12)
# The second stage mixes: a stack of two, an attention block, one of another map size, a block like one before.
MIXED = (
    (CONV,),
    (dataclasses.replace(CONV, stride=2), CONV, CONV, HALO, dataclasses.replace(HALO, stride=2, block_size=3, se_ratio=0.25), CONV),
    (dataclasses.replace(HALO, out_width=24), HALO, HALO),
)


def shapes(model, size=40):
    init = functools.partial(model.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, size, size + 6, 3)))


def mixed(**options):
    return models.create("h1", 5, stages=MIXED, stem_width=8, **options)


@pytest.mark.parametrize(
    "scan, second_stage, third_stage",
    [
        (False, [f"stage2_block{n}" for n in range(1, 7)], [f"stage3_block{n}" for n in range(1, 4)]),
        (
            True, ["stage2_block1", "stage2_block4", "stage2_block5", "stage2_block6", "stage2_blocks2to3"],
            # The first HALO gets 24 channels and has a shortcut convolution; so it is unlike the second.
            [f"stage3_block{n}" for n in range(1, 4)],
        ),
    ],
)  # fmt: skip
def test_a_stage_may_mix_blocks(scan, second_stage, third_stage):
    params = shapes(mixed(scan=scan))["params"]["backbone"]
    assert sorted(name for name in params if name.startswith("stage2")) == second_stage
    assert sorted(name for name in params if name.startswith("stage3")) == third_stage
    attending = {name for name in params if "attention" in params[name]}
    assert attending == {"stage2_block4", "stage2_block5", *third_stage}
    assert params["stage2_block4"]["attention"]["value"]["kernel"].shape == (8, 12)
    assert params["stage2_block5"]["attention"]["rel_rows"].shape == (2 * 3 + 2 * 1 - 1, 2)
    assert "se" in params["stage2_block5"] and "se" not in params["stage2_block4"]


@pytest.mark.parametrize("model", [mixed(), models.create("h7_conv1", stage_sizes=(1, 2, 1, 1))], ids=["mixed", "h7_conv1"])
def test_attention_layers_are_those_that_run(model):
    seen = []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, HaloAttention) and context.method_name == "__call__":
            layer, stage = context.module, context.module.parent.name
            stage, block = stage.removeprefix("stage").split("_block")
            sizes = layer.num_heads, layer.channels, layer.value_channels, layer.block_size, layer.halo_size, layer.stride
            seen.append(blocks.AttentionLayer(int(stage), int(block), *args[0].shape[1:3], *sizes))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        shapes(model, size=101)
    assert model.backbone.attention_layers(101, 107) == seen and len(seen) > 3


def test_a_detector_backbone_replaces_the_last_three_convolutions():
    model = models.create("resnet50_se_halo")
    assert [(n.stage, n.block, n.height, n.stride) for n in model.backbone.attention_layers(1024, 1024)] == [
        (4, 1, 64, 2), (4, 2, 32, 1), (4, 3, 32, 1)
    ]  # fmt: skip
    assert model.describe(1, 1024, 1024).endswith("xla for 3 of 3 layers")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "halo"}, "kind='halo' is unknown; use one of attention, conv"),
        ({"width": 0}, "width=0 must be a whole number of at least 1"),
        ({"stride": 0}, "stride=0 must be"),
        ({"kind": "conv"}, "num_heads=2 must be None in a block of kind='conv'; leave it out, or set kind='attention'"),
        ({"num_heads": None}, "num_heads=None must be a whole number of at least 1"),
        ({"num_heads": 3}, "num_heads=3 must divide 8 channels of queries into even parts; .* a multiple of 6"),
        ({"query_width": 6}, "num_heads=2 must divide 6 channels of queries into even parts; .* a multiple of 4"),
        ({"value_width": 9}, "num_heads=2 must divide 9 channels of values; .* a multiple of 2"),
        ({"block_size": None}, "block_size=None must be"),
        ({"se_ratio": -1}, "se_ratio=-1 must be a finite number between 0 and 1"),
        ({"groups": 2}, "groups=2 must be 1 in a block of kind='attention'; leave it out, or set kind='conv'"),
        ({"pool": 1}, "pool=1 must be True or False"),
        ({"shortcut": "none"}, "shortcut='none' is unknown; use one of conv, identity"),
        ({"adjacent_queries": True, "stride": 3}, "needs a block_size that stride=3 divides, not 4; use block_size=6"),
        ({"kind": "lambda"}, "block_size=4 must be None in a block of kind='lambda'"),
    ],
)
def test_bad_blocks(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HALO, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"groups": 3}, "groups=3 must divide width=8"),
        ({"gate": "eca", "gate_size": 4}, "gate_size=4 must be odd for gate='eca'; for example gate_size=5"),
        ({"gate": "se"}, "gate_size=None must be a whole number"),
        ({"gate_size": 3}, "gate_size=3 must be None without a gate"),
        ({"kind": "lambda", "num_heads": 2, "context_size": 4}, "context_size=4 must be odd; for example context_size=5"),
        ({"kind": "lambda", "num_heads": 2, "context_size": 3, "stride": 2}, "stride=2 must be 1 in a block of kind='lambda'"),
    ],
)
def test_bad_blocks_of_other_kinds(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONV, **options)


@pytest.mark.parametrize(
    "stages, options, message",
    [
        ([], {}, "must have at least one stage; give a list of stages"),
        ([[CONV], []], {}, "stage 2 is .* it must have at least one block"),
        ([CONV], {}, "stage 1 is BlockSpec.* give a list of stages, each a list of models.BlockSpec"),
        ([["conv"]], {}, "stage 1 has 'conv' in it, which is no block"),
        (MIXED, {"block_size": 8}, "block_size=8 has no effect beside stages; set it in the blocks, or leave it out"),
    ],
)
def test_bad_stages(stages, options, message):
    with pytest.raises(ValueError, match=message):
        models.create("h1", stages=stages, **options)
