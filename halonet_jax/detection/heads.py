"""Feature pyramid and heads of Mask R-CNN, as Flax modules. Initialisation follows TensorFlow's TPU code."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from halonet_jax.models import layers

Norm = Callable | None  # `Backbone.norm(...)`, or None for none; it gets `activation` and `name`


def _conv(features, kernel_size, stride=1, *, init, bias=True, **rest):
    """A convolution that pads as the backbone's do. One before a norm needs no bias."""
    return nn.Conv(
        features, (kernel_size, kernel_size), (stride, stride), padding=kernel_size // 2, use_bias=bias, kernel_init=init,
        conv_general_dilated=layers.conv_general_dilated, **rest,
    )  # fmt: skip


def _conv_relu(x, features, name, init, norm, dtype):
    x = _conv(features, 3, init=init, bias=norm is None, dtype=dtype, name=name)(x)
    return nn.relu(x) if norm is None else norm(activation=nn.relu, name=f"{name}_norm")(x)


class FPN(nn.Module):
    """Feature pyramid (arXiv 1612.03144): maps of equal width, in which the coarse ones reach the fine ones.

    Attributes:
        width: channels.
        extra_level: "conv", "pool" or "none", see `DetectionSpec`. As in the TPU code, the convolution takes the last map
            before its norm.
        lateral_norms: whether the lateral convolutions have norms too.
        dtype: of the computation; parameters are float32.
    """

    width: int
    extra_level: str = "conv"
    lateral_norms: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], norm: Norm):
        """Computes the pyramid.

        Args:
            maps: of the backbone, `[B, ceil(H / s), ceil(W / s), C]` with strides s that rise by factors of 2.
            norm: batch norm with all but `activation` and `name` filled in.

        Returns:
            Tuple of `[B, ceil(H / s), ceil(W / s), width]`, one map for each of `maps`, and one of twice the last stride.
        """
        init, first = nn.initializers.xavier_uniform(), 2
        lateral = []
        for level, x in enumerate(maps, start=first):
            x = _conv(self.width, 1, init=init, bias=not self.lateral_norms, dtype=self.dtype, name=f"lateral{level}")(x)
            lateral.append(norm(name=f"lateral{level}_norm")(x) if self.lateral_norms else x)
        merged = [lateral[-1]]
        for x in lateral[-2::-1]:
            coarse = merged[0].repeat(2, axis=1).repeat(2, axis=2)
            merged.insert(0, x + coarse[:, : x.shape[1], : x.shape[2]])
        found = [
            _conv(self.width, 3, init=init, bias=False, dtype=self.dtype, name=f"output{level}")(x)
            for level, x in enumerate(merged, start=first)
        ]
        if self.extra_level == "conv":
            extra = _conv(self.width, 3, 2, init=init, bias=False, dtype=self.dtype, name=f"output{first + len(maps)}")
            found.append(extra(found[-1]))
        found = [norm(name=f"output{level}_norm")(x) for level, x in enumerate(found, start=first)]
        if self.extra_level == "pool":
            found.append(found[-1][:, ::2, ::2])
        return tuple(found)


class RPNHead(nn.Module):
    """Scores and boxes of the anchors; all levels share the parameters.

    Attributes:
        width: channels of the convolutions.
        convs: 3x3 convolutions.
        anchors: at one place.
        dtype: of the computation; parameters and results are float32.
    """

    width: int
    convs: int
    anchors: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]):
        """Scores anchors.

        Args:
            maps: of the pyramid, `[B, H, W, C]` each.

        Returns:
            logits `[B, A]` and deltas `[B, A, 4]`, float32, in the order of `boxes.anchors`, level after level.
        """
        init = nn.initializers.normal(0.01)
        convs = [_conv(self.width, 3, init=init, dtype=self.dtype, name=f"conv{n}") for n in range(1, self.convs + 1)]
        score = _conv(self.anchors, 1, init=init, dtype=self.dtype, name="score")
        box = _conv(4 * self.anchors, 1, init=init, dtype=self.dtype, name="box")
        logits, deltas = [], []
        for x in maps:
            for conv in convs:
                x = nn.relu(conv(x))
            logits.append(score(x).reshape(x.shape[0], -1))
            deltas.append(box(x).reshape(x.shape[0], -1, 4))
        return tuple(jnp.concatenate(found, axis=1).astype(jnp.float32) for found in (logits, deltas))


