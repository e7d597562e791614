"""Write canonical volumes, images and clips into the store: lossless, atomic, one item at a time.

An item exists once its record does. The record is renamed into place last, after voxels and mask are on disk, so that
whatever stops the writing (full disk, SIGKILL) leaves complete items and at most a stray temporary file, which the
next run removes.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from medssl.domains.statistics import foreground, foreground_points
from medssl.errors import ImageError, RequestError, StoreError
from medssl.store.manifest import (
    BLOCK,
    CHUNK,
    CLEVEL,
    MANIFEST,
    PLANAR_BLOCKS,
    PLANAR_CHUNKS,
    ItemRecord,
    checksum,
    describe,
    item_paths,
    read_manifest,
    store_key,
)
from medssl.types import Kind, Sample
from medssl.weights import process_lives

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEMPORARY = ".tmp-"
MAX_POINTS = 512
DIFFERENCES_ABOVE = 0.5


class Row(Protocol):
    """What the writer needs of a row of the index (`archive.table.SeriesRow`)."""

    @property
    def series_id(self) -> str:
        """Pseudonymous series."""
        ...

    @property
    def patient_id(self) -> str:
        """Pseudonymous patient."""
        ...


class Files(Protocol):
    """What the writer needs of an archive (`archive.table.Archive`)."""

    def files(self, series_id: str) -> list[Path]:
        """Return the source files of a series."""
        ...

    def source_tag(self, series_id: str) -> str:
        """Return a keyed hash of the files' digests and times of change."""
        ...

    def part(self, series_id: str) -> dict[str, Any] | None:
        """Return what of its files a series is, or None for all of it."""
        ...


@dataclass
class CacheSummary:
    """What `cache_items` did.

    Args:
        written: Items written now.
        present: Items that were there already.
        failed: series_id -> (reason code, message).
        n_bytes: Bytes on disk of all items asked for.
        n_raw_bytes: Bytes of their voxels uncompressed.
    """

    written: int = 0
    present: int = 0
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)
    n_bytes: int = 0
    n_raw_bytes: int = 0


