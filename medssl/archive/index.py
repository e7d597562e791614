"""Walk trees of files into one index.

Folder (mode 0700, files 0600):

    series.parquet           one row per series (`table.SeriesRow`)
    files.parquet/           one row per file seen, in parts, with manifest.json naming the parts that count
    summary.json             counts; files seen = files used + files with a reason
    private/                 id.key, state.json, listing.parquet, scan/ (one part per finished batch), files, series, rows, marks,
                             spill/ while it works

Listing, scanning and grouping each work from files on disk, so that memory does not grow with the archive. A scan part is written when
its batch is done: killing a run loses that batch at most. Groups that nothing new has touched keep their rows.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from medssl.archive._parquet import TEMPORARY, TableWriter, connect, quote, shared, stream, write_json, write_query
from medssl.archive.grouping import regroup, source_state
from medssl.archive.ids import IdKey, load_key, make_key
from medssl.archive.known import open_known, wide
from medssl.archive.paths import to_path
from medssl.archive.pixels.found import pixel_counts
from medssl.archive.rows.base import DOMAINS, Choice
from medssl.archive.scanning.listing import LISTING_COLUMNS, Entry, look, read_list, settled, walk
from medssl.archive.scanning.scan import RETRIED, data_unchanged
from medssl.archive.scanning.sweep import LIMIT_S, sweep
from medssl.archive.table import FORMAT
from medssl.errors import RequestError, header_words
from medssl.locks import hold_lock

logger = logging.getLogger(__name__)

ACCEPTED = (
    "DICOM, NIfTI, NRRD, MetaImage, PNG, JPEG, TIFF, GIF, videos and slides, also in zip and tar, told by content and not by name"
)
SPLITS = ("train", "val", "test", "unknown")


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
class ScanOptions:
    """How an archive is scanned.

    Args:
        workers: Processes that read files (threads for few files).
        executor: Takes the work instead, for instance `distributed.Client.get_executor()`; its workers must see the same paths.
        only: Paths that changed, as the file server or PACS names them; nothing else is looked at. None walks the sources.
        prune: Do not list folders whose time of change is that of the last run; files rewritten in place go unseen.
        settle_s: Leave files that changed within the last seconds for the next run.
        limit_s: Seconds after which a file is left behind.
        max_rate: Files per second at most.
    """

    workers: int = 2
    executor: Executor | None = None
    only: Path | None = None
    prune: bool = False
    settle_s: float = 0.0
    limit_s: float = LIMIT_S
    max_rate: float | None = None

    def check(self) -> None:
        """Raise RequestError for values that make no sense."""
        if self.workers < 1:
            raise RequestError(f"workers: {self.workers}; 1 or more are needed")
        if self.settle_s < 0 or self.limit_s <= 0 or (self.max_rate is not None and self.max_rate <= 0):
            raise RequestError("settle is 0 or more seconds; the time limit and the rate are above 0; correct the option")


def index(
    sources: Sequence[Path],
    out: Path,
    *,
    site: str = "unknown",
    modality: str = "unknown",
    key_file: Path | None = None,
    splits: Path | None = None,
    workers: int | None = None,
    options: ScanOptions | None = None,
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
        workers: Short form of `options.workers`.
        options: How the sources are scanned.
        on_progress: Called with (done, total) while files are scanned.

    Raises:
        RequestError: A source is missing or holds no file, the splits table is malformed or puts one patient in two
            splits, the folder belongs to another key or cannot be written. Nothing was written.
        StoreError: Writing failed later; run again to go on.
    """
    known = _known_sources(Path(out))
    roots = [_source(Path(source), known) for source in sources]
    if not roots:
        raise RequestError(f"no source was given; name one or more folders holding {ACCEPTED}")
    if modality not in ("unknown", *DOMAINS):
        raise RequestError(
            f"modality: {modality!r}; accepted are {', '.join(DOMAINS)} (what files that do not say hold); leave it out when they differ"
        )
    options = options or ScanOptions()
    if workers is not None:
        options = replace(options, workers=workers)
    options.check()
    table = None if splits is None else read_splits(splits)
    out = Path(out).absolute()
    listing = _refuse_nothing(_list(roots, out, options), roots)
    key = _open_out(out, key_file)
    with _locked(out):
        return _run(roots, out, key, listing, site, modality, table, options, on_progress)


