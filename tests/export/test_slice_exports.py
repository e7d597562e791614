"""Exports of slice encoders and joint encoders: every piece of code in docs/export.md is run, against timm's own network."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from medssl._compat import torchvision_ops
from medssl.cli import main as cli
from medssl.cli.results import FORMS
from medssl.encoders.image2d import Image2D
from medssl.errors import RequestError, WeightsError
from medssl.export.resnet_trunk import maps_of
from medssl.export.slices import inflate, shares
from medssl.export.write import EXPORTS, TRUNKS, export_weights
from medssl.networks.flexible_unet import LAYERS
from medssl.weights import load_part
from tests.export.conftest import make_joint, save_parts

DOCS = Path(__file__).parents[2] / "docs" / "export.md"
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", DOCS.read_text(), flags=re.MULTILINE | re.DOTALL))


@pytest.fixture(name="stock", scope="module")
def _stock(joint_run: Path) -> Any:
    """timm's own network with the run's slice encoder: the independent reader."""
    torchvision_ops.ensure()
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet18", in_chans=1, num_classes=0)
    network.load_state_dict(load_file(joint_run / "weights" / "last" / "slice_encoder.safetensors"))
    return network.eval()


@pytest.fixture(name="section")
def _section(joint_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[[str], tuple[Any, str]]:
    """Run the command and the code of a section of the docs; return the names that the code leaves and what was printed."""
    torchvision_ops.ensure()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "joint").symlink_to(joint_run)

    def run(heading: str) -> tuple[Any, str]:
        if "torchvision" in SECTIONS[heading]:
            pytest.importorskip("torchvision")
        (command,) = re.findall(r"```sh\nmedssl (.*?)```", SECTIONS[heading], flags=re.DOTALL)
        (code,) = re.findall(r"```python\n(.*?)```", SECTIONS[heading], flags=re.DOTALL)
        with pytest.raises(SystemExit) as left:
            cli.main(shlex.split(command))
        said = capsys.readouterr()
        assert not left.value.code, said.err
        assert not [path for path in tmp_path.rglob("export/*/*") if path.suffix not in (".safetensors", ".json")]  # no pickle
        names: dict[str, Any] = {}
        exec(compile(code, heading, "exec"), names)
        return names, said.out

    return run


def image(size: tuple[int, ...] = (64, 96), channels: int = 1) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    assert len(found) == len(expected) == 5
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_timm__opens_the_folder(section: Any, stock: Any) -> None:
    names, said = section("timm")
    network = names["network"].eval()
    assert torch.equal(network.forward_features(image()), stock.forward_features(image()))
    assert network(image()).shape == (2, 2)
    again = names["timm"].create_model("resnet18", in_chans=1, num_classes=0)
    again.load_state_dict(load_file("export/timm/model.safetensors"))  # as the docs say, strictly
    assert torch.equal(again.eval()(image()), stock(image()))
    assert load_part("export/timm/model.safetensors")[1]["export"]["versions"]["timm"] == names["timm"].__version__
    assert "timm: 120 tensors matched, 0 missing, 0 unexpected; features equal bit by bit" in said


@torch.no_grad()
def test_torchvision__takes_a_grey_stem_shared_out(section: Any, stock: Any) -> None:
    names, said = section("torchvision")
    found = maps_of(names["network"].eval(), image().expand(-1, 3, -1, -1))
    assert worst(found, stock.forward_intermediates(image())[1]) <= 1e-5
    weight = load_file("export/torchvision/torchvision.safetensors")["conv1.weight"]
    assert torch.equal(weight.double().sum(dim=1, keepdim=True), stock.conv1.weight.double())
    assert "conv1.weight: 1 input channel repeated to 3, divided by 3" in said
    assert "120 tensors matched, 2 missing, 0 unexpected" in said and "missing (they keep their random start): fc 2" in said
    manifest = load_part("export/torchvision/torchvision.safetensors")[1]
    assert manifest["channels"] == 3 and "repeated to 3" in manifest["export"]["adaptations"][0]


@torch.no_grad()
def test_resnet__is_timms(section: Any, stock: Any) -> None:
    from monai.networks.nets import resnet18

    names, said = section("MONAI ResNet")
    network = names["network"].eval()
    assert worst(maps_of(network, image()), stock.forward_intermediates(image())[1]) == 0
    assert torch.equal(network(image()), stock(image()))
    assert "123 tensors matched, 0 missing, 0 unexpected; features equal bit by bit" in said and "3 biases of zero added" in said
    wrong = resnet18(spatial_dims=2, n_input_channels=1, feed_forward=False)  # the trap that the docs name
    wrong.load_state_dict(load_file("export/resnet/resnet.safetensors"))
    assert (wrong.eval()(image()) - stock(image())).abs().max() > 0.1


@torch.no_grad()
def test_flexible_unet__stages_are_those_of_the_encoder(section: Any, stock: Any) -> None:
    """Sanity experiment 10 of the card: save, export, load into a U-Net."""
    from monai.networks.nets import FlexibleUNet

    names, said = section("MONAI FlexibleUNet")
    network = names["network"].eval()
    assert worst(network.encoder(image()), stock.forward_intermediates(image())[1]) <= 1e-5
    assert network(image()).shape == (2, 2, 64, 96)
    state = load_file("export/unet/flexible_unet.safetensors")
    matched = {key.removeprefix("encoder.") for key in network.state_dict() if key.startswith("encoder.") and key in state}
    assert matched == set(stock.state_dict()) and len(matched) == 120  # all of the trunk, and nothing but it
    assert all(torch.equal(network.encoder.state_dict()[key], value) for key, value in stock.state_dict().items())
    assert "120 tensors matched, 60 missing, 0 unexpected" in said and "decoder 58, segmentation_head 2" in said
    plain = FlexibleUNet(in_channels=1, out_channels=2, backbone="resnet18", spatial_dims=2)
    assert len(plain.load_state_dict(state, strict=False).unexpected_keys) == 18
    assert worst(plain.eval().encoder(image()), stock.forward_intermediates(image())[1]) > 0.1


@torch.no_grad()
def test_resnet3d__constant_depth_gives_the_slice(section: Any, stock: Any) -> None:
    names, said = section("MONAI ResNet, 3D")
    network = names["network"].eval()
    x = image((32, 32))[:1]
    found = maps_of(network, x[..., None].expand(-1, -1, -1, -1, 64))
    expected = stock.forward_intermediates(x)[1]
    # 43 slices meet in one of the first stage (stride 4): in the middle of 64 none of them is padding, at the ends some are
    for at in (7, 8):
        torch.testing.assert_close(found[1][..., at], expected[1], atol=1e-5, rtol=0)
    assert (found[1][..., 0] - expected[1]).abs().max() > 0.01
    assert "20 kernels inflated along Z, repeated over their depth and divided by it" in said and "not in the paper" in said
    assert re.search(r"features equal within \d\.\de-1\d", said)  # of all stages, with the ends of the depth repeated
    state = load_file("export/resnet3d/resnet.safetensors")
    for key, value in stock.state_dict().items():
        kernel = state[key].sum(dim=-1) if value.ndim == 4 else state[key]
        torch.testing.assert_close(kernel, value, atol=1e-6, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_retinanet__body_is_the_inflated_network(section: Any, stock: Any) -> None:
    names, said = section("MONAI RetinaNet")
    network = names["network"].eval()
    body = network.feature_extractor.body
    for key, value in body.state_dict().items():
        if key in stock.state_dict():
            given = stock.state_dict()[key]
            torch.testing.assert_close(value.sum(dim=-1) if value.ndim == 5 else value, given, atol=1e-6, rtol=0)
        else:
            assert key.endswith("downsample.0.bias") and (value == 0).all()
    x = torch.randn(1, 1, 32, 32, 32)
    output = network(x)
    assert output["classification"][0].shape[1] == 6 and output["box_regression"][0].shape[1] == 18
    assert "123 tensors matched, 52 missing, 0 unexpected" in said
    counts = dict(re.findall(r"(feature_extractor|classification_head|regression_head) (\d+)", said))
    assert counts == {"feature_extractor": "16", "classification_head": "18", "regression_head": "18"}


@torch.no_grad()
def test_joint__volume_embeddings_are_equal(section: Any, joint_run: Path) -> None:
    names, said = section("Joint encoder")
    assert names["embedding"].shape == (1, 32)
    expected = make_joint().forward_features(names["volume"], z_mm=names["z_mm"]).pooled
    assert torch.equal(names["embedding"], expected)
    assert "joint: 156 tensors matched, 0 missing, 0 unexpected; features equal bit by bit" in said
    report = export_weights(Path("export/joint/joint.safetensors"), "timm", Path("export/again"))
    assert report.max_feature_difference == 0 and len(report.matched) == 120
    one, other = (
        load_file(path) for path in ("export/again/model.safetensors", joint_run / "weights/last/slice_encoder.safetensors")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@torch.no_grad()
def test_aggregator__stands_alone(section: Any) -> None:
    names, said = section("Aggregator")
    source = make_joint()
    tokens, z_mm = torch.randn(2, 7, 32), torch.linspace(-9, 30, 7).expand(2, 7)
    assert torch.equal(names["network"](tokens, None, z_mm).pooled, source.aggregator(tokens, None, z_mm).pooled)
    assert {"dim", "depth", "position", "offset_range"} <= names["args"].keys()  # defaults too
    assert "aggregator: 34 tensors matched, 0 missing, 0 unexpected; features equal bit by bit" in said


def test_docs__name_every_form() -> None:
    assert FORMS == EXPORTS
    table = " ".join(re.findall(r"^\| (`[a-z].*?) \|", DOCS.read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`([a-z-]+)`", table)) == set(EXPORTS)


@pytest.mark.slow
@torch.no_grad()
def test_centre__is_exact_at_the_ends_too(joint_run: Path, stock: Any, tmp_path: Path) -> None:
    from monai.networks.nets import resnet18

    report = export_weights(joint_run, "resnet", tmp_path / "out", dims=3, inflation="centre")
    assert report.max_feature_difference <= 1e-10 and any("placed in the middle" in note for note in report.notes)
    network = resnet18(spatial_dims=3, n_input_channels=1, conv1_t_stride=2, feed_forward=False).eval()
    network.load_state_dict(load_file(tmp_path / "out" / "resnet.safetensors"))
    x = image((32, 32))[:1]
    for found, expected in zip(
        maps_of(network, x[..., None].expand(-1, -1, -1, -1, 9)), stock.forward_intermediates(x)[1], strict=True
    ):
        torch.testing.assert_close(found, expected[..., None].expand_as(found), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchvision", "resnet"])  # the others build the same networks
def test_trunks__take_the_networks_they_name(to: str) -> None:
    """Names and shapes of all, without storage: what MONAI and torchvision build has timm's tensors."""
    torchvision_ops.ensure()
    timm = pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    for model in TRUNKS[to].models:
        with torch.device("meta"):
            trunk = TRUNKS[to].build(model, 3, 2)[0]
            stock = timm.create_model(model, num_classes=0)
        ignored = ("fc.weight", "fc.bias", *(["downsample.0.bias"] if TRUNKS[to].zero_bias else []))
        found = {key: value.shape for key, value in trunk.state_dict().items() if not key.endswith(ignored)}
        assert found == {key: value.shape for key, value in stock.state_dict().items()}, model


