"""The video ViT beside timm's, its positions, what it drops, and what it leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.encoders.video_vit import VideoViT
from medssl.layers.pos_embed import sincos_positions
from medssl.layers.tokens import valid_tokens
from medssl.types import Stack

ARGS: dict[str, Any] = {"image_size": (6, 16, 24), "patch_size": 8, "hidden_size": 36, "num_layers": 2, "num_heads": 3}


def encoder(**changes: Any) -> VideoViT:
    torch.manual_seed(0)
    return VideoViT(**{**ARGS, **changes}).eval().double()


def clip(batch: int = 2, size: tuple[int, ...] = (6, 16, 24), channels: int = 1) -> Tensor:
    return torch.randn(batch, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_plain_loop_over_tubelets__gives_the_tokens() -> None:
    """Embedding, positions, blocks and norm written out with the network's own tensors."""
    model, x = encoder(num_layers=1), clip(1)
    state = model.net.state_dict()
    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    tokens = []
    for t in range(3):
        for h in range(2):
            for w in range(3):
                patch = x[0, :, 2 * t : 2 * t + 2, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8]
                tokens.append((kernel * patch).sum(dim=(1, 2, 3, 4)) + bias)
    table = sincos_positions((3, 2, 3), 36).double()[0]
    rows = torch.cat([state["cls_token"][0], torch.stack(tokens) + table])

    def norm(z: Tensor, name: str) -> Tensor:
        centred = z - z.mean(dim=1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(z: Tensor, name: str) -> Tensor:
        return z @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    q, k, v = linear(norm(rows, "blocks.0.norm1"), "blocks.0.attn.qkv").chunk(3, dim=1)
    heads = []
    for head in range(3):
        part = slice(12 * head, 12 * head + 12)
        heads.append((q[:, part] @ k[:, part].T / 12**0.5).softmax(dim=1) @ v[:, part])
    rows = rows + linear(torch.cat(heads, dim=1), "blocks.0.attn.proj")
    hidden = linear(norm(rows, "blocks.0.norm2"), "blocks.0.mlp.fc1")
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    rows = norm(rows + linear(hidden, "blocks.0.mlp.fc2"), "norm")
    output = model(x)
    assert torch.allclose(output.tokens[0], rows[1:], atol=1e-10) and torch.allclose(output.pooled[0], rows[0], atol=1e-10)
    assert output.grid == (3, 2, 3)


def test_frame_branch__is_timms_vit() -> None:
    """Tubelet 1: the tensors load strictly into timm's class, with the computed positions in its table."""
    from timm.models.vision_transformer import VisionTransformer

    branch = encoder().frame_branch().eval().double()
    stock = VisionTransformer(
        img_size=(16, 24), patch_size=8, in_chans=1, num_classes=0, embed_dim=36, depth=2, num_heads=3, mlp_ratio=4.0
    )
    state = branch.net.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, 0]
    table = sincos_positions((1, 2, 3), 36).double()
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 36, dtype=torch.float64), table], dim=1)
    stock = stock.double().eval()
    stock.load_state_dict(state, strict=True)
    x = clip(size=(1, 16, 24))
    expected = stock.forward_features(x[:, :, 0])
    output = branch(x)
    assert torch.allclose(output.pooled, expected[:, 0], atol=1e-12)
    assert torch.allclose(output.tokens, expected[:, 1:], atol=1e-12)


def test_one_channel__is_three_channels_with_the_kernel_shared_out() -> None:
    grey, colour = encoder(), encoder(in_channels=3)
    state = grey.net.state_dict()
    state["patch_embed.proj.weight"] = (state["patch_embed.proj.weight"] / 3).expand(-1, 3, -1, -1, -1)
    colour.net.load_state_dict(state)
    x = clip()
    assert torch.allclose(grey(x).tokens, colour(x.expand(-1, 3, -1, -1, -1)).tokens, atol=1e-12)


def test_keep__equals_leaving_tokens_out_by_hand_and_several_masks_equal_one_each() -> None:
    model, x = encoder(), clip()
    keep = torch.tensor([[[0, 4, 17], [2, 3, 5]], [[1, 2, 3], [9, 11, 16]]])
    tokens, _ = model.embed(x)
    pooled, found = model.masked(x, keep)
    for r in range(2):
        rows = torch.stack([tokens[b, keep[b, r]] for b in range(2)])
        by_hand, expected, _ = model.encode(rows)
        output = model.forward_features(x, keep=keep[:, r])
        for mine in (output.tokens, found[:, r]):
            assert torch.allclose(mine, expected, atol=1e-12)
        for mine in (output.pooled, pooled[:, r]):
            assert torch.allclose(mine, by_hand, atol=1e-12)


def test_positions__of_a_finer_grid_lie_between_those_of_the_table() -> None:
    """Twice the cells on an axis: their centres are at -0.25, 0.25, 0.75 ...; a sinusoid says what that is."""
    model = encoder()
    like = torch.zeros(1, dtype=torch.float64)
    assert torch.equal(model.positions((3, 2, 3), like), sincos_positions((3, 2, 3), 36).double())
    fine = model.positions((6, 2, 3), like).reshape(6, 2, 3, 36)
    frequency = 10000.0 ** (-torch.arange(6, dtype=torch.float64) / 6)
    for t in range(6):
        angle = (t / 2 - 0.25) * frequency
        assert torch.allclose(fine[t, 0, 0, :12], torch.cat([angle.sin(), angle.cos()]), atol=1e-6)
    assert torch.equal(fine[0, :, :, 12:], fine[5, :, :, 12:])
    longer = encoder(time_positions="index").positions((6, 2, 3), like)
    assert torch.equal(longer, sincos_positions((6, 2, 3), 36).double())
    wide = model.positions((3, 2, 6), like).reshape(3, 2, 6, 36)
    angle = 0.25 * frequency
    assert torch.allclose(wide[0, 0, 1, 24:], torch.cat([angle.sin(), angle.cos()]), atol=1e-6)
    assert model(clip(size=(10, 32, 24))).grid == (5, 4, 3)


