"""ResNet-50 on ImageNet, 256 px, 150 epochs: the baseline of the paper's ablations, under HaloNet-50's recipe.

    python -m halonet_jax.train --config=configs/resnet50.py --workdir=WORKDIR

Source: arXiv 2103.12731, component ablation. Parameters: 25.6 M.
Published: 78.4 top-1 with label smoothing and RandAugment, as in this recipe; 77.6 without both. 79.5 with SE and
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
    config = config_lib.sibling(__file__, "halonet50")
    config.model.name = "resnet50"
    return config_lib.with_argument(config, argument)
