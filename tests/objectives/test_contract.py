"""Every registered objective on a real encoder, through `medssl.testing`: what an outside plug-in would be checked with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.encoders.image2d import Image2D
from medssl.encoders.resenc3d import ResEnc3D
from medssl.encoders.segresnet3d import SegResNet3D
from medssl.encoders.slice_volume import SliceVolumeEncoder
from medssl.encoders.video_vit import VideoViT
from medssl.encoders.vit3d import ViT3D
from medssl.objectives.cluster_distillation import ClusterDistillation
from medssl.objectives.global_local_contrast import GlobalLocalContrast
from medssl.objectives.graph_matching import GraphMatching
from medssl.objectives.intra_inter_clustering import IntraInterClustering
from medssl.objectives.mae import MAE
from medssl.objectives.mae_cnn import MAECNN
from medssl.objectives.relative_speed import RelativeSpeed
from medssl.objectives.video_mae import VideoMAE
from medssl.registry import OBJECTIVES
from medssl.testing import check_objective, toy_views
from medssl.types import Part, StepContext, Views, ViewSpec
from tests.objectives import pictures
from tests.objectives.pictures import FakeImageEncoder

VOLUME = (16, 24, 8)
SPECS = {
    "image": ViewSpec("image", (32, 32), None, 2),
    "image_local": ViewSpec("image", (32, 32), None, 2),
    "stack": ViewSpec("clip", (3, 32, 32), None, 2),
    "volume": ViewSpec("volume", (32, 32, 3), None, 2),
}
CLIP = (8, 24, 32)
AGGREGATOR = {"depth": 1, "heads": 2, "dim_head": 8, "hidden_dim": 16, "dropout": 0.0}


def vit_mae() -> MAE:
    encoder = ViT3D(image_size=VOLUME, patch_size=4, hidden_size=24, num_layers=1, num_heads=2)
    return MAE(encoder, image_size=VOLUME, decoder_dim=24, decoder_depth=1, decoder_heads=2)


def cnn_mae() -> MAECNN:
    return MAECNN(SegResNet3D(init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1)), image_size=VOLUME)


def resenc_mae() -> MAECNN:
    return MAECNN(ResEnc3D(features_per_stage=(8, 12, 16), n_blocks_per_stage=(1, 1, 1), strides=(1, 2, 2)), image_size=VOLUME)


def clustering(**changes: Any) -> IntraInterClustering:
    # no batch norm: its statistics are over a micro-batch, and denominators could not average
    encoder = SliceVolumeEncoder(slice_encoder={"model": "test_convnext"}, aggregator=AGGREGATOR, dim=16, chunk=4)
    sizes = {"intra_prototypes": 6, "inter_prototypes": [3, 3], "projector_dim": 8, "freeze_prototypes": 0}
    return IntraInterClustering(encoder, view_specs=SPECS, items=4, **{**sizes, **changes})


def deep_clustering() -> IntraInterClustering:
    """After its first clustering: until then targets are balanced over the micro-batch."""
    objective = clustering(mode="deepcluster", places=3, standardise=False)
    for view in ("stack", "image"):
        objective(toy_views(objective, view=view, batch=4), StepContext())
        objective.after_step(StepContext())
    objective.on_epoch(StepContext())
    return objective


def graphs() -> GraphMatching:
    return GraphMatching(
        Image2D(model="test_resnet"), view_specs={"image": SPECS["image"]}, dim=8, nodes=4, neighbours=2, noise=1.0
    )


def contrast() -> GlobalLocalContrast:
    specs = {"image": ViewSpec("image", (64, 64), None, 2)}
    return GlobalLocalContrast(
        Image2D(model="test_resnet"), view_specs=specs, dim=8, hidden=16, decoder_blocks=3, decoder_width=8, partitions=2
    )


def video_vit() -> VideoViT:
    return VideoViT(image_size=CLIP, patch_size=8, hidden_size=24, num_layers=2, num_heads=2)


def clip_specs(count: int = 1) -> dict[str, ViewSpec]:
    return {"clip": ViewSpec("clip", CLIP, None, count)}


def distillation(**changes: Any) -> ClusterDistillation:
    sizes: dict[str, Any] = {"head_prototypes": 16, "head_hidden": 16, "bottleneck": 8, "decoder_dim": 24, "decoder_depth": 1}
    sizes |= {"prototypes": 6, "frames": 2, "masked_views": 2, "mask_ratio": 0.7}
    return ClusterDistillation(video_vit(), view_specs=clip_specs(), **{**sizes, **changes})


def painted_clips(**changes: Any) -> VideoMAE:
    sizes: dict[str, Any] = {"decoder_dim": 24, "decoder_depth": 1, "mask_ratio": 0.7}
    return VideoMAE(video_vit(), view_specs=clip_specs(), **{**sizes, **changes})


def speeds(**changes: Any) -> RelativeSpeed:
    # of four items that come back every step, the queue would hold their own keys as negatives
    return RelativeSpeed(video_vit(), view_specs=clip_specs(3), **{"dim": 8, "weights": {"motion": 1}, **changes})


CASES: dict[str, tuple[Callable[[], Any], tuple[str, ...], dict[str, Any]]] = {
    "mae": (vit_mae, ("volume",), {}),
    "mae_cnn": (cnn_mae, ("volume",), {}),
    "mae_cnn resenc3d": (resenc_mae, ("volume",), {}),
    "intra_inter_clustering": (clustering, ("stack", "image", "volume"), {"separable": False}),
    "intra_inter_clustering deepcluster": (deep_clustering, ("stack", "image"), {}),
    "graph_matching": (graphs, ("image",), {"separable": False, "lr": 1e-2, "batch": 16}),
    "global_local_contrast": (contrast, ("image",), {"separable": False}),
    "cluster_distillation": (distillation, ("clip",), {"separable": False}),
    "video_mae": (painted_clips, ("clip",), {}),
    "video_mae random": (lambda: painted_clips(masking="random", norm_target=False), ("clip",), {}),
    "relative_speed": (speeds, ("clip",), {}),
}


PAIRS = {"alice", "anatomical_embedding"}
"""Objectives on pairs of crops: their own test files check them, with views of pairs."""


def test_cases__cover_the_registry() -> None:
    assert {name.split()[0] for name in CASES} | PAIRS == set(OBJECTIVES)
    texts = [Path(__file__).with_name(f"test_{name}.py").read_text() for name in PAIRS]
    assert all("check_objective(" in text for text in texts)


LONG = {"intra_inter_clustering deepcluster"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in sorted(CASES)])
def test_objective__keeps_the_contract(name: str) -> None:
    make, views, how = CASES[name]
    torch.manual_seed(0)
    objective = make()
    batch = how.get("batch", 4)
    how = {key: value for key, value in how.items() if key != "batch"}
    check_objective(objective, [toy_views(objective, view=view, batch=batch) for view in views], steps=12, **how)


class Forgetful(torch.nn.Module):
    """Looks at half of a batch, keeps a number outside its state, counts what does not add up."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.encoder = FakeImageEncoder()
        self.view_specs = dict(pictures.SPECS)
        self.offset = 0.0
        self.spare = torch.nn.Linear(2, 2)
        self.spare.requires_grad_(fault == "unused")

    def denominators(self, views: Views) -> dict[str, Tensor]:
        return {"n": torch.tensor(2.0 * len(views["image"]) + (self.fault == "counts"))}

    def forward(self, views: Views, ctx: StepContext) -> dict[str, Tensor]:
        x = views["image"][: 2 if self.fault == "half" and len(views["image"]) > 2 else None]
        rows = self.encoder.forward_features(x.flatten(0, 1)).tokens.mean(dim=1)
        total = rows.square().mean(dim=1).sum() * (1 + self.offset)
        return {"loss": ctx.mean(total, "n", torch.tensor(2.0 * len(x)))}

    def after_step(self, ctx: StepContext) -> None:
        self.offset += self.fault == "state"

    def exported(self) -> dict[str, Any]:
        return {} if self.fault != "export" else {"encoder": Part(self.encoder, {}, "nothing.")}


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("unused", "spare.weight gets no gradient"),
        ("half", "items .2, 3. of the batch teach nothing"),
        ("state", "state_dict.. must hold everything"),
        ("counts", "a count must add up"),
        ("export", "has no tensors under prefix"),
    ],
)
def test_faults__are_found(fault: str, text: str) -> None:
    torch.manual_seed(0)
    objective = Forgetful(fault)
    with pytest.raises(AssertionError, match=text):
        check_objective(objective, toy_views(objective, batch=4), steps=2)
