"""The benchmark of tiles runs at toy size; what it measures is for quiet machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("openslide", reason="extra wsi")

from benchmarks import wsi_tiles
from tests import synthetic_slides as slides


def test_wsi_tiles__both_slides_are_measured(tmp_path: Path) -> None:
    slide = slides.write_svs(tmp_path / "slide.svs")
    arguments = ["--slide", str(slide), "--edge", "960", "--tile", "128", "--tiles", "2", "--repeats", "2"]
    returned = wsi_tiles.main([*arguments, "--out", str(tmp_path / "out")])
    content = json.loads((tmp_path / "out" / "wsi_tiles.json").read_text())
    assert content == json.loads(json.dumps(returned))
    assert [row["reader"] for row in content["rows"]] == [wsi_tiles.OURS, wsi_tiles.BARE, wsi_tiles.RAW, wsi_tiles.EXACT] * 2
    assert [check["target"] for check in content["checks"]] == [">= 0.9"] * 4
    assert all(row["tiles_per_s"] > 0 for row in content["rows"])
