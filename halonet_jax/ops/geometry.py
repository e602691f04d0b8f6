"""Blocks, neighbourhoods and masks along one axis of the map.

All implementations use it but `reference`, which states the geometry on its own: it is what they are tested against.
"""

from typing import NamedTuple

import numpy as np

# What masked logits become. It is finite, and stays finite if a row and a column add it and the scale multiplies it:
# queries that pad the map see no key at all.
MASKED = -1e30


class Axis(NamedTuple):
    """One axis of the map, either rows or columns. Lengths are in pixels at full resolution.

    Attributes:
        size: of the map.
        block: of a block.
        halo: of the halo on each side of a block.
        stride: from one query to the next; divides `block`.
        center: row of the relative table for a key at its query's place.
        reach: keys farther than this from their query are masked; None: no such mask.
        masked: whether keys outside of the map are masked.
        adjacent: whether the relative table takes the queries of a block as adjacent pixels, whatever the stride.
    """

    size: int
    block: int
    halo: int
    stride: int
    center: int
    reach: int | None
    masked: bool
    adjacent: bool = False

    @property
    def blocks(self) -> int:
        """Number of blocks; the last one may reach beyond the map."""
        return -(-self.size // self.block)

    @property
    def queries(self) -> int:
        """Number of queries in a block."""
        return -(-self.block // self.stride)

    @property
    def outputs(self) -> int:
        """Number of queries on the map."""
        return -(-self.size // self.stride)

    @property
    def keys(self) -> int:
        """Number of keys in a block's neighbourhood."""
        return self.block + 2 * self.halo

    @property
    def key_padding(self) -> tuple[int, int]:
        """Zeros before and after the map's keys that complete all neighbourhoods."""
        return self.halo, self.blocks * self.block - self.size + self.halo

    @property
    def query_padding(self) -> tuple[int, int]:
        """Zeros before and after the map's queries that complete all blocks."""
        return 0, self.blocks * self.queries - self.outputs

    @property
    def offsets(self) -> np.ndarray:
        """How far each key lies behind each query of its block: `[queries, keys]` int."""
        return np.arange(-self.halo, self.block + self.halo) - np.arange(0, self.block, self.stride)[:, None]

    @property
    def table_step(self) -> int:
        """Rows of the relative table from one query to the next."""
        return 1 if self.adjacent else self.stride

    @property
    def table_index(self) -> np.ndarray:
        """Each query's and key's row of the relative table: `[queries, keys]` int."""
        return np.arange(-self.halo, self.block + self.halo) - self.table_step * np.arange(self.queries)[:, None] + self.center

    @property
    def bias(self) -> np.ndarray:
        """What masks add to the logits, 0 or `MASKED`: `[blocks, queries, keys]` float32."""
        hidden = np.zeros((self.blocks, self.queries, self.keys), bool)
        if self.masked:
            position = np.arange(-self.halo, self.block + self.halo) + self.block * np.arange(self.blocks)[:, None]
            hidden |= ((position < 0) | (position >= self.size))[:, None]
        if self.reach is not None:
            hidden |= abs(self.offsets) > self.reach
        return np.where(hidden, np.float32(MASKED), np.float32(0))


def make_axes(
    shape: tuple, *, block_size: int, halo_size: int, stride: int, centered: bool, masked: bool, adjacent: bool = False
) -> tuple[Axis, Axis]:  # fmt: skip
    """Returns the rows and the columns of a map.

    A block that exceeds the map shrinks to it if keys outside of the map are masked: these change nothing.

    Args:
        shape: `[B, H, W, …]`, of keys or values.
        block_size, halo_size, stride, centered, masked, adjacent: as of `reference.attend`.
    """

    def make(size):
        block, halo = (-(-size // stride) * stride, 0) if masked and block_size >= size else (block_size, halo_size)
        return Axis(size, block, halo, stride, block_size - 1 + halo_size, halo_size if centered else None, masked, adjacent)

    return make(shape[1]), make(shape[2])
