"""The capacity of one TPU device, and the least time that a program takes on it.

A device is what JAX counts as one. On v3 it is a core, and a chip has two. On the others it is a whole chip (v4 in its
usual "megacore" mode). Names of Cloud slices count cores for v2 to v5p and chips for v5e and v6e: v3-128, v4-128 and
v5p-128 all have 64 chips.
"""

import difflib
import re
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One device.

    Attributes:
        name: the generation, such as "v5e".
        memory: bytes that a program can use, as the compiler states it when it runs out (libtpu 0.0.52). The data
            sheet's figure is higher, because the system reserves some.
        flops: peak bfloat16 FLOP/s.
        bandwidth: bytes/s of the main memory.
        clock: Hz. It is the data sheet's FLOP/s over the FLOPs of the matrix units in a cycle. A unit does 128²
            multiply-adds, and a device has 2 units (a core of v3), 8 (v4, v5p) or 4 (v5e). The result equals the
            published 0.94 and 1.05 GHz of v3 and v4. For v6e we assume four units of 256²: by the compiler's estimate
            for a matrix product, two would be too few.
        devices_per_chip: 2 if a device is one core, else 1.
        cores_per_device: 2 if two cores work as one device, else 1.
        matmul_share: share of the peak that the compiler's estimate implies for an 8192³ bfloat16 product.
        add_share: share of the bandwidth that its estimate implies for the sum of two arrays of 1 GiB.
        options: keyword arguments of `jax.experimental.topologies.get_topology_desc`.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    clock: float
    devices_per_chip: int
    cores_per_device: int
    matmul_share: float
    add_share: float
    options: dict = {}


# FLOP/s and bandwidth: cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e}, per chip; halved for v3's cores.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v3", 15.48 * GIB, 123e12 / 2, 900e9 / 2, 0.94e9, 2, 1, 0.97, 0.89),
        Chip("v4", 30.75 * GIB, 275e12, 1228e9, 1.05e9, 1, 2, 0.93, 0.68, {"chip_config_name": "megacore"}),
        Chip("v5e", 15.75 * GIB, 197e12, 819e9, 1.50e9, 1, 1, 0.88, 0.57),
        Chip("v5p", 95.73 * GIB, 459e12, 2765e9, 1.75e9, 1, 2, 0.90, 0.45),
        Chip("v6e", 31.24 * GIB, 918e12, 1640e9, 1.75e9, 1, 1, 0.70, 0.44),
    )
}


class Topology(NamedTuple):
    """A slice of TPU chips.

    Attributes:
        name: chip and arrangement, as Cloud and libtpu write them, such as "v5e:4x4".
        chip: one device of the slice.
        num_chips: number of chips.
    """

    name: str
    chip: Chip
    num_chips: int

    @property
    def num_devices(self) -> int:
        """Number of JAX devices."""
        return self.num_chips * self.chip.devices_per_chip


def topology(name: str) -> Topology:
    """Returns the topology of a name.

    Args:
        name: chip and arrangement, such as "v5e:4x4" or "v4:2x2x4".

    Raises:
        ValueError: the name has another form, or the chip is unknown.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+){1,2})", name)
    if not match:
        raise ValueError(f"topology {name!r} is not <chip>:<shape>; write for example v5e:4x4 or v4:2x2x4")
    if match.group(1) not in CHIPS:
        close = difflib.get_close_matches(match.group(1), CHIPS, n=1)
        hint = f"did you mean {close[0]}:{match.group(2)}?" if close else f"use one of {', '.join(CHIPS)}"
        raise ValueError(f"topology {name!r} names an unknown chip; {hint}")
    num_chips = 1
    for size in match.group(2).split("x"):
        num_chips *= int(size)
    return Topology(name, CHIPS[match.group(1)], num_chips)


def roofline_seconds(chip: Chip, flops: float, size: float) -> float:
    """Returns the roofline bound in seconds: the larger of the time for FLOPs and the time for memory traffic.

    Args:
        chip: the device.
        flops: FLOPs of its matrix units.
        size: bytes read from and written to main memory.
    """
    return max(flops / chip.flops, size / chip.bandwidth)


def step_seconds(chip: Chip, flops: float, size: float, cycles: float, kernel_flops: float = 0) -> float | None:
    """Returns a program's estimated seconds: by the backend's cycles or by the roofline, whichever is longer.

    The backend has no estimate for Pallas kernels. They count as their FLOPs at the peak, which is their lower bound.
    The estimate leaves out communication between chips and other work without an estimate (see `hlo_cost.Cost.cycles`).
    For work that memory bounds, the backend's cycles imply only `add_share` of the bandwidth, so the result may be up
    to twice too long.

    Args:
        chip: the device.
        flops: FLOPs of its matrix units, kernels included.
        size: bytes read from and written to main memory.
        cycles: the backend's estimate; 0: it has none.
        kernel_flops: FLOPs of Pallas kernels.

    Returns:
        Seconds; None without cycles.
    """
    return max(cycles / chip.clock + kernel_flops / chip.flops, roofline_seconds(chip, flops, size)) if cycles else None
