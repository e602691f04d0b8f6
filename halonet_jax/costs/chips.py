"""What one TPU device can do, and the least time that a program takes on it.

A device is what JAX counts. On v3 that is a core, of which a chip has two; on the others it is a whole chip (v4 in its usual
"megacore" mode). Cloud names count cores for v2 to v5p and chips for v5e and v6e: v3-128, v4-128 and v5p-128 are all 64 chips.
"""

import difflib
import re
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One device.

    Attributes:
        memory: bytes that a program can have; less than the data sheet, since the system keeps some. As the compiler states it
            when it runs out (libtpu 0.0.52).
        flops: peak bfloat16 FLOP/s.
        bandwidth: of the main memory, bytes/s.
        clock: Hz; data sheet FLOP/s over those that its matrix units do in a cycle: 128² multiply-adds in each of 2 (a core of
            v3), 8 (v4, v5p) or 4 (v5e). That gives the published 0.94 and 1.05 GHz of v3 and v4. For v6e we took four units of
            256²: the compiler's estimate for a matrix product is more than two could do in its cycles.
        devices_per_chip: 2 where a device is one core.
        cores_per_device: 2 where two cores work as one device.
        matmul_share: part of the peak that the compiler's estimate for an 8192³ bfloat16 product comes to.
        add_share: part of the bandwidth that its estimate for the sum of two arrays of 1 GiB comes to.
        options: of `jax.experimental.topologies.get_topology_desc`.
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
    """A slice, such as `v5e:4x4`: its chips' arrangement, as Cloud and libtpu write it."""

    name: str
    chip: Chip
    num_chips: int

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices_per_chip


def topology(name: str) -> Topology:
    """Reads a topology's name.

    Raises:
        ValueError: for another form or an unknown chip; states value, rule and remedy.
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
    """The least time for so many matrix FLOPs and so many bytes of main memory, were either all that mattered."""
    return max(flops / chip.flops, size / chip.bandwidth)


def step_seconds(chip: Chip, flops: float, size: float, cycles: float, kernel_flops: float = 0) -> float | None:
    """Estimated time of a program: the backend's cycles, or the roofline where that is more; None without cycles.

    Pallas kernels, for which the backend has no estimate, count as their FLOPs at the peak: the least that they can take. Not
    in it: time between chips, and on-chip work that the backend has no estimate for (see `hlo_cost.Cost.cycles`). For work bound
    by memory, the backend's cycles come to `add_share` of the bandwidth only, so that they may be up to twice too many.
    """
    return max(cycles / chip.clock + kernel_flops / chip.flops, roofline_seconds(chip, flops, size)) if cycles else None
