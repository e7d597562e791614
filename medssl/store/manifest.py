"""What the store says about itself and about each item.

Layout of a store folder (mode 0700, files 0600):

    manifest.json                 format, key, domain with every parameter, codec
    items/<series_id>.b2nd        voxels (C, X, Y, Z), Blosc2
    items/<series_id>.valid.b2nd  (X, Y, Z) bool, only where not everything is valid
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

from medssl.errors import StoreError

FORMAT = 1
"""Raised when other bytes would be written for the same item."""
CHUNK, BLOCK, CLEVEL = 64, 32, 1
"""Edge lengths in voxels and zstd level: 433 random 96^3 crops/s at a third of the raw size (ENVIRONMENT.md, table
4c)."""
MANIFEST = "manifest.json"


def describe(domain: Any) -> dict[str, Any]:
    """Return everything that decides which bytes a domain's items have: `manifest.json` without the key."""
    return {
        "format": FORMAT,
        "domain": {"name": domain.name, "version": domain.version, "params": dict(domain.params())},
        "axis_order": "XYZ-RAS",
        "codec": {"name": "blosc2-zstd", "clevel": CLEVEL, "chunk": CHUNK, "block": BLOCK},
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
        shape: (X, Y, Z) in voxels.
        spacing_mm: Voxel edges along X, Y, Z in mm.
        affine: (4, 4) float64, voxel centre index to RAS+ mm.
        dtype: `uint8`, `int16` or `float32`.
        stats: Foreground statistics (see `types.ImageMeta`).
        slice_axis: Array axis along which slices lay, or None.
        flags: Quality flags.
        foreground: (K, 3) uint16 voxel indices inside the foreground, K at most 512.
        has_valid: Whether a mask of valid voxels is stored beside the voxels.
        checksum: Hash over the bytes of the voxel file and of the mask file.
        n_bytes: Bytes on disk of both.
        domain: Domain name.
        modality: `CT`, `MR` or `unknown`.
        units: `HU` or `arbitrary`.
        source: Keyed hash of the source files' digests: another value means that the files have changed.
    """

    series_id: str
    patient_id: str
    channels: int
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray
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
    format: int = field(default=FORMAT)

    def to_json(self) -> str:
        """Return the text of `items/<series_id>.json`."""
        values = asdict(self)
        values["affine"] = self.affine.tolist()
        values["foreground"] = self.foreground.tolist()
        return json.dumps(values, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ItemRecord:
        """Return the record that `to_json` wrote.

        Raises:
            ValueError: The text is not one.
        """
        values = json.loads(text)
        try:
            for name in ("shape", "spacing_mm", "flags"):
                values[name] = tuple(values[name])
            values["affine"] = np.array(values["affine"], dtype=np.float64)
            values["foreground"] = np.array(values["foreground"], dtype=np.uint16).reshape(-1, 3)
            return cls(**values)
        except (KeyError, TypeError) as err:
            raise ValueError(f"not an item record: {err}") from err


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
