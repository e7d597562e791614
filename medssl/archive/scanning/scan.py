"""Look at one file: what it is, its digest, its header. Pixels are not decoded.

`scan_batch` takes paths and returns plain rows, so that any `concurrent.futures.Executor` can run it. A DICOM file is opened
once and read twice: its first 64 KiB and its end.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar

from medssl.archive.headers.containers import SEPARATOR, copy_limited, in_memory, members, opened
from medssl.archive.headers.dicom_extras import read_extras, signs
from medssl.archive.headers.dicom_header import parse_header
from medssl.archive.headers.file_headers import (
    CONTAINER_KINDS,
    DICOM_KINDS,
    IMAGE_KINDS,
    VIDEO_KINDS,
    VOLUME_KINDS,
    read_volume_header,
    sniff,
)
from medssl.archive.headers.image_headers import read_image_header
from medssl.archive.headers.mosaic import mosaic_layout
from medssl.archive.headers.multiframe import describe_multiframe
from medssl.archive.headers.sidecars import KEYS as SIDECAR_KEYS
from medssl.archive.headers.slide_headers import companions, named_slide_header, slide_header
from medssl.archive.paths import to_path, to_text
from medssl.archive.rows.roles import modality_of
from medssl.errors import ImageError

Item = TypeVar("Item")
Found = TypeVar("Found")
HEAD_BYTES = 65536
"""Where the header of 95 of 100 DICOM files ends."""
TAIL_BYTES = 4096
WHOLE_BYTES = 64 << 20
"""Files that are not DICOM are hashed whole up to this size, larger ones at `SAMPLES` places."""
SAMPLES = 16
USABLE_FRAMES = 2
"""Whole frames that an ultrasound cine cut short must have: its domain uses them, see `prefix_only`."""
MAX_SIDECAR_BYTES = 1 << 20
SCAN_COLUMNS = {
    "part": "INTEGER",
    "path": "VARCHAR",
    "source_id": "BIGINT",
    "size": "BIGINT",
    "mtime_ns": "BIGINT",
    "kind": "VARCHAR",
    "reason": "VARCHAR",
    "digest": "VARCHAR",
    "group_key": "VARCHAR",
    "sop_id": "BIGINT",
    "header_id": "BIGINT",
    "header": "VARCHAR",
    "slice": "VARCHAR",
}
"""What one scanned file leaves in `private/scan`.

`kind` is `dicom`, `volume`, `image`, `sidecar` or `other`; `source_id` a hash of the path on disk; `group_key` is shared by files that may
be one series; `sop_id` a hash of the instance UID, null without one; `header` is JSON that slices of a series share (Parquet keeps it
once), `slice` JSON of what differs between them."""
SLICE_KEYS = frozenset(
    {
        "sop_instance_uid", "instance_number", "position", "acquisition_time", "content_time", "trigger_time", "acquisition_number",
        "temporal_position", "pixel_offset", "pixel_length", "file_bytes", "slope", "intercept", "exposure_mas", "exposure_uas",
        "cine_rate", "source_images",
    }
)  # fmt: skip
"""Header values that differ from slice to slice."""

TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR})
"""Errors of network storage that pass."""
PAUSES_S = (0.05, 0.5)
"""Waits before the second and third try."""
IO_REASONS = frozenset({"io_retry", "io_error", "timeout"})
"""Reasons that speak of the storage and not of the file."""
RETRIED = frozenset({*IO_REASONS, "permission", "vanished", "arriving", "worker_lost"})
"""Reasons that the next run looks at again."""

_OS_REASONS = {errno.ENOENT: "vanished", errno.ENOTDIR: "vanished", errno.EACCES: "permission", errno.EPERM: "permission"}


def os_reason(err: OSError) -> str:
    """Return the reason code for an error of the operating system."""
    if err.errno is None:  # a parser's, about what it found in the file
        return "unreadable"
    return "io_retry" if err.errno in TRANSIENT else _OS_REASONS.get(err.errno, "io_error")


def short_hash(text: str) -> int:
    """Return 63 bits of a hash: two of 20 million differ with a probability of 0.99998."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") >> 1


def blank_row(path: str, reason: str | None = None) -> dict[str, Any]:
    """Return a row of a file that was not opened."""
    row: dict[str, Any] = dict.fromkeys(SCAN_COLUMNS)
    row.update(
        path=to_text(path),
        source_id=short_hash(path),
        size=0,
        mtime_ns=0,
        kind="other",
        reason=reason,
        digest="",
        header="{}",
        slice="{}",
    )
    row["group_key"] = file_group(path)
    return row


