"""Trained weights of timm's halo models: from their files to configs and variables of ours.

Files are `model.safetensors`, or what `torch.save` wrote. The latter needs torch, which reads it with
`weights_only=True`: nothing of a stranger's is ever executed. `models.timm` has the architectures.
"""

import functools
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import safetensors.flax
from etils import epath

from halonet_jax import config as config_lib
from halonet_jax import models
from halonet_jax.errors import CheckpointError, ConfigError
from halonet_jax.models import timm
from halonet_jax.weights import portable

NAMES = tuple(timm.MODELS)
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".tar")
# timm's own preprocessing of each model where it is not 256 px, crop 0.94, ImageNet's mean and std.
_PREPROCESSING = {
    "halonet_h1": {"eval_crop": 0.95}, "halonet26t": {"eval_crop": 0.95}, "halo2botnet50ts_256": {"eval_crop": 0.95},
    "lamhalobotnet50ts_256": {"eval_crop": 0.95},
    "haloregnetz_b": {"image_size": 224, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
}  # fmt: skip
# What timm's training scripts put around the arrays, best first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


class Imported(NamedTuple):
    """What a file or folder of timm's gives.

    Attributes:
        config: of a run with this model, in float32 and with timm's preprocessing.
        class_names: WordNet ids for ImageNet's 1,000 classes, else numbers.
        variables: `{"params": …, "batch_stats": …}`, NumPy float32.
    """

    config: ml_collections.ConfigDict
    class_names: list[str]
    variables: dict[str, Any]


class Rule(NamedTuple):
    """What becomes of one array.

    Attributes:
        key: of timm's array.
        shape: that it must have.
        targets: for each array of ours that it gives, by path, a function from timm's array.
    """

    key: str
    shape: tuple[int, ...]
    targets: dict[tuple[str, ...], Callable[[np.ndarray], np.ndarray]]


def is_file(path: epath.Path) -> bool:
    """Returns whether a path names a file of weights, by its ending; it need not exist.

    Args:
        path: any path.
    """
    return path.name.endswith(SUFFIXES) and not path.is_dir()


def is_folder(folder: epath.Path) -> bool:
    """Returns whether a folder is one of timm's on the hub: its `config.json` names an architecture.

    Args:
        folder: any path.
    """
    about = _read_about(folder)
    return about is not None and "architecture" in about and "format" not in about


def is_timm(path: epath.Path) -> bool:
    """Returns whether a path is for `load`: a file of weights, or a folder of timm's.

    Args:
        path: any path.
    """
    return is_file(path) or is_folder(path)


def read_config(path: epath.Path) -> ml_collections.ConfigDict:
    """Returns the config of a file or folder, as `load` does. Of a folder, the weights are not read.

    Args:
        path: as of `load`.

    Raises:
        ConfigError, CheckpointError: as `load` raises them.
    """
    path, architecture, about = _look(path, None)
    return make_config(architecture or _recognise(path, read(path)), about)


def load(path: epath.Path, architecture: str | None = None) -> Imported:
    """Reads a file, or a folder as timm's on the hub.

    Args:
        path: of a safetensors or `torch.save` file, or of a folder with `model.safetensors` and `config.json`.
        architecture: one of `NAMES`. None: what `config.json` says; of a file, the one whose arrays it has.

    Raises:
        ConfigError: the architecture is unknown, or torch is needed and not installed.
        CheckpointError: the file is missing or damaged, or its arrays are not those of the architecture.
    """
    path, architecture, about = _look(path, architecture)
    state = read(path)
    architecture = architecture or _recognise(path, state)
    config, classes = make_config(architecture, about), _num_classes(state, path)
    return Imported(config, _class_names(classes), convert(state, models.create(architecture, classes), path, architecture))


def _look(path, architecture):
    """The file of the weights; the architecture, None where only the arrays tell it; and timm's `pretrained_cfg`."""
    about = {}
    if path.is_dir():
        about = _read_about(path) or {}
        architecture = architecture or about.get("architecture")
        path = path / portable.WEIGHTS
    if architecture is not None and architecture not in NAMES:
        raise ConfigError(f"architecture={architecture!r} is none of timm's halo models; use one of {', '.join(NAMES)}")
    return path, architecture, about.get("pretrained_cfg")


def make_config(architecture: str, pretrained: Mapping[str, Any] | None = None) -> ml_collections.ConfigDict:
    """Returns the config of a run with one of timm's models, in float32 and with timm's preprocessing.

    Args:
        architecture: one of `NAMES`.
        pretrained: timm's `pretrained_cfg`; what it says of preprocessing goes first.

    Raises:
        ConfigError: `pretrained` has impossible values.
    """
    about = {"image_size": 256, "eval_crop": 0.94, **_PREPROCESSING.get(architecture, {})}
    given = pretrained if isinstance(pretrained, Mapping) else {}
    try:
        if "input_size" in given:
            height, width = (int(side) for side in given["input_size"][-2:])
            about["image_size"] = height if height == width else (height, width)
        about |= {"eval_crop": float(given["crop_pct"])} if "crop_pct" in given else {}
        about |= {key: tuple(map(float, given[key])) for key in ("mean", "std") if key in given}
    except (TypeError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise ConfigError(
            f"pretrained_cfg of config.json has damaged preprocessing ({error}); delete it to take {architecture}'s own"
        ) from None
    config = config_lib.imagenet()
    config.model.name, config.model.dtype, config.model.bn_group_size = architecture, "float32", 0
    config.data.interpolation = "bicubic"
    for key, value in about.items():
        config.data[key] = value
    config_lib.validate(config, 1)
    return config


def read(path: epath.Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a file, by timm's keys.

    Args:
        path: of a safetensors file, or of one that `torch.save` wrote.

    Raises:
        ConfigError: torch is needed and not installed.
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
            rest = b"" if _is_torch(start) else file.read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); give a file of timm's weights") from None
    if _is_torch(start):
        state = _read_torch(path)
    else:
        try:
            state = safetensors.flax.load(start + rest)
        except Exception as error:  # of several types, by what is wrong
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{path} is neither a safetensors nor a torch.save file ({reason}); download it again"
            ) from None
    arrays = {key.removeprefix("module."): value for key, value in state.items()}
    return {key: np.asarray(value) for key, value in arrays.items() if not key.endswith("num_batches_tracked")}


def _is_torch(start):
    return start.startswith((b"PK\x03\x04", b"\x80"))  # a zip archive; a pickle, as old versions wrote


def _read_torch(path):
    try:
        import torch
    except ModuleNotFoundError:
        raise ConfigError(
            f"{path} is a torch.save file, which needs torch; pip install torch, or convert it where torch is: "
            "safetensors.torch.save_file(torch.load(…, weights_only=True), …)"
        ) from None
    try:
        state = torch.load(str(path), map_location="cpu", weights_only=True)
    except Exception as error:  # of many types
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} does not load as weights alone ({reason}); give a file of arrays") from None
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise CheckpointError(f"{path} holds no dict of arrays; give what torch.save(model.state_dict(), …) writes")
    return {str(key): (x.float() if x.is_floating_point() else x).numpy() for key, x in state.items()}


