"""The Hugging Face layout: opened offline, keys as transformers documents them, everything built from config.json alone."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from medssl.build import build_encoder, load_encoder
from medssl.cli import main as cli
from medssl.encoders.image2d import Image2D
from medssl.errors import WeightsError
from medssl.export import hf
from medssl.export.write import export_weights
from medssl.weights import load_part
from tests.export.conftest import make_joint, make_segresnet, make_swin, make_vit, save_parts, save_run

# state_dict() of transformers' ViTModel(add_pooling_layer=False), 4.0 to 4.57; version 5 converts these names on loading
VIT = {
    *("embeddings.cls_token", "embeddings.position_embeddings", "layernorm.weight", "layernorm.bias"),
    *(f"embeddings.patch_embeddings.projection.{leaf}" for leaf in ("weight", "bias")),
    *(
        f"encoder.layer.{n}.{name}.{leaf}"
        for n in range(2)
        for name in (
            *(f"attention.attention.{part}" for part in ("query", "key", "value")),
            *("attention.output.dense", "intermediate.dense", "output.dense", "layernorm_before", "layernorm_after"),
        )
        for leaf in ("weight", "bias")
    ),
}
# of its Dinov2Model
DINOV2 = {
    *("embeddings.cls_token", "embeddings.mask_token", "embeddings.position_embeddings", "layernorm.weight", "layernorm.bias"),
    *(f"embeddings.patch_embeddings.projection.{leaf}" for leaf in ("weight", "bias")),
    *(
        f"encoder.layer.{n}.{name}.{leaf}"
        for n in range(2)
        for name in (
            *(f"attention.attention.{part}" for part in ("query", "key", "value")),
            *("attention.output.dense", "mlp.fc1", "mlp.fc2", "norm1", "norm2"),
        )
        for leaf in ("weight", "bias")
    ),
    *(f"encoder.layer.{n}.layer_scale{k}.lambda1" for n in range(2) for k in (1, 2)),
}


def make_image_vit(model: str = "vit_tiny_patch16_224", size: tuple[int, int] = (32, 48), **model_args: Any) -> Image2D:
    """A small timm ViT whose tensors are not what a new network has."""
    torch.manual_seed(6)
    encoder = Image2D(model=model, image_size=size, model_args={"depth": 2, "embed_dim": 48, "num_heads": 3, **model_args})
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder.eval()


@pytest.mark.parametrize("make", [make_vit, make_segresnet, make_swin])
def test_own_layout__is_built_again_from_config_json_alone(make: Any, tmp_path: Path) -> None:
    encoder = make().eval()
    report = export_weights(save_run(encoder, tmp_path / "run", image_size=[32, 48, 16]), "hf", tmp_path / "out")
    assert report.max_feature_difference == 0 and report.unexpected == ()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "medssl" and config["axis_order"] == "XYZ-RAS" and config["intensity"] == {"normalize": "zscore"}
    again = build_encoder({"name": config["encoder"], "args": config["args"]}).eval()
    result = again.net.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=False)
    groups = tuple(encoder.key_groups["encoder"])
    assert result.unexpected_keys == [] and not any(key.startswith(groups) for key in result.missing_keys)
    image = torch.randn(1, 1, *((32, 48, 16) if make is make_vit else (32, 64, 32)), generator=torch.Generator().manual_seed(5))
    opened = load_encoder(tmp_path / "out")
    with torch.no_grad():
        expected = encoder.forward_features(image).tokens
        assert torch.equal(again.forward_features(image).tokens, expected)
        assert torch.equal(opened.forward_features(image).tokens, expected)


@pytest.mark.parametrize(("model", "args", "kind", "keys"), [
    ("vit_tiny_patch16_224", {}, "vit", VIT),
    ("vit_small_patch14_dinov2", {"patch_size": 16}, "dinov2", DINOV2),
])  # fmt: skip
def test_image_vit__has_the_names_of_transformers(model: str, args: Any, kind: str, keys: set[str], tmp_path: Path) -> None:
    size = (32, 48) if kind == "vit" else (48, 48)
    encoder = make_image_vit(model, size, **args)
    report = export_weights(save_parts(encoder, tmp_path / "run"), "hf", tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert state.keys() == keys == set(report.matched)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        config["model_type"] == kind and config["image_size"] == ([32, 48] if kind == "vit" else 48) and config["num_channels"] == 1
    )
    assert report.max_feature_difference < 1e-12
    block = encoder.net.blocks[1]
    query, key, value = block.attn.qkv.weight.chunk(3)
    for name, expected in {"query": query, "key": key, "value": value}.items():
        assert torch.equal(state[f"encoder.layer.1.attention.attention.{name}.weight"], expected)
    if kind == "dinov2":
        assert torch.equal(state["encoder.layer.1.layer_scale2.lambda1"], block.ls2.gamma)
    back = hf.timm_state(state)
    own = encoder.net.state_dict()
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)


@pytest.mark.parametrize("args", [
    {"model": "vit_tiny_patch16_224", "reg_tokens": 2}, {"model": "vit_tiny_patch16_224", "global_pool": "avg"},
    {"model": "vit_tiny_patch16_224", "qkv_bias": False}, {"model": "vit_tiny_patch16_224", "qk_norm": True},
    {"model": "vit_small_patch14_dinov2", "patch_size": 16, "size": (32, 48)},  # Dinov2Model reads its table as a square
])  # fmt: skip
def test_vit_that_transformers_has_not__keeps_its_names(args: Any) -> None:
    assert hf.transformers_kind(make_image_vit(**args)) is None


def test_convolutions_and_joint__keep_their_names(tmp_path: Path) -> None:
    assert hf.transformers_kind(Image2D(model="resnet18")) is None
    joint = make_joint()
    report = export_weights(save_parts(joint, tmp_path / "run"), "hf", tmp_path / "out")
    assert set(report.matched) == set(joint.net.state_dict())
    assert load_part(tmp_path / "out")[1]["library"] == "medssl.SliceVolumeEncoder"


def test_card__has_front_matter_and_nothing_of_the_run(segresnet_run: Path, tmp_path: Path) -> None:
    export_weights(segresnet_run, "hf", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["license"] == "apache-2.0" and facts["library_name"] == "medssl" and "medical" in facts["tags"]
    assert "Not for diagnostic use" in body and "ours, version 3, MIT" in body
    content = text + (tmp_path / "out" / "config.json").read_text() + (tmp_path / "out" / "model.json").read_text()
    assert "stays in the run" not in content and str(tmp_path) not in content


def test_features_that_differ__stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_parts(make_image_vit(), tmp_path / "run")
    real = hf.transformers_state
    monkeypatch.setattr(hf, "transformers_state", lambda state, kind: real({**state, "norm.bias": state["norm.bias"] + 0.1}, kind))
    with pytest.raises(WeightsError, match=r"differ by 0\.1"):
        export_weights(run, "hf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_folder_without_weights__says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="no weights at"):
        load_encoder(tmp_path)


def test_code_of_the_docs__runs(joint_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text().split("\n## Hugging Face layout\n")[1].split("\n## ")[0]
    (command,) = re.findall(r"```sh\nmedssl (.*?)```", text, flags=re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "joint").symlink_to(joint_run)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.main(shlex.split(command))
    assert not left.value.code, capsys.readouterr().err
    names: dict[str, Any] = {}
    exec(compile(code, "docs/export.md", "exec"), names)
    mine, theirs = names["encoder"].net.state_dict(), names["again"].net.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
