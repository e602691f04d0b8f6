"""Checks of the arguments of models. Each raises a ValueError that states value, rule and remedy in one line."""

import difflib
import math
import numbers
from collections.abc import Iterable

POSITIONS = ("relative", "absolute", "none")


def whole(name: str, value, least: int, example=None) -> None:
    """Checks that a value is a whole number.

    Args:
        name: what the message calls the value, such as "block_size".
        value: anything.
        least: the smallest number allowed.
        example: a value that is allowed, for the message; None: the message gives no example.

    Raises:
        ValueError: `value` is no integer (a bool is none), or less than `least`.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{_for_example(name, example)}")


def real(name: str, value, least: float, most: float = math.inf, example=None) -> None:
    """Checks that a value is a finite number in a range.

    Args:
        name: what the message calls the value.
        value: anything.
        least: the smallest number allowed.
        most: the greatest number allowed.
        example: a value that is allowed, for the message; None: the message gives no example.

    Raises:
        ValueError: `value` is no number (a bool is none), not finite or out of range.
    """
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not least <= value <= most or value == math.inf:
        range_ = f"of at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise ValueError(f"{name}={value!r} must be a finite number {range_}{_for_example(name, example)}")


def choice(name: str, value, known: Iterable[str]) -> None:
    """Checks that a value is one of some names.

    Args:
        name: what the message calls the value.
        value: anything.
        known: the names allowed.

    Raises:
        ValueError: `value` is none of them. The message proposes the nearest ones.
    """
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={value!r} is unknown; {nearest(value, known)}")


def entries(name: str, value, least: int, most: int, example) -> None:
    """Checks that a value is a tuple or a list of a certain length.

    Args:
        name: what the message calls the value.
        value: anything.
        least: the smallest number of entries allowed.
        most: the greatest number of entries allowed.
        example: a value that is allowed, for the message.

    Raises:
        ValueError: `value` is neither a tuple nor a list (a string is none), or has another number of entries.
    """
    if not isinstance(value, (tuple, list)) or not least <= len(value) <= most:
        count = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(f"{name}={value!r} must be a tuple of {count} entries{_for_example(name, example)}")


def heads(num_heads: int, channels: int, value_channels: int) -> None:
    """Checks that heads divide the widths of their attention layer.

    Args:
        num_heads: number of heads.
        channels: width of queries and keys over all heads. Each head needs an even number of them: one half meets the
            table of rows, the other half the table of columns.
        value_channels: width of values over all heads.

    Raises:
        ValueError: `num_heads` is no whole number of at least 1, or does not divide the widths so.
    """
    whole("num_heads", num_heads, 1)
    if channels % (2 * num_heads):
        raise ValueError(
            f"num_heads={num_heads} must divide {channels} channels of queries into even parts; use a width that is a "
            f"multiple of {2 * num_heads}, or another num_heads"
        )
    if value_channels % num_heads:
        raise ValueError(
            f"num_heads={num_heads} must divide {value_channels} channels of values; use a width of values that is a multiple "
            f"of {num_heads}, or another num_heads"
        )


def positions(value, full_tables: bool, adjacent_queries: bool) -> None:
    """Checks the position term of an attention layer.

    Args:
        value: one of `POSITIONS`.
        full_tables: as of `HaloAttention`.
        adjacent_queries: as of `HaloAttention`.

    Raises:
        ValueError: `value` is unknown, or the layer has no relative tables that the options could be about.
    """
    choice("positions", value, POSITIONS)
    for name, given in (("full_tables", full_tables), ("adjacent_queries", adjacent_queries)):
        if given and value != "relative":
            raise ValueError(f"{name}=True is about relative tables, and positions={value!r} has none; leave {name} out")


def nearest(value, known: Iterable[str]) -> str:
    """Returns a remedy for an unknown name: the known names most like it, or all of them.

    Args:
        value: the unknown name, or anything else.
        known: the known names.
    """
    close = difflib.get_close_matches(value, known, n=3) if isinstance(value, str) else ()
    return f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(known)}"


def _for_example(name, example):
    return "" if example is None else f"; for example {name.partition('[')[0]}={example!r}"
