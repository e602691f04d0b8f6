"""The lambda layer (arXiv 2102.08602), which some of timm's halo models have in one stage."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from halonet_jax.models import checks, layers


class LambdaLayer(nn.Module):
    """A linear map for each pixel, made from the whole map and from the pixel's surroundings, applied to its queries.

    `[B, H, W, C] -> [B, H, W, C]`. Keys and values have one head, which all heads of queries share. The map of a pixel
    is the sum of a content term, keys times values over the map, and a position term, a convolution of the values.

    Attributes:
        channels: of a query and of a key (K).
        num_heads: heads of queries (N); must divide C.
        context_size: side of the convolution's kernel, an odd number of pixels (r).
        norm: `layers.BatchNorm` with all but `name` filled in.
        dtype: of the computation; parameters are float32.
    """

    channels: int
    num_heads: int
    context_size: int
    norm: Callable
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Applies the layer.

        Args:
            x: `[B, H, W, C]`.

        Returns:
            `[B, H, W, C]` in `dtype`.

        Raises:
            ValueError: the heads do not divide C.
        """
        batch, height, width, _ = x.shape
        checks.whole("num_heads", self.num_heads, 1)
        if x.shape[-1] % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide {x.shape[-1]} channels; for example num_heads=1")
        values = x.shape[-1] // self.num_heads

        def project(channels, name):
            return nn.Dense(channels, use_bias=False, dtype=self.dtype, dot_general=layers.dot_general, name=name)(x)

        q = self.norm(name="norm_query")(project(self.num_heads * self.channels, "query"))
        q = q.reshape(batch, height, width, self.num_heads, self.channels)
        k = nn.softmax(project(self.channels, "key").astype(jnp.float32), axis=(1, 2)).astype(self.dtype)
        v = self.norm(name="norm_value")(project(values, "value"))
        content = jnp.einsum("bhwk,bhwv->bkv", k, v)
        # One image for each value channel, since all channels have the same kernels.
        planes = v.transpose(0, 3, 1, 2).reshape(batch * values, height, width, 1)
        position = nn.Conv(
            self.channels, (self.context_size,) * 2, padding=self.context_size // 2, dtype=self.dtype, name="position"
        )(planes)
        position = position.reshape(batch, values, height, width, self.channels)
        out = jnp.einsum("bhwnk,bkv->bhwnv", q, content) + jnp.einsum("bhwnk,bvhwk->bhwnv", q, position)
        return out.reshape(batch, height, width, -1)
