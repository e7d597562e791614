"""Published weights into our encoders: files are written by the peers' own classes, and features compared with theirs."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from medssl import build
from medssl._compat import torchvision_ops
from medssl.cli import main as cli
from medssl.cli.importing import ENCODERS
from medssl.errors import RequestError, WeightsError
from medssl.evaluation.finetune import open_weights
from medssl.export.write import export_weights
from medssl.importing.layouts import READERS
from medssl.importing.write import import_weights
from medssl.networks.segmentation import build_resenc_unet, build_swin_unetr, load_pretrained
from medssl.weights import load_part
from tests.export.conftest import save_run
from tests.export.test_nnunet import make_resenc

SWIN: dict[str, Any] = {"feature_size": 12, "depths": (2, 1, 1, 1), "num_heads": (3, 2, 2, 2), "window_size": 4}
VIT: dict[str, Any] = {"img_size": (32, 32, 32), "patch_size": (16, 16, 16), "hidden_size": 48, "num_heads": 4, "num_layers": 2}


def randomised(network: torch.nn.Module, seed: int = 0) -> Any:
    """Give every parameter numbers that no constructor gives."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def image(*size: int, channels: int = 1) -> Tensor:
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(5))


@pytest.fixture(name="entries")
def _entries(tmp_path: Path) -> Callable[[], list[str]]:
    return lambda: sorted(path.name for path in tmp_path.iterdir())


def swin_unetr(**changes: Any) -> Any:
    from monai.networks.nets import SwinUNETR

    return randomised(SwinUNETR(1, 3, **{**SWIN, **changes}))


def ssl_layout(network: Any, extra: bool = True) -> dict[str, Any]:
    """`model_swinvit.pt`: names as `SwinUNETR.load_from` asks for them, and the heads of its pretraining."""
    state = {}
    for key, value in network.swinViT.state_dict().items():
        state["module." + key.replace("mlp.linear", "mlp.fc")] = value
    heads = {f"module.{name}.weight": torch.ones(4, 2) for name in ("rotation_head", "contrastive_head")} if extra else {}
    return {"state_dict": {**state, **heads}, "epoch": 7}


def test_swin_ssl_file__gives_the_states_of_monais_network(tmp_path: Path) -> None:
    network = swin_unetr()
    torch.save(ssl_layout(network), tmp_path / "model_swinvit.pt")
    report = import_weights(
        tmp_path / "model_swinvit.pt", "swin3d", tmp_path / "out", normalize={"window": [-175, 250]}, domain="ct"
    )
    assert report.encoder["args"]["depths"] == [2, 1, 1, 1] and report.encoder["args"]["num_heads"] == [3, 2, 2, 2]
    assert report.encoder["args"]["window_size"] == [4, 4, 4] and report.encoder["args"]["feature_size"] == 12
    own = {f"swinViT.{key}" for key in network.swinViT.state_dict()}
    assert set(report.matched) == own and report.missing == ()
    assert report.unexpected == ("contrastive_head.weight", "rotation_head.weight")
    encoder, x = build.load_encoder(tmp_path / "out"), image(64, 32, 32)
    with torch.no_grad():
        for ours, theirs in zip(encoder(x).pyramid, network.swinViT(x), strict=True):
            assert torch.equal(ours, theirs)
    _, manifest = load_part(tmp_path / "out")
    assert manifest["licence"] == "unknown" and manifest["imported"]["source"] == "unknown"
    assert manifest["intensity"] == {"normalize": {"window": [-175, 250]}} and manifest["domains"] == ["ct"]
    assert re.fullmatch("[0-9a-f]{64}", manifest["imported"]["sha256"])
    assert any("image size of the pretraining unknown" in note for note in report.notes)


def test_whole_swin_unetr__brings_its_decoder_and_goes_on(tmp_path: Path) -> None:
    """Fine-tuning and export take the result; what MONAI's network computes comes out again."""
    network = swin_unetr()
    torch.save(network.state_dict(), tmp_path / "best.pth")
    report = import_weights(tmp_path / "best.pth", "swin3d", tmp_path / "out", licence="Apache-2.0", source="ours")
    assert report.unexpected == ("out.conv.conv.bias", "out.conv.conv.weight")
    weights = open_weights(tmp_path / "out", transfer="encoder_decoder")
    target: Any = build_swin_unetr(encoder=weights.manifest["encoder"], out_channels=3).eval()
    load_pretrained(target, weights.state, weights.manifest, decoder_state=weights.decoder_state)
    target.out.load_state_dict(network.out.state_dict())
    x = image(64, 32, 32)
    with torch.no_grad():
        assert torch.equal(target(x), network(x))
    export_weights(tmp_path / "out", "swin-unetr", tmp_path / "again")
    exported = json.loads((tmp_path / "again" / "swin_unetr.json").read_text())
    assert exported["licence"] == "Apache-2.0" and exported["imported"]["source"] == "ours"


