"""Models in formats that other programs run, and the way back.

`write` makes a folder of exports. `open_predict` turns one of them into a function like
`Task.predict`. The folder holds:

    config.json         the training config, class names and preprocessing; every format needs it (`weights.portable`)
    README.md           the model card (`card`)
    export.json         what was run back, and the errors that were measured (`checking`)
    model.safetensors   formats weights and stablehlo
    model_uint8.stablehlo, model_float32.stablehlo      format stablehlo
    savedmodel/         format savedmodel
    model.onnx          format onnx
"""

from halonet_jax.exporting.folder import write
from halonet_jax.exporting.formats import FORMATS, Runner, find, open_predict, patterns

__all__ = ["FORMATS", "Runner", "find", "open_predict", "patterns", "write"]
