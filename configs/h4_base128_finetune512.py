r"""H4 with base width 128, fine-tuned on ImageNet-1k at 512 px after pre-training on ImageNet-21k, 8 epochs.

    python -m halonet_jax.train --config=configs/h4_base128_finetune512.py --workdir=WORKDIR \
        --config.init_from=WORKDIR_OF_H4_BASE128

Block size 16 and halo size 1; the relative tables are interpolated to them. The classifier starts at zero.
Source: arXiv 2103.12731, transfer section and appendix.
Published: 85.8 top-1.
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
    config = config_lib.sibling(__file__, "h4_base128_finetune384")
    config.model.block_size = 16
    config.model.halo_size = 1
    config.data.image_size = 512
    return config_lib.with_argument(config, argument)
