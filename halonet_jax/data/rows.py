"""Every row of every batch, as a function of its position alone.

The law: row r of the global batch at step s has position g = s * batch_size + r. Epoch e = g // n is a permutation of
the n examples, drawn from (seed, e); the example at g is that of place g % n, and its augmentation is drawn from
(seed, e, example). Process p of P holds the p-th run of rows. So neither the step a run starts from, nor threads,
worker processes or the number of processes change a batch, and epochs follow one another without a remainder.
"""

import sys
from typing import Any, NamedTuple

import grain
import numpy as np

from halonet_jax.data.example import Source, Transform
from halonet_jax.errors import CorruptImage, DataError

_REPLACEMENT_TRIES = 16
_SHUFFLE_ROUNDS = 4  # of the permutation's Feistel network; Grain's own choice


class Row(NamedTuple):
    """One example on its way into a batch. Faults travel with it, so that they reach the caller at their batch.

    Attributes:
        fields: the arrays that the transform returned, or zeros.
        mask: False for a row of zeros.
        corrupt: name and reason of each example that failed for this row.
        fatal: a message that ends the run, or "".
    """

    fields: dict[str, np.ndarray]
    mask: bool = True
    corrupt: tuple[tuple[str, str], ...] = ()
    fatal: str = ""


class Examples:
    """This process's rows as a random-access sequence, batch after batch.

    Args:
        source: the examples.
        transform: makes a row of a record.
        batch_size: global number of rows in a batch.
        process_index: number of this process.
        process_count: number of processes that share a batch.
        num_streams: worker processes that build batches in turn, at least 1.
        stop_advice: what to do about a corrupt example, where one ends the run. None: corrupt examples are skipped.

    Attributes:
        num_batches: how many there are. None: endless.
        local_size: rows of a batch in this process.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        batch_size: int,
        process_index: int,
        process_count: int,
        num_streams: int,
        stop_advice: str | None,
    ):
        self.source, self.transform = source, transform
        self.batch_size = batch_size
        self.local_size = batch_size // process_count
        self.first_row = process_index * self.local_size
        self.num_streams = num_streams
        self.stop_advice = stop_advice
        self.num_batches: int | None = None

    def __len__(self) -> int:
        if self.num_batches is None:
            return sys.maxsize
        # As many batches for every worker; the loader leaves the surplus unread.
        return -(-self.num_batches // self.num_streams) * self.num_streams * self.local_size

    def __getitem__(self, place: int) -> Row:
        # Grain deals places to W worker processes in turn. Each must build whole batches, so places are numbered in
        # such a way that worker w's own sequence runs through batches w, w + W, ...
        nth, worker = divmod(place, self.num_streams)
        step = nth // self.local_size * self.num_streams + worker
        return self.row(step * self.batch_size + self.first_row + nth % self.local_size)

    def row(self, position: int) -> Row:
        """Returns the row at a global position.

        Args:
            position: step * batch_size + row of the batch.
        """
        raise NotImplementedError

    def read(self, index: int, rng: np.random.Generator | None) -> Row:
        """Returns example `index`; where that fails, a row of zeros with `corrupt` or `fatal`.

        Args:
            index: number of the example.
            rng: draws the augmentation; None in evaluation.
        """
        try:
            return Row(self._checked(self.transform(self.source[index], rng)))
        except (CorruptImage, OSError) as error:
            reason = str(error)
        except DataError as error:
            return self.blank(fatal=f"{self._name(index)}: {error}")
        except (Exception, SystemExit) as error:  # one bad example, whatever a decoder makes of it, must not end a run
            reason = " ".join(f"{type(error).__name__}: {error}".split())
        name = self._name(index)
        if self.stop_advice is None:
            return self.blank(corrupt=((name, reason),))
        return self.blank(fatal=f"corrupt image {name}: {reason}; {self.stop_advice}")

    def blank(self, **faults: Any) -> Row:
        """Returns a row of zeros.

        Args:
            **faults: `corrupt` or `fatal` of the row.
        """
        zeros = {name: np.zeros(field.shape, field.dtype) for name, field in self.transform.fields.items()}
        return Row(zeros, False, **faults)

    def _checked(self, fields):
        """Only what the transform announces, so that rows can be stacked."""
        arrays = {}
        for name, field in self.transform.fields.items():
            array = arrays[name] = np.asarray(fields[name])
            if array.shape != field.shape or array.dtype != field.dtype:
                given = f"{array.dtype}{list(array.shape)}"
                raise CorruptImage(f"{name!r} is {given} instead of {field.dtype}{list(field.shape)}")
        return arrays

    def _name(self, index):
        try:
            return self.source.name(index)
        except Exception:  # a damaged source must not hide which example failed
            return f"example {index}"


class TrainExamples(Examples):
    """Shuffled and augmented, epoch after epoch.

    Args:
        *args: those of `Examples`.
        seed: of the order and the augmentation.
        start_step: step of the first batch.
    """

    def __init__(self, *args, seed: int, start_step: int):
        super().__init__(*args)
        self.seed = seed
        self.first_position = start_step * self.batch_size

    def row(self, position: int) -> Row:
        """Returns the row at `position` after `start_step`; the next examples replace a corrupt one."""
        n = len(self.source)
        epoch, place = divmod(self.first_position + position, n)
        shuffle_seed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
        index = grain.experimental.index_shuffle(place, n - 1, shuffle_seed, _SHUFFLE_ROUNDS)
        corrupt = ()
        for candidate in range(index, index + _REPLACEMENT_TRIES):
            row = self.read(candidate % n, np.random.default_rng((self.seed, epoch, candidate % n)))
            corrupt += row.corrupt
            if row.mask or row.fatal:
                return row._replace(corrupt=corrupt)
        name, reason = corrupt[0]
        return self.blank(
            fatal=f"{len(corrupt)} images in a row from {name} on are corrupt (the first: {reason}); check the data set"
        )


class EvalExamples(Examples):
    """In the source's order, then rows of zeros to the end of the last batch.

    Args:
        *args: those of `Examples`.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.num_batches = -(-len(self.source) // self.batch_size)

    def row(self, position: int) -> Row:
        """Returns the example at `position`, or zeros past the end and in place of a corrupt one."""
        return self.read(position, None) if position < len(self.source) else self.blank()
