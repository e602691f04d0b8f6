"""Results of runs, read from their workdirs, and the statistics over seeds.

A run is finished where its workdir has the evaluation of its last step. `result.json` there says so from then on, and holds all
that a report needs.
"""

import json
import math
import os
import statistics
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections
from etils import epath

from halonet_jax.runtime import reporting
from halonet_jax.studies.plan import Run

CONFIDENCE = 0.95


def write(path: epath.Path, content: str | bytes) -> None:
    """Writes a file so that others see the old one or the new one, whole.

    Args:
        path: of the file.
        content: text or bytes.
    """
    content = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            if "://" not in str(path):
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: epath.Path) -> dict | None:
    """Returns the object of a JSON file; None where there is none, or it is torn.

    Args:
        path: of the file.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def result(run: Run) -> dict | None:
    """Returns what `result.json` says; None where the run is not finished.

    Args:
        run: of a plan.
    """
    return read(run.workdir / "result.json")


def failure(run: Run) -> dict | None:
    """Returns `reason`, `exit_code` and `time` of the last start where it failed; None where it did not.

    Args:
        run: of a plan.
    """
    return read(run.workdir / "failed.json")


def collect(run: Run, seconds: float | None = None) -> dict | None:
    """Writes `result.json` where the run is finished.

    Args:
        run: of a plan.
        seconds: that it took; None: not known.

    Returns:
        The result; None where the run is not finished.

    Raises:
        OSError: the file cannot be written.
    """
    about = read(run.workdir / "run.json") or {}
    reports = reporting.read_metrics(run.workdir) if about else []
    evaluation = next((report for report in reversed(reports) if any(key.startswith("eval/") for key in report)), None)
    if evaluation is None or evaluation["step"] != about.get("last_step"):
        return None
    rates = [report["images_per_second"] for report in reports if report.get("images_per_second")]
    found = {
        "label": run.row.label, "seed": run.seed, "step": evaluation["step"], "metrics": evaluation,
        "images_per_second": statistics.median(rates) if rates else None, "seconds": seconds,
        "finished": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "arguments": list(run.arguments), "run": about,
    }  # fmt: skip
    write(run.workdir / "result.json", json.dumps(found, indent=1))
    (run.workdir / "failed.json").unlink(missing_ok=True)
    return found


def harvest(runs: Sequence[Run]) -> None:
    """Collects what finished elsewhere, as in a job of a cluster. A run that is going on is left alone.

    Args:
        runs: of a plan.
    """
    for run in runs:
        if result(run) is None and not (run.workdir / "lease.json").exists():
            collect(run)


def progress(run: Run) -> float:
    """Returns the share of a run's steps that are done, by its reports.

    Args:
        run: of a plan.
    """
    last_step = (read(run.workdir / "run.json") or {}).get("last_step")
    reports = reporting.read_metrics(run.workdir) if last_step else []
    return reports[-1]["step"] / last_step if reports else 0.0


def score(found: dict, metric: str) -> float | None:
    """Returns a result's score in percent: of the averaged weights where there are some.

    Args:
        found: of `collect`.
        metric: name after "eval/".
    """
    metrics = found["metrics"]
    value = metrics.get(f"eval_ema/{metric}", metrics.get(f"eval/{metric}"))
    return None if value is None else 100 * value


class Scores(NamedTuple):
    """The scores of a row over its seeds, in percent."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """Over the seeds; None without a score."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None with less than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


class Comparison(NamedTuple):
    """Difference of two rows' means.

    Attributes:
        difference: in percentage points.
        low: end of the interval; None with less than two seeds on a side.
        high: likewise.
    """

    difference: float
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> str:
        """What the interval says."""
        if self.low is None:
            return "unknown: less than two seeds"
        return "yes" if self.low > 0 or self.high < 0 else "no"


def compare(scores: Scores, base: Scores) -> Comparison | None:
    """Returns the difference to `base` with Welch's t interval; None where either has no score.

    Args:
        scores: of a row.
        base: of the baseline.
    """
    if not scores.values or not base.values:
        return None
    difference = scores.mean - base.mean
    if scores.spread is None or base.spread is None:
        return Comparison(difference)
    terms = [s.spread**2 / len(s.values) for s in (scores, base)]
    if not sum(terms):
        return Comparison(difference, difference, difference)
    from scipy import special  # here, because it takes a second

    freedom = sum(terms) ** 2 / sum(term**2 / (len(s.values) - 1) for term, s in zip(terms, (scores, base)))
    half = float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(sum(terms))
    return Comparison(difference, difference - half, difference + half)


def costs(config: ml_collections.ConfigDict, store: epath.Path) -> dict[str, Any]:
    """Returns `parameters` and `multiply_adds` (of one image) of a config's model; None for what cannot be counted.

    Args:
        config: a whole config.
        store: a JSON file that keeps the numbers, since counting takes seconds.
    """
    about_data = [config.data[key] for key in ("image_size", "name", "source", "classes")]
    key = json.dumps([config.task, config.model.to_dict(), config.detection.to_dict(), about_data])
    known = read(store) or {}
    if key not in known:
        known[key] = _count(config)
        write(store, json.dumps(known, indent=1))
    return known[key]


def _count(config):
    import jax  # Here, with what follows: running a study needs no model.

    from halonet_jax import data, models, tasks
    from halonet_jax.costs import counting

    task = tasks.make_task(config, tasks.find(config).expected_metadata(config))
    if isinstance(task.model, models.HaloNet):
        total = counting.count(task.model, 1, *data.height_and_width(config.data.image_size)).total
        return {"parameters": total.parameters, "multiply_adds": total.multiply_adds}
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    return {"parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(params)), "multiply_adds": None}
