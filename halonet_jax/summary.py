"""Shows what a model has and what it takes: parameters, multiply-adds, activations, windows, attention.

    python -m halonet_jax.summary                             # a table of all models
    python -m halonet_jax.summary --config=configs/h4.py      # one model, by stage; any --config.KEY=VALUE works
    python -m halonet_jax.summary --model=runs/digits         # a trained one: any path of halonet_jax.load
        [--image_size=SIDE|HEIGHTxWIDTH] [--batch_size=1] [--format=text|markdown|csv]

Nothing is compiled or run on images. `costs/counting.py` says what is counted. In Python, `summarize(model, …)` and
`summarize_all(…)` return the numbers.
"""

import csv
import dataclasses
import io
import re
from collections import Counter
from collections.abc import Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from halonet_jax import command_line, models, tasks
from halonet_jax import config as config_lib
from halonet_jax.costs import counting, floors
from halonet_jax.errors import ConfigError
from halonet_jax.models.blocks import BlockSpec
from halonet_jax.weights import load, timm

FORMATS = ("text", "markdown", "csv")
DEFAULT_IMAGE_SIZE = 256
_STAGE_COLUMNS = {
    "part": "stage", "map": "map", "kinds": "blocks", "width": "width", "heads": "heads", "block": "block", "halo": "halo",
    "window": "window", "parameters": "params M", "multiply_adds": "GMAC", "activations": "acts M",
}  # fmt: skip
_MODEL_COLUMNS = {
    "model": "model", "image": "px", "parameters": "params M", "multiply_adds": "GMAC", "activations": "acts M", "blocks": "blocks",
    "block": "block", "halo": "halo", "window": "window", "attention": "attention",
}  # fmt: skip
_UNITS = {"parameters": 1e6, "multiply_adds": 1e9, "activations": 1e6}
_TEXTS = ("part", "model", "map", "kinds", "attention")  # columns that are aligned to the left


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a model.

    Attributes:
        map: rows and columns of the stage's output, in pixels.
        specs: the stage's blocks.
        windows: side of the windows that its attention layers attend to, in pixels, each size once, in the order of the
            blocks; a (rows, columns) pair for each. This is b + 2h. If a block covers the map, it is the map with
            padding="mask". Of a lambda layer, it is the square that the position term reaches.
        implementations: "xla", "pallas" …: what runs its attention layers, each once.
        count: parameters, multiply-adds and activations.
    """

    map: tuple[int, int]
    specs: tuple[BlockSpec, ...]
    windows: tuple[tuple[int, int], ...]
    implementations: tuple[str, ...]
    count: counting.Count


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `summarize` returns. Multiply-adds and activations are those of the whole batch.

    Attributes:
        batch: number of images.
        height: rows of the images, in pixels.
        width: columns of the images, in pixels.
        num_classes: width of the classifier.
        stem: what the stem has.
        stages: the stages.
        head: what the last convolution, where there is one, and the classifier have.
        implementations: number of attention layers by the implementation that runs them.
        attention: one line on them, with the device and the reasons.
    """

    batch: int
    height: int
    width: int
    num_classes: int
    stem: counting.Count
    stages: tuple[Stage, ...]
    head: counting.Count
    implementations: dict[str, int]
    attention: str

    @property
    def total(self) -> counting.Count:
        """The sum over stem, stages and head."""
        return counting.Count(*map(sum, zip(self.stem, *(stage.count for stage in self.stages), self.head)))


