"""The devices that kernels are for, which the mesh says, and kernels over several of them."""

import functools
import math

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def device():
    """What programs are traced for, with `platform` and `device_kind`.

    The devices of the mesh that `jax.set_mesh` or `jax.sharding.use_abstract_mesh` has set, which need not be at hand; without a
    mesh, JAX's default device.
    """
    default = jax.config.jax_default_device  # a device, the name of a platform, or None
    found = jax.sharding.get_abstract_mesh().abstract_device or default
    return found if hasattr(found, "platform") else jax.local_devices(backend=default)[0]


def per_device(run, arrays, results, platform, whole=()):
    """Runs a kernel on each device's part of the batch, the first axis of all results and of all arrays but those in `whole`.

    To XLA's partitioner a kernel is opaque, so the cut is made here, over all axes of the mesh that `jax.set_mesh` or
    `jax.sharding.use_abstract_mesh` has set. Without a mesh, or where it does not divide the batch, there is no cut,
    and several TPUs are an error of JAX. (`jax.experimental.custom_partitioning` would need no mesh, but libtpu 0.0.52 does not
    know it.)

    Args:
        run: `run(interpret, *arrays)` gives a sequence of `results` arrays.
        platform: where the kernel is compiled, "cuda" or "tpu"; elsewhere it is interpreted.
    """

    def call(*arrays):
        compiled, interpreted = (functools.partial(run, interpret) for interpret in (False, True))
        return jax.lax.platform_dependent(*arrays, **{platform: compiled}, default=interpreted)

    mesh = jax.sharding.get_abstract_mesh()
    axes = cut_axes(mesh)
    devices = math.prod(mesh.shape[name] for name in axes)
    if devices == 1 or arrays[0].shape[0] % devices:
        return call(*arrays)
    specs = tuple(P() if n in whole else P(axes) for n in range(len(arrays)))
    # Kernels do not say over which axes their results vary.
    return jax.shard_map(call, in_specs=specs, out_specs=(P(axes),) * results, axis_names=set(axes), check_vma=False)(*arrays)


def cut_axes(mesh) -> tuple[str, ...]:
    """The axes of a mesh that batches are cut over, which are all that no surrounding `shard_map` has cut already."""
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual)
