"""Pictures of runs and of the operator."""

import os

from etils import epath

from halonet_jax.training import reporting

SURFACE, INK, MUTED, GRID = "#fcfcfb", "#1f1f1e", "#6b6a66", "#e4e3df"
COLORS = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#4a3aa7", "#e34948")


def learning_curve(workdirs: list[str | epath.Path], path: str | epath.Path) -> None:
    """Draws training loss and evaluation top-1 over steps, one colour a run, and writes a PNG.

    Top-1 is of the raw weights (thin) and, where there is one, of the EMA (bold).
    """
    figure, (loss_axes, top1_axes) = _figure(1, 2, figsize=(10, 4))
    for color, workdir in zip(COLORS * len(workdirs), workdirs):
        reports, name = reporting.read_metrics(workdir), epath.Path(workdir).name
        _line(loss_axes, reports, "train/loss", color=color, linewidth=1.2, label=name)
        _line(top1_axes, reports, "eval/top1", color=color, linewidth=1, alpha=0.6, label=f"{name}, raw weights")
        _line(top1_axes, reports, "eval_ema/top1", color=color, linewidth=2, label=f"{name}, EMA")
    loss_axes.set(title="Training loss", xlabel="step")
    top1_axes.set(title="Top-1 accuracy, evaluation split", xlabel="step")
    lines = [y for line in top1_axes.get_lines() for y in line.get_ydata()]
    if lines:  # Late differences are what is looked for.
        top1_axes.set_ylim(max(0, sorted(lines)[len(lines) // 4] - 0.05), 1.005)
        top1_axes.legend(frameon=False, loc="lower right", labelcolor=INK)
    if len(workdirs) > 1:
        loss_axes.legend(frameon=False, labelcolor=INK)
    _save(figure, path)


def _line(axes, reports, key, **style):
    points = [(report["step"], report[key]) for report in reports if report.get(key) is not None]
    if points:
        # One point alone would draw nothing as a line.
        axes.plot(*zip(*points), marker="o" if len(points) == 1 else None, **style)


def _figure(rows, columns, **options):
    import matplotlib  # Here, since it takes a second that training need not wait for.

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


def _save(figure, path):
    from matplotlib import pyplot

    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
