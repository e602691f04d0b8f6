"""What to scale: HaloNet-50 grown to about 30 M parameters in five ways.

    python -m halonet_jax.study --study=studies/scaling.py --out=studies_out/scaling --scale=imagenet

The paper grows the model with label smoothing, RandAugment, SE and SiLU. It gives the number of layers, 98, but not
where they are. 98 layers are 32 blocks; with (3, 4, 22, 3) the model without SE has 29.6 M parameters. The paper's 30 M
fit models without SE in the other rows as well (27.5 to 30.6 M); with SE of ratio 1/8 ours have 35 to 43 M.
"""

from halonet_jax.studies import Plot, Row, Study

_RECIPE = "configs/halonet50.py"
_ALL = {"model.se_ratio": 0.125, "model.activation": "silu"}

STUDY = Study(
    title="What to scale",
    question="Where should more parameters go?",
    finding="Into more layers first, then wider values (r_v), then width; r_b and r_qk bring little or nothing.",
    rows=(
        Row("baseline", _RECIPE, _ALL, published=80.5, source="component table"),
        Row(
            "more layers",
            _RECIPE,
            _ALL | {"model.stage_sizes": (3, 4, 22, 3)},
            tiny=_ALL | {"model.stage_sizes": (1, 1, 7, 1)},
            published=81.4,
            source="scaling section",
        ),
        Row("r_v 3", _RECIPE, _ALL | {"model.value_ratio": 3.0}, published=81.0, source="scaling section"),
        Row(
            "width x 1.25",
            _RECIPE,
            _ALL | {"model.base_width": 80, "model.num_heads": (5, 10, 20, 40)},
            tiny=_ALL | {"model.base_width": 20},
            small=_ALL | {"model.base_width": 40},
            published=80.9,
            source="scaling section",
        ),
        Row("r_b 6.5", _RECIPE, _ALL | {"model.expansion_ratio": 6.5}, published=80.6, source="scaling section"),
        Row("r_qk 6.5", _RECIPE, _ALL | {"model.query_ratio": 6.5}, published=80.3, source="scaling section"),
        Row(
            "larger window",
            _RECIPE,
            _ALL | {"model.block_size": 12, "model.halo_size": 4},
            tiny=_ALL | {"model.block_size": 6, "model.halo_size": 2},
        ),
    ),
    plot=Plot("scatter", x="parameters", front=True),
)
