"""All settings of a detector as one value, and the values of the two recipes.

`PAPER` is Mask R-CNN of TensorFlow's TPU code (`models/official/detection`), which the paper's COCO experiments use.
`DETECTRON2` has the conventions of detectron2's large-scale-jitter baselines.
"""

import dataclasses

from halonet_jax.models import checks


@dataclasses.dataclass(frozen=True)
class DetectionSpec:
    """Settings of Mask R-CNN, beside those of the backbone, which also says how batches are normalised.

    Attributes:
        num_classes: classes of objects, and the background, which is class 0.
        width: channels of the pyramid, of the convolutions of all heads.
        norms: where batch norm is: "outputs" of the pyramid, or "all": of its lateral convolutions too, and of the
            convolutions of the box and mask heads.
        extra_level: the level above the backbone's last: "conv", a 3x3/2 convolution; "pool", every second pixel; or "none".
        anchor_size: side of a square anchor, in strides.
        anchor_ratios: width over height.
        anchor_offset: of the first anchor's centre from the image's corner, in strides.
        rpn_convs: 3x3 convolutions before the anchors' scores.
        rpn_positive_iou: anchors with at least this are positive, and so is the best anchor of each object.
        rpn_negative_iou: anchors below this are negative; the others are not trained.
        rpn_samples: anchors of an image whose scores are trained.
        rpn_positive_share: of these, the most that may be positive.
        candidates: best-scored anchors of each level that become boxes, in training.
        candidates_test: in evaluation.
        proposals: boxes of an image that remain of all levels.
        proposal_nms: overlap at which a better box of the same level suppresses a candidate.
        roi_samples: regions (RoIs) of an image that the box head is trained on.
        roi_positive_share: of these, the most that may be positive. The mask head is trained on the positive ones.
        roi_iou: regions of at least this overlap with an object are positive, others negative.
        roi_strict: whether regions of exactly `roi_iou` are neither.
        roi_base_size: side of a region that is cut from stride 16, in pixels.
        roi_extra_level: whether regions are cut from the extra level too.
        align_samples: of a bin and axis, see `roi_align.Sampling`, as the two below.
        align_half_pixel: see there.
        align_outside: see there.
        box_bins: side of a region's features for the box head.
        box_convs: 3x3 convolutions of the box head.
        box_dense: channels of the box head's dense layers.
        box_weights: that the box head's deltas of y, x, height and width are multiplied by.
        mask_bins: side of a region's features for the mask head; masks have twice as many pixels.
        mask_convs: 3x3 convolutions of the mask head.
        box_loss: "matched": over all matched anchors, mean over their coordinates that are not zero, per level; and mean
            over the coordinates of positive regions. "sampled": over sampled positive anchors and regions, each over the
            number of all samples.
        rpn_huber: where the anchors' box loss turns from quadratic to linear; 0: it is linear (L1).
        box_huber: where the regions' box loss does.
        min_score: of a detection.
        detection_nms: overlap at which a better box of the same class suppresses a detection.
        detections: most of an image.
        detection_candidates: pairs of region and class that are compared. The result is exact unless more have `min_score`
            and fewer than `detections` of the best ones remain.
        best_by: how the best-scored boxes are chosen, see `nms.best`; it does not change them.

    Raises:
        ValueError: a value is unknown or out of range.
    """

    num_classes: int = 91
    width: int = 256
    norms: str = "outputs"
    extra_level: str = "conv"
    anchor_size: float = 8.0
    anchor_ratios: tuple[float, ...] = (1.0, 2.0, 0.5)
    anchor_offset: float = 0.5
    rpn_convs: int = 1
    rpn_positive_iou: float = 0.7
    rpn_negative_iou: float = 0.3
    rpn_samples: int = 256
    rpn_positive_share: float = 0.5
    candidates: int = 2000
    candidates_test: int = 1000
    proposals: int = 1000
    proposal_nms: float = 0.7
    roi_samples: int = 512
    roi_positive_share: float = 0.25
    roi_iou: float = 0.5
    roi_strict: bool = True
    roi_base_size: float = 224.0
    roi_extra_level: bool = True
    align_samples: int = 1
    align_half_pixel: bool = False
    align_outside: str = "clamp"
    box_bins: int = 7
    box_convs: int = 0
    box_dense: tuple[int, ...] = (1024, 1024)
    box_weights: tuple[float, ...] = (10.0, 10.0, 5.0, 5.0)
    mask_bins: int = 14
    mask_convs: int = 4
    box_loss: str = "matched"
    rpn_huber: float = 1 / 9
    box_huber: float = 1.0
    min_score: float = 0.05
    detection_nms: float = 0.5
    detections: int = 100
    detection_candidates: int = 2000
    best_by: str = "top_k"

    def __post_init__(self):
        checks.whole("num_classes", self.num_classes, 2, 91)
        for name, least in (
            ("width", 1), ("rpn_convs", 0), ("rpn_samples", 1), ("candidates", 1), ("candidates_test", 1), ("proposals", 1),
            ("roi_samples", 1), ("align_samples", 0), ("box_bins", 1), ("box_convs", 0), ("mask_bins", 1), ("mask_convs", 0),
            ("detections", 1), ("detection_candidates", 1),
        ):  # fmt: skip
            checks.whole(name, getattr(self, name), least)
        for name in (
            "rpn_positive_iou", "rpn_negative_iou", "rpn_positive_share", "proposal_nms", "roi_positive_share", "roi_iou",
            "anchor_offset", "min_score", "detection_nms",
        ):  # fmt: skip
            checks.real(name, getattr(self, name), 0, 1)
        checks.entries("anchor_ratios", self.anchor_ratios, 1, 99, (1.0, 2.0, 0.5))
        checks.entries("box_weights", self.box_weights, 4, 4, (10.0, 10.0, 5.0, 5.0))
        checks.entries("box_dense", self.box_dense, 0, 99, (1024, 1024))
        for name in ("anchor_ratios", "box_weights"):
            for n, value in enumerate(getattr(self, name)):
                checks.real(f"{name}[{n}]", value, 0.001, 1000)
        for n, width in enumerate(self.box_dense):
            checks.whole(f"box_dense[{n}]", width, 1)
        for name, least in (("anchor_size", 0.001), ("roi_base_size", 1), ("rpn_huber", 0), ("box_huber", 0)):
            checks.real(name, getattr(self, name), least)
        for name, known in (
            ("norms", ("outputs", "all")), ("extra_level", ("conv", "pool", "none")), ("align_outside", ("clamp", "zero")),
            ("box_loss", ("matched", "sampled")), ("best_by", ("top_k", "sort")),
        ):  # fmt: skip
            checks.choice(name, getattr(self, name), known)
        if self.rpn_negative_iou > self.rpn_positive_iou:
            raise ValueError(
                f"rpn_negative_iou={self.rpn_negative_iou} must not exceed rpn_positive_iou={self.rpn_positive_iou}; for "
                f"example rpn_negative_iou={min(0.3, self.rpn_positive_iou)}"
            )
        if self.detection_candidates < self.detections:
            raise ValueError(
                f"detection_candidates={self.detection_candidates} must be at least detections={self.detections}; for example "
                f"detection_candidates={20 * self.detections}"
            )

    @property
    def mask_rois(self) -> int:
        """Regions of an image that the mask head is trained on, at least one: the first samples, with all positive ones."""
        return max(1, round(self.roi_samples * self.roi_positive_share))


PAPER = DetectionSpec()
DETECTRON2 = DetectionSpec(
    num_classes=81, norms="all", extra_level="pool", anchor_offset=0.0, rpn_convs=2, roi_strict=False, roi_extra_level=False,
    align_samples=0, align_half_pixel=True, align_outside="zero", box_convs=4, box_dense=(1024,), box_loss="sampled",
    rpn_huber=0.0, box_huber=0.0,
)  # fmt: skip
