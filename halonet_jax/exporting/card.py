"""The model card, `README.md`: front matter as the Hugging Face hub reads it, and the figures of the run and of the paper."""

import json
from collections.abc import Sequence

import jax

from halonet_jax import config as config_lib
from halonet_jax.models import variants
from halonet_jax.weights import Loaded

FILE = "README.md"
_PAPER = "[arXiv 2103.12731](https://arxiv.org/abs/2103.12731)"
_PLOTTED = "ImageNet from scratch; the paper plots it, and a third party read it off"
_ABLATION = "ImageNet from scratch, 150 epochs, with label smoothing and RandAugment"
_TRANSFER = "ImageNet-21k, fine-tuned on ImageNet at 384 px"
# Top-1 in percent by architecture, and what it is of.
PUBLISHED = {
    "h0": (77.9, _PLOTTED), "h1": (79.9, _PLOTTED), "h2": (80.4, _PLOTTED), "h3": (81.9, _PLOTTED), "h4": (83.3, _PLOTTED),
    "h5": (84.0, _PLOTTED), "h6": (84.4, _PLOTTED), "h7": (84.9, "ImageNet from scratch"),
    "h7_conv1": (84.6, "ImageNet from scratch"), "h7_conv12": (84.7, "ImageNet from scratch"),
    "h7_conv123": (83.8, "ImageNet from scratch"), "halonet50": (79.9, _ABLATION), "resnet50": (78.4, _ABLATION),
    "h4_base128": (85.6, _TRANSFER), "h4_base128_conv12": (85.5, _TRANSFER), "h4_base128_patch4": (85.4, _TRANSFER),
}  # fmt: skip
_HUB_DATASETS = {"imagenet2012": "ILSVRC/imagenet-1k"}
_TAGS = {"weights": "safetensors", "stablehlo": "stablehlo", "savedmodel": "tensorflow", "onnx": "onnx"}
_CALLS = {
    "weights": "CALL",
    "stablehlo": """import safetensors.flax
from jax import export

with open("FOLDER/model_uint8.stablehlo", "rb") as file:
    model = export.deserialize(bytearray(file.read()))
weights = safetensors.flax.load_file("FOLDER/model.safetensors")
CALL""",
    "savedmodel": """import tensorflow as tf

model = tf.saved_model.load("FOLDER/savedmodel")
CALL""",
    "onnx": """import onnxruntime

model = onnxruntime.InferenceSession("FOLDER/model.onnx")
CALL""",
}
_SHAPE = "  # uint8 [batch, HEIGHT, WIDTH, 3]"
_CLASSIFY = {
    "weights": f"""import halonet_jax

model = halonet_jax.load("FOLDER")  # or hf://OWNER/NAME
logits = model.logits(images){_SHAPE}""",
    "stablehlo": f"logits = model.call(weights, images){_SHAPE}",
    "savedmodel": f'logits = model.signatures["serving_default"](images=tf.constant(images))["logits"]{_SHAPE}',
    "onnx": f'logits = model.run(["logits"], {{"images": images}})[0]{_SHAPE}',
}
_DETECT = {
    "weights": """from halonet_jax.predict import predict

for found in predict("FOLDER", ["photo.jpg"]):  # boxes and masks in pixels of the photograph
    print(found.objects)""",
    "stablehlo": "found = model.call(weights, images, sizes)  # a dict",
    "savedmodel": """found = model.signatures["serving_default"](
    images=tf.constant(images), sizes=tf.constant(sizes)
)  # a dict""",
}


