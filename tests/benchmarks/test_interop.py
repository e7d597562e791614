"""Exports in the environments of other libraries: run where such an environment stands, see benchmarks/README.md."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.interop import hf_layout, monai_bundle, nnunet

ROOT = Path(__file__).resolve().parents[2]
HIPPOCAMPUS = ROOT.parent / "shared" / "data" / "msd_hippocampus"


def python_of(name: str) -> Path:
    """The interpreter of `.interop/NAME`, or skip."""
    folder = ROOT / ".interop" / name
    if not (folder / ".installed").is_file():
        pytest.skip(f"no environment at .interop/{name}; `make environments` installs it")
    return folder / "bin" / "python"


def there(name: str, script: str, *arguments: str, folder: Path) -> Any:
    """Run a step of a script in another environment and return its JSON."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    out = folder / "out.json"
    command = [
        str(python_of(name)),
        str(ROOT / "benchmarks" / "interop" / script),
        *arguments,
        "--folder",
        str(folder),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_bundles__run_with_monai_alone(tmp_path: Path) -> None:
    python_of("monai")
    monai_bundle.main(["prepare", "--folder", str(tmp_path)])
    found = there("monai", "monai_bundle.py", "check", folder=tmp_path)
    assert found["met"] and len(found["rows"]) == 3


@pytest.mark.slow
def test_image_vits__open_in_transformers(tmp_path: Path) -> None:
    python_of("transformers")
    hf_layout.main(["prepare", "--folder", str(tmp_path)])
    assert there("transformers", "hf_layout.py", "check", folder=tmp_path)["met"]


@pytest.mark.slow
def test_checkpoint__loads_and_trains_in_nnunet(tmp_path: Path) -> None:
    python_of("nnunet")
    nnunet.main(["prepare", "--folder", str(tmp_path)])
    found = there("nnunet", "nnunet.py", "check", folder=tmp_path)
    (rows,) = [step["rows"] for name, step in found.items() if name.startswith("check")]
    assert rows
    if rows[0]["road"] == "adaptation plan" and HIPPOCAMPUS.is_dir():  # the package of PyPI has no trainer for it
        train = there("nnunet", "nnunet.py", "train", "--data", str(HIPPOCAMPUS), folder=tmp_path)["train"]
        assert train["met"] and len(train["losses"]) == 10


def test_requirements__are_what_the_bundle_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any of these packages the bundle's metadata would be a promise that nobody keeps."""
    exported: list[str] = []

    def export(_run: Path, folder: Path, name: str) -> None:
        exported.append(name)
        (folder / "bundles" / name / "configs").mkdir(parents=True)
        metadata = {"monai_version": "1.6.1", "pytorch_version": "2.13.0", "numpy_version": "2.4.6"}
        metadata |= {"required_packages_version": {"fire": "0.7.1"}}
        (folder / "bundles" / name / "configs" / "metadata.json").write_text(json.dumps(metadata))

    monkeypatch.setattr(monai_bundle, "_export", export)
    monai_bundle.main(["prepare", "--folder", str(tmp_path)])
    assert exported == ["vit3d", "segresnet3d", "swin3d"]
    lines = (tmp_path / "requirements.txt").read_text().splitlines()
    assert lines == ["fire==0.7.1", "monai==1.6.1", "numpy==2.4.6", "torch==2.13.0", "jsonschema"]
