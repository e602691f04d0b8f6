"""Unmasked neighbourhoods against windows centred on each pixel.

    python -m halonet_jax.study --study=studies/masked.py --out=studies_out/masked --scale=tiny

Without a mask, all queries of a block see the whole neighbourhood. With it, each query sees a window of 2h + 1 pixels
centred on itself, as in stand-alone self-attention (SASA, arXiv 1906.05909). The paper gives no figure in its text.
"""

from halonet_jax.studies import Plot, Row, Study

STUDY = Study(
    title="Unmasked against masked neighbourhoods",
    question="Is it better to let every query of a block see the whole neighbourhood?",
    finding="The unmasked neighbourhood is better than centred windows, although shifts by one pixel then matter.",
    rows=(
        Row("unmasked", "configs/halonet50.py"),
        Row("masked", "configs/halonet50.py", {"model.window": "centered"}),
    ),
    plot=Plot("bar"),
)
