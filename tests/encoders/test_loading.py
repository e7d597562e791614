"""Encoders are opened without drawing start weights first, and nothing undrawn is left in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medssl.build import build_encoder, load_encoder
from medssl.encoders.loading import NoRandomStart
from medssl.weights import save_part

SMALL: dict[str, dict[str, Any]] = {
    "vit3d": {"image_size": [16, 16, 16], "patch_size": 8, "hidden_size": 24, "num_layers": 2, "num_heads": 2},
    "segresnet3d": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "resenc3d": {"features_per_stage": [8, 12], "n_blocks_per_stage": [1, 1], "strides": [1, 2]},
    "image2d": {"model": "vit_tiny_patch16_224", "image_size": 32, "model_args": {"depth": 2}},
    "video_vit": {"image_size": [2, 32, 32], "hidden_size": 24, "num_layers": 2, "num_heads": 2},
}


@pytest.mark.parametrize("name", SMALL)
def test_load_encoder__holds_the_weights_and_no_memory_that_nobody_filled(name: str, tmp_path: Any, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    encoder = build_encoder({"name": name, "args": SMALL[name]})
    keys = tuple(encoder.key_groups["encoder"])
    state = {key: value for key, value in encoder.net.state_dict().items() if key.startswith(keys)}
    file = save_part(tmp_path, "encoder", state, encoder.part("encoder").manifest)
    before = torch.get_rng_state()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN, so that what nobody fills shows
    try:
        opened = load_encoder(file)
    finally:
        torch.use_deterministic_algorithms(False)
    found = opened.net.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert all(torch.isfinite(value.float()).all() for value in opened.state_dict().values())
    if name in ("vit3d", "video_vit"):  # timm draws its position table outright; networks with a decoder are built again
        assert torch.equal(torch.get_rng_state(), before)


def test_no_random_start__says_what_is_left() -> None:
    with NoRandomStart() as start:
        layer = torch.nn.Sequential(torch.nn.Linear(3, 2))
        layer.net = torch.nn.Linear(2, 2)
    assert start.unfilled(layer, {"0.weight": layer[0].weight, "0.bias": layer[0].bias})  # net.weight was not loaded
    assert not start.unfilled(layer, {name: torch.zeros(1) for name in ("0.weight", "0.bias", "weight", "bias")})
    torch.manual_seed(0)
    drawn = torch.nn.Linear(3, 2).weight
    torch.manual_seed(0)
    assert torch.equal(torch.nn.Linear(3, 2).weight, drawn)  # outside everything is drawn as ever
