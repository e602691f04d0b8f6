"""Pure functions on arrays: the halo attention operator.

Axis legend, the same everywhere in this package (lower case in einsums):

    B  batch                          I, J  rows and columns of blocks
    H, W  map height and width        Y, X  query row and column inside a block
    N  heads                          R, S  key row and column inside a neighbourhood
    D  query/key channels per head    E     value channels per head
"""

from halonet_jax.ops.halo_attention import halo_attention
from halonet_jax.ops.platforms import by_platform, device
from halonet_jax.ops.selection import Choice, attend, choose

__all__ = ["Choice", "attend", "by_platform", "choose", "device", "halo_attention"]
