"""The least time that halo attention takes on a device: three floors, each from one resource alone.

Bytes that must move over the memory bandwidth, multiply-adds over the matrix units' rate, exponentials over the special-function
units' rate. Counted is the operator, from q, k and v to its output, without projections; keys outside of the map cost nothing.
"""

import re
from typing import NamedTuple

from halonet_jax import models
from halonet_jax.costs import chips
from halonet_jax.models.blocks import AttentionLayer

# Pixels a side at which the recipes train (paper, table 3).
IMAGE_SIZES = dict(h0=256, h1=256, h2=256, h3=320, h4=384, h5=448, h6=512, h7=600)


class Rates(NamedTuple):
    """One device: bfloat16 FLOP/s (an add or a multiply is one) with dense operands, bytes/s, exponentials/s."""

    flops: float
    bandwidth: float
    exponentials: float


# TPUs: no data sheet has the exponentials. Assumed is one vector register of 8 x 128 lanes a cycle and core, which is what an
# instruction of the compiler's schedules has room for.
_TPUS = {name: Rates(c.flops, c.bandwidth, 1024 * c.clock * c.cores_per_device) for name, c in chips.CHIPS.items()}
# GPUs, SXM: FLOP/s and bandwidth by NVIDIA's data sheets for A100, H100 and H200. Exponentials: 16 a cycle and multiprocessor (CUDA
# C++ Programming Guide, arithmetic instructions), of which there are 108 at 1.41 GHz and 132 at 1.83 GHz. The latter's 3.9e12
# are also in FlashAttention-3 (arXiv 2407.08608).
RATES = _TPUS | {
    "A100-40GB": Rates(312e12, 1555e9, 108 * 16 * 1.41e9),
    "A100-80GB": Rates(312e12, 2039e9, 108 * 16 * 1.41e9),
    "H100": Rates(989e12, 3350e9, 132 * 16 * 1.83e9),
    "H200": Rates(989e12, 4800e9, 132 * 16 * 1.83e9),
}
# JAX's names of devices that go by these rates; PCIe and other cut-down boards have lower ones that are not listed.
_KINDS = {
    "TPU v3": "v3", "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "NVIDIA A100-SXM4-40GB": "A100-40GB", "NVIDIA A100-SXM4-80GB": "A100-80GB",
    "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200",
}  # fmt: skip


class Layer(NamedTuple):
    """Geometry of one attention layer; see `ops` for the letters. `channels` and `value_channels` are over all heads."""

    batch: int
    height: int
    width: int
    heads: int
    channels: int
    value_channels: int
    block_size: int
    halo_size: int
    stride: int = 1


class Work(NamedTuple):
    """What an operator must do: bytes of main memory, multiply-adds, exponentials."""

    size: int
    multiply_adds: int
    exponentials: int

    def seconds(self, rates: Rates) -> dict[str, float]:
        """The floors: `{"bytes": …, "multiply-adds": …, "exponentials": …}`, in seconds."""
        return {
            "bytes": self.size / rates.bandwidth,
            "multiply-adds": 2 * self.multiply_adds / rates.flops,
            "exponentials": self.exponentials / rates.exponentials,
        }


def attention_layers(model: str) -> list[AttentionLayer]:
    """Returns the attention layers of a model at the image size of its recipe, in the order in which they run.

    Args:
        model: a key of `IMAGE_SIZES`.
    """
    size = IMAGE_SIZES[model]
    return models.create(model).backbone.attention_layers(size, size)


def layer(name: str, batch: int) -> Layer:
    """Returns the stride-1 attention layer of a model's stage.

    Args:
        name: model and stage, for example "h4s1" for the first stage of H4.
        batch: number of images.

    Raises:
        ValueError: for another form or an unknown model.
    """
    match = re.fullmatch(r"(h\d)s([1-4])", name)
    if not match or match.group(1) not in IMAGE_SIZES:
        raise ValueError(f"layer {name!r} is unknown; write <model>s<stage>, with h0 to h7 and stages 1 to 4, for example h4s1")
    model, stage = match.group(1), int(match.group(2))
    found = next(n for n in attention_layers(model) if n.stage == stage and n.stride == 1)
    return Layer(
        batch, found.height, found.width, found.num_heads, found.channels, found.value_channels, found.block_size, found.halo_size
    )


def forward(layer: Layer, itemsize: int = 2) -> Work:
    """q, k, v and the tables in, the output out; both products and the position logits; one exponential a query and key."""
    queries, pairs, position = _counts(layer)
    n = layer
    size = itemsize * (queries + n.batch * n.height * n.width) * (n.channels + n.value_channels) + _table_size(n)
    multiply_adds = pairs * (n.channels + n.value_channels) + position
    return Work(size, multiply_adds, pairs * n.heads)


def backward(layer: Layer, itemsize: int = 2) -> Work:
    """q, k, v and the output's gradient in, those of q, k, v and the tables out.

    Logits and exponentials are computed anew, as keeping them would move far more bytes: five products instead of four.
    """
    queries, pairs, position = _counts(layer)
    n = layer
    inputs = queries * n.channels + n.batch * n.height * n.width * (n.channels + n.value_channels)
    size = itemsize * (2 * inputs + queries * n.value_channels) + 2 * _table_size(n)
    multiply_adds = pairs * (3 * n.channels + 2 * n.value_channels) + 3 * position
    return Work(size, multiply_adds, pairs * n.heads)


def total(*works: Work) -> Work:
    """The sum of what several operators must do."""
    return Work(*map(sum, zip(*works)))


def rates(device_kind: str) -> Rates | None:
    """Rates of the device that JAX calls so; None where they are not known."""
    return RATES.get(_KINDS.get(device_kind))


def _table_size(layer):
    rows = 2 * layer.block_size + 2 * layer.halo_size - 1
    return 2 * 4 * rows * (layer.channels // layer.heads // 2)  # float32


def _counts(layer):
    """Queries, pairs of a query and a key that lies on the map, and multiply-adds of the position logits."""
    n = layer
    (rows, row_pairs), (cols, col_pairs) = (_axis(size, n.block_size, n.halo_size, n.stride) for size in (n.height, n.width))
    queries, pairs = n.batch * rows * cols, n.batch * row_pairs * col_pairs
    return queries, pairs, n.batch * (row_pairs * cols + rows * col_pairs) * n.channels // 2


def _axis(size, block, halo, stride):
    queries = pairs = 0
    for start in range(0, size, block):
        end = min(start + block, size)
        first = -(-start // stride) * stride
        block_queries = len(range(first, end, stride))
        queries += block_queries
        pairs += block_queries * (min(start + block + halo, size) - max(start - halo, 0))
    return queries, pairs
