"""Scalars for TensorBoard in a file whose name says nothing about the machine.

TensorBoard's own writers put the host name into the file name, and a host name may say which hospital or person a run is of.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from medssl.weights import disk_error


class EventFile:
    """Write `events.out.tfevents.<seconds>[.<number>]` in a folder; one file per opening, as TensorBoard expects it.

    Args:
        folder: Made when missing.

    Raises:
        StoreError: The file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path = _free(folder, int(time.time()))
            self._records = RecordWriter(self.path.open("xb"))  # closed by close()
        except OSError as err:
            raise disk_error(err, folder) from err
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add values of one step; they are on disk when this returns."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        parts = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=parts)))

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _write(self, event: object) -> None:
        try:
            self._records.write(event.SerializeToString())  # type: ignore[attr-defined]
            self._records.flush()
        except OSError as err:
            raise disk_error(err, self.path) from err


def _free(folder: Path, seconds: int) -> Path:
    name, number = folder / f"events.out.tfevents.{seconds:010d}", 0
    path = name
    while path.exists():  # a run resumed within a second
        number += 1
        path = name.with_name(f"{name.name}.{number}")
    return path
