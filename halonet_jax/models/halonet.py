"""The HaloNet family: stem, stages of bottleneck blocks, classifier (arXiv 2103.12731, section 3)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from halonet_jax import ops
from halonet_jax.models import blocks, layers, stems
from halonet_jax.models.blocks import AttentionLayer, BlockSpec
from halonet_jax.models.lambda_layer import LambdaLayer

# Recomputed in the backward pass from their input alone.
ACTIVATIONS = {name: jax.checkpoint(f, prevent_cse=False) for name, f in (("silu", nn.silu), ("relu", nn.relu))}


class Bottleneck(nn.Module):
    """One block: 1x1 conv, a spatial layer, 1x1 conv, residual.

    `[B, H, W, C] -> [B, ceil(H / s), ceil(W / s), out_width]`, with stride s.

    Attributes:
        spec: kind, widths, stride and the rest of the block's architecture.
        activation: function on arrays.
        norm: `layers.BatchNorm` with all but `activation`, `scale_init` and `name` filled in.
        attention: `layers.HaloAttention` with all that `spec` does not say filled in.
        zero_init_residual: start with a zero scale in the last norm, so that the block starts as its shortcut.
        drop: whether stochastic depth acts.
        dtype: of the computation; parameters are float32.
    """

    spec: BlockSpec
    activation: Any
    norm: Any
    attention: Any
    zero_init_residual: bool
    drop: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, drop_rate):
        """Applies the block.

        Args:
            x: `[B, H, W, C]`.
            drop_rate: probability with which stochastic depth drops an example.

        Returns:
            `[B, ceil(H / stride), ceil(W / stride), out_width]`.
        """
        spec, conv = self.spec, functools.partial(layers.conv, dtype=self.dtype)
        shortcut = x
        norm_activation = functools.partial(self.norm, activation=self.activation)
        y = norm_activation(name="norm1")(conv(spec.width, 1, name="conv1")(x))
        if spec.kind == "attention":
            y = self.attention(
                channels=spec.channels, num_heads=spec.num_heads, block_size=spec.block_size, halo_size=spec.halo_size,
                value_channels=spec.value_channels, stride=spec.stride, full_tables=spec.full_tables,
                adjacent_queries=spec.adjacent_queries, pool=spec.pool, positions=spec.positions, name="attention",
            )(y)  # fmt: skip
        elif spec.kind == "lambda":
            y = LambdaLayer(
                spec.channels // spec.num_heads, spec.num_heads, spec.context_size, norm=self.norm, dtype=self.dtype, name="lambda"
            )(y)
        else:
            y = conv(spec.width, 3, spec.stride, feature_group_count=spec.groups, name="conv2")(y)
        y = norm_activation(name="norm2")(y)
        if spec.gate == "se":
            y = layers.SqueezeExcite(spec.gate_size, nn.relu, dtype=self.dtype, name="se")(y)
        elif spec.gate == "eca":
            y = layers.ChannelAttention(spec.gate_size, dtype=self.dtype, name="eca")(y)
        y = conv(spec.out_width, 1, name="conv3")(y)
        last_scale = nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones
        y = self.norm(scale_init=last_scale, name="norm3")(y)
        if spec.se_ratio:
            width = max(1, round(spec.out_width * spec.se_ratio))
            y = layers.SqueezeExcite(width, self.activation, dtype=self.dtype, name="se")(y)
        if self.drop:
            y = layers.stochastic_depth(y, drop_rate, self.make_rng("dropout"))
        if spec.stride != 1 or x.shape[-1] != spec.out_width:
            if spec.shortcut == "identity":
                return self.activation(y) if spec.last_activation else y
            shortcut = self.norm(name="shortcut_norm")(conv(spec.out_width, 1, spec.stride, name="shortcut")(x))
        return self.activation(shortcut + y) if spec.last_activation else shortcut + y


class Backbone(nn.Module):
    """Stem and stages: from images to one map per stage. `models.create` builds it.

    Attributes:
        stages: tuples of `BlockSpec`, one tuple per stage.
        stem: one of `stems.STRIDES`.
        stem_width: channels of the stem's output.
        activation: "silu" or "relu".
        stochastic_depth_rate: drop rate of the last block; rises linearly from 0 over all blocks.
        bn_group_size: examples that share batch-norm statistics; 0: the whole batch.
        bn_momentum: of the running batch-norm statistics.
        bn_epsilon: added to the variance in batch norm.
        zero_init_residual: let every block start as its shortcut.
        padding: what attention does with keys outside of the map, see `ops.halo_attention`: "mask" or "zero".
        window: which keys a query sees, see `ops.halo_attention`: "neighborhood" or "centered".
        attention_impl: implementation of the attention, see `ops.halo_attention`.
        dtype: of activations and maps; parameters and batch statistics are float32.
        remat: recompute each block's activations in the backward pass, which takes less memory and more time.
        scan: loop over equal neighbouring blocks of a stage, as `blocks.runs` says. It compiles faster and moves more
            memory.
        freeze: patterns of parameters that are not trained, see `freezing`. Norms among them keep their running statistics and
            normalise by them in training too. Gradients are the caller's to stop: `freezing.stop_gradients`.
    """

    stages: blocks.Stages
    stem: str = "conv"
    stem_width: int = 64
    activation: str = "silu"
    stochastic_depth_rate: float = 0.0
    bn_group_size: int = 0
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    zero_init_residual: bool = True
    padding: str = "mask"
    window: str = "neighborhood"
    attention_impl: str = "auto"
    dtype: Any = jnp.float32
    remat: bool = False
    scan: bool = False
    freeze: tuple[str, ...] = ()

    def norm(self, use_running_average: bool):
        """Returns `layers.BatchNorm` with this network's settings.

        Args:
            use_running_average: normalise by the running statistics, not by the batch's.
        """
        return functools.partial(
            layers.BatchNorm, use_running_average=use_running_average, group_size=self.bn_group_size,
            momentum=self.bn_momentum, epsilon=self.bn_epsilon, dtype=self.dtype, freeze=self.freeze,
        )  # fmt: skip

    def attention(self):
        """Returns `layers.HaloAttention` with this network's settings; a block's specification has the others."""
        return functools.partial(
            layers.HaloAttention, window=self.window, padding=self.padding, implementation=self.attention_impl, dtype=self.dtype
        )

    @nn.nowrap
    def attention_layers(self, height: int, width: int) -> list[AttentionLayer]:
        """Returns the network's attention layers, in the order in which they run.

        Args:
            height: rows of the images, in pixels.
            width: columns of the images, in pixels.
        """
        stride = stems.STRIDES[self.stem]
        return blocks.attention_layers(self.stages, -(-height // stride), -(-width // stride))

    @nn.nowrap
    def attention_choices(self, batch: int, height: int, width: int) -> list[tuple[AttentionLayer, ops.Choice]]:
        """Returns each attention layer with the implementation that `ops.choose` takes for it.

        Args:
            batch: number of images.
            height: rows of the images, in pixels.
            width: columns of the images, in pixels.
        """

        @functools.cache
        def choose(height, width, **options):
            return self.attention()(**options, parent=None).choose(batch, height, width)

        found = []
        for layer in self.attention_layers(height, width):
            options = layer._asdict()
            del options["stage"], options["block"]
            found.append((layer, choose(**options)))
        return found

    @nn.compact
    def __call__(self, images, train: bool, use_running_average: bool | None = None):
        """Computes the maps.

        Args:
            images: `[B, H, W, C]`, normalised; C is 3 for colour images.
            train: whether stochastic depth acts. It needs `rngs={"dropout": key}` then.
            use_running_average: normalise by the running batch-norm statistics, not by the batch's. None: not `train`.
                With False, the running statistics move, and `mutable=["batch_stats"]` is needed.

        Returns:
            One map for each stage: `[B, ceil(H / s), ceil(W / s), out_width]` in `dtype`. In the paper's models, s is
            4, 8, 16, 32.

        Raises:
            ValueError: `images` has another number of axes, or an empty one.
        """
        if images.ndim != 4 or 0 in images.shape:
            raise ValueError(
                f"images have shape {images.shape}; they must be [batch, height, width, channels] without an empty axis; one "
                "image is images[None]"
            )
        norm = self.norm(not train if use_running_average is None else use_running_average)
        activation = ACTIVATIONS[self.activation]
        x = stems.apply(self.stem, images.astype(self.dtype), self.stem_width, norm, activation, self.dtype)
        depths = [len(stage) for stage in self.stages]
        rates = np.linspace(0, self.stochastic_depth_rate, sum(depths), dtype=np.float32)
        rates = np.split(rates, np.cumsum(depths)[:-1])
        maps = []
        for stage in range(1, len(depths) + 1):
            x = self._stage(x, stage, rates[stage - 1], norm, activation, drop=train and self.stochastic_depth_rate > 0)
            maps.append(x)
        return tuple(maps)

    def _stage(self, x, stage, rates, norm, activation, drop):
        runs = list(blocks.runs(stage, self.stages[stage - 1], self.scan))
        # `prevent_cse` keeps XLA from merging recomputed values with earlier ones. Loops do so by themselves.
        in_loop = any(run.stacked for run in runs)
        block = functools.partial(
            nn.remat(Bottleneck, prevent_cse=not in_loop) if self.remat else Bottleneck,
            activation=activation, norm=norm, attention=self.attention(), zero_init_residual=self.zero_init_residual,
            drop=drop, dtype=self.dtype,
        )  # fmt: skip
        for run in runs:
            module, start = block(spec=run.specs[0], name=run.name), run.first - 1
            if not run.stacked:
                x = module(x, rates[start])
                continue
            scan = nn.scan(
                lambda block, x, rate: (block(x, rate), None),
                variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True, "dropout": True},
            )  # fmt: skip
            x, _ = scan(module, x, jnp.asarray(rates[start : start + len(run.specs)]))
        return x


class HaloNet(nn.Module):
    """Backbone and classifier: from images to logits. `models.create` builds it.

    Attributes:
        backbone: stem and stages.
        num_classes: width of the classifier.
        final_width: channels of a 1x1 convolution with norm and activation before the classifier (d_f); 0: none.
        dropout_rate: before the classifier.
    """

    backbone: Backbone
    num_classes: int
    final_width: int = 0
    dropout_rate: float = 0.0

    @nn.nowrap
    def describe(self, batch: int, height: int, width: int) -> str:
        """Returns one line on the implementations that attend, with reasons, on the devices of `ops.device`.

        Args:
            batch: number of images.
            height: rows of the images, in pixels.
            width: columns of the images, in pixels.
        """
        choices, parts, texts = self.backbone.attention_choices(batch, height, width), {}, []
        for layer, choice in choices:
            parts.setdefault(choice, []).append(layer)
        for choice, found in parts.items():
            stages = list(dict.fromkeys(str(layer.stage) for layer in found))
            why = f" (stage{'s' * (len(stages) > 1)} {', '.join(stages)}: {choice.reason})" if choice.reason else ""
            texts.append(f"{choice.implementation} for {len(found)} of {len(choices)} layers{why}")
        return f"attention on {ops.device().device_kind}: {'; '.join(texts) or 'none'}"

    def features(self, images, train: bool = False, use_running_average: bool | None = None):
        """Computes the maps of all stages; arguments, result and errors are those of `Backbone.__call__`."""
        return self.backbone(images, train, use_running_average)

    @nn.compact
    def __call__(self, images, train: bool, use_running_average: bool | None = None):
        """Computes the logits.

        Args:
            images: `[B, H, W, C]`, normalised; C is 3 for colour images.
            train: whether dropout and stochastic depth act. They need `rngs={"dropout": key}` then.
            use_running_average: normalise by the running batch-norm statistics, not by the batch's. None: not `train`.
                With False, the running statistics move, and `mutable=["batch_stats"]` is needed.

        Returns:
            float32 `[B, num_classes]`.

        Raises:
            ValueError: `images` has another number of axes, or an empty one.
        """
        backbone = self.backbone
        x = self.features(images, train, use_running_average)[-1]
        if self.final_width:
            norm = backbone.norm(not train if use_running_average is None else use_running_average)
            x = layers.conv(self.final_width, 1, dtype=backbone.dtype, name="final_conv")(x)
            x = norm(name="final_norm", activation=ACTIVATIONS[backbone.activation])(x)
        x = x.mean((1, 2), dtype=jnp.float32)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="classifier")(x)
