"""The kinds of value that a knob may hold: whole numbers, sizes, real numbers, text, choices, switches and tuples of these.

Each rule has `type`, the Python type that the config stores; `text`, the rule in words; `has_type(value)`; and
`allows(value)`, which also checks the range. Rules for numbers reject NaN, infinities and bools.
"""

import numbers
from typing import NamedTuple


class Whole(NamedTuple):
    """A whole number from `least` to `most`, both included."""

    least: int
    most: int = 2**31 - 1
    type = int

    @property
    def text(self) -> str:
        """The rule in words, for error messages."""
        return f"a whole number between {self.least} and {self.most}"

    def has_type(self, value) -> bool:
        """Returns whether `value` is a whole number and not a bool."""
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)

    def allows(self, value) -> bool:
        """Returns whether `value` is a whole number within the range."""
        return self.has_type(value) and self.least <= value <= self.most


class Size(NamedTuple):
    """The size of an image: a whole number from `least` to `most`, its side, or a tuple (height, width) of two."""

    least: int
    most: int
    type = object

    @property
    def text(self) -> str:
        """The rule in words, for error messages."""
        return f"a whole number between {self.least} and {self.most}, or a tuple (height, width) of two"

    def has_type(self, value) -> bool:
        """Returns whether `value` is a whole number, or a tuple of two."""
        sides = value if isinstance(value, tuple) and len(value) == 2 else (value,)
        return all(isinstance(side, numbers.Integral) and not isinstance(side, bool) for side in sides)

    def allows(self, value) -> bool:
        """Returns whether `value` is a size within the range."""
        return self.has_type(value) and all(
            self.least <= side <= self.most for side in (value if isinstance(value, tuple) else (value,))
        )


class Real(NamedTuple):
    """A finite number from `least` to `most`, both included."""

    least: float
    most: float
    type = float

    @property
    def text(self) -> str:
        """The rule in words, for error messages."""
        return f"a number between {self.least:.15g} and {self.most:.15g}"

    def has_type(self, value) -> bool:
        """Returns whether `value` is a real number and not a bool."""
        return isinstance(value, numbers.Real) and not isinstance(value, bool)

    def allows(self, value) -> bool:
        """Returns whether `value` is a finite number within the range."""
        return self.has_type(value) and self.least <= value <= self.most  # False for NaN


class Switch(NamedTuple):
    """True or False."""

    type = bool
    text = "True or False"

    def has_type(self, value) -> bool:
        """Returns whether `value` is a bool."""
        return isinstance(value, bool)

    def allows(self, value) -> bool:
        """Returns whether `value` is a bool."""
        return self.has_type(value)


class Text(NamedTuple):
    """A string without null characters, which no file system accepts. `may_be_empty` allows ""."""

    may_be_empty: bool = False
    type = str

    @property
    def text(self) -> str:
        """The rule in words, for error messages."""
        return "a string" if self.may_be_empty else "a string that is not empty"

    def has_type(self, value) -> bool:
        """Returns whether `value` is a string."""
        return isinstance(value, str)

    def allows(self, value) -> bool:
        """Returns whether `value` is a string that the rule accepts."""
        return self.has_type(value) and "\0" not in value and (self.may_be_empty or bool(value))


class Choice(NamedTuple):
    """One of `names`."""

    names: tuple[str, ...]
    type = str

    @property
    def text(self) -> str:
        """The rule in words, for error messages."""
        return f"one of {', '.join(self.names)}"

    def has_type(self, value) -> bool:
        """Returns whether `value` is a string."""
        return isinstance(value, str)

    def allows(self, value) -> bool:
        """Returns whether `value` is one of `names`."""
        return self.has_type(value) and value in self.names


class Tuple(NamedTuple):
    """A tuple of `least` to `most` elements that obey `item`. With `rising`, no element is less than the previous."""

    item: Whole | Real | Text | Choice
    least: int
    most: int
    rising: bool = False
    type = tuple

    @property
    def text(self) -> str:
        """The rule in words, for error messages."""
        count = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        order = ", in rising order" if self.rising else ""
        return f"a tuple of {count} elements{order}, each {self.item.text}"

    def has_type(self, value) -> bool:
        """Returns whether `value` is a tuple whose elements have the type of `item`."""
        return isinstance(value, tuple) and all(map(self.item.has_type, value))

    def allows(self, value) -> bool:
        """Returns whether the tuple `value` has an allowed length, allowed elements and, with `rising`, the order."""
        return (
            self.has_type(value)
            and self.least <= len(value) <= self.most
            and all(map(self.item.allows, value))
            and (not self.rising or all(a <= b for a, b in zip(value, value[1:])))
        )


class EmptyOr(NamedTuple):
    """The empty tuple, or what `other` allows."""

    other: Tuple
    type = tuple

    @property
    def text(self) -> str:
        """The rule in words, for error messages."""
        return f"empty, or {self.other.text}"

    def has_type(self, value) -> bool:
        """Returns whether `value` is a tuple whose elements have the right type."""
        return self.other.has_type(value)

    def allows(self, value) -> bool:
        """Returns whether `value` is () or allowed by `other`."""
        return value == () or self.other.allows(value)


Rule = Whole | Size | Real | Switch | Text | Choice | Tuple | EmptyOr
