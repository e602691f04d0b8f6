"""The platform that a program is for, and kernels over several devices.

A program may be traced on one machine and run on another. Where a mesh is set, with `jax.set_mesh` or
`jax.sharding.use_abstract_mesh`, the program is for the mesh's devices. Without a mesh, the platform is unknown while
the program is traced. JAX then picks the code for each platform when it lowers the program, and `jax.export` can lower
one program for several platforms.
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

    It is the device of the mesh that is set, which this machine need not have. Without a mesh it is JAX's default
    device.
    """
    default = jax.config.jax_default_device  # a device, the name of a platform, or None
    found = mesh_device() or default
    return found if hasattr(found, "platform") else jax.local_devices(backend=default)[0]


def by_platform(*arrays: Any, default: Callable, **functions: Callable) -> Any:
    """Calls the function for the platform that the program is for.

    With a mesh, or outside of `jax.jit`, only that function is called. Otherwise all functions are traced, and the
    choice is made when the program is lowered, for each platform that it is lowered for.

    Args:
        *arrays: what the functions are called with; trees of arrays too.
        default: the function for platforms that have none of their own.
        **functions: functions by platform: "cpu", "gpu" or "tpu". All functions return arrays of the same shapes and
            dtypes.

    Returns:
        What the function returns.
    """
    target = mesh_device()
    if target is not None:
        return functions.get(target.platform, default)(*arrays)
    if "gpu" in functions:
        functions["cuda"] = functions["rocm"] = functions.pop("gpu")
    functions = {name: function for name, function in functions.items() if function != default}
    if not functions:
        return default(*arrays)
    return jax.lax.platform_dependent(*arrays, **functions, default=default)


def per_device(
    run: Callable, arrays: tuple, results: Callable, platform: str, whole: tuple[int, ...] = (), interpret: bool = True
) -> list[jax.Array]:
    """Runs a kernel on each device's part of the batch.

    XLA cannot cut a kernel over devices as it cuts other operations. The cut is made here, over all axes of the mesh
    that is set. The kernel is not cut where no mesh is set, or where the devices do not divide the batch; JAX then
    refuses to run it on several TPUs. (`jax.experimental.custom_partitioning` would need no mesh, but libtpu 0.0.52
    does not support it.)

    Args:
        run: the kernel; `run(interpret, *arrays)` returns a tuple of arrays.
        arrays: its inputs. The batch is the first axis of each, except of those in `whole`.
        results: `results(*arrays)` returns the shapes and dtypes of what `run` returns, as a sequence of
            `jax.ShapeDtypeStruct`. The batch is the first axis of each.
        platform: where the kernel is compiled, "cuda" or "tpu".
        whole: indices of the arrays that every device gets whole.
        interpret: whether the kernel is interpreted on other platforms. False: the caller never uses the result there;
            it is zeros, which keeps a program for several platforms small.

    Returns:
        The arrays that `run` returns.
    """
    mesh = jax.sharding.get_abstract_mesh()
    call = functools.partial(_kernel_p.bind, interpret=interpret)
    if mesh_device() is not None:  # The program is for one platform and needs no primitive.
        call = functools.partial(_run, interpret=True)
    call = functools.partial(call, run=run, results=results, platform=platform)
    axes = cut_axes(mesh)
    devices = math.prod(mesh.shape[name] for name in axes)
    if devices == 1 or arrays[0].shape[0] % devices:
        return call(*arrays)
    specs = tuple(P() if n in whole else P(axes) for n in range(len(arrays)))
    out_specs = (P(axes),) * len(results(*arrays))
    # Kernels do not say over which axes their results vary.
    return jax.shard_map(call, in_specs=specs, out_specs=out_specs, axis_names=set(axes), check_vma=False)(*arrays)


def cut_axes(mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """Returns the axes of a mesh that batches are cut over: all that no surrounding `shard_map` has cut already.

    Args:
        mesh: any mesh.
    """
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual)


# A kernel is a primitive, because each platform lowers a primitive by a rule of its own. `jax.lax.platform_dependent`
# alone would not do: in a program for several platforms it lowers every branch for all of them, and Pallas refuses to
# lower a compiled kernel for a CPU.

_kernel_p = Primitive("halo_attention_kernel")
_kernel_p.multiple_results = True


@_kernel_p.def_impl
def _run(*arrays, run, results, platform, interpret):
    def zeros(*arrays):
        return tuple(jax.numpy.zeros(x.shape, x.dtype) for x in results(*arrays))

    elsewhere = functools.partial(run, True) if interpret else zeros
    return jax.lax.platform_dependent(*arrays, **{platform: functools.partial(run, False)}, default=elsewhere)


@_kernel_p.def_abstract_eval
def _shapes(*arrays, run, results, platform, interpret):
    del run, platform, interpret
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in results(*arrays)]


def _batch(arrays, axes, *, run, results, **rest):
    """Under `jax.vmap`: the kernel's own batching rule, through another kernel."""

    def batched_run(interpret, *arrays):
        return jax.vmap(functools.partial(run, interpret), in_axes=axes)(*arrays)

    def batched_results(*arrays):
        return jax.eval_shape(functools.partial(batched_run, True), *arrays)

    out = _kernel_p.bind(*arrays, run=batched_run, results=batched_results, **rest)
    return out, [0] * len(out)


batching.primitive_batchers[_kernel_p] = _batch
for _platform in ("cpu", "cuda", "rocm", "tpu"):
    mlir.register_lowering(_kernel_p, mlir.lower_fun(_run), platform=_platform)
