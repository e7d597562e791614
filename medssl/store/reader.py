"""Read boxes and whole items from the store.

A reader holds a path, a cache of records, and per thread the frames it opened last. Every read decodes the chunks it
touches on the calling thread. It can be pickled, forked, and used from several threads at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import RequestError, StoreError
from medssl.store.manifest import PLANAR_CHUNKS, ItemRecord, checksum, item_paths, read_manifest
from medssl.types import ImageMeta, Sample

MAX_RECORDS = 8192
"""Records kept in memory, about 5 kB each."""

MAX_FRAMES = 16
"""Frames kept open per thread, a file descriptor each: opening costs a fifth of decoding a 64^3 patch."""


class StoreReader:
    """Random access to a store.

    Args:
        store: Store folder.

    Raises:
        StoreError: The folder holds no store.
    """

    def __init__(self, store: Path) -> None:
        self.store = Path(store)
        manifest = read_manifest(self.store)
        if manifest is None:
            raise StoreError(f"{self.store} holds no store (no manifest.json); run `medssl cache` first")
        self.manifest = manifest
        self.key: str = str(manifest.get("key"))
        self._records: dict[str, ItemRecord] = {}
        self._lock = threading.Lock()
        self._frames = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "manifest": self.manifest, "key": self.key}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._records = {}
        self._lock = threading.Lock()
        self._frames = threading.local()

    def series_ids(self) -> list[str]:
        """Return the ids of all complete items, sorted."""
        return sorted(path.stem for path in (self.store / "items").glob("[!.]*.json"))

    def __contains__(self, series_id: object) -> bool:
        return isinstance(series_id, str) and item_paths(self.store, series_id)[2].is_file()

    def record(self, series_id: str) -> ItemRecord:
        """Return what is known about an item.

        Raises:
            StoreError: There is no such item, or its record is damaged.
        """
        record = self._records.get(series_id)
        if record is None:
            try:
                record = ItemRecord.from_json(item_paths(self.store, series_id)[2].read_text())
            except FileNotFoundError as err:
                raise StoreError(f"series {series_id} is not in the store {self.store}; run `medssl cache` again") from err
            except (OSError, ValueError) as err:
                raise self._damaged(series_id, err) from err
            with self._lock:
                if len(self._records) >= MAX_RECORDS:
                    self._records.clear()
                self._records[series_id] = record
        return record

    def read_box(self, series_id: str, start: Sequence[int], size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Read a box, decoding only the chunks it touches.

        Args:
            series_id: Id of the item.
            start: First voxel along X, Y, Z of a volume, H, W of an image, T, H, W of a clip; may be negative.
            size: Voxels along the same axes; the box may reach beyond the item.

        Returns:
            Voxels (C, *size) in the stored dtype, 0 outside the item, and (*size) bool, True = real content. For a clip
            (T, C, H, W) and (T, H, W).

        Raises:
            StoreError: The item is missing or damaged.
        """
        record = self.record(series_id)
        if record.kind == "clip":
            return self._read_clip_box(record, start, size)
        low = [max(0, int(s)) for s in start]
        high = [min(n, int(s) + int(w)) for s, w, n in zip(start, size, record.shape)]
        extent = tuple(int(w) for w in size)
        if any(a >= b for a, b in zip(low, high)):
            return np.zeros((record.channels, *extent), dtype=record.dtype), np.zeros(extent, dtype=bool)
        voxels, mask, _ = item_paths(self.store, series_id)
        region = tuple(slice(a, b) for a, b in zip(low, high))
        inner = self._decode(voxels, (slice(0, record.channels), *region), series_id)
        inner_valid = self._decode(mask, (slice(0, 1), *region), series_id)[0] if record.has_valid else None
        if inner.shape[1:] == extent:
            return inner, np.ones(extent, dtype=bool) if inner_valid is None else inner_valid
        place = tuple(slice(a - int(s), b - int(s)) for a, b, s in zip(low, high, start))
        image = np.zeros((record.channels, *extent), dtype=record.dtype)
        image[(slice(None), *place)] = inner
        valid = np.zeros(extent, dtype=bool)
        valid[place] = True if inner_valid is None else inner_valid
        return image, valid

    def _read_clip_box(self, record: ItemRecord, start: Sequence[int], size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        first, top, left = (int(s) for s in start)
        n, height, width = (int(w) for w in size)
        low, high = max(0, first), min(record.shape[0], first + n)
        image = np.zeros((n, record.channels, height, width), dtype=record.dtype)
        valid = np.zeros((n, height, width), dtype=bool)
        if low < high:
            frames, seen = self.read_frames(record.series_id, range(low, high), (top, left), (height, width))
            image[low - first : high - first] = frames
            valid[low - first : high - first] = seen
        return image, valid

    def read_frames(
        self, series_id: str, frames: Sequence[int], start: Sequence[int] | None = None, size: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read chosen frames of a clip, for instance those of `domains.ultrasound.frames_at`, in the order given.

        Chunks hold several frames: each chunk that a wanted frame lies in is decoded once, where frames rise.

        Args:
            series_id: Id of the clip.
            frames: Frame numbers.
            start: (2,) first row and column; may be negative. None reads whole frames.
            size: (2,) rows and columns; may reach beyond the frame.

        Returns:
            (len(frames), C, *size) in the stored dtype, 0 outside, and (*size) bool, True = real content.

        Raises:
            RequestError: The item is no clip, or has no such frame.
            StoreError: The item is missing or damaged.
        """
        record = self.record(series_id)
        if record.kind != "clip":
            raise RequestError(f"series {series_id} is no clip but of the kind {record.kind}; use read_box")
        n_frames, *shape = record.shape
        if any(not 0 <= frame < n_frames for frame in frames):
            raise RequestError(f"series {series_id} has frames 0 to {n_frames - 1}; others were asked for")
        start = (0, 0) if start is None else start
        size = shape if size is None else size
        extent = tuple(int(w) for w in size)
        image = np.zeros((len(frames), record.channels, *extent), dtype=record.dtype)
        valid = np.zeros(extent, dtype=bool)
        low = [max(0, int(s)) for s in start]
        high = [min(n, int(s) + w) for s, w, n in zip(start, extent, shape)]
        if any(a >= b for a, b in zip(low, high)):
            return image, valid
        voxels, mask, _ = item_paths(self.store, series_id)
        region = tuple(slice(a, b) for a, b in zip(low, high))
        place = tuple(slice(a - int(s), b - int(s)) for a, b, s in zip(low, high, start))
        valid[place] = self._decode(mask, (slice(0, 1), *region), series_id)[0] if record.has_valid else True
        for places, wanted in _runs(frames):
            inner = self._decode(voxels, (slice(wanted[0], wanted[-1] + 1), slice(0, record.channels), *region), series_id)
            image[(places, slice(None), *place)] = inner if len(inner) == len(wanted) else inner[[f - wanted[0] for f in wanted]]
        return image, valid

    def read(self, series_id: str) -> Sample:
        """Read a whole item as the `Sample` that was written."""
        record = self.record(series_id)
        image, valid = self.read_box(series_id, (0,) * len(record.shape), record.shape)
        if record.kind == "clip":
            valid = valid[0]
        meta = ImageMeta(
            series_id=series_id,
            domain=record.domain,
            modality=record.modality,
            units=record.units,
            slice_axis=record.slice_axis,
            stats=dict(record.stats),
            flags=record.flags,
            kind=record.kind,
            frame_times_ms=record.frame_times_ms,
            channels=record.channel_names,
            facts=dict(record.facts),
        )
        return Sample(image, record.spacing_mm, record.affine, valid if record.has_valid else None, meta)

    def verify(self, series_id: str) -> None:
        """Compare the files of an item with its checksum.

        Raises:
            StoreError: They differ.
        """
        record = self.record(series_id)
        voxels, mask, _ = item_paths(self.store, series_id)
        try:
            found = checksum(voxels.read_bytes(), mask.read_bytes() if record.has_valid else b"")
        except OSError as err:
            raise self._damaged(series_id, err) from err
        if found != record.checksum:
            raise self._damaged(series_id)

    def _decode(self, path: Path, region: tuple[slice, ...], series_id: str) -> np.ndarray:
        try:
            array: np.ndarray = self._frame(path)[region]
        except Exception as err:  # blosc2 raises RuntimeError, OSError, ValueError for damaged frames
            raise self._damaged(series_id, err) from err
        return array

    def _frame(self, path: Path) -> Any:
        """Return an open frame of this thread; a replaced file and a forked process open their own."""
        import blosc2

        frames: dict[tuple[Any, ...], Any] = self._frames.__dict__.setdefault("opened", {})
        found = os.stat(path)
        key = (os.getpid(), str(path), found.st_ino, found.st_mtime_ns, found.st_size)
        if key not in frames:
            if len(frames) >= MAX_FRAMES:
                frames.clear()
            frames[key] = blosc2.open(str(path), mode="r", dparams={"nthreads": 1})
        return frames[key]

    def _damaged(self, series_id: str, err: Exception | None = None) -> StoreError:
        if isinstance(err, OSError) and err.errno is not None:  # of the file system; blosc2's own errors have no number
            return StoreError(
                f"series {series_id} cannot be read from the store {self.store} ({err.strerror}); see whether the store was moved or its "
                f"disk is away; if its files are lost, delete items/{series_id}.json there and run `medssl cache` again: the other items "
                "stay valid"
            )
        return StoreError(
            f"series {series_id} is damaged in the store {self.store}; delete items/{series_id}.json there and run "
            "`medssl cache` again: the other items stay valid"
        )


def _runs(frames: Sequence[int]) -> Iterator[tuple[slice, list[int]]]:
    """Yield (places, frame numbers): runs of rising frames that leave out no whole chunk between two of them."""
    chunk = PLANAR_CHUNKS["clip"][0]
    begun = 0
    for place in range(1, len(frames) + 1):
        ends = (
            place == len(frames) or not frames[place - 1] < frames[place] or frames[place] // chunk > frames[place - 1] // chunk + 1
        )
        if ends:
            yield slice(begun, place), [int(frame) for frame in frames[begun:place]]
            begun = place
