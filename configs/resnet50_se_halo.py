"""Pre-training of a detection backbone on ImageNet, 512 px: ResNet-50 with SE and halo attention in stage 4, b 8 h 3.

    python -m halonet_jax.train --config=configs/resnet50_se_halo.py --workdir=WORKDIR

The paper's other backbones share the recipe. Without attention: --config.model.name=resnet50_se. Global attention at
1,024 px: --config.model.block_size=32. Deeper: --config.model.name=resnet101_se_halo or resnet101_se.

Source: arXiv 2103.12731, section 4. Parameters: 25.9 M. The heads of the attention are not stated; as in HaloNet-50, each
has 16 channels.
Published: no top-1. Mask R-CNN on it has 45.2 box AP and 40.3 mask AP on COCO.
"""

import ml_collections

from halonet_jax import config as config_lib


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe's config.

    Args:
        argument: the part after the colon in `--config=FILE:ARGUMENT`: "", or "smoke" for a model that trains in
            seconds on a CPU.

    Raises:
        ConfigError: another argument.
    """
    config = config_lib.imagenet()
    config.model.name = "resnet50_se_halo"
    config.data.image_size = 512
    config.data.randaugment_magnitude = 15.0
    config.model.stochastic_depth_rate = 0.1
    return config_lib.with_argument(config, argument)