def test_what_is_not_valid__changes_nothing_and_is_zero() -> None:
    model, x = encoder(), clip()
    valid = torch.ones(2, 6, 16, 24, dtype=torch.bool)
    valid[0, :, :, 8:16] = False  # a column of patches outside the sector
    valid[1, 4:] = False  # two frames filled in
    other = torch.where(valid[:, None], x, torch.full_like(x, 37.0)).requires_grad_(True)
    a, b = model.forward_features(x, valid=valid), model.forward_features(other, valid=valid)
    real = valid_tokens(valid, (2, 8, 8))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.pooled, b.pooled)
    assert (a.tokens[~real] == 0).all() and (a.tokens[real].abs().sum(dim=1) > 0).all()
    assert real.reshape(2, 3, 2, 3)[0, :, :, 1].sum() == 0 and real.reshape(2, 3, 2, 3)[1].sum(dim=(1, 2)).tolist() == [6, 6, 0]
    (gradient,) = torch.autograd.grad(b.pooled.sum() + b.tokens.sum(), other)
    assert (gradient[~valid[:, None]] == 0).all() and (gradient[valid[:, None]] != 0).all()
    # the second clip is what its first four frames are, with the positions of a clip of six
    tokens, _ = model.embed(x[1:])
    pooled, found, _ = model.encode(tokens[:, :12])
    assert torch.allclose(a.pooled[1:], pooled, atol=1e-12) and torch.allclose(a.tokens[1:, :12], found, atol=1e-12)


def test_masks_of_frames_of_one_sector_and_of_pixels__say_the_same() -> None:
    model, x = encoder(), clip()
    frames = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    pixels = frames[:, :, None, None].expand(-1, -1, 16, 24)
    assert torch.equal(model.forward_features(x, valid=frames).tokens, model.forward_features(x, valid=pixels).tokens)
    sector = torch.ones(2, 1, 16, 24, dtype=torch.bool)
    sector[..., :8] = False
    both = model.forward_features(x, valid=sector).pooled, model.forward_features(x, valid=sector.expand(-1, 6, -1, -1)).pooled
    assert torch.equal(*both)
    stack = Stack(x.transpose(1, 2), frames, torch.zeros(2, 6))
    assert torch.equal(model.forward_features(stack).pooled, model.forward_features(x, valid=frames).pooled)


def test_valid_tokens__need_a_share_of_their_pixels_in_each_frame() -> None:
    valid = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    valid[0, 0] = True
    valid[0, 1, :2] = True  # 16 of 64
    assert valid_tokens(valid, (2, 8, 8), 0.25).tolist() == [[True]]
    assert valid_tokens(valid, (2, 8, 8), 0.26).tolist() == [[False]]
    assert valid_tokens(valid, (1, 8, 8), 0.26).tolist() == [[True, False]]


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_pool__is_the_class_token_or_the_mean_of_valid_tokens(pool: str) -> None:
    model, x = encoder(pool=pool), clip()
    frames = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    output = model.forward_features(x, valid=frames)
    mean = torch.stack([output.tokens[0, :12].mean(dim=0), output.tokens[1].mean(dim=0)])
    assert torch.allclose(output.pooled, mean, atol=1e-12) == (pool == "mean")


def test_a_picture__is_a_clip_that_stands_still() -> None:
    model, x = encoder(), clip(size=(1, 16, 24))
    assert torch.equal(model(x[:, :, 0]).tokens, model(x.expand(-1, -1, 2, -1, -1)).tokens)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        ((1, 16, 24), r"a clip of 1 frame\(s\) is shorter than a tubelet of 2"),
        ((5, 16, 24), "5 frames are no multiple of the tubelet 2"),
        ((6, 16, 20), r"frames of \(16, 20\) pixels are no multiple of the patch \(8, 8\)"),
    ],
)
def test_a_size_that_does_not_fit__is_named(size: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        encoder()(clip(size=size))


def test_other_mistakes__are_named() -> None:
    with pytest.raises(ValueError, match=r"takes clips \(B, 1, T, H, W\); found \(2, 6, 1, 16, 24\)"):
        encoder()(clip().transpose(1, 2))
    valid = torch.ones(2, 6, 16, 24, dtype=torch.bool)
    valid[1] = False
    with pytest.raises(ValueError, match=r"clips \[1\] of the batch have no valid token: their sector is empty"):
        encoder().forward_features(clip(), valid=valid)
    for wrong, text in (
        ({"image_size": (16, 24)}, "accepted: .frames, height, width"),
        ({"pool": "max"}, 'pool is "max", accepted: class, mean'),
        ({"time_positions": "x"}, "accepted: resize, index"),
        ({"valid_share": 0}, "above 0, up to 1"),
        ({"num_heads": 5}, "5 attention heads do not divide 36 channels"),
    ):
        with pytest.raises(ValueError, match=text):
            encoder(**wrong)  # type: ignore[arg-type]


def test_autocast__stays_near_float32() -> None:
    model, x = encoder().float(), clip().float()
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, 4:] = False
    with torch.autocast("cpu", torch.bfloat16):
        half = model.forward_features(x, valid=valid).pooled
    assert torch.allclose(half.float(), model.forward_features(x, valid=valid).pooled, atol=0.05)