def hidden_states(network: Any, x: Tensor) -> Tensor:
    """What a MAE's encoder makes of all tokens, without class token and masking."""
    tokens = network.patch_embedding(x)
    for block in network.blocks:
        tokens = block(tokens)
    return tokens


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # of MONAI's sine positions
def test_mae_of_monai__has_its_last_norm_one_block_on(tmp_path: Path) -> None:
    from monai.networks.nets import MaskedAutoEncoderViT

    network = randomised(MaskedAutoEncoderViT(1, **VIT, decoder_hidden_size=24, decoder_num_layers=1, decoder_num_heads=2))
    torch.save({"model": network.state_dict()}, tmp_path / "mae.pt")
    report = import_weights(tmp_path / "mae.pt", "vit3d", tmp_path / "out", args={"num_heads": 4})
    assert report.encoder["args"]["mlp_dim"] == 512  # MONAI's default there, which a ViT of its own defaults would not take
    assert report.encoder["args"]["image_size"] == [32, 32, 32] and any("(a cube of tokens)" in note for note in report.notes)
    assert {key.split(".")[0] for key in report.unexpected} == {
        "cls_token", "mask_tokens", "decoder_embed", "decoder_pos_embedding", "decoder_blocks", "decoder_pred",
    }  # fmt: skip
    with torch.no_grad():
        found = build.load_encoder(tmp_path / "out")(image(32, 32, 32)).tokens
        torch.testing.assert_close(found, hidden_states(network, image(32, 32, 32)), atol=1e-5, rtol=0)


def test_vit_autoencoder__gives_its_hidden_states(tmp_path: Path) -> None:
    from monai.networks.nets import ViTAutoEnc

    network = randomised(ViTAutoEnc(1, **{**VIT, "img_size": (64, 32, 16)}, mlp_dim=96, proj_type="conv"))
    state = {
        f"module.{key}": value for key, value in network.state_dict().items() if "norm_cross_attn" not in key
    }  # of older MONAI
    state["module.blocks.0.cross_attn.out_proj.weight"] = torch.zeros(48, 48)  # and what it had instead
    torch.save({"state_dict": state}, tmp_path / "vit.pt")
    with pytest.raises(WeightsError, match="the position table has 8 tokens, which images of"):
        import_weights(tmp_path / "vit.pt", "vit3d", tmp_path / "out", args={"num_heads": 4}, image_size=[64, 64, 64])
    report = import_weights(tmp_path / "vit.pt", "vit3d", tmp_path / "out", args={"num_heads": 4}, image_size=[64, 32, 16])
    assert len(report.missing) == 4 and all("norm_cross_attn" in key for key in report.missing)
    assert {key.split(".")[0] for key in report.unexpected} == {"conv3d_transpose", "conv3d_transpose_1", "blocks"}
    x = image(64, 32, 16)
    with torch.no_grad():
        _, states = network(x)
        for ours, theirs in zip(build.load_encoder(tmp_path / "out")(x).pyramid, states, strict=True):
            torch.testing.assert_close(ours.flatten(2).transpose(1, 2), theirs, atol=1e-5, rtol=0)


def test_vit_inside_a_unetr__is_found_and_heads_are_assumed_aloud(tmp_path: Path) -> None:
    from monai.networks.nets import UNETR

    network = randomised(UNETR(1, 2, (32, 32, 32), feature_size=4, hidden_size=64, mlp_dim=64, num_heads=1, proj_type="conv"))
    save_file(network.state_dict(), tmp_path / "unetr.safetensors")
    report = import_weights(tmp_path / "unetr.safetensors", "vit3d", tmp_path / "out")
    assert any("num_heads 1 assumed (64 channels per head)" in note for note in report.notes)
    assert len(report.matched) == 161 and not any(key.startswith("vit.") for key in report.unexpected)
    with torch.no_grad():
        found = build.load_encoder(tmp_path / "out")(image(32, 32, 32)).tokens
        torch.testing.assert_close(found, network.vit(image(32, 32, 32))[0], atol=1e-5, rtol=0)
    wide = randomised(UNETR(1, 2, (32, 32, 32), feature_size=4, hidden_size=64, mlp_dim=64, num_heads=1, qkv_bias=True))
    torch.save(wide.state_dict(), tmp_path / "biased.pt")
    with pytest.raises(WeightsError, match=r"12 fault\(s\), first unexpected blocks.0.attn.qkv.bias; nothing was written"):
        import_weights(tmp_path / "biased.pt", "vit3d", tmp_path / "biased")  # dropping the biases would give other features
    assert not (tmp_path / "biased").exists()


