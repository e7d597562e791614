"""Every registered encoder, and what is particular to each."""

from __future__ import annotations

import pytest
import torch

from medssl.encoders.loading import load_into
from medssl.encoders.segresnet3d import SegResNet3D
from medssl.encoders.vit3d import ViT3D
from medssl.errors import WeightsError
from medssl.registry import ENCODERS
from medssl.testing import check_encoder

TINY = {
    "video_vit": {"image_size": (4, 16, 24), "patch_size": 8, "hidden_size": 24, "num_layers": 2, "num_heads": 2},
    "vit3d": {"image_size": (16, 24, 8), "patch_size": 8, "hidden_size": 24, "num_layers": 2, "num_heads": 2},
    "segresnet3d": {"init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)},
    "image2d": {"model": "resnet18", "in_channels": 2},
    "slice_volume": {
        "slice_encoder": {"model": "resnet18"},
        "aggregator": {"depth": 1, "heads": 2, "dim_head": 8, "hidden_dim": 16, "dropout": 0.0},
        "dim": 16,
        "pool": "stages",
        "chunk": 4,
    },
}
SIZES = {"image2d": (64, 96), "slice_volume": (32, 64, 6), "video_vit": (4, 16, 24)}


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_encoder__keeps_the_contract(name: str) -> None:
    check_encoder(name, TINY[name], image_size=SIZES.get(name, (16, 24, 8)))


def test_vit3d__has_exactly_the_keys_and_outputs_of_unetr_vit() -> None:
    from monai.networks.nets import UNETR

    encoder = ViT3D(image_size=(32, 48, 16), hidden_size=24, num_layers=12, num_heads=2).eval()
    unetr = UNETR(1, 2, (32, 48, 16), feature_size=4, hidden_size=24, mlp_dim=96, num_heads=2, proj_type="conv").eval()
    unetr.vit.load_state_dict(encoder.net.state_dict(), strict=True)
    x = torch.randn(1, 1, 32, 48, 16)
    with torch.no_grad():
        expected, hidden = unetr.vit(x)
        output = encoder.forward_features(x)
    assert torch.allclose(output.tokens, expected, atol=1e-5)
    for ours, theirs in zip(output.pyramid, hidden):
        assert torch.allclose(unetr.proj_feat(theirs), ours, atol=1e-5)  # UNETR's own unflatten


def test_vit3d__keep_equals_dropping_tokens_by_hand() -> None:
    encoder = ViT3D(**TINY["vit3d"]).eval()  # type: ignore[arg-type]
    x = torch.randn(2, 1, 16, 24, 8)
    keep = torch.tensor([[0, 4], [2, 3]])
    with torch.no_grad():
        embedded = encoder.net.patch_embedding(x)
        expected = torch.stack([embedded[b, keep[b]] for b in range(2)])
        for block in encoder.net.blocks:
            expected = block(expected)
        expected = encoder.net.norm(expected)
        assert torch.allclose(encoder.forward_features(x, keep=keep).tokens, expected, atol=1e-6)


def test_vit3d__another_crop_size_uses_resized_positions() -> None:
    small = ViT3D(**TINY["vit3d"])  # type: ignore[arg-type]
    large = ViT3D(**{**TINY["vit3d"], "image_size": (32, 24, 16)})  # type: ignore[arg-type]
    manifest = {"encoder": small.config(), "part": "encoder"}
    load_into(large, small.net.state_dict(), manifest)
    x = torch.randn(1, 1, 32, 24, 16)
    with torch.no_grad():
        assert torch.allclose(small.eval()(x).tokens, large.eval()(x).tokens, atol=1e-5)


def test_load_into__names_the_first_fault() -> None:
    encoder = ViT3D(**TINY["vit3d"])  # type: ignore[arg-type]
    manifest = {"encoder": encoder.config(), "part": "encoder"}
    state = encoder.net.state_dict()
    state.pop("norm.weight")
    with pytest.raises(WeightsError, match=r"1 fault\(s\), first missing norm.weight"):
        load_into(encoder, state, manifest)


def test_vit3d__unused_norms_need_no_gradient() -> None:
    encoder = ViT3D(**TINY["vit3d"])  # type: ignore[arg-type]
    encoder(torch.randn(1, 1, 16, 24, 8)).tokens.sum().backward()
    missing = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(not p.requires_grad for n, p in encoder.named_parameters() if "norm_cross_attn" in n)


def test_segresnet3d__decoder_equals_monais_forward() -> None:
    from monai.networks.nets import SegResNet

    encoder = SegResNet3D(**TINY["segresnet3d"]).eval()  # type: ignore[arg-type]
    stock = SegResNet(
        3, init_filters=8, in_channels=1, out_channels=1, blocks_down=(1, 1, 1), blocks_up=(1, 1), use_conv_final=False
    )
    stock.load_state_dict(encoder.net.state_dict(), strict=True)
    x = torch.randn(1, 1, 16, 24, 8)
    with torch.no_grad():
        assert torch.equal(encoder.forward_decoder(encoder(x).pyramid), stock.eval()(x))


def test_encoder__refuses_a_size_that_the_patch_does_not_divide() -> None:
    encoder = SegResNet3D(**TINY["segresnet3d"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not a multiple of the patch"):
        encoder(torch.randn(1, 1, 10, 8, 8))


def test_checkpoint_blocks__leaves_gradients_equal() -> None:
    encoder = ViT3D(**TINY["vit3d"])  # type: ignore[arg-type]
    x = torch.randn(1, 1, 16, 24, 8)
    grads = []
    for on in (False, True):
        encoder.checkpoint_blocks = on
        encoder.zero_grad()
        encoder(x).tokens.square().sum().backward()
        grads.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