def file_group(path: str) -> str:
    """Return the group of a file that is a series of its own: its sidecar's is the same."""
    name = PurePath(path).name.lower()
    end = sum(len(suffix) for suffix in PurePath(name).suffixes[-2:]) if name.endswith(".gz") else len(PurePath(name).suffix)
    return f"f{short_hash(path[: len(path) - end]):016x}"


def scan_file(path: str) -> list[dict[str, Any]]:
    """Return the rows of one file (`SCAN_COLUMNS` without `part`); every failure becomes a reason."""
    for pause in (*PAUSES_S, None):
        row = blank_row(path)
        try:
            return _scan(path, row)
        except ImageError as err:
            row["reason"] = err.reason
        except OSError as err:
            row["reason"] = os_reason(err)
            if row["reason"] == "io_retry" and pause is not None:
                time.sleep(pause)
                continue
        except Exception:  # a parser's bug on one odd file must not end the scan of an archive
            row["reason"] = "unreadable"
        return [_seal(row, {})]
    raise AssertionError("unreachable")


def file_digest(path: Path) -> str:
    """Return the digest by which a file is known in every index."""
    return str(scan_file(str(path))[0]["digest"])


_READ = {
    **dict.fromkeys(DICOM_KINDS, "dicom"),
    **dict.fromkeys(VOLUME_KINDS, "volume"),
    **dict.fromkeys((*IMAGE_KINDS, *VIDEO_KINDS), "image"),
}


def _scan_container(path: str, row: dict[str, Any], kind: str, *, nested: bool) -> list[dict[str, Any]]:
    """Return the row of a container and those of its members; a container inside a container stays closed."""
    if nested:
        row["reason"] = "unsupported_format"
        return [_seal(row, {})]
    row["reason"] = "container"
    rows = [_seal(row, {})]
    for member, stream in members(Path(path), kind):
        inner = blank_row(f"{path}{SEPARATOR}{member.name}", member.reason)
        inner["source_id"], inner["mtime_ns"] = row["source_id"], row["mtime_ns"]
        if stream is None:
            rows.append(_seal(inner, {}))
            continue
        with in_memory() as (target, name):
            inner["reason"] = copy_limited(stream, target)
            if inner["reason"] is not None:
                rows.append(_seal(inner, {}))
                continue
            for found in _scan_member(name, inner):
                found["mtime_ns"] = row["mtime_ns"]
                rows.append(found)
    if len(rows) == 2 and inner["reason"] == "unreadable" and (not member.name or kind not in ("zip", "tar")):
        return [_seal({**row, "reason": "unreadable"}, {})]  # nothing in it could be opened: one damaged file
    return rows


