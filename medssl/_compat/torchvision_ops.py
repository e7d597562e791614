"""Let a CUDA-built torchvision import beside a CPU-built torch.

torchvision's wheel on PyPI links libtorch_cuda; beside CPU torch its compiled library does not load, the operators `nms` and `qnms` stay
undefined, and `import torchvision` dies with "operator torchvision::nms does not exist" (so do timm and MONAI's detection). `ensure()`
defines just those two, `nms` with a real kernel in plain torch. Where the compiled library loads, it does nothing.

Can go when `tests/compat/test_torchvision_ops.py::test_plain_import__fails` fails: torchvision then ships a library that loads on CPU torch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

_library: Any = None  # keeps the registration alive


def ensure() -> bool:
    """Make `import torchvision` work. Call before importing timm, torchvision or MONAI detection.

    Returns:
        True when the pure-torch operators were registered, False when torchvision's own library serves them.
    """
    global _library
    if _library is not None:
        return True
    import torch

    ops: Any = torch.ops
    libraries: Any = torch.library
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    folder = Path(next(iter(spec.submodule_search_locations)))
    for compiled in sorted(folder.glob("_C*.so")):  # `_C.so` up to 0.28, `_C_stable.so` from 0.29
        try:
            ops.load_library(str(compiled))
        except OSError:
            continue
        return False
    library = libraries.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define(
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"  # quantised: declared, never pretended
    )
    library.impl("nms", nms, "CompositeExplicitAutograd")
    library.impl("qnms", _refuse_quantised, "CompositeExplicitAutograd")
    _library = library
    return True


def monai_detection() -> Any:
    """Import MONAI's detector module in working order and return it.

    `import monai` imports it too, and where that came before `ensure()` it holds two names from torchvision that raise when touched: they
    are put right. Can go together with `ensure`.
    """
    ensure()
    from monai.apps.detection.networks import retinanet_detector
    from torchvision.models.detection import _utils

    for name in ("Matcher", "BalancedPositiveNegativeSampler"):
        setattr(retinanet_detector, name, getattr(_utils, name))
    return retinanet_detector


def monai_retinanet() -> Any:
    """Import MONAI's RetinaNet module in working order and return it; see `monai_detection`."""
    ensure()
    from monai.apps.detection.networks import retinanet_network
    from monai.networks.blocks import backbone_fpn_utils
    from torchvision import models
    from torchvision.models.detection import backbone_utils

    retinanet_network._validate_trainable_layers = backbone_utils._validate_trainable_layers
    backbone_fpn_utils.torchvision_models = models
    return retinanet_network


def nms(dets: Any, scores: Any, iou_threshold: float) -> Any:
    """Greedy non-maximum suppression in plain torch, equal to torchvision's kernel.

    Args:
        dets: (N, 4) boxes x1, y1, x2, y2.
        scores: (N,) scores.
        iou_threshold: A box is dropped when its IoU with a kept, better box is strictly greater than this.

    Returns:
        (K,) int64 indices of kept boxes, best first.
    """
    import torch

    order = torch.argsort(scores, descending=True, stable=True)
    boxes = dets[order]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    alive = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    kept = []
    for i in range(len(boxes)):
        if not alive[i]:
            continue
        kept.append(i)
        low = torch.maximum(boxes[i, :2], boxes[i + 1 :, :2])
        high = torch.minimum(boxes[i, 2:], boxes[i + 1 :, 2:])
        overlap = (high - low).clamp(min=0).prod(dim=1)
        union = area[i] + area[i + 1 :] - overlap
        alive[i + 1 :] &= ~(overlap / union > iou_threshold)
    return order[torch.tensor(kept, dtype=torch.int64, device=boxes.device)]


def _refuse_quantised(dets: Any, scores: Any, iou_threshold: float) -> Any:
    raise NotImplementedError("quantised NMS needs torchvision's compiled library; use float boxes")
