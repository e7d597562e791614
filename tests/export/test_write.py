from __future__ import annotations

import errno
import json
import pickletools
import re
import shlex
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medssl.build import load_encoder
from medssl.cli import main as cli
from medssl.encoders.swin3d import Swin3D
from medssl.errors import RequestError, StoreError, WeightsError
from medssl.evaluation.finetune import build_network, load, open_weights, start_encoder, with_encoder
from medssl.evaluation.segmentation_settings import FinetuneSettings
from medssl.export import segresnet, verify
from medssl.export.write import EXPORTS, export_weights
from medssl.weights import load_part, save_part
from tests.export.conftest import make_segresnet, make_swin, make_vit, save_run


def image(channels: int = 1, size: tuple[int, ...] = (32, 48, 16)) -> torch.Tensor:
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(5))


def test_unetr__loads_strictly_into_the_stock_network(vit_run, tmp_path):
    from monai.networks.nets import UNETR

    report = export_weights(vit_run, "unetr", tmp_path / "out")
    stock = UNETR(in_channels=1, out_channels=4, img_size=(32, 48, 16), hidden_size=48, mlp_dim=96, num_heads=4)
    x, source = image(), make_vit().eval()
    expected = source.net(x)
    for state in (
        load_file(tmp_path / "out" / "unetr_vit.safetensors"),
        torch.load(tmp_path / "out" / "unetr_vit.pt", weights_only=True),
    ):
        torch.nn.init.zeros_(stock.vit.norm.weight)
        assert str(stock.vit.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
        with torch.no_grad():
            found = stock.eval().vit(x)
            torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
            assert stock(x).shape == (1, 4, 32, 48, 16)
    assert len(report.matched) == 161 and len(report.missing) == 33 and report.unexpected == ()
    assert {key.split(".")[0] for key in report.matched} == {"vit"}
    assert "vit" not in {key.split(".")[0] for key in report.missing}
    assert report.max_feature_difference <= 1e-12
    assert sorted(path.name for path in report.files) == ["unetr_vit.json", "unetr_vit.pt", "unetr_vit.safetensors"]
    assert all(path.is_file() for path in report.files)


def test_segresnet__misses_exactly_the_decoder(segresnet_run, tmp_path):
    from monai.networks.nets import SegResNet

    report = export_weights(segresnet_run, "segresnet", tmp_path / "out")
    stock = SegResNet(init_filters=8, out_channels=3, blocks_down=(1, 1, 1), blocks_up=(1, 1))
    result = stock.load_state_dict(load_file(tmp_path / "out" / "segresnet.safetensors"), strict=False)
    assert result.unexpected_keys == []
    decoder = sorted(k for k in stock.state_dict() if k.startswith(("up_samples.", "up_layers.", "conv_final.")))
    assert sorted(result.missing_keys) == list(report.missing) == decoder and len(decoder) == 18
    x = image(size=(16, 24, 8))
    with torch.no_grad():
        scales = stock.eval().encode(x)[1]
        expected = make_segresnet().eval().forward_features(x).pyramid
    assert len(scales) == len(expected) == 3
    assert all(torch.equal(a, b) for a, b in zip(scales, expected, strict=True))
    assert report.max_feature_difference == 0


def test_segresnet__takes_the_decoder_when_asked(segresnet_run, tmp_path):
    report = export_weights(segresnet_run, "segresnet", tmp_path / "out", decoder=True)
    assert {key.split(".")[0] for key in report.missing} == {"conv_final"}
    state = torch.load(tmp_path / "out" / "segresnet.pt", weights_only=True)
    stock = segresnet.stock_network({**make_segresnet().config()["args"]})
    stock.load_state_dict(state, strict=False)
    stock.use_conv_final = False
    source = make_segresnet().eval()
    x = image(size=(16, 24, 8))
    with torch.no_grad():
        expected = source.forward_decoder(source.forward_features(x).pyramid)
        assert torch.equal(stock.eval()(x), expected)


def stock_swin(**args):
    from monai.networks.nets import SwinUNETR

    torch.manual_seed(11)
    return SwinUNETR(1, 4, feature_size=12, depths=(2, 1, 1, 1), num_heads=(3, 2, 2, 2), window_size=(4, 3, 2), **args).eval()


def test_swin_unetr__both_layouts_load_bit_equal(swin_run, tmp_path):
    report = export_weights(swin_run, "swin-unetr", tmp_path / "out")
    source = make_swin().eval()
    expected = {key: value for key, value in source.net.state_dict().items() if key.startswith("swinViT.")}
    old = torch.load(tmp_path / "out" / "swin_unetr_load_from.pt", weights_only=True)
    by_load_from, plain, pickled = stock_swin(), stock_swin(), stock_swin()
    assert not torch.equal(plain.state_dict()["swinViT.patch_embed.proj.weight"], expected["swinViT.patch_embed.proj.weight"])
    by_load_from.load_from(old)
    for network, file in ((plain, load_file(tmp_path / "out" / "swin_unetr.safetensors")),
                          (pickled, torch.load(tmp_path / "out" / "swin_unetr.pt", weights_only=True))):  # fmt: skip
        result = network.load_state_dict(file, strict=False)
        assert result.unexpected_keys == [] and not any(key.startswith("swinViT.") for key in result.missing_keys)
    x = image(size=(64, 96, 32))
    with torch.no_grad():
        states = source.forward_features(x).pyramid
    for network in (by_load_from, plain, pickled):
        found = network.state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(network.swinViT(x, network.normalize), states, strict=True))
    assert len(expected) == len(old["state_dict"]) == len(report.matched) == 84
    assert {key.split(".")[0] for key in report.missing} == {
        *(f"encoder{n}" for n in (1, 2, 3, 4, 10)), *(f"decoder{n}" for n in range(1, 6)), "out",
    }  # fmt: skip
    assert report.max_feature_difference == 0
    assert sorted(path.name for path in report.files) == [
        "swin_unetr.json", "swin_unetr.pt", "swin_unetr.safetensors", "swin_unetr_load_from.pt",
    ]  # fmt: skip


