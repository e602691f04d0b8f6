"""The platform that a program is for, and kernels over several devices.

A program may be traced on one machine and run on another. Where a mesh is set, with `jax.set_mesh` or
`jax.sharding.use_abstract_mesh`, its devices are those that the program is for. Where no mesh is set, nobody knows them
while the program is traced: JAX picks the code for each platform when it lowers the program. `jax.export` can lower one
program for several platforms.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def mesh_device() -> Any:
    """Returns the device of the mesh that is set, with `platform` and `device_kind`; None without a mesh."""
    return jax.sharding.get_abstract_mesh().abstract_device


def device() -> Any:
    """Returns the device that attention is described and checked for, with `platform` and `device_kind`.

    It is the device of the mesh that is set, which this machine need not have. Without a mesh it is JAX's default device.
    """
    default = jax.config.jax_default_device  # a device, the name of a platform, or None
    found = mesh_device() or default
    return found if hasattr(found, "platform") else jax.local_devices(backend=default)[0]


def by_platform(*arrays: Any, default: Callable, **branches: Callable) -> Any:
    """Calls the function for the platform that the program is for.

    With a mesh, the choice is made here. Without one, all functions are traced, and the choice is made when the program is
    lowered, once for each platform that it is lowered for. All functions must return arrays of the same shapes and dtypes.

    Args:
        *arrays: what the functions are called with; trees of arrays too.
        default: the function for platforms that have none of their own.
        **branches: functions by platform, "cpu" or "tpu".

    Returns:
        What the function returns.
    """
    target = mesh_device()
    if target is not None:
        return branches.get(target.platform, default)(*arrays)
    return jax.lax.platform_dependent(*arrays, **branches, default=default)


def per_device(
    run: Callable, arrays: tuple, results: int, platform: str, whole: tuple[int, ...] = (), interpret: bool = True
) -> Any:
    """Runs a kernel on each device's part of the batch.

    XLA cannot cut a kernel over devices as it cuts other operations. The cut is made here, over all axes of the mesh that
    is set. The kernel is not cut where no mesh is set, or where the devices do not divide the batch; JAX then refuses to run
    it on several TPUs. (`jax.experimental.custom_partitioning` would need no mesh, but libtpu 0.0.52 does not support it.)

    Args:
        run: the kernel; `run(interpret, *arrays)` returns a sequence of arrays.
        arrays: its inputs. The batch is the first axis of each, except of those in `whole`.
        results: number of arrays that `run` returns. The batch is the first axis of each.
        platform: where the kernel is compiled, "cuda" or "tpu".
        whole: indices of the arrays that every device gets whole.
        interpret: whether the kernel is interpreted on other platforms. False: the caller promises that the result is not
            used there; it is zeros, which keeps a program for several platforms small.

    Returns:
        The arrays that `run` returns.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _kernel_p.bind(*arrays, run=run, platform=platform, interpret=interpret)

    def call(*arrays):
        compiled, interpreted = (functools.partial(run, interpret) for interpret in (False, True))
        return jax.lax.platform_dependent(*arrays, **{platform: compiled}, default=interpreted)

    axes = cut_axes(mesh)
    devices = math.prod(mesh.shape[name] for name in axes)
    if devices == 1 or arrays[0].shape[0] % devices:
        return call(*arrays)
    specs = tuple(P() if n in whole else P(axes) for n in range(len(arrays)))
    # Kernels do not say over which axes their results vary.
    return jax.shard_map(call, in_specs=specs, out_specs=(P(axes),) * results, axis_names=set(axes), check_vma=False)(*arrays)


def cut_axes(mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """Returns the axes of a mesh that batches are cut over: all that no surrounding `shard_map` has cut already.

    Args:
        mesh: any mesh.
    """
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual)


# A kernel without a mesh. `jax.lax.platform_dependent` would not do: in a program for several platforms, it lowers the code
# of each platform for all of them, and Pallas refuses to lower a compiled kernel for a CPU. A primitive's lowering rule is
# called for its own platform alone.

_kernel_p = Primitive("halo_attention_kernel")
_kernel_p.multiple_results = True


@_kernel_p.def_impl
def _run_now(*arrays, run, platform, interpret):
    compiled, interpreted = (functools.partial(run, interpret) for interpret in (False, True))
    return jax.lax.platform_dependent(*arrays, **{platform: compiled}, default=interpreted)


@_kernel_p.def_abstract_eval
def _shapes(*avals, run, platform, interpret):
    del platform, interpret
    arrays = (jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals)
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in jax.eval_shape(functools.partial(run, True), *arrays)]


def _lower(context, *values, run, platform, interpret, here=""):
    def zeros(*arrays):
        return [jax.numpy.zeros(x.shape, x.dtype) for x in jax.eval_shape(functools.partial(run, True), *arrays)]

    if here == platform or interpret:
        return mlir.lower_fun(functools.partial(run, here != platform))(context, *values)
    return mlir.lower_fun(zeros)(context, *values)


def _batch(arrays, dims, *, run, platform, interpret):
    def mapped(interpret, *arrays):
        return jax.vmap(functools.partial(run, interpret), in_axes=dims)(*arrays)

    results = _kernel_p.bind(*arrays, run=mapped, platform=platform, interpret=interpret)
    return results, [0] * len(results)


mlir.register_lowering(_kernel_p, _lower)
for _platform in ("cuda", "tpu"):
    mlir.register_lowering(_kernel_p, functools.partial(_lower, here=_platform), platform=_platform)
batching.primitive_batchers[_kernel_p] = _batch
