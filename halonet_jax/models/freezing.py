"""Which parameters are trained, and how deep each lies. Patterns name parameters by path, such as "backbone/stage1_*"."""

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

# Batch norms of a backbone, and the one between it and a classifier. Those of a detector's pyramid and heads are not among them.
NORMS = ("backbone/*norm*", "final_norm")


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Returns whether a pattern matches a name or a folder above it.

    Args:
        name: such as "backbone/stage1_block1/conv1/kernel".
        patterns: with `*` for any text, slashes included, and `?` for one character.
    """
    return any(fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}/*") for pattern in patterns)


def frozen(params: Any, patterns: Sequence[str]) -> Any:
    """Returns the tree of bools that says which parameters are frozen.

    Args:
        params: a tree of parameters.
        patterns: as of `is_frozen`.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: is_frozen(_name(path), patterns), params)


def unmatched(params: Any, patterns: Sequence[str]) -> list[str]:
    """Returns the patterns that match no parameter.

    Args:
        params: a tree of parameters.
        patterns: as of `is_frozen`.
    """
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return [pattern for pattern in patterns if not any(is_frozen(name, (pattern,)) for name in names)]


def stop_gradients(params: Any, patterns: Sequence[str]) -> Any:
    """Returns the parameters, of which the frozen ones pass no gradient.

    Args:
        params: a tree of parameters.
        patterns: as of `is_frozen`.
    """
    if not patterns:
        return params
    stop = lambda path, x: jax.lax.stop_gradient(x) if is_frozen(_name(path), patterns) else x
    return jax.tree_util.tree_map_with_path(stop, params)


def distances_from_top(params: Any) -> Any:
    """Returns how many layers lie between each parameter and the logits, for layer-wise learning rates.

    What follows the backbone has distance 0, the last block 1, the block before it 2, and the stem has the largest.

    Args:
        params: of a `models.HaloNet`, arrays or their shapes; blocks may be stacked.

    Returns:
        The same tree of float32 arrays that broadcast against the parameters: scalars, and `[blocks, 1, …]` for stacked
        blocks.
    """
    blocks = {}
    for name, entry in params["backbone"].items():
        if match := re.fullmatch(r"stage(\d+)_block(?:s|s?(\d+)(?:to\d+)?)", name):
            stacked = "_blocks" in name
            count = jax.tree.leaves(entry)[0].shape[0] if stacked else 1
            blocks[name] = (int(match[1]), int(match[2] or 2)), count, stacked
    below, total = {}, 0
    for name, (_, count, _) in sorted(blocks.items(), key=lambda item: item[1][0]):
        below[name], total = total, total + count

    def distance(path, leaf):
        names = _name(path).split("/")
        if names[0] != "backbone":
            return np.float32(0)
        if names[1] not in blocks:
            return np.float32(total + 1)
        _, count, stacked = blocks[names[1]]
        first = total - below[names[1]]
        found = np.arange(first, first - count, -1, dtype=np.float32)
        return found.reshape(-1, *(1,) * (len(leaf.shape) - 1)) if stacked else found[0]

    return jax.tree_util.tree_map_with_path(distance, params)


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")