def test_swin_unetr__load_from_refuses_the_models_own_names(swin_run, tmp_path):
    """The trap of MONAI: a dump of swinViT with the prefix put before it does not load."""
    export_weights(swin_run, "swin-unetr", tmp_path / "out")
    plain = load_file(tmp_path / "out" / "swin_unetr.safetensors")
    dumped = {"module." + key.removeprefix("swinViT."): value for key, value in plain.items()}
    with pytest.raises(KeyError, match=r"module.layers1.0.blocks.0.mlp.fc1.weight"):
        stock_swin().load_from({"state_dict": dumped})
    with pytest.raises(KeyError, match=r"module.patch_embed.proj.weight"):
        stock_swin().load_from({"state_dict": plain})


@pytest.mark.slow
def test_swin_unetr__takes_the_decoder_when_asked(swin_run, tmp_path):
    report = export_weights(swin_run, "swin-unetr", tmp_path / "out", decoder=True)
    assert {key.split(".")[0] for key in report.missing} == {"out"} and report.max_feature_difference <= 1e-12
    stock, source = stock_swin(), make_swin().eval()
    stock.load_state_dict(load_file(tmp_path / "out" / "swin_unetr.safetensors"), strict=False)
    stock.out = torch.nn.Identity()
    x = image(size=(64, 32, 32))
    with torch.no_grad():
        assert torch.equal(stock(x), source.forward_decoder(source.forward_features(x).pyramid, x))


