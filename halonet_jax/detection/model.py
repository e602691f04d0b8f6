"""Mask R-CNN (arXiv 1703.06870) on a backbone of this package: parameters, losses and detections as pure functions.

    model = MaskRCNN(models.create("resnet50_se_halo", bn_momentum=0.997, bn_epsilon=1e-4).backbone, spec.PAPER)
    params, state = init(model, jax.random.key(0))
    loss, (state, metrics) = losses(model, params, state, batch, jax.random.key(1))
    found = detect(model, params, state, batch)

A batch is a dict of arrays, images first:

    image    `[B, H, W, 3]`, normalised, padded at the bottom and on the right
    size     `[B, 2]`, height and width without padding, pixels
    boxes    `[B, G, 4]`, of the objects, padded to G of them; (y0, x0, y1, x1), pixels
    classes  int `[B, G]`, from 1
    valid    bool `[B, G]`, False for padding
    masks    uint8 `[B, G, M, M]`, 0 and 1, in the frame of each box

`detect` reads the first two alone.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from halonet_jax.detection import boxes as box_ops
from halonet_jax.detection import heads, postprocess, roi_align, targets
from halonet_jax.detection import losses as loss_ops
from halonet_jax.detection.spec import DetectionSpec
from halonet_jax.models import Backbone, freezing, stems
from halonet_jax.ops.platforms import cut_axes


class Found(NamedTuple):
    """Detections of a batch, with masks.

    Attributes:
        boxes: float32 `[B, D, 4]`, pixels of `image`; 0 for padding, as all that follows.
        scores: float32 `[B, D]`.
        classes: int32 `[B, D]`, from 1.
        valid: bool `[B, D]`; False is padding.
        masks: float32 `[B, D, N, N]`, probabilities in the frame of each box; `pasting.paste` draws them into the image.
    """

    boxes: jax.Array
    scores: jax.Array
    classes: jax.Array
    valid: jax.Array
    masks: jax.Array


class MaskRCNN(nn.Module):
    """The network: backbone, pyramid, and three heads. Its functions are those of this module.

    Attributes:
        backbone: each stage after the first halves the map.
        spec: all other settings.
    """

    backbone: Backbone
    spec: DetectionSpec = DetectionSpec()

    def setup(self):
        """Creates the parts."""
        spec, dtype = self.spec, self.backbone.dtype
        self.fpn = heads.FPN(spec.width, spec.extra_level, spec.norms == "all", dtype)
        self.rpn_head = heads.RPNHead(spec.width, spec.rpn_convs, len(spec.anchor_ratios), dtype)
        self.box_head = heads.BoxHead(spec.num_classes, spec.width, spec.box_convs, spec.box_dense, dtype)
        self.mask_head = heads.MaskHead(spec.num_classes, spec.width, spec.mask_convs, dtype)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image per pixel of each level of the pyramid.

        Raises:
            ValueError: a stage after the first does not halve the map.
        """
        steps = [math.prod(block.stride for block in stage) for stage in self.backbone.stages]
        if any(step != 2 for step in steps[1:]):
            raise ValueError(
                f"stages have strides {steps}; each after the first must have 2 for a pyramid; change their blocks"
            )
        first = stems.STRIDES[self.backbone.stem] * steps[0]
        return tuple(first * 2**n for n in range(len(steps) + (self.spec.extra_level != "none")))

    def anchors(self, maps) -> tuple[jax.Array, ...]:
        """Returns the anchors of each level, see `boxes.anchors`. Of `maps`, only the shapes matter."""
        spec = self.spec
        shapes = [x.shape[1:3] for x in maps]
        return box_ops.anchors(shapes, self.strides, spec.anchor_size, spec.anchor_ratios, spec.anchor_offset)

    def first_stage(self, images, train: bool):
        """Returns the pyramid's maps, and the logits and deltas of all anchors."""
        maps = self.fpn(self.backbone(images, train), self.backbone.norm(not train))
        if self.is_initializing():
            return maps, *self.rpn_head(maps)
        # The levels share the parameters. Within a device, their gradients are summed before devices exchange them.
        head, variables = self.rpn_head.unbind()
        apply = jax.named_scope("rpn_head")(lambda variables, *maps: head.apply(variables, maps))
        return maps, *per_device(apply, *maps, whole=variables)

    def align(self, maps, rois, size: int):
        """Returns the features of regions `[B, R, 4]`: `[B, R, size, size, C]`."""
        spec = self.spec
        kept = len(maps) - (spec.extra_level != "none" and not spec.roi_extra_level)
        one_image = lambda image: roi_align.roi_align(
            image[:-1], image[-1], self.strides[:kept], size,
            roi_align.Sampling(spec.align_samples, spec.align_half_pixel, spec.align_outside), spec.roi_base_size,
        )  # fmt: skip
        return per_device(lambda *images: jax.lax.map(one_image, images), *maps[:kept], rois)

    def box_stage(self, maps, rois, train: bool):
        """Returns logits `[B, R, classes]` and deltas `[B, R, classes, 4]` of regions."""
        return self.box_head(self.align(maps, rois, self.spec.box_bins), self._head_norm(train))

    def mask_stage(self, maps, rois, train: bool):
        """Returns mask logits `[B, R, N, N, classes]` of regions."""
        return self.mask_head(self.align(maps, rois, self.spec.mask_bins), self._head_norm(train))

    def _head_norm(self, train):
        return self.backbone.norm(not train) if self.spec.norms == "all" else None

    def all_stages(self, images):
        """Runs every part once, to create the parameters."""
        self.first_stage(images, train=False)
        features = lambda bins: jnp.zeros((len(images), 1, bins, bins, self.spec.width))
        box = self.box_head(features(self.spec.box_bins), self._head_norm(train=False))
        return box, self.mask_head(features(self.spec.mask_bins), self._head_norm(train=False))

    def losses(self, batch, rng):
        """Returns a dict of the five losses, float32 scalars; see `losses`."""
        spec = self.spec
        maps, logits, deltas = self.first_stage(batch["image"], train=True)
        objects = targets.Objects(*(batch[key] for key in ("boxes", "classes", "valid", "masks")))
        keys = jax.random.split(rng, (len(logits), 2))

        def assign(image, anchors):
            logits, deltas, size, objects, keys = image
            proposed = postprocess.proposals(logits, deltas, anchors, size, spec, spec.candidates)
            anchor_targets = targets.anchor_targets(keys[0], jnp.concatenate(anchors), objects, spec)
            return anchor_targets, targets.roi_targets(keys[1], *proposed, objects, spec)

        def first_losses(logits, deltas, *rest):
            anchors = self.anchors(maps)
            images = jax.lax.stop_gradient((logits, deltas, *rest))
            found = jax.lax.map(functools.partial(assign, anchors=anchors), images)
            anchor_targets, roi_targets = jax.lax.stop_gradient(found)
            sums = functools.partial(loss_ops.anchor_sums, sizes=[len(level) for level in anchors], spec=spec)
            return jax.vmap(sums)(logits, deltas, anchor_targets), roi_targets

        sums, regions = per_device(first_losses, logits, deltas, batch["size"], objects, keys)
        found = self.box_stage(maps, regions.rois, train=True)
        masks = self.mask_stage(maps, regions.rois[:, : spec.mask_rois], train=True)
        return (
            loss_ops.anchor_losses(sums, spec) | loss_ops.box_losses(*found, regions, spec) | loss_ops.mask_loss(masks, regions)
        )

    def detect(self, batch) -> Found:
        """Returns the detections; see `detect`."""
        spec = self.spec
        maps, logits, deltas = self.first_stage(batch["image"], train=False)

        def propose(*images):
            anchors = self.anchors(maps)
            one_image = lambda image: postprocess.proposals(*image[:2], anchors, image[2], spec, spec.candidates_test)
            return jax.lax.map(one_image, images)

        rois, valid = per_device(propose, logits, deltas, batch["size"])
        images = (*self.box_stage(maps, rois, train=False), rois, valid, batch["size"])
        choose = lambda image: postprocess.detections(*image, spec)
        found = per_device(lambda *images: jax.lax.map(choose, images), *images)
        masks = loss_ops.of_class(self.mask_stage(maps, found.boxes, train=False), found.classes)
        return Found(*found, jnp.where(found.valid[..., None, None], nn.sigmoid(masks), 0))


