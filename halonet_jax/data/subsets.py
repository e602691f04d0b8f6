"""Parts of a data set: some of its classes, and slices of its splits such as "train[:10%]".

TFDS slices its own splits. These functions are for the other sources.
"""

import difflib
import re
from collections.abc import Callable, Sequence

import numpy as np

from halonet_jax.errors import DataError

_SLICE = re.compile(r"(?P<name>[^\[\]]+)\[(?P<begin>-?\d+%?)?:(?P<end>-?\d+%?)?\]")
_SEED = 0


def keep_classes(names: Sequence[str], classes: Sequence[str], what: str) -> tuple[str, ...]:
    """Returns the classes to keep, in the order of the data set: their place is their label.

    Args:
        names: all classes of the data set, in the order of their labels.
        classes: those to keep, in any order; empty: all.
        what: the data set, for messages.

    Raises:
        DataError: one of `classes` is not among `names`.
    """
    for name in classes:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            some = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
            hint = f"did you mean {close[0]!r}?" if close else f"its classes are {some}"
            raise DataError(f"data.classes has {name!r}, which is no class of {what}; {hint}")
    return tuple(name for name in names if name in classes or not classes)


def split_name(split: str) -> str:
    """Returns the name of the split that a slice is of: "train" for "train[:10%]".

    Args:
        split: a name or a slice. Other text is returned as it is.
    """
    match = _SLICE.fullmatch(split)
    return match["name"] if match else split


def slice_rows(labels: np.ndarray, split: str, setting: str) -> np.ndarray:
    """Returns the numbers of the examples of a slice, rising. Any slice has the classes in the proportions of the whole.

    The slice is of a fixed order: each class is shuffled, then the classes are interleaved evenly. So "train[:90%]" and
    "train[90%:]" share no example, and "train[:50]" of five classes of about one size has ten of each.

    Args:
        labels: int [n], of the whole split.
        split: as TFDS writes it: "train", "train[:100]", "train[10%:50%]", "train[-20:]". A share is rounded to the nearest
            number of examples.
        setting: names the setting that holds `split`, for messages.

    Raises:
        DataError: the slice is empty or goes beyond the examples that there are.
    """
    if not _SLICE.fullmatch(split):
        return np.arange(len(labels))
    begin, end = bounds(len(labels), split, setting)
    rng, rank = np.random.default_rng(_SEED), np.empty(len(labels))
    for label in np.unique(labels):
        (rows,) = np.nonzero(labels == label)
        rank[rng.permutation(rows)] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.sort(np.argsort(rank, kind="stable")[begin:end])


def bounds(count: int, split: str, setting: str) -> tuple[int, int]:
    """Returns where a slice begins, and where it ends, among the examples of its split.

    Args:
        count: number of examples in the whole split.
        split: a name, which is the whole split, or a slice as of `slice_rows`.
        setting: names the setting that holds `split`, for messages.

    Raises:
        DataError: the slice is empty or goes beyond the examples that there are.
    """
    match = _SLICE.fullmatch(split)
    if not match:
        return 0, count
    begin, end = (_place(match[key], count, default) for key, default in (("begin", 0), ("end", count)))
    if not 0 <= begin < end <= count:
        raise DataError(
            f"{split!r} asks for examples {begin} to {end} of {count}; set {setting} to a part of them, such as"
            f" '{match['name']}[:50%]'"
        )
    return begin, end


def _place(text, count, default):
    if text is None:
        return default
    number = round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)
    return number + count if text.startswith("-") else number


def flag_of(flag: Callable[[str], str], role: str) -> str:
    """Returns the flag of a split's setting, or the key where the entry has no flag for it.

    Args:
        flag: spells the command-line flag of a config key.
        role: "train_split" or "eval_split".
    """
    return flag(f"data.{role}") or f"data.{role}"
