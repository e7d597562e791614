"""Alice on two processes gives what one gives: losses, gradients, teacher, centres, pair weights; DDP finds no unused parameter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.objectives.alice_processes import play

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def double() -> Iterator[None]:
    """Compute in double precision, as the processes do."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_two_processes__equal_one(tmp_path: Path, double: None) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*command, "-m", "tests.objectives.alice_processes", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("segresnet3d", "vit3d"):
        one, two = play(name), [torch.load(tmp_path / f"{name}_{rank}.pt") for rank in (0, 1)]
        assert one.keys() == two[0].keys() == two[1].keys() and float(one["centres.patch.value"].abs().max()) > 0
        for key, expected in one.items():
            assert torch.equal(two[0][key], two[1][key]), key
            assert torch.allclose(two[0][key].double(), expected.double(), rtol=1e-4, atol=2e-6), key
