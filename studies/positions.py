"""Positions: relative, absolute, or none.

    python -m halonet_jax.study --study=studies/positions.py --out=studies_out/positions --scale=tiny

The paper reports 77.5 for HaloNet-50 with absolute positions, and 78.6 for its baseline. It does not say how the
absolute positions enter; ours are learned and added to the keys (docs/models.md). "None" is our addition.
"""

from halonet_jax.studies import Plot, Row, Study

_BASELINE = {"label_smoothing": 0.0, "data.randaugment_layers": 0, "optimizer.weight_decay": 8e-5}

STUDY = Study(
    title="Positions",
    question="Does attention need relative positions?",
    finding="Relative positions are better than absolute ones, by 1.1 points.",
    rows=(
        Row("relative", "configs/halonet50.py", _BASELINE, published=78.6, source="component table, baseline"),
        Row(
            "absolute",
            "configs/halonet50.py",
            _BASELINE | {"model.positions": "absolute"},
            published=77.5,
            source="component section",
        ),
        Row("none", "configs/halonet50.py", _BASELINE | {"model.positions": "none"}),
    ),
    plot=Plot("bar"),
)
