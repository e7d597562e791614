"""The cine benchmark runs at toy size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import cine_decode
from tests.benchmarks.test_benchmarks import play
from tests.synthetic_planar import us_loop, write_video


def test_cine_decode__equal_frames_and_a_ratio(tmp_path: Path) -> None:
    pytest.importorskip("av")
    clip = write_video(tmp_path / "c.avi", np.repeat(us_loop(6)[..., None], 3, axis=-1))
    content = play(cine_decode.main, ["--clips", str(clip)], tmp_path / "out")
    assert [row["reader"] for row in content["rows"]] == [cine_decode.OURS, cine_decode.BARE]
    assert content["rows"][0]["frames"] == "6x120x160"
    assert content["checks"][0]["target"] == ">= 0.9"
