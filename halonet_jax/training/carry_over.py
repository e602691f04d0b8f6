"""Continues from a checkpoint whose state has another tree.

Some options change the tree: an EMA is switched on or off, gradients are clipped, another optimizer is chosen. Arrays that
both trees have continue. The others get new values.
"""

import collections
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from halonet_jax.training.state import TrainState


def match(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    """Finds the array of the checkpoint that each array of the state continues.

    Arrays of equal name, shape and type belong together. In the optimizer's state, numbers in the name are ignored: they are
    positions in a chain, and clipping moves them.

    Args:
        saved: shape and dtype of the checkpoint's arrays, by name.
        wanted: shape and dtype of the state's arrays, by name.

    Returns:
        Names in the checkpoint, by name in the state. Arrays that the checkpoint lacks are left out.
    """
    kind = lambda array: (tuple(array.shape), jnp.dtype(array.dtype))
    found = {name: name for name in wanted if name in saved and kind(saved[name]) == kind(wanted[name])}
    ours, theirs = _by_role(wanted, found), _by_role(saved, found)
    for role, names in ours.items():
        others = theirs.get(role, [])
        if [kind(wanted[name]) for name in names] == [kind(saved[name]) for name in others]:
            found.update(zip(names, others))
    return found


def complete(abstract: TrainState, names: list[str], arrays: Mapping[str, jax.Array], create: Any) -> TrainState:
    """Builds a state from the arrays of a checkpoint, and new arrays for the rest.

    A new EMA starts from the checkpoint's weights. The schedule continues at the checkpoint's step.

    Args:
        abstract: the state as `ShapeDtypeStruct`s.
        names: the name of each leaf of `abstract`.
        arrays: of the checkpoint, by name. They include all of `step`, `params` and `model_state`.
        create: `() -> TrainState`, returns a new state with the same tree and shardings.
    """
    leaves = dict(arrays)
    averages = [name for name in names if name not in leaves and name.startswith("ema_")]
    leaves |= zip(averages, _copy([leaves[name.removeprefix("ema_")] for name in averages]))
    if set(names) - set(leaves):
        leaves = dict(zip(names, jax.tree.leaves(create()))) | leaves
    state = jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in names])
    is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)
    at_step = lambda node: node._replace(count=_copy([state.step])[0]) if is_schedule(node) else node
    return state.replace(opt_state=jax.tree.map(at_step, state.opt_state, is_leaf=is_schedule))


def summarize(names: list[str]) -> str:
    """Returns a short list of the parts that arrays belong to, such as "ema_params (12 arrays), opt_state/count".

    Args:
        names: of arrays.
    """
    parts = collections.Counter("/".join(name.split("/", 1)[:1] + _fields(name)) for name in names)
    return ", ".join(part if number == 1 else f"{part} ({number} arrays)" for part, number in parts.items())


def _by_role(arrays, matched):
    roles = collections.defaultdict(list)
    for name in arrays:
        if name.startswith("opt_state/") and name not in matched:
            roles["/".join(part for part in name.split("/") if not part.isdigit())].append(name)
    return roles


def _fields(name):
    """Returns the first part of a name in the optimizer's state that is not a position: "trace", "mu", "count"."""
    if not name.startswith("opt_state/"):
        return []
    return [part for part in name.split("/")[1:] if not part.isdigit()][:1]


@jax.jit
def _copy(arrays):
    # Copies, because the state is donated to the step and a buffer can be donated only once.
    return [jnp.copy(array) for array in arrays]