def make(loaded: Loaded, formats: Sequence[str], title: str) -> str:
    """Returns the card.

    Args:
        loaded: the model.
        formats: names of the formats in the folder.
        title: name of the model, one line.
    """
    config, figures = loaded.config, _figures(loaded.figures)
    data = _data(config)
    height, width = loaded.image_shape
    parameters = sum(x.size for x in jax.tree.leaves(loaded.variables["params"]))
    average = ", moving average of the weights" if loaded.weights == "ema" else ""
    what, uses = ("image classification", _CLASSIFY) if config.task == "classification" else ("object detection", _DETECT)
    model = "HaloNet" if config.task == "classification" else "Mask R-CNN on HaloNet"
    use = {name: _CALLS[name].replace("CALL", uses[name]) for name in formats}
    use = {name: text.replace("FOLDER", ".").replace("HEIGHT, WIDTH", f"{height}, {width}") for name, text in use.items()}
    paragraphs = [
        _front_matter(title, config, figures, formats),
        f"# {_plain(title)}",
        f"{model} {config.model.name} ({_PAPER}) for {what}, trained with halonet_jax: {parameters:,} parameters, "
        f"{len(loaded.metadata['class_names'])} classes, images of {height} × {width} pixels. Step {loaded.step}{average}.",
        *_changes(config),
        "## Figures",
        _table(loaded, data, figures),
        "## Preprocessing",
        *_preprocessing(loaded),
        "## Use",
        *(f"{name}:\n\n```python\n{text}\n```" for name, text in use.items()),
        "`export.json` says how far each format's outputs were from the checkpoint's.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _front_matter(title, config, figures, formats):
    """YAML whose texts are written as JSON, so that a name cannot break out of its place."""
    text, data, split = json.dumps, _data(config), config.data.eval_split
    kind = "image-classification" if config.task == "classification" else "object-detection"
    lines = ["---", "library_name: halonet_jax", f"pipeline_tag: {kind}", "tags:"]
    lines += [f"- {tag}" for tag in ("halonet", kind, "jax", "flax", *(_TAGS[name] for name in formats))]
    if data in _HUB_DATASETS:
        lines += ["datasets:", f"- {_HUB_DATASETS[data]}"]
    if figures:
        lines += [
            "model-index:", f"- name: {text(title)}", "  results:", "  - task:", f"      type: {kind}", "    dataset:",
            f"      type: {text(_HUB_DATASETS.get(data, data))}", f"      name: {text(data)}", f"      split: {text(split)}",
            "    metrics:",
        ]  # fmt: skip
        for name, value in figures.items():
            lines += [f"    - type: {text('accuracy' if name.startswith('top') else name)}", f"      name: {text(name)}"]
            lines += [f"      value: {value:.6g}"]
    return "\n".join([*lines, "---"])


def _figures(figures):
    """Shares in percent, as the paper prints them; other metrics as they are; no numbers of examples, and not COCO's -1."""
    labels = {"top1": "top-1", "top5": "top-5"}
    return {
        labels.get(k, k): 100 * x if k in labels else x for k, x in figures.items() if k not in ("count", "corrupt") and x >= 0
    }


def _table(loaded, data, figures):
    config = loaded.config
    count = f", {loaded.figures['count']:,.0f} images" if "count" in loaded.figures else ""
    rows = ["| figure | value | of |", "|---|---|---|"]
    for name, value in figures.items():
        what = f"this model: {_plain(data)}, split {_plain(config.data.eval_split)}{count}, evaluated in training"
        rows.append(f"| {name} | {value:.4g}{' %' if name.startswith('top') else ''} | {what} |")
    if not figures:
        rows.append("| | | this model was not evaluated at this step in training |")
    if config.model.name in PUBLISHED and config.task == "classification":
        top1, what = PUBLISHED[config.model.name]
        rows.append(f"| top-1 | {top1} % | **the paper's** {config.model.name}, not this model: {what} |")
    return "\n".join(rows)


def _changes(config):
    variant = variants.VARIANTS[config.model.name]
    options = config_lib.model_options(config)
    changed = [f"`{key}={options[key]!r}`" for key in variant if key in options and options[key] != variant[key]]
    return [f"It differs from the paper's {config.model.name} in {', '.join(changed)}."] if changed else []


def _data(config):
    return config.data.name if config.data.source == "tfds" else config.data.source


def _preprocessing(loaded):
    d, (height, width) = loaded.config.data, loaded.image_shape
    normalize = (
        f"(x / 255 − mean) / std with mean {tuple(d.mean)} and std {tuple(d.std)}. Where images go in as uint8, the "
        "model does the latter itself."
    )
    if loaded.config.task == "detection":
        return [
            f"The longer side is resized to {height} pixels, RGB. The rest, at the bottom and on the right, is filled with "
            f"{loaded.task.transform(False).fill}. Then {normalize}",
            f"The programs take `images`, uint8 `[batch, {height}, {width}, 3]`, and `sizes`, float32 `[batch, 2]`: height and "
            "width without the padding, in pixels.",
            "## Outputs",
            f"Up to {loaded.model.spec.detections} objects of each image, by falling score: `boxes`, float32 (top, left, bottom, "
            "right) in pixels of the input; `scores`; `classes`, from 0, in the order of the names in `config.json`; `valid`, "
            "false where there is no object; and `masks`, float32 squares of probabilities in the frames of the boxes. Divide "
            "boxes by the factor that the image was resized with.",
        ]
    whole, size = "shorter side", f"{height} pixels"
    if height != width:
        whole, size = "largest rectangle of its shape", f"height {height} and width {width}"
    return [
        f"Central crop of {d.eval_crop:g} of the {whole}, resized to {size}, RGB; then {normalize} `config.json` holds the "
        "numbers and the class names, in the order of the logits."
    ]


def _plain(text):
    """Text without what Markdown or HTML would read as a command, on one line."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|!&" else c for c in " ".join(str(text).split()))
