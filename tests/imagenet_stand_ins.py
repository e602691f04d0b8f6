"""Stand-ins for ImageNet's robustness sets: TFDS's names, versions and features, a few images of constant gray, any labels.

The model of the tests reads an image's gray level and answers with that level's row of `LOGITS`. So the labels can be
chosen by their rank: 0 is right, up to 4 is among the first five.
"""

import importlib.util
from pathlib import Path

import numpy as np

from halonet_jax.evaluating.imagenet import SUBSETS

_FOLDER = Path(importlib.util.find_spec("tensorflow_datasets").submodule_search_locations[0])
NAMES = (_FOLDER / "datasets" / "imagenet2012" / "labels.txt").read_text().split()
LEVELS = 24
LOGITS = np.random.default_rng(0).normal(size=(LEVELS, 1000)).astype(np.float32)
ALL = np.arange(1000)


def gray(level):
    return 10 * level + 5


def ranked(level, ranks, among=ALL):
    """The labels that have these ranks among those of `among`."""
    order = np.asarray(among)[np.argsort(-LOGITS[level, among])]
    return [int(order[rank]) for rank in ranks]


def _examples(count, ranks, among=ALL):
    return [(level, ranked(level, ranks[level % len(ranks)], among)) for level in range(count)]


def _subset(name):
    return [NAMES.index(class_name) for class_name in SUBSETS[name]]


# Set: version, split, label features with whether they are sequences, and examples (gray level, labels).
ONE = {"label": False}
REAL = {"original_label": False, "real_label": True}
SETS = {
    "imagenet2012": ("5.1.0", "validation", ONE, _examples(11, [[0], [1], [0], [7]])),
    "imagenet2012_real": ("1.0.0", "validation", REAL, _examples(23, [[], [0], [3, 0, 9], [2, 8], [7, 5], [1, 2], []])),
    "imagenet_v2/matched-frequency": ("3.0.0", "test", ONE, _examples(13, [[0], [0], [2]])),
    "imagenet_v2/topimages": ("3.0.0", "test", ONE, _examples(9, [[0], [6], [6]])),
    "imagenet_a": ("0.1.0", "test", ONE, _examples(17, [[0], [1], [0], [5]], _subset("imagenet_a"))),
    "imagenet_r": ("0.2.0", "test", ONE, _examples(19, [[0], [0], [9], [4], [2]], _subset("imagenet_r"))),
} | {
    f"imagenet2012_corrupted/{kind}": ("3.1.0", "validation", ONE, _examples(10, [[0]] * right + [[3]] * (10 - right)))
    for kind, right in (*((f"gaussian_noise_{severity}", 9 - severity) for severity in range(1, 6)), ("snow_3", 7))
}  # fmt: skip
