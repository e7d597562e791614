"""Exports of volume encoders to other channels and sizes: equal features in the stock network, and it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medssl import load_encoder
from medssl.cli import main as cli
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


def test_other_size__has_the_features_of_the_encoder_with_such_an_image(vit_run: Path, tmp_path: Path) -> None:
    size = (48, 32, 32)
    report = export_weights(vit_run, "unetr", tmp_path / "unetr", image_size=size, channels=2)
    (note,) = [note for note in report.notes if "resized" in note]
    assert "from images of 32 x 48 x 16 to 48 x 32 x 32 voxels, 2 x 3 x 1 tokens resized to 3 x 2 x 2 (trilinear)" in note
    from monai.networks.nets import UNETR

    network = UNETR(2, 3, size, hidden_size=48, mlp_dim=96, num_heads=4)
    network.vit.load_state_dict(torch.load(tmp_path / "unetr" / "unetr_vit.pt", weights_only=True), strict=True)
    image = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = network.eval().vit(image.expand(-1, 2, -1, -1, -1))[0]
        expected = load_encoder(vit_run).forward_features(image).tokens
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    part = tmp_path / "unetr" / "unetr_vit.safetensors"
    manifest = load_part(part)[1]
    assert manifest["image_size"] == manifest["encoder"]["args"]["image_size"] == list(size)
    assert manifest["export"]["adaptations"] == list(report.notes) and len(report.notes) == 2
    assert load_encoder(part).table_grid == (3, 2, 2)


@pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")
def test_bundle__of_another_size_has_windows_of_it(vit_run: Path, tmp_path: Path) -> None:
    report = export_weights(vit_run, "monai-bundle", tmp_path / "bundle", image_size=[64, 48, 32])
    assert report.max_feature_difference < 1e-9 and "resized to 4 x 3 x 2" in report.notes[0]
    config = json.loads((tmp_path / "bundle" / "configs" / "inference.json").read_text())
    assert config["encoder"]["img_size"] == config["inferer"]["roi_size"] == [64, 48, 32]


@pytest.mark.parametrize(("to", "size", "match"), [
    ("unetr", [48, 40, 32], "image_size 48 x 40 x 32; 3 numbers are needed, multiples of the patch of 16 x 16 x 16"),
    ("unetr", [48, 48], "image_size 48 x 48; 3 numbers are needed"),
    ("unetr", [48, 0, 16], r"image_size is \[48, 0, 16\]; accepted: numbers of voxels, 1 or more"),
    ("safetensors", [48, 48, 48], "export to safetensors keeps the image size of the weights; image_size goes with unetr, monai-bundle"),
])  # fmt: skip
def test_sizes_that_do_not_go__are_refused(to: str, size: list[int], match: str, vit_run: Path, tmp_path: Path) -> None:
    with pytest.raises((RequestError, WeightsError), match=match):
        export_weights(vit_run, to, tmp_path / "out", image_size=size)
    assert not (tmp_path / "out").exists()


def test_encoder_of_any_size__has_no_positions_to_resize(segresnet_run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match="segresnet3d has no table of positions and takes images of any size; leave image_size out"
    ):
        export_weights(segresnet_run, "monai-bundle", tmp_path / "out", image_size=[64, 64, 64])


def test_command__takes_a_size(vit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(vit_run), "--to", "unetr", "--out", str(tmp_path / "out"), "--image-size", "48,32,32"])
    assert stopped.value.code == 0 and "voxels, 2 x 3 x 1 tokens resized to 3 x 2 x 2" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(vit_run), "--to", "unetr", "--out", str(tmp_path / "two"), "--image-size", "48x32"])
    assert stopped.value.code == 2 and "give numbers separated by commas" in capsys.readouterr().err
