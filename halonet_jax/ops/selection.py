"""Which implementation of the operator attends. The platform that the program is for decides, and the shapes."""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType

from halonet_jax.ops import einsum, einsum_cpu, gpu, tpu
from halonet_jax.ops.platforms import by_platform, cut_axes, device

NAMES = ("auto", "xla", "pallas", "reference")
# Einsums by platform; other platforms take `einsum`.
EINSUM = {"cpu": einsum_cpu}
# Fused kernels by platform; other platforms interpret TPU's.
FUSED = {"tpu": tpu, "gpu": gpu}
# Platforms where "auto" takes the fused kernels, if `unsupported` gives no reason against it. Other platforms take
# "xla". Reasons (docs/performance.md): on TPU, traffic and memory by TPU's compiler. On GPU, the kernels have not been
# timed yet. On CPU, they would be interpreted.
AUTO_FUSED = ("tpu",)


class Choice(NamedTuple):
    """An implementation.

    Attributes:
        implementation: "xla", "pallas" or "reference", or the function that was asked for.
        reason: why it is not "pallas", where that was possible; else "".
    """

    implementation: Any
    reason: str = ""


def choose(
    implementation: Any, q: Any, k: Any, v: Any, *, block_size: int, halo_size: int, stride: int, centered: bool, masked: bool,
    adjacent: bool = False, platform: str | None = None,
) -> Choice:  # fmt: skip
    """Returns what attends on a platform: "auto" is resolved, and "pallas" stays only if the kernels can do it.

    Args:
        implementation: as of `halo_attention`.
        q, k, v: arrays, or anything with their shapes and dtypes, as of `halo_attention`.
        block_size, halo_size, stride, centered, masked, adjacent: as of `reference.attend`.
        platform: "cpu", "gpu", "tpu" …; None: that of `platforms.device`.

    Raises:
        ValueError: the implementation is unknown.
    """
    if not (implementation in NAMES or callable(implementation)):
        raise ValueError(f"attention_impl={implementation!r} is unknown; use one of {', '.join(NAMES)}")
    platform = platform or device().platform
    if implementation not in ("auto", "pallas"):
        return Choice(implementation)
    if implementation == "auto" and platform not in AUTO_FUSED:
        return Choice("xla")
    if platform in FUSED and (reason := _uncut(q.shape[0], platform)):
        return Choice("xla", reason)
    options = dict(block_size=block_size, halo_size=halo_size, stride=stride, centered=centered, masked=masked)
    if adjacent:
        options["adjacent"] = True
    reason = FUSED.get(platform, tpu).unsupported(q, k, v, **options)
    return Choice("xla", reason) if reason else Choice("pallas")


def attend(q, k, v, rel_rows, rel_cols, *, implementation, fall_back=False, logits_scale, **options):
    """Attends as `reference.attend` does, by the implementation of that name for the platform that the program is for.

    Args:
        q, k, v, rel_rows, rel_cols, logits_scale, **options: as of `reference.attend`.
        implementation: "auto", "xla" or "pallas".
        fall_back: whether "pallas" becomes "xla" where the kernels cannot attend like this.

    Returns:
        As `reference.attend`.

    Raises:
        ValueError: "pallas", without `fall_back`, where the kernels cannot attend like this.
    """

    @functools.cache  # Platforms with the same function then share one branch.
    def bound(function, **more):
        return functools.partial(function, **options, logits_scale=logits_scale, **more)

    def function(platform):
        name = implementation
        if name == "auto" or fall_back or platform != device().platform:
            name = choose(name, q, k, v, **options, platform=platform).implementation
        if name == "xla":
            return bound(EINSUM.get(platform, einsum).attend)
        if platform not in FUSED:
            return bound(tpu.attend)
        return bound(FUSED[platform].attend, interpret=False)

    functions = {platform: function(platform) for platform in ("cpu", *FUSED)}
    return by_platform(q, k, v, rel_rows, rel_cols, **functions, default=function("other"))


def _uncut(batch, platform):
    """Returns why the devices cannot share a kernel, or None. XLA cuts an einsum by itself, but no kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        count = jax.device_count() if device().platform == platform else 1
        reason = f"of {count} devices, no mesh is set; jax.set_mesh, with Auto axes, says how to cut the batch"
        return reason if count > 1 else None
    if AxisType.Explicit in mesh.axis_types:
        return "the mesh has Explicit axes; give jax.make_mesh axis_types=(jax.sharding.AxisType.Auto,) * number_of_axes"
    count = math.prod(mesh.shape[name] for name in cut_axes(mesh))
    return f"a batch of {batch} does not divide over {count} devices" if batch % count else None
