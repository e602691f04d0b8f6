"""Components: label smoothing, RandAugment, squeeze-and-excitation and SiLU, for HaloNet-50 and ResNet-50.

    python -m halonet_jax.study --study=studies/components.py --out=studies_out/components --scale=imagenet

The paper's component table has eight settings for both models: 150 epochs, 256 px, weight decay 4e-5 with RandAugment
and 8e-5 without. It does not state the ratio of squeeze-and-excitation; we take 1/8, its ratio for detection.
"""

from halonet_jax.studies import Plot, Row, Study

# Setting: top-1 of HaloNet-50 and of ResNet-50 in the paper.
_PUBLISHED = {
    "baseline": (78.6, 77.6),
    "LS": (79.7, 78.1),
    "LS + RA": (79.9, 78.4),
    "SE": (78.6, 78.6),
    "SE + SiLU": (79.0, 78.9),
    "LS + SE": (79.7, 78.9),
    "LS + SE + SiLU": (79.9, 79.1),
    "LS + RA + SE + SiLU": (80.5, 79.5),
}


def _overrides(setting):
    parts = setting.split(" + ")
    overrides = {"label_smoothing": 0.1 if "LS" in parts else 0.0}
    overrides |= {} if "RA" in parts else {"data.randaugment_layers": 0, "optimizer.weight_decay": 8e-5}
    overrides |= {"model.se_ratio": 0.125} if "SE" in parts else {}
    return overrides | ({"model.activation": "silu"} if "SiLU" in parts else {})


STUDY = Study(
    title="Components",
    question="Which part of the recipe brings how much, with attention and with convolutions?",
    finding="Attention gains more than convolutions from regularisation (LS, RA), and less from SE and SiLU.",
    rows=tuple(
        Row(
            f"{name}, {setting}",
            recipe=f"configs/{recipe}.py",
            overrides=_overrides(setting),
            published=top1[column],
            source="component table",
        )
        for column, (name, recipe) in enumerate((("HaloNet-50", "halonet50"), ("ResNet-50", "resnet50")))
        for setting, top1 in _PUBLISHED.items()
    ),
    plot=Plot("bar"),
)
