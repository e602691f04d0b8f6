"""Every knob of a run: key, default, allowed values, unit, source and meaning, in one table for each section.

Set a knob on the command line as `--config.SECTION.KEY=VALUE`, for example `--config.data.image_size=224`. The knobs of
the table `RUN` have no section: `--config.batch_size=1024`. A recipe in `configs/` sets only the knobs that it changes.

Allowed values: `Whole(a, b)` is a whole number and `Real(a, b)` any number from a to b, both included; a `Whole`
    without
an upper bound ends at 2**31 - 1. `Choice` is one of the names listed. `Tuple(rule, a, b)` has a to b elements.

Sources:
- PAPER: arXiv 2103.12731 states the value (section 4 and appendix, for training on ImageNet from scratch).
- IMPLIED: the paper uses the technique but does not state the value.
- OPEN: the paper says nothing; the value is our choice.
- OURS: the knob concerns this program, not the paper.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections
from ml_collections.config_dict import placeholder

from halonet_jax.config.rules import Choice, EmptyOr, Real, Rule, Switch, Text, Tuple, Whole
from halonet_jax.models import variants
from halonet_jax.ops import selection
from halonet_jax.ops.halo_attention import PADDINGS, WINDOWS

PAPER, IMPLIED, OPEN, OURS = "paper", "implied", "open", "ours"
DTYPES = ("float32", "bfloat16")
SOURCES = ("tfds", "folder", "digits")
OPTIMIZERS = ("sgd", "adamw", "lamb")


class Knob(NamedTuple):
    """One setting of a run.

    Attributes:
        key: its name within the section.
        default: the value unless a recipe sets another. None: the model variant sets it.
        allowed: the rule that values obey.
        unit: of the value; "" where it has no unit.
        source: PAPER, IMPLIED, OPEN or OURS, as explained at the top of this module.
        meaning: what it does.
        example: a value that error messages propose. None: they propose the default.
    """

    key: str
    default: Any
    allowed: Rule
    unit: str
    source: str
    meaning: str
    example: Any = None


# fmt: off
RUN = (
    Knob("seed", 0, Whole(0, 2**63 - 1), "", OURS,  # the largest that jax.random.key takes
         "of initial parameters, order of examples, augmentation and dropout"),
    Knob("task", "classification", Text(), "", OURS, "what is trained; `halonet_jax.tasks` has the names"),
    Knob("batch_size", 4096, Whole(1, 2**20), "images", PAPER, "of a step, over all devices and hosts"),
    Knob("eval_batch_size", 0, Whole(0, 2**20), "images", OURS, "of an evaluation step, over all devices; 0: as batch_size"),
    Knob("num_epochs", 350.0, Real(0, 1e6), "epochs", PAPER, "length of the run and of the learning-rate schedule"),
    Knob("max_steps", 0, Whole(0), "steps", OURS, "ends the run early, with the schedule unchanged; 0: all epochs"),
    Knob("label_smoothing", 0.1, Real(0, 0.999), "", IMPLIED, "probability moved from the label to all classes"),
    Knob("ema_decay", 0.9999, Real(0, 0.999999), "", IMPLIED, "of the parameters' moving average; 0: no average"),
    Knob("on_non_finite", "stop", Choice(("stop", "skip")), "", OURS,
         "on a loss or gradient that is not finite: stop, or go back to the last checkpoint and skip the bad batches"),
    Knob("tensorboard", True, Switch(), "", OURS, "write TensorBoard files beside metrics.jsonl; needs TensorFlow"),
    Knob("hang_timeout", 1800.0, Real(0, 1e9), "seconds", OURS, "without a step, after which the process ends; 0: never"),
    Knob("profile_steps", (), EmptyOr(Tuple(Whole(1), 2, 2, rising=True)), "steps", OURS,
         "first and last step to profile; the profile goes to WORKDIR/profile; (): none", (100, 110)),
    Knob("log_every_steps", 100, Whole(1), "steps", OURS, "between two reports of training metrics"),
    Knob("eval_every_epochs", 5.0, Real(0, 1e6), "epochs", OURS, "between two evaluations; 0: only at the end"),
    Knob("checkpoint_every_steps", 1000, Whole(1), "steps", OURS, "between two checkpoints"),
    Knob("checkpoints_to_keep", 2, Whole(1), "checkpoints", OURS, "the newest ones; the best evaluated one stays as well"),
)

MODEL = (
    Knob("name", "h0", Choice(tuple(variants.VARIANTS)), "", PAPER, "the variant; `halonet_jax/models/variants.py` has all"),
    Knob("dtype", "bfloat16", Choice(DTYPES), "", OURS, "of activations; parameters and batch statistics stay float32"),
    Knob("stochastic_depth_rate", 0.0, Real(0, 0.999), "", IMPLIED, "drop rate of the last block; rises linearly from 0"),
    Knob("dropout_rate", 0.0, Real(0, 0.999), "", OPEN, "before the classifier"),
    Knob("bn_group_size", 64, Whole(0, 2**20), "images", OPEN, "that share batch-norm statistics; 0: the whole (micro-)batch"),
    Knob("bn_momentum", 0.9, Real(0, 0.999999), "", OPEN, "of the running batch-norm statistics"),
    Knob("bn_epsilon", 1e-5, Real(0, 1), "", OPEN, "added to the variance in batch norm"),
    Knob("zero_init_residual", True, Switch(), "", OPEN, "every block starts as its shortcut"),
    Knob("padding", "mask", Choice(PADDINGS), "", OPEN, "keys outside of the image: masked, or zeros"),
    Knob("window", "neighborhood", Choice(WINDOWS), "", PAPER,
         "a query sees its block's whole neighbourhood, or only a window centred on the query (SASA)"),
    Knob("attention_impl", "auto", Choice(selection.NAMES), "", OURS,
         "auto: the fastest for device and shape; pallas: fused kernels for TPU and GPU"),
    Knob("remat", False, Switch(), "", OURS, "recompute each block's activations in the backward pass: less memory, more time"),
    Knob("scan", False, Switch(), "", OURS, "loop over a stage's equal blocks: quick to compile, more memory traffic"),
    # From here on, None is the variant's own value, from `halonet_jax/models/variants.py`.
    Knob("block_size", None, Whole(1, 1024), "positions", PAPER, "side of a block of queries (b)"),
    Knob("halo_size", None, Whole(0, 1024), "positions", PAPER, "border around the block that keys come from as well (h)"),
    Knob("stage_sizes", None, Tuple(Whole(1, 1000), 4, 4), "blocks", PAPER, "depth of each of the four stages"),
    Knob("base_width", None, Whole(1, 2**16), "channels", PAPER, "of the first stage; doubles at each stage"),
    Knob("stem_width", None, Whole(1, 2**16), "channels", PAPER, "of the stem's output"),
    Knob("value_ratio", None, Real(0.001, 1000), "", PAPER, "width of the values over that of the queries (r_v)"),
    Knob("expansion_ratio", None, Real(0.001, 1000), "", PAPER, "a block's output width over its inner width (r_b)"),
    Knob("final_width", None, Whole(0, 2**16), "channels", PAPER, "of the last 1x1 convolution (d_f); 0: none"),
    Knob("stage_kinds", None, Tuple(Text(), 4, 4), "", PAPER, "spatial layer of each stage: attention or conv"),
    Knob("num_heads", None, Tuple(Whole(1, 2**16), 4, 4), "heads", PAPER, "of each stage's attention"),
    Knob("stem", None, Text(), "", PAPER, "conv: 7x7 and max pool; patch: one 4x4 convolution of stride 4"),
    Knob("se_kinds", None, Tuple(Text(), 1, 2), "", OPEN, "blocks that have squeeze-and-excitation: attention, conv"),
    Knob("se_ratio", None, Real(0, 1), "", OPEN, "squeeze-and-excitation's inner width over the block's; 0: off"),
    Knob("activation", None, Text(), "", PAPER, "silu or relu"),
)

DATA = (
    Knob("source", "tfds", Choice(SOURCES), "", OURS, "where images come from"),
    Knob("name", "imagenet2012", Text(), "", PAPER, "of the TFDS dataset"),
    Knob("dir", "", Text(may_be_empty=True), "", OURS, "TFDS's data folder, or the root of an image folder"),
    Knob("train_split", "train", Text(), "", PAPER, "split to train on"),
    Knob("eval_split", "validation", Text(), "", PAPER, "split to evaluate on"),
    Knob("image_size", 256, Whole(8, 8192), "pixels", PAPER, "side of the square image that the model sees"),
    Knob("max_pixels", 2**27, Whole(1, 2**40), "pixels", OURS,
         "an image with more is treated as corrupt; protects against files whose header claims a huge size"),
    Knob("eval_crop", 0.875, Real(0.01, 1), "", OPEN, "side of the central crop over the image's shorter side"),
    Knob("crop_scale", (0.08, 1.0), Tuple(Real(1e-6, 1), 2, 2, rising=True), "", OPEN,
         "random resized crop: least and greatest share of the image's area"),
    Knob("crop_ratio", (3 / 4, 4 / 3), Tuple(Real(0.01, 100), 2, 2, rising=True), "", OPEN,
         "random resized crop: least and greatest width over height"),
    Knob("flip", True, Switch(), "", OPEN, "horizontally, with probability 1/2"),
    Knob("randaugment_layers", 2, Whole(0, 100), "operations", IMPLIED, "that RandAugment applies to an image; 0: off"),
    Knob("randaugment_magnitude", 10.0, Real(0, 1000), "", PAPER, "strength of RandAugment; grows with the model"),
    Knob("randaugment_ops", (), Tuple(Text(), 0, 100), "", OPEN,
         "operations to draw from, named as in `data/randaugment.py`; (): all", ()),
    Knob("mixup_alpha", 0.0, Real(0, 1e6), "", OPEN, "mixing weights come from Beta(alpha, alpha); 0: no mixup"),
    Knob("cutmix_alpha", 0.0, Real(0, 1e6), "", OPEN, "shares of area come from Beta(alpha, alpha); 0: no CutMix"),
    Knob("mean", (0.485, 0.456, 0.406), Tuple(Real(-1000, 1000), 3, 3), "", OPEN, "of red, green, blue in [0, 1]; subtracted"),
    Knob("std", (0.229, 0.224, 0.225), Tuple(Real(1e-6, 1000), 3, 3), "", OPEN, "of red, green, blue in [0, 1]; divides"),
    Knob("on_corrupt", "skip", Choice(("skip", "stop")), "", OURS, "an image that does not decode: name and count it, or stop"),
    Knob("num_threads", 16, Whole(1, 4096), "threads", OURS, "that read and decode, in each process"),
    Knob("num_workers", 0, Whole(0, 4096), "processes", OURS, "that read and decode, on each host; 0: threads only"),
    Knob("prefetch", 4, Whole(1, 4096), "batches", OURS, "kept ready on the host"),
)

OPTIMIZER = (
    Knob("name", "sgd", Choice(OPTIMIZERS), "", PAPER, "sgd has Nesterov momentum"),
    Knob("momentum", 0.9, Real(0, 0.999999), "", OPEN, "of sgd"),
    Knob("b1", 0.9, Real(0, 0.999999), "", OURS, "decay of adamw's and lamb's first moment"),
    Knob("b2", 0.999, Real(0, 0.999999), "", OURS, "decay of adamw's and lamb's second moment"),
    Knob("weight_decay", 2e-5, Real(0, 1000), "", PAPER, "of kernels; not of norms, biases and relative tables (OPEN)"),
    Knob("clip_norm", 0.0, Real(0, 1e9), "", OPEN, "greatest global norm of the gradient; 0: no clipping"),
    Knob("accumulation_steps", 1, Whole(1, 2**20), "micro-batches", OURS, "that make one step"),
)

SCHEDULE = (
    Knob("learning_rate", 0.1, Real(0, 1e6), "", PAPER, "peak for learning_rate_batch_size images; scales with batch_size"),
    Knob("learning_rate_batch_size", 256, Whole(0), "images", PAPER, "see learning_rate; 0: the rate is not scaled"),
    Knob("warmup_epochs", 10.0, Real(0, 1e6), "epochs", PAPER, "of linear rise from 0; at most num_epochs"),
    Knob("end_factor", 1 / 128, Real(0, 1), "", PAPER, "where the cosine ends, as a share of the peak"),
)

MESH = (
    Knob("fsdp", 1, Whole(1, 2**20), "devices", OURS, "that share one copy of parameters, optimizer state and average"),
)
# fmt: on

# Section name to its table; "" holds the knobs without a section. A task may pass another mapping to `build`,
# `recipes.imagenet`, `serialization.from_json` and `validation.validate`.
SECTIONS: Mapping[str, tuple[Knob, ...]] = {
    "": RUN, "model": MODEL, "data": DATA, "optimizer": OPTIMIZER, "schedule": SCHEDULE, "mesh": MESH,
}  # fmt: skip


def build(sections: Mapping[str, tuple[Knob, ...]] = SECTIONS) -> ml_collections.ConfigDict:
    """Returns a locked config in which every knob of `sections` has its default.

    Args:
        sections: the tables by section name, "" for the knobs without a section.
    """
    config = ml_collections.ConfigDict()
    for section, table in sections.items():
        block = config if not section else ml_collections.ConfigDict()
        for knob in table:
            block[knob.key] = placeholder(knob.allowed.type) if knob.default is None else knob.default
        if section:
            config[section] = block
    return config.lock()


def by_path(sections: Mapping[str, tuple[Knob, ...]] = SECTIONS) -> dict[str, Knob]:
    """Returns the knobs by full key, such as "seed" or "data.image_size".

    Args:
        sections: the tables by section name, "" for the knobs without a section.
    """
    return {f"{section}.{knob.key}".lstrip("."): knob for section, table in sections.items() for knob in table}
