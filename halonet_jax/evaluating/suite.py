"""Runs one model over the data sets of a suite."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from halonet_jax import tasks
from halonet_jax.data import NotPrepared
from halonet_jax.errors import ConfigError, DataError
from halonet_jax.evaluating import imagenet, passes
from halonet_jax.evaluating.imagenet import ALEXNET_ERRORS, SEVERITIES, Set
from halonet_jax.evaluating.subject import Subject
from halonet_jax.tasks.scoring import Scoring

SUITES = {
    "imagenet": (*imagenet.SETS, *(imagenet.corrupted(kind, severity) for kind in ALEXNET_ERRORS for severity in SEVERITIES))
}
_NUM_CLASSES = 1000


def find(name: str) -> tuple[Set, ...]:
    """Returns the sets of a suite.

    Args:
        name: of the suite.

    Raises:
        ConfigError: there is no such suite.
    """
    if name not in SUITES:
        raise ConfigError(f"suite {name!r} is unknown; use {' or '.join(SUITES)}")
    return SUITES[name]


def check_slice(text: str | None) -> None:
    """Checks what is taken of every set.

    Args:
        text: a slice of a TFDS split; None: whole sets.

    Raises:
        ConfigError: it names a split.
    """
    if text is not None and not re.fullmatch(r"\[-?\d*%?:-?\d*%?\]", text):
        raise ConfigError(
            f"--split={text} cannot be, since each set of a suite has its own split; leave --split out, or give a slice of "
            "every split, such as --split='[:500]'"
        )


def run(
    name: str, sets: Sequence[Set], subject: Subject, slice_text: str = "", all_classes: bool = False, keep_dir: bool = False
) -> dict[str, Any]:
    """Evaluates a model on those sets that are prepared.

    Args:
        name: of the suite.
        sets: of the suite.
        subject: the model; its config's data block is changed.
        slice_text: what is taken of every split; "": all.
        all_classes: as of `halonet_jax.evaluate.evaluate_suite`.
        keep_dir: whether the config's `data.dir` is TFDS's, even where the model was trained on other data.

    Returns:
        JSON values: suite, model (a path), step, ema, data_dir and all_classes; `sets`, with title, name, split, count,
        classes, top1 and others for each set; the figures of `corruption_errors`; `missing`, with name, reason, command and
        note for each set.

    Raises:
        ConfigError: the model has other classes, or another task.
        DataError: not one set could be evaluated.
    """
    config, names = subject.config, tuple(subject.metadata.get("class_names", ()))
    if tasks.find(config).scored is None:
        raise ConfigError(f"--suite is for classification, and the model's task is {config.task!r}; leave --suite out")
    if len(names) != _NUM_CLASSES:
        raise ConfigError(
            f"suite {name} needs a model of ImageNet's {_NUM_CLASSES:,} classes, and {subject.path} has {len(names):,}; leave "
            "--suite out to evaluate it on its own classes"
        )
    if config.data.source != "tfds":
        config.data.source, config.data.dir = "tfds", config.data.dir if keep_dir else ""
    crop, programs, done, missing = config.data.eval_crop, {}, [], []
    for one in sets:
        config.data.update({"name": one.name, "eval_split": one.split + slice_text, "label_key": one.label_key})
        config.data.eval_crop = 1.0 if one.whole_image else crop
        entry = _evaluate(one, subject, names, all_classes, programs, first=not done)
        if isinstance(entry, DataError):
            missing.append(_missing(one, entry))
        else:
            done.append(entry)
    if not done:
        what = f"no set of suite {name} can be evaluated in {config.data.dir or 'the default folder of TFDS'}"
        first = missing[0]
        raise DataError(f"{what}; set --data_dir, or prepare one or more of the {len(sets)}, for example:\n{first['reason']}")
    return {
        "suite": name, "model": str(subject.path), "step": subject.step, "ema": subject.weights == "ema",
        "data_dir": config.data.dir, "all_classes": all_classes, "sets": done,
        **corruption_errors({entry["name"]: entry["top1"] for entry in done}), "missing": missing,
        **({"format": subject.format} if subject.format else {}),
    }  # fmt: skip


def _evaluate(one, subject, names, all_classes, programs, first):
    """The entry of one set, or the error that all processes got."""
    source = passes.open_or_error(lambda: passes.open_source(subject, None))
    if isinstance(source, DataError):
        return source
    if source.class_names != names:
        changed = sorted(set(source.class_names) ^ set(names)) or ["their order"]
        raise ConfigError(
            f"{subject.path} and {one.name} both have {len(names):,} classes, and they differ in {', '.join(changed[:5])}; the "
            "suite needs a model whose classes are ImageNet's WordNet ids, in order"
        )
    if first:
        passes.describe(subject)
    classes = None
    if one.subset and not all_classes:
        classes = tuple(names.index(class_name) for class_name in imagenet.SUBSETS[one.subset])
    try:
        found, _ = passes.run(subject, source, Scoring(classes), programs)
    except DataError as error:
        if jax.process_count() > 1:
            raise  # the others may not have met it
        return error
    if jax.process_index() == 0:
        print(f"  {one.title}: top-1 {found['top1']:.4f} ({found['top1_count']}/{found['count']})", flush=True)
    about = {"title": one.title, "name": one.name, "split": subject.config.data.eval_split}
    return about | {"classes": len(classes or names)} | found


def _missing(one, error):
    prepare = (error.command, error.note) if isinstance(error, NotPrepared) else ("", "")
    return {"name": one.name, "reason": str(error), "command": prepare[0], "note": prepare[1]}


def corruption_errors(top1: dict[str, float]) -> dict[str, Any]:
    """Returns the figures of ImageNet-C (arXiv 1903.12261, section 4.1).

    A kind's corruption error is its error summed over the severities, over AlexNet's; mCE is their mean over the 15 kinds.

    Args:
        top1: top-1 accuracy by name of the set; other sets are passed over.

    Returns:
        `corruptions`: for each kind that is there, `errors` by severity, `mean_error`, `alexnet_error` and
        `corruption_error`, None where a severity is missing. `mean_error`: over all sets that are there, None where there
        is none. `mce`: None unless all 75 are there.
    """
    corruptions = {}
    for kind, alexnet in ALEXNET_ERRORS.items():
        names = {severity: imagenet.corrupted(kind, severity).name for severity in SEVERITIES}
        errors = {str(severity): 1 - top1[name] for severity, name in names.items() if name in top1}
        if errors:
            mean = float(np.mean(list(errors.values())))
            corruptions[kind] = {
                "errors": errors, "mean_error": mean, "alexnet_error": alexnet,
                "corruption_error": mean / alexnet if len(errors) == len(SEVERITIES) else None,
            }  # fmt: skip
    every = [error for found in corruptions.values() for error in found["errors"].values()]
    complete = len(every) == len(ALEXNET_ERRORS) * len(SEVERITIES)
    return {
        "corruptions": corruptions,
        "mean_error": float(np.mean(every)) if every else None,
        "mce": float(np.mean([found["corruption_error"] for found in corruptions.values()])) if complete else None,
    }
