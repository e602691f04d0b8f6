"""Mask R-CNN with ResNet-50 on COCO with large-scale jitter, 1024 px, 100 epochs from random weights: detectron2's recipe.

    python -m halonet_jax.train --config=configs/coco_r50_lsj.py --workdir=WORKDIR --config.data.dir=COCO

COCO holds train2017, val2017 and annotations. No backbone is needed.

Source: detectron2, configs/new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py: 184,375 steps of 64 images, a rate of 0.1 that falls
tenfold at steps 163,889 and 177,546, a warm-up of 500 steps from 0.067 of it, scale jitter 0.1 to 2, batch norm over the whole
batch in all parts but the region proposal network, whose head has two convolutions. The box head has four and one dense layer.
Deviations: a block's stride is in its 3x3 convolution; biases have no weight decay; an object's best anchor is matched with
it; at most 100 objects of an image.
Not run: nobody has trained this recipe here.
Published by detectron2, for its own code: 44.6 box AP, 40.3 mask AP.
"""

import ml_collections

from halonet_jax import config as config_lib

IMAGES = 117_266  # of train2017 that have an object other than a crowd


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe's config.

    Args:
        argument: the part after the colon in `--config=FILE:ARGUMENT`: "", or "smoke" for a model that trains in a
            minute on a CPU.

    Raises:
        ConfigError: another argument.
    """
    config = config_lib.sibling(__file__, "coco_r50")
    config.num_epochs = _epochs(184_375)
    config.data.scale_jitter = (0.1, 2.0)
    config.detection.recipe = "detectron2"
    config.model.zero_init_residual = False
    config.model.bn_group_size = 0
    config.model.bn_momentum = 0.9
    config.model.bn_epsilon = 1e-5
    config.schedule.warmup_start_factor = 0.067
    config.schedule.milestones = (_epochs(163_889), _epochs(177_546))
    return config_lib.with_argument(config, argument)


def _epochs(steps):
    return steps * 64 / IMAGES
