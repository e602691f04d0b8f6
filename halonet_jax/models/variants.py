"""Every architecture of the paper as data (arXiv 2103.12731, tables 1, 3 and appendix), and the rules that a variant obeys."""

import difflib

# What a variant may set, with the values of HaloNet-H1 without its third stage's depth.
DEFAULTS = dict(
    stage_sizes=(3, 3, 10, 3),
    stage_kinds=("attention",) * 4,  # of each stage's spatial layer: "attention" or "conv" (3x3)
    stem="conv",  # "conv": 7x7/2 conv + 3x3/2 max pool; "patch": one 4x4/4 conv
    stem_width=64,
    base_width=64,  # c of the first stage; doubles every stage
    num_heads=(4, 8, 8, 8),
    block_size=8,  # b
    halo_size=3,  # h
    value_ratio=1.0,  # r_v
    expansion_ratio=1.0,  # r_b
    final_width=0,  # d_f; 0: no last 1x1 conv
    activation="silu",  # "silu" or "relu"
    se_ratio=0.0,  # squeeze-and-excitation bottleneck over block output width; 0: off
    se_kinds=("attention", "conv"),  # the kinds of block that squeeze-and-excitation is in
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
    # Hybrids of table 3: 3x3 convs (c to c) with squeeze-and-excitation in the named stages. The ratio is the paper's for
    # detection; for these it states none.
    "h7_conv1": _with_convs(_H7, 1, se_ratio=1 / 8, se_kinds=("conv",)),
    "h7_conv12": _with_convs(_H7, 2, se_ratio=1 / 8, se_kinds=("conv",)),
    "h7_conv123": _with_convs(_H7, 3, se_ratio=1 / 8, se_kinds=("conv",)),
    "h4_base128": _H4_BASE128,
    "h4_base128_conv12": _with_convs(_H4_BASE128, 2),
    "h4_base128_patch4": dict(_H4_BASE128, stem="patch"),
    # The ablations' models: ResNet-50's allocation, 16 channels per head.
    "halonet50": _RESNET50,
    "resnet50": dict(_RESNET50, stage_kinds=("conv",) * 4),
}


def resolve(name: str, **overrides) -> dict:
    """Returns the named variant with `overrides`, checked.

    Raises:
        ValueError: for an unknown name or key, or for widths that the heads do not divide.
    """
    if name not in VARIANTS:
        raise ValueError(f"model {name!r} is unknown; {_nearest(name, VARIANTS)}")
    unknown = sorted(set(overrides) - set(DEFAULTS))
    if unknown:
        raise ValueError(f"model option {unknown[0]!r} is unknown; {_nearest(unknown[0], DEFAULTS)}")
    variant = dict(VARIANTS[name], **overrides)
    _check(variant)
    return variant


def _check(variant):
    for key, known in (
        ("stem", ("conv", "patch")), ("activation", ("silu", "relu")),
    ):  # fmt: skip
        if variant[key] not in known:
            raise ValueError(f"{key}={variant[key]!r} is unknown; use one of {', '.join(known)}")
    for key in ("stage_sizes", "stage_kinds", "num_heads"):
        if len(variant[key]) != 4:
            raise ValueError(f"{key}={variant[key]!r} must have four entries, one for each stage")
    if min(variant["stage_sizes"]) < 1:
        raise ValueError(f"stage_sizes={variant['stage_sizes']!r} must all be at least 1")
    for key, least in (("block_size", 1), ("halo_size", 0), ("base_width", 1), ("stem_width", 1), ("final_width", 0)):
        if variant[key] < least:
            raise ValueError(f"{key}={variant[key]!r} must be at least {least}")
    for key in ("value_ratio", "expansion_ratio"):
        if not variant[key] > 0:
            raise ValueError(f"{key}={variant[key]!r} must be more than 0")
    if not 0 <= variant["se_ratio"] <= 1:
        raise ValueError(f"se_ratio={variant['se_ratio']!r} must be between 0 and 1")
    for stage, (kind, heads) in enumerate(zip(variant["stage_kinds"], variant["num_heads"])):
        if kind not in ("attention", "conv"):
            raise ValueError(f"stage_kinds[{stage}]={kind!r} is unknown; use attention or conv")
        width = variant["base_width"] * 2**stage
        values = width * variant["value_ratio"]
        if kind != "attention":
            continue
        if width % (2 * heads):
            raise ValueError(
                f"stage {stage + 1} is {width} wide (base_width={variant['base_width']}), and its {heads} heads need an even "
                f"number of channels each; use a width that is a multiple of {2 * heads}, or other num_heads"
            )
        if values % heads:
            raise ValueError(
                f"stage {stage + 1} has values {values:g} wide (value_ratio={variant['value_ratio']}), which its {heads} heads do "
                "not divide; use another value_ratio"
            )


def _nearest(value, known):
    close = difflib.get_close_matches(value, known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(known)}"
