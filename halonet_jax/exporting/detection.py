"""What an exported detector takes and returns.

Inputs:

    images   uint8 `[batch, S, S, 3]`: scaled so that the longer side has S pixels, padded at the bottom and on the right
    sizes    float32 `[batch, 2]`: height and width without the padding, pixels

Outputs, D objects of each image by falling score:

    boxes    float32 `[batch, D, 4]`: y0, x0, y1, x1, pixels of `images`; 0 for padding, as scores and masks
    scores   float32 `[batch, D]`
    classes  int32 `[batch, D]`: from 0, by the class names of `config.json`; -1 for padding
    valid    bool `[batch, D]`: False for padding
    masks    float32 `[batch, D, N, N]`: probabilities in the frame of each box

Which objects are found depends on comparisons. Where two scores, or an overlap and its limit, differ by a rounding error, another
runtime may decide otherwise, and give another object or another order. So objects are compared with their counterparts, and a few
without one are allowed.
"""

import dataclasses
from importlib import resources

import cv2
import numpy as np

from halonet_jax import data
from halonet_jax.detection import Found
from halonet_jax.exporting.interface import Difference, Interface

_ALONE = 0.05  # share of the objects that may lack a counterpart, unless the outputs must be equal


def samples(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images to compare on: a scene of digits, two photographs, noise, and a blank one, which loaders pad batches with.

    Args:
        height: side of the input, pixels.
        width: likewise.

    Returns:
        uint8 [5, side, side, 3], and float32 [5, 2], the sizes without padding
    """
    folder = resources.files("sklearn.datasets").joinpath("images")
    photographs = [data.decode(folder.joinpath(name).read_bytes()) for name in ("china.jpg", "flower.jpg")]
    scene = data.DigitScenes("test", count=1, size=128, label="largest").scene(0)["image"]
    images, sizes = np.zeros((5, height, width, 3), np.uint8), np.zeros((5, 2), np.float32)
    for n, image in enumerate((scene, photographs[0], photographs[1].swapaxes(0, 1))):
        scale = min(height / image.shape[0], width / image.shape[1])
        size = [max(1, round(side * scale)) for side in image.shape[:2]]
        images[n, : size[0], : size[1]] = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
        sizes[n] = size
    images[3], sizes[3] = np.random.default_rng(0).integers(0, 256, (height, width, 3)), (height, width)
    return images, sizes


def _pack(found):
    return {
        "boxes": found.boxes, "scores": found.scores, "classes": found.classes - 1, "valid": found.valid, "masks": found.masks,
    }  # fmt: skip


def _unpack(outputs):
    return Found(outputs["boxes"], outputs["scores"], outputs["classes"] + 1, outputs["valid"], outputs["masks"])


def _compare(expected, found, task, tolerance):
    for name, ours in expected.items():
        if ours.shape != found[name].shape:
            return Difference(np.inf, problem=f"gives {name} {list(found[name].shape)} instead of {list(ours.shape)}")
    objects = int(expected["valid"].sum())
    if not tolerance:
        errors = [np.abs(found[name].astype(np.float64) - ours).max() for name, ours in expected.items()]
        return Difference(float(np.max(errors)), compared=objects)  # NaN stays
    lone, paired, error = 0, 0, 0.0
    for n in range(len(expected["valid"])):
        ours, theirs = ({name: x[n][outputs["valid"][n]] for name, x in outputs.items()} for outputs in (expected, found))
        for these, those in ((ours, theirs), (theirs, ours)):
            nearest = _nearest(these, those, task.transform(False).fields["image"].shape[0])
            lone += int((~(nearest <= tolerance)).sum())
            paired += int((nearest <= tolerance).sum())
            error = max(error, nearest[nearest <= tolerance].max(initial=0.0))
    if lone > 2 * max(1, _ALONE * objects) or (objects and not paired):
        return Difference(np.inf, problem=f"finds other objects: {-(-lone // 2)} of {objects} have no counterpart")
    return Difference(float(error), compared=objects)


def _nearest(these, those, side):
    """For each object, how far the nearest one of its class is: in score, mask, and box as a share of the side."""
    best = np.full(len(these["scores"]), np.inf)
    for n, label in enumerate(these["classes"]):
        same = those["classes"] == label
        if same.any():
            error = np.abs(those["scores"][same] - these["scores"][n])
            error = np.maximum(error, np.abs(those["boxes"][same] - these["boxes"][n]).max(1) / side)
            best[n] = np.maximum(error, np.abs(those["masks"][same] - these["masks"][n]).max((1, 2))).min()
    return best


INTERFACE = Interface(
    inputs={"images": "image", "sizes": "image_size"},
    outputs=("boxes", "scores", "classes", "valid", "masks"),
    formats=("weights", "stablehlo", "savedmodel"),
    pack=_pack,
    unpack=_unpack,
    apply=lambda model, variables, images, sizes: model.apply(variables, {"image": images, "size": sizes}, method="detect"),
    plain=lambda model: model.clone(spec=dataclasses.replace(model.spec, best_by="sort")),
    samples=samples,
    compare=_compare,
)
