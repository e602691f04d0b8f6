"""What a model says of one image."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a classifier says of one image.

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


@dataclasses.dataclass(frozen=True)
class DetectedObject:
    """One object in an image.

    Attributes:
        name: of its class.
        score: from 0 to 1.
        box: x, y, width, height, as COCO has it: the left upper corner and the size, in pixels of the upright image.
        mask: COCO's run lengths of the pixels that it covers, `{"size": [height, width], "counts": text}`.
            `pycocotools.mask.decode` makes an array of them.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Detections:
    """What a detector says of one image.

    Attributes:
        file: path of the image.
        objects: by falling score; empty if none has the score that was asked for, or the image is broken.
        height: of the upright image, pixels; 0 if it is broken.
        width: likewise.
        error: why the image was skipped; "" if it was not.
        picture: path of the picture with boxes and masks; "" without one.
    """

    file: str
    objects: tuple[DetectedObject, ...] = ()
    height: int = 0
    width: int = 0
    error: str = ""
    picture: str = ""
