"""Halo against no halo.

    python -m halonet_jax.study --study=studies/halo.py --out=studies_out/halo --scale=tiny

The paper compares b 4, h 1 with b 8, h 0: the smaller window with a halo wins. At scale tiny, each pair has one window:
4 pixels (b 2, h 1 against b 4, h 0) and 8 pixels (b 4, h 2 against b 8, h 0).
"""

from halonet_jax.studies import Plot, Row, Study


def _row(block, halo, tiny):
    return Row(
        f"window {tiny[0] + 2 * tiny[1]}, {'halo' if halo else 'no halo'}",
        "configs/halonet50.py",
        {"model.block_size": block, "model.halo_size": halo},
        tiny={"model.block_size": tiny[0], "model.halo_size": tiny[1]},
    )


STUDY = Study(
    title="Halo against no halo",
    question="Does a halo help when the window stays the same?",
    finding="b 4, h 1 beats b 8, h 0: halos matter.",
    rows=(_row(4, 1, (2, 1)), _row(8, 0, (4, 0)), _row(8, 4, (4, 2)), _row(16, 0, (8, 0))),
    baseline="window 8, no halo",
    plot=Plot("bar"),
)