def convert(
    state: Mapping[str, np.ndarray], model: models.HaloNet, path: Any = "the state dict", architecture: str = "the model"
) -> dict[str, Any]:  # fmt: skip
    """Converts timm's arrays to variables of ours. Each array is used once.

    Args:
        state: arrays by timm's keys, without `num_batches_tracked`.
        model: of the same architecture, with `scan=False`.
        path: where the arrays are from, for messages.
        architecture: what messages call the model.

    Returns:
        `{"params": …, "batch_stats": …}` of `model`, NumPy float32.

    Raises:
        CheckpointError: an array is missing, unknown, of another shape, no floats, or not finite; the message names it.
    """
    found, expected = {}, rules(model)
    unknown = sorted(set(state) - {rule.key for rule in expected})
    missing = [rule.key for rule in expected if rule.key not in state]
    for keys, what in ((missing, "lacks"), (unknown, "has the unknown array")):
        if keys:
            raise CheckpointError(
                f"{path} {what} {keys[0]} ({len(keys)} in all), so that it is no {architecture}; give the file's own architecture"
            )
    for rule in expected:
        array = state[rule.key]
        if array.shape != rule.shape:
            raise CheckpointError(
                f"{path}: {rule.key} has shape {list(array.shape)}, where {architecture} has {list(rule.shape)}; give the file's "
                "own architecture"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating) or not np.isfinite(array.astype(np.float32)).all():
            raise CheckpointError(f"{path}: {rule.key} holds values that are not finite, or no floats; download it again")
        for target, transform in rule.targets.items():
            found[target] = np.ascontiguousarray(transform(array.astype(np.float32)))
    return _nested(found)


