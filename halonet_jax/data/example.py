"""What a source and a transform are: the two ends of reading one example."""

from typing import Any, NamedTuple, Protocol

import numpy as np


class Field(NamedTuple):
    """One named array of a batch, without the batch axis.

    Attributes:
        shape: of one row, such as (256, 256, 3).
        dtype: NumPy's name of the element type, such as "uint8".
    """

    shape: tuple[int, ...]
    dtype: str


class Source(Protocol):
    """A data set of random access that can be pickled.

    Attributes:
        class_names: what each label means, in the order of the labels; empty where records have none.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one record: its named fields as they are stored.

        For classification these are `image`, an encoded file (bytes) or uint8 [h, w, 3], and `label`, an int.

        Args:
            index: number of the example, from 0 to `len(self) - 1`.
        """
        ...

    def name(self, index: int) -> str:
        """Returns what to call an example in messages, without reading it: a path, or "imagenet2012/train[17]".

        Args:
            index: number of the example.
        """
        ...


class Transform(Protocol):
    """Turns one record into one row of a batch. It can be pickled and does not use JAX.

    Attributes:
        fields: the arrays of a row by name.
    """

    fields: dict[str, Field]

    def __call__(self, record: dict[str, Any], rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """Returns one array for each of `fields`, of the shape and dtype stated there.

        Args:
            record: what the source returned.
            rng: draws the augmentation; None in evaluation.

        Raises:
            DataError: ends the run. Any other exception, `CorruptImage` included, counts as one corrupt example.
        """
        ...
