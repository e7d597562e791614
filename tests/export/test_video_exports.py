"""Exports of video encoders: the code in docs/export.md is run, and timm's ViT is the independent reader of single frames."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from medssl._compat import torchvision_ops
from medssl.cli import main as cli
from medssl.encoders.video_vit import VideoViT
from medssl.errors import WeightsError
from medssl.export.write import export_weights
from medssl.weights import save_part
from tests.export.conftest import FACTS, save_parts

DOCS = Path(__file__).parents[2] / "docs" / "export.md"
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", DOCS.read_text(), flags=re.MULTILINE | re.DOTALL))
FRAMES = {"frames": 8, "fps": 16.7, "tubelet": 2}


def make(**args: Any) -> VideoViT:
    torch.manual_seed(0)
    small = {"image_size": (8, 32, 48), "patch_size": 8, "hidden_size": 24, "num_layers": 2, "num_heads": 2}
    return VideoViT(**{**small, **args})


def run_of(encoder: VideoViT, folder: Path) -> Path:
    return save_parts(encoder, folder, clip=FRAMES)


@pytest.mark.parametrize("heading", ["Video encoder", "Frames of a video encoder"])
def test_docs__run(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    torchvision_ops.ensure()
    encoder = make()
    run_of(encoder, tmp_path / "runs" / "video")
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"```sh\nmedssl (.*?)```", SECTIONS[heading], flags=re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", SECTIONS[heading], flags=re.DOTALL)
    with pytest.raises(SystemExit) as left:
        cli.main(shlex.split(command))
    assert not left.value.code, capsys.readouterr().err
    names: dict[str, Any] = {}
    exec(compile(code, heading, "exec"), names)
    if heading == "Video encoder":
        with torch.no_grad():
            expected = encoder.eval().forward_features(names["clip"])
        assert names["tokens"].shape == (1, 4, 4, 6, 24) and torch.equal(names["output"].pooled, expected.pooled)
        kept = json.loads((tmp_path / "export" / "video" / "encoder.json").read_text())
        assert kept["clip"] == FRAMES and kept["axis_order"] == "THW"
    else:
        x = torch.randn(2, 1, 32, 48)
        network = names["network"].eval()
        with torch.no_grad():
            stock = network.forward_features(x)
            still = encoder.eval().forward_features(x[:, :, None].expand(-1, -1, 2, -1, -1))
        assert torch.allclose(stock[:, 0], still.pooled, atol=1e-5) and torch.allclose(stock[:, 1:], still.tokens, atol=1e-5)


@pytest.mark.parametrize(("changes", "channels"), [({"tubelet": 1}, None), ({"pool": "mean"}, 3), ({"in_channels": 3}, 1)])
def test_timm__opens_frames(changes: dict[str, Any], channels: int | None, tmp_path: Path) -> None:
    torchvision_ops.ensure()
    encoder = make(**changes)
    report = export_weights(run_of(encoder, tmp_path / "run"), "timm", tmp_path / "out", channels=channels)
    assert report.missing == report.unexpected == () and report.max_feature_difference < 1e-5
    assert len(report.matched) == 2 + 2 + 1 + 2 * 12 + 1  # embedding, norm, class token, blocks, positions
    assert any("summed over the 2 frames" in note for note in report.notes) == (encoder.patch_size[0] == 2)


def test_part_of_the_frame_branch__goes_to_timm(tmp_path: Path) -> None:
    torchvision_ops.ensure()
    branch = make().frame_branch()
    save_part(tmp_path, "image_teacher", branch.net.state_dict(), {**branch.part("image_teacher").manifest, **FACTS})
    report = export_weights(tmp_path / "image_teacher.safetensors", "timm", tmp_path / "out")
    assert report.max_feature_difference < 1e-5


def test_other_forms__name_those_that_fit(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"takes monai.ViT; export to safetensors, timm, onnx, hf instead"):
        export_weights(run_of(make(), tmp_path / "run"), "unetr", tmp_path / "out")
