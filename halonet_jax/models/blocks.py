"""Architectures as data: a network is a list of stages, a stage is a list of block specifications."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from halonet_jax.models import checks

KINDS = ("attention", "conv")


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One bottleneck block: 1x1 conv, attention or 3x3 conv, 1x1 conv, residual (`halonet.Bottleneck`).

        BlockSpec("conv", width=64, out_width=256)
        BlockSpec("attention", width=64, out_width=256, num_heads=4, block_size=8, halo_size=3, stride=2)

    Attributes:
        kind: of the spatial layer: "attention" or "conv" (3x3).
        width: channels that the spatial layer gets (c); a convolution gives as many.
        out_width: channels of the block's output.
        stride: pixels of the input per pixel of the output, per axis. The spatial layer and the shortcut have it.
        se_ratio: inner width of squeeze-and-excitation over `out_width`; 0: the block has none.
        num_heads: heads of the attention. This and the fields below belong to kind "attention" alone, and are None for
            "conv".
        block_size: side of a block of queries, in pixels of the attention's input (b).
        halo_size: border around a block that keys come from as well, in pixels of the attention's input (h).
        query_width: channels of queries and of keys over all heads; None: `width`.
        value_width: channels of values over all heads, which the attention gives; None: `width`.

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

    def __post_init__(self):
        checks.choice("kind", self.kind, KINDS)
        for name in ("width", "out_width", "stride"):
            checks.whole(name, getattr(self, name), 1)
        checks.real("se_ratio", self.se_ratio, 0, 1)
        if self.kind == "conv":
            for name in ("num_heads", "block_size", "halo_size", "query_width", "value_width"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} must be None in a block of kind='conv'; leave it out, or set "
                        "kind='attention'"
                    )
            return
        for name, least in (("block_size", 1), ("halo_size", 0)):
            checks.whole(name, getattr(self, name), least)
        for name in ("query_width", "value_width"):
            if getattr(self, name) is not None:
                checks.whole(name, getattr(self, name), 1)
        checks.heads(self.num_heads, self.channels, self.value_channels)

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
                sizes = b.num_heads, b.channels, b.value_channels, b.block_size, b.halo_size, b.stride
                found.append(AttentionLayer(number, position, height, width, *sizes))
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
