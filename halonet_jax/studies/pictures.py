"""The picture of a study: scores with the spread of their seeds, and the paper's numbers as hollow marks.

It is drawn on a card of its own, so that it reads on white and on dark pages. Groups differ by shape as well as by colour.
"""

import functools
import io
import itertools
from collections.abc import Sequence
from typing import Any

from halonet_jax.runtime.plots import COLORS, GRID, INK, MUTED, SURFACE
from halonet_jax.studies.spec import Study

_MARKERS = "osD^vPX*"
_AXES = {
    "parameters": "parameters", "multiply_adds": "multiply-adds of one image", "images_per_second": "images per second in training",
}  # fmt: skip
_UNITS = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1.0, ""))
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
        finish = [paint(panels[0], study, lines, ours=True, paper=published and not apart)]
        if apart:
            finish.append(paint(panels[1], study, lines, ours=False, paper=True))
        for panel, title in zip(panels, (f"ours, {scale} scale", PAPER_ELSEWHERE)):
            panel.set_title(title, color=MUTED, fontsize=10, loc="left")
        _legend(panels[0], lines)
        figure.draw_without_rendering()  # fixes the layout, by which names find a free place
        figure.set_layout_engine("none")
        for label in filter(None, finish):
            label()
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
    panel.tick_params(which="both", colors=MUTED, length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)


def _looks(lines):
    """Colour and marker of each line, by its group."""
    groups = list(dict.fromkeys(line.row.group for line in lines))
    return [
        (COLORS[groups.index(line.row.group) % len(COLORS)], _MARKERS[groups.index(line.row.group) % len(_MARKERS)])
        for line in lines
    ]


def _legend(panel, lines):
    """Names the groups, where there are several."""
    groups = {line.row.group: look for line, look in zip(lines, _looks(lines))}
    if len(groups) > 1:
        for group, (color, marker) in groups.items():
            panel.plot([], [], marker, color=color, markersize=8, label=group or "others")
        panel.legend(frameon=False, labelcolor=INK, loc="lower right", fontsize=9)


def _name(study):
    return "top-1, %" if study.metric == "top1" else f"{study.metric.replace('_', ' ')}, %"


def _bars(panel, study, lines, ours, paper):
    """One line for each row. Marks, not bars: the axis does not start at zero."""
    for y, (line, (color, marker)) in enumerate(zip(lines, _looks(lines))):
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
    values = [getattr(line, study.plot.x) if ours else line.paper.get(study.plot.x) for line in lines]
    unit, word = next((u for u in _UNITS if u[0] <= max(filter(None, values), default=1.0)), _UNITS[-1])
    points, labels, obstacles = [], [], []
    for line, value, (color, marker) in zip(lines, values, _looks(lines)):
        scores, published, at = line.scores, line.row.published, []
        if value is None:
            continue
        x = value / unit
        if ours and scores.mean is not None:
            panel.errorbar(x, scores.mean, yerr=scores.spread, fmt=marker, color=color, markersize=8, capsize=4, elinewidth=1.6)
            points.append((x, scores.mean))
            at.append(scores.mean)
            spread = scores.spread or 0.0
            obstacles += [(x, scores.mean + spread * step / 5) for step in range(-5, 6)]
        if paper and published is not None:
            panel.plot(x, published, marker, markerfacecolor="none", markeredgecolor=INK, markersize=9, markeredgewidth=1.5)
            at.append(published)
        obstacles += [(x, y) for y in at]
        labels += [(x, at[0], line.row.label)] if at else []
    if study.plot.log_x:
        panel.set_xscale("log")
        _plain_ticks(panel, [x for x, _, _ in labels])
    if points and study.plot.front:
        front = _front(points, more=study.plot.x == "images_per_second")
        panel.plot(*zip(*front), color=MUTED, linewidth=1.2, zorder=1)
        for (x0, y0), (x1, y1) in itertools.pairwise(front):
            obstacles += [(x0 + (x1 - x0) * step / 20, y0 + (y1 - y0) * step / 20) for step in range(21)]
    axis = "relative time, as published" if study.plot.x == "images_per_second" and not ours else _AXES[study.plot.x]
    panel.set_xlabel(f"{axis}{', ' if word else ''}{word}", color=MUTED)
    if ours:
        panel.set_ylabel(_name(study) + (f"; hollow: {PAPER}" if paper else ""), color=MUTED)
    panel.margins(0.14)
    if not labels:
        text = "nothing is done yet" if ours else "no figures for this axis"
        panel.text(0.5, 0.5, text, transform=panel.transAxes, color=MUTED, ha="center", style="italic")
        panel.set(xticks=[], yticks=[])
    return functools.partial(_label, panel, labels, obstacles)


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


def _label(panel, labels, obstacles):
    """Writes names beside points, each at the place where it meets the fewest names, marks and lines."""
    renderer = panel.figure.canvas.get_renderer()
    frame = panel.get_window_extent(renderer)
    dots = panel.transData.transform(obstacles) if obstacles else []
    taken = []
    for x, y, name in labels:
        tried = []
        for dx, dy in _OFFSETS:
            ha = "left" if dx > 0 else "right" if dx < 0 else "center"
            va = "bottom" if dy > 0 else "top" if dy < 0 else "center"
            text = panel.annotate(name, (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va, color=INK, fontsize=8.5)
            box = text.get_window_extent(renderer).padded(1)
            meets = 5 * sum(box.overlaps(other) for other in taken) + sum(box.contains(*dot) for dot in dots)
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            tried.append((meets + 5 * outside, text, box))
            if not tried[-1][0]:
                break
        best = min(tried, key=lambda each: each[0])
        for _, text, _ in tried:
            if text is not best[1]:
                text.remove()
        best[1].set_in_layout(False)
        taken.append(best[2])
