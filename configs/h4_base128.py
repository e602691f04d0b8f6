r"""H4 with base width 128, pre-trained from scratch on ImageNet-21k, 256 px, 90 epochs.

From an image folder, DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg:

    python -m halonet_jax.train --config=configs/h4_base128.py --workdir=WORKDIR \
        --config.data.source=folder --config.data.dir=DIR --config.data.eval_split=val

From a TFDS set that you prepared as array_record files, with an `image` and a class `label`, which needs no names. TFDS
itself has no ImageNet-21k:

    python -m halonet_jax.train --config=configs/h4_base128.py --workdir=WORKDIR \
        --config.data.source=tfds --config.data.name=NAME --config.data.dir=DIR \
        --config.data.train_split='train[:99%]' --config.data.eval_split='train[99%:]'

Source: arXiv 2103.12731, transfer section and appendix. Parameters: 85.1 M with 1,000 classes.
Published: 85.6 top-1 on ImageNet-1k after fine-tuning at 384 px, 85.8 at 512 px.
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
    config.num_epochs = 90.0
    config.schedule.learning_rate = 0.01  # peak 0.16 at batch 4096
    config.schedule.warmup_epochs = 2.0
    config.optimizer.weight_decay = 8e-5
    config.ema_decay = 0.0
    config.label_smoothing = 0.0  # the paper mentions neither this nor RandAugment; both are off
    config.data.randaugment_layers = 0
    return config_lib.with_argument(config, argument)
