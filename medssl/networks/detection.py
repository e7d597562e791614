"""MONAI's RetinaNet on a feature pyramid over any of our encoders, in 2D and 3D, with MONAI's ATSS matcher.

Network, anchors, matcher, box coder, losses and box selection are MONAI's own. What is added: regions where boxes are uncertain (`ignore`)
are no background, and a focal loss per object instead of per anchor.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from medssl.errors import RequestError
from medssl.networks.feature_pyramid import FeaturePyramid

CLASS_LOSSES = ("focal", "bce")
BOX_LOSSES = ("giou", "l1")


@dataclass(frozen=True)
class DetectorSettings:
    """What a detector is besides its encoder.

    Args:
        strides: Pixels per cell of the pyramid's levels, fine to coarse.
        width: Channels of pyramid and heads.
        anchor_scale: Side of an anchor over the stride of its level: ATSS takes one anchor per cell, of 8 strides; small objects want less.
        anchor_shapes: Factors on the sides of the anchors, one tuple per anchor of a cell, one factor per axis; empty for one cube.
        candidates: Cells per level and box that ATSS chooses from.
        class_loss: `focal` over all cells, or `bce` over the objects and the hardest background.
        box_loss: `giou` or smooth `l1`.
        score_threshold: Boxes with a lower score are not returned.
        nms: Of two boxes of a class that overlap by more than this the worse is dropped.
        detections: Boxes per image at most.
    """

    strides: Sequence[int] = (8, 16, 32)
    width: int = 64
    anchor_scale: float = 4.0
    anchor_shapes: Sequence[Sequence[float]] = ()
    candidates: int = 4
    class_loss: str = "focal"
    box_loss: str = "giou"
    score_threshold: float = 0.02
    nms: float = 0.4
    detections: int = 100


class FocalPerObject(nn.Module):
    """MONAI's focal loss, summed and divided by the number of objects' cells, so that few objects weigh as much as many.

    Reference:
        Lin et al. 2017, "Focal Loss for Dense Object Detection", section 4.1.
    """

    def __init__(self) -> None:
        super().__init__()
        from monai.losses import FocalLoss

        self.loss = FocalLoss(reduction="none", gamma=2.0, alpha=0.25)  # its "sum" is a mean for (N, K)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits (N, K) against one-hot targets (N, K); all zero is background."""
        found: Tensor = self.loss(logits.float(), targets.float()).sum() / targets.sum().clamp(min=1)
        return found


@cache
def _detector_class() -> Any:
    """MONAI's detector, with regions that count neither way, and no object left out; made here since its import needs torchvision.

    ATSS takes cells above mean + standard deviation of the overlaps of its candidates. Where half of few candidates are equally good, as
    around an object in the middle of cells, none is: such an object gets the cell of the highest overlap.
    """
    from medssl._compat import torchvision_ops

    base: Any = torchvision_ops.monai_detection().RetinaNetDetector
    from monai.data.box_utils import centers_in_boxes

    class Detector(base):  # type: ignore[misc]
        def compute_anchor_matched_idxs(self, anchors: Any, targets: Any, num_anchor_locs_per_level: Any) -> Any:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="No anchor is matched")  # quotes boxes
                found = super().compute_anchor_matched_idxs(anchors, targets, num_anchor_locs_per_level)
            for matched, cells, target in zip(found, anchors, targets):
                boxes = target[self.target_box_key].to(cells)
                lost = [k for k in range(len(boxes)) if not bool((matched == k).any())]
                for k in lost:
                    overlap = self.box_overlap_metric(boxes[k : k + 1], cells)[0]
                    matched[overlap.masked_fill(matched >= 0, -1.0).argmax()] = k
                centres = (cells[:, : self.spatial_dims] + cells[:, self.spatial_dims :]) / 2
                for box in target.get("ignore", ()):
                    inside = centers_in_boxes(centres, box[None].to(cells).expand(len(centres), -1))
                    matched[(matched < 0) & inside] = self.proposal_matcher.BETWEEN_THRESHOLDS
            return found

    return Detector


