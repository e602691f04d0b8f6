"""The picture of a study: scores with the spread of their seeds, and the paper's numbers as hollow marks.

It is drawn on a card of its own, so that it reads on white and on dark pages. Groups differ by shape as well as by colour.
"""

import io
from collections.abc import Sequence
from typing import Any

from halonet_jax.runtime.plots import COLORS, GRID, INK, MUTED, SURFACE
from halonet_jax.studies.spec import Study

_MARKERS = "osD^vPX*"
_AXES = {
    "parameters": ("parameters, millions", 1e6), "multiply_adds": ("multiply-adds of one image, billions", 1e9),
    "images_per_second": ("images per second in training", 1.0),
}  # fmt: skip
_OFFSETS = ((9, 0), (-9, 0), (0, 10), (0, -10), (8, 9), (-8, 9), (8, -9), (-8, -9), (0, 20), (0, -20), (14, 18), (-14, -18))
PAPER, PAPER_ELSEWHERE = "paper", "paper, on ImageNet"


def draw(study: Study, scale: str, lines: Sequence[Any]) -> dict[str, bytes]:
    """Returns the picture as "png" and as "svg".

    Args:
        study: the study.
        scale: at "imagenet", the paper's numbers are in the same panel; else in one of their own.
        lines: of `report.write`.
    """
    import matplotlib  # here, because it takes a second

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in lines if line.row.counts]
    published = any(line.row.published is not None for line in lines)
    apart = published and scale != "imagenet"
    bars = study.plot.kind == "bar"
    height = max(2.2, 0.9 + 0.38 * len(lines)) if bars else 4.6
    options = {"font.family": "DejaVu Sans", "svg.hashsalt": "halonet_jax", "svg.fonttype": "path", "font.size": 10}
    with matplotlib.rc_context(options):
        figure, axes = pyplot.subplots(
            1, 2 if apart else 1, figsize=(10 if apart else 8, height), facecolor=SURFACE, layout="constrained", squeeze=False,
            width_ratios=(5, 3) if apart else (1,), sharey=bars,
        )  # fmt: skip
        panels = list(axes[0])
        figure.suptitle(study.title, color=INK, fontsize=12.5, x=0.02, ha="left", fontweight="bold")
        for panel in panels:
            _style(panel)
        paint = _bars if bars else _scatter
        paint(panels[0], study, lines, ours=True, paper=published and not apart)
        if apart:
            paint(panels[1], study, lines, ours=False, paper=True)
        for panel, title in zip(panels, (f"ours, {scale} scale", PAPER_ELSEWHERE)):
            panel.set_title(title, color=MUTED, fontsize=10, loc="left")
        files = {}
        for extension, extra in (("png", {"metadata": {"Software": None}, "dpi": 130}), ("svg", {"metadata": {"Date": None}})):
            content = io.BytesIO()
            figure.savefig(content, format=extension, facecolor=SURFACE, **extra)
            files[extension] = content.getvalue()
        pyplot.close(figure)
    return files


