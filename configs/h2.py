"""HaloNet-H2 on ImageNet from scratch, 256 px, 350 epochs at batch 4096.

    python -m halonet_jax.train --config=configs/h2.py --workdir=WORKDIR

Source: arXiv 2103.12731, table 1 and appendix. Parameters: 9.4 M.
Published: about 80.4 top-1 (the paper only plots it; a third party read the figure).
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
    config.model.name = "h2"
    config.data.image_size = 256
    config.data.randaugment_magnitude = 10.0
    return config_lib.with_argument(config, argument)