def rules(model: models.HaloNet) -> list[Rule]:
    """Returns what becomes of each array of timm's.

    Args:
        model: ours, with `scan=False`.
    """
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    shapes = {path: x.shape for path, x in _flat(shapes).items()}
    found = []
    for stem in sorted({path[2] for path in shapes if path[2].startswith("stem_conv")}):
        number, single = stem.removeprefix("stem_conv"), model.backbone.stem == "conv3"
        key = "stem" if single else f"stem.conv{number or 1}"
        found += _conv_norm(shapes, ("backbone",), key, stem, f"stem_norm{number}")
    for s, stage in enumerate(model.backbone.stages):
        for b, spec in enumerate(stage):
            found += _block(shapes, ("backbone", f"stage{s + 1}_block{b + 1}"), f"stages.{s}.{b}.", spec)
    if model.final_width:
        found += _conv_norm(shapes, (), "final_conv", "final_conv", "final_norm")
    found += _dense(shapes, ("classifier",), "head.fc")
    return found


def _block(shapes, path, key, spec) -> Iterator[Rule]:
    yield from _conv_norm(shapes, path, f"{key}conv1_1x1", "conv1", "norm1")
    if spec.kind == "conv":
        yield from _conv_norm(shapes, path, f"{key}conv2_kxk", "conv2", "norm2")
        if spec.gate == "se":
            yield from _dense(shapes, (*path, "se", "squeeze"), f"{key}attn.fc1", pixels=(1, 1))
            yield from _dense(shapes, (*path, "se", "excite"), f"{key}attn.fc2", pixels=(1, 1))
        elif spec.gate == "eca":
            yield Rule(f"{key}attn.conv.weight", (1, 1, spec.gate_size), {("params", *path, "eca", "kernel"): lambda w: w[0, 0]})
    else:
        yield from _norm(shapes, (*path, "norm2"), f"{key}post_attn")
        layer = _lambda if spec.kind == "lambda" else _attention
        yield from layer(shapes, (*path, "lambda" if spec.kind == "lambda" else "attention"), f"{key}self_attn.", spec)
    yield from _conv_norm(shapes, path, f"{key}conv3_1x1", "conv3", "norm3")
    if ("params", *path, "shortcut", "kernel") in shapes:
        yield from _conv_norm(shapes, path, f"{key}shortcut", "shortcut", "shortcut_norm")


def _attention(shapes, path, key, spec) -> Iterator[Rule]:
    heads, halo = spec.num_heads, spec.halo_size
    dim, value_dim = spec.channels // heads, spec.value_channels // heads
    parts = {"query": slice(0, heads * dim), "key": slice(heads * dim, 2 * heads * dim), "value": slice(2 * heads * dim, None)}
    if halo:
        yield Rule(f"{key}q.weight", (heads * dim, spec.width, 1, 1), {("params", *path, "query", "kernel"): _matrix})
        per_head = {"key": slice(0, dim), "value": slice(dim, None)}  # each head has its keys, then its values
        split = {name: functools.partial(_matrix, heads=heads, rows=rows) for name, rows in per_head.items()}
        targets = {("params", *path, name, "kernel"): transform for name, transform in split.items()}
        yield Rule(f"{key}kv.weight", (heads * (dim + value_dim), spec.width, 1, 1), targets)
    else:  # attention over the whole map
        yield _split_rows(f"{key}qkv.weight", shapes, path, parts)
    side = spec.block_size + 2 * halo
    for table, ours in (("height_rel", "rel_rows"), ("width_rel", "rel_cols")):
        # timm never reads the first rows, and does not scale the position term.
        crop = lambda t: t[2 * halo :] * np.float32(math.sqrt(dim))
        yield Rule(f"{key}pos_embed.{table}", (2 * side - 1, dim), {("params", *path, ours): crop})


