"""One pass of a model over one split."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from halonet_jax import tasks
from halonet_jax.data import Source
from halonet_jax.errors import ConfigError, DataError, DistributedError
from halonet_jax.evaluating.subject import Subject, flag
from halonet_jax.runtime import distributed
from halonet_jax.tasks.inputs import Inputs
from halonet_jax.tasks.scoring import TRAINING, Scoring
from halonet_jax.training import evaluation, sharding
from halonet_jax.training.progress import check_classes


class Outcome(NamedTuple):
    """What a pass found.

    Attributes:
        found: each metric of the task, "count", `<metric>_count` where it is a share of the examples, "corrupt", and
            "unlabelled" where images may have several labels.
        evaluator: the task's.
    """

    found: dict[str, float | int]
    evaluator: evaluation.Evaluator


def open_source(subject: Subject, class_names: tuple[str, ...] | None) -> Source:
    """Opens the split that the config names.

    Args:
        subject: gives the config.
        class_names: the classes that labels must mean; None: those of the data.

    Raises:
        DataError: the split cannot be opened.
    """
    definition = tasks.find(subject.config)
    options = {"multi_label": True} if definition.scored else {}
    return definition.open_source(
        subject.config, subject.config.data.eval_split, class_names=class_names, flag=flag, **options
    )  # fmt: skip


def open_trained_classes(subject: Subject) -> Source:
    """Opens the split that the config names, on all processes; its classes must be those of the model.

    Args:
        subject: gives the config and the classes.

    Raises:
        DataError, CheckpointError: the split cannot be opened, or has other classes.
    """
    with distributed.together("opening the data"):
        source = open_source(subject, tuple(subject.metadata.get("class_names", ())))
        now = tasks.find(subject.config).metadata(subject.config, source)
        check_classes(subject.metadata, now, f"{subject.path} was trained on", "by --data_dir, --data_name or --split")
    return source


def open_or_error(open: Callable[[], Source]) -> Source | DataError:
    """Calls `open` on all processes and returns a source, or the error that all of them got.

    Args:
        open: as `open_source`.

    Raises:
        DataError: this process cannot open what others can.
        DistributedError: others cannot open what this process can.
    """
    try:
        result = open()
    except DataError as error:
        result = error
    failed = distributed.gather(isinstance(result, DataError))
    if failed.any() and not failed.all():
        if isinstance(result, DataError):
            raise result
        raise DistributedError("other processes cannot open the data; their output says why", peer_failed=True)
    return result


def describe(subject: Subject) -> None:
    """Prints the implementation that the devices use; an export has none to tell.

    Args:
        subject: the model.
    """
    if subject.variables is not None:
        with sharding.use(subject.mesh):
            description = subject.task.describe()
        if jax.process_index() == 0:
            print(f"  {description}", flush=True)


def run(subject: Subject, source: Source, scoring: Scoring = TRAINING, programs: dict[Scoring, Any] | None = None) -> Outcome:
    """Evaluates a model on a split.

    Args:
        subject: the model; its config says how images are prepared.
        source: of the split. Where its images may have several labels, these are scored so.
        scoring: how predictions are scored.
        programs: keeps the compiled programs, so that a later pass with the same scoring compiles nothing.

    Raises:
        ConfigError: the task, or the data, cannot be scored so.
        DataError: not one image could be read.
    """
    config, task, definition = subject.config, subject.task, tasks.find(subject.config)
    multi_label = getattr(source, "multi_label", False)
    if scoring.per_class and not definition.scored and not hasattr(task.evaluator(source), "per_class"):
        raise ConfigError(
            f"--per_class is for classification and detection, and the model's task is {config.task!r}; leave --per_class out"
        )
    if scoring.per_class and multi_label:
        keys = " or ".join(source.single_label_keys)
        remedy = f"set --label_key to {keys}, or leave --per_class out" if keys else "leave --per_class out"
        raise ConfigError(f"--per_class needs one label for an image, and {config.data.label_key!r} holds several; {remedy}")
    scoring = scoring._replace(multi_label=multi_label)
    if definition.scored:
        task = definition.scored(task, config, scoring)
    programs = {} if programs is None else programs
    if scoring not in programs:
        programs[scoring] = subject.program(task)
    loader = Inputs(config, task, None, source, flag=flag).eval_batches()
    with sharding.DeviceBatches(loader, subject.mesh) as batches:
        evaluators = evaluation.evaluate(programs[scoring], task.evaluator, source, {"eval": subject.variables}, batches)
        corrupt = int(distributed.gather(loader.num_corrupt).sum())
    evaluator, split = evaluators["eval"], config.data.eval_split
    found = evaluator.result()
    if not found["count"]:
        label = f" and has a label ({config.data.label_key})" if multi_label else ""
        raise DataError(f"no image of split {split!r} could be read{label}, {corrupt} are corrupt; see the warnings above")
    counts = {f"{key}_count": n for key, n in getattr(evaluator, "totals", {}).items() if isinstance(n, int) and key != "count"}
    unlabelled = {"unlabelled": len(source) - found["count"] - corrupt} if multi_label else {}
    return Outcome({**found, **counts, "corrupt": corrupt, **unlabelled}, evaluator)
