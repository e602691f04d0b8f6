"""What is between images and the first stage."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from halonet_jax.models import layers

# Pixels of the image per pixel of the result, per axis. "conv": 7x7/2 convolution, 3x3/2 max pool. "patch": one 4x4/4
# convolution. "tiered": three 3x3 convolutions, the first of stride 2, then 3x3/2 max pool. "tiered_conv": the same, with
# stride 2 in the third in place of the pool. "conv3": one 3x3/2 convolution.
STRIDES = {"conv": 4, "patch": 4, "tiered": 4, "tiered_conv": 4, "conv3": 2}


def apply(stem: str, x: jax.Array, width: int, norm: Callable, activation: Callable, dtype: Any) -> jax.Array:
    """Applies a stem within a compact module, which gets its parameters.

    Args:
        stem: one of `STRIDES`.
        x: `[B, H, W, C]`, images.
        width: channels of the result. The tiered stems reach them by 3/8 and 1/2.
        norm: `layers.BatchNorm` with all but `activation` and `name` filled in.
        activation: function on arrays.
        dtype: of the computation; parameters are float32.

    Returns:
        `[B, ceil(H / s), ceil(W / s), width]` with the stem's stride s.
    """
    if stem.startswith("tiered"):
        convs = ((3 * width // 8, 2), (width // 2, 1), (width, 2 if stem == "tiered_conv" else 1))
        for number, (channels, stride) in enumerate(convs, start=1):
            x = layers.conv(channels, 3, stride, dtype=dtype, name=f"stem_conv{number}")(x)
            x = norm(name=f"stem_norm{number}", activation=activation)(x)
        return layers.max_pool(x) if stem == "tiered" else x
    if stem == "patch":
        x = nn.Conv(
            width, (4, 4), (4, 4), padding="SAME", use_bias=False, kernel_init=nn.initializers.he_normal(), dtype=dtype,
            name="stem_conv",
        )(x)  # fmt: skip
        return norm(name="stem_norm", activation=activation)(x)
    x = layers.conv(width, 7 if stem == "conv" else 3, 2, dtype=dtype, name="stem_conv")(x)
    x = norm(name="stem_norm", activation=activation)(x)
    return layers.max_pool(x) if stem == "conv" else x
