"""The residual-encoder U-Net against nnU-Net's names and sizes, and against the formula written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.encoders.resenc3d import (
    ResEnc3D,
    ResidualEncoderUNet,
    build_network,
    complete,
    reverse_args,
    reverse_axes,
    with_aliases,
    without_aliases,
)
from medssl.errors import RequestError, WeightsError

TOY: dict[str, Any] = {"features_per_stage": (8, 12, 12), "n_blocks_per_stage": (1, 2, 1), "strides": (1, 2, (2, 2, 1))}


def toy(seed: int = 0, **changes: Any) -> ResEnc3D:
    """An encoder whose norms are not what a new network has: a new one has zeros at the end of every block."""
    torch.manual_seed(seed)
    encoder = ResEnc3D(**{**TOY, **changes})
    for module in encoder.modules():
        if isinstance(module, torch.nn.InstanceNorm3d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return encoder.eval()


def large(out_channels: int | None = 1) -> ResidualEncoderUNet:
    with torch.device("meta"):
        return build_network({}, out_channels)


def test_preset_l__has_the_tensors_of_a_published_checkpoint() -> None:
    """Of ResEnc-L with one output: 956 tensors, 448 of them of the encoder, in a file of 409,579,442 bytes (float32)."""
    named = with_aliases(large().state_dict())
    assert len(named) == 956
    assert len([key for key in named if key.startswith("encoder.")]) == 448
    content = 4 * sum(value.numel() for value in large().state_dict().values())
    assert 0 < 409_579_442 - content < 1_000_000


def test_preset_l__has_nnunets_keys_and_shapes() -> None:
    found = {key: tuple(value.shape) for key, value in with_aliases(large(3).state_dict()).items()}
    expected: dict[str, tuple[int, ...]] = {}

    def unit(prefix: str, inputs: int, outputs: int, kernel: int = 3, bias: bool = True) -> None:
        for conv, norm in (("conv", "norm"), ("all_modules.0", "all_modules.1")):
            expected[f"{prefix}.{conv}.weight"] = (outputs, inputs, kernel, kernel, kernel)
            if bias:
                expected[f"{prefix}.{conv}.bias"] = (outputs,)
            expected[f"{prefix}.{norm}.weight"] = expected[f"{prefix}.{norm}.bias"] = (outputs,)

    widths, blocks = [32, 64, 128, 256, 320, 320], [1, 3, 4, 6, 6, 6]
    for root in ("encoder", "decoder.encoder"):
        unit(f"{root}.stem.convs.0", 1, 32)
        before = 32
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                unit(f"{root}.stages.{stage}.blocks.{block}.conv1", before, width)
                unit(f"{root}.stages.{stage}.blocks.{block}.conv2", width, width)
                if before != width:
                    unit(f"{root}.stages.{stage}.blocks.{block}.skip.1", before, width, kernel=1, bias=False)
                before = width
    for step, (below, width) in enumerate(zip([320, 320, 256, 128, 64], [320, 256, 128, 64, 32], strict=True)):
        expected[f"decoder.transpconvs.{step}.weight"] = (below, width, 2, 2, 2)
        expected[f"decoder.transpconvs.{step}.bias"] = (width,)
        unit(f"decoder.stages.{step}.convs.0", 2 * width, width)
        expected[f"decoder.seg_layers.{step}.weight"] = (3, width, 1, 1, 1)
        expected[f"decoder.seg_layers.{step}.bias"] = (3,)
    assert found == expected


def test_projection_without_stride__comes_first_in_its_shortcut() -> None:
    keys = ResEnc3D(features_per_stage=(8, 16), n_blocks_per_stage=(1, 1), strides=(1, 1)).net.state_dict()
    assert "encoder.stages.1.blocks.0.skip.0.conv.weight" in keys
    assert "encoder.stages.1.blocks.0.skip.0.conv.bias" not in keys


def unit(state: dict[str, Tensor], x: Tensor, prefix: str, stride: Any = 1, active: bool = True) -> Tensor:
    weight = state[f"{prefix}.conv.weight"]
    x = F.conv3d(x, weight, state.get(f"{prefix}.conv.bias"), stride, padding=[n // 2 for n in weight.shape[2:]])
    mean = x.mean(dim=(2, 3, 4), keepdim=True)
    x = (x - mean) / ((x - mean).square().mean(dim=(2, 3, 4), keepdim=True) + 1e-5).sqrt()
    view = (1, -1, 1, 1, 1)
    x = x * state[f"{prefix}.norm.weight"].view(view) + state[f"{prefix}.norm.bias"].view(view)
    return torch.where(x >= 0, x, 0.01 * x) if active else x


def by_hand(state: dict[str, Tensor], x: Tensor) -> tuple[list[Tensor], Tensor]:
    x, maps = unit(state, x, "encoder.stem.convs.0"), []
    for stage, (count, stride) in enumerate(zip((1, 2, 1), ((1, 1, 1), (2, 2, 2), (2, 2, 1)), strict=True)):
        for block in range(count):
            prefix = f"encoder.stages.{stage}.blocks.{block}"
            step = stride if block == 0 else (1, 1, 1)
            branch = unit(state, unit(state, x, f"{prefix}.conv1", step), f"{prefix}.conv2", active=False)
            if step != (1, 1, 1):
                b, c, *size = x.shape
                cells = [part for n, s in zip(size, step, strict=True) for part in (n // s, s)]
                x = x.reshape(b, c, *cells).mean(dim=(3, 5, 7))
            if f"{prefix}.skip.1.conv.weight" in state:
                x = unit(state, x, f"{prefix}.skip.1", active=False)
            x = branch + x
            x = torch.where(x >= 0, x, 0.01 * x)
        maps.append(x)
    for step, stride in enumerate(((2, 2, 1), (2, 2, 2))):
        name = f"decoder.transpconvs.{step}"
        x = F.conv_transpose3d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride)
        x = unit(state, torch.cat([x, maps[1 - step]], dim=1), f"decoder.stages.{step}.convs.0")
    return maps, x


def test_maps_and_decoder__equal_the_formula_written_out() -> None:
    encoder = toy().double()
    x = torch.randn(2, 1, 16, 24, 8, dtype=torch.float64)
    maps, finest = by_hand(encoder.net.state_dict(), x)
    with torch.no_grad():
        output = encoder(x)
        decoded = list(encoder.decode(output.pyramid))
        whole = encoder.net(x)
    for found, expected in zip(output.pyramid, maps, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(decoded[-1], finest, atol=1e-10, rtol=0)
    torch.testing.assert_close(whole, finest, atol=1e-10, rtol=0)
    assert [level.shape[1] for level in decoded] == [encoder.context_dim, encoder.init_filters]
    assert output.grid == (4, 6, 4) and encoder.patch_size == (4, 4, 2)


def test_new_network__starts_with_its_shortcuts_alone() -> None:
    torch.manual_seed(0)
    encoder = ResEnc3D(**TOY)
    image = torch.randn(1, 1, 16, 24, 8)
    for block in encoder.net.encoder.stages[1].blocks:
        assert not block.conv2.norm.weight.any()
    before = encoder(image).tokens
    for block in encoder.net.encoder.stages[1].blocks:
        torch.nn.init.normal_(block.conv1.conv.weight)
    assert torch.equal(encoder(image).tokens, before)


def test_aliases__go_and_come_back() -> None:
    state = toy().net.state_dict()
    named = with_aliases(state)
    stem = "encoder.stem.convs.0"
    assert named[f"{stem}.all_modules.0.weight"] is named[f"{stem}.conv.weight"] is named[f"decoder.{stem}.all_modules.0.weight"]
    again = without_aliases(named)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    only = {key: value for key, value in named.items() if ".conv." not in key and ".norm." not in key}
    assert without_aliases(only).keys() == state.keys()  # of a file that holds the second names alone
    named[f"{stem}.all_modules.0.weight"] = named[f"{stem}.conv.weight"] + 1
    with pytest.raises(WeightsError, match=r"stem.convs.0.conv.weight has two names .*not the same numbers"):
        without_aliases(named)


def test_reversed_axes__give_the_features_of_the_transposed_image() -> None:
    encoder = toy(kernel_sizes=[(1, 3, 3), 3, (3, 3, 1)])
    turned = ResEnc3D(**reverse_args(encoder.config()["args"])).eval()
    turned.net.load_state_dict(reverse_axes(encoder.net.state_dict()))
    x = torch.randn(1, 1, 16, 24, 8)
    with torch.no_grad():
        expected, found = encoder(x), turned(x.permute(0, 1, 4, 3, 2))
    for ours, theirs in zip(expected.pyramid, found.pyramid, strict=True):
        torch.testing.assert_close(theirs.permute(0, 1, 4, 3, 2), ours, atol=1e-5, rtol=1e-5)
    back = reverse_axes(reverse_axes(encoder.net.state_dict()))
    assert all(torch.equal(value, back[key]) for key, value in encoder.net.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"strides": (1, 2)}, "strides has 2 entries, expected 3"),
        ({"n_conv_per_stage_decoder": (1, 1, 1)}, "n_conv_per_stage_decoder has 3 entries, expected 2"),
        ({"kernel_sizes": 2}, "expected odd numbers"),
        ({"strides": (2, 2, 2)}, "the first stride is .*the decoder ends at the size of the image"),
        ({"strides": (1, 2, (2, 2))}, "stride of 2 axes; give one number, or three"),
        ({"n_blocks_per_stage": (1, 0, 1)}, "numbers below 1"),
    ],
)
def test_arguments__that_do_not_go_together_are_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        ResEnc3D(**{**TOY, **changes})


def test_sizes__that_leave_one_cell_are_refused() -> None:
    encoder = ResEnc3D(**{**TOY, "strides": (1, 2, 2)})
    with pytest.raises(ValueError, match=r"one cell at stride .*use 8 voxels or more"):
        encoder(torch.randn(1, 1, 4, 4, 4))
    with pytest.raises(ValueError, match="cannot drop tokens"):
        encoder.forward_features(torch.randn(1, 1, 8, 8, 8), keep=torch.zeros(1, 1, dtype=torch.int64))
    assert ResEnc3D.divisor({}) == (32, 32, 32) and complete(complete(TOY)) == complete(TOY)
