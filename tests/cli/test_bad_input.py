"""Bad input through the command line: exit status, a sentence that says what to do, nothing half-written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medssl.cli import main as cli
from medssl.recipe import recipe_folder
from medssl.training.run_folder import RunFolder

SMOKE = str(recipe_folder() / "smoke" / "mae_cnn_segresnet3d_mri.yaml")


def medssl(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Run the command line in this process and return (status, stdout, stderr)."""
    with pytest.raises(SystemExit) as left:
        cli.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def write_volume(path: Path, array: np.ndarray, spacing: float = 4.0) -> None:
    nib.save(nib.Nifti1Image(array, np.diag([spacing, spacing, spacing, 1.0])), path)  # type: ignore[attr-defined, no-untyped-call]


def body(seed: int, shape: tuple[int, ...] = (20, 22, 18)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape[:3]], indexing="ij"))
    inside = (grid**2).sum(axis=0) < 0.7
    return (inside * (200 + 40 * rng.random(shape[:3])) + 5 * rng.random(shape[:3])).astype(np.int16)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five good volumes, one constant, one with NaN voxels, two in a 4-D file, one 5-D, one that is no image."""
    root = tmp_path_factory.mktemp("archive")
    images = root / "images"
    images.mkdir()
    for number in range(5):
        write_volume(images / f"good_{number}.nii.gz", body(number))
    write_volume(images / "constant.nii.gz", np.full((20, 22, 18), 7, dtype=np.int16))
    holes = body(9).astype(np.float32)
    holes[8:12, 8:12, 8:12] = np.nan
    write_volume(images / "holes.nii.gz", holes)
    write_volume(images / "four_d.nii.gz", np.stack([body(1), body(2)], axis=-1))
    write_volume(images / "five_d.nii.gz", np.stack([np.stack([body(1), body(2)], axis=-1)] * 2, axis=-1))
    (images / "broken.nii.gz").write_bytes(b"\x1f\x8b" + b"not really gzip" * 10)
    from medssl.archive.index import index

    summary = index([images], root / "index", modality="MR")
    assert summary.n_files_seen == summary.n_files_used + sum(summary.reasons.values()) == 10
    assert summary.reasons["not_3d"] == 1
    return root / "index"


def test_pretraining__goes_on_without_bad_images_and_counts_them(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = medssl(
        capsys, "pretrain", SMOKE, f"data.index={archive}", f"out={tmp_path / 'run'}", "train.steps=4", "--json"
    )
    assert status == 0
    result = json.loads(out)
    assert result["status"] == "finished"
    assert result["items"] == 8  # five good ones, the one whose NaN voxels are marked invalid, the two volumes of the 4-D file
    assert list(result["failed"].values()) == ["constant"]
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["items"]["failed"] == {"constant": 1}
    assert oct((tmp_path / "run").stat().st_mode)[-3:] == "700"
    status, _, err = medssl(capsys, "pretrain", SMOKE, f"data.index={archive}", f"out={tmp_path / 'run'}", "train.steps=4")
    assert status == 2
    assert "already holds a run; continue it with --resume" in err
    status, _, err = medssl(
        capsys, "pretrain", SMOKE, f"data.index={archive}", f"out={tmp_path / 'run'}", "train.steps=5", "--resume"
    )
    assert status == 2
    assert "(train.steps was 4 and is 5), and a resumed run must be the same run" in err
    with RunFolder(tmp_path / "run").held():
        status, _, err = medssl(capsys, "pretrain", tmp_path / "run", "--resume")
    assert status == 2
    assert f"another process is training in {tmp_path / 'run'}; wait until it has finished" in err
    status, out, err = medssl(capsys, "runs", "ls", tmp_path, "--json")
    assert status == 0
    assert json.loads(out)[0]["status"] == "finished"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.stepps=4", 'unknown key (did you mean "steps"?)'),
        ("train.steps=many", "input should be a valid integer"),
        ("views.size=[30, 32, 16]", "does not divide"),
        ("data.index=nowhere", "nowhere"),
        ("data.where=modalty = 'MR'", "modalty"),
        ("data.where=modality = MR", "if MR is a value, write it in single quotes: 'MR'"),
        ("data.where=modality = 'CT'", "the selection is empty"),
        ("data.where=split = 'val'", "of all series have split 'unknown', as their patients are not known or no split was made"),
        ("train.batch=5 train.micro_batch=2", "choose a batch that is a multiple of 2"),
    ],
)
def test_wrong_requests__exit_2_and_write_nothing(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, words: str
) -> None:
    changes = [change] if "where" in change or "[" in change else change.split()
    status, out, err = medssl(capsys, "pretrain", SMOKE, f"data.index={archive}", f"out={tmp_path / 'run'}", *changes)
    assert status == 2
    assert words in err
    assert out == ""
    assert not (tmp_path / "run").exists()


def test_empty_folder__exits_2_and_says_what_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    status, _, err = medssl(capsys, "index", tmp_path / "empty", "--out", tmp_path / "index")
    assert status == 2
    assert "NIfTI" in err
    assert not (tmp_path / "index").exists()


def test_unknown_option_and_command__exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert medssl(capsys, "pretrain", SMOKE, "--no-such-option")[0] == 2
    assert medssl(capsys, "pretend")[0] == 2
    status, _, err = medssl(capsys, "recipe", "show", "mae_vit3d_mir")
    assert status == 2
    assert "recipe ls" in err


def test_weights_for_another_encoder__exit_2(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert medssl(capsys, "pretrain", SMOKE, f"data.index={archive}", f"out={tmp_path / 'run'}", "train.steps=2")[0] == 0
    status, _, err = medssl(capsys, "export", tmp_path / "run", "--to", "unetr", "--out", tmp_path / "unetr")
    assert status == 2
    assert "segresnet3d" in err
    assert not (tmp_path / "unetr").exists()
    status, _, err = medssl(capsys, "export", tmp_path / "run", "--to", "segrsnet", "--out", tmp_path / "x")
    assert status == 2
    assert 'did you mean "segresnet"' in err
    status, _, err = medssl(capsys, "export", tmp_path / "nothing", "--to", "segresnet", "--out", tmp_path / "x")
    assert status == 2
    assert "no weights at" in err


@pytest.mark.slow
def test_no_write_permission__exits_without_traces(archive: Path, open_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil
    import subprocess

    if os.getuid() != 0:
        pytest.skip("needs root to start a process as another user")
    closed = open_folder / "closed"
    closed.mkdir(mode=0o755)
    copy = open_folder / "copy"
    shutil.copytree(archive, copy)
    medssl(capsys, "cache", SMOKE, f"data.index={copy}")  # the other user may not read the images
    for path in [copy, *copy.rglob("*")]:
        os.chown(path, 65534, 65534)
    code = (
        "import os, sys\n"
        "import medssl.api, medssl.encoders.segresnet3d, medssl.objectives.mae_cnn, medssl.domains.mri\n"
        "import monai.networks.nets, duckdb, blosc2, nibabel, pydicom, scipy.ndimage\n"
        "from medssl.cli.main import main\n"  # imported as root: the interpreter may lie in a folder that others cannot read
        "os.setgid(65534); os.setuid(65534)\n"
        "main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "pretrain", SMOKE, f"data.index={copy}", f"out={closed / 'run'}", "train.steps=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "is no folder that you may write to; give another with out=PATH" in done.stderr
    assert list(closed.iterdir()) == []


def test_report__leaves_a_folder_of_images_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "picture.jpg").write_bytes(b"not ours")
    status, _, err = medssl(capsys, "report", tmp_path)
    assert status == 2
    assert "nothing there that medssl wrote; give the run folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["picture.jpg"]


def test_run_folder_that_cannot_be_written__is_refused_before_the_store_is_filled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    status, _, err = medssl(capsys, "pretrain", SMOKE, f"data.index={tmp_path / 'absent'}", f"out={tmp_path / 'file' / 'run'}")
    assert status == 2
    assert "cannot be written" in err and "give another with out=PATH" in err


def test_keyboard__says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("medssl.recipe.shipped", stop)
    status, _, err = medssl(capsys, "recipe", "ls")
    assert status == 1
    assert "stopped by the keyboard; what was written is complete, the same command continues (pretrain: add --resume)" in err


def test_unexpected_error__hides_its_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def explode(*_: object, **__: object) -> None:
        raise ValueError("PatientName^Secret")

    monkeypatch.setattr("medssl.recipe.shipped", explode)
    status, out, err = medssl(capsys, "recipe", "ls")
    assert status == 1
    assert "Secret" not in out + err
    assert "an error in medssl itself: ValueError at" in err
