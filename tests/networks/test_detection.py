"""MONAI's RetinaNet around our encoders: losses, ignored regions, objects that ATSS leaves out, windows, and the focal loss by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medssl.errors import RequestError
from medssl.networks.detection import (
    DetectorSettings,
    FocalPerObject,
    build_detector,
    detect,
    detect_mirrored,
    fuse_boxes,
    losses_of,
    mirror_boxes,
)
from tests.evaluation.toy_boxes import Toy


def make(dims: int = 2, **settings: Any) -> Any:
    torch.manual_seed(0)
    plain = {"strides": (4, 8), "width": 16, "anchor_scale": 2.0, **settings}
    return build_detector(Toy(dims), 2, (32,) * dims, DetectorSettings(**plain))


def target(*boxes: list[float], ignore: list[list[float]] | None = None, dims: int = 2) -> dict[str, Tensor]:
    rows = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 2 * dims)
    hidden = torch.tensor(ignore or [], dtype=torch.float32).reshape(-1, 2 * dims)
    return {"boxes": rows, "labels": torch.zeros(len(rows), dtype=torch.int64), "ignore": hidden}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("class_loss", "box_loss"), [("focal", "giou"), ("bce", "l1")])
def test_losses__have_gradients_with_and_without_boxes(dims: int, class_loss: str, box_loss: str) -> None:
    detector = make(dims, class_loss=class_loss, box_loss=box_loss).train()
    images = torch.randn(2, 1, *(32,) * dims)
    full, empty = target([4.0] * dims + [13.0] * dims, dims=dims), target(dims=dims)
    for pair in ([full, empty], [empty, empty]):
        losses = losses_of(detector, images, pair)
        assert set(losses) == {"classification", "box_regression"} and all(torch.isfinite(v) for v in losses.values())
        sum(losses.values()).backward()  # type: ignore[union-attr]
    assert float(losses["box_regression"].detach()) == 0
    assert all(p.grad is not None for p in detector.network.classification_head.parameters())


def test_focal_loss__by_hand() -> None:
    logits, targets = torch.tensor([[0.3, -1.2], [2.0, -0.4], [0.1, 0.5]]), torch.tensor([[1.0, 0], [0, 0], [0, 1]])
    p = torch.sigmoid(logits)
    right = torch.where(targets == 1, p, 1 - p)
    weight = torch.where(targets == 1, 0.25, 0.75)
    expected = (-weight * (1 - right) ** 2 * right.log()).sum() / 2
    assert FocalPerObject()(logits, targets) == pytest.approx(float(expected), rel=1e-5)
    assert torch.isfinite(FocalPerObject()(logits, torch.zeros_like(targets)))


def matches(detector: Any, one: dict[str, Tensor]) -> np.ndarray:
    images = torch.zeros(1, 1, *(32,) * detector.spatial_dims)
    maps = [torch.zeros(1, 2, *(32 // s,) * detector.spatial_dims) for s in (4, 8)]
    anchors = detector.anchor_generator(images, maps)
    found = detector.compute_anchor_matched_idxs(anchors, [one], [m[0, 0].numel() for m in maps])
    return np.asarray(found[0].numpy())


@pytest.mark.parametrize("dims", [2, 3])
def test_every_object__has_a_cell(dims: int) -> None:
    """Wherever a box lies and whatever its size, it is learnt; MONAI's matcher alone leaves some out."""
    detector = make(dims)
    rng = np.random.default_rng(0)
    alone = 0
    for _ in range(40):
        low = rng.integers(0, 20, (2, dims))
        boxes = np.concatenate([low, low + rng.integers(2, 12, (2, dims))], axis=1).astype(float).tolist()
        boxes[0][:dims], boxes[0][dims:] = [8.0] * dims, [16.0] * dims  # in the middle of cells
        found = matches(detector, target(*boxes, dims=dims))
        assert {0, 1} <= set(found.tolist())
        maps = [torch.zeros(1, 2, *(32 // s,) * dims) for s in (4, 8)]
        anchors = detector.anchor_generator(torch.zeros(1, 1, *(32,) * dims), maps)[0]
        own = detector.proposal_matcher(torch.tensor(boxes), anchors, [m[0, 0].numel() for m in maps], 1)[1]
        alone += not {0, 1} <= set(own.tolist())
    assert alone > 0


def test_ignored_regions__are_no_background() -> None:
    detector = make()
    plain, hidden = matches(detector, target([4, 4, 13, 13])), matches(detector, target([4, 4, 13, 13], ignore=[[16, 16, 32, 32]]))
    assert (plain >= -1).all() and (hidden == -2).sum() > 0 and ((plain >= 0) == (hidden >= 0)).all()
    empty = matches(detector, target(ignore=[[0, 0, 32, 32]]))
    assert (empty == -2).all()


def test_found_boxes__lie_inside_and_best_first() -> None:
    detector = make(3, score_threshold=0.0, detections=20).eval()
    (found,) = detect(detector, torch.randn(1, 1, 32, 32, 32))
    assert found["boxes"].shape == (20, 6) and (found["scores"].diff() <= 0).all()
    assert float(found["boxes"].min()) >= 0 and float(found["boxes"].max()) <= 32


def test_larger_images__are_seen_through_windows() -> None:
    """With windows the middle of a large image gives what it gives in a small one of the window's size, up to what lies around."""
    detector = make(2, score_threshold=0.0, detections=10).eval()
    image = torch.randn(1, 1, 64, 48)
    (slid,) = detect(detector, image, window=(32, 32))
    (whole,) = detect(detector, image)
    assert slid["boxes"].shape == whole["boxes"].shape == (10, 4)
    assert not torch.equal(slid["scores"], whole["scores"])
    (same,) = detect(detector, image[..., :32, :32], window=(32, 32))
    assert torch.equal(same["scores"], detect(detector, image[..., :32, :32])[0]["scores"])


def test_settings_that_do_not_fit__are_refused() -> None:
    with pytest.raises(RequestError, match="class_loss: 'hinge'; focal or bce; detections: 0; 1 or more"):
        make(class_loss="hinge", detections=0)
    with pytest.raises(RequestError, match="images have 2 axes: give 2 factors"):
        make(anchor_shapes=[(1, 1, 1)])
    with pytest.raises(RequestError, match="no class"):
        build_detector(Toy(), 0, (32, 32), DetectorSettings(strides=(4, 8)))


def seen(*rows: tuple[list[float], int, float]) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor([box for box, _, _ in rows]).reshape(-1, 4),
        "labels": torch.tensor([label for _, label, _ in rows], dtype=torch.int64),
        "scores": torch.tensor([score for _, _, score in rows]),
    }


def test_fused_boxes__are_those_of_the_formula() -> None:
    # one object in both looks, one in the second alone, one of another class in the same place
    first = seen(([0.0, 0, 10, 10], 0, 0.9), ([0.0, 0, 10, 10], 1, 0.3))
    second = seen(([2.0, 0, 12, 10], 0, 0.6), ([20.0, 20, 28, 30], 0, 0.8))
    found = fuse_boxes([first, second], overlap=0.5, most=10)
    edge = 0.6 * 2 / 1.5
    assert torch.allclose(found["boxes"], torch.tensor([[edge, 0, 10 + edge, 10], [20, 20, 28, 30], [0, 0, 10, 10]]))
    assert found["labels"].tolist() == [0, 0, 1]
    assert torch.allclose(found["scores"], torch.tensor([0.75, 0.4, 0.15]))
    assert fuse_boxes([first, second], overlap=0.5, most=1)["scores"].tolist() == pytest.approx([0.75])
    again = fuse_boxes([second, first], overlap=0.5, most=10)
    assert all(torch.allclose(again[key].float(), found[key].float()) for key in found)
    three = seen(([0.0, 0, 10, 10], 0, 0.9), ([1.0, 0, 11, 10], 0, 0.6), ([0.0, 1, 10, 11], 0, 0.3))
    assert fuse_boxes([three, seen()], overlap=0.5, most=10)["scores"].tolist() == pytest.approx(
        [0.6]
    )  # of two looks, not more than all
    empty = fuse_boxes([seen(), seen()], overlap=0.5, most=10)
    assert empty["boxes"].shape == (0, 4) and not len(empty["labels"]) and not len(empty["scores"])


@pytest.mark.parametrize("dims", [2, 3])
def test_mirrored_looks__find_mirrored_boxes(dims: int) -> None:
    detector = make(dims, score_threshold=0.0, detections=20).eval()
    image = torch.randn(2, 1, *(32,) * dims)
    plain = detect(detector, image)
    for one, same in zip(plain, detect_mirrored(detector, image, ()), strict=True):
        assert all(torch.equal(one[key], same[key]) for key in one)
    axis = dims - 1
    both, other = (detect_mirrored(detector, x, (axis,)) for x in (image, image.flip(2 + axis)))
    for one, mirror in zip(both, other, strict=True):
        assert len(one["scores"]) and torch.allclose(one["scores"], mirror["scores"], atol=1e-5)
        assert torch.equal(one["labels"], mirror["labels"])
        assert torch.allclose(one["boxes"], mirror_boxes(mirror["boxes"], axis, 32), atol=1e-3)
    assert not torch.allclose(both[0]["boxes"], plain[0]["boxes"][: len(both[0]["boxes"])], atol=1e-3)
    assert torch.equal(mirror_boxes(mirror_boxes(plain[0]["boxes"], axis, 32), axis, 32).round(), plain[0]["boxes"].round())