@pytest.mark.slow
@pytest.mark.parametrize(("to", "dims"), [("torchvision", 2), ("flexible-unet", 2), ("resnet", 3)])
def test_bottlenecks__are_equal(to: str, dims: int, tmp_path: Path) -> None:
    """ResNet-50: stride in the 3x3 convolution and a projection in the first stage, on all sides."""
    run = save_parts(make_joint(slice_encoder={"model": "resnet50"}).slice_encoder, tmp_path / "run")
    report = export_weights(run, to, tmp_path / "out", dims=dims)
    assert len(report.matched) == 318 + 4 * TRUNKS[to].zero_bias and report.unexpected == ()
    assert report.max_feature_difference <= 1e-10 and (report.max_feature_difference == 0) == (dims == 2 and to != "torchvision")


def test_channels__grey_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = save_parts(Image2D(model="convnext_atto", in_channels=3), tmp_path / "run")
    report = export_weights(run, "timm", tmp_path / "grey", channels=1)
    assert any("3 input channels summed to 1" in note for note in report.notes) and report.max_feature_difference <= 1e-5
    with pytest.raises(WeightsError, match="the stem has 3 input channels and 4 are wanted; only grey"):
        export_weights(run, "timm", tmp_path / "four", channels=4)
    assert not (tmp_path / "four").exists()


