"""Mask R-CNN with ResNet-50, squeeze-and-excitation and halo attention in stage 4 (b 8, h 3) on COCO, 1024 px.

    python -m halonet_jax.train --config=configs/coco_r50_se_halo.py --workdir=WORKDIR --config.data.dir=COCO \
        --config.init_from=BACKBONE

BACKBONE is a run of configs/resnet50_se_halo.py.

Source: arXiv 2103.12731, section 4; the recipe is coco_r50's. Not run: nobody has trained this recipe here.
Published, in the paper's table: 45.2 box AP, 40.3 mask AP.
"""

import ml_collections

from halonet_jax import config as config_lib


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe's config.

    Args:
        argument: the part after the colon in `--config=FILE:ARGUMENT`: "", or "smoke" for a model that trains in a
            minute on a CPU.

    Raises:
        ConfigError: another argument.
    """
    config = config_lib.sibling(__file__, "coco_r50")
    config.model.name = "resnet50_se_halo"
    return config_lib.with_argument(config, argument)
