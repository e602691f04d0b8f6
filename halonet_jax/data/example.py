"""What a source is, and what it holds."""

from typing import NamedTuple, Protocol

import numpy as np


class Example(NamedTuple):
    """One labelled image as it is stored."""

    image: bytes | np.ndarray  # an encoded file, or uint8 [h, w, 3]
    label: int
    name: str  # file path, or "imagenet2012/train[17]"


class Source(Protocol):
    """A picklable sequence of examples; reading one may raise OSError or CorruptImage."""

    num_classes: int
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def name(self, index: int) -> str:
        """The name of example `index`, without reading it."""
        ...
