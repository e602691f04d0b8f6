"""ResNet-50 on ImageNet, 256 px, 150 epochs: the baseline of the paper's ablations, under HaloNet-50's recipe.

    python -m halonet_jax.train --config=configs/resnet50.py --workdir=WORKDIR

Source: arXiv 2103.12731, component ablation. Parameters: 25.6 M.
Published: 78.4 top-1 with label smoothing and RandAugment, as here; 77.6 without both; 79.5 with SE and SiLU besides
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
    config = config_lib.sibling(__file__, "halonet50")
    config.model.name = "resnet50"
    return config_lib.with_argument(config, argument)
