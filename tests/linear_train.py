"""`halonet_jax.train` with a small linear model in place of a HaloNet, so that its programs compile in a second; no TensorBoard.

A training image that is white all over makes the loss NaN; POISON=17 turns image 17 into such a one. SLOW_COMPILE=60 makes
compiling the train step take a minute more, SLOW_EVALUATION=0.5 makes each image of the evaluation take half a second.
"""

import os
import sys
import time

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from halonet_jax import command_line, data, train
from halonet_jax.tasks import classification


class Linear(nn.Module):
    width: int
    num_classes: int

    def describe(self, *image_shape):
        return "no attention"

    @nn.compact
    def __call__(self, images, train):
        if train:
            time.sleep(float(os.environ.get("SLOW_COMPILE", 0)))
        white = (images > 0.99).all(axis=(1, 2, 3), keepdims=True)  # digits are written on black
        x = jnp.where(white & train, jnp.nan, images).reshape(len(images), -1)
        return nn.Dense(self.num_classes)(nn.BatchNorm(not train)(nn.Dense(self.width)(x)))


class Disturbed:
    """A source with one white image, or with slow ones."""

    def __init__(self, source, white=None, seconds=0.0):
        self._source, self._white, self._seconds = source, white, seconds

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        time.sleep(self._seconds)
        example = self._source[index]
        return example | {"image": np.full_like(example["image"], 255)} if index == self._white else example


def open_source(config, split, original=data.open_source, **options):
    source = original(config, split, **options)
    if "POISON" in os.environ and split == "train":
        return Disturbed(source, white=int(os.environ["POISON"]))
    if "SLOW_EVALUATION" in os.environ and split == "test":
        return Disturbed(source, seconds=float(os.environ["SLOW_EVALUATION"]))
    return source


if __name__ == "__main__":  # Grain's worker processes import this file too
    sys.modules["tensorflow"] = None  # takes seconds to import
    data.open_source = open_source
    classification.make_model = lambda config, num_classes: Linear(config.model.base_width, num_classes)
    train.define_flags()
    command_line.run(train.main, required_flags=("config", "workdir"))
