"""A pyramid segmenter over every family of encoders, and MONAI's FlexibleUNet: sizes, gradients, loading, requests that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medssl.errors import RequestError, WeightsError
from medssl.networks.flexible_unet import build_flexible_unet
from medssl.networks.pyramid_segmentation import Climb, PyramidSegmenter, build_pyramid, enlarged
from medssl.networks.segmentation import build_unetr, encoder_parameters, library_of, load_pretrained, set_head_prior
from medssl.registry import lookup
from tests.evaluation.toy_boxes import Toy

RESNET = {"name": "image2d", "args": {"model": "test_resnet", "in_channels": 1}}
RESNET18 = {"name": "image2d", "args": {"model": "resnet18", "in_channels": 1}}
TIMM_VIT = {"name": "image2d", "args": {"model": "vit_tiny_patch16_224", "image_size": [64, 96], "model_args": {"depth": 2}}}
SEGRESNET = {"name": "segresnet3d", "args": {"init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]}}
VIT = {"name": "vit3d", "args": {"image_size": [16, 16, 16], "patch_size": 8, "hidden_size": 24, "num_layers": 2, "num_heads": 2}}
SWIN = {"name": "swin3d", "args": {"feature_size": 12, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 2}}
FLAT = {  # its last scale is no coarser along Z
    "name": "resenc3d",
    "args": {"features_per_stage": [8, 12, 16], "n_blocks_per_stage": [1, 1, 1], "strides": [1, 2, [2, 2, 1]]},
}
FAMILIES: list[tuple[dict[str, Any], tuple[int, ...], int]] = [
    (RESNET, (64, 96), 5),
    (TIMM_VIT, (64, 96), 4),
    (SEGRESNET, (16, 24, 16), 3),
    (VIT, (16, 24, 16), 4),
    (SWIN, (64, 32, 32), 5),
    (FLAT, (16, 24, 16), 3),
]


def built(encoder: dict[str, Any], size: tuple[int, ...], seed: int = 0, classes: int = 3, **more: Any) -> Any:
    torch.manual_seed(seed)
    return build_pyramid(encoder=encoder, out_channels=classes, image_size=size, width=16, **more)


def part(encoder: dict[str, Any], seed: int = 1, *, whole: bool = False) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    """An encoder with tensors and manifest as a run leaves them; `whole` with its decoder among the tensors."""
    torch.manual_seed(seed)
    module = lookup("encoder", encoder["name"])(**encoder["args"])
    groups = module.key_groups.values() if whole else [module.key_groups["encoder"]]
    own = tuple(key for group in groups for key in group)
    state = {key: value for key, value in module.net.state_dict().items() if key.startswith(own)}
    return module, state, {"library": module.library, "key_groups": module.key_groups, "encoder": module.config()}


@pytest.mark.parametrize(("encoder", "size", "levels"), FAMILIES)
def test_pyramid__segments_with_any_encoder_and_its_gradient_reaches_all_that_is_used(
    encoder: dict[str, Any], size: tuple[int, ...], levels: int
) -> None:
    network = built(encoder, size)
    assert len(network.pyramid.cells) == len(network.levels) == levels
    logits = network(torch.randn(2, 1, *size))
    assert logits.shape == (2, 3, *size)
    logits.square().mean().backward()
    inside = encoder_parameters(network)
    lost = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert [name for name in lost if "mask_token" not in name] == []
    assert any(p.grad.abs().sum() > 0 for name, p in network.named_parameters() if name in inside and p.grad is not None)
    assert network.encoder.blocks and library_of(network) == "medssl.PyramidSegmenter"


@pytest.mark.parametrize(("encoder", "size", "levels"), FAMILIES)
def test_weights__fill_the_whole_encoder_and_nothing_else(encoder: dict[str, Any], size: tuple[int, ...], levels: int) -> None:
    module, state, manifest = part(encoder, whole=True)
    network = built(encoder, size, seed=2).eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    report = load_pretrained(network, state, manifest)
    own = tuple(module.key_groups["encoder"])
    prefix = "pyramid.encoder.net."
    for key, value in network.state_dict().items():
        inside = key.startswith(tuple(prefix + group for group in own))
        assert torch.equal(value, state[key.removeprefix(prefix)] if inside else before[key]), key
    n = sum(key.startswith(own) for key in state)
    assert (report.matched, report.missing, report.unexpected, report.fresh) == (n, 0, 0, len(before) - n)
    x = torch.randn(1, 1, *size)
    with torch.no_grad():
        assert torch.equal(network.encoder(x).tokens, module.eval()(x).tokens)


def test_weights_that_do_not_fit__are_named_and_change_nothing() -> None:
    network = built(SEGRESNET, (16, 16, 16))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    _, state, manifest = part(SEGRESNET)
    key = next(iter(state))
    with pytest.raises(WeightsError, match=r"1 missing \(convInit"):
        load_pretrained(network, {k: v for k, v in state.items() if k != key}, manifest)
    with pytest.raises(WeightsError, match=r"1 unexpected \(stranger"):
        load_pretrained(network, {**state, "stranger": torch.zeros(1)}, manifest)
    _, other, facts = part(RESNET)
    with pytest.raises(WeightsError, match=r"of timm \(encoder image2d\); .*choose network flexible_unet or pyramid"):
        load_pretrained(network, other, facts)
    with pytest.raises(WeightsError, match=r"this is a PyramidSegmenter; transfer the encoder alone"):
        load_pretrained(network, state, manifest, decoder_state={"up_layers.x": torch.zeros(1)})
    grey = built(RESNET, (64, 64))
    _, coloured, facts = part({"name": "image2d", "args": {"model": "test_resnet", "in_channels": 3}})
    with pytest.raises(WeightsError, match=r"of another shape|take 3 input channel"):
        load_pretrained(grey, coloured, facts)
    assert all(torch.equal(value, before[k]) for k, value in network.state_dict().items())


def test_other_crop__is_segmented_with_the_same_weights() -> None:
    """A position table is resized on the fly, so a network may see other crops than its encoder was made for."""
    _, state, manifest = part(VIT)
    network = built(VIT, (24, 16, 32)).eval()
    assert load_pretrained(network, state, manifest).matched == len(state)
    assert network(torch.randn(1, 1, 24, 16, 32)).shape == (1, 3, 24, 16, 32)


def test_decoder_inside_an_encoder__is_frozen() -> None:
    network = built(SEGRESNET, (16, 16, 16))
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen and all(".up_layers." in name or ".up_samples." in name or ".conv_final." in name for name in frozen)
    assert not frozen & encoder_parameters(network)


@pytest.mark.parametrize(("encoder", "size"), [(RESNET, (64, 64)), (SEGRESNET, (16, 16, 16))])
def test_head_prior__predicts_the_frequencies_before_training(encoder: dict[str, Any], size: tuple[int, ...]) -> None:
    network = built(encoder, size).eval()
    set_head_prior(network, [0.9, 0.1, 0.0])
    nn.init.zeros_(network.head.weight)
    p = network(torch.randn(1, 1, *size)).softmax(1)
    torch.testing.assert_close(p[:, 1], torch.full_like(p[:, 1], 0.1 / 1.0001))


def test_levels__are_summed_at_the_finest_one_along_unequal_axes() -> None:
    """Kirillov et al. 2019, section 3, against its sentence: steps of convolution, norm, ReLU and enlargement; then a sum."""
    network = built(FLAT, (16, 24, 16)).eval()
    assert network.pyramid.cells == ((1.0,) * 3, (2.0,) * 3, (4.0, 4.0, 2.0))
    x = torch.randn(1, 1, 16, 24, 16)
    with torch.no_grad():
        maps = network.pyramid(x)
        finest = network.levels[0].blocks[0](maps[0])
        middle = enlarged(network.levels[1].blocks[0](maps[1]), (16, 24, 16))
        coarse = enlarged(network.levels[2].blocks[0](maps[2]), (8, 12, 8))
        coarse = enlarged(network.levels[2].blocks[1](coarse), (16, 24, 16))
        torch.testing.assert_close(network(x), network.head(finest + middle + coarse))
    assert [len(level.blocks) for level in network.levels] == [1, 1, 2]
    assert Climb(8, 3, 2)(torch.randn(1, 8, 2, 3), [(4, 6), (8, 12), (16, 23)]).shape == (1, 8, 16, 23)


def test_pyramid__learns_where_a_square_is() -> None:
    torch.manual_seed(0)
    images, labels = 0.3 * torch.randn(4, 1, 32, 64), torch.zeros(4, 32, 64, dtype=torch.long)
    for k in range(4):
        images[k, :, 4 * k : 4 * k + 12, 8 * k + 8 : 8 * k + 24] += 2
        labels[k, 4 * k : 4 * k + 12, 8 * k + 8 : 8 * k + 24] = 1
    network = PyramidSegmenter(Toy(2), out_channels=2, image_size=(32, 64), width=8)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(30):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found = network(images).argmax(1)
    assert float(2 * ((found == 1) & (labels == 1)).sum() / ((found == 1).sum() + (labels == 1).sum())) > 0.8


@pytest.mark.parametrize(
    ("encoder", "size", "more", "message"),
    [
        (RESNET, (32, 32, 32), {}, r"image2d sees images, the crop \[32, 32, 32\] has 3 axes; give \[H, W\]"),
        (SEGRESNET, (32, 32), {}, r"segresnet3d sees volumes, the crop \[32, 32\] has 2 axes; give \[X, Y, Z\]"),
        (SEGRESNET, (18, 16, 16), {}, r"multiple of"),
        (SEGRESNET, (16, 16, 16), {"strides": (2, 8)}, "each must be twice the one before"),
        (SEGRESNET, (16, 16, 16), {"strides": (0, 0)}, "each must be twice the one before"),
        (RESNET, (64, 64), {"strides": (1, 2)}, "has maps at strides 2, 4, 8, 16, 32; asked for 1, 2"),
        ({"name": "slice_volume", "args": {}}, (64, 64), {}, "give the weights of its slice encoder"),
        ({"name": "video_vit", "args": {"num_layers": 1, "hidden_size": 24, "num_heads": 2}}, (64, 64), {}, "sees clips or stacks"),
    ],
)
def test_requests_that_do_not_fit__are_refused(
    encoder: dict[str, Any], size: tuple[int, ...], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        built(encoder, size, **more)


def test_flexible_unet__has_the_features_of_the_encoder_and_loads_it_strictly() -> None:
    module, state, manifest = part(RESNET18)
    torch.manual_seed(2)
    network: Any = build_flexible_unet(encoder=RESNET18, out_channels=3, image_size=(64, 96)).eval()
    report = load_pretrained(network, state, manifest)
    assert (report.matched, report.missing, report.unexpected) == (len(state), 0, 0) == (120, 0, 0)
    assert report.fresh == len(network.state_dict()) - 120
    x = torch.randn(2, 1, 64, 96)
    with torch.no_grad():
        for own, ours in zip(network.encoder(x), module.eval()(x).pyramid, strict=True):
            torch.testing.assert_close(own, ours, atol=1e-5, rtol=1e-5)
    assert network(x).shape == (2, 3, 64, 96) and library_of(network) == "monai.FlexibleUNet"
    assert encoder_parameters(network) == {f"encoder.{name}" for name, _ in module.net.named_parameters()}
    set_head_prior(network, [0.9, 0.09, 0.01])
    torch.testing.assert_close(network.segmentation_head[0].bias.detach(), torch.tensor([0.9, 0.09, 0.01]).log())
    network.train()(x).square().mean().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
    with pytest.raises(WeightsError, match=r"1 missing \(conv1.weight"):
        load_pretrained(network, {k: v for k, v in state.items() if k != "conv1.weight"}, manifest)
    with pytest.raises(WeightsError, match="this is a FlexibleUNet; transfer the encoder alone"):
        load_pretrained(network, state, manifest, decoder_state={"decoder.x": torch.zeros(1)})


@pytest.mark.parametrize(
    ("encoder", "size", "message"),
    [
        (SEGRESNET, (64, 64), 'the encoder is "segresnet3d"; it is built around a ResNet of image2d; choose network "segresnet"'),
        (TIMM_VIT, (64, 96), "the encoder is vit_tiny_patch16_224 with model_args depth; .*choose network pyramid"),
        (RESNET, (64, 64), "the encoder is test_resnet; MONAI's FlexibleUNet takes the plain resnet18"),
        ({"name": "image2d", "args": {"model": "resnet18", "norm": "frozen"}}, (64, 64), "resnet18 with norm frozen"),
        (RESNET18, (64, 64, 64), r"has 3 axes; it segments images: give \[H, W\]"),
        (RESNET18, (40, 64), "every axis must be a multiple of 32, and one of them 64 or more, .*use 64x64"),
        (RESNET18, (32, 32), "use 64x64"),
    ],
)
def test_flexible_unet__refuses_what_it_cannot_be(encoder: dict[str, Any], size: tuple[int, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build_flexible_unet(encoder=encoder, out_channels=2, image_size=size)


def test_networks_of_volumes__refuse_pictures() -> None:
    with pytest.raises(RequestError, match=r'the encoder is "image2d".*choose network "flexible_unet"'):
        build_unetr(encoder=RESNET18, out_channels=2, image_size=(64, 64))
    unetr = {"name": "vit3d", "args": {"hidden_size": 24, "num_heads": 2}}
    with pytest.raises(RequestError, match=r"network unetr: the crop \[64, 64\] has 2 axes; it segments volumes: give \[X, Y, Z\]"):
        build_unetr(encoder=unetr, out_channels=2, image_size=(64, 64))
