"""Every architecture as data: the paper's (arXiv 2103.12731, tables 1, 3 and appendix), timm's, and the rules for variants."""

import dataclasses
import math

from halonet_jax.models import checks, stems, timm
from halonet_jax.models.blocks import BlockSpec, Stages
from halonet_jax.ops.halo_attention import PADDINGS

KINDS = ("attention", "conv")  # of whole stages
DOWNSAMPLINGS = ("strided", "pooled")

# What a variant may set, with the values of HaloNet-H1 without its third stage's depth.
DEFAULTS = dict(
    stage_sizes=(3, 3, 10, 3),
    stage_kinds=("attention",) * 4,  # of each stage's spatial layer: "attention" or "conv" (3x3)
    stem="conv",  # of `stems.STRIDES`. "conv": 7x7/2 conv + 3x3/2 max pool; "patch": one 4x4/4 conv
    stem_width=64,
    base_width=64,  # c of the first stage; doubles every stage
    num_heads=(4, 8, 8, 8),
    block_size=8,  # b
    halo_size=3,  # h
    query_ratio=1.0,  # r_qk: width of queries and keys over c
    value_ratio=1.0,  # r_v
    expansion_ratio=1.0,  # r_b
    final_width=0,  # d_f; 0: no last 1x1 conv
    activation="silu",  # "silu" or "relu"
    se_ratio=0.0,  # squeeze-and-excitation bottleneck over block output width; 0: off
    se_kinds=("attention", "conv"),  # the kinds of block that squeeze-and-excitation is in
    positions="relative",  # of attention: "relative", "absolute" or "none", see `layers.HaloAttention`
    # Of attention: "strided": every second pixel per axis attends, as in the paper; "pooled": all do, and 2x2 means follow.
    downsampling="strided",
    padding="mask",  # of keys outside of the map: "mask" or "zero"
)


def _halonet(block_size, halo_size, value_ratio, expansion_ratio, third_stage, final_width=0, **rest):
    return dict(
        DEFAULTS, block_size=block_size, halo_size=halo_size, value_ratio=value_ratio, expansion_ratio=expansion_ratio,
        stage_sizes=(3, 3, third_stage, 3), final_width=final_width, **rest,
    )  # fmt: skip


_H7 = _halonet(10, 3, 4.0, 3.5, 26, 2048)
# The pre-training model: H4 with base width 128, r_b 4, four blocks in stage 2 and no d_f, at 256 px with b 8, h 2.
_H4_BASE128 = dict(_halonet(8, 2, 1.0, 4.0, 12), base_width=128, stage_sizes=(3, 4, 12, 3))
_RESNET50 = dict(
    DEFAULTS, stage_sizes=(3, 4, 6, 3), num_heads=(4, 8, 16, 32), expansion_ratio=4.0, activation="relu"
)  # fmt: skip


# Detection backbones: squeeze-and-excitation of 1/8 in all blocks (section 4).
_RESNET50_SE = dict(_RESNET50, stage_kinds=("conv",) * 4, se_ratio=1 / 8)
_RESNET101_SE = dict(_RESNET50_SE, stage_sizes=(3, 4, 23, 3))


def _with_convs(variant, stages, **rest):
    return dict(variant, stage_kinds=("conv",) * stages + ("attention",) * (4 - stages), **rest)