def init(model: MaskRCNN, rng: jax.Array, channels: int = 3) -> tuple[Any, Any]:
    """Returns parameters and batch statistics, which do not depend on the images' size.

    Args:
        model: the network.
        rng: a random key.
        channels: of the images.

    Raises:
        ValueError: a stage of the backbone after the first does not halve the map.
    """
    side = model.strides[-1]
    variables = model.init(rng, jnp.zeros((1, side, side, channels)), method="all_stages")
    return variables["params"], variables.get("batch_stats", {})


def losses(model: MaskRCNN, params: Any, state: Any, batch: dict, rng: jax.Array) -> tuple[jax.Array, tuple[Any, dict]]:
    """Returns the loss in training mode, as `Task.loss` does.

    Args:
        model: the network.
        params: from `init`.
        state: batch statistics.
        batch: see above.
        rng: a random key; each image has its own of it, by its place in the batch.

    Returns:
        The sum of the losses, float32; the new statistics; and the losses by name: `rpn_score`, `rpn_box`, `class`, `box`
        and `mask`.
    """
    sample_rng, dropout_rng = jax.random.split(rng)
    variables = {"params": freezing.stop_gradients(params, model.backbone.freeze), "batch_stats": state}
    parts, updates = model.apply(
        variables, batch, sample_rng, method="losses", mutable=["batch_stats"], rngs={"dropout": dropout_rng}
    )
    return sum(parts.values()), (updates.get("batch_stats", state), parts)


def detect(model: MaskRCNN, params: Any, state: Any, batch: dict) -> Found:
    """Returns the objects of each image, with the running statistics.

    Args:
        model: the network.
        params: from `init`.
        state: batch statistics.
        batch: see above.
    """
    return model.apply({"params": params, "batch_stats": state}, batch, method="detect")


def per_device(run: Callable, *arrays: Any, whole: Any = None) -> Any:
    """Calls a function with each device's images. Loops and sorts in it then need no other device.

    The images are cut over all axes of the mesh that is set. Where none is set, or the devices do not divide the batch, the
    function gets all images.

    Args:
        run: takes and returns arrays, or trees of them, with the images first.
        *arrays: what `run` is called with.
        whole: a tree of arrays that every device gets whole. If given, it comes before `arrays`. Its gradient is summed over
            the devices once, however often `run` uses it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = cut_axes(mesh)
    devices = math.prod(mesh.shape[name] for name in axes)
    before = () if whole is None else (whole,)
    if devices == 1 or len(jax.tree.leaves(arrays)[0]) % devices:
        return run(*before, *arrays)
    in_specs = (*(P() for _ in before), *(P(axes) for _ in arrays))
    cut = jax.shard_map(run, in_specs=in_specs, out_specs=P(axes), axis_names=set(axes), check_vma=False)
    return cut(*before, *arrays)
