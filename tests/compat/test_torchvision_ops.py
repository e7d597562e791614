from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from medssl._compat.torchvision_ops import ensure, nms


def brute_force(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    def iou(a: torch.Tensor, b: torch.Tensor) -> float:
        width = max(0.0, min(float(a[2]), float(b[2])) - max(float(a[0]), float(b[0])))
        height = max(0.0, min(float(a[3]), float(b[3])) - max(float(a[1]), float(b[1])))
        inter = width * height
        area = [float((box[2] - box[0]) * (box[3] - box[1])) for box in (a, b)]
        return inter / (area[0] + area[1] - inter)

    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda j: (-float(scores[j]), j)):
        if all(iou(boxes[i], boxes[k]) <= threshold for k in kept):
            kept.append(i)
    return kept


def test_nms__equals_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 40):
        corner = torch.rand(count, 2, generator=generator) * 10
        boxes = torch.cat([corner, corner + 1 + 4 * torch.rand(count, 2, generator=generator)], dim=1)
        scores = torch.rand(count, generator=generator).round(decimals=1)  # ties
        assert nms(boxes, scores, 0.4).tolist() == brute_force(boxes, scores, 0.4)


@pytest.mark.slow
def test_ensure__lets_timm_import() -> None:
    code = "from medssl._compat.torchvision_ops import ensure; print(ensure()); import torchvision, timm; print(timm.__version__)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in ("True", "False")


def test_plain_import__fails() -> None:
    """When this fails, torchvision loads beside CPU torch by itself, and the shim can go."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", "import torchvision"], capture_output=True, text=True)
    if done.returncode == 0:
        if ensure():
            pytest.fail("the shim registered operators although torchvision loads: it must be a no-op here")
        pytest.skip("torchvision's own library loads on this machine: the shim does nothing")
    assert "torchvision::nms" in done.stderr


MATCHER = (
    "import monai.networks.nets; from medssl._compat import torchvision_ops as t; m = t.monai_detection(); "
    "print(isinstance(3, m.Matcher), isinstance(3, m.BalancedPositiveNegativeSampler))"
)
RETINANET = (
    "import monai.apps.detection.networks.retinanet_network; from medssl.export.retinanet import build; "
    "print(type(build('resnet18', 1, 2)[0]).__name__)"
)


@pytest.mark.parametrize(("code", "said"), [(MATCHER, "False False"), (RETINANET, "RetinaNet")], ids=["detector", "retinanet"])
def test_monai_detection__works_after_monai_was_imported_first(code: str, said: str) -> None:
    """MONAI takes names of torchvision at import; where torchvision fails then, they raise when touched, by a detector or the export."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == said, done.stderr[-2000:]
