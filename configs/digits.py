"""A small HaloNet on scikit-learn's 1,797 scanned digits: run this first.

It needs no download and takes minutes on a laptop:

python -m halonet_jax.train --config=configs/digits.py --workdir=runs/digits
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
    config = config_lib.digits()
    config.num_epochs = 40.0
    config.ema_decay = 0.98
    config.model.name = "h1"
    config.model.stage_sizes = (1, 1, 1, 1)
    config.model.base_width = 16
    config.model.stem_width = 16
    config.model.block_size = 4
    config.model.halo_size = 1
    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 1e-4
    config.schedule.learning_rate = 3e-3
    config.schedule.learning_rate_batch_size = 0
    config.schedule.warmup_epochs = 2.0
    config.log_every_steps = 50
    config.eval_every_epochs = 5.0
    config.checkpoint_every_steps = 200
    return config_lib.with_argument(config, argument)
