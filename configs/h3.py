"""HaloNet-H3 on ImageNet from scratch, 320 px, 350 epochs at batch 4096.

    python -m halonet_jax.train --config=configs/h3.py --workdir=WORKDIR

Source: arXiv 2103.12731, table 1 and appendix. Parameters: 12.3 M.
Published: about 81.9 top-1 (the paper only plots it; a third party read the figure).
The table's 12.3 M parameters and its final width of 1024 disagree: 1024 gives 11.8 M, and 1280 would give 12.3 M.
We keep 1024.
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
    config.model.name = "h3"
    config.data.image_size = 320
    config.data.randaugment_magnitude = 14.0
    return config_lib.with_argument(config, argument)
