"""The configuration of a run. `knobs` documents every setting; a recipe in `configs/` changes some of them."""

from halonet_jax.config.derived import frozen_patterns, independent_parts, model_options
from halonet_jax.config.knobs import OPTIMIZERS, SECTIONS, Knob
from halonet_jax.config.recipes import digit_scenes, digits, imagenet, sibling, smoke, with_argument
from halonet_jax.config.serialization import differences, from_json, to_json
from halonet_jax.config.validation import check_detection_data, check_knob, validate
from halonet_jax.errors import ConfigError

__all__ = [
    "OPTIMIZERS", "SECTIONS", "ConfigError", "Knob", "check_detection_data", "check_knob", "differences", "digit_scenes", "digits",
    "from_json", "frozen_patterns", "imagenet", "independent_parts", "model_options", "sibling", "smoke", "to_json", "validate",
    "with_argument",
]  # fmt: skip
