"""Exports of volume encoders to another number of input channels: equal features of a grey image in the stock network, and it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medssl import load_encoder
from medssl.errors import RequestError, WeightsError
from medssl.export.write import export_weights
from medssl.weights import load_part
from tests.export.conftest import make_segresnet, make_swin, make_vit, save_run


def stock(to: str, channels: int, path: Path) -> Any:
    """Return MONAI's own network with the tensors of the export, and a call that returns its features."""
    from monai.networks.nets import UNETR, SegResNet, SwinUNETR

    torch.manual_seed(9)
    if to == "unetr":
        network: Any = UNETR(channels, 2, (32, 48, 16), hidden_size=48, mlp_dim=96, num_heads=4)
        network.vit.load_state_dict(torch.load(path / "unetr_vit.pt", weights_only=True), strict=True)
        return lambda x: network.eval().vit(x)[0]
    if to == "segresnet":
        network = SegResNet(init_filters=8, in_channels=channels, blocks_down=(1, 1, 1), blocks_up=(1, 1))
        left = network.load_state_dict(torch.load(path / "segresnet.pt", weights_only=True), strict=False)
        assert not left.unexpected_keys and all(key.startswith("conv_final.") for key in left.missing_keys)
        network.use_conv_final = False
        return lambda x: network.eval()(x)
    network = SwinUNETR(channels, 2, feature_size=12, depths=(2, 1, 1, 1), num_heads=(3, 2, 2, 2), window_size=(4, 3, 2))
    left = network.load_state_dict(torch.load(path / "swin_unetr.pt", weights_only=True), strict=False)
    assert not left.unexpected_keys and all(key.startswith("out.") for key in left.missing_keys)
    network.out = torch.nn.Identity()
    return lambda x: network.eval()(x)


MAKERS: dict[str, Any] = {"unetr": make_vit, "segresnet": make_segresnet, "swin-unetr": make_swin}
DECODER = {"unetr": False, "segresnet": True, "swin-unetr": True}
SIZES = {"unetr": (32, 48, 16), "segresnet": (8, 12, 16), "swin-unetr": (64, 32, 32)}


@pytest.mark.parametrize("to", list(MAKERS))
@pytest.mark.parametrize(
    ("found", "wanted", "said"), [(1, 4, "repeated to 4, divided by 4"), (3, 1, "3 input channels summed to 1")]
)
def test_grey_image__gives_equal_features_in_the_stock_network(to: str, found: int, wanted: int, said: str, tmp_path: Path) -> None:
    run = save_run(MAKERS[to](in_channels=found), tmp_path / "run", channels=found)
    same = export_weights(run, to, tmp_path / "same", decoder=DECODER[to])
    report = export_weights(run, to, tmp_path / "other", decoder=DECODER[to], channels=wanted)
    assert not any("input channel" in note and "wanted" not in note for note in same.notes if "SwinUNETR(" not in note)
    changed = [note for note in report.notes if said in note]
    assert len(changed) == (3 if to == "swin-unetr" else 1) and report.max_feature_difference < 1e-9
    grey = torch.randn(1, 1, *SIZES[to], generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        before, after = (
            stock(to, n, tmp_path / name)(grey.expand(-1, n, -1, -1, -1)) for n, name in ((found, "same"), (wanted, "other"))
        )
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)

    part = next(path for path in report.files if path.suffix == ".safetensors")
    manifest = load_part(part)[1]
    assert manifest["channels"] == manifest["encoder"]["args"]["in_channels"] == wanted
    assert manifest["export"]["adaptations"] == changed
    assert load_encoder(part).in_channels == wanted  # medssl takes the file as well


def test_equal_channels__change_nothing(vit_run: Path, tmp_path: Path) -> None:
    report = export_weights(vit_run, "unetr", tmp_path / "out", channels=1)
    assert report.notes == () and load_part(tmp_path / "out" / "unetr_vit.safetensors")[1]["export"]["adaptations"] == []


@pytest.mark.parametrize("to", list(MAKERS))
def test_several_to_other_several__is_refused_and_nothing_is_left(to: str, tmp_path: Path) -> None:
    run = save_run(MAKERS[to](in_channels=2), tmp_path / "run", channels=2)
    with pytest.raises(WeightsError, match="2 input channels and 3 are wanted"):
        export_weights(run, to, tmp_path / "out", channels=3)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(("to", "asked", "match"), [
    ("monai-bundle", {"channels": 4}, "takes the channels that the weights have: a bundle prepares images as they were pretrained; channels go"),
    ("onnx", {"channels": 4}, "export to onnx takes the channels that the weights have; channels go with unetr, segresnet, swin-unetr, nnunet"),
    ("unetr", {"dims": 2}, "export to unetr keeps the axes of the weights; dims and inflation go with torchvision"),
])  # fmt: skip
def test_forms_without__say_so(to: str, asked: dict[str, int], match: str, vit_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=match):
        export_weights(vit_run, to, tmp_path / "out", **asked)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
