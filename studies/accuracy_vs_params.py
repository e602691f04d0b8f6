"""The family: accuracy against parameters, multiply-adds and images per second.

    python -m halonet_jax.study --study=studies/accuracy_vs_params.py --out=studies_out/family --scale=tiny

The paper plots H0 to H7 (section 4, figure of accuracy against parameters) and states H7's accuracy in a table. The
figures of H0 to H6 are a third party's reading of that plot.
At scale tiny, H5 to H7 are left out: they would take more than half of the time. Runs are 2.5 times as long as those of
the other studies, because the larger models overtake the smaller ones late.
"""

from halonet_jax.studies import Plot, Row, Study

_READ = "read from the paper's plot by a third party"
_PUBLISHED = {"h0": 77.9, "h1": 79.9, "h2": 80.4, "h3": 81.9, "h4": 83.3, "h5": 84.0, "h6": 84.4, "h7": 84.9}

STUDY = Study(
    title="The family: accuracy against parameters",
    question="How does accuracy grow with the number of parameters?",
    finding="Accuracy rises from H0 to H7, and each model needs fewer parameters than an EfficientNet of its accuracy.",
    rows=tuple(
        Row(
            name.upper(),
            recipe=f"configs/{name}.py",
            published=top1,
            source="table of H7 hybrids, row without convolutions" if name == "h7" else _READ,
            scales=("tiny", "small", "imagenet") if name < "h5" else ("small", "imagenet"),
        )
        for name, top1 in _PUBLISHED.items()
    ),
    tiny={"data.num_train_scenes": 38_400, "schedule.warmup_epochs": 0.05},
    plot=Plot("scatter", x="parameters", log_x=True, front=True),
)
