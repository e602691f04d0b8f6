"""What the attention of a trained model looks at: the weights of any query, in any layer, for one image.

    loaded = halonet_jax.load("runs/digits")
    capture = attention_maps.Capture(loaded)
    captured = capture(image)  # uint8 [H, W, 3], as the model's evaluation crops it
    seen = captured.layers[0].at(0.5, 0.5)  # by the query in the middle of the image, in the first attention layer
    seen.weights  # float32 [heads, rows, columns] over its window; each head's sum to 1

Weights follow the definition of `ops.halo_attention`, from the queries and keys that the model's own run computed.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from halonet_jax import models, ops
from halonet_jax.errors import ConfigError
from halonet_jax.models.blocks import AttentionLayer
from halonet_jax.weights import Loaded

_FINE = 7  # pixels per side that a map needs to tell places apart; the last map of a 224-pixel image has them


class Box(NamedTuple):
    """A rectangle of an image, as shares of its height and width: 0 is the top or left edge, 1 the bottom or right one.

    Attributes:
        top, left, bottom, right: the edges. A window at the border reaches beyond the image, so they may lie outside of [0, 1].
    """

    top: float
    left: float
    bottom: float
    right: float


class Seen(NamedTuple):
    """What one query attends to.

    Attributes:
        weights: float32 `[heads, rows, columns]` over the pixels of the window, block and halo. A head's weights sum to 1. Pixels
            outside of the map have weight 0, unless the model pads with zeros instead of masking.
        query: the query's pixel.
        block: the block that it lies in.
        window: the block and its halo; `weights` divide it evenly.
    """

    weights: np.ndarray
    query: Box
    block: Box
    window: Box


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """One attention layer's queries, keys and values for one image.

    Attributes:
        layer: stage, block, heads, block and halo size of the layer, and the size of its map.
        q: float32 `[ceil(height / stride), ceil(width / stride), heads, channels]`, not scaled.
        k: float32 `[height, width, heads, channels]`, with the embeddings of absolute positions where the layer has them.
        v: float32 `[height, width, heads, value channels]`.
        rel_rows, rel_cols: relative tables, as of `ops.halo_attention`; without channels where the layer has none.
        output: float32 `[ceil(height / stride), ceil(width / stride), heads, value channels]`, what the layer gave.
        centered: whether a query sees its own surroundings alone (`window="centered"`).
        masked: whether keys outside of the map take no part (`padding="mask"`).
        logits_scale: factor on the logits.
    """

    layer: AttentionLayer
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    rel_rows: np.ndarray
    rel_cols: np.ndarray
    output: np.ndarray
    centered: bool
    masked: bool
    logits_scale: float

    def at(self, row: float, column: float) -> Seen:
        """Returns what the query at a place of the image attends to.

        Args:
            row: share of the image's height, from 0 (top) to 1 (bottom).
            column: share of the image's width, from 0 (left) to 1 (right).
        """
        stride = self.layer.stride
        return self.of_query(
            *(min(max(int(share * size), 0), size - 1) // stride for share, size in zip((row, column), self.k.shape))
        )

    def of_query(self, i: int, j: int) -> Seen:
        """Returns what a query attends to: the softmax that `ops.halo_attention` states, for this query alone.

        Args:
            i: row of the query in `q`.
            j: column of the query in `q`.
        """
        b, h, q = self.layer.block_size, self.layer.halo_size, self.q[i, j]  # [N, D]
        height, width = self.k.shape[:2]
        row, column = i * self.layer.stride, j * self.layer.stride
        top, left = row // b * b, column // b * b
        rows, columns = top - h + np.arange(b + 2 * h), left - h + np.arange(b + 2 * h)
        inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))  # [R, S]
        keys = self._window(self.k, rows, columns, inside)  # [R, S, N, D]

        half = self.rel_rows.shape[1]  # channels of one axis: half of the head's, all, or none
        center = b - 1 + h
        table_row, table_column = row, column  # of the query, to the tables
        if self.layer.adjacent_queries:
            table_row, table_column = top + (row - top) // self.layer.stride, left + (column - left) // self.layer.stride
        logits = np.einsum("nd,rsnd->nrs", q, keys)
        logits += np.einsum("nd,rd->nr", q[:, :half], self.rel_rows[rows - table_row + center])[:, :, None]
        logits += np.einsum("nd,sd->ns", q[:, q.shape[1] - half :], self.rel_cols[columns - table_column + center])[:, None, :]
        logits *= self.logits_scale
        visible = inside if self.masked else np.ones_like(inside)
        if self.centered:
            visible = visible & (abs(rows - row) <= h)[:, None] & (abs(columns - column) <= h)
        logits = np.where(visible, logits, -np.inf)
        weights = np.exp(logits - logits.max((1, 2), keepdims=True))
        weights = (weights / weights.sum((1, 2), keepdims=True)).astype(np.float32)

        def box(row, column, side):
            return Box(row / height, column / width, (row + side) / height, (column + side) / width)

        return Seen(weights, box(row, column, 1), box(top, left, b), box(top - h, left - h, b + 2 * h))

    def attended(self, i: int, j: int) -> np.ndarray:
        """Returns the mean of the values by a query's weights, `[heads, value channels]`: what the layer gave there.

        Args:
            i: row of the query in `q`.
            j: column of the query in `q`.
        """
        b, h, stride = self.layer.block_size, self.layer.halo_size, self.layer.stride
        rows, columns = (n * stride // b * b - h + np.arange(b + 2 * h) for n in (i, j))
        inside = ((rows >= 0) & (rows < len(self.k)))[:, None] & ((columns >= 0) & (columns < self.k.shape[1]))
        return np.einsum("nrs,rsne->ne", self.of_query(i, j).weights, self._window(self.v, rows, columns, inside))

    def _window(self, x, rows, columns, inside):
        x = x[rows.clip(0, len(x) - 1)[:, None], columns.clip(0, x.shape[1] - 1)]
        return np.where(inside[..., None, None], x, 0)


class Captured(NamedTuple):
    """One image, seen by a model.

    Attributes:
        logits: float32 `[classes]`.
        layers: the attention layers, in the order in which they run; empty for a model of convolutions.
        strength: float32 `[h, w]`, the norm over channels of each pixel of a stage's map: of the last stage whose map still has
            7 pixels per side, or of the first one.
    """

    logits: np.ndarray
    layers: list[AttentionMap]
    strength: np.ndarray

    def by_stage(self) -> list[AttentionMap]:
        """Returns the last attention layer of each stage that has one."""
        return list({found.layer.stage: found for found in self.layers}.values())

    def strongest(self, count: int) -> list[tuple[float, float]]:
        """Returns the places where `strength` is greatest, the greatest first, as shares of the image's height and width.

        At 224 pixels and more it is that of the last map. The classifier sees the mean of that map, so these places have the
        largest part in its decision. Places that are chosen are no neighbours, unless the map is too small for that.

        Args:
            count: number of places; fewer come where the map has fewer pixels.
        """
        height, width = self.strength.shape
        left, places = self.strength.astype(float), []
        for _ in range(min(count, left.size)):
            if np.isneginf(left).all():  # neighbours then
                left = self.strength.astype(float)
                for row, column in places:
                    left[int(row * height), int(column * width)] = -np.inf
            i, j = np.unravel_index(left.argmax(), left.shape)
            places.append((float(i + 0.5) / height, float(j + 0.5) / width))
            left[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2] = -np.inf
        return places


class Capture:
    """Runs a model on one image at a time and keeps what its attention layers work on. It compiles once per image size.

    Args:
        loaded: from `halonet_jax.load`.

    Raises:
        ConfigError: the model is none of `halonet_jax.models`.
    """

    def __init__(self, loaded: Loaded):
        model, variables = loaded.model, loaded.variables
        if not isinstance(model, models.HaloNet):
            raise ConfigError(
                f"attention maps need a model of halonet_jax.models, a classifier, and this task has a {type(model).__name__}"
            )
        if model.backbone.scan:  # a loop would hide its blocks
            variables = models.transfer.unstack_blocks(variables, model.backbone.stages)
        self._model, self._normalize = model, loaded.task.normalize
        self._variables = jax.device_put(variables, jax.devices()[0])  # one image does not divide over several
        self._settings: dict[tuple, list[dict]] = {}  # of each layer's operator, by the image's shape
        self._run = jax.jit(self._traced)

    def __call__(self, image: Any) -> Captured:
        """Runs the model.

        Args:
            image: uint8 `[H, W, 3]`, RGB, cropped as the model expects it.

        Raises:
            ConfigError: `image` has another shape or type.
        """
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
            raise ConfigError(
                f"the image is {image.dtype}{list(image.shape)}; it must be uint8[height, width, 3], as a batch's row"
            )
        logits, kept, strength = jax.device_get(self._run(self._variables, image))
        layers = self._model.backbone.attention_layers(*image.shape[:2])
        options = self._settings[image.shape]
        return Captured(
            logits, [AttentionMap(*x) for x in zip(layers, *zip(*kept), *zip(*options))] if layers else [], strength
        )

    def _traced(self, variables, image):
        layers = self._model.backbone.attention_layers(*image.shape[:2])
        kept, settings, maps = [], [], []

        def attend(q, k, v, rel_rows, rel_cols, **options):
            out = ops.attend(q, k, v, rel_rows, rel_cols, implementation="auto", **options)
            step = layers[len(kept)].stride // options["stride"]  # more than 1 where the stride does not divide the block
            arrays = q[0, ::step, ::step], k[0], v[0], rel_rows, rel_cols, out[0, ::step, ::step]
            kept.append(tuple(x.astype("float32") for x in arrays))
            settings.append((options["centered"], options["masked"], options["logits_scale"]))
            return out

        def keep_maps(call, args, kwargs, context):
            result = call(*args, **kwargs)
            if isinstance(context.module, models.Backbone) and context.method_name == "__call__":
                maps.extend(result)
            return result

        backbone = self._model.backbone.clone(attention_impl=attend, scan=False, remat=False)
        with nn.intercept_methods(keep_maps):
            logits = self._model.clone(backbone=backbone).apply(variables, self._normalize(image[None]), train=False)
        self._settings[image.shape] = settings
        fine = [x for x in maps if min(x.shape[1:3]) >= _FINE] or maps[:1]
        return logits[0], kept, jnp.linalg.norm(fine[-1][0].astype("float32"), axis=-1)
