"""The loop as a program: killed, signalled, distributed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medssl.archive.index import index
from medssl.phantoms.cohort import make_cohort

ROOT = Path(__file__).resolve().parents[2]


def toy(*args: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    start = (
        [sys.executable]
        if processes == 1
        else [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    )
    command = [*start, "-m", "tests.training.toy", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def encoder(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "weights" / "last" / "encoder.safetensors")


def largest_difference(a: Path, b: Path) -> float:
    left, right = encoder(a), encoder(b)
    assert left.keys() == right.keys()
    return max(float((left[k] - right[k]).abs().max()) for k in left)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted single-process run of 20 steps."""
    out = tmp_path_factory.mktemp("reference") / "run"
    done = toy(str(out), "20")
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_sigkill__then_resume_gives_the_same_bits(tmp_path: Path, reference: Path) -> None:
    killed = toy(str(tmp_path / "a"), "20", "--kill-at", "10")
    assert killed.returncode == -9
    resumed = toy(str(tmp_path / "a"), "20", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    ours = (tmp_path / "a" / "weights" / "last" / "encoder.safetensors").read_bytes()
    assert ours == (reference / "weights" / "last" / "encoder.safetensors").read_bytes()
    assert losses(tmp_path / "a") == losses(reference)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signal__saves_and_ends_within_a_step(tmp_path: Path, reference: Path, name: str) -> None:
    done = toy(str(tmp_path / "a"), "20", "--signal-at", "6", "--signal", name)
    assert done.returncode == 0, done.stderr
    assert "status interrupted" in done.stdout
    assert json.loads((tmp_path / "a" / "run.json").read_text())["status"] == "interrupted"
    assert (tmp_path / "a" / "checkpoints" / "step_000000007").is_dir()
    assert toy(str(tmp_path / "a"), "20", "--resume").returncode == 0
    assert largest_difference(tmp_path / "a", reference) == 0


@pytest.mark.slow
def test_keyboard__saves_and_stops_the_program(tmp_path: Path, reference: Path) -> None:
    stopped = toy(str(tmp_path / "a"), "20", "--signal-at", "6", "--signal", "SIGINT")
    assert stopped.returncode == -2 and "KeyboardInterrupt" in stopped.stderr and "status" not in stopped.stdout
    assert json.loads((tmp_path / "a" / "run.json").read_text())["status"] == "interrupted"
    assert (tmp_path / "a" / "checkpoints" / "step_000000007").is_dir()
    assert toy(str(tmp_path / "a"), "20", "--resume").returncode == 0
    assert largest_difference(tmp_path / "a", reference) == 0


@pytest.mark.slow
def test_two_processes__train_the_same_global_batch(tmp_path: Path, reference: Path) -> None:
    for strategy in ("ddp", "fsdp"):
        done = toy(str(tmp_path / strategy), "20", "--strategy", strategy, processes=2)
        assert done.returncode == 0, done.stderr
        assert losses(tmp_path / strategy) == pytest.approx(losses(reference), rel=1e-4)
    assert largest_difference(tmp_path / "ddp", tmp_path / "fsdp") < 1e-5
    assert largest_difference(tmp_path / "ddp", reference) < 1e-4


@pytest.mark.slow
def test_world_size__may_change_at_a_resume(tmp_path: Path, reference: Path) -> None:
    for first, second in ((2, 1), (1, 2)):
        out = tmp_path / f"{first}to{second}"
        toy(str(out), "20", "--signal-at", "9", processes=first)
        assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
        done = toy(str(out), "20", "--resume", processes=second)
        assert done.returncode == 0, done.stderr
        assert losses(out) == pytest.approx(losses(reference), rel=1e-4)
        assert largest_difference(out, reference) < 1e-4


@pytest.mark.slow
def test_two_processes__of_the_command_itself(tmp_path: Path) -> None:
    cohort = make_cohort(tmp_path / "cohort", patients=6, size=(32, 32, 32))
    index([cohort / "images"], tmp_path / "archive", modality="MR", splits=cohort / "split.csv")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "medssl", "pretrain"]
    changes = [f"data.index={tmp_path / 'archive'}", f"out={tmp_path / 'run'}", "train.steps=4"]
    recipe = ROOT / "recipes" / "smoke" / "mae_vit3d_mri.yaml"
    done = subprocess.run([*command, str(recipe), *changes], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished: ") == 1  # rank 0 alone speaks
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["status"], facts["world_size"]) == ("finished", 2)
    assert (tmp_path / "run" / "weights" / "last" / "encoder.safetensors").is_file()
