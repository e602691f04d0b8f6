"""HaloNet-H7 with 3x3 convolutions and squeeze-and-excitation in stages 1 and 2, on ImageNet from scratch, 600 px.

    python -m halonet_jax.train --config=configs/h7_conv12.py --workdir=WORKDIR

Source: arXiv 2103.12731, table of H7 hybrids; the recipe is H7's. The paper does not state the squeeze ratio here;
it uses 1/8 for detection.
Published: 84.7 top-1, at 1.0 times the training time of EfficientNet-B7.
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
    config = config_lib.sibling(__file__, "h7")
    config.model.name = "h7_conv12"
    return config_lib.with_argument(config, argument)