def test_safetensors__holds_the_encoder_and_nothing_of_the_run(segresnet_run, tmp_path):
    report = export_weights(segresnet_run, "safetensors", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["encoder.json", "encoder.safetensors"]
    state, manifest = load_part(tmp_path / "out" / "encoder.safetensors")
    original, before = load_part(segresnet_run)
    assert state.keys() == original.keys() and all(torch.equal(state[key], original[key]) for key in state)
    assert {key.split(".")[0] for key in state} == {"convInit", "down_layers"}
    assert "run" not in manifest and "seed" not in manifest and "stays in the run" not in json.dumps(manifest)
    assert manifest["spacing_mm"] == [2.0, 1.0, 1.5] and manifest["weights_hash"] == before["weights_hash"]
    assert manifest["export"]["to"] == "safetensors"
    assert report.max_feature_difference == 0
    export_weights(tmp_path / "out" / "encoder.safetensors", "segresnet", tmp_path / "again")


def test_safetensors__with_decoder(segresnet_run, tmp_path):
    report = export_weights(segresnet_run, "safetensors", tmp_path / "out", decoder=True)
    assert {key.split(".")[0] for key in report.missing} == {"conv_final"}
    state, _ = load_part(tmp_path / "out" / "decoder.safetensors")
    assert {key.split(".")[0] for key in state} == {"up_samples", "up_layers"}


def test_pt__is_tensors_only(vit_run, tmp_path):
    export_weights(vit_run, "unetr", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out" / "unetr_vit.pt") as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
        needed = {str(arg) for op, arg, _ in pickletools.genops(archive.read(name)) if op.name == "GLOBAL"}
    assert needed <= {"collections OrderedDict", "torch FloatStorage", "torch._utils _rebuild_tensor_v2"}


@pytest.mark.parametrize(("run", "to", "match"), [
    ("segresnet_run", "unetr", r"segresnet3d \(monai.SegResNet\); unetr takes monai.ViT; export to safetensors, segresnet"),
    ("swin_run", "unetr", r"swin3d \(monai.SwinUNETR\); unetr takes monai.ViT; export to safetensors, swin-unetr"),
    ("segresnet_run", "swin-unetr", r"segresnet3d \(monai.SegResNet\); swin-unetr takes monai.SwinUNETR"),
    ("vit_run", "segresnet", r"vit3d \(monai.ViT\); segresnet takes monai.SegResNet; export to safetensors, unetr"),
])  # fmt: skip
def test_export__refuses_another_encoder(run, to, match, request, tmp_path, entries):
    folder = request.getfixturevalue(run)
    before = entries()
    with pytest.raises(WeightsError, match=match):
        export_weights(folder, to, tmp_path / "out")
    assert entries() == before


@pytest.mark.parametrize("args", [{"num_layers": 2}, {"patch_size": 8}])
def test_unetr__refuses_what_its_form_does_not_take(args, tmp_path):
    run = save_run(make_vit(image_size=(16, 16, 16), **args), tmp_path / "run")
    with pytest.raises(WeightsError, match="UNETR has patch size 16 and 12 layers; export to safetensors or monai-bundle"):
        export_weights(run, "unetr", tmp_path / "out")
    export_weights(run, "safetensors", tmp_path / "out")


@pytest.mark.parametrize("to", ["safetensors", "segresnet", "monai-bundle"])
def test_export__refuses_damaged_weights_and_leaves_nothing(to, segresnet_run, tmp_path, entries):
    file = segresnet_run / "weights" / "last" / "encoder.safetensors"
    before, content = entries(), file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="cut short"):
        export_weights(segresnet_run, to, tmp_path / "out")
    file.write_bytes(content)
    state, manifest = load_part(segresnet_run)
    key = "down_layers.1.0.conv.weight"
    for change, match in (
        ({k: v for k, v in state.items() if k != key}, f"missing {key}"),
        ({**state, "mask_token": torch.zeros(1)}, "unexpected mask_token"),
        ({**state, key: state[key][:, :, :1]}, "has shape"),
    ):
        save_part(file.parent, "encoder", change, manifest)
        with pytest.raises(WeightsError, match=match):
            export_weights(segresnet_run, to, tmp_path / "out")
    assert entries() == before


def test_export__refuses_another_axis_order_and_an_unknown_encoder(segresnet_run, tmp_path):
    state, manifest = load_part(segresnet_run)
    folder = segresnet_run / "weights" / "last"
    save_part(folder, "encoder", state, {**manifest, "axis_order": "ZYX-LPS"})
    with pytest.raises(WeightsError, match="axis order ZYX-LPS; exports are written for XYZ-RAS"):
        export_weights(segresnet_run, "safetensors", tmp_path / "out")
    save_part(folder, "encoder", state, {**manifest, "encoder": {"name": "segresnet3d", "args": {"filters": 8}}})
    with pytest.raises(WeightsError, match="cannot be built"):
        export_weights(segresnet_run, "safetensors", tmp_path / "out")


def test_export__decoder_is_refused_where_there_is_none(vit_run, segresnet_run, tmp_path):
    with pytest.raises(RequestError, match="export to unetr holds the encoder only; a decoder goes with safetensors"):
        export_weights(vit_run, "unetr", tmp_path / "out", decoder=True)
    with pytest.raises(WeightsError, match="decoder"):
        export_weights(vit_run, "safetensors", tmp_path / "out", decoder=True)
    with pytest.raises(WeightsError, match="is a decoder; an export needs the encoder"):
        export_weights(segresnet_run / "weights" / "last" / "decoder.safetensors", "segresnet", tmp_path / "out")


def test_export__refuses_a_taken_folder_and_an_unknown_form(vit_run, tmp_path):
    with pytest.raises(RequestError, match=r'unknown form "unter" \(did you mean "unetr"\?\); known: ' + ", ".join(EXPORTS)):
        export_weights(vit_run, "unter", tmp_path / "out")
    (tmp_path / "out").mkdir()
    export_weights(vit_run, "safetensors", tmp_path / "out")  # an empty folder is fine
    before = (tmp_path / "out" / "encoder.json").read_bytes()
    with pytest.raises(RequestError, match="is not an empty folder"):
        export_weights(vit_run, "unetr", tmp_path / "out")
    assert (tmp_path / "out" / "encoder.json").read_bytes() == before


@pytest.mark.parametrize("to", ["unetr", "monai-bundle"])
def test_export__features_that_differ_stop_it(to, vit_run, tmp_path, entries, monkeypatch):
    before = entries()
    original = verify.load_stock

    def load_and_spoil(network, state, **options):
        missing = original(network, state, **options)
        with torch.no_grad():
            network.norm.weight += 1e-3
        return missing

    monkeypatch.setattr("medssl.export.unetr.load_stock", load_and_spoil)
    monkeypatch.setattr("medssl.export.monai_bundle.load_stock", load_and_spoil)
    with pytest.raises(WeightsError, match=r"differ by 0.00[0-9]+, at most 1e-05 is accepted; nothing was written"):
        export_weights(vit_run, to, tmp_path / "out")
    assert entries() == before


def test_export__full_disk_leaves_nothing(segresnet_run, tmp_path, entries, monkeypatch):
    before = entries()

    def full(path, state):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("medssl.export.segresnet.write_pt", full)
    with pytest.raises(StoreError, match="disk is full"):
        export_weights(segresnet_run, "segresnet", tmp_path / "out")
    assert entries() == before


def test_compare__nan_does_not_pass():
    with pytest.raises(WeightsError, match="differ by nan"):
        verify.compare([(torch.tensor([float("nan")]), torch.zeros(1))], "unetr")
    with pytest.raises(WeightsError, match=r"returns features \(2,\), the encoder \(1,\)"):
        verify.compare([(torch.zeros(2), torch.zeros(1))], "unetr")


@pytest.mark.slow
def test_swin_unetr__code_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text().split("## MONAI SwinUNETR")[1].split("\n## ")[0]
    (command,) = re.findall(r"```sh\nmedssl (.*?)```", text, flags=re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    run = save_run(Swin3D(feature_size=12), tmp_path / "runs" / "swin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.main(shlex.split(command))
    assert not left.value.code, capsys.readouterr().err
    names = {}
    exec(compile(code, "docs/export.md", "exec"), names)
    expected, _ = load_part(run)
    for network in (names["network"], names["again"]):
        found = network.state_dict()
        assert len(expected) == 126 and all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("make", "to", "network", "crop", "fresh"),
    [
        (make_segresnet, "segresnet", "segresnet", (16, 16, 16), 4),  # norm and convolution of the head
        (make_vit, "unetr", "unetr", (32, 32, 32), 33),
        (make_swin, "swin-unetr", "swin_unetr", (64, 32, 32), 2),
    ],
)
def test_exports_with_our_names__are_taken_by_fine_tuning(make, to, network, crop, fresh, tmp_path):
    encoder = make()
    run = save_run(encoder, tmp_path / "run", image_size=[32, 48, 16])
    decoder = to != "unetr"
    report = export_weights(run, to, tmp_path / "out", decoder=decoder)
    (file,) = [path for path in report.files if path.suffix == ".safetensors"]
    weights = open_weights(file, transfer="encoder_decoder" if decoder else "encoder")
    settings = with_encoder(FinetuneSettings(network=network, crop=crop), weights)
    loaded = load(build_network(settings, n_classes=2, seed=0), weights)
    assert loaded.missing == loaded.unexpected == 0 and loaded.fresh == fresh
    start_encoder(settings, weights, 0)
    again = load_encoder(file).net.state_dict()
    assert all(
        torch.equal(again[key], value)
        for key, value in encoder.net.state_dict().items()
        if not key.startswith(("out.", "conv_final."))
    )


def test_exports_with_other_names__are_refused_by_fine_tuning(tmp_path):
    from medssl.encoders.image2d import Image2D

    run = save_run(Image2D(model="resnet18", in_channels=1), tmp_path / "run")
    export_weights(run, "resnet", tmp_path / "out")
    for take in (open_weights, load_encoder):
        with pytest.raises(
            WeightsError, match=r"an export to resnet, under the names that resnet asks for; .*run folder.*medssl import"
        ):
            take(tmp_path / "out" / "resnet.safetensors")


def test_wrong_form__names_every_form_that_fits(tmp_path):
    run = save_run(make_segresnet(), tmp_path / "run")
    with pytest.raises(WeightsError, match="export to safetensors, segresnet, monai-bundle, onnx, hf instead"):
        export_weights(run, "unetr", tmp_path / "out")
    from medssl.encoders.image2d import Image2D

    pictures = save_run(Image2D(model="resnet18", in_channels=1), tmp_path / "pictures")
    with pytest.raises(WeightsError, match=r"export to safetensors, timm, torchvision, .*, onnx, hf instead"):
        export_weights(pictures, "monai-bundle", tmp_path / "out")
