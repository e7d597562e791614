"""timm networks as 2D encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medssl.build import load_encoder
from medssl.encoders.image2d import Image2D
from medssl.errors import RequestError
from medssl.testing import check_encoder
from medssl.weights import save_part
from tests.encoders.families import FAMILIES

LONG = [pytest.param(name, marks=pytest.mark.slow) if name == "volo" else name for name in sorted(FAMILIES)]  # 27 million weights


@pytest.mark.parametrize("family", LONG)
def test_family__keeps_the_contract(family: str) -> None:
    args, size = FAMILIES[family]
    check_encoder("image2d", {"in_channels": 2, **args}, image_size=size)


@pytest.mark.parametrize("family", LONG)
def test_family__is_the_stock_network(family: str) -> None:
    import timm

    args, size = FAMILIES[family]
    torch.manual_seed(0)
    encoder = Image2D(**args).eval()
    sized = {"img_size": size} if "image_size" in args else {}
    stock = timm.create_model(args["model"], in_chans=1, num_classes=0, **sized, **args.get("model_args", {})).eval()
    stock.load_state_dict(encoder.net.state_dict(), strict=True)
    x = torch.randn(2, 1, *size)
    with torch.no_grad():
        output = encoder(x)
        assert torch.allclose(output.pooled, stock(x), atol=1e-5)
        features = stock.forward_features(x)
        if family == "swin":
            features = features.permute(0, 3, 1, 2)  # channels last
        if features.ndim == 4:
            assert torch.allclose(output.tokens[0, 1], features[0, :, 0, 1], atol=1e-5)  # token 1: the next cell along W
        else:
            assert torch.allclose(output.tokens, features[:, 1:], atol=1e-5)  # without the class token
    assert [level.shape[1] for level in output.pyramid][-1] == encoder.embed_dim
    assert all(a.shape[2] >= b.shape[2] for a, b in zip(output.pyramid, output.pyramid[1:]))


def test_resnet__has_torchvisions_keys_and_shapes() -> None:
    from torchvision.models import resnet18

    ours = Image2D(model="resnet18", in_channels=3).net.state_dict()
    theirs = {key: value for key, value in resnet18().state_dict().items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_image2d__takes_channels_as_they_are(channels: int) -> None:
    encoder = Image2D(model="resnet18", in_channels=channels)
    assert encoder.net.conv1.weight.shape == (64, channels, 7, 7)
    assert encoder(torch.randn(2, channels, 32, 32)).pooled.shape == (2, 512)


@pytest.mark.parametrize(("model", "width"), [("resnet18", 960), ("resnet50", 3840), ("convnext_atto", 600)])
def test_embed__stages_are_distinct_and_of_length_one(model: str, width: int) -> None:
    encoder = Image2D(model=model).eval()
    assert encoder.width("stages") == width
    with torch.no_grad():
        x = torch.randn(2, 1, 64, 64)
        found = encoder.embed(x, "stages")
        output = encoder(x)
    assert found.shape == (2, width)
    assert torch.allclose(found.square().sum(dim=1), torch.full((2,), 4.0), atol=1e-4)  # four stages
    last = torch.nn.functional.normalize(output.pooled, dim=1)
    assert torch.allclose(found[:, -encoder.embed_dim :], last, atol=1e-6)
    if model.startswith("resnet"):
        first = torch.nn.functional.normalize(output.pyramid[1].mean(dim=(2, 3)), dim=1)  # layer1; pyramid[0] is the stem
        assert torch.allclose(found[:, : first.shape[1]], first, atol=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_embed__leaves_no_parameter_without_gradient(family: str) -> None:
    args, size = FAMILIES[family]
    encoder = Image2D(**args)
    x = torch.randn(2, 1, *size)
    for pool in ("last", "stages"):
        encoder.zero_grad()
        encoder.embed(x, pool).square().sum().backward()  # type: ignore[arg-type]
        assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_vit__resizes_its_positions_to_the_view() -> None:
    encoder = Image2D(model="vit_tiny_patch16_224", image_size=64).eval()
    with torch.no_grad():
        output = encoder(torch.randn(1, 1, 32, 96))
    assert output.grid == (2, 6) and output.tokens.shape == (1, 12, 192)


def test_norm_frozen__training_equals_evaluation_and_moves_no_statistics() -> None:
    torch.manual_seed(0)
    encoder = Image2D(model="resnet18", norm="frozen")
    with torch.no_grad():
        encoder.net.bn1.running_mean.fill_(0.3)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    x = torch.randn(2, 1, 64, 64)
    trained = encoder.train()(x).pooled
    trained.sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    with torch.no_grad():
        assert torch.equal(trained, encoder.eval()(x).pooled)
    assert encoder.net.bn1.weight.grad is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, while it traces
def test_checkpoint_blocks__recomputes_compiled_blocks() -> None:
    torch.manual_seed(0)
    encoder = Image2D(model="vit_tiny_patch16_224", image_size=32, model_args={"depth": 2})
    x = torch.randn(2, 1, 32, 32)
    ran: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Any:
        def run(*args: Any) -> Any:
            ran.append(1)
            return graph(*args)

        return run

    encoder.embed(x).square().sum().backward()
    plain = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad()
    for block in encoder.blocks:
        block.compile(backend=backend)
    encoder.checkpoint_blocks = True
    loss = encoder.embed(x).square().sum()
    forward = len(ran)
    loss.backward()
    assert forward >= 2 and len(ran) == 2 * forward  # each compiled block once more in the backward pass
    assert all(torch.allclose(p.grad, g, atol=1e-5) for p, g in zip(encoder.parameters(), plain) if p.grad is not None)


def test_part__is_loaded_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = Image2D(model="convnext_atto", in_channels=2).eval()
    for name in ("encoder", "slice_encoder"):
        part = encoder.part(name)
        state = {key.removeprefix(part.prefix): value for key, value in encoder.state_dict().items()}
        again = load_encoder(save_part(tmp_path, name, state, part.manifest))
        x = torch.randn(1, 2, 32, 32)
        with torch.no_grad():
            assert torch.equal(encoder(x).pooled, again(x).pooled)
    assert part.manifest["axis_order"] == "HW" and part.manifest["model"] == "convnext_atto"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Image2D(model="resnet81"), r'has no model "resnet81" \(did you mean'),
        (lambda: Image2D(model="mobilenetv3_small_050"), "pools 288 channels and then widens them to 1024"),
        (lambda: Image2D(model="convit_tiny", image_size=(32, 48)), "ConViT takes square images only"),
        (lambda: Image2D(model="volo_d1_224", image_size=40), r"not a multiple of \(16, 16\)"),
        (lambda: Image2D(norm="group"), "accepted: batch, frozen"),  # type: ignore[arg-type]
    ],
)
def test_build__refuses_with_a_sentence(make: Any, text: str) -> None:
    with pytest.raises(RequestError if "multiple" not in text else ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("args", "shape", "text"),
    [
        ({}, (1, 3, 64, 64), r"takes images \(B, 1, H, W\); found \(1, 3, 64, 64\)"),
        ({}, (1, 1, 60, 64), r"size \(60, 64\) is not a multiple of \(32, 32\)"),
        ({"model": "halonet26t"}, (1, 1, 64, 64), r"not a multiple of \(256, 256\)"),
        ({"model": "volo_d1_224", "image_size": 32}, (1, 1, 64, 64), r"built for images of \(32, 32\)"),
        ({}, (1, 1, 32, 32), "a single value per channel to train on"),
    ],
)
def test_forward__refuses_with_a_sentence(args: dict[str, Any], shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Image2D(**args)(torch.zeros(shape))
