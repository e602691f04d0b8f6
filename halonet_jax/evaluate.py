"""Evaluates a run's checkpoint, or an exported model: exact counts, printed and written as JSON.

    python -m halonet_jax.evaluate --workdir=runs/digits [--ema] [--step=best] [--split=test] [--data_dir=…] [--data_name=…]
    python -m halonet_jax.evaluate --model=exported [--format=onnx] [--out=results] [--split=test] …
    python -m halonet_jax.evaluate --workdir=runs/digits --per_class
    python -m halonet_jax.evaluate --model=exported --suite=imagenet [--data_dir=…] [--all_classes]

An export runs in its own runtime: JAX, TensorFlow or onnxruntime. In Python, `evaluate(workdir, …)` and
`evaluate_suite(name, workdir, …)` do the same and return the result.
"""

import json

import jax
from absl import flags

from halonet_jax import command_line, exporting
from halonet_jax.errors import ConfigError
from halonet_jax.evaluating import files, passes, suite, tables
from halonet_jax.evaluating.subject import open_subject
from halonet_jax.runtime import stopping
from halonet_jax.tasks.scoring import Scoring

_LABELS = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean over classes"} | {
    f"{kind}_ap{which}": f"{kind} AP{which.replace('_', ' ')}"
    for kind in ("box", "mask") for which in ("", "50", "75", "_small", "_medium", "_large")
}  # fmt: skip


def evaluate(
    workdir: str | None = None,
    split: str | None = None,
    ema: bool = False,
    at: int | str = "latest",
    data_dir: str | None = None,
    batch_size: int | None = None,
    data_name: str | None = None,
    model: str | None = None,
    format: str | None = None,
    out: str | None = None,
    label_key: str | None = None,
    per_class: bool = False,
) -> dict:
    """Evaluates one model on one split and writes `eval_<split>_<step>[_ema].json`.

    Other data than that of the run's config get a file of their own, whose name ends in a checksum of what was given.

    Args:
        workdir: folder of a training run. The result goes there. None: `model` is given.
        split: None: the config's `data.eval_split`.
        ema: whether to evaluate the moving average of the weights rather than the weights. A `model` holds one of them.
        at: step of the checkpoint, "latest" or "best".
        data_dir: where the data is; None: where it was in training.
        batch_size: global; it does not change the result. None: as in training.
        data_name: of the TFDS data set; None: that of training.
        model: a folder that `halonet_jax.export` wrote, timm's weights, or another path of `halonet_jax.load`. The result
            goes beside that folder, with its name in front; that of a model on the hub goes into the current folder.
        format: which export of `model` to run; None: weights, or the first that is there.
        out: folder for the result, in place of the above.
        label_key: feature of the TFDS data set that is the label; None: that of training. Where it is a sequence of
            labels, a prediction is right if it is any of them, and images without a label are left out.
        per_class: also write `…_per_class.csv`; for a classifier `…_confusion.csv` and `…_confusion.png`, too. A detector
            always writes `…_detections.json`, in COCO's format of results.

    Returns:
        What is written: split, step, ema, the data's source, name, dir and label_key, count, corrupt, path, and each metric
        of the task, with `<metric>_count` where it is a share of the examples. For a `model`, its format too. "unlabelled"
        where images may have several labels; "files" with `per_class`, or of a detector.

    Raises:
        ConfigError, DataError, CheckpointError: for bad input. A data set with other classes than the checkpoint's is one.
    """
    data = {"dir": data_dir, "name": data_name, "eval_split": split, "label_key": label_key}
    subject = open_subject(workdir, model, format, at, ema, batch_size, data, out)
    source = passes.open_trained_classes(subject)
    passes.describe(subject)
    found, evaluator = passes.run(subject, source, Scoring(per_class=per_class))
    split, data = subject.config.data.eval_split, files.about_data(subject)
    stem = files.stem(subject, split, files.data_ending(subject))
    confusion = getattr(evaluator, "confusion", None) if per_class else None
    contents = {}
    if confusion is not None:
        contents = files.by_class(subject.metadata["class_names"], confusion)
    elif per_class:
        contents["_per_class.csv"] = files.table(evaluator.per_class())
    if hasattr(evaluator, "detections"):
        contents["_detections.json"] = json.dumps(evaluator.detections())
    contents = {f"{stem}{ending}": text for ending, text in contents.items()}
    result = {
        "split": split, "step": subject.step, "ema": subject.weights == "ema", "data": data, **found,
        "path": str(subject.folder / f"{stem}.json"), **({"format": subject.format} if subject.format else {}),
    }  # fmt: skip
    if contents:
        result["files"] = [str(subject.folder / name) for name in contents]
    files.write(subject, contents | {f"{stem}.json": json.dumps(result, indent=2)}, result)
    if confusion is not None:
        title = f"{split}: {found['top1_count']:,} of {found['count']:,} right"
        picture = files.draw(subject, f"{stem}_confusion.png", subject.metadata["class_names"], confusion, title)
        result["files"] += [str(picture)] if picture else []
    return result


