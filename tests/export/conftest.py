from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medssl.encoders.segresnet3d import SegResNet3D
from medssl.encoders.slice_volume import SliceVolumeEncoder
from medssl.encoders.swin3d import Swin3D
from medssl.encoders.vit3d import ViT3D
from medssl.weights import save_part

FACTS = {
    "spacing_mm": [2.0, 1.0, 1.5],
    "intensity": {"normalize": "zscore"},
    "spacing_source": "views",
    "domains": ["mri"],
    "licence": "Apache-2.0",
    "data_cards": [{"name": "ours", "version": "3", "licence": "MIT", "card_hash": "0f1e2d3c" * 8, "notes": []}],
    "seed": 7,
    "run": {"note": "stays in the run folder"},
}


def save_run(encoder: Any, folder: Path, **facts: Any) -> Path:
    """Write a run folder as the training loop does."""
    for group, prefixes in encoder.key_groups.items():
        state = {key: value for key, value in encoder.net.state_dict().items() if key.startswith(tuple(prefixes))}
        save_part(folder / "weights" / "last", group, state, {**encoder.part(group).manifest, **FACTS, **facts})
    (folder / "weights" / "index.json").write_text(json.dumps({"default": "encoder"}))
    return folder


def make_vit(**args: Any) -> ViT3D:
    torch.manual_seed(0)
    return ViT3D(**{"image_size": (32, 48, 16), "hidden_size": 48, "num_heads": 4, "mlp_dim": 96, **args})


def make_segresnet(**args: Any) -> SegResNet3D:
    torch.manual_seed(1)
    return SegResNet3D(**{"init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1), **args})


def make_swin(**args: Any) -> Swin3D:
    torch.manual_seed(3)
    small = {"feature_size": 12, "depths": (2, 1, 1, 1), "num_heads": (3, 2, 2, 2), "window_size": (4, 3, 2)}
    return Swin3D(**{**small, **args})


@pytest.fixture(name="vit_run")
def _vit_run(tmp_path: Path) -> Path:
    return save_run(make_vit(), tmp_path / "vit_run")


@pytest.fixture(name="segresnet_run")
def _segresnet_run(tmp_path: Path) -> Path:
    return save_run(make_segresnet(), tmp_path / "segresnet_run", image_size=[16, 24, 8])


@pytest.fixture(name="swin_run")
def _swin_run(tmp_path: Path) -> Path:
    return save_run(make_swin(), tmp_path / "swin_run", image_size=[64, 96, 32])


@pytest.fixture(name="entries")
def _entries(tmp_path: Path) -> Callable[[], list[str]]:
    """Everything in the folder where exports are made, hidden files included."""
    return lambda: sorted(path.name for path in tmp_path.iterdir())


def make_joint(**args: Any) -> SliceVolumeEncoder:
    """A joint encoder whose batch norms are not what a new network has."""
    torch.manual_seed(2)
    small = {"depth": 2, "heads": 2, "dim_head": 8, "hidden_dim": 16}
    encoder = SliceVolumeEncoder(**{"slice_encoder": {"model": "resnet18"}, "aggregator": small, "dim": 32, **args})
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[operator, union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[operator, union-attr]
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return encoder.eval()


def save_parts(encoder: Any, folder: Path, **facts: Any) -> Path:
    """Write a run folder with all parts of a joint encoder, or the one of an image encoder."""
    parts = encoder.parts() if hasattr(encoder, "parts") else {"encoder": encoder.part("encoder")}
    for name, part in parts.items():
        state = {key[len(part.prefix) :]: value for key, value in part.module.state_dict().items() if key.startswith(part.prefix)}
        save_part(folder / "weights" / "last", name, state, {**part.manifest, **FACTS, **facts})
    (folder / "weights" / "index.json").write_text(json.dumps({"default": next(iter(parts))}))
    return folder


@pytest.fixture(name="joint_run", scope="session")
def _joint_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_parts(make_joint(), tmp_path_factory.mktemp("joint") / "run")