def build_detector(encoder: nn.Module, classes: int, image_size: Sequence[int], settings: DetectorSettings) -> Any:
    """Build MONAI's RetinaNet detector around an encoder.

    In training mode it takes images (B, C, *size) and one {boxes (N, 2 D), labels (N,), ignore (M, 2 D)} per image, and returns the losses
    `classification` and `box_regression`; in evaluation mode it returns {boxes, labels, labels_scores} per image. Boxes are low corner,
    then high corner, in pixels along the axes of the image, from the outer corner of the first pixel. Only `network` has parameters.

    Args:
        encoder: With its start weights.
        classes: Kinds of objects, 1 or more.
        image_size: What it will see in training: (H, W) or (X, Y, Z).
        settings: See there.

    Raises:
        RequestError: The settings do not go together, or do not fit the encoder.

    Reference:
        Lin et al. 2017 (RetinaNet); Zhang et al. 2020, "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training
        Sample Selection"; MONAI 1.6 `apps/detection`.
    """
    faults = detector_faults(settings)
    if classes < 1:
        faults.append("no class to look for")
    if faults:
        raise RequestError("detector: " + "; ".join(faults) + "; correct these")
    detector_class = _detector_class()
    from monai.apps.detection.networks.retinanet_network import RetinaNet
    from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape
    from monai.losses.giou_loss import BoxGIoULoss

    dims = len(image_size)
    pyramid = FeaturePyramid(encoder, image_size=image_size, strides=settings.strides, width=settings.width)
    shapes = [tuple(shape) for shape in settings.anchor_shapes] or [(1.0,) * dims]
    if any(len(shape) != dims for shape in shapes):
        raise RequestError(f"detector: anchor_shapes {shapes}; images have {dims} axes: give {dims} factors for each")
    finest = pyramid.cells[0]
    sides = [tuple(settings.anchor_scale * cell * factor for cell, factor in zip(finest, shape)) for shape in shapes]
    scales = [stride / settings.strides[0] for stride in settings.strides]
    anchors = AnchorGeneratorWithAnchorShape(feature_map_scales=scales, base_anchor_shapes=sides)
    network = RetinaNet(
        spatial_dims=dims,
        num_classes=classes,
        num_anchors=len(shapes),
        feature_extractor=pyramid,
        size_divisible=divisor(encoder, pyramid, dims),
    )
    detector = detector_class(network, anchors)
    detector.set_atss_matcher(num_candidates=settings.candidates, center_in_gt=False)
    if settings.class_loss == "focal":
        detector.set_cls_loss(FocalPerObject())
    else:
        detector.set_hard_negative_sampler(batch_size_per_image=64, positive_fraction=0.3, min_neg=16, pool_size=20)
    if settings.box_loss == "giou":
        detector.set_box_regression_loss(BoxGIoULoss(reduction="mean"), encode_gt=False, decode_pred=True)
    detector.set_box_selector_parameters(
        score_thresh=settings.score_threshold,
        topk_candidates_per_level=10 * settings.detections,
        nms_thresh=settings.nms,
        detections_per_img=settings.detections,
    )
    return detector


def divisor(encoder: Any, pyramid: FeaturePyramid, dims: int) -> tuple[int, ...]:
    """Return what image sizes must be multiples of, for encoder and levels."""
    own = type(encoder).divisor(encoder.config()["args"]) if hasattr(encoder, "config") else (1,) * dims
    return tuple(max(int(n), int(cell)) for n, cell in zip(own, pyramid.cells[-1]))


def detector_faults(settings: DetectorSettings) -> list[str]:
    """Return what is wrong with settings, one clause each."""
    # of a single candidate ATSS has no standard deviation, and takes none
    chosen_from = settings.candidates * len(settings.strides) * max(1, len(settings.anchor_shapes))
    checks = (
        ("strides", min(settings.strides, default=0) >= 1, "whole numbers, each twice the one before"),
        ("width", settings.width >= 8 and settings.width % 8 == 0, "a multiple of 8"),
        ("anchor_scale", settings.anchor_scale > 0, "above 0"),
        ("anchor_shapes", all(min(shape, default=0) > 0 for shape in settings.anchor_shapes), "factors above 0"),
        (
            "candidates",
            settings.candidates >= 1 and chosen_from >= 2,
            "1 or more, 2 or more where there is one level and one anchor",
        ),
        ("class_loss", settings.class_loss in CLASS_LOSSES, " or ".join(CLASS_LOSSES)),
        ("box_loss", settings.box_loss in BOX_LOSSES, " or ".join(BOX_LOSSES)),
        ("score_threshold", 0 <= settings.score_threshold < 1, "0 to below 1"),
        ("nms", 0 < settings.nms < 1, "between 0 and 1"),
        ("detections", settings.detections >= 1, "1 or more"),
    )
    return [f"{name}: {getattr(settings, name)!r}; {accepted}" for name, good, accepted in checks if not good]


