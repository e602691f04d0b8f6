"""Which implementation attends: decided by the kind of device that a program is traced for, and by the shapes."""

import math
from typing import NamedTuple

import jax
from jax.sharding import AxisType

from halonet_jax.ops import einsum, einsum_cpu, gpu, reference, tpu
from halonet_jax.ops.per_device import cut_axes, device

NAMES = ("auto", "xla", "pallas", "reference")
# The einsum by platform; elsewhere it is `einsum`.
EINSUM = {"cpu": einsum_cpu}
# The fused kernels by platform. Where there are none, TPU's are interpreted.
FUSED = {"tpu": tpu, "gpu": gpu}
# Where "auto" takes them, wherever `unsupported` has no objection; elsewhere it takes "xla". What decided (docs/performance.md):
# tpu: traffic and memory by the TPU compiler. gpu: not yet, since the kernels have not been timed on one. cpu: they would be
# interpreted.
AUTO_FUSED = ("tpu",)


class Choice(NamedTuple):
    """An implementation ("xla", "pallas" or "reference"), and why it is not the fused kernels where it might have been."""

    implementation: str
    reason: str = ""


def choose(implementation: str, q, k, v, *, block_size, halo_size, stride, centered, masked) -> Choice:
    """What "auto" comes to, and what "pallas" comes to in a model, where other layers may do what this one cannot.

    q, k and v are arrays, or anything with their shapes and dtypes, as for `halo_attention`.
    """
    if not (implementation in NAMES or callable(implementation)):
        raise ValueError(f"attention_impl={implementation!r} is unknown; use one of {', '.join(NAMES)}")
    if implementation not in ("auto", "pallas"):
        return Choice(implementation)
    if implementation == "auto" and device().platform not in AUTO_FUSED:
        return Choice("xla")
    if device().platform in FUSED and (reason := _uncut(q.shape[0])):
        return Choice("xla", reason)
    options = dict(block_size=block_size, halo_size=halo_size, stride=stride, centered=centered, masked=masked)
    reason = fused().unsupported(q, k, v, **options)
    return Choice("xla", reason) if reason else Choice("pallas")


def function(implementation: str, q, k, v, **options):
    """The `attend` that a name stands for."""
    if implementation == "auto":
        implementation = choose("auto", q, k, v, **options).implementation
    by_xla = EINSUM.get(device().platform, einsum)
    return {"xla": by_xla, "pallas": fused(), "reference": reference}[implementation].attend


def fused():
    """The module that "pallas" stands for, with `attend` and `unsupported`."""
    return FUSED.get(device().platform, tpu)


def _uncut(batch):
    """Why a kernel could not be cut over the devices: XLA cannot do it by itself, as it can with the einsum."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        count = jax.device_count()
        return (
            f"of {count} devices, no mesh is set; jax.set_mesh, with Auto axes, says how to cut the batch"
            if count > 1
            else None
        )
    if AxisType.Explicit in mesh.axis_types:
        return "the mesh has Explicit axes; give jax.make_mesh axis_types=(jax.sharding.AxisType.Auto,) * number_of_axes"
    count = math.prod(mesh.shape[name] for name in cut_axes(mesh))
    return f"a batch of {batch} does not divide over {count} devices" if batch % count else None
