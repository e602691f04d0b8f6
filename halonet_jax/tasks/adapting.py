"""Makes the variables of one HaloNet fit another: other classes, blocks or image sizes, stacked or not (paper, section 4)."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from halonet_jax import models
from halonet_jax.models import transfer


def adapt(
    variables: Mapping[str, Any], source: models.HaloNet, target: models.HaloNet, old_classes: Sequence[str],
    new_classes: Sequence[str], image_size: int,
) -> tuple[dict[str, Any], list[tuple[str, str]]]:  # fmt: skip
    """Makes variables of `source` fit `target`.

    Classes that both have keep their weights in the classifier; new ones start at zero. Tables of positions are
    interpolated: relative ones where block or halo size differ, absolute ones where the images do. All else must be the
    same in both.

    Args:
        variables: `{"params": …, "batch_stats": …}` of `source`.
        source: the model that they are of.
        target: the model that they shall fit.
        old_classes: class names of `source`, by label.
        new_classes: class names of `target`, by label.
        image_size: side of the images of `target`, in pixels.

    Returns:
        Variables of `target`, and what was done, as rows of two texts for the terminal.

    Raises:
        ValueError: an array of `target` is not in `variables`, or has another shape there; the message names it.
    """
    rows, found = [], dict(variables)
    if source.backbone.scan:
        found = transfer.unstack_blocks(found, source.backbone.stages)
    unrolled = target.clone(backbone=target.backbone.clone(scan=False, parent=None), parent=None)
    wanted = jax.eval_shape(lambda: unrolled.init(jax.random.key(0), jnp.zeros((1, image_size, image_size, 3)), train=False))
    _check_blocks(found["params"]["backbone"], wanted["params"]["backbone"])
    _check_same(found, wanted, free=("attention/rel_", "attention/abs_", "params/classifier/"))
    relative = transfer.resize_relative_tables(found, target.backbone.stages)
    absolute = transfer.resize_absolute_tables(relative, target.backbone, image_size, image_size)
    interpolated = 0
    for kind, old, new, why in (
        ("relative", found, relative, "block and halo sizes"), ("absolute", relative, absolute, "image size"),
    ):  # fmt: skip
        count = sum(a.shape != b.shape for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new)))
        interpolated += count
        if count:
            rows.append((f"{count} {kind} tables", f"interpolated to the new {why}"))
    found = _with_classes(absolute, old_classes, new_classes, rows)
    _check_same(found, wanted)
    rows.insert(0, (f"{len(jax.tree.leaves(found)) - interpolated - 2} arrays", "taken as they are"))
    return (transfer.stack_blocks(found, target.backbone.stages) if target.backbone.scan else found), rows


def _with_classes(variables, old_classes, new_classes, rows):
    if list(old_classes) == list(new_classes):
        rows.append(("classifier", f"kept; the {len(new_classes)} classes are the same"))
        return variables
    places = {name: place for place, name in enumerate(old_classes)}
    kept = [(new, places[name]) for new, name in enumerate(new_classes) if name in places]
    result = transfer.replace_classifier(variables, len(new_classes))
    if kept:
        new, old = (jnp.array(indices) for indices in zip(*kept))
        before, after = variables["params"]["classifier"], result["params"]["classifier"]
        result["params"]["classifier"] = jax.tree.map(lambda a, b: a.at[..., new].set(b[..., old]), after, before)
    rows.append(("classifier", f"{len(kept)} of {len(new_classes)} classes kept by name, the others start at zero"))
    return result


def _check_blocks(ours, theirs):
    lacking, extra = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
    if lacking or extra:
        name = (lacking or extra)[0]
        raise ValueError(
            f"backbone/{name} is {'absent from' if lacking else 'only in'} the weights to start from ({len(lacking) + len(extra)} "
            "blocks differ); choose the model that they were trained with, by --config.model.name and the other keys of model"
        )


def _check_same(found, wanted, free=()):
    """Refuses other names of arrays, or other shapes. Arrays with a part of `free` in the name may have any shape."""

    def named(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        shape = lambda name, leaf: "there" if any(part in name for part in free) else tuple(leaf.shape)
        return {name: shape(name, leaf) for name, (_, leaf) in zip(names, leaves)}

    ours, theirs = named(found), named(wanted)
    wrong = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{name} is {ours.get(name, 'absent')} in the weights to start from and {theirs.get(name, 'absent')} by the config "
            f"({len(wrong)} arrays differ); choose the model that they were trained with, by the keys of config.model"
        )
