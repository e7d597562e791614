"""The pass of `medssl index --pixels`: read every usable series once, and keep what its pixels say in the private part of the index.

Series are read whole, one at a time in each process, as their domain reads them, but with everything that is in the picture: text lies
outside the tissue of an ultrasound image and beside the exposed field of a radiograph. Slides are read at their coarsest level.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, TimeoutError, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medssl._compat.spawn_main import spawn_pool
from medssl.archive._parquet import write_json
from medssl.archive.operations.owner import locked
from medssl.archive.pixels.burned_in import find_text
from medssl.archive.pixels.checks import content_hash, intensity_statistics, perceptual_hash, quality_flags
from medssl.archive.pixels.found import PixelTable, pixel_counts
from medssl.archive.reasons import FILE_REASONS, IMAGE_REASONS
from medssl.archive.scanning.scan import guarded
from medssl.archive.table import Archive
from medssl.domains.ct import AIR_HU
from medssl.errors import ImageError, MedsslError, RequestError
from medssl.registry import lookup
from medssl.types import ImageMeta, Sample

logger = logging.getLogger(__name__)

PROCESSES_ABOVE = 32
"""Fewer series are read in this process: a worker that imports torch costs seconds."""
PART_SERIES, PART_SECONDS = 256, 30.0
"""A kill loses at most what one part holds."""
LIMIT_S = 600.0
"""Seconds for one series."""
GRACE_S = 60.0
"""Seconds beyond the limit after which a worker counts as hung that could not even leave its series behind."""
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ct": ("ct", {}),
    "mri": ("mri", {}),
    "xray": ("xray", {"crop": False, "colour": True}),
    "ultrasound": ("ultrasound", {"sector": False, "doppler": "keep"}),
    "microscopy": ("microscopy", {}),
}
"""Domain of a row -> domain that reads it, and its arguments."""
UNKNOWN = {"volume": "mri", "volume_4d": "mri", "image": "microscopy", "cine": "ultrasound"}
"""Kind of a row whose domain is unknown -> domain that reads it: one that takes formats which cannot name their modality."""
DETECTOR_RANGE = ("xray", "ultrasound", "microscopy")
"""Domains whose stored bits say how far values may go; MR uses a few hundred of 65,536 levels."""
MAX_PIXELS = 64_000_000
"""Of the coarsest level of a slide."""


@dataclass(frozen=True)
class Job:
    """One series to look at.

    Args:
        series_id: Its pseudonymous id.
        source_tag: See `Archive.source_tag`.
        domain: That of the row.
        kind: That of the row.
        bits: Bits stored, where known.
        files: Its files.
        part: What of them it is.
    """

    series_id: str
    source_tag: str
    domain: str
    kind: str
    bits: int | None
    files: list[Path] = field(default_factory=list)
    part: Mapping[str, Any] | None = None


@dataclass
class PixelSummary:
    """What is known of the pixels of an index after a pass.

    Args:
        looked_at: Series that this run has read or tried to read.
        series: Usable series; equals `read` plus the sum of `failed`.
        read: Series with hashes and checks, from this run and earlier ones.
        failed: Reason -> number of series that could not be read.
        flags: Flag -> number of series.
        near_duplicates: `groups`, the `series` in them, and `groups_of_several_patients`.
        left_behind: Series ids that took this run longer than the limit (`timeout` in `failed`); the next run tries them again.
    """

    looked_at: int
    series: int
    read: int
    failed: dict[str, int]
    flags: dict[str, int]
    near_duplicates: dict[str, int]
    left_behind: list[str] = field(default_factory=list)


def look_at_pixels(
    path: Path,
    *,
    workers: int = 1,
    executor: Executor | None = None,
    limit_s: float = LIMIT_S,
    on_progress: Callable[[int, int], None] | None = None,
) -> PixelSummary:
    """Look at the pixels of every usable series of an index that nobody has looked at since its files changed.

    Args:
        path: Folder of the index.
        workers: Processes that read series; a few series are read in this one.
        executor: Takes the work instead, for instance a Dask cluster's; it must see the same paths.
        limit_s: Seconds after which a series is left behind with the reason `timeout`.
        on_progress: Called with (done, total) series.

    Raises:
        RequestError: The folder holds no index, another process writes to it, or the limit is not above 0.
        StoreError: The disk is full or failing; run again to go on.
    """
    if limit_s <= 0:
        raise RequestError(f"limit: {limit_s:g} s; above 0 is accepted; leave it out for {LIMIT_S:g}")
    archive = Archive.open(path)
    with locked(archive):
        table = PixelTable(archive.path / "private")
        missing = table.missing()
        rows: list[dict[str, Any]] = []
        late: list[str] = []
        written = time.monotonic()
        for done, row in enumerate(_results(archive, missing, workers, executor, limit_s), start=1):
            rows.append(row)
            if row["reason"] == "timeout":
                late.append(row["series_id"])
            if len(rows) >= PART_SERIES or time.monotonic() - written > PART_SECONDS or done == len(missing):
                table.append(rows)
                rows, written = [], time.monotonic()
            if on_progress is not None:
                on_progress(done, len(missing))
        table.merge()
        table.apply()
        counts = pixel_counts(archive.path)
        assert counts is not None
        write_json(archive.path / "summary.json", {**archive.summary, "pixels": counts})
    del counts["waiting"]
    return PixelSummary(looked_at=len(missing), left_behind=sorted(late), **counts)


# --- many series


def _results(
    archive: Archive, missing: list[dict[str, Any]], workers: int, executor: Executor | None, limit_s: float
) -> Iterator[dict[str, Any]]:
    jobs = _jobs(archive, missing)
    if executor is not None:
        yield from _through(executor, jobs, 4 * workers, [], limit_s)
    elif workers < 2 or len(missing) <= PROCESSES_ABOVE:
        for job in jobs:
            yield job if isinstance(job, dict) else _within(look, job, limit_s)
    else:
        while True:
            lost: list[Job] = []
            pool = spawn_pool(workers)
            try:
                yield from _through(pool, jobs, 2 * workers, lost, limit_s)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            if not lost:
                return
            for job in lost:  # a worker died or hung: one series at a time shows which one it was
                yield _alone(job, limit_s)


def _within(work: Callable[[Job], dict[str, Any]], job: Job, limit_s: float) -> dict[str, Any]:
    """Look at one series, or leave it behind as the header scan does with a file."""
    (row,) = guarded(work, [job], lambda late: _failure(late, "timeout"), limit_s=limit_s)
    return row


def _jobs(archive: Archive, missing: list[dict[str, Any]]) -> Iterator[Job | dict[str, Any]]:
    """Yield jobs, or results where the files cannot even be named (a container that has changed)."""
    for row in missing:
        try:
            yield Job(**row, files=archive.files(row["series_id"]), part=archive.part(row["series_id"]))
        except MedsslError as err:
            yield _failure(Job(**row), err.reason if isinstance(err, ImageError) else "vanished")


def _through(
    executor: Executor, jobs: Iterator[Job | dict[str, Any]], window: int, lost: list[Job], limit_s: float
) -> Iterator[dict[str, Any]]:
    """Keep `window` jobs under way; those whose worker died or hangs go to `lost`, and nothing more is submitted.

    A worker leaves a series behind by itself, unless a decoder keeps the interpreter to itself. Our own processes are killed then.
    """
    running: dict[Future[dict[str, Any]], Job] = {}
    while True:
        while len(running) < window and not lost:
            job = next(jobs, None)
            if job is None:
                break
            if isinstance(job, dict):
                yield job
                continue
            try:
                running[executor.submit(_within, look, job, limit_s)] = job
            except BrokenExecutor:
                lost.append(job)
        if not running:
            return
        finished = wait(running, timeout=limit_s + GRACE_S, return_when=FIRST_COMPLETED).done
        if not finished and isinstance(executor, ProcessPoolExecutor):
            _kill(executor)
        for future in finished:
            job = running.pop(future)
            try:
                row = future.result()
            except BrokenExecutor:
                lost.append(job)
            except Exception:  # a cluster's way to say that a worker was lost
                yield _failure(job, "worker_lost")
            else:
                yield row


def _alone(job: Job, limit_s: float) -> dict[str, Any]:
    with spawn_pool(1) as pool:
        try:
            return pool.submit(_within, look, job, limit_s).result(timeout=limit_s + GRACE_S)
        except TimeoutError:
            _kill(pool)
            return _failure(job, "timeout")
        except BrokenExecutor:
            return _failure(job, "worker_lost")


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()


def _failure(job: Job, reason: str, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    known = {"series_id": job.series_id, "source_tag": job.source_tag, "quality_flags": list(flags), "privacy_flags": []}
    return {**known, "reason": reason if reason in (*IMAGE_REASONS, *FILE_REASONS) else "unreadable"}


# --- one series


def look(job: Job) -> dict[str, Any]:
    """Read one series and return its row of `archive.pixels.PIXEL_COLUMNS`; whatever goes wrong is a reason in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries quote file content in theirs
            return {"series_id": job.series_id, "source_tag": job.source_tag, "reason": None, **examine(_read(job), job)}
    except ImageError as err:
        return _failure(job, err.reason, ("constant_pixels",) if err.reason == "constant" else ())
    except RequestError:  # a package of an extra is missing
        return _failure(job, "no_decoder")
    except MemoryError:
        return _failure(job, "too_large")
    except Exception as err:  # a reader's bug on one odd file must not end a night's run
        logger.debug("series %s: %s", job.series_id, type(err).__name__)
        return _failure(job, "unreadable")


