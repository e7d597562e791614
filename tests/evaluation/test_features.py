from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from medssl.encoders.segresnet3d import SegResNet3D
from medssl.encoders.vit3d import ViT3D
from medssl.errors import RequestError
from medssl.evaluation.features import embed, evaluation_mode, probe_table
from medssl.types import EncoderOutput


class Noisy(nn.Module):
    """An encoder with all that a missing eval mode would show: batch norm, dropout, a counter, a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(2)
        self.frozen = nn.BatchNorm3d(2)
        self.frozen.eval()
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))

    def forward_features(self, x: torch.Tensor) -> EncoderOutput:
        self.calls += 1
        torch.rand(3), np.random.rand(), random.random()  # an encoder that draws from every global generator
        tokens = self.drop(self.frozen(self.norm(x))).flatten(2).transpose(1, 2)
        return EncoderOutput(tokens=tokens, grid=tuple(x.shape[2:]), pooled=tokens.mean(dim=1))


def images(n: int, size: int = 4, channels: int = 2) -> torch.Tensor:
    return torch.randn(n, channels, size, size, size, generator=torch.Generator().manual_seed(0))


def test_embed__equals_the_encoder_in_eval_mode_for_any_batch_size():
    encoder = ViT3D(image_size=(16, 16, 16), patch_size=8, hidden_size=12, num_layers=2, num_heads=2)
    x = images(5, 16, 1)
    features, ids = embed(encoder, [(x[:2], ["a", "b"]), (x[2:], ["c", "d", "e"])])
    with torch.no_grad():
        expected = encoder.eval().forward_features(x).pooled
    assert ids == ["a", "b", "c", "d", "e"]
    assert features.dtype == np.float32 and features.shape == (5, 12)
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-6)


def test_embed__leaves_no_trace():
    encoder = Noisy()
    encoder.norm.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    flags = [part.training for part in encoder.modules()]
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    expected = torch.rand(2), np.random.rand(), random.random()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    first, _ = embed(encoder, [(images(4), range(4))])
    second, _ = embed(encoder, [(images(4), range(4))])
    assert (first == second).all(), "dropout or batch statistics were active"
    assert torch.equal(torch.rand(2), expected[0])
    assert (np.random.rand(), random.random()) == expected[1:]
    assert flags == [part.training for part in encoder.modules()] and not encoder.frozen.training and encoder.training
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert [p.requires_grad for p in encoder.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in encoder.parameters()) and torch.is_grad_enabled()


def test_evaluation_mode__restores_after_an_exception():
    encoder = Noisy()
    state = torch.get_rng_state()

    def fail():
        with evaluation_mode(encoder):
            assert not encoder.training
            encoder.calls += 5
            torch.rand(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert encoder.training and encoder.calls.item() == 0
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


def test_embed__is_float32_inside_autocast():
    encoder = SegResNet3D(init_filters=8, blocks_down=(1, 1), blocks_up=(1,))
    x = images(2, 8, 1)
    plain, _ = embed(encoder, [(x, [0, 1])])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = embed(encoder, [(x, [0, 1])])
    assert (plain == inside).all()


def test_embed__refuses():
    with pytest.raises(RequestError, match="no images"):
        embed(Noisy(), [])
    with pytest.raises(RequestError, match="4 images and 3 ids"):
        embed(Noisy(), [(images(4), [0, 1, 2])])


def controls(n: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    return {name: generator.normal(size=(n, 4)) for name in ("random_init", "raw_pixels", "intensity_statistics")}


def test_probe_table__carries_controls_and_ranks_features():
    generator = np.random.default_rng(2)
    age = generator.uniform(20, 80, size=60)
    features = np.stack([np.cos(age / 40), np.sin(age / 40)], axis=1) + generator.normal(0, 0.01, (60, 2))
    groups = [f"p{i // 2}" for i in range(60)]
    rows = probe_table(features, controls(60), age, groups, task="regression", draws=100)
    value = {(row["name"], row["probe"], row["metric"]): row["value"] for row in rows}
    assert len(rows) == len(value) == 4 * 2 * 2
    assert value["encoder", "linear", "r2"] > 0.9 and value["encoder", "knn5", "r2"] > 0.9
    assert value["encoder", "knn5", "mae"] < 5
    for name in controls(1):
        assert value[name, "linear", "r2"] < 0.2
    assert {(row["n_images"], row["n_patients"], row["by"]) for row in rows} == {(60, 30, "by patient")}


def test_probe_table__by_image_without_patients():
    labels = np.arange(20) % 2
    rows = probe_table(np.eye(2)[labels], controls(20), labels, None, task="classification", draws=20)
    assert {(row["n_patients"], row["by"]) for row in rows} == {(None, "by image")}


def test_probe_table__refuses_without_controls():
    some = controls(8)
    del some["raw_pixels"]
    with pytest.raises(RequestError, match="no control raw_pixels; every table carries"):
        probe_table(np.eye(8), some, np.arange(8.0), None, task="regression")
