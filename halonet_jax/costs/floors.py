"""Lower bounds ("floors") on the time of halo attention on a device. Each of the three considers one resource alone.

- bytes that must move, over the memory bandwidth;
- multiply-adds, over the rate of the matrix units;
- exponentials, over the rate of the special-function units.

We count the operator, from q, k and v to its output, without projections. Keys outside the map cost nothing.
"""

import re
from typing import NamedTuple

from halonet_jax import models
from halonet_jax.costs import chips
from halonet_jax.models.blocks import AttentionLayer

# Training resolutions of the recipes: side of the images in pixels (paper, table 3).
IMAGE_SIZES = dict(h0=256, h1=256, h2=256, h3=320, h4=384, h5=448, h6=512, h7=600)


class Rates(NamedTuple):
    """Peak rates of one device.

    Attributes:
        flops: bfloat16 FLOP/s with dense operands. A multiply-add is two FLOPs.
        bandwidth: bytes/s of the main memory.
        exponentials: exponentials/s.
    """

    flops: float
    bandwidth: float
    exponentials: float


# TPUs: no data sheet states the rate of exponentials. We assume one vector register of 8 x 128 lanes per cycle and
# core: an instruction of the compiler's schedules has room for one.
_TPUS = {name: Rates(c.flops, c.bandwidth, 1024 * c.clock * c.cores_per_device) for name, c in chips.CHIPS.items()}
# SXM GPUs: FLOP/s and bandwidth are from NVIDIA's data sheets for A100, H100 and H200. Exponentials: 16 per cycle and
# multiprocessor (CUDA C++ Programming Guide, arithmetic instructions). A100 has 108 multiprocessors at 1.41 GHz, H100
# and H200 have 132 at 1.83 GHz. FlashAttention-3 (arXiv 2407.08608) states the same 3.9e12 for H100.
RATES = _TPUS | {
    "A100-40GB": Rates(312e12, 1555e9, 108 * 16 * 1.41e9),
    "A100-80GB": Rates(312e12, 2039e9, 108 * 16 * 1.41e9),
    "H100": Rates(989e12, 3350e9, 132 * 16 * 1.83e9),
    "H200": Rates(989e12, 4800e9, 132 * 16 * 1.83e9),
}
# JAX's names for devices with these rates. PCIe and other smaller boards have lower rates and are not listed.
_KINDS = {
    "TPU v3": "v3", "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "NVIDIA A100-SXM4-40GB": "A100-40GB", "NVIDIA A100-SXM4-80GB": "A100-80GB",
    "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200",
}  # fmt: skip


class Layer(NamedTuple):
    """Geometry of one attention layer.

    Attributes:
        batch: images.
        height: of the map of keys, in pixels.
        width: likewise.
        heads: number of heads.
        channels: of queries and keys, over all heads.
        value_channels: of values, over all heads.
        block_size: side of a block of queries (b), in pixels.
        halo_size: border around the block (h), in pixels.
        stride: of the queries.
        relative: whether there are relative tables.
    """

    batch: int
    height: int
    width: int
    heads: int
    channels: int
    value_channels: int
    block_size: int
    halo_size: int
    stride: int = 1
    relative: bool = True


class Work(NamedTuple):
    """The work that an operator cannot avoid.

    Attributes:
        size: bytes to and from main memory.
        multiply_adds: of the matrix units.
        exponentials: number of them.
    """

    size: int
    multiply_adds: int
    exponentials: int

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Returns the floors in seconds, `{"bytes": …, "multiply-adds": …, "exponentials": …}`.

        Args:
            rates: those of the device.
        """
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
    """Returns the stride-1 attention layer of a stage, at the model's training resolution.

    Args:
        name: model and stage: "h4s1" is the first stage of H4.
        batch: images.

    Raises:
        ValueError: the name has another form, or the model is unknown.
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
    """Returns the work of the forward pass.

    It reads q, k, v and the tables and writes the output. It computes both products, the logits of relative positions, and one
    exponential for each query and key.

    Args:
        layer: the geometry.
        itemsize: bytes per element of q, k, v and the output.
    """
    queries, pairs, position = _counts(layer)
    n = layer
    size = itemsize * (queries + n.batch * n.height * n.width) * (n.channels + n.value_channels) + _table_size(n)
    multiply_adds = pairs * (n.channels + n.value_channels) + position
    return Work(size, multiply_adds, pairs * n.heads)


def backward(layer: Layer, itemsize: int = 2) -> Work:
    """Returns the work of the backward pass.

    It reads q, k, v, the tables and the output's gradient, and writes the gradients of q, k, v and the tables. It
    recomputes logits and exponentials, because storing them would move far more bytes. That makes five products instead
    of four.

    Args:
        layer: the geometry.
        itemsize: bytes per element of q, k, v, the output and their gradients.
    """
    queries, pairs, position = _counts(layer)
    n = layer
    inputs = queries * n.channels + n.batch * n.height * n.width * (n.channels + n.value_channels)
    size = itemsize * (2 * inputs + queries * n.value_channels) + 2 * _table_size(n)
    multiply_adds = pairs * (3 * n.channels + 2 * n.value_channels) + 3 * position
    return Work(size, multiply_adds, pairs * n.heads)


def total(*works: Work) -> Work:
    """Returns the sum of the work of several operators.

    Args:
        *works: the work of each.
    """
    return Work(*map(sum, zip(*works)))


def rates(device_kind: str) -> Rates | None:
    """Returns the peak rates of a device, or None if they are unknown.

    Args:
        device_kind: JAX's name of the device, `jax.Device.device_kind`.
    """
    return RATES.get(_KINDS.get(device_kind))


def _table_size(layer):
    if not layer.relative:
        return 0
    rows = 2 * layer.block_size + 2 * layer.halo_size - 1
    return 2 * 4 * rows * (layer.channels // layer.heads // 2)  # float32


def _counts(layer):
    """Counts queries, pairs of a query and a key on the map, and multiply-adds of the position logits."""
    n = layer
    (rows, row_pairs), (cols, col_pairs) = (_axis(size, n.block_size, n.halo_size, n.stride) for size in (n.height, n.width))
    queries, pairs = n.batch * rows * cols, n.batch * row_pairs * col_pairs
    return queries, pairs, n.relative * n.batch * (row_pairs * cols + rows * col_pairs) * n.channels // 2


def _axis(size, block, halo, stride):
    queries = pairs = 0
    for start in range(0, size, block):
        end = min(start + block, size)
        first = -(-start // stride) * stride
        block_queries = len(range(first, end, stride))
        queries += block_queries
        pairs += block_queries * (min(start + block + halo, size) - max(start - halo, 0))
    return queries, pairs