def _read(job: Job) -> Sample:
    if job.domain == "wsi":
        return _overview(job)
    name, arguments = READERS.get(UNKNOWN.get(job.kind, "") if job.domain == "unknown" else job.domain, ("", {}))
    if not name:
        raise ImageError("no_domain", f"series {job.series_id}: a modality that has no domain yet; nothing is to be done")
    sample: Sample = lookup("domain", name)(**arguments).read(job.files, series_id=job.series_id, part=job.part)
    return sample


def _overview(job: Job) -> Sample:
    """Return a slide at its coarsest level, not its label or overview, which may show a name."""
    # The scale does not matter here: slides that do not state one are looked at too.
    slide = lookup("domain", "wsi")(slide_mpp=1.0).slide(job.files, series_id=job.series_id)
    with slide:
        level = int(np.argmax(slide.info.level_downsamples))
        width, height = slide.info.level_dimensions[level]
        if width * height > MAX_PIXELS:
            raise ImageError("too_large", f"series {job.series_id}: {width}x{height} pixels at its coarsest level; leave it out")
        region = slide.read_level(level, 0, 0, (width, height))
        image = np.ascontiguousarray(region.image.transpose(2, 0, 1))
    return Sample(image, None, None, region.valid, ImageMeta(series_id=job.series_id, domain="wsi", kind="image"))


