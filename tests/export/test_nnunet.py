"""The adaptation-plan checkpoint: what nnU-Net does with such a file is done here by hand, on keys and sizes that it documents."""

from __future__ import annotations

import json
import pickletools
import re
import shlex
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.cli import main as cli
from medssl.encoders.resenc3d import ResEnc3D, build_network, with_aliases
from medssl.errors import RequestError, WeightsError
from medssl.export.nnunet import architecture_plans, args_of_plan, require_plain
from medssl.export.write import export_weights
from tests.export.conftest import make_segresnet, save_run

TOY: dict[str, Any] = {"features_per_stage": [8, 12, 16], "n_blocks_per_stage": [1, 2, 1], "strides": [1, 2, [2, 2, 1]]}
SIZE = (16, 24, 6)  # (X, Y, Z), strides (4, 4, 2)


def make_resenc(**args: Any) -> ResEnc3D:
    """An encoder whose norms are not what a new network has."""
    torch.manual_seed(4)
    encoder = ResEnc3D(**{**TOY, **args})
    for module in encoder.modules():
        if isinstance(module, torch.nn.InstanceNorm3d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return encoder.eval()


@pytest.fixture(name="run")
def _run(tmp_path: Path) -> Path:
    return save_run(make_resenc(), tmp_path / "runs" / "resenc", image_size=list(SIZE))


def load(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoint_final.pth", map_location="cpu", weights_only=True)
    return found


def leaves(content: Any) -> Iterator[Any]:
    if isinstance(content, dict):
        content = [*content.keys(), *content.values()]
    if isinstance(content, list | tuple):
        for value in content:
            yield from leaves(value)
    else:
        yield content


def test_checkpoint__holds_plain_values_and_the_documented_keys(run: Path, tmp_path: Path) -> None:
    export_weights(run, "nnunet", tmp_path / "out")
    found = load(tmp_path / "out")
    assert {type(value) for value in leaves(found)} <= {Tensor, str, int, float, bool, type(None)}
    with zipfile.ZipFile(tmp_path / "out" / "checkpoint_final.pth") as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
        needed = {str(arg) for op, arg, _ in pickletools.genops(archive.read(name)) if op.name == "GLOBAL"}
    assert needed <= {"collections OrderedDict", "torch FloatStorage", "torch._utils _rebuild_tensor_v2"}
    assert {"network_weights", "nnssl_adaptation_plan", "citations", "init_args", "trainer_name", "current_epoch"} <= set(found)
    plan = found["nnssl_adaptation_plan"]
    assert set(plan) == {
        "architecture_plans", "pretrain_plan", "pretrain_num_input_channels", "recommended_downstream_patchsize",
        "key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe",
    }  # fmt: skip
    assert set(plan["architecture_plans"]) == {"arch_class_name", "arch_kwargs", "arch_kwargs_requiring_import"}
    assert plan["recommended_downstream_patchsize"] == [6, 24, 16] and plan["pretrain_num_input_channels"] == 1
    assert plan["key_to_lpe"] is None
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    assert configuration["spacing"] == [1.5, 1.0, 2.0] and configuration["patch_size"] == [6, 24, 16]
    assert configuration["normalization_schemes"] == ["ZScoreNormalization"]
    assert plan["architecture_plans"]["arch_kwargs"]["strides"] == [[1, 1, 1], [2, 2, 2], [1, 2, 2]]
    assert json.loads((tmp_path / "out" / "adaptation_plan.json").read_text()) == plan
    manifest = json.loads((tmp_path / "out" / "nnunet.json").read_text())
    assert (
        manifest["axis_order"] == "ZYX-SAR" and manifest["spacing_mm"] == [1.5, 1.0, 2.0] and manifest["image_size"] == [6, 24, 16]
    )
    assert manifest["patch_size"] == [2, 4, 4] and manifest["data_cards"][0]["name"] == "ours"
    assert "stays in the run" not in json.dumps(manifest)


@pytest.mark.parametrize("channels", [1, 3])
def test_encoder_and_stem__load_as_nnunet_loads_them(run: Path, tmp_path: Path, channels: int) -> None:
    """Its steps: keys that start with those of the plan, prefix away, a single input projection repeated and divided, strict loads."""
    export_weights(run, "nnunet", tmp_path / "out")
    found = load(tmp_path / "out")
    plan, given = found["nnssl_adaptation_plan"], found["network_weights"]
    stem = {key: value for key, value in given.items() if key.startswith(plan["key_to_stem"])}
    if channels > plan["pretrain_num_input_channels"]:
        repeated = stem[plan["keys_to_in_proj"][0] + ".weight"].repeat(1, channels, 1, 1, 1) / channels
        for key in plan["keys_to_in_proj"]:
            stem[key + ".weight"] = repeated
    parts = {"stages": {key: value for key, value in given.items() if key.startswith(plan["key_to_encoder"])}, "stem": stem}
    kwargs = plan["architecture_plans"]["arch_kwargs"]
    names = ("features_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder", "kernel_sizes", "strides")
    network = build_network({"in_channels": channels, **{name: kwargs[name] for name in names}})
    for name, state in parts.items():
        prefix = f"encoder.{name}."
        bare = {key.removeprefix(prefix): value for key, value in state.items()}
        expected = with_aliases({prefix + key: value for key, value in getattr(network.encoder, name).state_dict().items()})
        assert {prefix + key for key in bare} == set(expected)
        assert all(bare[key.removeprefix(prefix)].shape == value.shape for key, value in expected.items())
        getattr(network.encoder, name).load_state_dict({key: value for key, value in bare.items() if "all_modules" not in key})
    x = torch.randn(1, 1, *SIZE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        maps = network.eval().encode(x.permute(0, 1, 4, 3, 2).expand(-1, channels, -1, -1, -1))
        pyramid = make_resenc()(x).pyramid
    for theirs, ours in zip(maps, pyramid, strict=True):
        torch.testing.assert_close(theirs.permute(0, 1, 4, 3, 2), ours, atol=1e-4, rtol=0)


def test_encoder_and_stem__load_into_nnunets_own_network(run: Path, tmp_path: Path) -> None:
    unet = pytest.importorskip(
        "dynamic_network_architectures.architectures.unet", reason="it pins timm: it has an environment of its own"
    )
    from pydoc import locate

    export_weights(run, "nnunet", tmp_path / "out", decoder=True)
    found = load(tmp_path / "out")
    plan = found["nnssl_adaptation_plan"]["architecture_plans"]
    kwargs = {k: locate(v) if k in plan["arch_kwargs_requiring_import"] and v else v for k, v in plan["arch_kwargs"].items()}
    network = unet.ResidualEncoderUNet(input_channels=1, num_classes=2, **kwargs).eval()
    result = network.load_state_dict(found["network_weights"], strict=False)
    assert not result.unexpected_keys and all(".seg_layers." in key for key in result.missing_keys)
    x, source = torch.randn(1, 1, *SIZE), make_resenc()
    with torch.no_grad():
        maps = network.encoder(x.permute(0, 1, 4, 3, 2))
        for theirs, ours in zip(maps, source(x).pyramid, strict=True):
            torch.testing.assert_close(theirs.permute(0, 1, 4, 3, 2), ours, atol=1e-4, rtol=0)


def test_decoder__makes_the_file_whole_for_plain_pretrained_weights(run: Path, tmp_path: Path) -> None:
    """nnU-Net's -pretrained_weights: every key but `.seg_layers.` must be there, of one shape."""
    alone = export_weights(run, "nnunet", tmp_path / "alone")
    whole = export_weights(run, "nnunet", tmp_path / "whole", decoder=True)
    network = with_aliases(
        build_network(args_of_plan(load(tmp_path / "whole")["nnssl_adaptation_plan"]), out_channels=5).state_dict()
    )
    given = load(tmp_path / "whole")["network_weights"]
    wanted = {key for key in network if ".seg_layers." not in key}
    assert set(given) == wanted and all(given[key].shape == network[key].shape for key in wanted)
    assert any(key.startswith("decoder.encoder.stem.") for key in wanted)
    assert all(key.startswith(("encoder.stem.", "encoder.stages.")) for key in load(tmp_path / "alone")["network_weights"])
    assert whole.unexpected == alone.unexpected == () and {key.split(".")[1] for key in whole.missing} == {"seg_layers"}
    assert any("-pretrained_weights needs the decoder" in note for note in alone.notes)
    assert max(whole.max_feature_difference, alone.max_feature_difference) <= 1e-10
    content = sum(value.numel() * 4 for key, value in make_resenc().net.state_dict().items())
    size = (tmp_path / "whole" / "checkpoint_final.pth").stat().st_size
    assert content < size < content + 120_000  # every tensor is stored once, under all its names


def test_channels__are_spread_or_summed_and_said(run: Path, tmp_path: Path) -> None:
    report = export_weights(run, "nnunet", tmp_path / "two", channels=2)
    assert any("1 input channel repeated to 2, divided by 2" in note for note in report.notes)
    assert any(note.startswith("input channels 2: nnU-Net adapts a single one only") for note in report.notes)
    found = load(tmp_path / "two")
    stem = found["network_weights"]["encoder.stem.convs.0.conv.weight"]
    assert stem.shape == (8, 2, 3, 3, 3) and found["nnssl_adaptation_plan"]["pretrain_num_input_channels"] == 2
    wide = save_run(make_resenc(in_channels=2), tmp_path / "wide")
    report = export_weights(wide, "nnunet", tmp_path / "grey", channels=1)
    assert any("2 input channels summed to 1" in note for note in report.notes)
    assert any(note == "input channels 1: nnU-Net repeats a single one for images of several" for note in report.notes)
    with pytest.raises(WeightsError, match="2 input channels and 3 are wanted"):
        export_weights(wide, "nnunet", tmp_path / "three", channels=3)
    with pytest.raises(RequestError, match="export to nnunet keeps the axes of the weights; dims and inflation go with"):
        export_weights(run, "nnunet", tmp_path / "flat", dims=2)
    assert not (tmp_path / "three").exists() and not (tmp_path / "flat").exists()


def test_preset_l__travels_by_its_name(tmp_path: Path) -> None:
    with torch.device("meta"):
        args = ResEnc3D(in_channels=2).config()["args"]
    plan = {"architecture_plans": architecture_plans(args), "pretrain_num_input_channels": 2}
    assert plan["architecture_plans"] == {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    assert args_of_plan(plan) == args


def test_unknown_spacing_and_size__stay_unknown_and_are_said(tmp_path: Path) -> None:
    run = save_run(make_resenc(), tmp_path / "run", spacing_mm=None, intensity={"normalize": {"window": [-100, 300]}})
    report = export_weights(run, "nnunet", tmp_path / "out")
    plan = load(tmp_path / "out")["nnssl_adaptation_plan"]
    assert plan["pretrain_plan"]["configurations"]["noresample"]["spacing"] is None
    assert plan["pretrain_plan"]["original_median_spacing_after_transp"] is None
    assert plan["recommended_downstream_patchsize"] == [10, 20, 20]
    assert any("pretrained with normalize window; nnU-Net z-scores" in note for note in report.notes)
    imported = save_run(make_resenc(), tmp_path / "imported", spacing_mm=None, intensity={}, unknown=["intensity"])
    report = export_weights(imported, "nnunet", tmp_path / "again")
    plan = load(tmp_path / "again")["nnssl_adaptation_plan"]
    assert plan["pretrain_plan"]["configurations"]["noresample"]["normalization_schemes"] == ["medssl_unknown"]
    assert any("how intensities were normalised in pretraining is unknown; nnU-Net z-scores" in note for note in report.notes)


def test_another_encoder_and_another_plan__are_refused(tmp_path: Path) -> None:
    run = save_run(make_segresnet(), tmp_path / "run")
    with pytest.raises(
        WeightsError, match=r"nnunet takes dynamic_network_architectures.ResidualEncoderUNet; export to safetensors, segresnet"
    ):
        export_weights(run, "nnunet", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    architecture = architecture_plans({"in_channels": 1, **make_resenc().config()["args"]})
    for changes, match in (
        ({"conv_bias": False}, "conv_bias False"),
        ({"norm_op": "torch.nn.BatchNorm3d"}, "norm_op torch.nn.BatchNorm3d; accepted"),
        ({"stem_channels": 4}, "stem_channels 4"),
    ):
        changed = {**architecture, "arch_kwargs": {**architecture["arch_kwargs"], **changes}}
        with pytest.raises(WeightsError, match=match):
            args_of_plan({"architecture_plans": changed, "pretrain_num_input_channels": 1})
    with pytest.raises(WeightsError, match="architecture PrimusM; accepted: ResEncL and ResidualEncoderUNet"):
        args_of_plan({"architecture_plans": {"arch_class_name": "PrimusM"}, "pretrain_num_input_channels": 1})
    import numpy as np

    with pytest.raises(WeightsError, match="holds a float64, which nnU-Net does not open"):
        require_plain({"a": [1, {"b": np.float64(1.0)}]})


def test_code_of_the_docs__runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text().split("## nnU-Net\n")[1].split("\n## ")[0]
    (command,) = re.findall(r"```sh\nmedssl (.*?)```", text, flags=re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.main(shlex.split(command))
    said = capsys.readouterr()
    assert not left.value.code, said.err
    assert "axes of kernels, strides and sizes reversed to Z, Y, X" in said.out and "input channels 1:" in said.out
    exec(compile(code, "docs/export.md", "exec"), {})
