"""As coco_r50_lsj, with ResNet-101.

    python -m halonet_jax.train --config=configs/coco_r101_lsj.py --workdir=WORKDIR --config.data.dir=COCO

Source: detectron2, configs/new_baselines/mask_rcnn_R_101_FPN_100ep_LSJ.py. Not run: nobody has trained this recipe here.
Published by detectron2, for its own code: 46.4 box AP, 41.6 mask AP.
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
    config = config_lib.sibling(__file__, "coco_r50_lsj")
    config.model.stage_sizes = (3, 4, 23, 3)
    return config_lib.with_argument(config, argument)
