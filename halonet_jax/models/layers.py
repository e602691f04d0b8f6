"""Flax layers that HaloNet is made of: attention, grouped batch norm, squeeze-and-excitation, stochastic depth."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from halonet_jax import ops
from halonet_jax.models import checks, freezing


class HaloAttention(nn.Module):
    """Blocked local self-attention with haloing, ready for models of your own (paper, section 2).

    `[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), value_channels]`. Queries, keys and values are 1x1
    projections without bias. There is no output projection, since a 1x1 conv follows in the paper's blocks. All heads
    share the tables of positions. Parameters do not depend on `window`, `padding` and `implementation`.

    With `positions="absolute"`, keys get embeddings of their row and column on the map: the first half of a head's channels
    that of the row, the second half that of the column. The tables have the size of the map at initialisation, and no other
    map fits. Keys outside of the map have no embedding. The paper's ablations have absolute positions and do not say
    how; this is our choice, the nearest to its relative ones.

    Attributes:
        channels: width of queries and keys, over all heads.
        num_heads: must divide `channels` (into even parts) and `value_channels`.
        block_size: side of a block of queries, in pixels of the input (b).
        halo_size: border around a block that keys come from as well, in pixels of the input (h).
        value_channels: width of values over all heads; None: `channels`.
        stride: pixels of the input per pixel of the result, per axis.
        full_tables: whether queries meet both relative tables with all of their channels, not with half of them each.
        adjacent_queries: whether the tables take strided queries as adjacent, `table_offsets="queries"` of the operator.
        pool: whether all pixels attend, and the result is the mean over `stride` x `stride` of them. Otherwise every
            `stride`-th pixel per axis attends.
        positions: "relative": the paper's tables, by offsets of keys from queries. "absolute": embeddings in the keys, see
            above. "none": no position term.
        window: which keys a query sees, see `ops.halo_attention`: "neighborhood" or "centered".
        padding: what keys outside of the map do, see `ops.halo_attention`: "mask" or "zero".
        implementation: see `ops.halo_attention`. Where "pallas" does not support a shape, "xla" is taken and the reason
            logged.
        dtype: of the computation; parameters are float32.
    """

    channels: int
    num_heads: int
    block_size: int
    halo_size: int
    value_channels: int | None = None
    stride: int = 1
    full_tables: bool = False
    adjacent_queries: bool = False
    pool: bool = False
    positions: str = "relative"
    window: str = "neighborhood"
    padding: str = "mask"
    implementation: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Attends.

        Args:
            x: `[B, H, W, C]`.

        Returns:
            `[B, ceil(H / stride), ceil(W / stride), value_channels]` in `dtype`.

        Raises:
            ValueError: the heads do not divide the widths, the map is not of the size of the absolute tables, or
                `ops.halo_attention` finds another fault.
        """
        value_channels = self.channels if self.value_channels is None else self.value_channels
        for name, value, least in (
            ("channels", self.channels, 1), ("value_channels", value_channels, 1), ("block_size", self.block_size, 1),
            ("halo_size", self.halo_size, 0), ("stride", self.stride, 1),
        ):  # fmt: skip
            checks.whole(name, value, least)
        checks.heads(self.num_heads, self.channels, value_channels)
        checks.positions(self.positions, self.full_tables, self.adjacent_queries)

        def project(x, channels, name):
            x = nn.Dense(channels, use_bias=False, dtype=self.dtype, dot_general=dot_general, name=name)(x)
            return x.reshape(*x.shape[:3], self.num_heads, -1)  # [B, H, W, N, D]

        stride = self._query_stride
        table_shape = (2 * self.block_size + 2 * self.halo_size - 1, self.channels // self.num_heads // (2 - self.full_tables))
        q = project(x[:, ::stride, ::stride], self.channels, "query")
        k, v = project(x, self.channels, "key"), project(x, value_channels, "value")
        rel_rows = rel_cols = None
        if self.positions == "relative":
            rel_rows, rel_cols = (self.param(name, self._table_init, table_shape) for name in ("rel_rows", "rel_cols"))
        elif self.positions == "absolute":
            k = k + self._embeddings(*x.shape[1:3])
        out = ops.halo_attention(
            q, k, v, rel_rows, rel_cols,
            block_size=self.block_size, halo_size=self.halo_size, stride=stride, window=self.window, padding=self.padding,
            table_offsets="queries" if self.adjacent_queries else "pixels", implementation=self._implementation(x.shape),
        )  # fmt: skip
        return mean_pool(out.reshape(*out.shape[:3], value_channels), self.stride // stride)

    def _embeddings(self, height, width):
        """Returns what is added to the keys, `[H, W, 1, D]` in `dtype`."""
        tables = []
        for name, size, axis in (("abs_rows", height, "rows"), ("abs_cols", width, "columns")):
            if self.has_variable("params", name) and (there := len(self.get_variable("params", name))) != size:
                raise ValueError(
                    f"the map has {size} {axis}, and {name} has embeddings of {there}: with positions='absolute', images must have "
                    "the size that the model was initialised with; use that size, or models.transfer.resize_absolute_tables"
                )
            table = self.param(name, self._table_init, (size, self.channels // self.num_heads // 2))
            tables.append(table.astype(self.dtype))
        rows, cols = (jnp.broadcast_to(x, (height, width, x.shape[-1])) for x in (tables[0][:, None], tables[1]))
        return jnp.concatenate([rows, cols], axis=-1)[:, :, None]

    @property
    def _table_init(self):
        return nn.initializers.normal((self.channels // self.num_heads) ** -0.5)

    @property
    def _query_stride(self):
        return 1 if self.pool else self.stride

    def _implementation(self, shape):
        if self.is_initializing():  # Parameters alone matter, and are the same.
            return "xla"
        choice = self.choose(*shape[:3])
        if choice.reason:
            _warn_once(choice.reason)
        if self.implementation == "pallas":
            return functools.partial(ops.attend, implementation="pallas", fall_back=True)
        return self.implementation

    @nn.nowrap
    def choose(self, batch: int, height: int, width: int) -> ops.Choice:
        """Returns the implementation that attends a map, with the reason where it is not the fused kernels.

        Args:
            batch: number of maps.
            height: rows of the map, in pixels.
            width: columns of the map, in pixels.
        """
        stride, adjacent = self._query_stride, self.adjacent_queries and self._query_stride > 1
        split = lambda stride, channels: jax.ShapeDtypeStruct(
            (batch, -(-height // stride), -(-width // stride), self.num_heads, channels // self.num_heads), self.dtype
        )
        return ops.choose(
            self.implementation, split(stride, self.channels), split(1, self.channels),
            split(1, self.value_channels or self.channels), block_size=self.block_size, halo_size=self.halo_size,
            stride=stride, centered=self.window == "centered", masked=self.padding == "mask", adjacent=adjacent,
        )  # fmt: skip


@functools.cache
def _warn_once(reason):
    logging.getLogger(__name__).warning('attention by "xla" instead of "pallas": %s', reason)


class BatchNorm(nn.Module):
    """Batch norm over the last axis with statistics of fixed groups of examples, and an activation after it.

    In training, the batch is cut into consecutive groups of `group_size` examples, each normalised by its own
    statistics; the running statistics move by the mean over groups. A result then does not depend on how many devices
    there are, and nothing is reduced across devices where groups lie within one. For the backward pass, the input and
    the statistics are kept, and nothing else.

    Attributes:
        use_running_average: normalise by the running statistics, which then stay as they are.
        group_size: examples that share statistics; 0: the whole batch.
        activation: function on arrays, applied to the result.
        momentum: share of the old running statistics in the new ones.
        epsilon: added to the variance.
        dtype: of the result; statistics and parameters are float32.
        scale_init: initializer of the scale.
        freeze: patterns of parameters that are not trained, see `freezing`; a norm that one matches always normalises by its
            running statistics.
    """

    use_running_average: bool
    group_size: int = 0
    activation: Callable = lambda x: x
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    scale_init: Callable = nn.initializers.ones
    freeze: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x):
        """Normalises.

        Args:
            x: `[B, ..., C]`.

        Returns:
            An array like `x`, in `dtype`.

        Raises:
            ValueError: statistics are of the batch, and `group_size` does not divide it.
        """
        channels = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        scale = self.param("scale", self.scale_init, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)

        def finish(x, mean, var, scale, bias):
            x = (x.astype(jnp.float32) - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
            return self.activation(x.astype(self.dtype))

        if self.use_running_average or freezing.is_frozen("/".join((*self.path, "scale")), self.freeze):
            return finish(x, running_mean.value, running_var.value, scale, bias)

        group_size = self.group_size or len(x)
        if len(x) % group_size:
            raise ValueError(f"bn_group_size={group_size} does not divide a batch of {len(x)} examples")

        def normalize(x, scale, bias):
            x = x.reshape(-1, group_size, *x.shape[1:])
            axes, wide = tuple(range(1, x.ndim - 1)), x.astype(jnp.float32)
            mean = checkpoint_name(wide.mean(axes, keepdims=True), "statistics")
            square = checkpoint_name((wide * wide).mean(axes, keepdims=True), "statistics")
            var = jnp.maximum(square - mean * mean, 0)
            return finish(x, mean, var, scale, bias), mean, var

        # Left to themselves, scans over blocks keep float32 copies of x, and all that the activation computes.
        policy = jax.checkpoint_policies.save_only_these_names("statistics")
        y, mean, var = jax.checkpoint(normalize, policy=policy, prevent_cse=False)(x, scale, bias)
        if not self.is_initializing():
            for running, new in ((running_mean, mean), (running_var, var)):
                running.value = self.momentum * running.value + (1 - self.momentum) * new.reshape(-1, *channels).mean(0)
        return y.reshape(x.shape)


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **rest) -> jax.Array:
    """`jax.lax.dot_general`, as Flax's dense layers call it: `[..., C], [C, D] -> [..., D]`.

    On a CPU, it is a product of matrices. The kernel's gradient then takes 36 to 56 % of the time.

    Args:
        x: `[..., C]`.
        kernel: `[C, D]`.
        dimension_numbers: that the last axis of `x` meets the first of `kernel`.
        **rest: of `jax.lax.dot_general`; not used on a CPU.
    """

    def by_matrices(x, kernel):
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])

    other = functools.partial(jax.lax.dot_general, dimension_numbers=dimension_numbers, **rest)
    return ops.by_platform(x, kernel, cpu=by_matrices, default=other)


def conv_general_dilated(x: jax.Array, kernel: jax.Array, strides: tuple, padding: Any, **rest) -> jax.Array:
    """`jax.lax.conv_general_dilated`, as Flax's 2-D convolutions call it; on a CPU, 1x1 convolutions are products of matrices.

    Args:
        x: `[B, H, W, C]`.
        kernel: `[height, width, C, D]`; where height and width are 1, without padding, groups or dilation.
        strides: pixels of `x` per pixel of the result, by axis.
        padding: of `jax.lax.conv_general_dilated`.
        **rest: of `jax.lax.conv_general_dilated`.
    """
    other = functools.partial(jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **rest)
    if kernel.shape[:2] != (1, 1):
        return other(x, kernel)

    def by_matrices(x, kernel):
        x = x[:, :: strides[0], :: strides[1]]
        return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])

    return ops.by_platform(x, kernel, cpu=by_matrices, default=other)


def max_pool(x: jax.Array) -> jax.Array:
    """Returns the maximum of 3x3 pixels around every second one per axis.

    On a CPU it comes from slices: with its gradient, that takes a fifth of the time of `reduce_window`. Equal maxima then
    share the gradient. On TPU slices would move more bytes.

    Args:
        x: `[B, H, W, C]`.

    Returns:
        `[B, ceil(H / 2), ceil(W / 2), C]`.
    """

    def by_slices(x):
        for axis in (1, 2):
            size = x.shape[axis]
            pad = [(1, 1) if a == axis else (0, 0) for a in range(4)]
            padded = jnp.pad(x, pad, constant_values=-jnp.inf)
            neighbors = (jax.lax.slice_in_dim(padded, start, start + size, 2, axis) for start in range(3))
            x = functools.reduce(jnp.maximum, neighbors)
        return x

    pool = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    return ops.by_platform(x, cpu=by_slices, default=pool)


def mean_pool(x: jax.Array, size: int) -> jax.Array:
    """Returns the mean of each square of pixels. Squares that reach beyond the map hold fewer.

    Args:
        x: `[B, H, W, C]`.
        size: side of a square, in pixels.

    Returns:
        `[B, ceil(H / size), ceil(W / size), C]`; `x` itself for size 1.
    """
    if size == 1:
        return x
    padding = tuple((0, -n % size) for n in x.shape[1:3])
    return nn.avg_pool(x, (size, size), (size, size), padding, count_include_pad=False)


class SqueezeExcite(nn.Module):
    """Channel gates from the map's mean (arXiv 1709.01507).

    Attributes:
        width: inner channels.
        activation: function on arrays, between the two layers.
        dtype: of the computation; parameters are float32.
    """

    width: int
    activation: Callable
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Multiplies each channel by its gate.

        Args:
            x: `[B, H, W, C]`.

        Returns:
            `[B, H, W, C]`.
        """
        gate = x.mean((1, 2), keepdims=True)
        gate = nn.Dense(self.width, dtype=self.dtype, name="squeeze")(gate)
        gate = nn.Dense(x.shape[-1], dtype=self.dtype, name="excite")(self.activation(gate))
        return x * nn.sigmoid(gate)


class ChannelAttention(nn.Module):
    """Channel gates from the means of neighbouring channels, ECA (arXiv 1910.03151).

    Attributes:
        size: number of neighbouring channels that a gate comes from, an odd number; channels beyond the ends are zeros.
        dtype: of the computation; parameters are float32.
    """

    size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Multiplies each channel by its gate.

        Args:
            x: `[B, H, W, C]`.

        Returns:
            `[B, H, W, C]`.
        """
        kernel = self.param("kernel", nn.initializers.normal(self.size**-0.5), (self.size,)).astype(self.dtype)
        channels, half = x.shape[-1], self.size // 2
        means = jnp.pad(x.mean((1, 2), keepdims=True), ((0, 0),) * 3 + ((half, half),))
        gate = sum(kernel[n] * means[..., n : n + channels] for n in range(self.size))
        return x * nn.sigmoid(gate)


def stochastic_depth(x: jax.Array, rate: jax.Array | float, rng: jax.Array) -> jax.Array:
    """Zeroes whole examples at random and scales the others, so that the mean stays (arXiv 1603.09382).

    Args:
        x: `[B, ...]`.
        rate: probability of an example to be zeroed, at least 0 and less than 1.
        rng: a random key.

    Returns:
        An array like `x`.
    """
    keep = jnp.asarray(1 - rate, jnp.float32)
    mask = jax.random.bernoulli(rng, keep, (x.shape[0],) + (1,) * (x.ndim - 1))
    return x * (mask / keep).astype(x.dtype)


def conv(features: int, kernel_size: int, stride: int = 1, **rest) -> nn.Conv:
    """Returns a 2-D convolution without bias, `[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features]`.

    It pads symmetrically: a strided output (i, j) is centred on pixel (stride * i, stride * j), as strided queries are.

    Args:
        features: channels of the result.
        kernel_size: side of the kernel, an odd number of pixels.
        stride: pixels of the input per pixel of the result, per axis.
        **rest: further attributes of `nn.Conv`.
    """
    return nn.Conv(
        features, (kernel_size, kernel_size), (stride, stride), padding=kernel_size // 2, use_bias=False,
        kernel_init=nn.initializers.he_normal(), conv_general_dilated=conv_general_dilated, **rest,
    )  # fmt: skip
