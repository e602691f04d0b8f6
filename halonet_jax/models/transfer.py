"""Surgery on a model's variables: stacked and unstacked blocks, another classifier, other tables of positions.

Each function takes variables, `{"params": …, "batch_stats": …}` or a part of these, and returns new ones; what it does
not name stays as it is. Any tree of the same structure works too, such as an exponential moving average under "params".
JAX can trace all of them: `jax.eval_shape` gives the result's shapes from abstract variables.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from halonet_jax.models import blocks, checks
from halonet_jax.models.blocks import BlockSpec
from halonet_jax.models.halonet import Backbone


def stack_blocks(variables: Mapping, stages: Sequence[Sequence[BlockSpec]]) -> dict:
    """Converts variables of an unrolled model to those of the same model with `scan=True`.

    `unstack_blocks` is the inverse.

    Args:
        variables: of `models.create(..., scan=False)`.
        stages: the model's blocks, `model.backbone.stages`. They say which neighbours are equal.

    Returns:
        Variables of `models.create(..., scan=True)`.

    Raises:
        ValueError: `variables` are not of an unrolled model with these blocks.
    """

    def convert(backbone):
        entries, others = _split(backbone, _runs(stages, scan=False))
        for run in _runs(stages, scan=True):
            members = [entries[name] for name in run.block_names]
            others[run.name] = _stack(members, run) if run.stacked else members[0]
        return others

    return _convert_backbone(variables, convert)


def unstack_blocks(variables: Mapping, stages: Sequence[Sequence[BlockSpec]]) -> dict:
    """Converts variables of a model with `scan=True` to those of the same model unrolled.

    `stack_blocks` is the inverse.

    Args:
        variables: of `models.create(..., scan=True)`.
        stages: the model's blocks, `model.backbone.stages`.

    Returns:
        Variables of `models.create(..., scan=False)`.

    Raises:
        ValueError: `variables` are not of a model with `scan=True` and these blocks.
    """

    def convert(backbone):
        entries, others = _split(backbone, _runs(stages, scan=True))
        for run in _runs(stages, scan=True):
            entry = entries[run.name]
            if not run.stacked:
                others[run.name] = entry
                continue
            if any(leaf.shape[:1] != (len(run.specs),) for leaf in jax.tree.leaves(entry)):
                raise ValueError(f"{run.name} does not stack {len(run.specs)} blocks; {_REMEDY}")
            for position, name in enumerate(run.block_names):
                others[name] = jax.tree.map(lambda leaf, at=position: leaf[at], entry)
        return others

    return _convert_backbone(variables, convert)


def replace_classifier(variables: Mapping, num_classes: int) -> dict:
    """Replaces the classifier by one of zeros, as fine-tuning starts (arXiv 2103.12731, section 4).

    Args:
        variables: of a `models.HaloNet`.
        num_classes: width of the new classifier.

    Returns:
        Variables of the same model with `num_classes` classes.

    Raises:
        ValueError: `num_classes` is no whole number of at least 1, or "params" has no classifier.
    """
    checks.whole("num_classes", num_classes, 1)
    params = variables.get("params", {})
    if "classifier" not in params:
        raise ValueError('the variables have no "classifier" under "params"; give the variables of a models.HaloNet')
    zeros = jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape[:-1], num_classes), leaf.dtype), params["classifier"])
    return {**variables, "params": {**params, "classifier": zeros}}


def resize_relative_tables(variables: Mapping, stages: Sequence[Sequence[BlockSpec]]) -> dict:
    """Resizes the relative tables for another block or halo size by linear interpolation.

    Fine-tuning at a higher resolution starts so (arXiv 2103.12731, section 4).

    Args:
        variables: of a model with or without `scan=True`.
        stages: the new model's blocks, `model.backbone.stages`. They may differ from the old model's in `block_size`
            and `halo_size` alone.

    Returns:
        Variables of the new model. Tables that have the right size already are unchanged.

    Raises:
        ValueError: the blocks of `variables` are not those of `stages`.
    """

    def rows(run):
        spec = run.specs[0]
        return (2 * spec.block_size + 2 * spec.halo_size - 1,) * 2 if spec.positions == "relative" else None

    return _resize_tables(variables, stages, rows)


def resize_absolute_tables(variables: Mapping, backbone: Backbone, height: int, width: int) -> dict:
    """Resizes the tables of absolute positions for images of another size by linear interpolation.

    Args:
        variables: of a model with or without `scan=True`.
        backbone: the model's, `model.backbone`.
        height: rows of the new images, in pixels.
        width: columns of the new images, in pixels.

    Returns:
        Variables of the model for these images. Tables that have the right size already are unchanged.

    Raises:
        ValueError: the blocks of `variables` are not those of `backbone.stages`.
    """
    maps = {layer[:2]: (layer.height, layer.width) for layer in backbone.attention_layers(height, width)}

    def rows(run):
        return maps[run.stage, run.first] if run.specs[0].positions == "absolute" else None

    return _resize_tables(variables, backbone.stages, rows)


def resize_table(table: jax.Array, rows: int) -> jax.Array:
    """Resizes a table of positions by linear interpolation between its rows. First, middle and last row stay such.

    Args:
        table: `[..., 2b + 2h - 1, D]`, for block size b and halo size h; of absolute positions, with a row for each row or
            column of the map.
        rows: `2b' + 2h' - 1`, for the new sizes; of absolute positions, rows or columns of the new map.

    Returns:
        `[..., rows, D]`; `table` itself where it has as many rows.
    """
    old = table.shape[-2]
    if rows == old:
        return table
    # Around the middle, which is offset 0 in both: the linspace of a single row would be the first.
    position = (np.arange(rows) - (rows - 1) / 2) * ((old - 1) / max(rows - 1, 1)) + (old - 1) / 2
    below = np.clip(np.floor(position).astype(int), 0, old - 1)
    share = (position - below).astype(np.float32)[:, None]
    above = table[..., np.minimum(below + 1, old - 1), :]
    return (table[..., below, :] * (1 - share) + above * share).astype(table.dtype)


_TABLES = {"relative": ("rel_rows", "rel_cols"), "absolute": ("abs_rows", "abs_cols"), "none": ()}
_REMEDY = "give model.backbone.stages of the model that the variables are of"


def _resize_tables(variables, stages, rows):
    """Gives the tables of each run of blocks, of rows and of columns, the numbers of rows that `rows(run)` says, if any."""

    def convert(backbone):
        runs = {scan: _runs(stages, scan) for scan in (True, False)}
        scan = {run.name for run in runs[True]} == {name for name in backbone if name.startswith("stage")}
        entries, others = _split(backbone, runs[scan])
        for run in runs[scan]:
            entry, spec = entries[run.name], run.specs[0]
            if ("attention" in entry) != (spec.kind == "attention"):
                raise ValueError(f"{run.name} is no block of kind={spec.kind!r}, as stages has it; {_REMEDY}")
            if spec.kind == "attention":
                entry = {**entry, "attention": _resized(entry["attention"], run, rows(run))}
            others[run.name] = entry
        return others

    params = _convert_backbone({"params": variables.get("params", {})}, convert)
    return {**variables, **params}


def _resized(attention, run, rows):
    names = _TABLES[run.specs[0].positions]
    if {name for tables in _TABLES.values() for name in tables if name in attention} != set(names):
        raise ValueError(f"{run.name} has no positions={run.specs[0].positions!r}, as stages has it; {_REMEDY}")
    return {**attention, **{name: resize_table(attention[name], n) for name, n in zip(names, rows or ())}}


def _runs(stages, scan):
    found = enumerate(blocks.as_stages(stages), start=1)
    return [run for number, stage in found for run in blocks.runs(number, stage, scan)]


def _split(backbone, runs):
    """The entries of `runs`, and those of the stem."""
    names = {run.name for run in runs}
    present = {name for name in backbone if name.startswith("stage")}
    if names != present:
        lacking, extra = (", ".join(sorted(some)) or "nothing" for some in (names - present, present - names))
        raise ValueError(f"the backbone lacks {lacking}, and has {extra} which stages does not have; {_REMEDY}")
    return {name: backbone[name] for name in names}, {name: x for name, x in backbone.items() if name not in names}


def _stack(members, run):
    try:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    except (TypeError, ValueError):  # arrays of unequal shapes; trees of unequal structure
        raise ValueError(
            f"the arrays of {', '.join(run.block_names)} differ in number or shape, but stages has equal blocks there; "
            f"{_REMEDY}"
        ) from None


def _convert_backbone(variables: Mapping, convert: Callable[[Mapping], dict]) -> dict:
    if not any("backbone" in tree for tree in variables.values()):
        raise ValueError('the variables have no "backbone" in any collection; give the variables of a models.HaloNet')
    return {
        collection: {**tree, "backbone": convert(tree["backbone"])} if "backbone" in tree else tree
        for collection, tree in variables.items()
    }
