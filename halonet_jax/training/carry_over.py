"""Which arrays of a checkpoint continue as which arrays of a state that has another tree.

An option may change the tree: an EMA is switched on or off, gradients are clipped, another optimizer is chosen. What both
trees have goes on, the rest starts anew.
"""

import collections
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from halonet_jax.training.state import TrainState


def match(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    """Finds, for arrays of the state, the array of the checkpoint that they continue.

    Arrays of equal name, shape and type belong together. In the optimizer's state the name need only be equal apart from
    numbers: those are positions in a chain, which move where gradients are clipped.

    Args:
        saved: shape and dtype by name, of the checkpoint's arrays.
        wanted: the same of the state's arrays.

    Returns:
        Names in the checkpoint by name in the state. Arrays that start anew are left out.
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
    """Builds a state from the arrays that go on and, for the rest, new ones.

    A new EMA starts from the weights that go on. The learning rate goes on at the state's step.

    Args:
        abstract: the state as `ShapeDtypeStruct`s.
        names: the name of each leaf of `abstract`.
        arrays: those that go on, by name; all of `step`, `params` and `model_state` among them.
        create: `() -> TrainState`, a new state with the same tree and shardings.
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
    """In the optimizer's state, the first part of the name that is no position: "trace", "mu", "count"."""
    if not name.startswith("opt_state/"):
        return []
    return [part for part in name.split("/")[1:] if not part.isdigit()][:1]


@jax.jit
def _copy(arrays):
    # Copies: the state is donated to the step, and a buffer can be donated once only.
    return [jnp.copy(array) for array in arrays]
