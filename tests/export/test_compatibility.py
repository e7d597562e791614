"""What other libraries ask of our files and no other test here holds; docs/export.md lists all eight and their tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medssl._compat import torchvision_ops
from medssl.encoders.image2d import Image2D
from medssl.export.write import export_weights
from tests.export.conftest import save_parts


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # of MONAI's ATSS matcher on NumPy 2
@pytest.mark.parametrize("dims", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_retinanet__takes_a_loss_step_from_the_exported_body(dims: int, joint_run: Path, tmp_path: Path) -> None:
    (
        torchvision_ops.monai_detection(),
        torchvision_ops.monai_retinanet(),
    )  # other tests of this process may have imported MONAI first
    from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
    from monai.apps.detection.networks.retinanet_network import RetinaNet, resnet_fpn_feature_extractor
    from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape
    from monai.networks.nets import resnet18

    export_weights(joint_run, "retinanet", tmp_path / "out", dims=dims)
    body = resnet18(spatial_dims=dims, n_input_channels=1, conv1_t_stride=2, feed_forward=False)
    extractor = resnet_fpn_feature_extractor(body, spatial_dims=dims, returned_layers=[1, 2])
    network = RetinaNet(spatial_dims=dims, num_classes=2, num_anchors=1, feature_extractor=extractor, size_divisible=16)
    state = load_file(tmp_path / "out" / "retinanet.safetensors")
    result = network.load_state_dict(state, strict=False)
    assert not any(key.startswith("feature_extractor.body.") for key in result.missing_keys)
    images, size = torch.randn(1, 1, *(32,) * dims, generator=torch.Generator().manual_seed(5)), [4.0] * dims + [13.0] * dims
    output = network.eval()(images)
    assert output["classification"][0].shape[1] == 2 and output["box_regression"][0].shape[1] == 2 * dims
    anchors = AnchorGeneratorWithAnchorShape(feature_map_scales=(1, 2, 4), base_anchor_shapes=[[8] * dims])
    detector = RetinaNetDetector(network, anchors, spatial_dims=dims, size_divisible=16).train()
    detector.set_atss_matcher(num_candidates=4)
    optimiser = torch.optim.SGD(detector.network.parameters(), lr=1e-3)
    targets = [{"boxes": torch.tensor([size]), "labels": torch.zeros(1, dtype=torch.int64)}]
    losses = detector([images[0]], targets)
    sum(losses.values()).backward()
    optimiser.step()
    assert all(torch.isfinite(value) for value in losses.values())
    stem = network.feature_extractor.body.conv1.weight
    assert not torch.equal(stem.detach(), state["feature_extractor.body.conv1.weight"])  # the step reached what was exported


@pytest.mark.parametrize("model", ["resnet18", "vit_tiny_patch16_224"])
def test_timm__opens_the_file_by_its_overlay(model: str, tmp_path: Path) -> None:
    torchvision_ops.ensure()
    import timm

    torch.manual_seed(8)
    size: dict[str, Any] = {"image_size": (32, 48)} if model.startswith("vit") else {}
    encoder = Image2D(model=model, **size).eval()
    export_weights(save_parts(encoder, tmp_path / "run"), "timm", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    network = timm.create_model(
        model,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "out" / "model.safetensors"), **config["pretrained_cfg"]},
        num_classes=0,
        **config["model_args"],
    ).eval()
    own = encoder.net.state_dict()
    assert network.state_dict().keys() == own.keys()
    assert all(torch.equal(network.state_dict()[key], own[key]) for key in own)
    image = torch.randn(2, 1, 32, 48, generator=torch.Generator().manual_seed(5))
    image = image if size else image.repeat(1, 1, 2, 2)
    with torch.no_grad():
        assert torch.equal(network(image), encoder.forward_features(image).pooled)
