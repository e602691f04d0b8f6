"""Predicts what is in images: the classes of each, or, by a detector, objects with boxes and masks.

    python -m halonet_jax.predict --model=runs/mine photo.jpg holiday/ [--top=5] [--format=text|json|csv] [--out=FILE]

--model is a workdir, a folder that halonet_jax.export wrote with --format=weights, or a model on the hub, hf://OWNER/NAME.
Arguments are image files (JPEG, PNG, WebP, BMP) and folders, which are searched recursively, in sorted order. Results come in
the order of the arguments. A photograph that is stored turned is turned upright (EXIF orientation).

Of a classifier, --attention=DIR draws, for each image, what some of its pixels attend to in each stage, with their block and its
halo. Of a detector, --min_score says which objects count, and --pictures=DIR draws them on the images.

A file that is broken, or larger than data.max_pixels, is named on stderr and skipped. Exit codes: 0: all images were predicted;
1: the others were, and at least one was skipped; 2: nothing was done, for the reason that stderr gives.

In Python, `predict(model, paths)` yields the results.
"""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator

import jax
from absl import flags, logging

from halonet_jax import command_line, data
from halonet_jax.errors import ConfigError, DataError, StorageError
from halonet_jax.predicting import classes, detections, running, writers
from halonet_jax.predicting.progress import Progress
from halonet_jax.predicting.results import DetectedObject, Detections, Prediction
from halonet_jax.runtime import storage
from halonet_jax.runtime import workdir as workdir_lib
from halonet_jax.training import sharding
from halonet_jax.weights import Loaded, load

__all__ = ["FORMATS", "DetectedObject", "Detections", "Prediction", "predict"]
FORMATS = writers.FORMATS
_OPTIONS = {"classification": ("attention", "places", "heads"), "detection": ("min_score", "pictures")}  # of one task alone
_SPELLED = {"places": "places (--at)"}  # where the flag has another name


def predict(
    model: str | Loaded,
    images: Iterable[str] | str,
    top: int | None = None,
    *,
    step: int | str = "latest",
    weights: str | None = None,
    batch_size: int | None = None,
    attention: str | None = None,
    places: Iterable[tuple[float, float]] = (),
    heads: bool = False,
    min_score: float | None = None,
    pictures: str | None = None,
) -> Iterator[Prediction] | Iterator[Detections]:
    """Yields a result for each image, in order. Batches are loaded in the background, as in evaluation.

        for prediction in predict("runs/mine", ["photo.jpg", "holiday/"]):
            print(prediction.file, prediction.classes[:1])
        for found in predict("runs/boxes", ["photo.jpg"]):
            print(found.file, [(x.name, x.score, x.box) for x in found.objects])

    Args:
        model: path as of `halonet_jax.load`, or what that returned.
        images: image files and folders, or a single one, as of `halonet_jax.data.FileSource`.
        top: classes per image, or most objects per image. None: five classes, and all objects that have `min_score`.
        step: as of `halonet_jax.load`.
        weights: as of `halonet_jax.load`.
        batch_size: images per step; it does not change the result. None: that of the run's evaluation, at most 64 per device.
        attention: of a classifier: folder for attention pictures, made where it is missing; None: none are drawn.
        places: of a classifier: what the pictures show: queries at these (row, column), shares of the height and width of the
            crop that the model sees. None given: the two places where the model's map is strongest.
        heads: of a classifier: whether the pictures show each head, not the mean over heads alone.
        min_score: of a detector: objects with a lower score are left out. None: 0.5. The model itself leaves out those below
            0.05.
        pictures: of a detector: folder for the images with their objects drawn on them, made where it is missing; None: none
            are drawn.

    Yields:
        One `Prediction` per file, or, of a detector, one `Detections`. One with `error` stands for a broken file.

    Raises:
        ConfigError: there is no such model, it is of another task, or an argument breaks a rule above.
        CheckpointError: there is no such checkpoint, or it is damaged.
        DataError: an image or a folder does not exist, or a folder holds no image; or pycocotools is missing.
    """
    options = {
        "attention": attention, "places": list(places), "heads": heads, "min_score": min_score, "pictures": pictures,
    }  # fmt: skip
    return running.run(*_prepare(model, images, top, step, weights, batch_size, options))


def _prepare(model, images, top, step, weights, batch_size, options):
    """Checks the arguments and loads the model, before the first image is read. Returns the arguments of `running.run`."""
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    for place in options["places"]:
        if len(place) != 2 or not all(0 <= share <= 1 for share in place):
            raise ConfigError(f"the place {tuple(place)} must be a row and a column between 0 and 1, such as 0.5,0.5")
    detections.least_score(options["min_score"])
    source = data.FileSource(images)
    if not isinstance(model, Loaded):
        sharding.use_cpu_cores(batch_size or len(source))
        model = load(model, step, weights)
    if jax.process_count() > 1:
        raise ConfigError(f"predict runs in one process, and this run has {jax.process_count()}; give each its own images")
    kind = _make_kind(model, source, top, options)
    return model, source, kind, running.batch_size(model, len(source), batch_size)


def _make_kind(model, source, top, options):
    task = model.config.task
    if task not in _OPTIONS:
        raise ConfigError(
            f"predict serves task='classification' and 'detection', and {model.folder} was trained for {task!r}; what serves all "
            "tasks is halonet_jax.evaluate"
        )
    for other, names in _OPTIONS.items():
        given = [_SPELLED.get(name, name) for name in names if other != task and options[name] not in (None, False, [])]
        if given:  # all at once: some need each other
            raise ConfigError(
                f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} for task={other!r}, and {model.folder} was trained "
                f"for {task!r}; leave {given[0] if len(given) == 1 else 'them'} out"
                + ("; pictures draws what was found" if "attention" in given else "")
            )
    folder = lambda flag: running.PictureFolder(options[flag], flag, source) if options[flag] is not None else None
    if task == "detection":
        min_score = detections.least_score(options["min_score"])
        return detections.ObjectsOfImages(model, source, top, min_score, folder("pictures"))
    draw = None
    if options["attention"] is not None:
        draw = classes.AttentionPictures(model, lambda: folder("attention"), options["places"], options["heads"])
    return classes.Classes(model, top or classes.DEFAULT_TOP, draw)