def _scan_member(name: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        return _scan(name, row, nested=True)
    except ImageError as err:
        row["reason"] = err.reason
    except Exception:  # as in `scan_file`
        row["reason"] = "unreadable"
    return [_seal(row, {})]


def _scan(path: str, row: dict[str, Any], *, nested: bool = False) -> list[dict[str, Any]]:
    with open(path, "rb", buffering=0) as handle:
        status = os.fstat(handle.fileno())
        row["size"], row["mtime_ns"] = status.st_size, status.st_mtime_ns
        head = handle.read(HEAD_BYTES)
        kind = sniff(head)
        slide = None if nested else named_slide_header(Path(path), head[:4096])
        if slide is not None:
            row["kind"] = "image"
            row["digest"] = _content_digest(handle, head, status.st_size).hexdigest()
            slide["data_files"] = [to_text(str(other)) for other in companions(Path(path))]
            return [_finish(row, slide)]
        if kind in CONTAINER_KINDS:
            return _scan_container(path, row, kind, nested=nested)
        if kind not in _READ:
            return [_seal(*_not_image(row, kind, head, handle))]
        row["kind"] = _READ[kind]
        if row["kind"] == "dicom":
            row["digest"] = _ends_digest(handle, head, status.st_size)
        else:
            row["digest"] = _content_digest(handle, head, status.st_size).hexdigest()
        try:
            if row["kind"] == "dicom":
                header = _dicom(handle, head, status.st_size)
                _look_inside(Path(path), kind, head, header)
            elif row["kind"] == "image":
                header = read_image_header(Path(path), kind)
            else:
                header = _volume(Path(path), kind, head)
        except ImageError as err:
            row["reason"] = err.reason
            return [_seal(row, {})]
    return [_finish(row, header)]


def _finish(row: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    row["reason"] = header.pop("file_reason", None)
    if header.get("data_files"):
        header["data_stats"] = [_stat(name) for name in header["data_files"]]
        row["digest"] = _digest_with(row["digest"], header["data_files"])
    return _seal(row, header)


def _seal(row: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    """Put the header into the row: what slices share apart from what they do not."""
    if row["kind"] == "dicom" and header:
        varying = {name: header.pop(name) for name in SLICE_KEYS if name in header}
        row["slice"] = json.dumps(varying, sort_keys=True)
        uid = varying.get("sop_instance_uid")
        row["sop_id"] = None if uid is None else short_hash(uid)
        folder = str(PurePath(row["path"]).parent)
        series = header.get("series_uid") or folder
        both = short_hash(" ".join((header.get("study_uid") or series, series)))
        row["group_key"] = f"d{both:016x}"
    row["header"] = json.dumps(header, sort_keys=True)
    row["header_id"] = short_hash(row["header"])
    return row


def _ends_digest(handle: Any, head: bytes, size: int) -> str:
    """Return a digest of a DICOM file's size, beginning and end: its header names the image."""
    digest = hashlib.blake2b(head, digest_size=20)
    if size > len(head):
        handle.seek(max(len(head), size - TAIL_BYTES))
        digest.update(handle.read(TAIL_BYTES))
    digest.update(size.to_bytes(8, "little"))
    return digest.hexdigest()


def _content_digest(handle: Any, head: bytes, size: int) -> Any:
    digest = hashlib.blake2b(head, digest_size=20)
    if size <= WHOLE_BYTES:
        while block := handle.read(1 << 20):
            digest.update(block)
        return digest
    for k in range(1, SAMPLES + 1):
        handle.seek(k * (size - HEAD_BYTES) // SAMPLES)
        digest.update(handle.read(HEAD_BYTES))
    digest.update(size.to_bytes(8, "little"))
    return digest


def whole_digest(path: str) -> str:
    """Return a digest of all bytes of a file, or an empty string when it cannot be read."""
    digest = hashlib.blake2b(digest_size=20)
    try:
        with _opened(path) as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    except (OSError, KeyError, ImageError):
        return ""
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Open a file, or a member of a container named `container!/name`."""
    if SEPARATOR not in path or os.path.exists(path):
        with open(path, "rb") as handle:
            yield handle
    else:
        with opened(path) as stream:
            yield stream


def _digest_with(first: str, names: list[str]) -> str:
    """Return a digest that also covers detached data files: two patients may share a header byte for byte."""
    digest = hashlib.blake2b(first.encode(), digest_size=20)
    for name in names:
        with open(to_path(name), "rb", buffering=0) as handle:
            digest.update(_content_digest(handle, handle.read(HEAD_BYTES), os.fstat(handle.fileno()).st_size).digest())
    return digest.hexdigest()


def _stat(path: str) -> list[int]:
    status = os.stat(to_path(path))
    return [status.st_size, status.st_mtime_ns]


def data_unchanged(header: str) -> bool:
    """Return whether the detached data files that a scanned header points to look as they did."""
    values = json.loads(header)
    try:
        return bool([_stat(name) for name in values["data_files"]] == values["data_stats"])
    except OSError:
        return False


def _not_image(row: dict[str, Any], kind: str, head: bytes, handle: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    row["reason"] = {"empty": "empty", "image": "unsupported_format"}.get(kind, "not_image")
    if kind == "sidecar" and row["path"].endswith(".json") and row["size"] <= MAX_SIDECAR_BYTES:
        try:
            values = json.loads(head + handle.readall())
        except ValueError:
            return row, {}
        if isinstance(values, dict) and "Modality" in values:
            row["kind"], row["reason"] = "sidecar", "sidecar"
            return row, {key: values[key] for key in SIDECAR_KEYS if key in values}
    return row, {}


def _dicom(handle: Any, head: bytes, size: int) -> dict[str, Any]:
    header = None
    if size > len(head):
        try:
            header = parse_header(io.BytesIO(head), size, partial=True)
        except ImageError:
            header = None
    if header is None:  # the file is small and all there, or its header is longer than the head
        if size <= len(head):
            header = parse_header(io.BytesIO(head), size)
        else:
            handle.seek(0)
            buffered = io.BufferedReader(handle, 1 << 20)
            try:
                header = parse_header(buffered, size)
            finally:
                buffered.detach()
    assert header is not None
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
        if header.get("photometric") == "YBR_FULL_422":  # two pixels share their colour
            expected = expected * 2 // 3
        there = min(header["pixel_length"], header["file_bytes"] - header["pixel_offset"])
        cine = modality_of(header) == "US" and frames > 1
        if there < expected and cine and there * frames // expected >= USABLE_FRAMES:
            header["prefix_only"] = True
        elif there < expected:
            header["file_reason"] = "truncated"
    return header


def _look_inside(path: Path, kind: str, head: bytes, header: dict[str, Any]) -> None:
    """Add what lies deeper: sequences, frames, mosaic tiles, the levels of a slide, and signs of private elements and overlays."""
    if header.get("file_reason") or "rows" not in header:
        return
    header.update(signs(head, header["syntax"], header["pixel_offset"]))
    if kind == "dicom_wsi":
        header["slide"] = slide_header(path, head[:4096])
        return
    modality = modality_of(header)
    header.update(read_extras(path, modality, head))
    if modality in ("CT", "MR"):
        if int(header.get("n_frames") or 1) > 1:
            parts = describe_multiframe(path)
            kept = (
                "echo_time",
                "b_value",
                "image_type",
                "position",
                "orientation",
                "pixel_spacing",
                "slope",
                "intercept",
                "rescale_type",
                "repetition_time",
                "inversion_time",
                "slice_thickness",
                "component",
            )
            header["parts"] = [
                {**part, "first": {name: part["first"][name] for name in kept if name in part["first"]}} for part in parts
            ]
        elif "MOSAIC" in header.get("image_type", ()):
            with contextlib.suppress(ImageError):  # the row says `mosaic` then
                header["mosaic"] = mosaic_layout(path)


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
        "data_files": [to_text(os.path.normpath(path.parent / name)) for name in found.data_files],
    }


def scan_batch(paths: Sequence[str], *, threads: int = 1, limit_s: float = 600.0) -> list[dict[str, Any]]:
    """Scan some files in threads that overlap waiting for storage.

    A file that takes longer than the limit (a hung mount) is left behind with the reason `timeout`, its thread with it.

    Args:
        paths: Files.
        threads: How many files are open together.
        limit_s: Seconds for one file.

    Returns:
        Rows of all files, in the order of `paths`.
    """
    if threads <= 1:
        return [row for path in paths for row in scan_file(path)]
    found = guarded(scan_file, paths, lambda path: [_seal(blank_row(path, "timeout"), {})], threads=threads, limit_s=limit_s)
    return [row for rows in found for row in rows]


def guarded(
    work: Callable[[Item], Found], items: Sequence[Item], late: Callable[[Item], Found], *, threads: int = 1, limit_s: float
) -> Iterator[Found]:
    """Do some work in threads, and leave behind what takes too long, its thread with it: waiting for a hung mount cannot be stopped.

    Args:
        work: Called with each item; what it raises is raised here.
        items: What there is to do.
        late: Called in place of the result for an item that was left behind.
        threads: Items under way together.
        limit_s: Seconds for one item.

    Returns:
        Results in the order of `items`.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, list[Found], BaseException | None]] = queue.SimpleQueue()
    for number in range(len(items)):
        todo.put(number)
    since: dict[int, float] = {}

    def run() -> None:
        while True:
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            since[number] = time.monotonic()
            try:
                done.put((number, [work(items[number])], None))
            except BaseException as err:
                done.put((number, [], err))

    def start() -> None:
        threading.Thread(target=run, daemon=True).start()  # a daemon, so that a hung one does not keep the process alive

    for _ in range(min(threads, len(items))):
        start()
    results: dict[int, Found] = {}
    while len(results) < len(items):
        try:
            number, found, err = done.get(timeout=min(1.0, limit_s))
            since.pop(number, None)
            if number not in results:
                if err is not None:
                    raise err
                results[number] = found[0]
        except queue.Empty:
            pass
        now = time.monotonic()
        for number in [n for n, t in list(since.items()) if now - t > limit_s]:
            since.pop(number)
            if number not in results:
                results[number] = late(items[number])
                start()
    yield from (results[number] for number in range(len(items)))
