"""Draws pictures of runs and of the operator."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from halonet_jax.runtime import reporting

SURFACE, INK, MUTED, GRID = "#fcfcfb", "#1f1f1e", "#6b6a66", "#e4e3df"
_TITLES = {"top1": "Top-1 accuracy", "box_ap": "Box AP"}
COLORS = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#4a3aa7", "#e34948")


def learning_curve(workdirs: list[str | epath.Path], path: str | epath.Path, metric: str = "top1") -> None:
    """Draws training loss and evaluation metric over steps, one colour for each run, and writes a PNG.

    The metric is of the raw weights (thin) and, where there is one, of their moving average (bold).

    Args:
        workdirs: folders of runs.
        path: of the picture.
        metric: the task's primary one, as reports name it after "eval/".
    """
    figure, (loss_axes, metric_axes) = new_figure(1, 2, figsize=(10, 4))
    for color, workdir in zip(COLORS * len(workdirs), workdirs):
        reports, name = reporting.read_metrics(workdir), epath.Path(workdir).name
        _line(loss_axes, reports, "train/loss", color=color, linewidth=1.2, label=name)
        _line(metric_axes, reports, f"eval/{metric}", color=color, linewidth=1, alpha=0.6, label=f"{name}, raw weights")
        _line(metric_axes, reports, f"eval_ema/{metric}", color=color, linewidth=2, label=f"{name}, EMA")
    loss_axes.set(title="Training loss", xlabel="step")
    metric_axes.set(title=f"{_TITLES.get(metric, metric.replace('_', ' ').capitalize())}, evaluation split", xlabel="step")
    values = sorted(y for line in metric_axes.get_lines() for y in line.get_ydata())
    if values:
        if values[0] >= 0 and values[-1] <= 1:  # a share: late differences are what is looked for
            metric_axes.set_ylim(max(0, values[len(values) // 4] - 0.05), 1.005)
        metric_axes.legend(frameon=False, loc="best", labelcolor=INK)
    if len(workdirs) > 1:
        loss_axes.legend(frameon=False, labelcolor=INK)
    save(figure, path)


def halo_attention_diagram(path: str | epath.Path, block_size: int = 4, halo_size: int = 2, blocks: int = 4) -> None:
    """Draws how halo attention cuts a map, and writes a PNG.

    The panels show the blocks, the neighbourhood of a block, and the queries that stride 2 keeps.

    Args:
        path: of the PNG.
        block_size: side of a block (b), in pixels.
        halo_size: border around the block (h), in pixels.
        blocks: number of blocks along a side of the map.
    """
    figure, axes = new_figure(1, 3, figsize=(13, 4.7))
    b, h, size = block_size, halo_size, block_size * blocks
    query, key = COLORS[0], COLORS[1]
    titles = (
        f"1. The map is cut into blocks of b = {b} pixels\nOne block's queries share their keys",
        f"2. Keys and values: the block and a halo of h = {h}\nEvery query sees all (b + 2h)² = {(b + 2 * h) ** 2} of them",
        f"3. Stride 2 keeps every second query, the same keys\nA quarter of the work: {(b // 2) ** 2} queries instead of {b * b}",
    )
    for panel, (a, title) in enumerate(zip(axes, titles)):
        a.set_title(title, fontsize=10.5, color=INK, linespacing=1.5)
        a.set(aspect="equal", xticks=[], yticks=[])
        a.grid(False)
        first = b if panel == 0 else h  # first pixel of the query block
        extent = size if panel == 0 else b + 2 * h
        for y in range(extent):
            for x in range(extent):
                in_block = first <= y < first + b and first <= x < first + b
                in_halo = first - h <= y < first + b + h and first - h <= x < first + b + h
                face = query if in_block else key if in_halo else "#efeeea"
                a.add_patch(_pixel(x, y, face, alpha=0.85 if in_block else 0.45 if in_halo else 1))
                if panel == 2 and in_block and (x - first) % 2 == 0 and (y - first) % 2 == 0:
                    a.plot(x + 0.5, y + 0.5, "o", color="white", markersize=9)
        a.set(xlim=(-0.3, extent + 0.3), ylim=(extent + 0.3, -1.1))
    for edge in range(0, size + 1, b):
        axes[0].plot((edge, edge), (0, size), color=INK, linewidth=1.2)
        axes[0].plot((0, size), (edge, edge), color=INK, linewidth=1.2)
    middle = axes[1]
    pixel, radius = (h + 1.5, h + 1.5), b + 2 * h
    for target in ((0.5, 0.5), (radius - 0.5, 0.5), (0.5, radius - 0.5), (radius - 0.5, radius - 0.5), (h + 2.5, h + 2.5)):
        middle.annotate("", target, pixel, arrowprops={"arrowstyle": "->", "color": INK, "lw": 1.3})
    middle.plot(*pixel, "o", color="white", markersize=9)
    for start, stop, label in ((0, h, "h"), (h, h + b, "b"), (h + b, radius, "h")):
        middle.annotate("", (start, -0.35), (stop, -0.35), arrowprops={"arrowstyle": "<->", "color": MUTED, "lw": 1.2})
        middle.text((start + stop) / 2, -0.5, label, ha="center", va="bottom", color=MUTED, fontsize=11)
    handles = [_pixel(0, 0, query, alpha=0.85), _pixel(0, 0, key, alpha=0.45)]
    figure.legend(
        handles, ["queries", "halo: keys and values only"], loc="outside lower center", ncols=2, frameon=False, labelcolor=INK
    )
    save(figure, path)


class AttentionPanel(NamedTuple):
    """What one query attends to, for `attention`. Boxes are (top, left, bottom, right) as shares of the image's sides.

    Attributes:
        title: above the panel.
        weights: float `[rows, columns]`, over the window.
        query: box of the query's pixel.
        block: box of its block.
        window: box of the block and its halo, which `weights` divide evenly. It may reach beyond the image.
    """

    title: str
    weights: Any
    query: tuple[float, float, float, float]
    block: tuple[float, float, float, float]
    window: tuple[float, float, float, float]


def attention(image: Any, rows: Sequence[Sequence[AttentionPanel | None]], title: str, path: str | epath.Path) -> None:
    """Draws what queries attend to over an image, and writes a PNG.

    The first column shows the image with the query of its row. In a panel, the brightest pixel has the greatest weight, the
    solid line is the block, the dashed line is the block with its halo, and the small square is the query.

    Args:
        image: uint8 `[H, W, 3]`.
        rows: panels by row, equally many in each; None leaves a panel out.
        title: above the image.
        path: of the PNG.
    """
    height, width = image.shape[:2]
    columns, names = 1 + max(map(len, rows)), ("query", "block", "block and halo: where its keys are", "attended to most")
    ratio = min(max(height / width, 0.5), 2)
    figure, axes = new_figure(len(rows), columns, figsize=(2.6 * columns, (2.6 * ratio + 0.3) * len(rows) + 0.4), squeeze=False)
    shown = None
    for (first, *others), panels in zip(axes, rows):
        query = next(panel.query for panel in panels if panel)
        if query == shown:  # one more head of the same query
            first.set_axis_off()
        else:
            _show(first, image, title if shown is None else "")
            y, x = (query[0] + query[2]) / 2 * height, (query[1] + query[3]) / 2 * width
            for color, size in (("black", 13), ("white", 9)):
                first.plot(x, y, "+", color=color, markersize=size, markeredgewidth=size / 4)
            shown = query
        for a, panel in zip(others, panels):
            if panel is None:
                a.set_axis_off()
                continue
            _show(a, image, panel.title)
            _shade(a, panel, height, width)
    figure.legend(
        _samples(), names, loc="outside lower center", ncols=4, frameon=False, labelcolor=INK, fontsize=9, handlelength=1.8,
        handleheight=1.2,
    )  # fmt: skip
    save(figure, path)


def scenes(rows: Sequence[tuple[str, Sequence[dict[str, Any]]]], path: str | epath.Path) -> None:
    """Draws examples, with boxes and masks where there are any, and writes a PNG.

    Args:
        rows: a title and equally many examples for each row. An example has `image`, uint8 `[H, W, 3]`, and `label`; and
            `boxes`, `[n, 4]` as (top, left, bottom, right) in pixels, `masks`, bool `[n, H, W]`, and `classes`, `[n]`, if
            they shall be drawn.
        path: of the PNG.
    """
    columns = len(rows[0][1])
    figure, axes = new_figure(len(rows), columns, figsize=(1.5 * columns, 1.75 * len(rows)), squeeze=False)
    for row, (title, examples) in zip(axes, rows):
        row[0].set_ylabel(title, color=INK, fontsize=10)
        for a, example in zip(row, examples):
            image = example["image"].copy()
            for number, mask in enumerate(example.get("masks", ())):
                color = [int(COLORS[number % len(COLORS)][at : at + 2], 16) for at in (1, 3, 5)]
                image[mask] = image[mask] // 3 + (2 * np.array(color) // 3).astype(np.uint8)
            _show(a, image, "" if "boxes" in example else str(example["label"]))
            for number, (box, label) in enumerate(zip(example.get("boxes", ()), example.get("classes", ()))):
                color = COLORS[number % len(COLORS)]
                a.add_patch(_rectangle(box, fill=False, edgecolor=color, linewidth=1.2))
                a.text(box[1], box[0], str(label), color="white", fontsize=7, va="bottom", bbox={"color": color, "pad": 0.6})
    save(figure, path)


# The outlines of a panel: query, block, window. Each is drawn over a darker, wider one, to be seen on any image.
_OUTLINES = (
    {"edgecolor": "#5ff0ff", "linewidth": 1.4},
    {"edgecolor": "white", "linewidth": 1.4},
    {"edgecolor": "white", "linewidth": 1.2, "linestyle": (0, (3, 2))},
)


def _show(axes, image, title):
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0), interpolation="nearest" if max(height, width) < 200 else "antialiased")
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axes.grid(False)
    axes.set_title(title, fontsize=10, color=INK)


def _shade(axes, panel, height, width):
    from matplotlib import colormaps

    sides, (top, left, bottom, right) = (height, width) * 2, panel.window
    axes.add_patch(_rectangle((0, 0, height, width), facecolor="black", alpha=0.55, linewidth=0, zorder=1))
    share = panel.weights / max(panel.weights.max(), 1e-12)
    shade = colormaps["inferno"](share)
    shade[..., 3] = 0.25 + 0.6 * share  # the image shows through, most where little is attended to
    extent = (left * width, right * width, bottom * height, top * height)
    axes.imshow(shade, extent=extent, interpolation="nearest", zorder=2)
    axes.set(xlim=(0, width), ylim=(height, 0))
    inset = 0.008 * max(height, width)  # a line on the image's edge would be cut in half
    for order, (box, style) in enumerate(reversed(list(zip((panel.query, panel.block, panel.window), _OUTLINES)))):
        box = [min(max(edge * side, inset), side - inset) for edge, side in zip(box, sides)]
        axes.add_patch(_rectangle(box, fill=False, edgecolor="black", linewidth=style["linewidth"] + 1.4, zorder=3 + order))
        axes.add_patch(_rectangle(box, fill=False, zorder=3 + order, **style))


def _samples():
    outlines = [_rectangle((0, 0, 1, 1), facecolor="#55534e", **style) for style in _OUTLINES]
    return [*outlines, _rectangle((0, 0, 1, 1), facecolor="#e2e38f", linewidth=0)]


def _rectangle(box, **style):
    from matplotlib.patches import Rectangle

    top, left, bottom, right = box
    return Rectangle((left, top), right - left, bottom - top, **style)


def _pixel(x, y, face, alpha):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, facecolor=face, edgecolor=SURFACE, linewidth=1, alpha=alpha)


def _line(axes, reports, key, **style):
    points = [(report["step"], report[key]) for report in reports if report.get(key) is not None]
    if points:
        # A line of one point would be invisible.
        axes.plot(*zip(*points), marker="o" if len(points) == 1 else None, **style)


def new_figure(rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    """Returns a matplotlib figure in this project's style, and its axes.

    Args:
        rows: of axes.
        columns: likewise.
        **options: further arguments of `pyplot.subplots`.
    """
    import matplotlib  # Imported here, because it takes a second, and training does not need it.

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, facecolor=SURFACE, layout="constrained", **options)
    for a in figure.axes:
        a.set_facecolor(SURFACE)
        a.grid(color=GRID, linewidth=0.8)
        a.tick_params(colors=MUTED, length=0)
        a.title.set_color(INK)
        a.xaxis.label.set_color(MUTED)
        for spine in a.spines.values():
            spine.set_visible(False)
    return figure, axes


def save(figure: Any, path: str | epath.Path) -> None:
    """Writes a figure as PNG and closes it.

    Args:
        figure: from `new_figure`.
        path: of the PNG.
    """
    from matplotlib import pyplot

    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
