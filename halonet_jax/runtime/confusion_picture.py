"""Draws confusion matrices: as a matrix where classes are few, otherwise as the pairs that are confused most."""

from collections.abc import Sequence

import numpy as np
from etils import epath

from halonet_jax.runtime import plots

MOST_IN_A_MATRIX = 40  # classes; beyond, names could not be read
_MOST_WITH_NUMBERS = 16
_PAIRS = 30
_LONGEST = 28  # characters of a class name


def draw(confusion: np.ndarray, class_names: Sequence[str], title: str, path: str | epath.Path) -> None:
    """Draws a confusion matrix and writes a PNG.

    Up to `MOST_IN_A_MATRIX` classes: the matrix, each row coloured by its shares, with the counts where they fit. Beyond:
    the pairs that are confused most often, and how many classes have which accuracy.

    Args:
        confusion: int `[label, predicted]`.
        class_names: in the order of the labels.
        title: above the picture.
        path: of the PNG.
    """
    names = [_short(name) for name in class_names]
    (_draw_matrix if len(names) <= MOST_IN_A_MATRIX else _draw_pairs)(np.asarray(confusion), names, title, path)


def most_confused(confusion: np.ndarray, number: int) -> list[tuple[int, int, int]]:
    """Returns (label, predicted, count) of the pairs that are confused most often, the most frequent first.

    Args:
        confusion: int `[label, predicted]`.
        number: of pairs, at most; pairs that never occur are left out.
    """
    wrong = np.array(confusion)
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:number]
    pairs = zip(*np.unravel_index(order, wrong.shape))
    return [(int(i), int(j), int(wrong[i, j])) for i, j in pairs if wrong[i, j]]


def _draw_matrix(confusion, names, title, path):
    n = len(names)
    side = max(4.0, 0.42 * n + 1.5 if n <= _MOST_WITH_NUMBERS else 0.24 * n + 2)
    figure, axes = plots.new_figure(1, 1, figsize=(side + 0.8, side))
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.grid(False)
    size = 9 if n <= 20 else 7
    axes.set_xticks(range(n), names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=size)
    axes.set_yticks(range(n), names, fontsize=size)
    axes.set(title=title, xlabel="predicted", ylabel="label")
    axes.yaxis.label.set_color(plots.MUTED)
    if n <= _MOST_WITH_NUMBERS:
        for (i, j), count in np.ndenumerate(confusion):
            if count:
                color = "white" if shares[i, j] > 0.5 else plots.INK
                axes.text(j, i, f"{count}", ha="center", va="center", color=color, fontsize=8 if count < 1000 else 6)
    plots.save(figure, path)


def _draw_pairs(confusion, names, title, path):
    figure, (left, right) = plots.new_figure(1, 2, figsize=(12, 6.6), width_ratios=(2, 1))
    pairs = most_confused(confusion, _PAIRS)
    places = range(len(pairs), 0, -1)
    left.barh(places, [count for *_, count in pairs], color=plots.COLORS[1], height=0.7)
    left.set_yticks(places, [f"{names[i]} → {names[j]}" for i, j, _ in pairs], fontsize=8)
    left.set(title=f"{title}\nlabel → predicted, the most frequent errors", xlabel="images")
    left.grid(axis="y", visible=False)
    for axes in (left, right):
        axes.set_axisbelow(True)
    count = confusion.sum(1)
    accuracy = confusion.diagonal()[count > 0] / count[count > 0]
    right.hist(accuracy, bins=np.linspace(0, 1, 21), color=plots.COLORS[0], rwidth=0.9)
    right.set(
        title=f"Accuracy of the {len(accuracy):,} classes", xlabel="share of a class's images that are right", xlim=(0, 1)
    )
    right.set_ylabel("classes", color=plots.MUTED)
    plots.save(figure, path)


def _short(name):
    name = name.replace("$", r"\$")  # matplotlib would read mathematics
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