VARIANTS = {
    # name          b  h  r_v  r_b  l3  d_f
    "h0": _halonet(8, 3, 1.0, 0.5, 7),
    "h1": _halonet(8, 3, 1.0, 1.0, 10),
    "h2": _halonet(8, 3, 1.0, 1.25, 11),
    # The table's d_f of 1024 gives 11.8 M parameters where it says 12.3 M; 1280 would give that. We keep 1024.
    "h3": _halonet(10, 3, 1.0, 1.5, 12, 1024),
    "h4": _halonet(12, 2, 1.0, 3.0, 12, 1280),
    "h5": _halonet(14, 2, 2.5, 2.0, 23, 1536),
    "h6": _halonet(8, 4, 3.0, 2.75, 24, 1536),
    "h7": _H7,
    # Hybrids of table 3: 3x3 convs (c to c) with squeeze-and-excitation in the named stages. The ratio is the paper's
    # for detection; for these it states none.
    "h7_conv1": _with_convs(_H7, 1, se_ratio=1 / 8, se_kinds=("conv",)),
    "h7_conv12": _with_convs(_H7, 2, se_ratio=1 / 8, se_kinds=("conv",)),
    "h7_conv123": _with_convs(_H7, 3, se_ratio=1 / 8, se_kinds=("conv",)),
    "h4_base128": _H4_BASE128,
    "h4_base128_conv12": _with_convs(_H4_BASE128, 2),
    "h4_base128_patch4": dict(_H4_BASE128, stem="patch"),
    # The ablations' models: ResNet-50's allocation, 16 channels per head.
    "halonet50": _RESNET50,
    "resnet50": dict(_RESNET50, stage_kinds=("conv",) * 4),
    # Halo attention in place of the last three 3x3 convolutions, those of stage 4. The paper has block sizes 8 and 32.
    "resnet50_se": _RESNET50_SE,
    "resnet50_se_halo": _with_convs(_RESNET50_SE, 3),
    "resnet101_se": _RESNET101_SE,
    "resnet101_se_halo": _with_convs(_RESNET101_SE, 3),
    # These have "stages" in place of what describes the paper's stages.
    **timm.MODELS,
}


# What describes the stages; the others of `DEFAULTS` describe stem, activation and the last convolution.
STAGE_OPTIONS = (
    "stage_sizes", "stage_kinds", "base_width", "num_heads", "block_size", "halo_size", "query_ratio", "value_ratio",
    "expansion_ratio", "se_ratio", "se_kinds", "positions", "downsampling",
)  # fmt: skip


def resolve(name: str, **overrides) -> dict:
    """Returns the named variant, checked: a value for each key of `DEFAULTS`.

    timm's models have "stages", their blocks, in place of the keys of `STAGE_OPTIONS`. Of these, `block_size` and
    `halo_size` may be overridden, and then hold for all blocks with a halo.

    Args:
        name: a key of `VARIANTS`.
        **overrides: values to take in place of the variant's, by keys of `DEFAULTS`.

    Raises:
        ValueError: a name, key or kind is unknown, a value is of another type or out of range, the heads do not divide
            the widths, squeeze-and-excitation or an option of attention would be in no block, or a stage option is given for
            a model that lists its blocks.
    """
    if not isinstance(name, str) or name not in VARIANTS:
        raise ValueError(f"model {name!r} is unknown; {checks.nearest(name, VARIANTS)}")
    unknown = sorted(set(overrides) - set(DEFAULTS))
    if unknown:
        raise ValueError(f"model option {unknown[0]!r} is unknown; {checks.nearest(unknown[0], DEFAULTS)}")
    variant = dict(VARIANTS[name], **overrides)
    if "stages" not in variant:
        _check_stages(variant)
    elif fixed := [key for key in overrides if key in STAGE_OPTIONS and key not in ("block_size", "halo_size")]:
        raise ValueError(
            f"{fixed[0]}={overrides[fixed[0]]!r} has no effect on {name}, which lists its blocks; leave it out, or change the "
            f"blocks of models.stages({name!r}) and give them to models.create as stages"
        )
    _check(variant)
    stages(variant)
    return variant