def losses_of(detector: Any, images: Tensor, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return `classification` and `box_regression` of a batch; the second is 0, with a gradient of 0, where no cell has an object."""
    found = detector(images, [dict(target) for target in targets])
    boxes = found[detector.box_reg_key].to(images.device)
    if not boxes.requires_grad:  # MONAI returns a constant then
        boxes = boxes + 0.0 * found[detector.cls_key]
    return {"classification": found[detector.cls_key], "box_regression": boxes}


@torch.no_grad()
def detect(detector: Any, images: Tensor, *, window: Sequence[int] | None = None, overlap: float = 0.5) -> list[dict[str, Tensor]]:
    """Return {boxes, labels, scores} of each image, best first.

    Args:
        detector: In evaluation mode.
        images: (B, C, *size).
        window: Slide a window of this size where the image is larger, by MONAI's inferer over the maps of all levels; None never.
        overlap: Of neighbouring windows.
    """
    slide = window is not None and any(n > w for n, w in zip(images.shape[2:], window))
    if slide:
        detector.set_sliding_window_inferer(roi_size=tuple(window or ()), sw_batch_size=1, overlap=overlap, mode="gaussian")
    found = detector(images, use_inferer=slide)
    order = [torch.argsort(one[detector.pred_score_key], descending=True, stable=True) for one in found]
    return [
        {"boxes": one["boxes"][k], "labels": one["labels"][k], "scores": one[detector.pred_score_key][k]}
        for one, k in zip(found, order)
    ]


@torch.no_grad()
def detect_mirrored(
    detector: Any, images: Tensor, flips: Sequence[int], *, window: Sequence[int] | None = None, overlap: float = 0.5
) -> list[dict[str, Tensor]]:
    """Return what `detect` finds in images and in their mirror images, fused by `fuse_boxes`.

    Args:
        detector: In evaluation mode.
        images: (B, C, *size).
        flips: Axes (0 is the first spatial one), each of which gives one mirror image more; without any this is `detect`.
        window: As in `detect`.
        overlap: As in `detect`.
    """
    found = [detect(detector, images, window=window, overlap=overlap)]
    for axis in flips:
        mirrored = detect(detector, images.flip(2 + axis), window=window, overlap=overlap)
        found.append([{**one, "boxes": mirror_boxes(one["boxes"], axis, images.shape[2 + axis])} for one in mirrored])
    if len(found) == 1:
        return found[0]
    nms, most = detector.box_selector.nms_thresh, detector.box_selector.detections_per_img
    return [fuse_boxes(views, nms, most) for views in zip(*found, strict=True)]


def mirror_boxes(boxes: Tensor, axis: int, size: int) -> Tensor:
    """Return boxes (N, 2 D), low corner then high corner, in the mirror image along an axis of so many pixels."""
    dims = boxes.shape[1] // 2
    mirrored = boxes.clone()
    mirrored[:, axis], mirrored[:, dims + axis] = size - boxes[:, dims + axis], size - boxes[:, axis]
    return mirrored


def fuse_boxes(views: Sequence[dict[str, Tensor]], overlap: float, most: int) -> dict[str, Tensor]:
    """Return the boxes of several looks at one image as one set, best first: weighted boxes fusion.

    From the best score down, each box joins the fused box of its class that it overlaps most, if by more than `overlap`, or begins one. A
    fused box is the mean of its members, weighted by score; its score is their mean, times the share of the looks that have a member in it
    (at most 1): what one look of two finds counts half.

    Args:
        views: {boxes (N, 2 D), labels (N,), scores (N,)} of each look.
        overlap: Intersection over union.
        most: Boxes to return.

    Reference:
        Solovyev et al. 2021, "Weighted boxes fusion", Image and Vision Computing 107, section 3, equations 1 to 5.
    """
    from monai.data.box_utils import box_iou

    boxes, labels, scores = (torch.cat([view[key] for view in views]) for key in ("boxes", "labels", "scores"))
    order = torch.argsort(scores, descending=True, stable=True)
    members: list[list[int]] = []
    fused = boxes.new_zeros(len(boxes), boxes.shape[1])
    kinds = labels.new_full((len(boxes),), -1)
    for place in order.tolist():
        same = torch.nonzero(kinds[: len(members)] == labels[place])[:, 0]
        shared = box_iou(boxes[place][None], fused[same])[0] if len(same) else scores.new_zeros(0)
        if len(same) and shared.max() > overlap:
            row = int(same[shared.argmax()])
            members[row].append(place)
        else:
            row = len(members)
            members.append([place])
            kinds[row] = labels[place]
        own = members[row]
        weights = scores[own].clamp(min=torch.finfo(scores.dtype).tiny)
        fused[row] = (weights[:, None] * boxes[own]).sum(0) / weights.sum()
    sure = torch.stack([scores[own].mean() * min(len(own), len(views)) / len(views) for own in members]) if members else scores[:0]
    best = torch.argsort(sure, descending=True, stable=True)[:most]
    return {"boxes": fused[best], "labels": kinds[best], "scores": sure[best]}
