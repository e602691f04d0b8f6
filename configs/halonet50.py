"""HaloNet-50 on ImageNet, 256 px, 150 epochs: the model of the paper's ablations.

    python -m halonet_jax.train --config=configs/halonet50.py --workdir=WORKDIR

Source: arXiv 2103.12731, component ablation. Parameters: 18.0 M.
Published: 79.9 top-1 with label smoothing and RandAugment, as in this recipe; 78.6 without both. 80.5 with SE and
SiLU in addition: --config.model.se_ratio=0.125 --config.model.activation=silu (the paper does not state the ratio).
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
    config.model.name = "halonet50"
    config.num_epochs = 150.0
    config.data.image_size = 256
    config.data.randaugment_magnitude = 10.0
    config.optimizer.weight_decay = 4e-5  # the paper has 8e-5 without RandAugment
    return config_lib.with_argument(config, argument)
