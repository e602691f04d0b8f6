"""Makes the variables of one HaloNet fit another: other classes, blocks or image sizes, stacked or not (paper, section 4)."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from halonet_jax import data, models
from halonet_jax.models import transfer


def adapt(
    variables: Mapping[str, Any], source: models.HaloNet, target: models.HaloNet, old_classes: Sequence[str],
    new_classes: Sequence[str], image_size: int | tuple[int, int],
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
        image_size: side of the images of `target`, or (height, width), in pixels.

    Returns:
        Variables of `target`, and what was done, as rows of two texts for the terminal.

    Raises:
        ValueError: an array of `target` is not in `variables`, or has another shape there; the message names it.
    """
    found, rows, interpolated = _fit_backbone(variables, source.backbone, target.backbone, image_size)
    found = {name: {**tree, **found[name]} for name, tree in variables.items()}
    found = _with_classes(found, old_classes, new_classes, rows)
    _check_same(found, _shapes(target, image_size))
    rows.insert(0, (f"{len(jax.tree.leaves(found)) - interpolated - 2} arrays", "taken as they are"))
    return found, rows


def adapt_backbone(
    variables: Mapping[str, Any], source: models.Backbone, target: models.Backbone, image_size: int | tuple[int, int]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Makes the backbone of one model fit that of another, and leaves the rest out.

    Args:
        variables: as of `adapt`.
        source: the backbone in them.
        target: the backbone that they shall fit.
        image_size: as of `adapt`.

    Returns:
        `{"params": {"backbone": …}, …}` of `target`, and what was done, as of `adapt`.

    Raises:
        ValueError: as `adapt`.
    """
    found, rows, interpolated = _fit_backbone(variables, source, target, image_size)
    taken = len(jax.tree.leaves(found)) - interpolated
    return found, [(f"{taken} arrays of the backbone", "taken as they are"), *rows]


def _fit_backbone(variables, source, target, image_size):
    """The backbone's variables, rows on interpolated tables, and how many these are."""
    rows, found = [], {name: {"backbone": tree["backbone"]} for name, tree in variables.items()}
    if source.scan:
        found = transfer.unstack_blocks(found, source.stages)
    shapes = _shapes(target.clone(scan=False, parent=None), image_size)
    wanted = {name: {"backbone": tree} for name, tree in shapes.items()}
    _check_blocks(found["params"]["backbone"], wanted["params"]["backbone"])
    _check_same(found, wanted, free=("attention/rel_", "attention/abs_"))
    relative = transfer.resize_relative_tables(found, target.stages)
    absolute = transfer.resize_absolute_tables(relative, target, *data.height_and_width(image_size))
    interpolated = 0
    for kind, old, new, why in (
        ("relative", found, relative, "block and halo sizes"), ("absolute", relative, absolute, "image size"),
    ):  # fmt: skip
        count = sum(a.shape != b.shape for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new)))
        interpolated += count
        if count:
            rows.append((f"{count} {kind} tables", f"interpolated to the new {why}"))
    _check_same(absolute, wanted)
    return (transfer.stack_blocks(absolute, target.stages) if target.scan else absolute), rows, interpolated


def _shapes(module, image_size):
    images = jnp.zeros((1, *data.height_and_width(image_size), 3))
    return jax.eval_shape(lambda: module.init(jax.random.key(0), images, train=False))


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