def test_timm__takes_a_vit(tmp_path: Path) -> None:
    run = save_parts(Image2D(model="vit_tiny_patch16_224", in_channels=2, image_size=(32, 48)), tmp_path / "run")
    assert export_weights(run, "timm", tmp_path / "out").max_feature_difference == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_args"] == {"in_chans": 2, "img_size": [32, 48]} and config["pretrained_cfg"]["first_conv"] is None
    for to in TRUNKS:
        with pytest.raises(WeightsError, match=f"export to {to}: the slice encoder is vit_tiny_patch16_224; {to} takes resnet18, "):
            export_weights(run, to, tmp_path / "no")


def test_shares__sum_to_the_weight() -> None:
    weight = torch.randn(200, 7, generator=torch.Generator().manual_seed(1))
    for n in (2, 3, 4):
        assert torch.equal(shares(weight, 1, n).double().sum(dim=1), weight.double()), n
    parts = shares(weight, -1, 7)
    assert parts.shape == (200, 7, 7)
    torch.testing.assert_close(parts.double().sum(dim=-1), weight.double(), rtol=3e-8, atol=0)
    torch.testing.assert_close(parts, (weight / 7)[..., None].expand(-1, -1, 7), rtol=1e-6, atol=0)


def test_inflate__keeps_the_axes() -> None:
    weight = torch.arange(9.0).reshape(1, 1, 3, 3)
    centre = inflate({"w": weight, "b": torch.ones(1)}, "centre")[0]
    assert (
        torch.equal(centre["w"][..., 1], weight) and centre["w"].sum() == weight.sum() and torch.equal(centre["b"], torch.ones(1))
    )
    layer = nn.Conv3d(1, 1, 3, bias=False)
    layer.load_state_dict({"weight": inflate({"weight": weight}, "repeat")[0]["weight"]})
    x = torch.randn(1, 1, 5, 4)
    found = layer(x[..., None].expand(-1, -1, -1, -1, 3))[..., 0]
    torch.testing.assert_close(found, nn.functional.conv2d(x, weight))