def test_adaptation_plan__comes_back_as_it_went_out(tmp_path: Path) -> None:
    source = make_resenc()
    run = save_run(source, tmp_path / "run", image_size=[16, 24, 6])
    export_weights(run, "nnunet", tmp_path / "export", decoder=True)
    report = import_weights(tmp_path / "export" / "checkpoint_final.pth", "resenc3d", tmp_path / "out")
    assert report.encoder == source.config() and report.layout == "adaptation-plan checkpoint" and report.unexpected == ()
    assert set(report.matched) == set(source.net.state_dict())
    state, manifest = load_part(tmp_path / "out")
    expected = source.net.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in state.items()) and len(state) == len(load_part(run)[0])
    assert manifest["image_size"] == [16, 24, 6] and manifest["spacing_mm"] == [2.0, 1.0, 1.5]
    assert manifest["intensity"] == {"normalize": "zscore"} and manifest["spacing_source"] == "views"
    weights = open_weights(tmp_path / "out", transfer="encoder_decoder")
    target: Any = build_resenc_unet(encoder=weights.manifest["encoder"], out_channels=2)
    assert load_pretrained(target, weights.state, weights.manifest, decoder_state=weights.decoder_state).fresh == 4


def test_online_encoder_of_nnssl__is_found_by_its_plan(tmp_path: Path) -> None:
    """Contrastive pretraining there keeps the encoder under another name, beside projectors and a target."""
    run = save_run(make_resenc(), tmp_path / "run", image_size=[16, 24, 6])
    export_weights(run, "nnunet", tmp_path / "export")
    content = torch.load(tmp_path / "export" / "checkpoint_final.pth", weights_only=True)
    content["network_weights"] = {
        **{f"online_{key}": value for key, value in content["network_weights"].items()},
        **{f"target_{key}": value + 1 for key, value in content["network_weights"].items()},
        "projector.0.weight": torch.zeros(2, 2),
    }
    content["nnssl_adaptation_plan"] |= {"key_to_encoder": "online_encoder.stages", "key_to_stem": "online_encoder.stem"}
    torch.save(content, tmp_path / "byol.pth")
    report = import_weights(tmp_path / "byol.pth", "resenc3d", tmp_path / "out")
    assert {key.split(".")[0] for key in report.unexpected} == {"target_encoder", "projector"}
    with torch.no_grad():
        x = image(16, 24, 6)
        assert torch.equal(build.load_encoder(tmp_path / "out")(x).tokens, make_resenc()(x).tokens)
    del content["nnssl_adaptation_plan"]["pretrain_plan"]
    torch.save(content, tmp_path / "cut.pth")
    with pytest.raises(WeightsError, match=r"adaptation plan in the file is not complete \(KeyError\)"):
        import_weights(tmp_path / "cut.pth", "resenc3d", tmp_path / "other")


def test_nnunet_tensors_without_a_plan__need_their_sizes(tmp_path: Path) -> None:
    export_weights(save_run(make_resenc(), tmp_path / "run"), "nnunet", tmp_path / "export", decoder=True)
    content = torch.load(tmp_path / "export" / "checkpoint_final.pth", weights_only=True)
    torch.save({"network_weights": content["network_weights"]}, tmp_path / "plain.pth")
    sizes = {"features_per_stage": [8, 12, 16], "n_blocks_per_stage": [1, 2, 1], "strides": [1, 2, [2, 2, 1]]}
    with pytest.raises(
        WeightsError, match=r"do not fit encoder resenc3d as built \(in_channels 1, features_per_stage \[8, 12, 24\]"
    ):
        import_weights(tmp_path / "plain.pth", "resenc3d", tmp_path / "no", args={**sizes, "features_per_stage": [8, 12, 24]})
    import_weights(tmp_path / "plain.pth", "resenc3d", tmp_path / "out", args=sizes)
    with torch.no_grad():
        x = image(16, 24, 6)
        assert torch.equal(build.load_encoder(tmp_path / "out")(x).tokens, make_resenc()(x).tokens)