def _lambda(shapes, path, key, spec) -> Iterator[Rule]:
    dim = spec.channels // spec.num_heads
    first, second = spec.channels, spec.channels + dim
    yield _split_rows(
        f"{key}qkv.weight", shapes, path, {"query": slice(0, first), "key": slice(first, second), "value": slice(second, None)}
    )
    yield from _norm(shapes, (*path, "norm_query"), f"{key}norm_q")
    yield from _norm(shapes, (*path, "norm_value"), f"{key}norm_v")
    size = spec.context_size
    kernel = {("params", *path, "position", "kernel"): lambda w: w[..., 0].transpose(2, 3, 1, 0)}
    yield Rule(f"{key}conv_lambda.weight", (dim, 1, size, size, 1), kernel)
    yield Rule(f"{key}conv_lambda.bias", (dim,), {("params", *path, "position", "bias"): _same})


def _split_rows(key, shapes, path, parts):
    kernels = {name: ("params", *path, name, "kernel") for name in parts}
    rows, inputs = sum(shapes[kernel][1] for kernel in kernels.values()), shapes[kernels["query"]][0]
    return Rule(key, (rows, inputs, 1, 1), {kernels[name]: functools.partial(_matrix, rows=part) for name, part in parts.items()})


def _matrix(w, heads=1, rows=slice(None)):
    """`[O, C, 1, 1] -> [C, o]`: of each head's rows those named."""
    return w.reshape(heads, -1, w.shape[1])[:, rows].reshape(-1, w.shape[1]).T


def _same(x):
    return x


def _conv_norm(shapes, path, key, conv, norm) -> Iterator[Rule]:
    target = ("params", *path, conv, "kernel")
    height, width, inputs, outputs = shapes[target]
    yield Rule(f"{key}.conv.weight", (outputs, inputs, height, width), {target: lambda w: w.transpose(2, 3, 1, 0)})
    yield from _norm(shapes, (*path, norm), f"{key}.bn")


def _norm(shapes, path, key) -> Iterator[Rule]:
    for theirs, collection, ours in (
        ("weight", "params", "scale"), ("bias", "params", "bias"),
        ("running_mean", "batch_stats", "mean"), ("running_var", "batch_stats", "var"),
    ):  # fmt: skip
        target = (collection, *path, ours)
        yield Rule(f"{key}.{theirs}", shapes[target], {target: _same})


def _dense(shapes, path, key, pixels=()) -> Iterator[Rule]:
    """A layer with bias; `pixels` are the axes that it has as a 1x1 convolution."""
    inputs, outputs = shapes["params", *path, "kernel"]
    yield Rule(f"{key}.weight", (outputs, inputs, *pixels), {("params", *path, "kernel"): lambda w: w.reshape(w.shape[:2]).T})
    yield Rule(f"{key}.bias", (outputs,), {("params", *path, "bias"): _same})


def _num_classes(state, path):
    weight = state.get("head.fc.weight")
    if weight is None or np.ndim(weight) != 2 or not len(weight):
        raise CheckpointError(f"{path} has no head.fc.weight [classes, channels]; give timm's weights with their classifier")
    return len(weight)


def _recognise(path, state):
    """The architecture that has exactly these arrays."""
    shapes = {key: x.shape for key, x in state.items()}
    classes, wrong = _num_classes(state, path), {}
    for name in NAMES:
        expected = {rule.key: rule.shape for rule in rules(models.create(name, classes))}
        wrong[name] = sum(shapes.get(key) != expected.get(key) for key in shapes.keys() | expected.keys())
        if not wrong[name]:
            return name
    nearest = min(wrong, key=wrong.get)
    raise CheckpointError(
        f"{path} has the arrays of none of {', '.join(NAMES)}; {nearest} is nearest, from which {wrong[nearest]} arrays "
        f"differ; give architecture={nearest!r} to see which"
    )


def _read_about(folder):
    try:
        about = json.loads((folder / portable.CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return about if isinstance(about, dict) else None


def _class_names(number):
    """WordNet ids from the copy in tensorflow_datasets, in its order, which is timm's too."""
    spec = importlib.util.find_spec("tensorflow_datasets")
    for folder in spec.submodule_search_locations if spec and number == 1000 else ():
        path = Path(folder, "datasets", "imagenet2012", "labels.txt")
        names = path.read_text().split() if path.is_file() else ()
        if len(names) == number:
            return names
    return [str(n) for n in range(number)]


def _flat(tree):
    return {tuple(entry.key for entry in path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _nested(flat):
    tree = {}
    for path, x in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = x
    return tree
