"""Detection and instance segmentation with Mask R-CNN, as pure functions and Flax modules.

`model` has the whole: `MaskRCNN`, `init`, `losses` and `detect`. `spec` has the settings of its two recipes.
"""

from halonet_jax.detection.model import Found, MaskRCNN
from halonet_jax.detection.pasting import paste
from halonet_jax.detection.spec import DETECTRON2, PAPER, DetectionSpec

__all__ = ["DETECTRON2", "PAPER", "DetectionSpec", "Found", "MaskRCNN", "paste"]
