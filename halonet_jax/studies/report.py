"""The report of a study: Markdown, CSV and a picture, at any moment, from the workdirs alone.

The same results give the same files, byte for byte. What depends on time and machine has a section, and a file, of its own.
"""

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

from halonet_jax.errors import ConfigError
from halonet_jax.studies import pictures, resolving, results
from halonet_jax.studies.plan import Plan, Run
from halonet_jax.studies.spec import Row

TIMES = "## Runs and machines"  # what follows may differ for the same results
_NOTE = (
    "A difference counts where Welch's 95 % t interval over the seeds leaves out zero. It covers the choice of the seed only, "
    "not that of the evaluation images."
)
DASH = "–"


class Line(NamedTuple):
    """One row of the report.

    Attributes:
        row: of the study.
        scores: by seed, in percent.
        planned: number of seeds.
        parameters: of the model; None: not counted.
        multiply_adds: of one image; None: not counted.
        images_per_second: in training, median of the seeds; None: not measured.
        comparison: with the baseline; None: there is none.
        fault: why the row cannot run.
        speed: of `speed.json`.
        paper: `parameters`, `multiply_adds` and `images_per_second` of what the paper's number is of, as far as known.
    """

    row: Row
    scores: results.Scores
    planned: int
    parameters: int | None
    multiply_adds: int | None
    images_per_second: float | None
    comparison: results.Comparison | None
    fault: str
    speed: dict
    paper: dict


def write(plan: Plan, picture: bool = True) -> list[Line]:
    """Writes `report.md`, `report.csv`, `runs.csv`, `report.png` and `report.svg`.

    Args:
        plan: the study.
        picture: False leaves the pictures as they are.

    Returns:
        The lines of the report.

    Raises:
        OSError: a file cannot be written.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    results.harvest(plan.runs)
    found = {run: results.result(run) for run in plan.runs}
    lines = _lines(plan, found)
    results.write(plan.out / "report.csv", _csv(_HEAD, [_record(plan, line) for line in lines]))
    results.write(plan.out / "runs.csv", _csv(_RUN_HEAD, [_run_record(run, found[run]) for run in plan.runs if found[run]]))
    results.write(plan.out / "report.md", _markdown(plan, lines, found))
    if picture:
        for extension, content in pictures.draw(plan.study, plan.scale, lines).items():
            results.write(plan.out / f"report.{extension}", content)
    return lines


def _lines(plan, found):
    study = plan.study
    scores, rates = {}, {}
    for row in study.rows:
        done = [found[run] for run in plan.of(row) if found[run]]
        values = [results.score(each, study.metric) for each in done]
        scores[row.label] = results.Scores(tuple(value for value in values if value is not None))
        known = sorted(each["images_per_second"] for each in done if each["images_per_second"])
        rates[row.label] = known[len(known) // 2] if known else None
    lines, base = [], study.base
    for row in study.rows:
        runs = plan.of(row)
        costs = results.costs(runs[0].config, plan.out / "costs.json") if runs else {}
        compared = base and row.counts and row.label != base.label
        lines.append(
            Line(
                row,
                scores[row.label],
                len(study.seeds),
                costs.get("parameters"),
                costs.get("multiply_adds"),
                rates[row.label],
                results.compare(scores[row.label], scores[base.label]) if compared else None,
                plan.broken.get(row.label, ""),
                results.read(plan.out / "runs" / row.slug / "speed.json") or {},
                _of_paper(plan, row),
            )  # fmt: skip
        )
    return lines


def _of_paper(plan, row):
    """The paper's model is that of scale imagenet. Its speed is relative, to whatever the paper compares with."""
    if row.published is None or plan.study.plot.kind != "scatter":
        return {}
    speed = row.published_speed
    found = {"images_per_second": speed if isinstance(speed, (int, float)) else None}
    try:
        config, _ = resolving.resolve(plan.study, row, "imagenet")
    except ConfigError:
        return found
    return found | results.costs(config, plan.out / "costs.json")


# --- CSV

_HEAD = (
    "label", "seeds_done", "seeds_planned", "score_percent", "standard_deviation", "scores", "parameters", "multiply_adds",
    "paper_percent", "paper_source", "difference_to_paper", "difference_to_baseline", "interval_low", "interval_high", "counts",
)  # fmt: skip
_RUN_HEAD = ("label", "seed", "images_per_second", "seconds", "device", "devices", "cores", "revision", "versions", "finished")


def _csv(head, records):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([["" if value is None else value for value in record] for record in records])
    return text.getvalue()


def _record(plan, line):
    scores, compared = line.scores, line.comparison
    mean, published = scores.mean, line.row.published
    to_paper = mean - published if plan.scale == "imagenet" and None not in (mean, published) else None
    return [
        line.row.label, len(scores.values), line.planned, _round(mean), _round(scores.spread),
        " ".join(f"{value:.4f}" for value in scores.values), line.parameters, line.multiply_adds, published, line.row.source,
        _round(to_paper), *([None] * 3 if compared is None else map(_round, compared)), line.row.counts,
    ]  # fmt: skip


def _round(value):
    return None if value is None else round(value, 4)


