"""Counts a model's parameters, multiply-adds and activations. Nothing is compiled or run: JAX traces the forward pass.

Multiply-adds are those of convolutions and matrix products. Activations are the elements of their outputs, as timm and
fvcore count them. Norms, activation functions, softmax and pooling count nothing.

Attention counts by its definition, so that the result does not depend on the implementation. Each query of the map meets
all keys of its block's window, keys outside of the map included. With the padding "mask", a block that exceeds the map
shrinks to it. With relative positions, each query also meets one row of a relative table for each row and each column
of the window. Absolute positions are sums, which count nothing; their parameters depend on the size of the images.
Where the stride does not divide the block size, the operator attends from every pixel, and that is counted.
"""

import math
import re
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend import core

from halonet_jax import models
from halonet_jax.models.blocks import AttentionLayer
from halonet_jax.ops import geometry


class Count(NamedTuple):
    """What a model, or a part of it, has.

    Attributes:
        parameters: number of trained values.
        multiply_adds: of convolutions and matrix products in the forward pass of the whole batch.
        activations: elements of the outputs of convolutions and matrix products, of the whole batch.
    """

    parameters: int
    multiply_adds: int
    activations: int


class Counts(NamedTuple):
    """The result of `count`.

    Attributes:
        parts: by part, in the order in which they run: "stem", "1", "2" … for the stages, and "head".
        maps: (rows, columns) of each stage's output, in pixels.
    """

    parts: dict[str, Count]
    maps: tuple[tuple[int, int], ...]

    @property
    def total(self) -> Count:
        """The sum over all parts."""
        return Count(*map(sum, zip(*self.parts.values())))


def count(model: models.HaloNet, batch: int, height: int, width: int) -> Counts:
    """Counts the forward pass of a model, in evaluation.

    Args:
        model: of `models.create`.
        batch: number of images.
        height: rows of the images, in pixels.
        width: columns of the images, in pixels.
    """
    maps = []

    def note_maps(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, models.Backbone) and context.method_name == "__call__":
            maps.extend(x.shape[1:3] for x in out)
        return out

    # Loops over equal blocks are traced once.
    model = model.clone(backbone=model.backbone.clone(scan=True, remat=False, attention_impl=_attend))
    images = lambda batch: jax.ShapeDtypeStruct((batch, height, width, 3), jnp.float32)
    apply = lambda function: lambda *args: function(*args, train=False)
    variables = jax.eval_shape(apply(model.init), jax.random.key(0), images(1))
    with nn.intercept_methods(note_maps):
        jaxpr = jax.make_jaxpr(apply(model.apply))(variables, images(batch))
    parameters = Counter()
    for path, x in jax.tree_util.tree_leaves_with_path(variables["params"]):
        parameters[_part(jax.tree_util.keystr(path, simple=True, separator="/"))] += math.prod(x.shape)
    products = Counter()
    for path, number in products_of(jaxpr.jaxpr).items():
        products[_part(path[0]), path[1]] += number
    parts = ["stem", *(str(n) for n in range(1, len(maps) + 1)), "head"]
    counts = {p: Count(parameters[p], products[p, "multiply_adds"], products[p, "activations"]) for p in parts}
    return Counts(counts, tuple(maps))


def window(layer: AttentionLayer, centered: bool = False, masked: bool = True) -> tuple[int, int]:
    """Returns rows and columns of the window that the blocks of an attention layer attend to, in pixels.

    They are b + 2h. A block that covers the map attends to the map alone if keys outside of it are masked.

    Args:
        layer: of `Backbone.attention_layers`.
        centered: whether windows are centred on each query, as `window="centered"` has it. They are 2h + 1 pixels then,
            at most.
        masked: whether keys outside of the map are masked, as with `padding="mask"`.
    """
    options = dict(block_size=layer.block_size, halo_size=layer.halo_size, stride=layer.stride, masked=masked)
    axes = geometry.make_axes((1, layer.height, layer.width), **options, centered=centered)
    return tuple(min(axis.keys, 2 * axis.reach + 1) if centered else axis.keys for axis in axes)


def products_of(jaxpr: Any, path: str = "", times: int = 1) -> Counter:
    """Counts the convolutions and matrix products of a traced function.

    A loop counts as often as it runs. Of branches, such as those for several platforms, the last one counts.

    Args:
        jaxpr: the `jaxpr` of what `jax.make_jaxpr` returns.
        path: goes before the names of the scopes in `jaxpr`.
        times: how often it runs.

    Returns:
        Numbers by (scope, "multiply_adds" or "activations"). A scope is a path such as "HaloNet/backbone/stage1_block1/conv1".

    Raises:
        ValueError: there is a product in a loop without a fixed number of rounds, or a kernel that cannot be looked into.
    """
    found = Counter()
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        scope = f"{path}/{equation.source_info.name_stack}"
        if name in ("dot_general", "conv_general_dilated"):
            size = math.prod(equation.outvars[0].aval.shape)
            left, right = (x.aval.shape for x in equation.invars)
            if name == "dot_general":
                (contracted, _), _ = parameters["dimension_numbers"]
                terms = math.prod(left[axis] for axis in contracted)
            else:
                terms = math.prod(right) // right[parameters["dimension_numbers"].rhs_spec[0]]
            if not terms:  # a position term without channels
                continue
            found[scope, "multiply_adds"] += times * size * terms
            found[scope, "activations"] += times * size
            continue
        if "kernel" in name or name == "pallas_call":
            raise ValueError(f"{scope} calls {name}, whose products cannot be counted; use attention_impl='xla'")
        inner = list(_inner(parameters["branches"][-1] if name == "cond" else parameters))
        rounds = parameters["length"] if name == "scan" else 1
        for one in inner:
            products = products_of(one, scope, times * rounds)
            if name == "while" and products:
                raise ValueError(f"{scope} has products in a loop without a fixed number of rounds; use a scan")
            found += products
    return found


def _inner(value):
    """Yields the jaxprs in an equation's parameters."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _inner(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _inner(one)


def _part(path):
    """Returns the part of the model that a scope or parameter belongs to."""
    stage = re.search(r"stage(\d+)_", path)
    return stage.group(1) if stage else "stem" if "stem_" in path else "head"


def _attend(q, k, v, rel_rows, rel_cols, *, block_size, halo_size, stride, centered, masked, **rest):
    """Stands in for the operator while it is counted: products of its sizes. All queries meet the same keys here."""
    del rest
    options = dict(block_size=block_size, halo_size=halo_size, stride=stride, centered=centered, masked=masked)
    rows, cols = (axis.keys for axis in geometry.make_axes(k.shape, **options))
    batch, height, width, heads, channels = q.shape
    keys = jnp.zeros((batch, rows * cols, heads, channels), q.dtype)
    values = jnp.zeros((batch, rows * cols, heads, v.shape[-1]), v.dtype)
    logits = jnp.einsum("bhwnd,bknd->bnhwk", q, keys)
    used = q[..., : rel_rows.shape[1]]
    for length in rows, cols:
        position = jnp.einsum("bhwnd,rd->bnhwr", used, jnp.zeros((length, used.shape[-1]), q.dtype))
        logits += position.sum(-1, keepdims=True)
    return jnp.einsum("bnhwk,bkne->bhwne", logits, values)
