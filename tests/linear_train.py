"""`halonet_jax.train` with a small linear model in place of a HaloNet, so that its programs compile in a second; no TensorBoard.

A training image that is white all over makes the loss NaN; POISON=17 turns image 17 into such a one.
"""

import os
import sys

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
        white = (images > 0.99).all(axis=(1, 2, 3), keepdims=True)  # digits are written on black
        x = jnp.where(white & train, jnp.nan, images).reshape(len(images), -1)
        return nn.Dense(self.num_classes)(nn.BatchNorm(not train)(nn.Dense(self.width)(x)))


class Poisoned:
    def __init__(self, source, index):
        self._source, self._index = source, index

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        record = self._source[index]
        return record | {"image": np.full_like(record["image"], 255)} if index == self._index else record


def open_source(config, split, original=data.open_source, **options):
    source = original(config, split, **options)
    return Poisoned(source, int(os.environ["POISON"])) if "POISON" in os.environ and split == "train" else source


if __name__ == "__main__":  # Grain's worker processes import this file too
    sys.modules["tensorflow"] = None  # takes seconds to import
    data.open_source = open_source
    classification.make_model = lambda config, num_classes: Linear(config.model.base_width, num_classes)
    command_line.run(train.main, required_flags=("config", "workdir"))
