r"""H4 with base width 128, fine-tuned on ImageNet-1k at 384 px after pre-training on ImageNet-21k, 8 epochs.

    python -m halonet_jax.train --config=configs/h4_base128_finetune384.py --workdir=WORKDIR \
        --config.init_from=WORKDIR_OF_H4_BASE128

Block size 12 and halo size 2; the relative tables are interpolated to them. The classifier starts at zero.
Source: arXiv 2103.12731, transfer section and appendix.
Published: 85.6 top-1.
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
    config.model.name = "h4_base128"
    config.model.block_size = 12
    config.model.halo_size = 2
    config.data.image_size = 384
    config.data.randaugment_layers = 0
    config.batch_size = 512
    config.num_epochs = 8.0
    config.schedule.learning_rate = 0.016
    config.schedule.learning_rate_batch_size = 512
    config.schedule.warmup_epochs = 0.5
    config.optimizer.weight_decay = 0.0  # "no other regularisation"
    config.label_smoothing = 0.1
    config.ema_decay = 0.0
    config.eval_every_epochs = 1.0
    return config_lib.with_argument(config, argument)
