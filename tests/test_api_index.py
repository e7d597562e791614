"""`medssl.index` offers what `medssl index` does."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

import medssl
from medssl import api
from medssl.archive.index import ScanOptions
from medssl.cli.data import index as command
from medssl.errors import RequestError
from tests.archive.small import write_scans

ELSEWHERE = {"settle": "settle_s", "limit": "limit_s", "json": None}
"""Option of the command -> its name in Python; None where a function needs none."""


def test_index__reads_pixels_when_asked(tmp_path: Path) -> None:
    write_scans(tmp_path / "src", range(3))
    plain = medssl.index(str(tmp_path / "src"), str(tmp_path / "out"))  # one folder, not a list of letters
    assert (plain.n_series, plain.pixels) == (3, None) and "pixels" not in json.loads(
        (tmp_path / "out" / "summary.json").read_text()
    )
    seen: list[tuple[int, int]] = []
    looked = medssl.index([tmp_path / "src"], tmp_path / "out", pixels=True, on_pixels=lambda *counts: seen.append(counts))
    assert looked.n_files_scanned == 0 and looked.pixels is not None
    assert (looked.pixels.looked_at, looked.pixels.read, looked.pixels.failed) == (3, 3, {}) and seen[-1] == (3, 3)
    written = json.loads((tmp_path / "out" / "summary.json").read_text())["pixels"]
    assert {name: asdict(looked.pixels)[name] for name in ("series", "read", "near_duplicates")}.items() <= written.items()


def test_index__takes_every_option_of_the_command() -> None:
    known = {*inspect.signature(api.index).parameters, *(field.name for field in fields(ScanOptions))}
    wanted = {ELSEWHERE.get(name, name) for name in inspect.signature(command).parameters} - {None}
    assert len(wanted) > 10 and wanted <= known


def test_index__limits_and_schedulers_are_checked(tmp_path: Path) -> None:
    write_scans(tmp_path / "src", range(1))
    with pytest.raises(RequestError, match="time limit"):
        medssl.index(tmp_path / "src", tmp_path / "out", options=ScanOptions(limit_s=0), pixels=True)
    with pytest.raises(RequestError, match="dask: "):
        medssl.index(tmp_path / "src", tmp_path / "out", dask="no-such-scheme://nowhere")
    assert not (tmp_path / "out").exists()
