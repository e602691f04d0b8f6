"""Transfer: pre-training on many classes, fine-tuning on others.

    python -m halonet_jax.study --study=studies/transfer.py --out=studies_out/transfer --scale=tiny

At scale imagenet: ImageNet-21k to ImageNet-1k, at 384 and 512 px. The pre-training needs ImageNet-21k as a TFDS set or an
image folder: add data.source, data.name and data.dir to the overrides of its rows below.
At scale tiny: scenes whose answer is 0 to 4, then few scenes whose answer is 5 to 9, against training on these alone.
"""

from halonet_jax.studies import Plot, Row, Study

_FIRST, _SECOND = ("0", "1", "2", "3", "4"), ("5", "6", "7", "8", "9")
_FEW = {"data.classes": _SECOND, "data.train_split": "train[:1000]"}
# Top-1 at 384 and 512 px.
_PUBLISHED = {
    "H4-base128": ("h4_base128", 85.6, 85.8),
    "patch stem": ("h4_base128_patch4", 85.4, 85.4),
    "convolutions in stages 1-2": ("h4_base128_conv12", 85.5, 85.8),
}


def _rows():
    for name, (recipe, at_384, at_512) in _PUBLISHED.items():
        scales = ("tiny", "small", "imagenet") if recipe == "h4_base128" else ("imagenet",)
        before = f"{name}, pre-training"
        yield Row(before, f"configs/{recipe}.py", tiny={"data.classes": _FIRST}, counts=False, scales=scales)
        for size, label, published in ((384, "fine-tuned", at_384), (512, "fine-tuned on larger images", at_512)):
            yield Row(
                f"{name}, {label}",
                f"configs/h4_base128_finetune{size}.py",
                {"model.name": recipe},
                recipes={"tiny": "configs/h4_base128.py"},
                tiny=_FEW,
                after=before,
                published=published,
                source="transfer table",
                scales=scales if size == 384 else ("imagenet",),
            )
    yield Row("from scratch", "configs/h4_base128.py", tiny=_FEW, scales=("tiny",))


STUDY = Study(
    title="Transfer",
    question="What does pre-training on other classes bring?",
    finding="After pre-training on ImageNet-21k, H4 with base width 128 reaches 85.6 to 85.8 with 85 M parameters.",
    rows=tuple(_rows()),
    plot=Plot("bar"),
)