def stock(model: str, **args: Any) -> Any:
    torchvision_ops.ensure()
    timm = pytest.importorskip("timm")
    return randomised(timm.create_model(model, **args))


def test_timm_resnet__with_its_config_beside_it(tmp_path: Path) -> None:
    network = stock("resnet18", in_chans=3, num_classes=5)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "num_classes": 5, "model_args": {"in_chans": 3}}))
    report = import_weights(tmp_path / "model.safetensors", "image2d", tmp_path / "out")
    assert report.unexpected == ("fc.bias", "fc.weight") and report.encoder["args"]["in_channels"] == 3
    x = image(64, 96, channels=3)
    with torch.no_grad():
        assert torch.equal(
            build.load_encoder(tmp_path / "out")(x).pooled, network.forward_head(network.forward_features(x), pre_logits=True)
        )
        grey = import_weights(tmp_path / "model.safetensors", "image2d", tmp_path / "grey", channels=1)
        assert any("conv1.weight: 3 input channels summed to 1" in note for note in grey.notes)
        found = build.load_encoder(tmp_path / "grey")(x[:, :1]).pooled
        expected = network.forward_head(network.forward_features(x[:, :1].expand(-1, 3, -1, -1)), pre_logits=True)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    export_weights(tmp_path / "out", "timm", tmp_path / "timm")


def dinov2_layout(network: Any) -> dict[str, Tensor]:
    """Names of a DINOv2 release of the ViT in timm's form: positions hold the class token's, registers have their own name."""
    state = dict(network.state_dict())
    first = torch.full_like(state["cls_token"], 0.25)
    state["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - first
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, state["cls_token"].shape[-1])
    return state


def test_dinov2_style_teacher__gives_the_features_of_timms_network(tmp_path: Path) -> None:
    args = {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.5}
    network = stock("test_vit", in_chans=3, num_classes=0, **args)
    teacher = {f"backbone.{key}": value for key, value in dinov2_layout(network).items()}
    student = {key: value + 1 for key, value in teacher.items()}
    heads = {"dino_head.last_layer.weight": torch.zeros(3, 3)}
    torch.save({"student": student, "teacher": {**teacher, **heads}, "iteration": 9}, tmp_path / "teacher.pth")
    report = import_weights(tmp_path / "teacher.pth", "image2d", tmp_path / "out", args={"model": "test_vit", "model_args": args})
    assert report.unexpected == ("backbone.mask_token", "dino_head.last_layer.weight") and report.resized == ()
    assert "names converted by timm" in report.notes and "tensors below backbone." in report.notes
    x = image(160, 160, channels=3)
    with torch.no_grad():
        found = build.load_encoder(tmp_path / "out")(x)
        torch.testing.assert_close(found.pooled, network(x), atol=1e-5, rtol=0)
    with pytest.raises(WeightsError, match=r"timm cannot convert these tensors to test_vit .*one with registers"):
        import_weights(
            tmp_path / "teacher.pth", "image2d", tmp_path / "no", args={"model": "test_vit", "model_args": {"init_values": 0.5}}
        )


def test_blocks_in_chunks__are_named_by_their_number(tmp_path: Path) -> None:
    """DINOv2 trains with `block_chunks`, so that the files of its own runs say blocks.CHUNK.NUMBER."""
    args = {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.5}
    network = stock("test_vit", in_chans=3, num_classes=0, **args)
    whole = {f"backbone.{key}": value for key, value in dinov2_layout(network).items()}
    chunked = {re.sub(r"blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}.", key): value for key, value in whole.items()}
    assert "backbone.blocks.1.3.norm1.weight" in chunked
    torch.save({"teacher": chunked}, tmp_path / "teacher.pth")
    report = import_weights(tmp_path / "teacher.pth", "image2d", tmp_path / "out", args={"model": "test_vit", "model_args": args})
    assert any("chunks" in note for note in report.notes)
    x = image(160, 160, channels=3)
    with torch.no_grad():
        torch.testing.assert_close(build.load_encoder(tmp_path / "out")(x).pooled, network(x), atol=1e-5, rtol=0)


