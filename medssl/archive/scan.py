"""Look at one file: what it is, its digest, its header. Pixels are not decoded.

`scan_file` takes a path and returns plain values, so that any `concurrent.futures.Executor` can run it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from medssl.archive.dicom_header import read_header
from medssl.archive.file_headers import HEAD_BYTES, read_volume_header, sniff
from medssl.errors import ImageError

MAX_SIDECAR_BYTES = 1 << 20
SIDECAR_KEYS = ("Modality", "Manufacturer", "MagneticFieldStrength", "SeriesDescription")
SCAN_COLUMNS = {
    "path": "VARCHAR",
    "size": "BIGINT",
    "mtime_ns": "BIGINT",
    "kind": "VARCHAR",
    "reason": "VARCHAR",
    "digest": "VARCHAR",
    "header": "VARCHAR",
}
"""What one scanned file leaves in `private/scan`: path, size and time of change, kind (`dicom`, `volume`, `sidecar`,
`other`), reason code
or null, digest of its bytes, header as JSON."""

_OS_REASONS = {errno.ENOENT: "vanished", errno.ENOTDIR: "vanished", errno.EACCES: "permission", errno.EPERM: "permission"}


def os_reason(err: OSError) -> str:
    """Return the reason code for an error of the operating system."""
    return _OS_REASONS.get(err.errno or 0, "io_error")


def scan_file(path: str) -> dict[str, Any]:
    """Return one row of `SCAN_COLUMNS`; every failure becomes a reason."""
    row: dict[str, Any] = {"path": path, "size": 0, "mtime_ns": 0, "kind": "other", "reason": None, "digest": "", "header": "{}"}
    try:
        with open(path, "rb") as handle:
            status = os.fstat(handle.fileno())
            row["size"], row["mtime_ns"] = status.st_size, status.st_mtime_ns
            head = handle.read(HEAD_BYTES)
            kind = sniff(head)
            if kind in ("empty", "image", "gzip", "other"):
                return _not_volume(row, kind, head, handle)
            digest = hashlib.blake2b(head, digest_size=20)
            while block := handle.read(1 << 20):
                digest.update(block)
            row["digest"] = digest.hexdigest()
        row["kind"] = "dicom" if kind == "dicom" else "volume"
        header = _dicom(Path(path)) if kind == "dicom" else _volume(Path(path), kind, head)
        row["reason"] = header.pop("file_reason", None)
        if header.get("data_files"):
            header["data_stats"] = [_stat(name) for name in header["data_files"]]
            row["digest"] = _digest_with(digest, header["data_files"])
        row["header"] = json.dumps(header)
    except ImageError as err:
        row["reason"] = err.reason
    except OSError as err:
        row["reason"] = os_reason(err)
    except Exception:  # a parser's bug on one odd file must not end the scan of an archive
        row["reason"] = "unreadable"
    return row


def _stat(path: str) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def _digest_with(digest: Any, names: list[str]) -> str:
    """Return a digest that also covers detached data files: two patients may share a header byte for byte."""
    for name in names:
        with open(name, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return str(digest.hexdigest())


def unchanged(row: dict[str, Any], size: int, mtime_ns: int) -> bool:
    """Return whether a scanned file, and the data files it points to, look as they did."""
    if row["size"] != size or row["mtime_ns"] != mtime_ns or row["reason"] in ("permission", "io_error", "vanished"):
        return False
    if '"data_stats"' not in row["header"]:
        return True
    header = json.loads(row["header"])
    try:
        return bool([_stat(name) for name in header["data_files"]] == header["data_stats"])
    except OSError:
        return False


def _not_volume(row: dict[str, Any], kind: str, head: bytes, handle: Any) -> dict[str, Any]:
    row["reason"] = {"empty": "empty", "image": "unsupported_format", "gzip": "unsupported_format"}.get(kind, "not_image")
    if head[:1] == b"{" and row["path"].endswith(".json") and row["size"] <= MAX_SIDECAR_BYTES:
        try:
            values = json.loads(head + handle.read())
        except ValueError:
            return row
        if isinstance(values, dict) and "Modality" in values:
            row["kind"], row["reason"] = "sidecar", "sidecar"
            row["header"] = json.dumps({key: values[key] for key in SIDECAR_KEYS if key in values})
    return row


def _dicom(path: Path) -> dict[str, Any]:
    header = read_header(path)
    if header.get("sop_class_uid") is None and header.get("modality") is None and "rows" not in header:
        raise ImageError("not_image", "no DICOM object")
    if "rows" not in header or "columns" not in header:
        header["file_reason"] = "not_image"
        return header
    if header["pixel_offset"] is None and header["syntax"] != "1.2.840.10008.1.2.1.99":
        # A float or double pixel element, or none at all where rows promise some.
        header["file_reason"] = "truncated" if header.get("samples_per_pixel") else "not_image"
        return header
    if header["pixel_length"] is not None:
        bits = int(header.get("bits_allocated") or 0) * int(header.get("samples_per_pixel") or 1)
        frames = int(header.get("n_frames") or 1)
        expected = (int(header["rows"]) * int(header["columns"]) * frames * bits + 7) // 8
        if min(header["pixel_length"], header["file_bytes"] - header["pixel_offset"]) < expected:
            header["file_reason"] = "truncated"
    return header


def _volume(path: Path, kind: str, head: bytes) -> dict[str, Any]:
    found = read_volume_header(path, kind, head)
    return {
        "format": found.format,
        "shape": list(found.shape),
        "dtype": found.dtype,
        "affine": None if found.affine is None else found.affine.tolist(),
        "slice_axis": found.slice_axis,
        "flags": list(found.flags),
        "reason": found.reason,
        "data_files": [os.path.normpath(path.parent / name) for name in found.data_files],
    }
