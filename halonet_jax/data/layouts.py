"""Where digits lie in a scene, and which digit is the answer."""

from typing import NamedTuple

from halonet_jax.data.drawing import Draws

LABELS = ("most", "left", "largest")
_TRIES = 16  # places to try for a digit before the layout is drawn again


class Digit(NamedTuple):
    """A digit in a scene.

    Attributes:
        scan: number of its scan within the split.
        label: its class.
        top: first row, pixels.
        left: first column, pixels.
        height: pixels, with the scan's empty border.
        width: likewise.
    """

    scan: int
    label: int
    top: int
    left: int
    height: int
    width: int


class Layouts:
    """Draws layouts of one kind.

    Args:
        label: one of `LABELS`, see `scenes.DigitScenes`.
        size: side of the canvas, pixels.
        difficulty: 0 to 100.
        of_class: numbers of the scans of each class.
    """

    def __init__(self, label: str, size: int, difficulty: int, of_class: list[list[int]]):
        self._label, self._size, self._difficulty, self._of_class = label, size, difficulty, of_class

    def draw(self, draws: Draws) -> tuple[int, list[Digit]]:
        """Returns the label, uniform over the classes, and the digits in the order of drawing.

        Boxes of two digits overlap by at most one row or column. With "left", the framed digit comes first and the answer
        second. With "largest", the answer comes first.

        Args:
            draws: random numbers.
        """
        winner, digits = draws.below(len(self._of_class)), []
        layout = {"most": self._most, "left": self._left, "largest": self._largest}[self._label]
        while not digits:  # a try that finds no room for a digit is given up
            digits = layout(draws, winner)
        return winner, digits

    def _most(self, draws, winner):
        sizes = self._sizes(draws)
        others = [label for label in range(len(self._of_class)) if label != winner]
        # Three quarters are winners at first, a third in the end; at least two, and as many as the other classes leave.
        copies = max(
            2, (len(sizes) * (75 - 42 * self._difficulty // 100) + 50) // 100, -(-(len(sizes) + len(others)) // (1 + len(others)))
        )
        copies = copies if others else len(sizes)
        labels = [winner] * copies + draws.sample(others * (copies - 1), len(sizes) - copies)
        return self._place(draws, draws.sample(labels, len(labels)), sorted(sizes, reverse=True))

    def _left(self, draws, winner):
        size_of_framed, size_of_answer, *sizes = self._sizes(draws)
        framed = self._digit(draws, draws.below(len(self._of_class)), size_of_framed)
        answer, gap = self._digit(draws, winner, size_of_answer), draws.between(2, 3)
        room = self._size - 2 - framed.width - answer.width - gap
        framed = framed._replace(
            top=draws.between(1, self._size - 1 - framed.height), left=draws.below(room + 1) + answer.width + gap
        )
        top = framed.top + (framed.height - answer.height) // 2 + draws.between(-answer.height // 4, answer.height // 4)
        answer = answer._replace(top=min(max(top, 0), self._size - answer.height), left=framed.left - gap - answer.width)
        labels = [draws.below(len(self._of_class)) for _ in sizes]
        # Others keep off the frame, and off its rows between it and the answer's far side.
        frame = framed._replace(
            top=framed.top - 2, left=answer.left, height=framed.height + 4, width=answer.width + gap + framed.width + 2
        )
        placed = self._place(draws, labels, sorted(sizes, reverse=True), (frame, answer))
        return placed and [framed, *placed[1:]]

    def _largest(self, draws, winner):
        least, most = self._size * 7 // 64, self._size * 28 // 64
        largest = draws.between(least * 5 // 4 + 1, most)
        sizes = [largest] + sorted((draws.between(least, largest * 4 // 5) for _ in range(draws.below(5))), reverse=True)
        labels = [winner] + [draws.below(len(self._of_class)) for _ in sizes[1:]]
        return self._place(draws, labels, sizes)

    def _sizes(self, draws):
        middle = self._size * (20 - 6 * self._difficulty // 100) // 64
        spread = middle * self._difficulty // 300
        return [middle + draws.between(-spread, spread) for _ in range(4 + draws.below(1 + 5 * self._difficulty // 100))]

    def _digit(self, draws, label, size):
        """A digit whose place is not known yet, up to a fifth narrower than high."""
        scan = self._of_class[label][draws.below(len(self._of_class[label]))]
        return Digit(scan, label, 0, 0, size, size - draws.below(1 + size // 5))

    def _place(self, draws, labels, sizes, placed=()):
        """Adds digits one by one where they overlap no other by more than a pixel; [] if there is no room."""
        placed = list(placed)
        for label, size in zip(labels, sizes):
            digit = self._digit(draws, label, size)
            for _ in range(_TRIES):
                top, left = draws.below(self._size - digit.height + 1), draws.below(self._size - digit.width + 1)
                digit = digit._replace(top=top, left=left)
                if not any(_overlap(digit, other) for other in placed):
                    placed.append(digit)
                    break
            else:
                return []
        return placed


def _overlap(a, b):
    return (
        a.top + 1 < b.top + b.height and b.top + 1 < a.top + a.height
        and a.left + 1 < b.left + b.width and b.left + 1 < a.left + a.width
    )  # fmt: skip
