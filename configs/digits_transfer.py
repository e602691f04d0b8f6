r"""Transfer in miniature: pre-train on the digits 0 to 4, then learn the digits 5 to 9 from ten scans of each.

    python -m halonet_jax.train --config=configs/digits_transfer.py:pretrain --workdir=runs/zero_to_four
    python -m halonet_jax.train --config=configs/digits_transfer.py:finetune --workdir=runs/five_to_nine \
        --config.init_from=runs/zero_to_four
    python -m halonet_jax.train --config=configs/digits_transfer.py:scratch --workdir=runs/from_scratch

`finetune` and `scratch` have the same data and the same 50 steps. docs/training.md has what we measured.
"""

import ml_collections

from halonet_jax import config as config_lib


def get_config(argument: str = "finetune") -> ml_collections.ConfigDict:
    """Returns the config of one of the three runs.

    Args:
        argument: the part after the colon in `--config=FILE:ARGUMENT`: "pretrain", "finetune", "scratch", or "smoke" for a
            model that trains in seconds on a CPU.

    Raises:
        ConfigError: another argument.
    """
    if argument not in ("", "pretrain", "finetune", "scratch", "smoke"):
        raise config_lib.ConfigError(
            f"config argument {argument!r} is unknown; write ':pretrain', ':finetune', ':scratch' or ':smoke' after the file name"
        )
    config = config_lib.sibling(__file__, "digits")
    if argument == "pretrain":
        config.data.classes = ("0", "1", "2", "3", "4")
        return config
    config.data.classes = ("5", "6", "7", "8", "9")
    config.data.train_split = "train[:50]"
    config.batch_size = 10
    config.num_epochs = 10.0
    config.ema_decay = 0.0
    return config_lib.smoke(config) if argument == "smoke" else config