def test_stages__are_no_chunks(tmp_path: Path) -> None:
    network = stock("test_efficientnet", in_chans=1, num_classes=0)
    assert "blocks.0.0.conv.weight" in network.state_dict()
    torch.save(network.state_dict(), tmp_path / "net.pth")
    report = import_weights(tmp_path / "net.pth", "image2d", tmp_path / "out", args={"model": "test_efficientnet"})
    assert report.unexpected == () and not any("chunks" in note for note in report.notes)


@pytest.mark.parametrize("wrapper", ["state_dict_ema", "model_ema"])
def test_average_over_steps__comes_before_what_was_averaged(tmp_path: Path, wrapper: str) -> None:
    network = stock("test_vit", in_chans=1, num_classes=0)
    last = {key: value + 1 for key, value in network.state_dict().items()}
    torch.save({"state_dict": last, "model": last, wrapper: network.state_dict(), "epoch": 3}, tmp_path / "last.pth")
    report = import_weights(tmp_path / "last.pth", "image2d", tmp_path / "out", args={"model": "test_vit"})
    assert f"tensors are the average over steps, {wrapper} of the file" in report.notes
    found, manifest = load_part(tmp_path / "out")
    assert torch.equal(found["pos_embed"], network.state_dict()["pos_embed"]) and manifest["imported"]["inside"] == [wrapper]


def test_image_size__is_that_of_the_positions_where_nobody_says(tmp_path: Path) -> None:
    network = stock("test_vit", in_chans=1, num_classes=0, img_size=96)
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    report = import_weights(tmp_path / "vit.pth", "image2d", tmp_path / "out", args={"model": "test_vit"})
    assert report.resized == () and report.encoder["args"]["image_size"] == [96, 96]
    assert "image size 96x96 is that of the file's 37 positions" in report.notes
    assert load_part(tmp_path / "out")[1]["image_size"] == [96, 96]


def test_vit_of_another_size__has_its_positions_resized_and_named(tmp_path: Path) -> None:
    network = stock("test_vit", in_chans=1, num_classes=0, img_size=96)
    torch.save(network.state_dict(), tmp_path / "vit.bin")
    report = import_weights(tmp_path / "vit.bin", "image2d", tmp_path / "out", args={"model": "test_vit"}, image_size=[128, 128])
    assert report.resized == ("pos_embed",)
    other = stock("test_vit", in_chans=1, num_classes=0, img_size=128, patch_size=32)
    torch.save(other.state_dict(), tmp_path / "coarse.bin")
    with pytest.raises(
        WeightsError, match=r"has a kernel of \(32, 32\), test_vit one of \(16, 16\); choose the model of that patch size"
    ):
        import_weights(tmp_path / "coarse.bin", "image2d", tmp_path / "coarse", args={"model": "test_vit"})


