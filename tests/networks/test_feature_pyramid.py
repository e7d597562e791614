"""A pyramid over every family of encoders: sizes, gradients, and requests that do not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from medssl.encoders.image2d import Image2D
from medssl.encoders.resenc3d import ResEnc3D
from medssl.encoders.segresnet3d import SegResNet3D
from medssl.encoders.swin3d import Swin3D
from medssl.encoders.vit3d import ViT3D
from medssl.errors import RequestError
from medssl.networks.feature_pyramid import FeaturePyramid, SimplePyramid
from tests.evaluation.toy_boxes import Toy

SMALL_RESENC = {
    "features_per_stage": [8, 16, 32],
    "n_blocks_per_stage": [1, 1, 1],
    "kernel_sizes": [3, 3, 3],
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
}
FAMILIES: list[tuple[Any, tuple[int, ...], tuple[int, ...]]] = [
    (lambda: Image2D(model="resnet10t", in_channels=3), (64, 96), (4, 8, 16, 32, 64)),
    (lambda: Image2D(model="vit_tiny_patch16_224", image_size=(64, 96), model_args={"depth": 2}), (64, 96), (4, 8, 16, 32)),
    (lambda: SegResNet3D(init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1)), (16, 24, 16), (2, 4)),
    (lambda: ViT3D(image_size=(16, 24, 16), patch_size=8, hidden_size=24, num_layers=2, num_heads=2), (16, 24, 16), (4, 8)),
    (lambda: Swin3D(feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=2), (64, 32, 32), (4, 8, 16)),
    (lambda: ResEnc3D(**SMALL_RESENC), (16, 24, 16), (2, 4)),  # type: ignore[arg-type]
    (lambda: Toy(2), (32, 48), (2, 4, 8)),
    (lambda: Toy(3), (16, 24, 16), (4, 8)),
]


@pytest.mark.parametrize(("make", "size", "strides"), FAMILIES)
def test_levels__have_their_strides_and_reach_the_encoder(make: Any, size: tuple[int, ...], strides: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    encoder = make()
    training = encoder.training
    pyramid = FeaturePyramid(encoder, image_size=size, strides=strides, width=16)
    assert encoder.training == training and pyramid.out_channels == 16
    assert pyramid.cells == tuple((float(s),) * len(size) for s in strides)
    levels = pyramid(torch.randn(2, encoder.in_channels, *size))
    assert [tuple(level.shape) for level in levels] == [(2, 16, *(-(-n // s) for n in size)) for s in strides]
    sum(level.square().mean() for level in levels).backward()  # type: ignore[union-attr]
    reached = [name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(reached) > 2
    lost = [name for name, p in pyramid.neck.named_parameters() if p.grad is None]
    assert lost == []


def test_transposed_axes__would_show() -> None:
    """Moving the image moves the levels along the same axis."""
    torch.manual_seed(0)
    pyramid = FeaturePyramid(Toy(2), image_size=(32, 64), strides=(4, 8), width=8).eval()
    image = torch.zeros(1, 1, 32, 64)
    image[:, :, 8:12, 48:52] = 5.0
    with torch.no_grad():
        change = (pyramid(image)[0] - pyramid(torch.zeros_like(image))[0]).abs().sum(dim=1)[0]
    row, column = divmod(int(change.argmax()), change.shape[1])
    assert abs(row - 2) <= 1 and abs(column - 12) <= 1


def test_simple_pyramid__goes_up_and_down_from_one_map() -> None:
    levels = SimplePyramid(24, 16, (4, 8, 16, 32), 16, 2)(torch.randn(2, 24, 4, 6))
    assert [tuple(level.shape[2:]) for level in levels] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    with pytest.raises(RequestError, match="stride 12 over a map of stride 16"):
        SimplePyramid(24, 16, (12,), 16, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": (4, 16)}, "each must be twice the one before"),
        ({"strides": ()}, "each must be twice the one before"),
        ({"strides": (1, 2)}, "has maps at strides 2, 4, 8; asked for 1, 2"),
        ({"width": 12}, "multiples of 8"),
        ({"image_size": (36, 32)}, "not divided by the strides of the encoder; choose multiples of"),
    ],
)
def test_requests_that_do_not_fit__are_refused(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"image_size": (32, 32), "strides": (4, 8), "width": 16, **changes}
    with pytest.raises(RequestError, match=message):
        FeaturePyramid(Toy(2), **given)


def test_encoders_of_clips_and_stacks__are_refused() -> None:
    class Clips(nn.Module):
        takes_clips = True

    with pytest.raises(RequestError, match="sees clips or stacks"):
        FeaturePyramid(Clips(), image_size=(32, 32), strides=(4,))
    with pytest.raises(RequestError, match="multiple of"):  # in the words of the encoder
        FeaturePyramid(SegResNet3D(init_filters=8), image_size=(20, 16, 16), strides=(4, 8))


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: SegResNet3D(init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1)), (16, 24, 16)),
        (lambda: Image2D(model="convnext_atto"), (64, 64)),
    ],
)
def test_maps_without_a_norm__get_one_on_the_way_in(make: Any, size: tuple[int, ...]) -> None:
    """Pretraining may leave such maps at any scale and offset: the levels do not depend on it."""
    torch.manual_seed(0)
    encoder = make().eval()
    pyramid = FeaturePyramid(encoder, image_size=size, strides=(4,), width=16).eval()
    image = torch.randn(2, encoder.in_channels, *size)
    before = pyramid(image)[0]
    own = encoder.forward_features
    encoder.forward_features = lambda x: replace(own(x), pyramid=tuple(50 * m + 200 for m in own(x).pyramid))
    torch.testing.assert_close(pyramid(image)[0], before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [family[0] for family in FAMILIES[4:6]] + [lambda: Image2D(model="resnet10t")])
def test_normalised_maps__are_taken_as_they_are(make: Any) -> None:
    encoder = make()
    size = (64,) * (2 if encoder.takes_images else 3)
    pyramid = FeaturePyramid(encoder, image_size=size, strides=(4,), width=16)
    assert encoder.normalised_maps and list(pyramid.entries.parameters()) == []
