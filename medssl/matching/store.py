"""Embeddings on disk, beside the volumes they are made of: compact, atomic, resumable, no pickle.

Layout of a folder, mode 0700 (`STORE/embeddings/<weights hash>-<step>`):

    manifest.json               what every embedding in it was made with: `EmbeddingManifest`
    <series_id>.b2nd            fine map (X, Y, Z, E) int8, Blosc2, 0 outside the body
    <series_id>.coarse.b2nd     coarse map
    <series_id>.json            lattices, scales, the version of the volume; written last

What was made with other weights, another spacing or step, or of other voxels counts as missing, and whoever asks is told why.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import RequestError, StoreError
from medssl.matching.cells import CellMap, VolumeEmbedding
from medssl.weights import process_lives, write_private

FORMAT = 1
FOLDER = "embeddings"
MANIFEST = "manifest.json"
CHUNK = 32
"""Cells along an edge of a chunk: 2 MB at 64 channels."""
AGAIN = "run `medssl embed` with these weights again"


@dataclass(frozen=True)
class EmbeddingManifest:
    """What decides the bytes of an embedding.

    Args:
        weights_hash: Hash over the weights of encoder and maps.
        spacing_mm: Spacing that the matcher was trained at.
        step_mm: Between cells of the fine map, mm along each axis.
        coarse_step_mm: Likewise, coarse.
        channels: E.
        quantisation: `int8, one scale per volume and map`.
        preprocessing: Hash over normalisation, tiles and the store's key.
        store_key: Key of the store that the volumes come from; empty for files.
        format: Of the folder.
    """

    weights_hash: str
    spacing_mm: tuple[float, ...]
    step_mm: tuple[float, ...]
    coarse_step_mm: tuple[float, ...]
    channels: int
    preprocessing: str
    store_key: str = ""
    quantisation: str = "int8, one scale per volume and map"
    format: int = FORMAT

    @property
    def key(self) -> str:
        """Hash over everything."""
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=8).hexdigest()

    @property
    def folder(self) -> str:
        """Name of the folder: weights and step."""
        return f"{self.weights_hash}-{_mm(self.step_mm)}mm"


def _mm(values: Sequence[float]) -> str:
    return "x".join(f"{v:g}" for v in (values if len(set(values)) > 1 else values[:1]))


def read_manifest(folder: Path) -> EmbeddingManifest | None:
    """Return what a folder's embeddings were made with; None where there is no manifest.

    Raises:
        StoreError: There is one that cannot be read.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text())
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
        return EmbeddingManifest(**values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as err:
        raise StoreError(f"{path} cannot be read ({type(err).__name__}); delete the folder {folder} and {AGAIN}") from err


def open_folder(root: Path, wanted: EmbeddingManifest) -> Path:
    """Make the folder of embeddings, or check that it holds these.

    Args:
        root: Store folder.
        wanted: What is about to be written.

    Raises:
        RequestError: The folder holds others of the same weights and step.
    """
    folder = root / FOLDER / wanted.folder
    found = read_manifest(folder)
    if found is None:
        write_private(folder / MANIFEST, (json.dumps(asdict(wanted), indent=1, sort_keys=True) + "\n").encode())
    elif found != wanted:
        raise RequestError(f"{folder} holds embeddings with {_difference(found, wanted)}; delete the folder and {AGAIN}")
    for stray in folder.glob(".*.tmp"):
        owner = stray.name.split(".")[-2]
        if not (owner.isdigit() and process_lives(int(owner))):
            stray.unlink(missing_ok=True)
    return folder


def _difference(found: EmbeddingManifest, wanted: EmbeddingManifest) -> str:
    words = {
        "weights_hash": "weights",
        "spacing_mm": "spacing_mm",
        "step_mm": "step_mm",
        "coarse_step_mm": "coarse step_mm",
        "store_key": "store key",
        "preprocessing": "preprocessing",
    }
    have, need = asdict(found), asdict(wanted)
    parts = [
        f"{words.get(name, name)} {_text(have[name])} where {_text(need[name])} is wanted"
        for name in need
        if have[name] != need[name]
    ]
    return ", ".join(parts)


def _text(value: Any) -> str:
    return _mm(value) if isinstance(value, tuple) else str(value)


def find_folder(root: Path, wanted: EmbeddingManifest) -> Path:
    """Return the folder of embeddings that a matcher can use.

    Raises:
        RequestError: There is none; the message says what is there instead.
    """
    folder = root / FOLDER / wanted.folder
    found = read_manifest(folder)
    if found == wanted:
        return folder
    if found is not None:
        raise RequestError(f"the embeddings in {folder} were made with {_difference(found, wanted)}; {AGAIN}")
    others = [other for path in sorted((root / FOLDER).glob("*")) if (other := read_manifest(path)) is not None]
    if not others:
        raise RequestError(f"{root} holds no embeddings; {AGAIN}")
    nearest = min(others, key=lambda other: sum(asdict(other)[name] != value for name, value in asdict(wanted).items()))
    raise RequestError(f"the embeddings in {root / FOLDER} were made with {_difference(nearest, wanted)}; {AGAIN}")


def write_embedding(folder: Path, series_id: str, embedding: VolumeEmbedding, version: str) -> int:
    """Write one embedding; the record comes last, so that whatever stops the writing leaves complete embeddings only.

    Args:
        folder: From `open_folder`.
        series_id: Its volume.
        embedding: The maps.
        version: Version of the volume (`ItemRecord.checksum`).

    Returns:
        Bytes on disk.

    Raises:
        StoreError: The disk is full or failing; what was written before is complete.
    """
    record: dict[str, Any] = {"format": FORMAT, "series_id": series_id, "version": version, "n_bytes": 0}
    (folder / f"{series_id}.json").unlink(missing_ok=True)  # no record may ever describe other maps
    for name, cells, path in _levels(folder, series_id, embedding):
        data = _compress(cells.vectors)
        write_private(path, data)
        record["n_bytes"] += len(data)
        record[name] = {"origin_mm": cells.origin_mm.tolist(), "step_mm": cells.step_mm.tolist()}
    write_private(folder / f"{series_id}.json", (json.dumps(record, sort_keys=True) + "\n").encode())
    return int(record["n_bytes"])


def _levels(folder: Path, series_id: str, embedding: VolumeEmbedding) -> list[tuple[str, CellMap, Path]]:
    fine, coarse = _paths(folder, series_id)
    return [("fine", embedding.fine, fine), ("coarse", embedding.coarse, coarse)]


def _paths(folder: Path, series_id: str) -> tuple[Path, Path]:
    return folder / f"{series_id}.b2nd", folder / f"{series_id}.coarse.b2nd"


def _compress(vectors: np.ndarray) -> bytes:
    import blosc2

    chunks = (*(min(CHUNK, n) for n in vectors.shape[:3]), vectors.shape[3])
    params = {"codec": blosc2.Codec.ZSTD, "clevel": 1, "nthreads": 1, "filters": [blosc2.Filter.NOFILTER]}
    frame = blosc2.asarray(np.ascontiguousarray(vectors), chunks=chunks, cparams=params, contiguous=True)
    return bytes(frame.to_cframe())


class EmbeddingReader:
    """Reads the embeddings of one folder, and keeps some in memory.

    Args:
        folder: From `find_folder` or `open_folder`.
        memory_mb: Decoded embeddings kept, in MB.
    """

    def __init__(self, folder: Path, memory_mb: float = 1024) -> None:
        self.folder, self.memory_mb = Path(folder), float(memory_mb)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise RequestError(f"{self.folder} holds no embeddings (no {MANIFEST}); {AGAIN}")
        self.manifest = manifest
        self._fresh()

    def _fresh(self) -> None:
        self._kept: OrderedDict[str, VolumeEmbedding] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "memory_mb": self.memory_mb, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()

    def record(self, series_id: str) -> dict[str, Any] | None:
        """Return the record of a complete embedding, or None."""
        try:
            found: dict[str, Any] = json.loads((self.folder / f"{series_id}.json").read_text())
            size = sum(path.stat().st_size for path in _paths(self.folder, series_id))
        except (OSError, ValueError):
            return None
        return found if found.get("n_bytes") == size else None

    def usable(self, series_id: str, version: str) -> bool:
        """Return whether there is a complete embedding of this version of a volume."""
        found = self.record(series_id)
        return found is not None and found["version"] == version

    def require(self, versions: dict[str, str]) -> None:
        """Raise unless all volumes have embeddings of their present voxels.

        Args:
            versions: series_id -> version.

        Raises:
            RequestError: With how many lack theirs, how many are stale, and the first.
        """
        records = {series: self.record(series) for series in versions}
        absent = [series for series, record in records.items() if record is None]
        stale = [series for series, record in records.items() if record is not None and record["version"] != versions[series]]
        if absent or stale:
            raise RequestError(
                f"of {len(versions)} volumes {len(absent)} have no embedding and {len(stale)} one of older voxels (first: series "
                f"{(absent or stale)[0]}); {AGAIN}: it writes what is missing or stale and nothing else"
            )

    def read(self, series_id: str) -> VolumeEmbedding:
        """Return an embedding.

        Raises:
            RequestError: There is none.
            StoreError: It is damaged.
        """
        with self._lock:
            if series_id in self._kept:
                self._kept.move_to_end(series_id)
                return self._kept[series_id]
        record = self.record(series_id)
        if record is None:
            raise RequestError(f"series {series_id} has no embedding in {self.folder}; {AGAIN}")
        maps = [
            CellMap(self._decode(path, series_id), np.asarray(record[name]["origin_mm"]), np.asarray(record[name]["step_mm"]))
            for name, path in zip(("fine", "coarse"), _paths(self.folder, series_id))
        ]
        embedding = VolumeEmbedding(maps[0], maps[1], self.manifest.key, series_id)
        with self._lock:
            self._kept[series_id] = embedding
            self._bytes += embedding.n_bytes
            while self._bytes > self.memory_mb * 1e6 and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].n_bytes
        return embedding

    def read_box(self, series_id: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """Return a box of the fine map, (X, Y, Z, E) int8, decoding only the chunks it touches; cut off at the edges of the map."""
        box = tuple(slice(max(0, int(s)), max(0, int(s) + int(n))) for s, n in zip(start, size))
        return self._decode(_paths(self.folder, series_id)[0], series_id, box)

    def _decode(self, path: Path, series_id: str, box: tuple[slice, ...] = (slice(None),) * 3) -> np.ndarray:
        import blosc2

        try:
            array: np.ndarray = blosc2.open(str(path), mode="r", dparams={"nthreads": 1})[(*box, slice(None))]
        except Exception as err:  # blosc2 raises RuntimeError, OSError, ValueError for damaged frames
            raise StoreError(
                f"the embedding of series {series_id} in {self.folder} is damaged; delete {series_id}.json there and {AGAIN}"
            ) from err
        return array
