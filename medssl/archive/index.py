"""Walk trees of files into one index.

Folder (mode 0700, files 0600):

    series.parquet           one row per volume (`table.SeriesRow`)
    files.parquet/           one row per file seen, in parts, with manifest.json naming the parts that count
    summary.json             counts; files seen = files used + files with a reason
    private/                 id.key, state.json, scan/ (one part per finished batch), files.parquet, series.parquet

A scan part is written when its batch is done, so killing a run loses that batch at most; grouping works on the scan
rows and is quick enough to be redone as a whole. The archive of the next issue joins at `scan_file` (more formats),
`build_series` (more judgement) and the executor.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medssl.archive._parquet import TEMPORARY, read_table, write_json, write_table
from medssl.archive.ids import IdKey, load_key, make_key
from medssl.archive.scan import SCAN_COLUMNS, os_reason, scan_file, unchanged
from medssl.archive.series import Choice, Grouped, as_record, build_series
from medssl.archive.table import (
    FILE_COLUMNS,
    FORMAT,
    PRIVATE_FILE_COLUMNS,
    PRIVATE_SERIES_COLUMNS,
    SERIES_COLUMNS,
)
from medssl.errors import RequestError

logger = logging.getLogger(__name__)

ACCEPTED = "NIfTI (.nii, .nii.gz), NRRD/NHDR, MHA/MHD and DICOM series, told by content and not by name"
SPLITS = ("train", "val", "test", "unknown")
BATCH = 256
PART_ROWS = 500_000


@dataclass
class IndexSummary:
    """What `index` found.

    Args:
        n_files_seen: Files and links met; equals n_files_used plus the sum of `reasons`.
        n_files_used: Files of series that can be read.
        n_files_scanned: Files opened by this run; the rest was known.
        n_series: Rows of `series.parquet`.
        n_series_usable: Of these, not rejected.
        reasons: Reason code -> number of files.
        domains: Domain -> number of usable series.
        splits: Split -> number of usable series.
    """

    n_files_seen: int = 0
    n_files_used: int = 0
    n_files_scanned: int = 0
    n_series: int = 0
    n_series_usable: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    domains: dict[str, int] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    path: str
    size: int = 0
    mtime_ns: int = 0
    reason: str | None = None


def index(
    sources: Sequence[Path],
    out: Path,
    *,
    site: str = "unknown",
    modality: str = "unknown",
    key_file: Path | None = None,
    splits: Path | None = None,
    workers: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> IndexSummary:
    """Index the images under some folders.

    Files known from an earlier run with the same size and time of change are not opened again; files that are gone
    are dropped. Earlier sources that are not named now stay in the index. `site`, `modality` and `splits` of a source are kept
    until others are given.

    Args:
        sources: Folders, or single files.
        out: Folder of the index; made when absent.
        site: Name of the site these sources come from, for the column `site`.
        modality: `MR` or `CT`, for files that do not say (NIfTI, NRRD and MHA without a sidecar); files that say are believed.
        key_file: The owner's id key, mode 0600. None uses `out`/private/id.key, made when absent.
        splits: CSV with columns `file,split` and optionally `patient`. `file` is matched on the path relative to its
            source, else on the file name, else on the name of the folder that holds the file.
        workers: Threads that read files.
        on_progress: Called with (done, total) while files are scanned.

    Raises:
        RequestError: A source is missing or holds no file, the splits table is malformed or puts one patient in two
            splits, the folder belongs to another key or cannot be written. Nothing was written.
        StoreError: Writing failed later; run again to go on.
    """
    roots = [_source(Path(source)) for source in sources]
    if not roots:
        raise RequestError(f"no source was given; name one or more folders holding {ACCEPTED}")
    if modality not in ("unknown", "MR", "CT"):
        raise RequestError(
            f"modality: {modality!r}; accepted are MR and CT (what files that do not say hold); leave it out when they differ"
        )
    if workers < 1:
        raise RequestError(f"workers: {workers}; 1 or more are needed")
    table = None if splits is None else read_splits(splits)
    out = Path(out).absolute()
    listing = [entry for root in roots for entry in _walk(root, out)]
    if not any(entry.reason is None for entry in listing):
        names = ", ".join(str(root) for root in roots)
        raise RequestError(f"{names}: {_nothing(listing)}; accepted are {ACCEPTED}; check the path")
    key = _open_out(out, key_file)
    with _locked(out):
        return _run(roots, out, key, listing, site, modality, table, workers, on_progress)


def _nothing(listing: Sequence[_Entry]) -> str:
    if not listing:
        return "no file there"
    counts = Counter(entry.reason for entry in listing)
    return "no readable file there (" + ", ".join(f"{name}: {n}" for name, n in sorted(counts.items(), key=str)) + ")"


def _run(
    roots: Sequence[Path],
    out: Path,
    key: IdKey,
    listing: Sequence[_Entry],
    site: str,
    modality: str,
    table: dict[str, list[str]] | None,
    workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> IndexSummary:
    private = out / "private"
    state = _remember(private, key, roots, site, modality, table)
    known = _known(private)
    rows = {path: row for path, row in known.items() if not _under(path, roots)}
    fresh: list[str] = []
    for entry in dict.fromkeys(listing):
        row = known.get(entry.path)
        if entry.reason is not None:
            blank = {"size": 0, "mtime_ns": 0, "kind": "other", "digest": "", "header": "{}"}
            rows[entry.path] = {**blank, "path": entry.path, "reason": entry.reason}
        elif row is not None and unchanged(row, entry.size, entry.mtime_ns):
            rows[entry.path] = row
        else:
            fresh.append(entry.path)
    for batch in _scan(fresh, private, workers, on_progress, len(rows)):
        rows.update((row["path"], row) for row in batch)
    ordered = [rows[path] for path in sorted(rows)]
    choices = {row["path"]: _choose(row["path"], state["sources"]) for row in ordered}
    grouped = build_series(ordered, choices, key)
    _check_patients(grouped)
    summary = _summarise(grouped, len(fresh))
    _write(out, grouped, summary, key)
    return summary


def _source(path: Path) -> Path:
    if not path.exists():
        raise RequestError(f"{path} does not exist; name a folder holding {ACCEPTED}")
    if not os.access(path, os.R_OK):
        raise RequestError(f"{path} cannot be read (permission); change its rights or name another folder")
    return path.absolute()


def read_splits(path: Path) -> dict[str, list[str]]:
    """Read a splits table.

    Returns:
        file -> [split, patient]; patient is the file's stem where the table has no such column or no value.

    Raises:
        RequestError: It cannot be read, lacks a column, names an unknown split, one file twice with different splits,
            or one patient in two splits.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            names = [name.strip() for name in reader.fieldnames or ()]
            rows = [{str(name).strip(): str(value or "").strip() for name, value in row.items()} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise RequestError(f"splits {path} cannot be read ({type(err).__name__}); a CSV with columns file,split is needed") from err
    missing = [name for name in ("file", "split") if name not in names]
    if missing:
        raise RequestError(
            f"splits {path}: no column {' and '.join(missing)} among {', '.join(names) or 'none'}; "
            "columns file,split (and optionally patient) are needed"
        )
    table: dict[str, list[str]] = {}
    by_patient: dict[str, str] = {}
    for row in rows:
        file, split = row["file"], row["split"].lower()
        if not file:
            continue
        if split not in SPLITS:
            raise RequestError(f"splits {path}: split {split!r}; {', '.join(SPLITS)} are accepted; correct the table")
        patient = row.get("patient") or stem(file)
        if file in table and table[file][0] != split:
            raise RequestError(f"splits {path}: {file} is in {table[file][0]} and in {split}; keep one of the two rows")
        if by_patient.setdefault(patient, split) != split:
            raise RequestError(
                f"splits {path}: one patient is in {by_patient[patient]} and in {split}, second at {file}; "
                "a patient belongs to one split: correct the table"
            )
        table[file] = [split, patient]
    return table


def stem(file: str) -> str:
    """Return a file name without folder and without the suffixes of image formats."""
    name = file.replace("\\", "/").rpartition("/")[2]
    for suffix in (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm"):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _walk(root: Path, out: Path) -> Iterator[_Entry]:
    """Yield everything under a root in sorted order, without the index's own folder; links to folders stay closed."""
    if not root.is_dir():
        yield _look(str(root))
        return
    problems: list[OSError] = []
    for folder, names, files in os.walk(root, onerror=problems.append):
        names[:] = sorted(name for name in names if Path(folder, name) != out)
        for name in list(names):
            path = os.path.join(folder, name)
            if os.path.islink(path):
                names.remove(name)
                yield _Entry(path, reason="linked_folder")
        for name in sorted(files):
            yield _look(os.path.join(folder, name))
        while problems:
            err = problems.pop()
            yield _Entry(str(err.filename), reason=os_reason(err))
    for err in problems:
        yield _Entry(str(err.filename), reason=os_reason(err))


def _look(path: str) -> _Entry:
    try:
        status = os.stat(path)
    except OSError as err:
        return _Entry(path, reason="broken_link" if os.path.islink(path) else os_reason(err))
    if not stat.S_ISREG(status.st_mode):
        return _Entry(path, reason="not_image")  # a pipe or device: opening it may block for ever
    return _Entry(path, status.st_size, status.st_mtime_ns)


def _open_out(out: Path, key_file: Path | None) -> IdKey:
    """Check everything that can be wrong with the folder and the key, then make the folder; return the key."""
    private = out / "private"
    own = private / "id.key"
    if out.exists() and not out.is_dir():
        raise RequestError(f"{out} is a file; the index needs a folder: name another path")
    existing = out.is_dir() and any(out.iterdir())
    if existing and not private.is_dir():
        raise RequestError(f"{out} is not empty and holds no index; name a new or an empty folder")
    given = None if key_file is None else load_key(Path(key_file))
    try:
        if given is None:
            given = load_key(own) if own.exists() else None
        state = _state(private)
        if state and given is None:
            raise RequestError(f"{out} was made with a key file that is not named now; give the same one with --key")
        if state and given is not None and state["key"] != given.fingerprint:
            raise RequestError(
                f"{out} was made with another id key (fingerprint {state['key']}, now {given.fingerprint}); "
                "ids of two keys never match: give the first key, or index into a new folder"
            )
        for folder in (out, private, private / "scan", out / "files.parquet"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)
        if not os.access(private, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
        return make_key(own) if given is None else given
    except OSError as err:
        if isinstance(err, RequestError):
            raise
        raise RequestError(f"{out} cannot be written ({err.strerror}); name a folder that you may write to") from err


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    with open(os.open(out / "private" / "lock", os.O_WRONLY | os.O_CREAT, 0o600), "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            raise RequestError(f"{out} is being indexed by another process; wait until it has finished") from err
        for stray in [*out.glob(f"{TEMPORARY}*"), *out.glob(f"*/{TEMPORARY}*"), *out.glob(f"private/scan/{TEMPORARY}*")]:
            stray.unlink(missing_ok=True)
        yield


def _state(private: Path) -> dict[str, Any]:
    try:
        state = json.loads((private / "state.json").read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as err:
        raise RequestError(
            f"{private}/state.json cannot be read ({type(err).__name__}); restore it or index into a new folder"
        ) from err
    return dict(state)


def _remember(
    private: Path, key: IdKey, roots: Sequence[Path], site: str, modality: str, table: dict[str, list[str]] | None
) -> dict[str, Any]:
    """Add these sources to the state and return it."""
    state = _state(private) or {"format": FORMAT, "key": key.fingerprint, "sources": {}}
    for root in roots:
        source = state["sources"].setdefault(str(root), {"site": "unknown", "splits": None})
        if site != "unknown":
            source["site"] = site
        if modality != "unknown":
            source["modality"] = modality
        if table is not None:
            source["splits"] = table
    write_json(private / "state.json", state)
    return state


def _known(private: Path) -> dict[str, dict[str, Any]]:
    parts = sorted((private / "scan").glob("part-*.parquet"))
    return {row["path"]: row for row in read_table(parts, SCAN_COLUMNS)}


def _under(path: str, roots: Sequence[Path]) -> bool:
    return any(path == str(root) or path.startswith(f"{root}{os.sep}") for root in roots)


def _scan(
    paths: Sequence[str], private: Path, workers: int, on_progress: Callable[[int, int], None] | None, known: int
) -> Iterator[list[dict[str, Any]]]:
    """Scan files batch by batch; a batch is on disk before it is yielded."""
    parts = sorted((private / "scan").glob("part-*.parquet"))
    number = int(parts[-1].stem.partition("-")[2]) + 1 if parts else 0
    # About a hundred parts for a large archive, each worth less than a minute of scanning.
    size = max(BATCH, min(8192, len(paths) // 100))
    done, total = known, known + len(paths)
    if on_progress is not None:
        on_progress(done, total)
    pool: Executor
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(paths), size):
            batch = []
            for row in pool.map(scan_file, paths[start : start + size]):
                batch.append(row)
                done += 1
                if on_progress is not None and (done == total or done % 16 == 0):
                    on_progress(done, total)
            write_table(private / "scan" / f"part-{number:08d}.parquet", SCAN_COLUMNS, batch)
            number += 1
            yield batch


def _choose(path: str, sources: dict[str, Any]) -> Choice:
    """Return what the user said about a file: the innermost source that holds it decides."""
    roots = [root for root in sources if path == root or path.startswith(f"{root}{os.sep}")]
    if not roots:
        return Choice()
    root = max(roots, key=len)
    source = sources[root]
    table = source["splits"] or {}
    folder, _, name = path.rpartition(os.sep)
    relative = path[len(root) + 1 :] if path != root else name
    for candidate in (relative, name, folder.rpartition(os.sep)[2]):
        if candidate in table:
            split, patient = table[candidate]
            return Choice(source["site"], split, patient, source.get("modality", "unknown"))
    return Choice(source["site"], modality=source.get("modality", "unknown"))


def _check_patients(grouped: Grouped) -> None:
    """Warn when the tags put one patient in two splits; the table's own patients were checked when it was read."""
    splits: dict[str, set[str]] = {}
    for row in grouped.series:
        if row.split != "unknown":
            splits.setdefault(row.patient_id, set()).add(row.split)
    n = sum(len(values) > 1 for values in splits.values())
    if n:
        logger.warning("%d patients are in more than one split; correct the splits table", n)


def _summarise(grouped: Grouped, scanned: int) -> IndexSummary:
    usable = [row for row in grouped.series if row.status != "rejected"]
    reasons = Counter(file.reason for file in grouped.files if file.reason is not None)
    return IndexSummary(
        n_files_seen=len(grouped.files),
        n_files_used=sum(file.reason is None for file in grouped.files),
        n_files_scanned=scanned,
        n_series=len(grouped.series),
        n_series_usable=len(usable),
        reasons=dict(sorted(reasons.items())),
        domains=dict(sorted(Counter(row.domain for row in usable).items())),
        splits=dict(sorted(Counter(row.split for row in usable).items())),
    )


def _write(out: Path, grouped: Grouped, summary: IndexSummary, key: IdKey) -> None:
    private = out / "private"
    ids = [key.make("file", "", f"{file.digest} {file.path}") for file in grouped.files]
    write_table(
        private / "files.parquet",
        PRIVATE_FILE_COLUMNS,
        ({**asdict(file), "file_id": name} for name, file in zip(ids, grouped.files)),
    )
    write_table(
        private / "series.parquet",
        PRIVATE_SERIES_COLUMNS,
        (
            {"series_id": row.series_id, "source_tag": grouped.tags[row.series_id], "uids": grouped.uids.get(row.series_id)}
            for row in grouped.series
        ),
    )
    _write_files(out / "files.parquet", ids, grouped)
    write_table(out / "series.parquet", SERIES_COLUMNS, (as_record(row) for row in grouped.series))
    write_json(out / "summary.json", {"format": FORMAT, "key": key.fingerprint, **asdict(summary)})


def _write_files(folder: Path, ids: Sequence[str], grouped: Grouped) -> None:
    """Write the public file table as parts; the manifest, swapped last, names those that count."""
    old = sorted(folder.glob("part-*.parquet"))
    number = int(old[-1].stem.partition("-")[2]) + 1 if old else 0
    parts = []
    for start in range(0, max(1, len(ids)), PART_ROWS):
        part = folder / f"part-{number:08d}.parquet"
        rows = zip(ids[start : start + PART_ROWS], grouped.files[start : start + PART_ROWS])
        write_table(
            part,
            FILE_COLUMNS,
            ({"file_id": name, "series_id": file.series_id, "reason": file.reason} for name, file in rows),
        )
        parts.append(part.name)
        number += 1
    write_json(folder / "manifest.json", {"parts": parts, "rows": len(ids)})
    for part in old:
        part.unlink(missing_ok=True)
