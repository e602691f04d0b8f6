"""The HaloNet family: stem, four stages of bottleneck blocks with attention or convolutions, classifier (paper, section 3)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from halonet_jax import ops
from halonet_jax.models import layers

# Recomputed in the backward pass from their input alone.
ACTIVATIONS = {name: jax.checkpoint(f, prevent_cse=False) for name, f in (("silu", nn.silu), ("relu", nn.relu))}


def _conv(features, kernel_size, stride=1, **rest):
    """Pads symmetrically: a strided conv's output (i, j) is centred on pixel (stride * i, stride * j), as strided queries are."""
    return nn.Conv(
        features, (kernel_size, kernel_size), (stride, stride), padding=kernel_size // 2, use_bias=False,
        kernel_init=nn.initializers.he_normal(), conv_general_dilated=layers.conv_general_dilated, **rest,
    )  # fmt: skip


class Bottleneck(nn.Module):
    """1x1 conv to `width`, attention or 3x3 conv, 1x1 conv to `out_width`, residual. `[B, H, W, C] -> [B, H/s, W/s, out]`."""

    kind: str
    width: int
    out_width: int
    stride: int
    activation: Any
    norm: Any
    attention: Any
    se_ratio: float
    zero_init_residual: bool
    drop: bool  # whether stochastic depth acts
    dtype: Any

    @nn.compact
    def __call__(self, x, drop_rate):
        conv = functools.partial(_conv, dtype=self.dtype)
        shortcut = x
        norm_activation = functools.partial(self.norm, activation=self.activation)
        y = norm_activation(name="norm1")(conv(self.width, 1, name="conv1")(x))
        if self.kind == "attention":
            y = self.attention(stride=self.stride, name="attention")(y)
        else:
            y = conv(self.width, 3, self.stride, name="conv2")(y)
        y = norm_activation(name="norm2")(y)
        y = conv(self.out_width, 1, name="conv3")(y)
        last_scale = nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones
        y = self.norm(scale_init=last_scale, name="norm3")(y)
        if self.se_ratio:
            y = layers.SqueezeExcite(self.se_ratio, self.activation, dtype=self.dtype, name="se")(y)
        if self.drop:
            y = layers.stochastic_depth(y, drop_rate, self.make_rng("dropout"))
        if self.stride != 1 or x.shape[-1] != self.out_width:
            shortcut = self.norm(name="shortcut_norm")(conv(self.out_width, 1, self.stride, name="shortcut")(x))
        return self.activation(shortcut + y)


