"""Average precision of boxes and masks as COCO defines it, by pycocotools."""

import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from halonet_jax.data import masks, restoring
from halonet_jax.data.annotations import Annotations
from halonet_jax.errors import DataError

_KINDS = {"bbox": "box", "segm": "mask"}
# The first six of COCO's twelve numbers: over IoU 0.5 to 0.95, at 0.5, at 0.75, and by the object's area.
_NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
_FIELDS = ("boxes", "scores", "classes", "valid", "masks", "full_masks")
BACKENDS = ("pycocotools", "faster_coco_eval")


class CocoEvaluator:
    """Collects detections of fixed size for each batch, and computes COCO's average precision over all of them.

    Detections are kept by image. So the result does not depend on the batch size, nor on the order of images. Images that
    were in no batch, or masked there, do not count. Detections that are not finite, or have no area within the image, are
    left out. Boxes are cut at the image's border.

    Each batch is a dict of arrays for B images of D detections:

    - `index`, int [B]: the image's position in the annotations;
    - `mask`, bool [B]: False for padding;
    - `scale`, float [B, 2]: pixels of the input over pixels of the image, y and x;
    - `boxes`, float [B, D, 4]: y0, x0, y1, x1, pixels of the input;
    - `scores`, float [B, D]; `classes`, int [B, D], positions in `class_names`; `valid`, bool [B, D];
    - optionally `masks`, [B, D, m, m]: probabilities in the frame of each box, or uint8, 255 for 1; or `full_masks`, bool
      [B, D, S, S], in pixels of the input.

    Args:
        annotations: of the split, crowds included, as `CocoSource.annotations`.
        backend: "pycocotools", or "faster_coco_eval" where that package is installed.

    Raises:
        DataError: the package of `backend` is not installed, or there is no such back end.
    """

    def __init__(self, annotations: Annotations, backend: str = "pycocotools"):
        self._annotations, self._api = annotations, _api(backend)
        self._detections: dict[int, list[dict[str, Any]]] = {}
        self._has_masks = False
        self._found: dict[str, Any] | None = None

    def add(self, values: dict[str, np.ndarray]) -> None:
        """Takes the detections of one batch. Masks are pasted into their images here, and kept as run lengths.

        Args:
            values: see the class.
        """
        self._found = None
        self._has_masks |= "masks" in values or "full_masks" in values
        for row in np.flatnonzero(values["mask"]):
            index = int(values["index"][row])
            height, width = map(int, self._annotations.sizes[index])
            one_image = {key: values[key][row] for key in _FIELDS if key in values}
            found = self._detections[index] = []
            for each in restoring.restore(one_image, values["scale"][row], height, width, len(self._annotations.class_names)):
                y0, x0, y1, x1 = each.box
                detection = {
                    "image_id": int(self._annotations.image_ids[index]), "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "category_id": int(self._annotations.category_ids[each.label]), "score": each.score,
                }  # fmt: skip
                if each.mask is not None:
                    detection["segmentation"] = each.mask
                found.append(detection)

    def result(self) -> dict[str, float | int]:
        """Returns the metrics.

        Returns:
            "box_ap", "box_ap50", "box_ap75", "box_ap_small", "box_ap_medium" and "box_ap_large", from 0 to 1, -1 where the
            images have no such object; where detections have masks, the same with "mask"; and "count", the number of
            images.
        """
        if self._found is None:
            self._found = self._compute()
        metrics = {f"{kind}_{name}": value for kind, found in self._found.items() for name, value in found["summary"].items()}
        return {**metrics, "count": len(self._detections)}

    def per_class(self) -> list[dict[str, Any]]:
        """Returns the average precision of each class. Its mean over the classes with objects is that of `result`.

        Returns:
            For each class, in the order of the labels: "class", its name; "objects", their number without crowds; "box_ap"
            and "box_ap50", -1 where there are none; and with masks, "mask_ap" and "mask_ap50".
        """
        self.result()
        a, seen = self._annotations, np.zeros(len(self._annotations), bool)
        seen[list(self._detections)] = True
        counted = np.repeat(seen, np.diff(a.first)) & ~a.crowd
        objects = np.bincount(a.labels[counted], minlength=len(a.class_names))
        return [
            {
                "class": name, "objects": int(objects[label]),
                **{
                    f"{kind}_{key}": float(values[label]) for kind, found in self._found.items()
                    for key, values in found["by_class"].items()
                },
            } for label, name in enumerate(a.class_names)
        ]  # fmt: skip

    def detections(self) -> list[dict[str, Any]]:
        """Returns the detections in COCO's format of results, sorted by image; masks as compressed run lengths (text)."""
        return [
            {**d, "segmentation": {**d["segmentation"], "counts": d["segmentation"]["counts"].decode()}}
            if "segmentation" in d else dict(d) for found in self._by_image() for d in found
        ]  # fmt: skip

    def write(self, path: str | epath.Path) -> None:
        """Writes `detections` as JSON, as COCO's server and tools take them.

        Args:
            path: of the file.
        """
        epath.Path(path).write_text(json.dumps(self.detections()))

    def _by_image(self):
        return [self._detections[index] for index in sorted(self._detections)]

    def _compute(self):
        truth = self._annotations.to_coco()
        truth_has_masks = all("segmentation" in a for a in truth["annotations"])
        found = {}
        for kind, name in _KINDS.items():
            if kind == "segm" and not self._has_masks:
                continue
            if kind == "segm" and not truth_has_masks:
                logging.warning("Masks are not evaluated: some objects of the annotations have none")
                continue
            found[name] = self._evaluate(truth, kind)
        return found

    def _evaluate(self, truth, kind):
        make_coco, make_eval = self._api
        images = self._annotations.image_ids[sorted(self._detections)].tolist()
        detections = []
        for number, d in enumerate((d for found in self._by_image() for d in found), 1):
            box = d["bbox"]
            # A mask's size class is that of its own area, not of its box.
            area = float(masks.codec().area(d["segmentation"])) if kind == "segm" else box[2] * box[3]
            detections.append({**d, "id": number, "area": area, "iscrowd": 0})
        with _silent(make_coco, make_eval):
            ground_truth, results = make_coco(), make_coco()
            ground_truth.dataset = {**truth, "annotations": [dict(a) for a in truth["annotations"]]}
            results.dataset = {"images": truth["images"], "categories": truth["categories"], "annotations": detections}
            ground_truth.createIndex()
            results.createIndex()
            evaluation = make_eval(ground_truth, results, kind)
            evaluation.params.imgIds = images
            evaluation.params.catIds = sorted(self._annotations.category_ids.tolist())
            if images:
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
        if not images:
            none = np.full(len(self._annotations.class_names), -1.0)
            return {"summary": dict.fromkeys(_NAMES, -1.0), "by_class": {"ap": none, "ap50": none}}
        precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]  # IoU, recall, class; all sizes, 100 detections
        order = np.argsort(np.argsort(self._annotations.category_ids))
        by_class = {
            key: np.array([p[p > -1].mean() if (p > -1).any() else -1.0 for p in part.transpose(2, 0, 1)])[order]
            for key, part in (("ap", precision), ("ap50", precision[:1]))  # the first IoU is 0.5
        }
        summary = {name: float(value) for name, value in zip(_NAMES, np.asarray(evaluation.stats)[:6])}
        return {"summary": summary, "by_class": by_class}


@contextlib.contextmanager
def _silent(*classes):
    """Keeps the modules of classes from printing. Redirecting stdout would silence other threads, too."""
    modules = [sys.modules[each.__module__] for each in classes]
    for module in modules:
        module.print = lambda *_, **__: None
    try:
        yield
    finally:
        for module in modules:
            vars(module).pop("print", None)


def _api(backend: str) -> tuple[Callable, Callable]:
    """The classes that hold annotations and evaluate them."""
    if backend not in BACKENDS:
        raise DataError(f"evaluation has no back end {backend!r}; use one of {', '.join(BACKENDS)}")
    if backend == "faster_coco_eval":
        try:
            from faster_coco_eval import COCO, COCOeval_faster
        except ImportError:
            raise DataError("the package faster_coco_eval is not installed; pip install faster-coco-eval") from None
        return COCO, COCOeval_faster
    masks.codec()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval
