"""Mask R-CNN on a small HaloNet, on scenes of scanned digits: the detector to run first. It needs no download.

    python -m halonet_jax.train --config=configs/digit_scenes_mask_rcnn.py --workdir=runs/digit_boxes

900 steps on scenes of one to five digits of 14 to 57 pixels, on a canvas of 128. Stages 3 and 4 have halo attention. The
finest map of the pyramid has stride 4, anchors have sides of 16 pixels and more.
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
    config = config_lib.digit_scenes()
    config.task = "detection"
    config.batch_size, config.eval_batch_size = 8, 20
    config.num_epochs = 1.0
    config.ema_decay = 0.0
    config.data.image_size = 128
    config.data.scene_size = 128
    config.data.scene_label = "largest"
    config.data.scene_difficulty = 0.2
    config.data.num_train_scenes = 7_200
    config.data.num_eval_scenes = 200
    config.data.max_objects = 5
    config.data.scale_jitter = (1.0, 1.0)
    config.model.name = "h1"
    config.model.stem = "tiered_conv"
    config.model.stem_width = 32
    config.model.base_width = 16
    config.model.stage_sizes = (1, 1, 1, 1)
    config.model.stage_kinds = ("conv", "conv", "attention", "attention")
    config.model.block_size = 4
    config.model.halo_size = 2
    config.model.bn_group_size = 4
    config.detection.width = 32
    config.detection.anchor_size = 4.0
    config.detection.roi_base_size = 64.0
    config.detection.candidates = 200
    config.detection.proposals = 64
    config.detection.roi_samples = 32
    config.detection.box_dense = (128,)
    config.detection.mask_convs = 2
    config.detection.detections = 20
    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 1e-4
    config.schedule.learning_rate = 2e-3
    config.schedule.learning_rate_batch_size = 0
    config.schedule.warmup_epochs = 0.05
    config.log_every_steps = 50
    config.eval_every_epochs = 1 / 3
    config.checkpoint_every_steps = 300
    return config_lib.with_argument(config, argument)