# --- the command


def define_flags() -> None:
    """Defines the flags of the command; not on import, so that several entries can be imported together."""
    flags.DEFINE_string("model", None, "A workdir, a folder that halonet_jax.export wrote, or hf://OWNER/NAME[@REVISION].")
    flags.DEFINE_integer(
        "top",
        None,
        "Classes per image; default: 5. Of a detector: most objects per image; default: all that have --min_score.",
        1,
    )
    flags.DEFINE_enum("format", "text", FORMATS, "Of the result: text; json, a list with one object per line; or csv.")
    flags.DEFINE_string("out", None, "File for the result; default: stdout.")
    flags.DEFINE_string("step", "latest", "Checkpoint of a workdir: a step number, 'latest' or 'best'.")
    flags.DEFINE_enum("weights", None, ("raw", "ema"), "Of a workdir; default: ema, the moving average, where the run kept it.")
    flags.DEFINE_integer("batch_size", None, "Images per step; it does not change the result.", 1)
    flags.DEFINE_float(
        "min_score",
        None,
        "Of a detector: leave out objects with a lower score; default: 0.5. 0: all that the model gives.",
        0,
        1,
    )
    flags.DEFINE_string("pictures", None, "Of a detector: folder for a picture per image with its boxes and masks.")
    flags.DEFINE_string(
        "attention", None, "Of a classifier: folder for a picture per image of what some of its pixels attend to."
    )
    flags.DEFINE_multi_string(
        "at", [], "ROW,COLUMN of a pixel for --attention, as shares of the crop's height and width, such as 0.5,0.3. May be "
        "repeated. Default: the two places where the model's map is strongest.",
    )  # fmt: skip
    flags.DEFINE_boolean("heads", False, "Draw each head with --attention, not the mean over heads alone.")


def _place(text):
    try:
        row, column = map(float, text.split(","))
    except ValueError:
        raise ConfigError(f"--at={text} must be ROW,COLUMN between 0 and 1, such as --at=0.5,0.3") from None
    return row, column


def main(images: list[str]) -> int:
    """Runs the command and returns its exit code.

    Args:
        images: image files and folders.
    """
    f = flags.FLAGS
    options = {
        "attention": f.attention, "places": [_place(text) for text in f.at], "heads": f.heads, "min_score": f.min_score,
        "pictures": f.pictures,
    }  # fmt: skip
    arguments = _prepare(f.model, images, f.top, f.step, f.weights, f.batch_size, options)
    loaded, source, kind, _ = arguments
    for name in ("at", "heads"):  # after the model is known: a detector has no attention pictures
        if getattr(f, name) and f.attention is None:
            raise ConfigError(f"--{name} needs --attention=DIR, the folder for the pictures")
    _use_compile_cache(loaded)
    return _write(running.run(*arguments), kind.layout, f.format, f.out, source)


def _write(results, layout, file_format, path, source):
    """Writes results to a file, or to stdout where `path` is None. Returns the exit code."""
    with _open(path, source) as out:
        # File names need not be UTF-8. Their other bytes are written as they are, or, in JSON, as an escape.
        out.reconfigure(encoding="utf-8", errors="backslashreplace" if file_format == "json" else "surrogateescape")
        progress, skipped = Progress(len(source)), 0
        logging.get_absl_handler().addFilter(lambda record: progress.clear() or True)  # the loader names broken files
        try:
            writer = writers.Writer(out, file_format, layout)
            for result in results:
                progress.add()
                if result.error:
                    skipped += 1
                    continue
                if out.isatty():
                    progress.clear()
                writer.add(result)
            writer.close()
        except BrokenPipeError:  # the reader has enough, as `head` does
            _give_up(out)
            return 0
        except OSError as error:
            _give_up(out)
            remedy = f"({storage.reason(error)}); {storage.remedy(error)}"
            raise StorageError(f"{path or 'the result'} cannot be written {remedy}") from None
        progress.close(skipped)
    return 1 if skipped else 0


def _open(path, source):
    """The file for the result, or stdout, as a context manager."""
    if path is None:
        if sys.stdout is None:
            raise DataError("stdout is closed; give --out=FILE")
        return contextlib.nullcontext(sys.stdout)
    if os.path.exists(path) and any(os.path.samefile(path, source.name(n)) for n in range(len(source))):
        raise DataError(f"--out={path} would replace that image; give another file")
    try:
        return open(path, "w", encoding="utf-8", newline="")
    except OSError as error:
        raise DataError(f"--out={path} cannot be written ({error.strerror}); give another file") from None


def _give_up(out):
    """Drops what has not been written, which would fail once more at the end."""
    if out is sys.stdout:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    else:
        with contextlib.suppress(OSError):
            out.close()


def _use_compile_cache(loaded):
    """A run's folder keeps its compiled programs. Other models' folders stay as they are."""
    if (loaded.folder / "checkpoints").exists():
        workdir_lib.use_compile_cache(loaded.folder)
        logging.debug("Compiled programs are kept in %s", loaded.folder)


if __name__ == "__main__":
    define_flags()
    command_line.run(main, required_flags=("model",), positional="image files or folders")