def _list(roots: Sequence[Path], out: Path, options: ScanOptions) -> Iterator[Entry]:
    if options.only is not None:
        found: Iterable[Entry] = (look(path) for path in read_list(options.only, roots))
    else:
        known = _folders(out / "private" / "listing.parquet") if options.prune else None
        found = chain.from_iterable(walk(root, out, known=known) for root in roots)
    return settled(found, options.settle_s)


def _folders(listing: Path) -> dict[str, tuple[int, list[Entry]]]:
    """Return folder -> (time of change, entries) of the last run."""
    if not listing.exists():
        return {}
    folders: dict[str, tuple[int, list[Entry]]] = {}
    for row in stream(shared(), f"SELECT * FROM read_parquet({quote(listing)}) ORDER BY path"):
        path, parent = to_path(row["path"]), to_path(row["folder"])
        if row["reason"] == "folder":
            folders.setdefault(path, (0, []))
            folders[path] = (row["mtime_ns"], folders[path][1])
        if row["reason"] not in RETRIED:
            folders.setdefault(parent, (0, []))[1].append(Entry(path, row["size"], row["mtime_ns"], row["reason"]))
        else:
            folders[parent] = (-1, [])  # something here has to be looked at again
    return folders


def _refuse_nothing(listing: Iterator[Entry], roots: Sequence[Path]) -> Iterator[Entry]:
    """Return the listing again once it is known to hold a readable file."""
    met: list[Entry] = []
    for entry in listing:
        met.append(entry)
        if entry.reason is None:
            return chain(met, listing)
    counts = Counter(entry.reason for entry in met if entry.reason != "folder")
    reasons = ", ".join(f"{name}: {n}" for name, n in sorted(counts.items(), key=str))
    what = f"no readable file there ({reasons})" if counts else "no file there"
    raise RequestError(f"{', '.join(str(root) for root in roots)}: {what}; accepted are {ACCEPTED}; check the path")


def _run(
    roots: Sequence[Path],
    out: Path,
    key: IdKey,
    listing: Iterator[Entry],
    site: str,
    modality: str,
    table: dict[str, list[str]] | None,
    options: ScanOptions,
    on_progress: Callable[[int, int], None] | None,
) -> IndexSummary:
    private = out / "private"
    state = _remember(private, key, roots, site, modality, table)
    connection = connect(private / "spill", threads=1)
    try:
        _write_listing(connection, private, listing, roots, keep_others=options.only is not None)
        known, total = _find_fresh(connection, private)
        if on_progress is not None:
            on_progress(known, known + total)
        fresh = private / "fresh.parquet"
        sweep(
            (to_path(row["path"]) for row in stream(connection, f"SELECT path FROM read_parquet({quote(fresh)})")),
            total,
            private,
            connection.cursor(),
            workers=options.workers,
            executor=options.executor,
            limit_s=options.limit_s,
            max_rate=options.max_rate,
            on_progress=None if on_progress is None else lambda done: on_progress(known + done, known + total),
        )
        fresh.unlink()
    finally:
        connection.close()
    last = _last_state(out)
    choices = source_state(state["sources"])
    unchanged_choices = last.get("choices") == choices and last.get("format") == FORMAT
    regroup(
        out,
        key,
        lambda path: _choose(path, state["sources"]),
        anew=not unchanged_choices,
    )
    summary = _summarise(out, total)
    pixels = pixel_counts(out)
    facts = {"format": FORMAT, "key": key.fingerprint, **asdict(summary), **({} if pixels is None else {"pixels": pixels})}
    write_json(out / "summary.json", facts)
    write_json(private / "grouped.json", {"format": FORMAT, "choices": choices})
    return summary


def _last_state(out: Path) -> dict[str, Any]:
    """Return what the tables on disk were made from; empty when there are none."""
    try:
        return dict(json.loads((out / "private" / "grouped.json").read_text()))
    except (OSError, ValueError):
        return {}


def _write_listing(connection: Any, private: Path, listing: Iterator[Entry], roots: Sequence[Path], *, keep_others: bool) -> None:
    """Replace what is known to lie under the roots; with `keep_others` only the paths named."""
    new, old = private / "new-listing.parquet", private / "listing.parquet"
    writer = TableWriter(new, LISTING_COLUMNS, connection)
    try:
        for entry in listing:
            writer.append(entry.record())
        writer.close()
    except BaseException:
        writer.discard()
        raise
    rows = f"SELECT DISTINCT ON (source_id) * FROM read_parquet({quote(new)})"
    if old.exists():
        under = " OR ".join(f"path = {text} OR starts_with(path, {text} || '/')" for text in (quote(root) for root in roots))
        kept = "true" if keep_others else f"NOT ({under})"
        rows = f"""({rows}) UNION ALL SELECT * FROM read_parquet({quote(old)})
        WHERE {kept} AND source_id NOT IN (SELECT source_id FROM read_parquet({quote(new)}))"""
    write_query(old, rows, connection)
    new.unlink()


def _find_fresh(connection: Any, private: Path) -> tuple[int, int]:
    """Write `fresh.parquet`, the files that are new or changed since they were scanned; return how many are not, and how many are."""
    fresh, listing = private / "fresh.parquet", quote(private / "listing.parquet")
    known, _ = open_known(connection, private)
    retried = ", ".join(f"'{reason}'" for reason in sorted(RETRIED))
    detached = wide(connection, private, f"SELECT DISTINCT source_id, part FROM {known} WHERE detached")
    rows = connection.execute(f"""SELECT path, header FROM ({detached}) WHERE header LIKE '%"data_stats"%'""").fetchall()
    connection.execute("CREATE TABLE stale (path VARCHAR)")
    stale = [path for path, header in rows if not data_unchanged(header)]
    connection.execute("INSERT INTO stale SELECT unnest(?::VARCHAR[])", [stale])
    query = f"""SELECT l.path, l.size FROM read_parquet({listing}) l
        LEFT JOIN {known} k ON k.source_id = l.source_id AND k.path = l.path
        WHERE l.reason IS NULL AND (k.path IS NULL OR k.size <> l.size OR k.mtime_ns <> l.mtime_ns
        OR coalesce(k.reason IN ({retried}), false) OR l.path IN (SELECT path FROM stale)) ORDER BY l.path"""
    write_query(fresh, query, connection)
    counts = f"""SELECT (SELECT count(*) FROM read_parquet({listing}) WHERE reason IS DISTINCT FROM 'folder'),
        (SELECT count(*) FROM read_parquet({quote(fresh)}))"""
    listed, n_fresh = connection.execute(counts).fetchone()
    return listed - n_fresh, n_fresh