def _style(panel):
    panel.set_facecolor(SURFACE)
    panel.grid(color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(colors=MUTED, length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)


def _looks(study, lines):
    """Colour and marker of each line, by its group."""
    groups = list(dict.fromkeys(line.row.group for line in lines))
    return [
        (COLORS[groups.index(line.row.group) % len(COLORS)], _MARKERS[groups.index(line.row.group) % len(_MARKERS)])
        for line in lines
    ]


def _name(study):
    return "top-1, %" if study.metric == "top1" else f"{study.metric.replace('_', ' ')}, %"


def _bars(panel, study, lines, ours, paper):
    """One line for each row. Marks, not bars: the axis does not start at zero."""
    for y, (line, (color, marker)) in enumerate(zip(lines, _looks(study, lines))):
        scores = line.scores
        if ours and scores.mean is not None:
            panel.scatter(scores.values, [y] * len(scores.values), s=14, color=color, alpha=0.45, linewidth=0)
            panel.errorbar(scores.mean, y, xerr=scores.spread, fmt=marker, color=color, markersize=8, capsize=4, elinewidth=1.6)
        elif ours:
            panel.text(
                0.5, y, "missing", transform=panel.get_yaxis_transform(), color=MUTED, ha="center", va="center", style="italic"
            )
        if paper and line.row.published is not None:
            panel.plot(
                line.row.published, y, marker, markerfacecolor=SURFACE, markeredgecolor=INK, markersize=8, markeredgewidth=1.5
            )
    panel.set_yticks(range(len(lines)), [line.row.label for line in lines], color=INK)
    panel.set_ylim(len(lines) - 0.5, -0.5)
    panel.set_xlabel(_name(study) + (f"; hollow: {PAPER}" if ours and paper else ""), color=MUTED)
    panel.margins(x=0.08)


def _scatter(panel, study, lines, ours, paper):
    title, unit = _AXES[study.plot.x]
    points, labels = [], []
    for line, (color, marker) in zip(lines, _looks(study, lines)):
        x, scores, published = getattr(line, study.plot.x), line.scores, line.row.published
        if x is None:
            continue
        x, at = x / unit, []
        if ours and scores.mean is not None:
            panel.errorbar(x, scores.mean, yerr=scores.spread, fmt=marker, color=color, markersize=8, capsize=4, elinewidth=1.6)
            points.append((x, scores.mean))
            at.append(scores.mean)
        if paper and published is not None:
            panel.plot(x, published, marker, markerfacecolor="none", markeredgecolor=INK, markersize=9, markeredgewidth=1.5)
            at.append(published)
        if at:
            labels.append((x, at[0], line.row.label))
    if study.plot.log_x:
        panel.set_xscale("log")
        _plain_ticks(panel, [x for x, _, _ in labels])
    if ours and study.plot.front:
        panel.plot(
            *zip(*_front(points, more=study.plot.x == "images_per_second")), color=MUTED, linewidth=1.2, zorder=1
        ) if points else None
    panel.set_xlabel(title, color=MUTED)
    if ours:
        panel.set_ylabel(_name(study) + (f"; hollow: {PAPER}" if paper else ""), color=MUTED)
    panel.margins(0.14)
    if not labels:
        panel.text(0.5, 0.5, "nothing is done yet", transform=panel.transAxes, color=MUTED, ha="center", style="italic")
    _label(panel, labels)


def _front(points, more):
    """The points that no other one beats in both axes, from left to right. `more`: a larger x is better."""
    best, kept = float("-inf"), []
    for x, y in sorted(points, key=lambda point: (-point[0] if more else point[0], -point[1])):
        if y > best:
            best = y
            kept.append((x, y))
    return sorted(kept)


def _plain_ticks(panel, values):
    """Ticks such as 3, 10 and 30 on a logarithmic axis, instead of powers."""
    from matplotlib import ticker

    if values:
        panel.xaxis.set_major_locator(
            ticker.LogLocator(base=10, subs=(1, 2, 3, 5) if max(values) / min(values) < 30 else (1, 3))
        )
        panel.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())


def _label(panel, labels):
    """Writes names beside points, each at the first place where it meets no other name and no point."""
    figure = panel.figure
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    frame = panel.get_window_extent(renderer)
    dots = [panel.transData.transform((x, y)) for x, y, _ in labels]
    taken = []
    for x, y, name in labels:
        best = None
        for dx, dy in _OFFSETS:
            ha = "left" if dx > 0 else "right" if dx < 0 else "center"
            va = "bottom" if dy > 0 else "top" if dy < 0 else "center"
            text = panel.annotate(
                name, (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va, color=INK, fontsize=8.5, annotation_clip=False
            )
            box = text.get_window_extent(renderer)
            meets = sum(box.overlaps(other) for other in taken) + sum(box.padded(3).contains(*dot) for dot in dots)
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            cost = 2 * meets + outside
            if best is None or cost < best[0]:
                if best:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
            if not cost:
                break
        taken.append(best[2])
