"""HaloNet-50 on ImageNet, 256 px, 150 epochs: the model of the paper's ablations.

    python -m halonet_jax.train --config=configs/halonet50.py --workdir=WORKDIR

Source: arXiv 2103.12731, component ablation. Parameters: 18.0 M.
Published: 79.9 top-1 with label smoothing and RandAugment, as here; 78.6 without both; 80.5 with SE and SiLU besides
(--config.model.se_ratio=0.125 --config.model.activation=silu; the ratio is not stated).
"""

import ml_collections

from halonet_jax import config as config_lib


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe's config.

    Args:
        argument: what follows the colon in `--config=FILE:ARGUMENT`: "", or "smoke" for a model of seconds on a CPU.

    Raises:
        ConfigError: the argument is neither.
    """
    config = config_lib.imagenet()
    config.model.name = "halonet50"
    config.num_epochs = 150.0
    config.data.image_size = 256
    config.data.randaugment_magnitude = 10.0
    config.optimizer.weight_decay = 4e-5  # the paper has 8e-5 without RandAugment
    return config_lib.with_argument(config, argument)
