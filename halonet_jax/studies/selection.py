"""The runs that `--only` names."""

import fnmatch
import re
from collections.abc import Sequence

from halonet_jax.errors import ConfigError
from halonet_jax.studies import spec
from halonet_jax.studies.plan import Plan, Run


def select(plan: Plan, only: Sequence[str]) -> list[Run]:
    """Returns the runs that `--only` names.

    Args:
        plan: the study.
        only: labels, folder names or patterns of either, several separated by commas; with "/seedN" for one seed. Empty: all.

    Raises:
        ConfigError: one names no row.
    """
    if not only:
        return list(plan.runs)
    labels = [row.label for row in plan.study.rows]
    chosen = set()
    for pattern in (part for value in only for part in _split(value, labels)):
        row_pattern, _, seed = pattern.rpartition("/seed") if re.search(r"/seed\d+$", pattern) else (pattern, "", "")
        rows = [row for row in plan.study.rows if row_pattern == row.label] or [
            row for row in plan.study.rows if any(fnmatch.fnmatchcase(name, row_pattern) for name in (row.label, row.slug))
        ]
        if not rows:
            raise ConfigError(f"--only={pattern!r} names no row; {spec.near(row_pattern, labels)}")
        if seed and int(seed) not in plan.study.seeds:
            raise ConfigError(f"--only={pattern!r} names no seed; the seeds are {', '.join(map(str, plan.study.seeds))}")
        chosen |= {(row.label, s) for row in rows for s in plan.study.seeds if not seed or s == int(seed)}
    return [run for run in plan.runs if (run.row.label, run.seed) in chosen]


def _split(value, labels):
    """Cuts at commas, but not within a label that has some."""
    parts = value.split(",")
    while parts:
        for end in range(len(parts), 0, -1):
            joined = ",".join(parts[:end]).strip()
            if end == 1 or re.sub(r"/seed\d+$", "", joined) in labels:
                break
        parts = parts[end:]
        if joined:
            yield joined
