"""Predicts the classes of images.

    python -m halonet_jax.predict --model=runs/mine photo.jpg holiday/ [--top=5] [--format=text|json|csv] [--out=FILE]

--model is a workdir, a folder that halonet_jax.export wrote with --format=weights, or a model on the hub, hf://OWNER/NAME.
Arguments are image files (JPEG, PNG, WebP, BMP) and folders, which are searched recursively, in sorted order. Results come in
the order of the arguments. A photograph that is stored turned is turned upright (EXIF orientation).

--attention=DIR draws, for each image, what some of its pixels attend to in each stage, with their block and its halo.

A file that is broken, or larger than data.max_pixels, is named on stderr and skipped. Exit codes: 0: all images were predicted;
1: the others were, and at least one was skipped; 2: nothing was done, for the reason that stderr gives.

In Python, `predict(model, paths)` yields the results.
"""

import contextlib
import csv
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
from absl import flags, logging

from halonet_jax import attention_maps, command_line, data
from halonet_jax.errors import ConfigError, DataError
from halonet_jax.runtime import plots
from halonet_jax.runtime import workdir as workdir_lib
from halonet_jax.training import sharding
from halonet_jax.weights import Loaded, load

FORMATS = ("text", "json", "csv")
_LARGEST_BATCH = 64  # per device: more is no faster, and takes memory
_AUTOMATIC_PLACES = 2


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        file: path of the image.
        classes: (class name, probability), the most probable first; empty if the image is broken.
        error: why the image was skipped; "" if it was not.
        attention: path of the attention picture; "" without one.
    """

    file: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ""
    attention: str = ""


def predict(
    model: str | Loaded,
    images: Iterable[str],
    top: int = 5,
    *,
    step: int | str = "latest",
    weights: str | None = None,
    batch_size: int | None = None,
    attention: str | None = None,
    places: Iterable[tuple[float, float]] = (),
    heads: bool = False,
) -> Iterator[Prediction]:
    """Yields a prediction for each image, in order. Batches are loaded in the background, as in evaluation.

        for prediction in predict("runs/mine", ["photo.jpg", "holiday/"]):
            print(prediction.file, prediction.classes[:1])

    Args:
        model: path as of `halonet_jax.load`, or what that returned.
        images: image files and folders, as of `halonet_jax.data.FileSource`.
        top: classes per image; at most all of the model's are given.
        step: as of `halonet_jax.load`.
        weights: as of `halonet_jax.load`.
        batch_size: images per step; it does not change the result. None: that of the run's evaluation, at most 64 per device.
        attention: folder for attention pictures, made where it is missing; None: none are drawn.
        places: what the pictures show: queries at these (row, column), shares of the height and width of the crop that the model
            sees. None given: the two places where the model's map is strongest.
        heads: whether the pictures show each head, not the mean over heads alone.

    Yields:
        One `Prediction` per file. One with `error` stands for a broken file.

    Raises:
        ConfigError: there is no such model, it does not classify, or an argument breaks a rule above.
        CheckpointError: there is no such checkpoint, or it is damaged.
        DataError: an image or a folder does not exist, or a folder holds no image.
    """
    return _predict(*_prepare(model, images, top, step, weights, batch_size, attention, places, heads))


def _prepare(model, images, top, step, weights, batch_size, attention, places, heads):
    """Checks the arguments and loads the model, before the first image is read."""
    if top < 1:
        raise ConfigError(f"top={top} must be at least 1")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    places = list(places)
    for place in places:
        if len(place) != 2 or not all(0 <= share <= 1 for share in place):
            raise ConfigError(f"the place {tuple(place)} must be a row and a column between 0 and 1, such as 0.5,0.5")
    source = data.FileSource(images)
    if not isinstance(model, Loaded):
        sharding.use_cpu_cores(batch_size or len(source))
        model = load(model, step, weights)
    if jax.process_count() > 1:
        raise ConfigError(f"predict runs in one process, and this run has {jax.process_count()}; give each its own images")
    if model.config.task != "classification":
        raise ConfigError(
            f"predict serves task='classification', and {model.folder} was trained for {model.config.task!r}; what serves all "
            "tasks is halonet_jax.evaluate"
        )
    draw = None
    if attention is not None:
        draw = _Pictures(model, Path(attention), places, heads, digits=len(str(len(source))))
    devices = jax.device_count()
    usual = min(model.config.eval_batch_size or model.config.batch_size, _LARGEST_BATCH * devices)
    batch_size = -(-(batch_size or min(usual, len(source))) // devices) * devices
    return model, source, top, batch_size, draw


def _predict(loaded, source, top, batch_size, draw):
    names, mesh = loaded.metadata["class_names"], sharding.make_mesh()
    count = min(top, len(names))

    def step(variables, images):
        with sharding.use(mesh):
            logits = loaded.task.predict(variables["params"], variables["batch_stats"], {"image": images})
        return jax.lax.top_k(jax.nn.softmax(logits), count)

    step = jax.jit(step, out_shardings=jax.NamedSharding(mesh, jax.P()))
    options = loaded.config.data.copy_and_resolve_references()
    options.on_corrupt = "skip"
    transform = data.ClassificationTransform(options, num_classes=len(names), training=False, upright=True)
    loader = data.eval_batches(source, transform, options, batch_size=batch_size)

    def results(start, batch, outputs):
        probabilities, classes = jax.device_get(outputs)
        mask, images = jax.device_get((batch["mask"], batch["image"] if draw else ()))
        for row in range(min(batch_size, len(source) - start)):
            name = source.name(start + row)
            if not mask[row]:
                yield Prediction(name, error=loader.corrupt.get(name, "it cannot be read"))
                continue
            found = tuple((names[label], float(p)) for label, p in zip(classes[row], probabilities[row]))
            picture = draw(start + row, name, images[row], found[0]) if draw else ""
            yield Prediction(name, found, attention=picture)

    with sharding.DeviceBatches(loader, mesh) as batches:
        previous = None  # fetched once the next batch is dispatched, so that the device never waits
        for number, batch in enumerate(batches):
            current = number * batch_size, batch, step(loaded.variables, batch["image"])
            if previous:
                yield from results(*previous)
            previous = current
        if previous:
            yield from results(*previous)


class _Pictures:
    """Draws an attention picture per image."""

    def __init__(self, loaded, folder, places, heads, digits):
        self._capture = attention_maps.Capture(loaded)
        if not loaded.model.backbone.attention_layers(32, 32):
            raise ConfigError(f"{loaded.folder} is a model of convolutions, without attention to draw; leave --attention out")
        self._folder, self._places, self._heads, self._digits = folder, places, heads, digits
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the folder {folder} cannot be made ({error.strerror}); give another --attention") from None

    def __call__(self, number, name, image, best):
        captured = self._capture(image)
        rows = []
        for place in self._places or captured.strongest(_AUTOMATIC_PLACES):
            seen = [(layer.layer, layer.at(*place)) for layer in captured.by_stage()]
            rows.append([plots.AttentionPanel(f"stage {about.stage}", s.weights.mean(0), *s[1:]) for about, s in seen])
            for head in range(max(about.num_heads for about, _ in seen) if self._heads else 0):
                rows.append(
                    [
                        plots.AttentionPanel(f"stage {about.stage}, head {head + 1}", s.weights[head], *s[1:])
                        if head < about.num_heads
                        else None
                        for about, s in seen
                    ]
                )
        path = self._folder / f"{number + 1:0{self._digits}d}_{Path(name).stem}.png"
        plots.attention(image, rows, f"{best[0]}  {best[1]:.1%}", path)
        return str(path)


# --- the command


class _Progress:
    """Progress with the time that is left, on stderr: one line that is rewritten on a terminal, else one every ten seconds."""

    def __init__(self, total):
        self._total, self._done, self._start, self._shown = total, 0, time.monotonic(), 0.0
        self._terminal = sys.stderr.isatty()

    def add(self):
        self._done += 1
        now = time.monotonic()
        if now - self._shown < (0.2 if self._terminal else 10) or self._done == self._total:
            return
        if not self._shown and not self._terminal:
            self._shown = now  # no line for what is done in seconds
            return
        self._shown = now
        left = (self._total - self._done) * (now - self._start) / self._done
        line = f"{self._done:,} of {self._total:,} images, {_rate(self._done, now - self._start)}, {_clock(left)} left"
        print(f"\r\x1b[K{line}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr, flush=True)

    def clear(self):
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def close(self, skipped):
        self.clear()
        seconds = time.monotonic() - self._start
        end = f"; skipped {skipped:,} that cannot be read, see above" if skipped else ""
        images = "1 image" if self._total == 1 else f"{self._total:,} images"
        print(f"{images} in {_clock(seconds)}, {_rate(self._total, seconds)}{end}", file=sys.stderr)


def _rate(images, seconds):
    rate = images / seconds
    return f"{rate:,.0f} a second" if rate >= 10 else f"{rate:.1f} a second"


def _clock(seconds):
    seconds = math.ceil(seconds)
    return (
        f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        if seconds >= 3600
        else f"{seconds // 60}:{seconds % 60:02d}"
    )


class _Writer:
    """Writes predictions in a format, each as soon as it is there."""

    def __init__(self, file: TextIO, file_format: str, top: int, attention: bool):
        self._file, self._format, self._top, self._attention, self._first = file, file_format, top, attention, True
        if file_format == "csv":
            self._csv = csv.writer(file, lineterminator="\n")
            columns = [f"{name}{n}" for n in range(1, top + 1) for name in ("class", "probability")]
            self._csv.writerow(["file", *columns, *["attention"] * attention])

    def add(self, prediction: Prediction) -> None:
        classes = prediction.classes
        if self._format == "text":
            width = max(len(name) for name, _ in classes)
            lines = [prediction.file, *(f"  {p:7.2%}  {name:{width}}".rstrip() for name, p in classes)]
            print("\n".join(lines), file=self._file)
        elif self._format == "json":
            record: dict[str, Any] = {"file": prediction.file}
            record["classes"] = [{"class": name, "probability": p} for name, p in classes]
            if self._attention:
                record["attention"] = prediction.attention
            print("[" if self._first else ",", json.dumps(record, ensure_ascii=False), sep="\n", end="", file=self._file)
        else:
            values = [x for name, p in classes for x in (name, f"{p:.6g}")]
            self._csv.writerow([prediction.file, *values, *[prediction.attention] * self._attention])
        self._first = False

    def close(self) -> None:
        if self._format == "json":
            print("[]" if self._first else "\n]", file=self._file)
        self._file.flush()


def define_flags() -> None:
    """Defines the flags of the command; not on import, so that several entries can be imported together."""
    flags.DEFINE_string("model", None, "A workdir, a folder that halonet_jax.export wrote, or hf://OWNER/NAME[@REVISION].")
    flags.DEFINE_integer("top", 5, "Classes per image.", 1)
    flags.DEFINE_enum("format", "text", FORMATS, "Of the result: text; json, a list with one object per line; or csv.")
    flags.DEFINE_string("out", None, "File for the result; default: stdout.")
    flags.DEFINE_string("step", "latest", "Checkpoint of a workdir: a step number, 'latest' or 'best'.")
    flags.DEFINE_enum("weights", None, ("raw", "ema"), "Of a workdir; default: ema, the moving average, where the run kept it.")
    flags.DEFINE_integer("batch_size", None, "Images per step; it does not change the result.", 1)
    flags.DEFINE_string("attention", None, "Folder for a picture per image of what some of its pixels attend to.")
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
    for name in ("at", "heads"):
        if getattr(f, name) and f.attention is None:
            raise ConfigError(f"--{name} needs --attention=DIR, the folder for the pictures")
    arguments = _prepare(
        f.model, images, f.top, f.step, f.weights, f.batch_size, f.attention, [_place(text) for text in f.at], f.heads
    )
    loaded, source, *_ = arguments
    _use_compile_cache(loaded)
    with contextlib.ExitStack() as stack:
        out = sys.stdout
        if f.out is not None:
            try:
                out = stack.enter_context(open(f.out, "w", encoding="utf-8", newline=""))
            except OSError as error:
                raise DataError(f"--out={f.out} cannot be written ({error.strerror}); give another file") from None
        # File names need not be UTF-8. Their other bytes are written as they are, or, in JSON, as an escape.
        out.reconfigure(errors="backslashreplace" if f.format == "json" else "surrogateescape")
        top = min(f.top, len(loaded.metadata["class_names"]))
        writer, progress, skipped = _Writer(out, f.format, top, f.attention is not None), _Progress(len(source)), 0
        logging.get_absl_handler().addFilter(lambda record: progress.clear() or True)  # the loader names broken files
        try:
            for prediction in _predict(*arguments):
                progress.add()
                if prediction.error:
                    skipped += 1
                    continue
                if out.isatty():
                    progress.clear()
                writer.add(prediction)
            writer.close()
        except BrokenPipeError:  # the reader has enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        progress.close(skipped)
    return 1 if skipped else 0


def _use_compile_cache(loaded):
    """A run's folder keeps its compiled programs. Other models' folders stay as they are."""
    if (loaded.folder / "checkpoints").exists():
        workdir_lib.use_compile_cache(loaded.folder)
        logging.debug("Compiled programs are kept in %s", loaded.folder)


if __name__ == "__main__":
    define_flags()
    command_line.run(main, required_flags=("model",), positional="image files or folders")