def _source(path: Path, known: Iterable[str]) -> Path:
    """Return the absolute path of a source without `..`, so that a folder has one name however it is typed; links keep theirs."""
    if not path.exists():
        raise RequestError(f"{path} does not exist; name a folder holding {ACCEPTED}")
    if not os.access(path, os.R_OK):
        raise RequestError(f"{path} cannot be read (permission); change its rights or name another folder")
    typed = path.absolute()
    tidy = Path(os.path.normpath(typed))
    if not tidy.exists() or not tidy.samefile(typed):  # `..` after a link leads elsewhere
        tidy = typed.resolve()
    older = (Path(root) for root in known if os.path.normpath(root) == str(tidy))  # of an index that kept `..`
    return next(older, tidy)


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
            rows = [
                (reader.line_num, {str(name).strip(): str(value or "").strip() for name, value in row.items()}) for row in reader
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise RequestError(f"splits {path} cannot be read ({type(err).__name__}); a CSV with columns file,split is needed") from err
    missing = [name for name in ("file", "split") if name not in names]
    if missing:
        raise RequestError(
            f"splits {path}: no column {' and '.join(missing)} among {header_words(names, ('file', 'split', 'patient'))}; "
            "columns file,split (and optionally patient) are needed"
        )
    table: dict[str, list[str]] = {}
    by_patient: dict[str, str] = {}
    for line, row in rows:  # messages name the line: files and patients are not quoted
        file, split = row["file"], row["split"].lower()
        if not file:
            continue
        if split not in SPLITS:
            raise RequestError(f"splits {path}: line {line}: another split than {', '.join(SPLITS)}; correct the table")
        patient = row.get("patient") or stem(file)
        if file in table and table[file][0] != split:
            raise RequestError(
                f"splits {path}: line {line}: a file that is in {table[file][0]} and in {split}; keep one of the two rows"
            )
        if by_patient.setdefault(patient, split) != split:
            raise RequestError(
                f"splits {path}: line {line}: one patient is in {by_patient[patient]} and in {split}; "
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
    with hold_lock(out / "private" / "lock", f"{out} is being indexed by another process; wait until it has finished"):
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


def _known_sources(out: Path) -> list[str]:
    """Return the sources of an index as they are called in it; what is wrong with its folder is said once it is opened."""
    try:
        return list(_state(out / "private").get("sources", {}))
    except RequestError:
        return []


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


LABELS = r"(?i)/(labels?(Tr|Ts|Val)?|masks?|segmentations?)/[^/]+$"
"""Paths of files in folders that Decathlon, nnU-Net and most cohorts keep label maps in."""


def _summarise(out: Path, scanned: int) -> IndexSummary:
    series, files = quote(out / "series.parquet"), quote(out / "private" / "files.parquet")
    cursor = shared()

    def counts(what: str, source: str, where: str) -> dict[str, int]:
        rows = cursor.execute(f"SELECT {what}, count(*) FROM read_parquet({source}) WHERE {where} GROUP BY 1 ORDER BY 1")
        return {str(name): int(n) for name, n in rows.fetchall()}

    # The table's own patients were checked when it was read; tags may put one patient in two splits.
    split = f"""SELECT count(*) FROM (SELECT patient_id FROM read_parquet({series}) WHERE split <> 'unknown'
    GROUP BY patient_id HAVING count(DISTINCT split) > 1)"""
    if n := cursor.execute(split).fetchone()[0]:
        logger.warning("%d patients are in more than one split; correct the splits table", n)
    private_files = f"read_parquet({quote(out / 'private' / 'files.parquet')})"
    if n := cursor.execute(
        f"SELECT count(*) FROM {private_files} WHERE reason IS NULL AND regexp_matches(path, ?)", [LABELS]
    ).fetchone()[0]:
        logger.warning(
            "%d used files lie in folders that are named as those of label maps are (labels, labelsTr, masks ...) and count as images, because "
            "a file does not say which it is; where they are label maps, index the folders of images alone into a new archive",
            n,
        )
    usable = "status <> 'rejected'"
    reasons = counts("reason", files, "reason IS NOT NULL")
    used = counts("reason", files, "reason IS NULL").get("None", 0)
    total = sum(counts("status", series, "true").values())
    domains = counts("domain", series, usable)
    return IndexSummary(
        n_files_seen=used + sum(reasons.values()),
        n_files_used=used,
        n_files_scanned=scanned,
        n_series=total,
        n_series_usable=sum(domains.values()),
        reasons=reasons,
        domains=domains,
        splits=counts("split", series, usable),
    )
