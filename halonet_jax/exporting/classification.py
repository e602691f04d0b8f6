"""What an exported classifier takes and returns: `images`, uint8 `[batch, height, width, 3]`, and `logits`, float32."""

import numpy as np

from halonet_jax.exporting.interface import Difference, Interface


def samples(height: int, width: int) -> tuple[np.ndarray]:
    """Returns images to compare on: noise, coarse noise, a gradient, and two blank ones, which loaders pad batches with.

    Args:
        height: in pixels.
        width: in pixels.

    Returns:
        uint8 [5, height, width, 3]
    """
    rng = np.random.default_rng(0)
    images = np.zeros((5, height, width, 3), np.uint8)
    images[0] = rng.integers(0, 256, (height, width, 3))
    coarse = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3))
    images[1] = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
    images[2] = np.linspace(0, 255, height)[:, None, None]
    return (images,)


def _compare(expected, found, task, tolerance):
    ours, theirs = expected["logits"], found["logits"]
    if ours.shape != theirs.shape:
        return Difference(np.inf, problem=f"gives logits {list(theirs.shape)} instead of {list(ours.shape)}")
    return Difference(float(np.abs(theirs - ours).max()), float(np.abs(ours).max()))


INTERFACE = Interface(
    inputs={"images": "image"},
    outputs=("logits",),
    formats=("weights", "stablehlo", "savedmodel", "onnx"),
    pack=lambda logits: {"logits": logits},
    unpack=lambda outputs: outputs["logits"],
    apply=lambda model, variables, images: model.apply(variables, images, train=False),
    plain=lambda model: model,
    samples=samples,
    compare=_compare,
)
