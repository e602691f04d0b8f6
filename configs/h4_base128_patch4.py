"""H4 with base width 128 and a 4x4 patch stem, pre-trained on ImageNet-21k, 256 px, 90 epochs.

    python -m halonet_jax.train --config=configs/h4_base128_patch4.py --workdir=WORKDIR

Source: arXiv 2103.12731, transfer section; the recipe is h4_base128's. Parameters: 85.1 M with 1,000 classes.
Published: 85.4 top-1 on ImageNet-1k after fine-tuning at 384 px, 85.4 at 512 px.
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
    config = config_lib.sibling(__file__, "h4_base128")
    config.model.name = "h4_base128_patch4"
    return config_lib.with_argument(config, argument)
