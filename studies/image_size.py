"""Image size, with attention and with convolutions.

    python -m halonet_jax.study --study=studies/image_size.py --out=studies_out/image_size --scale=imagenet

Larger images have more blocks, and windows that cover less of the image. At scale tiny the sizes are a quarter.
"""

from halonet_jax.studies import Plot, Row, Study

STUDY = Study(
    title="Image size",
    question="What do larger images bring, with attention and with convolutions?",
    finding="Both gain from larger images; the gap between them stays.",
    rows=tuple(
        Row(
            f"{name}, {share}",
            f"configs/{recipe}.py",
            {"data.image_size": size},
            tiny={"data.image_size": size // 4},
            small={"data.image_size": size // 2},
        )  # fmt: skip
        for name, recipe in (("HaloNet-50", "halonet50"), ("ResNet-50", "resnet50"))
        for size, share in ((128, "half size"), (256, "full size"), (384, "3/2 size"))
    ),
    plot=Plot("scatter", x="images_per_second", log_x=True, front=True),
)