def evaluate_suite(
    name: str,
    workdir: str | None = None,
    split: str | None = None,
    ema: bool = False,
    at: int | str = "latest",
    data_dir: str | None = None,
    batch_size: int | None = None,
    model: str | None = None,
    format: str | None = None,
    out: str | None = None,
    all_classes: bool = False,
) -> dict:
    """Evaluates one model on the data sets of a suite and writes `eval_suite_<name>_<step>[_ema].json` and `.md`.

    Sets that are not prepared are named in the result, with the commands that prepare them.

    Args:
        name: "imagenet": validation, ReaL, V2, A, R, Sketch and C.
        workdir: as of `evaluate`.
        split: a slice such as "[:500]", for a try: it is taken of every set. None: whole sets.
        ema: as of `evaluate`.
        at: as of `evaluate`.
        data_dir: TFDS's data_dir of all sets; None: that of training.
        batch_size: as of `evaluate`.
        model: as of `evaluate`.
        format: as of `evaluate`.
        out: as of `evaluate`.
        all_classes: whether predictions on ImageNet-A and ImageNet-R are chosen from all 1,000 classes. False: from the
            200 classes of the set.

    Returns:
        What is written, see `halonet_jax.evaluating.suite.run`.

    Raises:
        ConfigError, DataError, CheckpointError: for bad input. A model of other classes, or not one prepared set, is one.
    """
    sets = suite.find(name)
    suite.check_slice(split)
    subject = open_subject(workdir, model, format, at, ema, batch_size, {"dir": data_dir}, out)
    result = suite.run(name, sets, subject, split or "", all_classes, keep_dir=data_dir is not None)
    stem = files.stem(subject, f"suite_{name}{split or ''}", "_all_classes" if all_classes else "")
    result |= {"path": str(subject.folder / f"{stem}.json"), "markdown": str(subject.folder / f"{stem}.md")}
    files.write(subject, {f"{stem}.json": json.dumps(result, indent=2), f"{stem}.md": tables.markdown(result)}, result)
    return result


def summary(result: dict) -> str:
    """One line for the terminal, from what `evaluate` returns."""
    other = ("split", "step", "ema", "data", "count", "corrupt", "unlabelled", "path", "format", "files")
    parts = []
    for key, value in result.items():
        if key in other or key.endswith("_count"):
            continue
        count = f" ({result[f'{key}_count']}/{result['count']})" if f"{key}_count" in result else ""
        label = _LABELS.get(key, key)
        parts.append(f"{label} none" if value < 0 else f"{label} {value:.4f}{count}")  # COCO's -1: there are no such objects
    corrupt = f"; {result['corrupt']} corrupt images left out" if result["corrupt"] else ""
    unlabelled = f"; {result['unlabelled']} images without a label left out" if result.get("unlabelled") else ""
    export = f"{result['format']}, " if "format" in result else ""
    ema = " (EMA)" if result["ema"] else ""
    return f"{export}{result['split']} of step {result['step']}{ema}: {', '.join(parts)}{corrupt}{unlabelled}"


def define_flags() -> None:
    """Defines the flags of the command; not on import, so that several entries can be imported together."""
    flags.DEFINE_string("workdir", None, "Folder of the run, as given to halonet_jax.train.")
    flags.DEFINE_string("model", None, "In place of --workdir: an exported folder, or hf://OWNER/NAME[@REVISION].")
    flags.DEFINE_enum(
        "format", None, list(exporting.FORMATS), "Which export of --model; default: weights, or the first there is."
    )
    flags.DEFINE_string("out", None, "Folder for the result; default: the workdir, or beside the export.")
    flags.DEFINE_string(
        "split", None, "Split to evaluate; default: the config's data.eval_split. With --suite, a slice: '[:500]'."
    )
    flags.DEFINE_boolean("ema", False, "Evaluate the moving average of the weights rather than the weights.")
    flags.DEFINE_string("step", "latest", "Checkpoint: a step number, 'latest' or 'best'.")
    flags.DEFINE_string("data_dir", None, "Where the data is, if not where it was in training.")
    flags.DEFINE_string("data_name", None, "TFDS data set, if not that of training; its classes must be the same.")
    flags.DEFINE_string("label_key", None, "Feature of the TFDS data set that is the label, if not that of training.")
    flags.DEFINE_boolean("per_class", False, "Also write the figures of each class: accuracy and confusion matrix, or AP.")
    flags.DEFINE_string(
        "suite", None, "Evaluate the sets of a suite: imagenet, which is validation, ReaL, V2, A, R, Sketch and C."
    )
    flags.DEFINE_boolean("all_classes", False, "With --suite: choose among all 1,000 classes on ImageNet-A and ImageNet-R too.")
    flags.DEFINE_integer("batch_size", None, "Global batch size; it does not change the result.")


def main() -> int:
    """Runs the command and returns its exit code."""
    f = flags.FLAGS
    if f.suite is not None:
        return _main_suite(f)
    if f.all_classes:
        raise ConfigError("--all_classes is for --suite; leave it out, or add --suite=imagenet")
    result = evaluate(
        f.workdir, f.split, f.ema, f.step, f.data_dir, f.batch_size, f.data_name, f.model, f.format, f.out, f.label_key,
        f.per_class,
    )  # fmt: skip
    print(summary(result))
    for path in result.get("files", ()):
        print(f"{'detections' if path.endswith('_detections.json') else 'by class'}: {path}")
    print(f"written to {result['path']}")
    return 0


def _main_suite(f):
    for key in ("data_name", "label_key", "per_class"):
        if f[key].value:
            raise ConfigError(f"--{key} is for one data set, and --suite={f.suite} names its own; leave --{key} or --suite out")
    result = evaluate_suite(
        f.suite, f.workdir, f.split, f.ema, f.step, f.data_dir, f.batch_size, f.model, f.format, f.out, f.all_classes
    )  # fmt: skip
    if jax.process_index() == 0:
        print(tables.text(result))
        print(f"written to {result['path']} and {result['markdown']}")
    return stopping.EXIT_INCOMPLETE if result["missing"] else 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