class BoxHead(nn.Module):
    """Class and box of each region. Each class has a box of its own; the background's is never used.

    Attributes:
        num_classes: with the background.
        width: channels of the convolutions.
        convs: 3x3 convolutions.
        dense: channels of the dense layers.
        dtype: of the computation; parameters and results are float32.
    """

    num_classes: int
    width: int
    convs: int
    dense: Sequence[int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm = None):
        """Classifies regions.

        Args:
            x: `[B, R, N, N, C]`, from RoIAlign.
            norm: for the convolutions; None: they have none.

        Returns:
            logits `[B, R, num_classes]` and deltas `[B, R, num_classes, 4]`, float32.
        """
        init = nn.initializers.xavier_uniform()
        for n in range(1, self.convs + 1):
            x = _conv_relu(x, self.width, f"conv{n}", init, norm, self.dtype)
        x = x.reshape(*x.shape[:2], -1)
        for n, width in enumerate(self.dense, start=1):
            x = nn.relu(nn.Dense(width, kernel_init=init, dtype=self.dtype, name=f"dense{n}")(x))
        dense = lambda width, std, name: nn.Dense(width, kernel_init=nn.initializers.normal(std), dtype=self.dtype, name=name)
        logits = dense(self.num_classes, 0.01, "class")(x)
        deltas = dense(4 * self.num_classes, 0.001, "box")(x)
        return logits.astype(jnp.float32), deltas.reshape(*deltas.shape[:2], -1, 4).astype(jnp.float32)


class MaskHead(nn.Module):
    """A mask for each region and class, of twice the side of its features.

    Attributes:
        num_classes: with the background, whose mask is never used.
        width: channels.
        convs: 3x3 convolutions.
        dtype: of the computation; parameters and results are float32.
    """

    num_classes: int
    width: int
    convs: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm = None):
        """Draws masks.

        Args:
            x: `[B, R, N, N, C]`, from RoIAlign.
            norm: for the 3x3 convolutions; None: they have none.

        Returns:
            logits, float32 `[B, R, 2N, 2N, num_classes]`.
        """
        init = nn.initializers.variance_scaling(2, "fan_out", "normal")
        for n in range(1, self.convs + 1):
            x = _conv_relu(x, self.width, f"conv{n}", init, norm, self.dtype)
        x = nn.relu(Upsample(self.width, dtype=self.dtype, name="upsample")(x))
        return _conv(self.num_classes, 1, init=init, dtype=self.dtype, name="mask")(x).astype(jnp.float32)


class Upsample(nn.Module):
    """A 2x2 transposed convolution of stride 2: a dense layer to the four pixels that come of one. Faster on a CPU.

    Attributes:
        width: channels of the result.
        dtype: of the computation; parameters are float32.
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array):
        """Doubles the sides.

        Args:
            x: `[..., H, W, C]`.

        Returns:
            `[..., 2H, 2W, width]`.
        """
        init = nn.initializers.variance_scaling(2, "fan_out", "normal")
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        *batch, h, w, _ = x.shape
        x = nn.Dense(
            4 * self.width, use_bias=False, kernel_init=init, dtype=self.dtype, dot_general=layers.dot_general, name="pixels"
        )(x)
        x = x.reshape(*batch, h, w, 2, 2, self.width)
        x = jnp.moveaxis(x, -3, -4)  # [..., H, 2, W, 2, width]
        return x.reshape(*batch, 2 * h, 2 * w, self.width) + bias.astype(self.dtype)
