"""Architectures as data: a network is a list of stages, a stage is a list of block specifications."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from halonet_jax.models import checks

KINDS = ("attention", "conv", "lambda")
GATES = ("se", "eca")
SHORTCUTS = ("conv", "identity")
# Fields that belong to some kinds alone, with the value that says that a block does not use them.
_FIELDS_OF = {
    "attention": ("block_size", "halo_size", "value_width", "full_tables", "adjacent_queries", "pool", "positions"),
    "conv": ("groups", "gate", "gate_size"),
    "lambda": ("context_size",),
}


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One bottleneck block: 1x1 conv, a spatial layer, 1x1 conv, residual (`halonet.Bottleneck`).

        BlockSpec("conv", width=64, out_width=256)
        BlockSpec("attention", width=64, out_width=256, num_heads=4, block_size=8, halo_size=3, stride=2)

    Attributes:
        kind: of the spatial layer: "attention", "conv" (3x3) or "lambda" (`lambda_layer.LambdaLayer`).
        width: channels that the spatial layer gets (c). Convolutions and lambda layers give as many.
        out_width: channels of the block's output.
        stride: pixels of the input per pixel of the output, per axis. The spatial layer and the shortcut have it.
        se_ratio: inner width of squeeze-and-excitation over `out_width`; 0: the block has none.
        num_heads: heads of attention or of a lambda layer. For "conv", it is None, as the four fields below are.
        block_size: side of a block of queries, in pixels of the attention's input (b).
        halo_size: border around a block that keys come from as well, in pixels of the attention's input (h).
        query_width: channels of queries over all heads, and of attention's keys; None: `width`.
        value_width: channels of values over all heads, which the attention gives; None: `width`.
        groups: of a convolution's channels; each group sees its own channels alone.
        gate: on the result of a 3x3 convolution, after its norm: "se" (`layers.SqueezeExcite`, with ReLU inside), "eca"
            (`layers.ChannelAttention`) or None. Unlike `se_ratio`, it is before the last convolution.
        gate_size: of "se", the inner width; of "eca", the kernel's length, which is odd.
        shortcut: "conv": where the block changes the shape, the shortcut is a strided 1x1 convolution with norm.
            "identity": where it changes the shape, the block has no shortcut.
        last_activation: whether the activation acts on the sum with the shortcut.
        full_tables: whether queries meet both relative tables with all of their channels, not with half of them each.
        adjacent_queries: whether the tables take strided queries as adjacent, `table_offsets="queries"` of the operator.
        pool: whether a strided attention attends from all pixels, and gives the mean over `stride` x `stride` of them. At the
            bottom and right, the mean is over those that are on the map.
        context_size: side of the square of pixels that a lambda layer's position term reaches, an odd number.
        positions: what attention knows of places, see `layers.HaloAttention`: "relative", "absolute" or "none".

    Raises:
        ValueError: a field is out of range, unknown, absent or not of this kind, or the heads do not divide the widths.
    """

    kind: str
    width: int
    out_width: int
    stride: int = 1
    se_ratio: float = 0.0
    num_heads: int | None = None
    block_size: int | None = None
    halo_size: int | None = None
    query_width: int | None = None
    value_width: int | None = None
    groups: int = 1
    gate: str | None = None
    gate_size: int | None = None
    shortcut: str = "conv"
    last_activation: bool = True
    full_tables: bool = False
    adjacent_queries: bool = False
    pool: bool = False
    context_size: int | None = None
    positions: str = "relative"

    def __post_init__(self):
        checks.choice("kind", self.kind, KINDS)
        for name in ("width", "out_width", "stride"):
            checks.whole(name, getattr(self, name), 1)
        checks.real("se_ratio", self.se_ratio, 0, 1)
        checks.choice("shortcut", self.shortcut, SHORTCUTS)
        for name in ("last_activation", "full_tables", "adjacent_queries", "pool"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        self._check_kind()
        if self.kind == "conv":
            self._check_conv()
            return
        for name in ("query_width", "value_width"):
            if getattr(self, name) is not None:
                checks.whole(name, getattr(self, name), 1)
        checks.heads(self.num_heads, self.channels, self.value_channels)
        if self.kind == "lambda":
            self._check_lambda()
            return
        for name, least in (("block_size", 1), ("halo_size", 0)):
            checks.whole(name, getattr(self, name), least)
        checks.positions(self.positions, self.full_tables, self.adjacent_queries)
        if self.adjacent_queries and self.block_size % self.stride:
            raise ValueError(
                f"adjacent_queries=True needs a block_size that stride={self.stride} divides, not {self.block_size}; use "
                f"block_size={-(-self.block_size // self.stride) * self.stride}, or pool=True"
            )

    def _check_kind(self):
        """Refuses fields that belong to other kinds."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        foreign = {"num_heads": "attention", "query_width": "attention"} if self.kind == "conv" else {}
        foreign |= {name: kind for kind, names in _FIELDS_OF.items() if kind != self.kind for name in names}
        for name, kind in foreign.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be {defaults[name]!r} in a block of kind={self.kind!r}; leave it "
                    f"out, or set kind={kind!r}"
                )

    def _check_conv(self):
        checks.whole("groups", self.groups, 1)
        if self.width % self.groups:
            raise ValueError(f"groups={self.groups} must divide width={self.width}; for example groups=1")
        if self.gate is None:
            if self.gate_size is not None:
                raise ValueError(f"gate_size={self.gate_size!r} must be None without a gate; leave it out, or set gate='se'")
            return
        checks.choice("gate", self.gate, GATES)
        checks.whole("gate_size", self.gate_size, 1)
        if self.gate == "eca" and self.gate_size % 2 == 0:
            raise ValueError(f"gate_size={self.gate_size} must be odd for gate='eca'; for example gate_size={self.gate_size + 1}")

    def _check_lambda(self):
        checks.whole("context_size", self.context_size, 1)
        if self.context_size % 2 == 0:
            raise ValueError(f"context_size={self.context_size} must be odd; for example context_size={self.context_size + 1}")
        if self.stride != 1:
            raise ValueError(f"stride={self.stride} must be 1 in a block of kind='lambda'; set the stride in another block")

    @property
    def channels(self) -> int:
        """Channels of queries and of keys, over all heads."""
        return self.width if self.query_width is None else self.query_width

    @property
    def value_channels(self) -> int:
        """Channels of values, over all heads."""
        return self.width if self.value_width is None else self.value_width


Stages = tuple[tuple[BlockSpec, ...], ...]


def as_stages(stages: Sequence[Sequence[BlockSpec]]) -> Stages:
    """Returns stages as tuples, checked.

    Args:
        stages: at least one stage, each a sequence of at least one block.

    Raises:
        ValueError: there is no stage, a stage is empty, or something in it is no BlockSpec.
    """
    remedy = "give a list of stages, each a list of models.BlockSpec"
    if not isinstance(stages, (tuple, list)) or not stages:
        raise ValueError(f"stages={stages!r} must have at least one stage; {remedy}")
    for number, stage in enumerate(stages, start=1):
        if not isinstance(stage, (tuple, list)) or not stage:
            raise ValueError(f"stage {number} is {stage!r}; it must have at least one block; {remedy}")
        for block in stage:
            if not isinstance(block, BlockSpec):
                raise ValueError(f"stage {number} has {block!r} in it, which is no block; {remedy}")
    return tuple(map(tuple, stages))


class AttentionLayer(NamedTuple):
    """One attention layer of a network, with the map that it attends.

    Attributes:
        stage: number of its stage, from 1.
        block: number of its block in the stage, from 1.
        height: rows of the map that keys and values are on, in pixels; queries are on every `stride`-th.
        width: columns of that map.
        num_heads: heads.
        channels: of queries and of keys, over all heads.
        value_channels: of values, over all heads.
        block_size: side of a block of queries, in pixels of the map (b).
        halo_size: border around a block that keys come from as well, in pixels of the map (h).
        stride: pixels of the map per query, per axis.
        adjacent_queries: whether the tables take strided queries as adjacent.
        positions: "relative", "absolute" or "none".
    """

    stage: int
    block: int
    height: int
    width: int
    num_heads: int
    channels: int
    value_channels: int
    block_size: int
    halo_size: int
    stride: int
    adjacent_queries: bool = False
    positions: str = "relative"


def attention_layers(stages: Stages, height: int, width: int) -> list[AttentionLayer]:
    """Returns all attention layers in the order in which they run.

    Args:
        stages: the network's blocks.
        height: rows of the map that enters the first stage, in pixels.
        width: columns of that map.
    """
    found = []
    for number, stage in enumerate(stages, start=1):
        for position, b in enumerate(stage, start=1):
            if b.kind == "attention":
                sizes = b.num_heads, b.channels, b.value_channels, b.block_size, b.halo_size, 1 if b.pool else b.stride
                found.append(AttentionLayer(number, position, height, width, *sizes, b.adjacent_queries, b.positions))
            height, width = -(-height // b.stride), -(-width // b.stride)
    return found


class Run(NamedTuple):
    """Neighbouring blocks of a stage that share one entry in a network's parameter tree.

    Attributes:
        name: of the entry.
        stage: number of the stage, from 1.
        first: number of the first block in the stage, from 1.
        specs: the blocks' specifications, all equal.
        stacked: whether each array of the entry has a leading axis over the blocks, which `nn.scan` loops over.
    """

    name: str
    stage: int
    first: int
    specs: tuple[BlockSpec, ...]
    stacked: bool

    @property
    def block_names(self) -> list[str]:
        """Names of the entries that the blocks have in an unrolled network."""
        return [f"stage{self.stage}_block{self.first + n}" for n in range(len(self.specs))]


def runs(stage: int, specs: tuple[BlockSpec, ...], scan: bool) -> Iterator[Run]:
    """Yields the entries of one stage in the parameter tree, in the order in which they run.

    Without `scan`, each block has its own entry, such as `stage3_block2`. With `scan`, equal neighbours from the second
    block on are stacked. Their entry is `stage3_blocks` if they are all blocks but the first, and otherwise has their
    numbers, such as `stage3_blocks2to5`. A block without an equal neighbour keeps its own entry.

    Args:
        stage: number of the stage, from 1.
        specs: the stage's blocks.
        scan: as `models.create` has it.
    """
    prefix = f"stage{stage}_block"
    yield Run(f"{prefix}1", stage, 1, specs[:1], False)
    # Equal blocks have equal parameters only if their inputs are equally wide too.
    input_widths = [spec.out_width for spec in specs]
    first = 2
    for (spec, input_width), group in itertools.groupby(zip(specs[1:], input_widths)):
        equal = tuple(spec for spec, _ in group)
        last = first + len(equal) - 1
        loops = scan and spec.stride == 1 and spec.out_width == input_width  # a loop needs an output like its input
        if loops and equal == specs[1:]:
            yield Run(f"{prefix}s", stage, first, equal, True)
        elif loops and len(equal) > 1:
            yield Run(f"{prefix}s{first}to{last}", stage, first, equal, True)
        else:
            yield from (Run(f"{prefix}{n}", stage, n, (spec,), False) for n in range(first, last + 1))
        first = last + 1
