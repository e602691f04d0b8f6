"""As coco_r50_se_halo, with blocks of 32: at 1024 px, attention over the whole map of stage 4.

    python -m halonet_jax.train --config=configs/coco_r50_se_halo_b32.py --workdir=WORKDIR --config.data.dir=COCO \
        --config.init_from=BACKBONE

BACKBONE is a run of configs/resnet50_se_halo.py with --config.model.block_size=32.

Source: arXiv 2103.12731, section 4; the recipe is coco_r50's. Not run: nobody has trained this recipe here.
Published, in the paper's table: 45.4 box AP, 40.5 mask AP.
"""

import ml_collections

from halonet_jax import config as config_lib


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe's config.

    Args:
        argument: the part after the colon in `--config=FILE:ARGUMENT`: "", or "smoke" for a model that trains in a
            minute on a CPU.

    Raises:
        ConfigError: another argument.
    """
    config = config_lib.sibling(__file__, "coco_r50_se_halo")
    config.model.block_size = 32
    return config_lib.with_argument(config, argument)
