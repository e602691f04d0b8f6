"""Hybrids: H7 with convolutions in the first stages.

    python -m halonet_jax.study --study=studies/hybrids.py --out=studies_out/hybrids --scale=tiny

The convolutions have squeeze-and-excitation. Published speeds are training times relative to EfficientNet-B7.
At scale tiny the hybrids are those of H1: H7 in small would take more than half of the time of all studies.
"""

from halonet_jax.studies import Plot, Row, Study

# Stages with convolutions: top-1, and training time over EfficientNet-B7's.
_PUBLISHED = {0: (84.9, 1.9), 1: (84.6, 1.4), 2: (84.7, 1.0), 3: (83.8, 0.5)}
_NAMES = {0: "no convolutions", 1: "stage 1", 2: "stages 1-2", 3: "stages 1-3"}


def _tiny(stages):
    kinds = ("conv",) * stages + ("attention",) * (4 - stages)
    return {"model.stage_kinds": kinds} | ({"model.se_ratio": 0.125, "model.se_kinds": ("conv",)} if stages else {})


STUDY = Study(
    title="Hybrids of convolution and attention",
    question="Can convolutions take the first stages without loss?",
    finding="With convolutions in stages 1 and 2, H7 loses 0.2 points and trains in half the time; a third stage costs more.",
    rows=tuple(
        Row(
            _NAMES[stages],
            "configs/" + ("h7.py", "h7_conv1.py", "h7_conv12.py", "h7_conv123.py")[stages],
            recipes={"tiny": "configs/h1.py"},
            tiny=_tiny(stages),
            published=top1,
            published_speed=time,
            source="table of H7 hybrids",
        )
        for stages, (top1, time) in _PUBLISHED.items()
    ),
    plot=Plot("scatter", x="images_per_second", front=True),
)
