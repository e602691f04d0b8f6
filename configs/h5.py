"""HaloNet-H5 on ImageNet from scratch, 448 px, 350 epochs at batch 4096.

    python -m halonet_jax.train --config=configs/h5.py --workdir=WORKDIR

Source: arXiv 2103.12731, table 1 and appendix. Parameters: 30.7 M.
Published: about 84.0 top-1 (the paper only plots it; a third party read the figure).
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
    config.model.name = "h5"
    config.data.image_size = 448
    config.data.randaugment_magnitude = 19.0
    config.model.stochastic_depth_rate = 0.2  # "for the larger models"; value not stated
    config.model.scan = True  # unrolled, 30 blocks and more compile slowly
    return config_lib.with_argument(config, argument)