def examine(sample: Sample, job: Job) -> dict[str, Any]:
    """Return hashes, statistics and flags of a sample.

    Hashes are meant to find one volume in two formats: what lies below air counts as air, because DICOM says which voxels are padding
    and a conversion leaves their values, mostly -2000, in place.
    """
    image, kind = sample.image, sample.meta.kind
    values = image if sample.valid is None else image[..., sample.valid]
    statistics = intensity_statistics(values)
    flags = quality_flags(values, statistics, job.bits if job.domain in DETECTOR_RANGE else None)
    hashed = np.maximum(image, AIR_HU) if kind == "volume" and image.dtype != np.uint8 else image
    looks = perceptual_hash(hashed, kind)
    return {
        "content_hash": content_hash(hashed),
        "perceptual_hash": f"{looks:016x}" if looks else None,
        **statistics,
        "quality_flags": list(flags),
        **_text(sample, job.domain),
    }


def _text(sample: Sample, domain: str) -> dict[str, Any]:
    """Return `text_score` and `privacy_flags`; slides keep their names on labels and overviews, and tissue is no background for text."""
    if domain == "wsi":
        return {"text_score": None, "privacy_flags": []}
    kind = sample.meta.kind
    found = find_text(slices(sample) if kind == "volume" else sample.image, "image" if kind == "image" else "clip")
    flags = []
    if found.suspected:
        flags.append("burned_in_suspected")
    elif found.marker and domain == "xray":
        flags.append("marker")
    return {"text_score": found.score, "privacy_flags": flags}


def slices(sample: Sample) -> np.ndarray:
    """Return the slices of a volume as (S, H, W), the way up they are looked at: text in them runs along the rows."""
    axis = 2 if sample.meta.slice_axis is None else sample.meta.slice_axis
    planes: np.ndarray = np.moveaxis(sample.image[0], axis, 0).transpose(0, 2, 1)
    return planes[:, ::-1, ::-1]
