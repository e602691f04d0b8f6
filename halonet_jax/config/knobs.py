"""Every knob of a run: key, default, allowed values, unit, source and meaning, in one table for each section.

Set a knob on the command line as `--config.SECTION.KEY=VALUE`, for example `--config.data.image_size=224`. The knobs of
the table `RUN` have no section: `--config.batch_size=1024`. A recipe in `configs/` sets only the knobs that it changes.

Allowed values: `Whole(a, b)` is a whole number and `Real(a, b)` any number from a to b, both included; a `Whole` without
an upper bound ends at 2**31 - 1. `Size(a, b)` is a whole number or a pair of them, (height, width). `Choice` is one of the
names listed. `Tuple(rule, a, b)` has a to b elements.

Sources:
- PAPER: arXiv 2103.12731 states the value (section 4 and appendix, for training on ImageNet from scratch).
- IMPLIED: the paper uses the technique but does not state the value.
- OPEN: the paper says nothing; the value is our choice.
- OURS: the knob concerns this program, not the paper.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections
from ml_collections.config_dict import FieldReference

from halonet_jax.config.rules import Choice, EmptyOr, Real, Rule, Size, Switch, Text, Tuple, Whole
from halonet_jax.models import checks, variants
from halonet_jax.ops import selection
from halonet_jax.ops.halo_attention import PADDINGS, WINDOWS

PAPER, IMPLIED, OPEN, OURS = "paper", "implied", "open", "ours"
DTYPES = ("float32", "bfloat16")
SOURCES = ("tfds", "folder", "digits", "digit_scenes", "coco")
SCENE_LABELS = ("most", "left", "largest")
INTERPOLATIONS = ("area_bicubic", "bicubic")
OPTIMIZERS = ("sgd", "adamw", "lamb")
DETECTORS = ("paper", "detectron2")


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
    Knob("seed", 0, Whole(0, 2**63 - 1), "", OURS,  # upper limit of jax.random.key
         "seed of initial parameters, order of examples, augmentation and dropout"),
    Knob("task", "classification", Text(), "", OURS, "name of the task, from `halonet_jax.tasks`: classification or detection"),
    Knob("init_from", "", Text(may_be_empty=True), "", PAPER,
         "weights to start from: a workdir, a folder of halonet_jax.export, or hf://OWNER/NAME; empty: random ones"),
    Knob("batch_size", 4096, Whole(1, 2**20), "images", PAPER, "size of a training batch, over all devices and hosts"),
    Knob("eval_batch_size", 0, Whole(0, 2**20), "images", OURS, "size of an evaluation batch; 0: batch_size"),
    Knob("num_epochs", 350.0, Real(0, 1e6), "epochs", PAPER, "length of the run and of the learning-rate schedule"),
    Knob("max_steps", 0, Whole(0), "steps", OURS,
         "the run ends after this step; the schedule does not change; 0: no limit"),
    Knob("label_smoothing", 0.1, Real(0, 0.999), "", IMPLIED, "probability moved from the label to all classes"),
    Knob("ema_decay", 0.9999, Real(0, 0.999999), "", IMPLIED,
         "decay of the moving average of the weights; 0: no average"),
    Knob("on_non_finite", "stop", Choice(("stop", "skip")), "", OURS,
         "if a loss or gradient is not finite: stop, or go back to the last checkpoint and skip the bad batches"),
    Knob("tensorboard", True, Switch(), "", OURS, "also write TensorBoard files; needs TensorFlow"),
    Knob("hang_timeout", 1800.0, Real(0, 1e9), "seconds", OURS,
         "the process ends after this time without progress; 0: never"),
    Knob("profile_steps", (), EmptyOr(Tuple(Whole(1), 2, 2, rising=True)), "steps", OURS,
         "first and last step to profile, into WORKDIR/profile; (): no profile", (100, 110)),
    Knob("log_every_steps", 100, Whole(1), "steps", OURS, "interval of reports of training metrics"),
    Knob("eval_every_epochs", 5.0, Real(0, 1e6), "epochs", OURS, "interval of evaluations; 0: only at the end"),
    Knob("checkpoint_every_steps", 1000, Whole(1), "steps", OURS, "interval of checkpoints"),
    Knob("checkpoints_to_keep", 2, Whole(1), "checkpoints", OURS,
         "number of newest checkpoints to keep, in addition to the best"),
)

MODEL = (
    Knob("name", "h0", Choice(tuple(variants.VARIANTS)), "", PAPER,
         "model variant, from `halonet_jax/models/variants.py`"),
    Knob("dtype", "bfloat16", Choice(DTYPES), "", OURS,
         "dtype of activations; parameters and batch statistics are float32"),
    Knob("stochastic_depth_rate", 0.0, Real(0, 0.999), "", IMPLIED,
         "drop rate of the last block; rises linearly from 0"),
    Knob("dropout_rate", 0.0, Real(0, 0.999), "", OPEN, "rate of dropout before the classifier"),
    Knob("bn_group_size", 64, Whole(0, 2**20), "images", OPEN,
         "size of a batch-norm group; 0: the whole (micro-)batch"),
    Knob("bn_momentum", 0.9, Real(0, 0.999999), "", OPEN, "momentum of the running batch-norm statistics"),
    Knob("bn_epsilon", 1e-5, Real(0, 1), "", OPEN, "added to the variance in batch norm"),
    Knob("zero_init_residual", True, Switch(), "", OPEN, "residual branches start at zero"),
    Knob("window", "neighborhood", Choice(WINDOWS), "", PAPER,
         "a query sees the whole neighbourhood of its block, or only a window centred on itself (SASA)"),
    Knob("attention_impl", "auto", Choice(selection.NAMES), "", OURS,
         "auto: the fastest for platform and shape; pallas: fused kernels for TPU and GPU"),
    Knob("remat", False, Switch(), "", OURS, "recompute activations in the backward pass: less memory, more time"),
    Knob("scan", False, Switch(), "", OURS,
         "loop over the equal blocks of a stage: compiles faster, more memory traffic"),
    Knob("freeze", (), Tuple(Text(), 0, 100), "", OURS,
         "patterns of parameters that are not trained, batch-norm statistics included, such as backbone/stage1_*",
         ("backbone/stem*", "backbone/stage1_*")),
    Knob("bn_frozen", False, Switch(), "", OURS,
         "the backbone's batch norms keep statistics, scale and bias of init_from; those of a detector's other parts are trained"),
    # From here on, None means the value of the variant, from `halonet_jax/models/variants.py`.
    Knob("block_size", None, Whole(1, 1024), "positions", PAPER, "side of a block of queries (b)"),
    Knob("halo_size", None, Whole(0, 1024), "positions", PAPER, "width of the halo around a block (h)"),
    Knob("stage_sizes", None, Tuple(Whole(1, 1000), 4, 4), "blocks", PAPER,
         "number of blocks in each of the four stages"),
    Knob("base_width", None, Whole(1, 2**16), "channels", PAPER, "width of the first stage; each stage doubles it"),
    Knob("stem_width", None, Whole(1, 2**16), "channels", PAPER, "width of the stem's output"),
    Knob("query_ratio", None, Real(0.001, 1000), "", PAPER,
         "width of queries and keys over a block's inner width (r_qk)"),
    Knob("value_ratio", None, Real(0.001, 1000), "", PAPER, "width of the values over a block's inner width (r_v)"),
    Knob("expansion_ratio", None, Real(0.001, 1000), "", PAPER, "a block's output width over its inner width (r_b)"),
    Knob("final_width", None, Whole(0, 2**16), "channels", PAPER,
         "width of the last 1x1 convolution (d_f); 0: no such layer"),
    Knob("stage_kinds", None, Tuple(Text(), 4, 4), "", PAPER, "spatial layer of each stage: attention or conv"),
    Knob("num_heads", None, Tuple(Whole(1, 2**16), 4, 4), "heads", PAPER, "number of heads in each stage"),
    Knob("stem", None, Text(), "", PAPER,
         "conv: 7x7 convolution and max pool; patch: 4x4 convolution of stride 4; or one of timm's, see models/stems.py"),
    Knob("se_kinds", None, Tuple(Text(), 1, 2), "", OPEN,
         "kinds of blocks with squeeze-and-excitation: attention, conv"),
    Knob("se_ratio", None, Real(0, 1), "", OPEN,
         "inner width of squeeze-and-excitation over the block's width; 0: off"),
    Knob("positions", None, Choice(checks.POSITIONS), "", PAPER,
         "relative: the paper's tables; absolute: embeddings of rows and columns in the keys (how is OPEN); or none"),
    Knob("downsampling", None, Choice(variants.DOWNSAMPLINGS), "", PAPER,
         "strided: every second pixel per axis attends; pooled: all do, and the mean of 2x2 pixels follows"),
    Knob("padding", None, Choice(PADDINGS), "", OPEN, "keys outside the map: masked, or zeros; mask in the paper's models"),
    Knob("activation", None, Text(), "", PAPER, "activation function: silu or relu"),
)

DATA = (
    Knob("source", "tfds", Choice(SOURCES), "", OURS, "where images come from"),
    Knob("name", "imagenet2012", Text(), "", PAPER, "name of the TFDS data set"),
    Knob("dir", "", Text(may_be_empty=True), "", OURS,
         "TFDS data folder, or root of an image folder or of a data set in COCO's layout"),
    Knob("train_split", "train", Text(), "", PAPER, "split to train on, or a slice of it, such as train[:10%] or train[:100]"),
    Knob("eval_split", "validation", Text(), "", PAPER, "split to evaluate on, or a slice of it"),
    Knob("label_key", "label", Text(), "", OURS, "feature of the TFDS data set that is the label"),
    Knob("classes", (), Tuple(Text(), 0, 2**15), "", OURS,
         "names of the classes to keep, in any order; labels follow the data set's order; not with tfds; (): all",
         ("5", "6", "7")),
    Knob("image_size", 256, Size(8, 8192), "pixels", PAPER,
         "side of the model's square input, or (height, width) of a rectangular one (OURS)"),
    Knob("max_pixels", 2**27, Whole(1, 2**40), "pixels", OURS,
         "an image with more pixels counts as corrupt; protects against headers that claim a huge size"),
    Knob("eval_crop", 0.875, Real(0.01, 1), "", OPEN,
         "side of the central crop over that of the largest crop of its shape; for squares: over the image's shorter side"),
    Knob("interpolation", "area_bicubic", Choice(INTERPOLATIONS), "", OPEN,
         "area_bicubic: averages of 2x2 pixels, then bicubic, by OpenCV; bicubic: antialiased, by Pillow, as in timm"),
    Knob("crop_scale", (0.08, 1.0), Tuple(Real(1e-6, 1), 2, 2, rising=True), "", OPEN,
         "random resized crop: range of the share of the image's area"),
    Knob("crop_ratio", (3 / 4, 4 / 3), Tuple(Real(0.01, 100), 2, 2, rising=True), "", OPEN,
         "random resized crop: range of width over height, relative to that of image_size"),
    Knob("flip", True, Switch(), "", OPEN, "flip images horizontally, with probability 1/2"),
    Knob("randaugment_layers", 2, Whole(0, 100), "operations", IMPLIED,
         "number of RandAugment operations per image; 0: off"),
    Knob("randaugment_magnitude", 10.0, Real(0, 1000), "", PAPER, "strength of RandAugment; larger models use more"),
    Knob("randaugment_ops", (), Tuple(Text(), 0, 100), "", OPEN,
         "RandAugment operations to draw from, by their names in `data/randaugment.py`; (): all", ()),
    Knob("mixup_alpha", 0.0, Real(0, 1e6), "", OPEN, "mixup draws weights from Beta(alpha, alpha); 0: no mixup"),
    Knob("cutmix_alpha", 0.0, Real(0, 1e6), "", OPEN,
         "CutMix draws shares of the area from Beta(alpha, alpha); 0: no CutMix"),
    Knob("mean", (0.485, 0.456, 0.406), Tuple(Real(-1000, 1000), 3, 3), "", OPEN, "mean of red, green, blue in [0, 1]"),
    Knob("std", (0.229, 0.224, 0.225), Tuple(Real(1e-6, 1000), 3, 3), "", OPEN,
         "standard deviation of red, green, blue in [0, 1]"),
    Knob("scene_label", "most", Choice(SCENE_LABELS), "", OURS,
         "label of a digit scene: the digit that occurs most often, the one left of the framed one, or the largest one"),
    Knob("scene_size", 64, Whole(48, 256), "pixels", OURS, "side of a digit scene's square canvas"),
    Knob("scene_difficulty", 0.0, Real(0, 1), "", OURS,
         "more: more digits in a digit scene, of more different sizes, more clutter and noise, less contrast"),
    Knob("num_train_scenes", 20_000, Whole(1), "scenes", OURS, "number of digit scenes to train on"),
    Knob("num_eval_scenes", 2_000, Whole(1), "scenes", OURS, "number of digit scenes to evaluate on"),
    Knob("on_corrupt", "skip", Choice(("skip", "stop")), "", OURS,
         "skip and count a corrupt image or annotation, or stop"),
    Knob("num_threads", 16, Whole(1, 4096), "threads", OURS, "threads for reading and decoding, in each process"),
    Knob("num_workers", 0, Whole(0, 4096), "processes", OURS,
         "processes for reading and decoding, on each host; 0: only threads"),
    Knob("prefetch", 4, Whole(1, 4096), "batches", OURS, "batches to prepare in advance"),
    # From here on, for detection.
    Knob("annotations", "annotations/instances_{split}.json", Text(), "", OURS,
         "COCO's file of a split's objects, from dir on; {split} stands for the split"),
    Knob("images", "{split}", Text(), "", OURS, "folder of a split's images in COCO's layout, likewise"),
    Knob("max_objects", 100, Whole(1, 10000), "objects", OPEN, "most objects of an image in training; others are left out"),
    Knob("scale_jitter", (0.8, 1.25), Tuple(Real(0.01, 100), 2, 2, rising=True), "", PAPER,
         "range of the scale in training, over that at which the image fits; (0.1, 2.0): large-scale jitter"),
)

OPTIMIZER = (
    Knob("name", "sgd", Choice(OPTIMIZERS), "", PAPER, "optimizer"),
    Knob("momentum", 0.9, Real(0, 0.999999), "", OPEN, "momentum of sgd"),
    Knob("nesterov", True, Switch(), "", OPEN, "Nesterov momentum, for sgd; False in the paper's detectors"),
    Knob("b1", 0.9, Real(0, 0.999999), "", OURS, "decay of the first moment, for adamw and lamb"),
    Knob("b2", 0.999, Real(0, 0.999999), "", OURS, "decay of the second moment, for adamw and lamb"),
    Knob("weight_decay", 2e-5, Real(0, 1000), "", PAPER,
         "weight decay of kernels; norms, biases and tables of positions have none (OPEN)"),
    Knob("clip_norm", 0.0, Real(0, 1e9), "", OPEN, "upper limit of the gradient's global norm; 0: no clipping"),
    Knob("layer_decay", 1.0, Real(0.01, 1), "", OURS,
         "the learning rate of each block over that of the block above it, for fine-tuning; 1: all the same"),
    Knob("accumulation_steps", 1, Whole(1, 2**20), "micro-batches", OURS, "number of micro-batches per step"),
)

DETECTION = (
    Knob("recipe", "paper", Choice(DETECTORS), "", PAPER,
         "conventions of Mask R-CNN, see `detection/spec.py`: the paper's, or those of detectron2"),
    # None means the value of the recipe.
    Knob("width", None, Whole(1, 2**16), "channels", PAPER, "of the feature pyramid and of the heads' convolutions", 256),
    Knob("anchor_size", None, Real(0.001, 1000), "strides", PAPER, "side of a square anchor, in strides of its level", 8.0),
    Knob("candidates", None, Whole(2, 2**20), "boxes", PAPER,
         "of a level, before overlapping ones are left out; half as many in evaluation", 2000),
    Knob("proposals", None, Whole(1, 2**20), "boxes", PAPER, "of an image, for the second stage", 1000),
    Knob("roi_samples", None, Whole(1, 2**20), "regions", PAPER, "of an image, that the second stage is trained on", 512),
    Knob("roi_base_size", None, Real(1, 2**16), "pixels", PAPER, "side of a region that is cut from the level of stride 16",
         224.0),
    Knob("box_dense", None, Tuple(Whole(1, 2**16), 0, 10), "channels", PAPER, "of the box head's dense layers",
         (1024, 1024)),
    Knob("mask_convs", None, Whole(0, 100), "layers", PAPER, "3x3 convolutions of the mask head", 4),
    Knob("detections", None, Whole(1, 2000), "objects", PAPER, "most detections of an image", 100),
)

SCHEDULE = (
    Knob("learning_rate", 0.1, Real(0, 1e6), "", PAPER,
         "peak rate for a batch of learning_rate_batch_size; scales with batch_size"),
    Knob("learning_rate_batch_size", 256, Whole(0), "images", PAPER, "see learning_rate; 0: no scaling"),
    Knob("warmup_epochs", 10.0, Real(0, 1e6), "epochs", PAPER,
         "length of the linear warm-up; at most num_epochs"),
    Knob("warmup_start_factor", 0.0, Real(0, 1), "", PAPER,
         "start of the warm-up, as a share of the peak: 0, or 1/15 in the paper's detectors"),
    Knob("end_factor", 1 / 128, Real(0, 1), "", PAPER, "end of the cosine, as a share of the peak"),
    Knob("milestones", (), EmptyOr(Tuple(Real(0, 1e6), 1, 100, rising=True)), "epochs", PAPER,
         "when the rate is multiplied by milestone_factor, in place of the cosine (the paper's detectors); (): the cosine",
         (60.0, 65.0)),
    Knob("milestone_factor", 0.1, Real(0, 1), "", PAPER, "see milestones"),
)

MESH = (
    Knob("fsdp", 1, Whole(1, 2**20), "devices", OURS,
         "number of devices that share one copy of parameters, optimizer state and EMA"),
)
# fmt: on

# Section name to its table; "" holds the knobs without a section. A task may pass another mapping to `build`,
# `recipes.imagenet`, `serialization.from_json` and `validation.validate`.
SECTIONS: Mapping[str, tuple[Knob, ...]] = {
    "": RUN, "model": MODEL, "data": DATA, "detection": DETECTION, "optimizer": OPTIMIZER, "schedule": SCHEDULE,
    "mesh": MESH,
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
            # A reference keeps its type: `None` has none, and a `Size` is a number or a tuple.
            typed = knob.default is None or knob.allowed.type is object
            block[knob.key] = FieldReference(knob.default, knob.allowed.type) if typed else knob.default
        if section:
            config[section] = block
    return config.lock()


def by_path(sections: Mapping[str, tuple[Knob, ...]] = SECTIONS) -> dict[str, Knob]:
    """Returns the knobs by full key, such as "seed" or "data.image_size".

    Args:
        sections: the tables by section name, "" for the knobs without a section.
    """
    return {f"{section}.{knob.key}".lstrip("."): knob for section, table in sections.items() for knob in table}
