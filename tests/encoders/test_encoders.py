"""Every registered encoder, and what is particular to each."""

from __future__ import annotations

import pytest
import torch

from medssl.encoders.loading import load_into
from medssl.encoders.segresnet3d import SegResNet3D
from medssl.encoders.swin3d import Swin3D
from medssl.encoders.vit3d import ViT3D
from medssl.errors import RequestError, WeightsError
from medssl.registry import ENCODERS, lookup
from medssl.testing import check_encoder

TINY = {
    "video_vit": {"image_size": (4, 16, 24), "patch_size": 8, "hidden_size": 24, "num_layers": 2, "num_heads": 2},
    "vit3d": {"image_size": (16, 24, 8), "patch_size": 8, "hidden_size": 24, "num_layers": 2, "num_heads": 2},
    "segresnet3d": {"init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)},
    "resenc3d": {"features_per_stage": (8, 12, 16), "n_blocks_per_stage": (1, 2, 1), "strides": (1, 2, 2)},
    "swin3d": {"feature_size": 12, "depths": (2, 1, 1, 1), "num_heads": (2, 2, 2, 2), "window_size": 4},
    "image2d": {"model": "resnet18", "in_channels": 2},
    "slice_volume": {
        "slice_encoder": {"model": "resnet18"},
        "aggregator": {"depth": 1, "heads": 2, "dim_head": 8, "hidden_dim": 16, "dropout": 0.0},
        "dim": 16,
        "pool": "stages",
        "chunk": 4,
    },
}
SIZES = {"swin3d": (64, 96, 32), "image2d": (64, 96), "slice_volume": (32, 64, 6), "video_vit": (4, 16, 24)}


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


def test_swin3d__states_and_decoder_are_those_of_monais_swin_unetr() -> None:
    from monai.networks.nets import SwinUNETR

    encoder = Swin3D(**TINY["swin3d"]).eval()  # type: ignore[arg-type]
    args = encoder.config()["args"]
    stock = SwinUNETR(
        1, 1, feature_size=12, depths=args["depths"], num_heads=args["num_heads"], window_size=args["window_size"]
    ).eval()
    stock.load_state_dict(encoder.net.state_dict(), strict=True)
    x = torch.randn(1, 1, 64, 32, 32)
    with torch.no_grad():
        output = encoder(x)
        assert all(torch.equal(a, b) for a, b in zip(output.pyramid, stock.swinViT(x, stock.normalize), strict=True))
        assert torch.equal(stock.out(encoder.forward_decoder(output.pyramid, x)), stock(x))
    assert [tuple(level.shape[1:]) for level in encoder.decode(output.pyramid, x)] == [
        (encoder.context_dim, 4, 2, 2), (48, 8, 4, 4), (24, 16, 8, 8), (12, 32, 16, 16), (12, 64, 32, 32),
    ]  # fmt: skip
    assert not any(p.requires_grad for p in encoder.net.out.parameters())


@pytest.mark.parametrize(("name", "channels"), [("segresnet3d", 8), ("resenc3d", 8), ("swin3d", 12), ("vit3d", 24)])
def test_stem_extra__of_zeros_changes_nothing(name: str, channels: int) -> None:
    encoder = lookup("encoder", name)(**TINY[name]).eval()
    size = SIZES.get(name, (16, 24, 8))
    extra = encoder.mask_stem()(torch.zeros(1, 1, *size))
    x = torch.randn(1, 1, *size)
    with torch.no_grad():
        assert extra.shape[1] == channels and not extra.any()
        assert torch.equal(encoder.forward_features(x, stem_extra=extra).tokens, encoder(x).tokens)
        changed = encoder.forward_features(x, stem_extra=encoder.mask_stem()(torch.ones(1, 1, *size))).tokens
    assert not torch.allclose(changed, encoder(x).tokens)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"feature_size": 16}, "swin3d.feature_size is 16; accepted: multiples of 12"),
        ({"depths": (2, 2)}, r"four stages; found depths \[2, 2\]"),
        ({"num_heads": (5, 2, 2, 2)}, "5 heads do not divide the width 12 of stage 1"),
    ],
)
def test_swin3d__refuses_what_cannot_be_built(changes: dict[str, object], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        Swin3D(**{**TINY["swin3d"], **changes})  # type: ignore[arg-type]


def test_swin3d__says_what_its_decoder_needs() -> None:
    encoder = Swin3D(**TINY["swin3d"])  # type: ignore[arg-type]
    x = torch.randn(1, 1, 32, 32, 32)
    pyramid = encoder(x).pyramid
    with pytest.raises(ValueError, match="skip connection from the image"):
        encoder.forward_decoder(pyramid)
    with pytest.raises(ValueError, match=r"one cell at stride 32.*use 64 voxels"):
        encoder.forward_decoder(pyramid, x)
    with pytest.raises(ValueError, match="cannot drop tokens"):
        encoder.forward_features(x, keep=torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("name", [name for name in sorted(ENCODERS) if lookup("encoder", name).pyramid_centres])
def test_pyramid_centres__are_where_cells_look(name: str) -> None:
    """With its residual branches at zero and no norm between, a cell sees its own voxels only; ramps in mm say where their middle lies."""
    from medssl.objectives.anatomical_embedding import lattice, pyramid_shape

    size = {"swin3d": (64, 32, 32)}.get(name, (24, 32, 16))
    spacing = torch.tensor([1.5, 0.75, 3.0], dtype=torch.float64)
    encoder = lookup("encoder", name)(**TINY[name]).eval()
    _, strides = pyramid_shape(encoder, size)
    with torch.no_grad():
        for key, parameter in encoder.net.named_parameters():
            if any(part in key for part in ("conv2.", "attn.proj.", "linear2.")):
                parameter.zero_()
    for module in encoder.modules():
        if isinstance(getattr(module, "norm", None), torch.nn.InstanceNorm3d):
            module.norm = torch.nn.Identity()  # an instance norm sees the whole image
    indices = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij"))
    ramps = indices * spacing[:, None, None, None] + 10.0
    view = torch.cat([torch.diag(spacing), torch.full((3, 1), 10.0, dtype=torch.float64)], dim=1)
    for level, stride in enumerate(strides):
        image = torch.randn(1, 1, *size, requires_grad=True)
        found = encoder.forward_features(image).pyramid[level]
        cells = lattice(size, stride, encoder.pyramid_centres)
        assert tuple(found.shape[2:]) == cells.grid == tuple(n // stride for n in size)
        cell = tuple(n // 2 for n in cells.grid)
        (gradient,) = torch.autograd.grad(found[(0, slice(None), *cell)].square().sum(), image)
        seen = gradient[0, 0] != 0
        middle = torch.stack([(ramp[seen].min() + ramp[seen].max()) / 2 for ramp in ramps])
        number = (cell[0] * cells.grid[1] + cell[1]) * cells.grid[2] + cell[2]
        assert torch.allclose(middle, cells.places(view)[number]), (level, stride)
        edges = torch.stack([(ramp[seen].max() - ramp[seen].min()) for ramp in ramps]) / spacing
        assert name != "swin3d" or edges.tolist() == [stride - 1] * 3
