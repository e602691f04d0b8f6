"""Mask R-CNN with ResNet-50 on COCO, 1024 px: the baseline of the paper's detectors, and the base of their recipes.

    python -m halonet_jax.train --config=configs/coco_r50.py --workdir=WORKDIR --config.data.dir=COCO \
        --config.init_from=BACKBONE

COCO holds train2017, val2017 and annotations. BACKBONE is a run of configs/resnet50.py; without it, training starts at random
weights, which the paper does not do.

Source: arXiv 2103.12731, section 4, and the code that it names, tensorflow/tpu, models/official/detection: 67,500 steps of 64
images, a rate of 0.1 that falls tenfold at steps 60,000 and 65,000, a warm-up of 500 steps from a rate of 2/300, scale jitter
0.8 to 1.25, batch norm over two images. Deviations: losses are means over the whole batch; stem and first stage are trained,
which that code does not do by default, and of which the paper says nothing.
Not run: nobody has trained this recipe here.
Published, in the paper's table, for ResNet-50 of the literature: 42.1 box AP, 37.7 mask AP.
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
    config = config_lib.imagenet()
    config.task = "detection"
    config.batch_size = 64
    config.num_epochs = _epochs(67_500)
    config.ema_decay = 0.0
    config.data.source = "coco"
    config.data.name = "coco"
    config.data.train_split = "train2017"
    config.data.eval_split = "val2017"
    config.data.image_size = 1024
    config.model.name = "resnet50"
    config.model.bn_group_size = 2
    config.model.bn_momentum = 0.997
    config.model.bn_epsilon = 1e-4
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 4e-5
    config.schedule.learning_rate = 0.1
    config.schedule.learning_rate_batch_size = 64
    config.schedule.warmup_epochs = _epochs(500)
    config.schedule.warmup_start_factor = 2 / 300 / 0.1  # that code states the rate itself
    config.schedule.milestones = (_epochs(60_000), _epochs(65_000))
    return config_lib.with_argument(config, argument)


def _epochs(steps):
    return steps * 64 / IMAGES