class Trap:
    """Unpickling this would run a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickle_with_code__is_not_run(tmp_path: Path, entries: Any) -> None:
    torch.save({"state_dict": OrderedDict(a=torch.zeros(1)), "hook": Trap(tmp_path / "sprung")}, tmp_path / "bad.pt")
    (tmp_path / "text.pt").write_text("no weights at all")
    (tmp_path / "table.pt").write_text("Quillfeather,train")  # Q is an opcode that takes from an empty stack
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00")
    torch.save(torch.zeros(3), tmp_path / "bare.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    torch.save({"state_dict": {"layers1.0.blocks.0.norm1.weight": torch.tensor([float("nan")])}}, tmp_path / "nan.pt")
    before = entries()
    for name, match in (
        ("bad.pt", r"bad.pt holds objects or code besides tensors .* was not opened"),
        ("text.pt", r"text.pt (holds objects or code|cannot be read)"),
        ("table.pt", r"table.pt (holds objects or code|cannot be read)"),
        ("cut.safetensors", r"cut.safetensors cannot be read \(SafetensorError\)"),
        ("bare.pt", r"bare.pt holds a Tensor, not a dictionary of tensors"),
        ("empty.pt", r"empty.pt holds no tensors by name; accepted: a state dict, or one under network_weights, state_dict"),
        ("nan.pt", r"1 tensors hold NaN or infinity, first layers1.0.blocks.0.norm1.weight"),
        ("absent.pt", r"absent.pt is no file"),
    ):
        with pytest.raises(WeightsError, match=match):
            import_weights(tmp_path / name, "swin3d", tmp_path / "out")
    assert entries() == before


def test_weights_of_another_encoder_and_shape__are_refused_before_writing(tmp_path: Path, entries: Any) -> None:
    network = swin_unetr()
    torch.save(ssl_layout(network), tmp_path / "swin.pt")
    state = ssl_layout(network)
    del state["state_dict"]["module.layers3.0.blocks.0.attn.proj.weight"]
    torch.save(state, tmp_path / "short.pt")
    state = ssl_layout(network)
    state["state_dict"]["module.layers2.0.blocks.0.norm1.weight"] = torch.ones(5)
    torch.save(state, tmp_path / "shape.pt")
    state = ssl_layout(network)
    state["state_dict"]["module.layers1c.0.layer.conv1.conv.weight"] = torch.ones(5)
    torch.save(state, tmp_path / "v2.pt")
    before = entries()
    for name, encoder, match in (
        (
            "swin.pt",
            "vit3d",
            r"holds no tensors of encoder vit3d; accepted: MONAI's ViT.*its names are those of swin3d: --as swin3d",
        ),
        ("swin.pt", "resenc3d", "no tensors of encoder resenc3d.*--as swin3d"),
        ("short.pt", "swin3d", r"1 fault\(s\), first missing swinViT.layers3.0.blocks.0.attn.proj.weight; nothing was written"),
        ("shape.pt", "swin3d", r"first swinViT.layers2.0.blocks.0.norm1.weight has shape \(5,\), expected \(24,\)"),
        ("v2.pt", "swin3d", "use_v2"),
        ("swin.pt", "image2d", "which timm network is it.*give model=NAME"),
    ):
        with pytest.raises(WeightsError, match=match):
            import_weights(tmp_path / name, encoder, tmp_path / "out")
    with pytest.raises(RequestError, match=r'no layout for encoder "swin" \(did you mean "swin3d"\?\)'):
        import_weights(tmp_path / "swin.pt", "swin", tmp_path / "out")
    with pytest.raises(
        RequestError, match=r"import.heads: unknown key.*channels is 0.*spacing is \[0.0, 1.0, 1.0\].*normalize is 'minmax'"
    ):
        import_weights(
            tmp_path / "swin.pt",
            "swin3d",
            tmp_path / "out",
            args={"heads": 3},
            channels=0,
            spacing_mm=[0.0, 1.0, 1.0],
            normalize="minmax",
        )
    with pytest.raises(RequestError, match="is not an empty folder"):
        import_weights(tmp_path / "swin.pt", "swin3d", tmp_path)
    assert entries() == before


def test_command__prints_what_matched_and_writes_a_run_like_folder(tmp_path: Path, capsys: Any) -> None:
    network = swin_unetr()
    torch.save(ssl_layout(network), tmp_path / "swin.pt")
    command = [
        "import",
        str(tmp_path / "swin.pt"),
        "--as",
        "swin3d",
        "--out",
        str(tmp_path / "out"),
        "--normalize",
        "window:-175,250",
    ]
    with pytest.raises(SystemExit) as left:
        cli.main([*command, "--channels", "2", "--image-size", "96,96,96", "--spacing", "1.5,1.5,2", "--licence", "Apache-2.0"])
    said = capsys.readouterr()
    assert not left.value.code, said.err
    assert "MONAI SwinUNETR as swin3d: 84 tensors matched, 0 missing, 2 unexpected, 0 resized" in said.out
    assert "1 input channel repeated to 2" in said.out and "licence Apache-2.0; source unknown" in said.out
    manifest = json.loads((tmp_path / "out" / "weights" / "last" / "encoder.json").read_text())
    assert manifest["image_size"] == [96, 96, 96] and manifest["spacing_mm"] == [1.5, 1.5, 2.0] and manifest["channels"] == 2
    with pytest.raises(SystemExit) as left:
        cli.main([*command, "window_size=5"])
    assert left.value.code == 2 and "is not an empty folder" in capsys.readouterr().err
    assert set(ENCODERS) == set(READERS)


def test_evaluation__asks_for_what_imported_weights_do_not_say() -> None:
    from types import SimpleNamespace

    from medssl.probe_tasks import evaluation_section

    manifest = {
        "encoder": {"name": "swin3d", "args": {"in_channels": 1}},
        "image_size": None,
        "intensity": {},
        "spacing_source": "unknown",
    }
    found: dict[str, Any] = {}
    views: dict[str, Any] = {"normalize": "zscore"}
    recipe: Any = SimpleNamespace(source=SimpleNamespace(views=views, model_copy=lambda update: found.update(update)))
    with pytest.raises(RequestError, match=r"do not say how their images were prepared .*; give source.views.size in the recipe"):
        evaluation_section(recipe, manifest)
    views["size"] = [64, 64, 32]
    evaluation_section(recipe, manifest)
    assert found["views"] == views


@pytest.mark.parametrize(("channels", "shown"), [(1, "mean"), (3, "keep")])
def test_evaluation__shows_pictures_to_an_encoder_of_pictures(channels: int, shown: str) -> None:
    from types import SimpleNamespace

    from medssl.probe_tasks import evaluation_section

    manifest = {
        "encoder": {"name": "image2d", "args": {"in_channels": channels}},
        "image_size": [64, 64],
        "intensity": {"normalize": "zscore"},
    }
    found: dict[str, Any] = {}
    views: dict[str, Any] = {}
    recipe: Any = SimpleNamespace(source=SimpleNamespace(views=views, model_copy=lambda update: found.update(update)))
    evaluation_section(recipe, manifest)
    assert found["views"] == {"kind": "image", "channels": shown, "size": [64, 64], "normalize": "zscore"}
    views["kind"] = "stack"
    evaluation_section(recipe, manifest)
    assert found["views"] == {"kind": "stack", "size": [64, 64], "normalize": "zscore"}


def test_what_nobody_said_of_imported_weights__is_unknown_in_every_export(tmp_path: Path) -> None:
    from medssl.encoders.vit3d import ViT3D
    from medssl.export.onnx import facts_of

    network = ViT3D(image_size=(32, 48, 16), hidden_size=48, num_heads=4, mlp_dim=96, num_layers=1).net
    torch.save(network.state_dict(), tmp_path / "vit.pt")
    size = {"args": {"num_heads": 4}, "image_size": [32, 48, 16]}
    import_weights(tmp_path / "vit.pt", "vit3d", tmp_path / "run", **size)
    manifest = load_part(tmp_path / "run")[1]
    assert manifest["unknown"] == ["spacing_mm", "intensity", "domains", "axis_order", "data_cards"]
    export_weights(tmp_path / "run", "monai-bundle", tmp_path / "bundle")
    texts = {path.name: path.read_text() for path in (tmp_path / "bundle").rglob("*") if path.is_file() and path.suffix != ".pt"}
    readme = texts["README.md"].replace("\n", " ")
    assert "Unknown of the pretraining: intensities, voxel size, axis order, kind of images, training data." in readme
    assert "their normalisation in pretraining is unknown" in readme and "source unknown" in readme
    metadata = json.loads(texts["metadata.json"])
    assert (
        metadata["image_classes"] == "1 channel(s), normalised: unknown"
        and metadata["authors"] == metadata["copyright"] == "unknown"
    )
    assert "trained on is unknown" in texts["data_license.txt"] and "--licence" in texts["LICENSE"]
    assert "export.licence" not in " ".join(texts.values()) and "without labels" not in readme + metadata["task"]
    assert json.loads(texts["manifest.json"])["unknown"] == manifest["unknown"]

    export_weights(tmp_path / "run", "hf", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    for line in (
        "| Axes | unknown; medssl shows XYZ-RAS |",
        "| Voxel size | unknown |",
        "| Intensities | unknown |",
        "\n- unknown\n",
    ):
        assert line in card
    assert "without labels" not in card and "self-supervised" not in card
    facts = facts_of(manifest)
    assert facts["axis_order"] == facts["intensity"] == facts["spacing_mm"] == "unknown" and facts["channels"] == 1

    import_weights(tmp_path / "vit.pt", "vit3d", tmp_path / "scored", normalize="zscore", **size)
    with pytest.raises(WeightsError, match=r"imported without the domain of their images.*import them again with --domain"):
        export_weights(tmp_path / "scored", "monai-bundle", tmp_path / "out")
    said = {"normalize": "zscore", "domain": "ct", "spacing_mm": [1.0, 1.0, 2.0]}
    import_weights(tmp_path / "vit.pt", "vit3d", tmp_path / "known", **said, **size)
    assert load_part(tmp_path / "known")[1]["unknown"] == ["axis_order", "data_cards"]
    export_weights(tmp_path / "known", "monai-bundle", tmp_path / "out")
    assert "normalised: zscore" in (tmp_path / "out" / "configs" / "metadata.json").read_text()
