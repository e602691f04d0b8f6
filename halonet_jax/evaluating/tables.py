"""The table of a suite, as text and as Markdown."""

from typing import Any

from halonet_jax.evaluating.imagenet import ALEXNET_ERRORS, SEVERITIES

_CORRUPTED = "imagenet2012_corrupted/"
_HEADING = "Not evaluated:"
_ALL = len(ALEXNET_ERRORS) * len(SEVERITIES)


def text(result: dict[str, Any]) -> str:
    """Returns the table for the terminal, with what is missing and the commands that prepare it.

    Args:
        result: of `suite.run`.
    """
    blocks = [_columns(rows) if isinstance(rows, list) else rows for rows in _blocks(result)]
    lines = [f"  {line}" for name, commands in _missing(result["missing"]) for line in (name, *(f"  {x}" for x in commands))]
    return "\n" + "\n\n".join([f"suite {_about(result)}", *blocks, *(["\n".join([_HEADING, *lines])] if lines else [])])


def markdown(result: dict[str, Any]) -> str:
    """Returns the table as Markdown.

    Args:
        result: of `suite.run`.
    """
    blocks = [_markdown_rows(rows) if isinstance(rows, list) else rows for rows in _blocks(result)]
    lines = [line for name, commands in _missing(result["missing"]) for line in (f"# {name}", *commands)]
    if lines:
        blocks += [_HEADING, "\n".join(["```bash", *lines, "```"])]
    return "\n\n".join([f"# Suite {_about(result)}", *blocks]) + "\n"


def _about(result):
    export = f", format {result['format']}" if "format" in result else ""
    return f"{result['suite']}: {result['model']}, step {result['step']}{' (EMA)' if result['ema'] else ''}{export}"


def _blocks(result):
    """Tables, as lists of rows, and lines between them."""
    rows = [("set", "split", "images", "top-1 %", "top-5 %", "predictions among", "left out")]
    rows += [_row(entry) for entry in result["sets"] if not entry["name"].startswith(_CORRUPTED)]
    blocks = [rows] if len(rows) > 1 else []
    if not result["corruptions"]:
        return blocks
    rows = [("ImageNet-C, error in %", *map(str, SEVERITIES), "mean", "AlexNet", "corruption error")]
    for kind, found in result["corruptions"].items():
        errors = [_percent(found["errors"].get(str(severity))) for severity in SEVERITIES]
        rows.append((kind, *errors, *(_percent(found[key]) for key in ("mean_error", "alexnet_error", "corruption_error"))))
    number = sum(len(found["errors"]) for found in result["corruptions"].values())
    mean = f"mean error {_percent(result['mean_error'])} %, over {number} of {_ALL} sets"
    mce = f"mCE {_percent(result['mce'])} %" if result["mce"] is not None else f"mCE needs all {_ALL}"
    return [*blocks, rows, f"{mean}; {mce}"]


def _row(entry):
    classes = f"{entry['classes']:,} classes"
    if "unlabelled" in entry:
        classes += ", any label is right"
    counts = {"without a label": entry.get("unlabelled", 0), "corrupt": entry["corrupt"]}
    return (
        entry["title"], entry["split"], f"{entry['count']:,}", _percent(entry["top1"]), _percent(entry["top5"]), classes,
        ", ".join(f"{count:,} {what}" for what, count in counts.items() if count),
    )  # fmt: skip


def _percent(share):
    return "" if share is None else f"{100 * share:.2f}"


def _missing(missing):
    """Pairs of a name and lines. The corruptions share one command; a set that cannot be opened otherwise has its message."""
    alike = [entry for entry in missing if entry["command"] and entry["name"].startswith(_CORRUPTED)]
    found = []
    for entry in missing:
        if entry not in alike:
            lines = (entry["command"] or entry["reason"]).splitlines()
            found.append((entry["name"], [*_note(entry), *lines]))
    if alike:
        first = alike[0]
        names = " ".join(entry["name"].removeprefix(_CORRUPTED) for entry in alike)
        command = first["command"].replace(first["name"], f"{_CORRUPTED}$name")
        loop = [f"for name in {names}; do", f"  {command}", "done"]
        found.append((f"imagenet2012_corrupted, {len(alike)} of {_ALL}", [*_note(first), *loop]))
    return found


def _note(entry):
    return [f"# {entry['note']}:"] if entry["note"] else []


def _columns(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = lambda row: (x.ljust(n) if _is_text(i, row) else x.rjust(n) for i, (x, n) in enumerate(zip(row, widths)))
    return "\n".join("  ".join(cells(row)).rstrip() for row in rows)


def _is_text(place, row):
    return place < 2 or place > 4 if len(row) == 7 else place == 0


def _markdown_rows(rows):
    ruler = ["---" if _is_text(i, rows[0]) else "---:" for i in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ruler, *rows[1:]))
