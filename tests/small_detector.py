"""`halonet_jax.train` and `halonet_jax.evaluate` of the digit scenes' detector with two stages alone, which compiles faster.

python tests/small_detector.py ENTRY --FLAG=…
"""

import dataclasses
import sys

from halonet_jax import command_line, evaluate, models, train
from halonet_jax.detection import MaskRCNN
from halonet_jax.tasks import detection


def make_model(config, num_classes):
    """The config's detector on two narrow stages, with no more levels."""
    stages = models.stages("resnet50", stage_sizes=(1, 1, 1, 1), base_width=8, expansion_ratio=1.0)[:2]
    backbone = models.create("resnet50", stages=stages, stem_width=8, bn_group_size=config.model.bn_group_size).backbone
    spec = dataclasses.replace(detection.make_spec(config, num_classes), extra_level="none", box_bins=3, mask_bins=4)
    return MaskRCNN(backbone, spec)


if __name__ == "__main__":
    entry, required = {"train": (train, ("config", "workdir")), "evaluate": (evaluate, ())}[sys.argv.pop(1)]
    detection.make_model = make_model
    entry.define_flags()
    command_line.run(entry.main, required_flags=required)