def stages(variant: dict) -> Stages:
    """Returns the blocks of a variant.

    Args:
        variant: a result of `resolve`.

    Returns:
        A tuple for each stage, with the specification of each of its blocks.

    Raises:
        ValueError: the heads of a stage do not divide its widths, or its queries or values have no whole number of channels.
    """
    v, found = variant, []
    if "stages" in v:
        sizes = {key: v[key] for key in ("block_size", "halo_size") if key in v}
        return tuple(
            tuple(dataclasses.replace(block, **sizes) if block.halo_size else block for block in stage) for stage in v["stages"]
        )
    for stage, (depth, kind, num_heads) in enumerate(zip(v["stage_sizes"], v["stage_kinds"], v["num_heads"])):
        width = v["base_width"] * 2**stage
        options, stride = {}, 1 if stage == 0 else 2
        try:
            if kind == "attention":
                options = dict(
                    num_heads=num_heads, block_size=v["block_size"], halo_size=v["halo_size"],
                    query_width=None if v["query_ratio"] == 1 else _channels(v, "query_ratio", width, num_heads, "queries"),
                    value_width=_channels(v, "value_ratio", width, num_heads, "values"), positions=v["positions"],
                    pool=stride > 1 and v["downsampling"] == "pooled",
                )  # fmt: skip
            block = BlockSpec(
                kind, width, int(width * v["expansion_ratio"]), stride=stride,
                se_ratio=v["se_ratio"] if kind in v["se_kinds"] else 0.0, **options,
            )  # fmt: skip
        except ValueError as error:
            about = f"base_width={v['base_width']}, query_ratio={v['query_ratio']}, value_ratio={v['value_ratio']}"
            raise ValueError(f"stage {stage + 1} is {width} wide ({about}): {error}") from None
        found.append((block, *(dataclasses.replace(block, stride=1, pool=False),) * (depth - 1)))
    return tuple(found)


def _channels(variant, key, width, num_heads, what):
    channels = round(width * variant[key], 6)  # 80 * 1.1 is 88 but for rounding
    if channels != int(channels) or channels < 1:
        raise ValueError(
            f"{key}={variant[key]!r} gives {channels:g} channels of {what}; it must give a whole number that {num_heads} heads "
            f"divide; for example {key}=1.0"
        )
    return int(channels)


def _check(variant):
    v = variant
    checks.choice("stem", v["stem"], stems.STRIDES)
    checks.choice("activation", v["activation"], ("silu", "relu"))
    checks.choice("padding", v["padding"], PADDINGS)
    for key, least in (("block_size", 1), ("halo_size", 0), ("stem_width", 1), ("final_width", 0)):
        if key in v:
            checks.whole(key, v[key], least, DEFAULTS[key])


def _check_stages(variant):
    v = variant
    for key in ("stage_sizes", "stage_kinds", "num_heads"):
        checks.entries(key, v[key], 4, 4, DEFAULTS[key])
    checks.entries("se_kinds", v["se_kinds"], 0, 2, DEFAULTS["se_kinds"])
    for key in ("stage_sizes", "num_heads"):
        for stage, value in enumerate(v[key]):
            checks.whole(f"{key}[{stage}]", value, 1)
    for key in ("stage_kinds", "se_kinds"):
        for position, kind in enumerate(v[key]):
            checks.choice(f"{key}[{position}]", kind, KINDS)
    checks.whole("base_width", v["base_width"], 1, DEFAULTS["base_width"])
    for key in ("query_ratio", "value_ratio", "expansion_ratio"):
        checks.real(key, v[key], 0.001, 1000, example=DEFAULTS[key])
    if v["base_width"] * v["expansion_ratio"] < 1:
        raise ValueError(
            f"expansion_ratio={v['expansion_ratio']!r} gives stage 1 less than one channel (base_width={v['base_width']}); use "
            f"{math.ceil(1000 / v['base_width']) / 1000} or more"
        )
    checks.choice("positions", v["positions"], checks.POSITIONS)
    checks.choice("downsampling", v["downsampling"], DOWNSAMPLINGS)
    for key, first in (("query_ratio", 1), ("positions", 1), ("downsampling", 2)):
        if v[key] != DEFAULTS[key] and "attention" not in v["stage_kinds"][first - 1 :]:
            raise ValueError(
                f"{key}={v[key]!r} acts in no block: stage_kinds={v['stage_kinds']!r} has no attention in stages {first} to 4; add "
                f"it there, or set {key}={DEFAULTS[key]!r}"
            )
    checks.real("se_ratio", v["se_ratio"], 0, 1)
    if v["se_ratio"] and not set(v["se_kinds"]) & set(v["stage_kinds"]):
        raise ValueError(
            f"se_ratio={v['se_ratio']!r} acts in no block: se_kinds={v['se_kinds']!r} has none of the kinds in "
            f"stage_kinds={v['stage_kinds']!r}; add one of them to se_kinds, or set se_ratio=0"
        )
