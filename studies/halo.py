"""Halo against no halo.

    python -m halonet_jax.study --study=studies/halo.py --out=studies_out/halo --scale=tiny

The paper compares b 4, h 1 (window 6) with b 8, h 0: the smaller window with a halo wins. The other rows have pairs of one
window, at all scales.
"""

from halonet_jax.studies import Plot, Row, Study


def _row(block, halo, **options):
    label = f"window {block + 2 * halo}, {'halo' if halo else 'no halo'}"
    return Row(label, "configs/halonet50.py", {"model.block_size": block, "model.halo_size": halo}, **options)


STUDY = Study(
    title="Halo against no halo",
    question="Does a halo help when the window stays the same?",
    finding="b 4, h 1 beats b 8, h 0: halos matter.",
    rows=(_row(2, 1), _row(4, 0), _row(4, 1, scales=("small", "imagenet")), _row(4, 2), _row(8, 0)),
    baseline="window 8, no halo",
    plot=Plot("bar"),
)