def _run_record(run: Run, found: dict):
    about = found["run"]
    versions = " ".join(f"{name}={version}" for name, version in sorted(about.get("versions", {}).items()))
    devices = about.get("devices") or [DASH]
    return [
        run.row.label, run.seed, found["images_per_second"], found["seconds"], devices[0], len(devices), about.get("cores"),
        about.get("git_revision"), versions, found["finished"],
    ]  # fmt: skip


# --- Markdown


def _markdown(plan, lines, found):
    study, paper = plan.study, any(line.row.published is not None for line in lines)
    at_scale = plan.scale == "imagenet"
    parts = [f"# {study.title}", study.question, f"The paper: {study.finding}" if study.finding else ""]
    done = sum(map(bool, found.values()))
    total = len(study.rows) * len(study.seeds)
    parts.append(
        f"Scale: {plan.scale}. {done} of {total} runs are done{'.' if done == total else '; the others are missing below.'}"
    )
    name = "top-1" if study.metric == "top1" else study.metric.replace("_", " ")
    head = ["row", "seeds", f"{name}, %", "parameters", "multiply-adds"]
    head += ["paper, %", "ours − paper"] if paper and at_scale else ["paper, ImageNet, %"] if paper else []
    table = [_cells(line, paper, at_scale) for line in lines if line.row.counts]
    parts += ["## Results", _table(head, table), "± is the standard deviation over the seeds."]
    sources = [f"- {line.row.label}: {line.row.source}" for line in lines if line.row.published is not None and line.row.source]
    parts += ["Where the paper states its numbers:", "\n".join(sources)] if sources else []
    if others := [line for line in lines if not line.row.counts]:
        parts += ["Run before, and not compared:", _table(head, [_cells(line, paper, at_scale) for line in others])]
    if study.base and (compared := [line for line in lines if line.comparison]):
        parts += [f"## Compared with {study.base.label}", _table(_COMPARED, [_compared(line) for line in compared]), _NOTE]
    parts.append(f"![{study.title}](report.png)")
    if faults := _faults(plan, lines, found):
        parts += ["## What is missing", "\n".join(faults)]
    parts += [TIMES, f"`{plan.command}`", *_times(plan, lines, found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _cells(line, paper, at_scale):
    scores, row = line.scores, line.row
    seeds = f"{len(scores.values)} of {line.planned}"
    if scores.mean is None:
        shown = "missing"
    else:
        shown = f"{scores.mean:.2f}" + ("" if scores.spread is None else f" ± {scores.spread:.2f}")
    cells = [row.label, seeds, shown, _short(line.parameters), _short(line.multiply_adds)]
    if paper:
        cells.append(DASH if row.published is None else f"{row.published:g}")
    if paper and at_scale:
        cells.append(DASH if None in (row.published, scores.mean) else f"{scores.mean - row.published:+.2f}")
    return cells


_COMPARED = ("row", "difference, points", "95 % interval", "beyond the seeds' spread")


def _compared(line):
    c = line.comparison
    interval = DASH if c.low is None else f"{c.low:+.2f} to {c.high:+.2f}"
    return [line.row.label, f"{c.difference:+.2f}", interval, c.verdict]


def _faults(plan, lines, found):
    text = [f"- {line.row.label}: cannot run: {line.fault}" for line in lines if line.fault]
    for run in plan.runs:
        failed = results.failure(run)
        if found[run] is None:
            text.append(f"- {run.name}: " + (f"failed: {failed.get('reason')}" if failed else "not done"))
        elif results.score(found[run], plan.study.metric) is None:
            known = sorted(key.partition("/")[2] for key in found[run]["metrics"] if key.startswith("eval/"))
            text.append(f"- {run.name}: done, but its evaluation has no {plan.study.metric!r}; set metric to one of {known}")
    return text


def _times(plan, lines, found):
    speed, paper = any(line.speed for line in lines), any(line.row.published_speed is not None for line in lines)
    head = ["row", "images/s in training"]
    head += ["inference, ms/image", "training step, ms/image", "measured on", "batch"] if speed else []
    head += ["paper's speed"] if paper else []
    table = []
    for line in lines:
        published = line.row.published_speed
        more = [DASH if published is None else str(published)] if paper else []
        table.append([line.row.label, _rate(line.images_per_second), *(_speed_cells(line.speed) if speed else []), *more])
    parts = [_table(head, table)]
    runs = [_run_record(run, found[run]) for run in plan.runs if found[run]]
    if runs:
        shown = [
            [label, str(seed), _rate(rate), f"{count} × {device}", str(cores or DASH), str(commit or DASH), finished]
            for label, seed, rate, _, device, count, cores, commit, _, finished in runs
        ]
        parts.append(_table(["row", "seed", "images/s", "devices", "cores", "commit", "finished"], shown))
        parts.append("Versions: " + "; ".join(sorted({record[8] for record in runs})))
    return parts


def _speed_cells(speed):
    milliseconds = lambda key: DASH if speed.get(key) is None else f"{1e3 * speed[key]:.3g}"
    about = [str(speed.get(key, DASH)) for key in ("device", "batch_size")]
    return [milliseconds("inference_seconds_per_image"), milliseconds("train_seconds_per_image"), *about]


def _short(value):
    if value is None:
        return DASH
    unit, letter = next(((unit, letter) for unit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if value >= unit), (1, ""))
    return f"{value / unit:.3g}{letter}"


def _rate(value):
    return DASH if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["---"] + ["--:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |" for cells in (head, align, *rows))
