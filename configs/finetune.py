r"""Fine-tunes trained weights on images of your own, in DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg.

    python -m halonet_jax.train --config=configs/finetune.py --workdir=WORKDIR \
        --config.init_from=RUN_OR_MODEL --config.data.dir=DIR [--config.model.name=h4]

`model.name` and the other keys of `model` must be those of the weights, apart from `block_size` and `halo_size`. The
settings follow the paper's fine-tuning (arXiv 2103.12731, appendix): 8 epochs, half an epoch of warm-up, label smoothing
0.1, no EMA, no other regularisation. Batch and learning rate are smaller in proportion.
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
    config.model.name = "h1"
    config.model.bn_group_size = 0
    config.data.source = "folder"
    config.data.eval_split = "val"
    config.data.randaugment_layers = 0
    config.batch_size = 64
    config.num_epochs = 8.0
    config.schedule.learning_rate = 0.016
    config.schedule.learning_rate_batch_size = 512  # the paper's batch
    config.schedule.warmup_epochs = 0.5
    config.optimizer.weight_decay = 0.0
    config.label_smoothing = 0.1
    config.ema_decay = 0.0
    config.eval_every_epochs = 1.0
    config.log_every_steps = 20
    return config_lib.with_argument(config, argument)