def summarize(model: models.HaloNet, height: int, width: int | None = None, batch: int = 1) -> Summary:
    """Counts a model, by stage.

        summarize(models.create("h4"), 384).total.multiply_adds

    Args:
        model: of `models.create`, or of what `halonet_jax.load` returns.
        height: rows of the images, in pixels.
        width: columns of the images, in pixels; None: `height`.
        batch: number of images.

    Raises:
        ValueError: an argument is less than 1.
    """
    width = height if width is None else width
    for name, value in (("height", height), ("width", width), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1; for example {name}={1 if name == 'batch' else 256}")
    backbone = model.backbone
    counts = counting.count(model, batch, height, width)
    windows, implementations = {}, {}
    for layer, choice in backbone.attention_choices(batch, height, width):
        window = counting.window(layer, centered=backbone.window == "centered", masked=backbone.padding == "mask")
        windows.setdefault(layer.stage, []).append(window)
        name = choice.implementation if isinstance(choice.implementation, str) else "custom"
        implementations.setdefault(layer.stage, []).append(name)
    stages = []
    for number, specs in enumerate(backbone.stages, start=1):
        windows.setdefault(number, []).extend(2 * (spec.context_size,) for spec in specs if spec.context_size)
        each = (tuple(dict.fromkeys(found.get(number, ()))) for found in (windows, implementations))
        stages.append(Stage(counts.maps[number - 1], specs, *each, counts.parts[str(number)]))
    return Summary(
        batch, height, width, model.num_classes, counts.parts["stem"], tuple(stages), counts.parts["head"],
        dict(Counter(name for names in implementations.values() for name in names)), model.describe(batch, height, width),
    )  # fmt: skip


def summarize_all(image_size: tuple[int, int] | None = None, batch: int = 1) -> dict[str, Summary]:
    """Counts all models that `models.create` knows, with 1,000 classes.

    Args:
        image_size: rows and columns of the images, in pixels; None: of each, the side in its recipe, or
            `DEFAULT_IMAGE_SIZE`.
        batch: number of images.

    Returns:
        The summaries by name.
    """
    return {name: summarize(models.create(name), *(image_size or 2 * (recipe_size(name),)), batch) for name in models.names()}


def recipe_size(name: str) -> int:
    """Returns the side of the images in a model's recipe, or timm's for its models, in pixels; else `DEFAULT_IMAGE_SIZE`.

    Args:
        name: of the model. A hybrid, such as "h7_conv12", has the size of its base.
    """
    if name in timm.NAMES:
        return timm.make_config(name).data.image_size
    if re.fullmatch("resnet(50|101)_se(_halo)?", name):  # detection backbones
        return 512
    return floors.IMAGE_SIZES.get(re.sub("_conv1(2(3)?)?$", "", name), DEFAULT_IMAGE_SIZE)


def stage_table(summary: Summary, file_format: str = "text") -> str:
    """Returns a summary as a table: stem, stages, head and total.

    Args:
        summary: of `summarize`.
        file_format: "text", "markdown" or "csv". CSV has plain numbers; the others have millions and billions.

    Returns:
        The table; in text and Markdown with the images above and the attention below it.
    """
    rows = [{"part": "stem", **summary.stem._asdict()}]
    for number, stage in enumerate(summary.stages, start=1):
        kinds = Counter(spec.kind for spec in stage.specs)
        attending = [spec for spec in stage.specs if spec.block_size]
        rows.append({
            "part": number, "map": "×".join(map(str, stage.map)), "blocks": len(stage.specs),
            "kinds": " + ".join(f"{n} {kind}" for kind, n in kinds.items()),
            "width": _each(f"{spec.width}→{spec.out_width}" for spec in stage.specs),
            "heads": _each(spec.num_heads for spec in stage.specs if spec.num_heads),
            "block": _each(spec.block_size for spec in attending), "halo": _each(spec.halo_size for spec in attending),
            "window": _each(map(_square, stage.windows)), "implementation": _each(stage.implementations),
            **stage.count._asdict(),
        })  # fmt: skip
    rows += [{"part": "head", "width": summary.num_classes, **summary.head._asdict()}, {"part": "total", **summary.total._asdict()}]
    if file_format == "csv":
        return table(dict.fromkeys(rows[1]), rows, file_format)
    images = f"{summary.batch} image{'s' * (summary.batch > 1)} of {summary.height}×{summary.width}, {summary.num_classes} classes"
    return "\n\n".join([images, table(_STAGE_COLUMNS, rows, file_format), summary.attention])


def model_table(summaries: dict[str, Summary], file_format: str = "text") -> str:
    """Returns a table with a row for each model.

    Args:
        summaries: by name.
        file_format: as of `stage_table`.
    """
    rows = []
    for name, found in summaries.items():
        every = [spec for stage in found.stages for spec in stage.specs]
        specs, lambdas = [spec for spec in every if spec.block_size], sum(spec.kind == "lambda" for spec in every)
        layers = found.implementations | ({"λ": lambdas} if lambdas else {})
        rows.append({
            "model": name, "image": _square((found.height, found.width)), **found.total._asdict(),
            "blocks": " ".join(str(len(stage.specs)) for stage in found.stages),
            "block": _each(spec.block_size for spec in specs), "halo": _each(spec.halo_size for spec in specs),
            "window": " ".join(_square(max(stage.windows)) if stage.windows else "–" for stage in found.stages) if specs else "",
            "attention": ", ".join(f"{kind} {n}" for kind, n in layers.items()),
        })  # fmt: skip
    return table(dict.fromkeys(_MODEL_COLUMNS) if file_format == "csv" else _MODEL_COLUMNS, rows, file_format)


def table(columns: dict[str, str | None], rows: Sequence[dict], file_format: str) -> str:
    """Returns rows as a table.

    Args:
        columns: the keys to show, with their headings; a heading of None is the key.
        rows: values by key. Where one is missing, the cell is empty.
        file_format: "text", "markdown" or "csv". In the first two, numbers are in units of `_UNITS`.

    Raises:
        ConfigError: the format is unknown.
    """
    if file_format not in FORMATS:
        raise ConfigError(f"format={file_format!r} is unknown; use one of {', '.join(FORMATS)}")
    heads = [key if heading is None else heading for key, heading in columns.items()]
    if file_format == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([heads, *([row.get(key, "") for key in columns] for row in rows)])
        return out.getvalue().rstrip("\n")
    show = lambda key, value: f"{value / _UNITS[key]:,.2f}" if key in _UNITS else str(value)
    lines = [heads, *([show(key, row[key]) if key in row else "" for key in columns] for row in rows)]
    lengths = [max(map(len, column)) for column in zip(*lines)]
    pad = lambda key, cell, length: cell.ljust(length) if key in _TEXTS else cell.rjust(length)
    padded = [[pad(*each) for each in zip(columns, line, lengths)] for line in lines]
    if file_format == "text":
        return "\n".join("  ".join(line).rstrip() for line in padded)
    rule = ["-" * length if key in _TEXTS else "-" * (length - 1) + ":" for key, length in zip(columns, lengths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def _square(sides):
    return str(sides[0]) if sides[0] == sides[1] else f"{sides[0]}×{sides[1]}"


def _each(values):
    return ", ".join(dict.fromkeys(map(str, values)))


def define_flags() -> None:
    """Defines the flags of the command; not on import, so that several entries can be imported together."""
    flags.DEFINE_string("model", None, "A workdir, an exported folder with weights, or hf://OWNER/NAME[@REVISION].")
    config_flags.DEFINE_config_file("config", help_string="In place of --model: a recipe, such as configs/h4.py.")
    flags.DEFINE_string("image_size", None, "SIDE or HEIGHTxWIDTH, in pixels; default: the model's, or its recipe's.")
    flags.DEFINE_integer("batch_size", 1, "Number of images.", 1)
    flags.DEFINE_enum("format", "text", FORMATS, "Of the table.")


def main() -> int:
    """Runs the command and returns its exit code."""
    f = flags.FLAGS
    size = None if f.image_size is None else _parse_size(f.image_size)
    if f.model is not None and f.config is not None:
        raise ConfigError("--model and --config were both given; give one of them, or neither for a table of all models")
    if f.model is None and f.config is None:
        print(model_table(summarize_all(size, f.batch_size), f.format))
        return 0
    if f.model is not None:
        loaded = load(f.model)
        task, config = loaded.task, loaded.config
    else:
        task, config = _make_task(f.config), f.config
    model = task.model
    if not isinstance(model, models.HaloNet):
        raise ConfigError(f"task={config.task!r} trains a {type(model).__name__}; a summary is of a model of models.create")
    height, width = size or task.transform(False).fields["image"].shape[:2]
    print(stage_table(summarize(model, height, width, f.batch_size), f.format))
    return 0


def _make_task(config: ml_collections.ConfigDict):
    """Returns the task of a recipe. Its data need not be there."""
    config_lib.check_knob(config, "data.image_size")
    try:
        return tasks.make_task(config, tasks.find(config).expected_metadata(config))
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.model: {error}") from None


def _parse_size(text):
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if not match:
        raise ConfigError(f"--image_size={text!r} is no size in pixels; give SIDE or HEIGHTxWIDTH, for example 384 or 480x640")
    return int(match[1]), int(match[2] or match[1])


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
