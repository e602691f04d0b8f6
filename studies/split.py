"""One window, split between block and halo in several ways.

    python -m halonet_jax.study --study=studies/split.py --out=studies_out/split --scale=imagenet

The paper: for one window size, the split between b and h hardly matters. All windows here are 14 pixels, the window of
HaloNet-50; at scale tiny, 8 pixels.
"""

from halonet_jax.studies import Plot, Row, Study

STUDY = Study(
    title="The split between block and halo",
    question="Does it matter how a window is split between block and halo?",
    finding="For one window size, the split hardly matters as long as there is a halo.",
    rows=tuple(
        Row(
            f"h {halo}",
            "configs/halonet50.py",
            {"model.block_size": 14 - 2 * halo, "model.halo_size": halo},
            tiny={"model.block_size": 8 - 2 * halo, "model.halo_size": halo},
        )
        for halo in (1, 2, 3)
    ),
    plot=Plot("bar"),
)
