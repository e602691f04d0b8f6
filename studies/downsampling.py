"""Downsampling: strided attention against attention followed by average pooling.

    python -m halonet_jax.study --study=studies/downsampling.py --out=studies_out/downsampling --scale=tiny

Strided attention keeps every second query per axis, with the same neighbourhoods. It needs a quarter of the
multiply-adds in its layers.
"""

from halonet_jax.studies import Plot, Row, Study

STUDY = Study(
    title="Strided attention against average pooling",
    question="Does attention downsampling cost accuracy?",
    finding="Strided attention is as accurate as attention and average pooling, at a quarter of the cost of the layer.",
    rows=(
        Row("strided", "configs/halonet50.py"),
        Row("pooled", "configs/halonet50.py", {"model.downsampling": "pooled"}),
    ),
    plot=Plot("bar"),
)
