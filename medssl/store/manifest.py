"""What the store says about itself and about each item.

Layout of a store folder (mode 0700, files 0600):

    manifest.json                 format, key, domain with every parameter, codec
    items/<series_id>.b2nd        voxels (C, X, Y, Z), pixels (C, H, W) or frames (T, C, H, W), Blosc2
    items/<series_id>.valid.b2nd  (1, X, Y, Z) or (1, H, W) bool, only where not everything is valid
    items/<series_id>.json        `ItemRecord`; written last, so an item without it does not exist
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import RequestError, StoreError
from medssl.types import Kind

FORMAT = 1
"""Raised when other bytes would be written for the same item."""
CHUNK, BLOCK, CLEVEL = 64, 32, 1
"""Edge lengths in voxels and zstd level: 433 random 96^3 crops/s at a third of the raw size (ENVIRONMENT.md, table
4c)."""
PLANAR_CHUNKS: dict[str, tuple[int, ...]] = {"image": (4, 512, 512), "clip": (16, 4, 128, 128)}
PLANAR_BLOCKS: dict[str, tuple[int, ...]] = {"image": (4, 64, 64), "clip": (8, 4, 64, 64)}
"""Largest chunk and block of (C, H, W) and (T, C, H, W).

Measured on a 16-bit radiograph, an RGB smear and a 323-frame lung clip, zstd 1: blocks of 64 read 224-pixel crops 1.1 to 1.5
times as fast as blocks of 128, at the same size or 1 % less. Eight frames to a block make a clip 0.21 of its raw size, single
frames 0.34; 16 frames of 112 pixels read 1.4 times as fast as from blocks of 16 frames.
"""
MANIFEST = "manifest.json"


def describe(domain: Any) -> dict[str, Any]:
    """Return everything that decides which bytes a domain's items have: `manifest.json` without the key.

    A domain whose `kinds` lists what it delivers, `image` or `clip`, is described by the layout of these.
    """
    kinds = [kind for kind in getattr(domain, "kinds", ()) if kind != "volume"]
    chunk: Any = {kind: list(PLANAR_CHUNKS[kind]) for kind in kinds} or CHUNK
    block: Any = {kind: list(PLANAR_BLOCKS[kind]) for kind in kinds} or BLOCK
    return {
        "format": FORMAT,
        "domain": {"name": domain.name, "version": domain.version, "params": dict(domain.params())},
        "axis_order": "TCHW" if "clip" in kinds else ("CHW" if kinds else "XYZ-RAS"),
        "codec": {"name": "blosc2-zstd", "clevel": CLEVEL, "chunk": chunk, "block": block},
    }


def store_key(domain: Any) -> str:
    """Return 16 hex digits over domain name, version, parameters and store format: same key, same bytes."""
    text = json.dumps(describe(domain), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class ItemRecord:
    """One item of the store.

    Args:
        series_id: Pseudonymous id of the series.
        patient_id: Pseudonymous id of the patient.
        channels: C.
        shape: (X, Y, Z) in voxels; (H, W) of an image, (T, H, W) of a clip.
        spacing_mm: Voxel edges along X, Y, Z in mm; steps between rows and between columns of images and clips, or None.
        affine: (4, 4) float64, voxel centre index to RAS+ mm; None for images and clips.
        dtype: `uint8`, `int16`, `uint16` or `float32`.
        stats: Foreground statistics (see `types.ImageMeta`).
        slice_axis: Array axis along which slices lay, or None.
        flags: Quality flags.
        foreground: (K, 3) uint16 voxel indices inside the foreground, (K, 2) for images and clips, K at most 512.
        has_valid: Whether a mask of valid voxels is stored beside the voxels.
        checksum: Hash over the bytes of the voxel file and of the mask file.
        n_bytes: Bytes on disk of both.
        domain: Domain name.
        modality: DICOM modality of those that the domain takes, or `unknown`.
        units: `HU` or `arbitrary`.
        source: Keyed hash of the source files' digests and times: another value means that the files may have changed.
        kind: `volume`, `image` or `clip`.
        frame_times_ms: See `types.ImageMeta`.
        channel_names: Likewise, its `channels`.
        facts: Likewise.
    """

    series_id: str
    patient_id: str
    channels: int
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None
    affine: np.ndarray | None
    dtype: str
    stats: Mapping[str, float]
    slice_axis: int | None
    flags: tuple[str, ...]
    foreground: np.ndarray
    has_valid: bool
    checksum: str
    n_bytes: int
    domain: str = "mri"
    modality: str = "unknown"
    units: str = "arbitrary"
    source: str = ""
    kind: Kind = "volume"
    frame_times_ms: tuple[float, ...] | None = None
    channel_names: tuple[str, ...] = ()
    facts: Mapping[str, str | float | bool] = field(default_factory=dict)
    format: int = field(default=FORMAT)

    @property
    def voxel_mm(self) -> tuple[float, ...]:
        """`spacing_mm`, for what needs millimetres.

        Raises:
            RequestError: The item has none; nothing is assumed.
        """
        if self.spacing_mm is None:
            raise RequestError(f"series {self.series_id} has no spacing and millimetres are needed; leave it out of the query")
        return self.spacing_mm

    def to_json(self) -> str:
        """Return the text of `items/<series_id>.json`."""
        values = asdict(self)
        values["affine"] = None if self.affine is None else self.affine.tolist()
        values["foreground"] = self.foreground.tolist()
        for name, default in _LATER.items():  # absent unless said, as in items written before there were images
            if values[name] == default:
                del values[name]
        return json.dumps(values, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ItemRecord:
        """Return the record that `to_json` wrote.

        Raises:
            ValueError: The text is not one.
        """
        values = json.loads(text)
        try:
            for name in ("shape", "spacing_mm", "flags", "frame_times_ms", "channel_names"):
                if values.get(name) is not None:
                    values[name] = tuple(values[name])
            if values["affine"] is not None:
                values["affine"] = np.array(values["affine"], dtype=np.float64)
            axes = 3 if values.get("kind", "volume") == "volume" else 2
            values["foreground"] = np.array(values["foreground"], dtype=np.uint16).reshape(-1, axes)
            return cls(**values)
        except (KeyError, TypeError) as err:
            raise ValueError(f"not an item record: {err}") from err


_LATER: dict[str, Any] = {"kind": "volume", "frame_times_ms": None, "channel_names": (), "facts": {}}


def item_paths(store: Path, series_id: str) -> tuple[Path, Path, Path]:
    """Return the paths of voxels, mask and record of an item."""
    items = store / "items"
    return items / f"{series_id}.b2nd", items / f"{series_id}.valid.b2nd", items / f"{series_id}.json"


def read_manifest(store: Path) -> dict[str, Any] | None:
    """Return the content of the manifest, or None when the folder has none.

    Raises:
        StoreError: There is one that cannot be read.
    """
    path = store / MANIFEST
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:
        raise StoreError(
            f"{path} cannot be read ({type(err).__name__}); delete the folder {store} and cache again, or restore the file"
        ) from err
    return dict(values)


def checksum(*parts: bytes) -> str:
    """Return the hash that `ItemRecord.checksum` holds."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
