"""Twenty and seven images of constant gray; a label is the image's number modulo two."""

import numpy as np
import tensorflow_datasets as tfds


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """An image-classification set."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20), "validation": self._generate_examples(7)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": np.full((20, 30, 3), 10 * i, np.uint8), "label": i % 2}


class TinyTaxonomy(TinyImages):
    """Of the structure of ImageNet-21k: many classes without names, and one split."""

    CLASSES = 21_841

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=self.CLASSES),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": np.full((20, 30, 3), 10 * i, np.uint8), "label": self.CLASSES - 1 - i}


class TinyTexts(TinyImages):
    """A set without images."""

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": str(i), "label": i % 2}
