"""The ONNX graph, run by onnxruntime on images that it was not traced with."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medssl.cli import main as cli
from medssl.encoders.image2d import Image2D
from medssl.encoders.resenc3d import ResEnc3D
from medssl.encoders.video_vit import VideoViT
from medssl.errors import RequestError, WeightsError
from medssl.export import onnx as form
from medssl.export.write import export_weights
from tests.export.conftest import make_joint, make_segresnet, make_swin, make_vit, save_parts, save_run

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in form.NEEDED), reason="the extra onnx is not installed"
)


def answers(file: Path, image: torch.Tensor) -> list[torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(np.array(value)) for value in session.run(["tokens", "pooled"], {"image": image.numpy()})]


def assert_equal_features(file: Path, encoder: Any, shape: tuple[int, ...]) -> None:
    image = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = encoder.eval().forward_features(image)
    assert expected.tokens.std() > 0.01
    for found, mine in zip(answers(file, image), (expected.tokens, expected.pooled), strict=True):
        torch.testing.assert_close(found, mine, atol=1e-4, rtol=1e-4)


@needs_onnx
@pytest.mark.slow
def test_segresnet__takes_any_batch_and_size_and_says_what_it_is(segresnet_run: Path, tmp_path: Path) -> None:
    import onnx

    report = export_weights(segresnet_run, "onnx", tmp_path / "out")
    file = tmp_path / "out" / "encoder.onnx"
    for shape in [(1, 1, 8, 16, 12), (4, 1, 20, 8, 8)]:
        assert_equal_features(file, make_segresnet(), shape)
    model = onnx.load(file)
    onnx.checker.check_model(model)
    props = {entry.key: entry.value for entry in model.metadata_props}
    assert props["use"].startswith("Research only") and props["axis_order"] == "XYZ-RAS"
    assert json.loads(props["intensity"]) == {"normalize": "zscore"} and json.loads(props["spacing_mm"]) == [2.0, 1.0, 1.5]
    manifest = json.loads((tmp_path / "out" / "encoder.json").read_text())
    assert manifest["export"]["use"] == props["use"] and manifest["weights_hash"] == props["weights_hash"]
    assert manifest["export"]["input"]["shape"] == ["batch", "channels", "free", "free", "free"]
    assert "run" not in manifest and "seed" not in manifest
    assert 0 < report.max_feature_difference < form.TOLERANCE and any("masks" in note for note in report.notes)
    content = file.read_bytes()
    assert b".py" not in content and str(Path(form.__file__).parents[2]).encode() not in content  # no paths of this machine


CASES: dict[str, tuple[Any, tuple[int, ...], bool]] = {
    "vit3d": (lambda: make_vit(num_layers=2), (3, 1, 32, 48, 16), False),
    "swin3d": (make_swin, (3, 1, 32, 32, 32), False),
    "resenc3d": (lambda: ResEnc3D(features_per_stage=[8, 12], n_blocks_per_stage=[1, 1], strides=[1, 2]), (3, 1, 12, 8, 16), True),
    "resnet18": (lambda: Image2D(model="resnet18"), (3, 1, 96, 64), True),
    "vit2d": (lambda: Image2D(model="vit_tiny_patch16_224", image_size=32, model_args={"depth": 2}), (3, 1, 48, 32), True),
    "video_vit": (lambda: VideoViT(image_size=(4, 32, 48), hidden_size=48, num_heads=4, num_layers=2), (3, 1, 4, 32, 48), False),
}


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_encoder__gives_its_features(name: str, tmp_path: Path) -> None:
    make, shape, free = CASES[name]
    torch.manual_seed(3)
    encoder = make()
    facts = {"image_size": [32, 32, 32]} if name == "swin3d" else {}
    run = save_run(encoder, tmp_path / "run", **facts) if encoder.library.startswith(("monai", "dyn")) else save_parts(
        encoder, tmp_path / "run", **facts
    )  # fmt: skip
    report = export_weights(run, "onnx", tmp_path / "out")
    assert_equal_features(tmp_path / "out" / "encoder.onnx", encoder, shape)
    assert ("batch and size are free" in report.notes[0]) == free


@needs_onnx
@pytest.mark.slow
def test_joint__gives_its_slice_encoder(tmp_path: Path) -> None:
    joint = make_joint()
    export_weights(save_parts(joint, tmp_path / "run"), "onnx", tmp_path / "out")
    assert_equal_features(tmp_path / "out" / "encoder.onnx", joint.slice_encoder, (2, 1, 64, 96))


@needs_onnx
def test_graph_that_cannot_be_traced__is_refused_with_its_reason() -> None:
    class Branching(torch.nn.Module):
        name, in_channels, patch_size = "branching", 1, (4, 4)

        def forward_features(self, x: torch.Tensor) -> Any:
            raise NotImplementedError("sizes decide at run time")

    with pytest.raises(WeightsError, match=r"encoder branching cannot be traced \(.*\); export to safetensors"):
        form.trace(Branching(), [8, 12], [0])


@needs_onnx
def test_features_that_differ__stop_it(segresnet_run: Path, tmp_path: Path, entries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = entries()
    real = form.check

    def spoiled(path: Path, encoder: Any, sizes: Any) -> float:
        with torch.no_grad():
            encoder.net.down_layers[-1][-1].conv2.conv.weight.add_(0.1)
        return real(path, encoder, sizes)

    monkeypatch.setattr(form, "check", spoiled)
    with pytest.raises(WeightsError, match=r"export to onnx: .* differ by .*at most 0.0001 is accepted; nothing was written"):
        export_weights(segresnet_run, "onnx", tmp_path / "out")
    assert entries() == before


def test_absent_packages__name_the_extra(
    segresnet_run: Path, tmp_path: Path, entries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = entries()
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "onnxruntime" else real(name, *more))
    with pytest.raises(RequestError, match=r'needs .*onnxruntime; install the extra with `pip install "medssl\[onnx\]"`'):
        export_weights(segresnet_run, "onnx", tmp_path / "out")
    assert entries() == before


@needs_onnx
@pytest.mark.slow
def test_code_of_the_docs__runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text().split("\n## ONNX\n")[1].split("\n## ")[0]
    (command,) = re.findall(r"```sh\nmedssl (.*?)```", text, flags=re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    encoder = CASES["resenc3d"][0]()
    save_run(encoder, tmp_path / "runs" / "resenc")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.main(shlex.split(command))
    said = capsys.readouterr()
    assert not left.value.code, said.err
    assert "batch and size are free" in said.out and "features equal within" in said.out
    names: dict[str, Any] = {}
    exec(compile(code, "docs/export.md", "exec"), names)
    assert names["pooled"].shape == (2, encoder.embed_dim)
