"""TensorBoard's own reader must find what was written, and the file name must not say where."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from medssl.training.event_file import EventFile


def test_scalars__are_read_back_by_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventFile(tmp_path / "board")
    events.scalars(10, {"loss": 0.5, "lr": 1e-3})
    events.scalars(20, {"loss": 0.25})
    found = EventAccumulator(str(tmp_path / "board")).Reload()  # while the file is open: what was logged is on disk
    events.close()
    assert [(one.step, one.value) for one in found.Scalars("loss")] == [(10, 0.5), (20, 0.25)]
    assert [one.value for one in found.Scalars("lr")] == [pytest.approx(1e-3)]


def test_opening_again__is_another_file_of_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.directory_watcher import DirectoryWatcher
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.backend.event_processing.io_wrapper import IsTensorFlowEventsFile

    monkeypatch.setattr("medssl.training.event_file.time.time", lambda: 1_700_000_000.5)
    for step in (1, 2):
        events = EventFile(tmp_path)
        events.scalars(step, {"loss": 1.0})
        events.close()
    watcher = DirectoryWatcher(str(tmp_path), EventFileLoader, IsTensorFlowEventsFile)
    assert [event.step for event in watcher.Load() if event.HasField("summary")] == [1, 2]


def test_name__does_not_say_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "ris-of-one-hospital")
    EventFile(tmp_path).close()
    (path,) = tmp_path.iterdir()
    assert re.fullmatch(r"events\.out\.tfevents\.\d{10}", path.name)
    assert b"ris-of" not in path.read_bytes()