@pytest.mark.parametrize(("to", "asked", "match"), [
    ("joint", {"channels": 3}, "export to joint takes the channels that the weights have; channels go with unetr"),
    ("torchvision", {"channels": 1}, "torchvision has 2 spatial axes and 3 input channels; asked for: dims 2, channels 1"),
    ("torchvision", {"dims": 3}, "torchvision has 2 spatial axes"),
    ("timm", {"dims": 3}, "export to timm keeps the axes of the weights; dims and inflation go with torchvision"),
    ("resnet", {"dims": 4}, "dims is 4; accepted: 2, 3"),
    ("resnet", {"channels": 0}, "channels is 0; accepted: 1 or more"),
    ("resnet", {"inflation": "center"}, 'inflation is "center"; accepted: repeat, centre'),
])  # fmt: skip
def test_export__refuses_what_the_stock_class_has_not(to: str, asked: Any, match: str, joint_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=match):
        export_weights(joint_run, to, tmp_path / "out", **asked)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("args", "match"), [
    ({"model": "resnet26"}, "the slice encoder is resnet26; resnet takes resnet18, resnet34"),
    ({"model_args": {"norm_layer": "groupnorm"}}, r"built with model_args norm_layer; resnet takes the plain resnet18 \(batch norm"),
    ({"model_args": {"output_stride": 8}}, "built with model_args output_stride"),
])  # fmt: skip
def test_resnet__refuses_another_graph(args: Any, match: str, tmp_path: Path) -> None:
    run = save_parts(Image2D(**args), tmp_path / "run")
    with pytest.raises(WeightsError, match=match):
        export_weights(run, "resnet", tmp_path / "out")


def test_parts__that_do_not_go(joint_run: Path, vit_run: Path, tmp_path: Path) -> None:
    aggregator = joint_run / "weights" / "last" / "aggregator.safetensors"
    with pytest.raises(WeightsError, match="export to timm needs the slice encoder, and this is the part aggregator"):
        export_weights(aggregator, "timm", tmp_path / "out")
    for to in ("joint", "aggregator", "safetensors"):
        with pytest.raises(WeightsError, match=r"this is the part aggregator; give the run folder or joint\.safetensors"):
            export_weights(aggregator, to, tmp_path / "out")
    with pytest.raises(WeightsError, match=r"image2d \(timm\); joint takes medssl.SliceVolumeEncoder; export to safetensors, timm"):
        export_weights(joint_run / "weights" / "last" / "slice_encoder.safetensors", "joint", tmp_path / "out")
    with pytest.raises(WeightsError, match=r"vit3d \(monai.ViT\); resnet takes timm; export to safetensors, unetr"):
        export_weights(vit_run, "resnet", tmp_path / "out")
    with pytest.raises(WeightsError, match=r"slice_volume \(medssl.SliceVolumeEncoder\); unetr takes monai.ViT; export to joint"):
        export_weights(joint_run, "unetr", tmp_path / "out")


def test_resnet__features_that_differ_stop_it(joint_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medssl.export import resnet_trunk

    original = resnet_trunk.load_stock

    def load_and_spoil(network: Any, state: Any, **options: Any) -> Any:
        missing = original(network, state, **options)
        with torch.no_grad():
            network.layer3[1].bn2.running_mean += 1e-3
        return missing

    monkeypatch.setattr(resnet_trunk, "load_stock", load_and_spoil)
    with pytest.raises(WeightsError, match=r"features of the reloaded network differ by 0\.0"):
        export_weights(joint_run, "resnet", tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["safetensors"])
def test_safetensors__of_image_encoders(to: str, joint_run: Path, tmp_path: Path) -> None:
    from medssl.build import load_encoder

    for path in (joint_run, joint_run / "weights" / "last" / "slice_encoder.safetensors"):
        out = tmp_path / path.stem
        report = export_weights(path, to, out)
        assert report.missing == report.unexpected == () and report.max_feature_difference == 0
        assert load_encoder(out / "encoder.safetensors").name == load_part(path)[1]["encoder"]["name"]


def test_layers__are_those_of_monai() -> None:
    from monai.networks.nets.resnet import resnet_params

    assert {name: (resnet_params[name][0], tuple(resnet_params[name][1])) for name in LAYERS} == LAYERS
