"""Prepares the sets of `imagenet_stand_ins`."""

import numpy as np
import tensorflow_datasets as tfds
from imagenet_stand_ins import NAMES, SETS, gray


class StandIn(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One set; its features are those of TFDS's own builder."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(names=NAMES)
        shape = (224, 224, 3) if self.name == "imagenet2012_corrupted" else (None, None, 3)
        features = {
            "image": tfds.features.Image(shape=shape, encoding_format="jpeg"),
            **{key: tfds.features.Sequence(label) if several else label for key, several in self.LABELS.items()},
            "file_name": tfds.features.Text(),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {self.SPLIT: self._generate_examples()}

    def _generate_examples(self):
        shape = (224, 224, 3) if self.name == "imagenet2012_corrupted" else (20, 30, 3)
        for level, labels in self.EXAMPLES:
            values = {key: labels if several else (labels or [0])[0] for key, several in self.LABELS.items()}
            yield level, {"image": np.full(shape, gray(level), np.uint8), "file_name": f"{level}.jpg", **values}


def prepare(full_name, folder):
    name, _, config = full_name.partition("/")
    version, split, labels, examples = SETS[full_name]
    version = tfds.core.Version(version)
    configs = [tfds.core.BuilderConfig(name=config, version=version)] if config else []
    members = {"name": name, "VERSION": version, "SPLIT": split, "LABELS": labels, "EXAMPLES": examples}
    builder = type(name, (StandIn,), members | {"BUILDER_CONFIGS": configs, "__module__": __name__}, skip_registration=True)
    builder(data_dir=folder, config=config or None, file_format="array_record").download_and_prepare()


def prepare_all(folder):
    for full_name in SETS:
        prepare(full_name, folder)
