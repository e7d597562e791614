"""Video objectives on two processes give what one gives: assignments, centres, statistics, queue, teachers, weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.objectives.video_processes import play

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_processes__equal_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*command, "-m", "tests.objectives.video_processes", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = play(), [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert one.keys() == two[0].keys() == two[1].keys()
    assert (
        sum(any(word in name for word in ("centres", "standards", "queue", "teacher", "keys", "prototypes")) for name in one) > 60
    )
    for name, expected in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        if expected.is_floating_point():
            assert torch.allclose(two[0][name], expected, rtol=1e-5, atol=2e-6), name
        else:
            assert torch.equal(two[0][name], expected), name