class Backbone(nn.Module):
    """Stem and stages. `variants.DEFAULTS` explains the first attributes, `config.imagenet` the others.

    `[B, H, W, 3] -> four maps [B, ceil(H / s), ceil(W / s), C]` at strides s = 4, 8, 16, 32, in `dtype`.
    """

    stage_sizes: tuple
    stage_kinds: tuple
    stem: str
    stem_width: int
    base_width: int
    num_heads: tuple
    block_size: int
    halo_size: int
    value_ratio: float
    expansion_ratio: float
    activation: str
    se_ratio: float
    se_kinds: tuple
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

    def norm(self, train):
        return functools.partial(
            layers.BatchNorm, use_running_average=not train, group_size=self.bn_group_size, momentum=self.bn_momentum,
            epsilon=self.bn_epsilon, dtype=self.dtype,
        )  # fmt: skip

    def attention(self, stage):
        width = self.base_width * 2**stage
        return functools.partial(
            layers.HaloAttention, channels=width, num_heads=self.num_heads[stage], block_size=self.block_size,
            halo_size=self.halo_size, value_channels=int(width * self.value_ratio), window=self.window, padding=self.padding,
            implementation=self.attention_impl, dtype=self.dtype,
        )  # fmt: skip

    @nn.nowrap
    def attention_choices(self, batch: int, height: int, width: int) -> list[tuple[int, int, ops.Choice]]:
        """What attends in the blocks of each stage, by `ops.choose`: (stage, number of blocks, choice), for images of this size."""
        found, height, width = [], -(-height // 4), -(-width // 4)
        for stage, depth in enumerate(self.stage_sizes):
            for stride, count in ((1 if stage == 0 else 2, 1), (1, depth - 1)):
                if self.stage_kinds[stage] == "attention" and count:
                    layer = self.attention(stage)(stride=stride, parent=None)
                    found.append((stage + 1, count, layer.choose(batch, height, width)))
                height, width = -(-height // stride), -(-width // stride)
        return found

    @nn.compact
    def __call__(self, images, train: bool):
        norm, activation = self.norm(train), ACTIVATIONS[self.activation]
        x = images.astype(self.dtype)
        if self.stem == "conv":
            x = _conv(self.stem_width, 7, 2, dtype=self.dtype, name="stem_conv")(x)
            x = norm(name="stem_norm", activation=activation)(x)
            x = layers.max_pool(x)
        else:
            x = nn.Conv(
                self.stem_width, (4, 4), (4, 4), padding="SAME", use_bias=False, kernel_init=nn.initializers.he_normal(),
                dtype=self.dtype, name="stem_conv",
            )(x)  # fmt: skip
            x = norm(name="stem_norm", activation=activation)(x)

        depth = sum(self.stage_sizes)
        rates = np.linspace(0, self.stochastic_depth_rate, depth, dtype=np.float32)
        rates = np.split(rates, np.cumsum(self.stage_sizes)[:-1])
        maps = []
        for stage in range(4):
            x = self._stage(x, stage, rates[stage], norm, activation, drop=train and self.stochastic_depth_rate > 0)
            maps.append(x)
        return tuple(maps)

    def _stage(self, x, stage, rates, norm, activation, drop):
        width, kind = self.base_width * 2**stage, self.stage_kinds[stage]
        block = functools.partial(
            nn.remat(Bottleneck, prevent_cse=not self.scan) if self.remat else Bottleneck,
            kind=kind, width=width, out_width=int(width * self.expansion_ratio), activation=activation, norm=norm,
            attention=self.attention(stage), se_ratio=self.se_ratio if kind in self.se_kinds else 0.0,
            zero_init_residual=self.zero_init_residual, drop=drop, dtype=self.dtype,
        )  # fmt: skip
        x = block(stride=1 if stage == 0 else 2, name=f"stage{stage + 1}_block1")(x, rates[0])
        if self.scan and len(rates) > 1:
            scan = nn.scan(
                lambda block, x, rate: (block(x, rate), None),
                variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True, "dropout": True},
            )  # fmt: skip
            return scan(block(stride=1, name=f"stage{stage + 1}_blocks"), x, jnp.asarray(rates[1:]))[0]
        for i, rate in enumerate(rates[1:], start=2):
            x = block(stride=1, name=f"stage{stage + 1}_block{i}")(x, rate)
        return x


class HaloNet(nn.Module):
    """Backbone and classifier. `[B, H, W, 3]` normalised images to float32 logits `[B, num_classes]`."""

    backbone: Backbone
    num_classes: int
    final_width: int = 0
    dropout_rate: float = 0.0

    @nn.nowrap
    def describe(self, batch: int, height: int, width: int) -> str:
        """One line on what attends, and why, on the devices of `ops.device`, for images of this size."""
        choices, parts, texts = self.backbone.attention_choices(batch, height, width), {}, []
        depth = sum(count for _, count, _ in choices)
        for stage, count, choice in choices:
            parts.setdefault(choice, []).append((stage, count))
        for choice, blocks in parts.items():
            stages = list(dict.fromkeys(str(stage) for stage, _ in blocks))
            why = f" (stage{'s' * (len(stages) > 1)} {', '.join(stages)}: {choice.reason})" if choice.reason else ""
            texts.append(f"{choice.implementation} for {sum(count for _, count in blocks)} of {depth} layers{why}")
        return f"attention on {ops.device().device_kind}: {'; '.join(texts) or 'none'}"

    def features(self, images, train: bool = False):
        """The four maps of `Backbone`, at strides 4, 8, 16, 32."""
        return self.backbone(images, train)

    @nn.compact
    def __call__(self, images, train: bool):
        backbone = self.backbone
        x = self.features(images, train)[-1]
        if self.final_width:
            x = _conv(self.final_width, 1, dtype=backbone.dtype, name="final_conv")(x)
            x = backbone.norm(train)(name="final_norm", activation=ACTIVATIONS[backbone.activation])(x)
        x = x.mean((1, 2), dtype=jnp.float32)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="classifier")(x)


def stack_blocks(variables):
    """Converts variables of an unrolled model to those of the same model with `scan=True`; `unstack_blocks` is its inverse."""

    def convert(backbone):
        out, rest = {}, {}
        for name, value in backbone.items():
            stage, _, block = name.partition("_block")
            (rest.setdefault(stage, {}) if stage.startswith("stage") and int(block) > 1 else out)[name] = value
        for stage, blocks in rest.items():
            ordered = [blocks[f"{stage}_block{i}"] for i in range(2, 2 + len(blocks))]
            out[f"{stage}_blocks"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)
        return out

    return _convert_backbone(variables, convert)


def unstack_blocks(variables):
    """Converts variables of a model with `scan=True` to those of the same model unrolled."""

    def convert(backbone):
        out = {}
        for name, value in backbone.items():
            if not name.endswith("_blocks"):
                out[name] = value
                continue
            for i in range(len(jax.tree.leaves(value)[0])):
                out[f"{name[:-1]}{i + 2}"] = jax.tree.map(lambda leaf, i=i: leaf[i], value)
        return out

    return _convert_backbone(variables, convert)


def _convert_backbone(variables, convert):
    return {
        collection: {**tree, "backbone": convert(tree["backbone"])} if "backbone" in tree else tree
        for collection, tree in variables.items()
    }