def cache_items(
    archive: Files,
    rows: Sequence[Row],
    domain: Any,
    store: Path,
    *,
    executor: Executor | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CacheSummary:
    """Write the items of these rows that the store lacks.

    A series that cannot be read is recorded with its reason and the rest goes on. An item whose source files have
    changed is written again.

    Args:
        archive: Where the files are.
        rows: Rows of its index.
        domain: The domain that reads them.
        store: Folder; made when absent. One store holds one domain with one set of parameters.
        executor: Where items are read and written; None does it here, one after the other.
        on_progress: Called with (done, total) after each item.

    Raises:
        RequestError: The folder holds another store, or cannot be written.
        StoreError: The disk is full or failing; the message says what is safe.
    """
    _open_store(store, domain)
    summary = CacheSummary()
    done = 0
    jobs: list[tuple[Row, str]] = []
    unique = {row.series_id: row for row in rows}
    for row in unique.values():
        tag = archive.source_tag(row.series_id)
        record = _present(store, row.series_id, tag)
        if record is None:
            jobs.append((row, tag))
            continue
        summary.present += 1
        _count(summary, record)
    done = summary.present
    total = len(unique)
    if on_progress is not None:
        on_progress(done, total)
    for row, outcome in _results(archive, jobs, domain, store, executor):
        if isinstance(outcome, ItemRecord):
            summary.written += 1
            _count(summary, outcome)
        else:
            summary.failed[row.series_id] = outcome
            logger.warning("not cached: %s (%s)", outcome[1], outcome[0])
        done += 1
        if on_progress is not None:
            on_progress(done, total)
    return summary


def _count(summary: CacheSummary, record: ItemRecord) -> None:
    summary.n_bytes += record.n_bytes
    summary.n_raw_bytes += int(np.prod(record.shape)) * record.channels * np.dtype(record.dtype).itemsize


Outcome = ItemRecord | tuple[str, str]


def _results(
    archive: Files, jobs: list[tuple[Row, str]], domain: Any, store: Path, executor: Executor | None
) -> Iterator[tuple[Row, Outcome]]:
    """Yield the outcome of each job; a full disk stops everything that has not started."""
    if executor is None:
        for row, tag in jobs:
            part = archive.part(row.series_id)
            yield row, _settle(_cache_one(archive.files(row.series_id), part, row.series_id, row.patient_id, domain, store, tag))
        return
    futures: list[tuple[Row, Future[Any]]] = [
        (
            row,
            executor.submit(
                _cache_one, archive.files(name := row.series_id), archive.part(name), name, row.patient_id, domain, store, tag
            ),
        )
        for row, tag in jobs
    ]
    try:
        for row, future in futures:
            try:
                result = future.result()
            except (StoreError, RequestError):
                raise
            except Exception as err:  # a lost worker costs this item, not the run
                result = ("worker_lost", f"series {row.series_id}: its worker died ({type(err).__name__}); run again")
            yield row, _settle(result)
    finally:
        for _, future in futures:
            future.cancel()


def _settle(result: Any) -> Outcome:
    if isinstance(result, StoreError):
        raise result
    outcome: Outcome = result
    return outcome


def _cache_one(
    files: list[Path], part: dict[str, Any] | None, series_id: str, patient_id: str, domain: Any, store: Path, source: str
) -> ItemRecord | StoreError | tuple[str, str]:
    """Read one series and write it; failures come back as values, so that they pickle whole."""
    try:
        sample = domain.read(files, series_id=series_id, part=part)
    except ImageError as err:
        return (err.reason, str(err))
    except Exception as err:  # a reader's bug on one odd file must not end a night's run; the class is logged, no text
        logger.debug("series %s", series_id, exc_info=True)
        return ("unreadable", f"series {series_id}: reading failed ({type(err).__name__}); leave it out or report it")
    try:
        return write_item(sample, store, patient_id=patient_id, mask=_mask(domain, sample), source=source)
    except StoreError as err:
        return err


def _mask(domain: Any, sample: Sample) -> np.ndarray:
    find = getattr(domain, "foreground", None)
    if find is None:
        image = sample.image[:, 0].max(axis=0) if sample.meta.kind == "clip" else sample.image[0]
        return foreground(image, sample.valid)
    mask: np.ndarray = find(sample)
    return mask


def write_item(sample: Sample, store: Path, *, patient_id: str, mask: np.ndarray, source: str = "") -> ItemRecord:
    """Write one sample; an item of the same id is replaced.

    Args:
        sample: The canonical volume, image or clip.
        store: Store folder, prepared by `cache_items` or `create_store`.
        patient_id: Pseudonymous id.
        mask: (X, Y, Z) or (H, W) bool foreground, from which the points for foreground-biased crops are taken.
        source: See `ItemRecord.source`.

    Raises:
        StoreError: The files could not be written; nothing of this item is left behind.
    """
    image, valid = sample.image, sample.valid
    if valid is not None and valid.all():
        valid = None
    kind = sample.meta.kind
    assert kind != "volume" or (sample.spacing_mm is not None and sample.affine is not None)
    points = foreground_points(mask, MAX_POINTS)
    voxels = compress(image, kind)
    mask_bytes = b"" if valid is None else compress(valid[None], "volume" if kind == "volume" else "image")
    channel_axis = 1 if kind == "clip" else 0
    record = ItemRecord(
        series_id=sample.meta.series_id,
        patient_id=patient_id,
        channels=image.shape[channel_axis],
        shape=(*image.shape[:channel_axis], *image.shape[channel_axis + 1 :]),
        spacing_mm=sample.spacing_mm,
        affine=None if sample.affine is None else np.asarray(sample.affine, dtype=np.float64),
        dtype=str(image.dtype),
        stats=dict(sample.meta.stats),
        slice_axis=sample.meta.slice_axis,
        flags=tuple(sample.meta.flags),
        foreground=points,
        has_valid=valid is not None,
        checksum=checksum(voxels, mask_bytes),
        n_bytes=len(voxels) + len(mask_bytes),
        domain=sample.meta.domain,
        modality=sample.meta.modality,
        units=sample.meta.units,
        source=source,
        kind=kind,
        frame_times_ms=sample.meta.frame_times_ms,
        channel_names=tuple(sample.meta.channels),
        facts=dict(sample.meta.facts),
    )
    paths = item_paths(store, record.series_id)
    contents = [voxels, mask_bytes, record.to_json().encode()]
    _replace_together([(path, data) for path, data in zip(paths, contents) if data], store)
    if valid is None:
        paths[1].unlink(missing_ok=True)
    return record


def compress(array: np.ndarray, kind: Kind = "volume") -> bytes:
    """Return an array as a Blosc2 frame: zstd 1, chunked as `manifest` says for its kind.

    Volumes (C, X, Y, Z) have one channel per chunk. 16-bit images that shuffling leaves above half their size are written with
    byte differences too: that saves 6 % of the noisiest CT of `shared/data` and costs a fifth of the reading rate, so it is
    kept for those.
    """
    frame = _frame(array, kind, differences=False)
    if array.dtype in (np.int16, np.uint16) and len(frame) > DIFFERENCES_ABOVE * array.nbytes:
        return _frame(array, kind, differences=True)
    return frame


def _frame(array: np.ndarray, kind: Kind, *, differences: bool) -> bytes:
    """Compress in memory, a slab of one chunk's thickness at a time, so that no contiguous copy of the volume is made."""
    import blosc2

    shape = array.shape
    chunks: tuple[int, ...] = (1, *(min(CHUNK, n) for n in shape[1:]))
    blocks: tuple[int, ...] = (1, *(min(BLOCK, n) for n in chunks[1:]))
    if kind != "volume":
        chunks = tuple(min(size, n) for size, n in zip(PLANAR_CHUNKS[kind], shape))
        blocks = tuple(min(size, n) for size, n in zip(PLANAR_BLOCKS[kind], chunks))
    filters = [blosc2.Filter.SHUFFLE, blosc2.Filter.BYTEDELTA] if differences else [blosc2.Filter.SHUFFLE]
    meta = [0, array.dtype.itemsize] if differences else [0]
    frame = blosc2.empty(
        shape,
        dtype=array.dtype,
        chunks=chunks,
        blocks=blocks,
        cparams={"codec": blosc2.Codec.ZSTD, "clevel": CLEVEL, "nthreads": 1, "filters": filters, "filters_meta": meta},
        contiguous=True,
    )
    if kind != "volume":
        for start in range(0, shape[0], chunks[0]):
            frame[start : start + chunks[0]] = np.ascontiguousarray(array[start : start + chunks[0]])
        return bytes(frame.to_cframe())
    for channel in range(shape[0]):
        for start in range(0, shape[1], chunks[1]):
            stop = min(shape[1], start + chunks[1])
            frame[channel : channel + 1, start:stop] = _slab(array[channel, start:stop])[None]
    return bytes(frame.to_cframe())


def _slab(part: np.ndarray) -> np.ndarray:
    """Return a contiguous copy, made tile by tile: a transposed view copied whole misses the cache at every voxel."""
    slab = np.empty(part.shape, dtype=part.dtype)
    for y in range(0, part.shape[1], CHUNK):
        for z in range(0, part.shape[2], CHUNK):
            slab[:, y : y + CHUNK, z : z + CHUNK] = part[:, y : y + CHUNK, z : z + CHUNK]
    return slab


def _open_store(store: Path, domain: Any) -> None:
    """Make the folder, or check that it is this domain's store; remove what a killed run left half-written."""
    existing = read_manifest(store)
    key = store_key(domain)
    if existing is not None and existing.get("key") != key:
        raise RequestError(
            f"{store} holds a store with key {existing.get('key')} ({_named(existing)}); this recipe needs key {key} "
            f"(domain {domain.name}); name another folder, or delete that one"
        )
    if existing is None:
        create_store(store, domain)
    for stray in store.rglob(f"{TEMPORARY}*"):
        if not _alive(stray):
            stray.unlink(missing_ok=True)


def _named(manifest: dict[str, Any]) -> str:
    domain = manifest.get("domain")
    return f"domain {domain.get('name')}" if isinstance(domain, dict) else "no domain named"


def create_store(store: Path, domain: Any) -> None:
    """Make an empty store for a domain.

    Raises:
        RequestError: The folder holds something else, or cannot be made or written.
    """
    try:
        names = {entry.name for entry in store.iterdir()} if store.exists() else set()
        foreign = {name for name in names if name != "items" and not name.startswith(TEMPORARY)}
        if foreign or ("items" in names and any((store / "items").glob("[!.]*"))):
            raise RequestError(
                f"{store} is not empty and has no {MANIFEST}; a store needs a new or an empty folder: name another one"
            )
        store.mkdir(parents=True, exist_ok=True, mode=0o700)
        store.chmod(0o700)
        (store / "items").mkdir(exist_ok=True, mode=0o700)
    except OSError as err:
        raise _not_writable(store, err) from err
    text = json.dumps({**describe(domain), "key": store_key(domain)}, indent=1, sort_keys=True) + "\n"
    try:
        _replace_together([(store / MANIFEST, text.encode())], store)
    except StoreError as err:
        if isinstance(err.__cause__, PermissionError):
            raise _not_writable(store, err.__cause__) from err
        raise


def _not_writable(store: Path, err: OSError) -> RequestError:
    return RequestError(f"{store} cannot be written ({err.strerror}); a folder that you may write to is needed: name another one")


def _present(store: Path, series_id: str, tag: str) -> ItemRecord | None:
    """Return the record of a complete item of the same source files, or None."""
    voxels, mask, path = item_paths(store, series_id)
    try:
        record = ItemRecord.from_json(path.read_text())
        size = voxels.stat().st_size + (mask.stat().st_size if record.has_valid else 0)
    except (OSError, ValueError):
        return None
    return record if record.source == tag and size == record.n_bytes else None


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")


def _alive(stray: Path) -> bool:
    """Return whether the process that writes a temporary file still runs (on this machine)."""
    pid = stray.name[len(TEMPORARY) :].split("-", 1)[0]
    return pid.isdigit() and process_lives(int(pid))


def _replace_together(files: Sequence[tuple[Path, bytes]], store: Path) -> None:
    """Write all files aside, then rename them in order: a failure before the first rename changes nothing."""
    temporary = [(_temporary(path), path) for path, _ in files]
    try:
        for (aside, _), (_, data) in zip(temporary, files):
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
        if len(temporary) > 1:
            # Replacing an item: its old record goes first, so that no record ever describes other voxels.
            temporary[-1][1].unlink(missing_ok=True)
        for aside, path in temporary:
            os.replace(aside, path)
    except OSError as err:
        for aside, _ in temporary:
            aside.unlink(missing_ok=True)
        full = err.errno in FULL
        raise StoreError(
            f"{'no space left' if full else f'writing failed ({err.strerror})'} in {store}; the items written before are "
            f"complete and stay valid; {'free some space' if full else 'check the disk'} and run the same command again to go on"
        ) from err
