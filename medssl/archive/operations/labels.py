"""Join clinicians' labels to series through the owner-only part of an index.

The label table is a CSV with a key, by which the hospital knows an image, and columns of labels. What comes out has the
pseudonymous series id instead of the key. A label counts only where the key leads to one study, patient or file; what does
not match or could mean several is counted by reason and never printed.

Labels leave the private part here, so they must be labels: numbers, or few short words. Columns whose name or content
looks like an identifier, a date or free text are refused; `columns` names those to take.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medssl.archive._parquet import TEMPORARY
from medssl.archive.ids import normalise
from medssl.archive.operations.owner import LISTED, owner_files, owner_series, study_uid_of
from medssl.archive.table import Archive, SeriesRow
from medssl.errors import RequestError, StoreError, near

KEYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "accession": (("accession", "accessionnumber", "accession_number", "accessionno"),),
    "mrn_date": (
        ("mrn", "patientid", "patient_id", "patient"),
        ("date", "studydate", "study_date", "examdate", "exam_date"),
    ),
    "study_uid": (("study_uid", "studyuid", "studyinstanceuid", "study_instance_uid"),),
    "sop_uid": (("sop_uid", "sopuid", "sopinstanceuid", "sop_instance_uid"),),
    "path": (("path", "file", "filename", "file_name", "filepath"),),
}
"""Way of joining -> the accepted names of its key columns, compared without case and spaces."""

REASONS: dict[str, str] = {
    "matched": "led to one study, patient and date, or file",
    "no_key": "the key is empty",
    "bad_date": "the date is not YYYYMMDD, YYYY-MM-DD or DD.MM.YYYY",
    "no_match": "the index has nothing under this key",
    "no_usable_series": "found, but no series of it can be used or is selected",
    "several_studies": "the key stands for more than one study",
    "several_patients": "the key stands for more than one patient",
    "several_files": "the key stands for files of more than one series",
    "conflicting_labels": "another line gives the same series other labels",
    "repeated": "another line says the same",
}
"""What became of a line."""

MAX_WORDS = 64
MAX_LENGTH = 40
_NAMES = re.compile(
    r"(^|_)(name|surname|firstname|lastname|mrn|ssn|nhs|dob|birth\w*|date|datetime|time|accession\w*|uid|uids|\w*uid|id|patient\w*|address|street|"
    r"zip|postcode|phone|tel|fax|email|mail|url|ip|insurance\w*|account\w*|plate|device|serial\w*|report\w*|comment\w*|text|note|notes|"
    r"history|physician\w*|doctor|reader|institution\w*|hospital|path|file\w*)($|_)"
)
_DATE = re.compile(
    r"(?<!\d)((19|20)\d{2}(0[1-9]|1[0-2])[0-3]\d|(19|20)\d{2}[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./](19|20)\d{2})(?!\d)"
)
_LOOKS: dict[str, re.Pattern[str]] = {
    "a UID": re.compile(r"\d+(\.\d+){3,}"),
    "a date": _DATE,
    "an address": re.compile(r"@|://|\\\\|/\w+/"),
    "a name": re.compile(r"\w\^\w"),
}
"""Of words; numbers are judged as a column."""


@dataclass
class Attached:
    """What `attach` did.

    Args:
        n_lines: Lines of the label table.
        n_series: Series that got labels.
        n_patients: Patients they belong to.
        columns: Label columns written.
        lines: What became of the lines: reason -> number, see `REASONS`.
    """

    n_lines: int
    n_series: int = 0
    n_patients: int = 0
    columns: list[str] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)


def attach(
    archive: Archive,
    table: Path,
    out: Path,
    *,
    by: str,
    columns: Sequence[str] = (),
    where: str | None = None,
) -> Attached:
    """Write labels by series id.

    Args:
        archive: The index.
        table: CSV of labels.
        out: CSV to write: `series_id` and the label columns, one line per series, mode 0600.
        by: Way of joining, a key of `KEYS`. A study's labels go to all its usable series that `where` selects.
        columns: Label columns to take; all but the key without it.
        where: SQL condition on the series to label, for instance `modality = 'CT' and best_in_study`.

    Raises:
        RequestError: The table cannot be read, lacks a column, or a label column looks like an identifier. Nothing was written.
        StoreError: Writing failed.
    """
    if by not in KEYS:
        raise RequestError(f"by: {by!r}{near(by, KEYS)}; accepted are {', '.join(KEYS)}")
    header, lines = read_labels(table)
    keys = [_column(header, names, table, by) for names in KEYS[by]]
    labels = _label_columns(header, keys, columns, table)
    rows = {row.series_id: row for row in archive.select(where)}
    finder = _Finder(archive, by, [tuple(line[name] for name in keys) for line in lines])
    answers = [finder.find(tuple(line[name] for name in keys)) for line in lines]
    own = [
        {*(normalise(line[name]) for name in keys), *(word for one in series for word in finder.identities.get(one, ()))}
        for line, (_, series) in zip(lines, answers)
    ]
    _check_labels(labels, lines, own, {word for ids in finder.identities.values() for word in ids})
    done = Attached(len(lines), columns=labels)
    found: dict[str, tuple[str, ...]] = {}
    disputed: set[str] = set()
    outcome: list[tuple[str, list[str]]] = []
    for line, (reason, series) in zip(lines, answers):
        usable = [name for name in series if name in rows]
        if reason == "matched" and not usable:
            reason = "no_usable_series"
        values = tuple(line[name] for name in labels)
        if reason == "matched":
            if any(found.get(name, values) != values for name in usable):
                disputed |= set(usable)
            elif all(name in found for name in usable):
                reason = "repeated"
            found.update({name: values for name in usable if name not in found})
        outcome.append((reason, usable))
    counts: Counter[str] = Counter()
    for reason, usable in outcome:
        in_dispute = reason in ("matched", "repeated") and any(name in disputed for name in usable)
        counts["conflicting_labels" if in_dispute else reason] += 1
    found = {name: values for name, values in found.items() if name not in disputed}
    done.lines = {name: counts[name] for name in REASONS if counts[name]}
    done.n_series, done.n_patients = len(found), len({rows[name].patient_id for name in found})
    _write(out, labels, found)
    return done


def read_labels(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the header and the lines of a label table.

    Raises:
        RequestError: It cannot be read, has no lines, or names a column twice.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle, restkey="")
            header = [str(name).strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            lines = [{name: str(row.get(name) or "").strip() for name in header} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise RequestError(f"{path} cannot be read ({type(err).__name__}); a CSV with a header line is needed") from err
    if len(set(header)) != len(header) or not lines:
        raise RequestError(
            f"{path}: {'a column is named twice' if lines else 'no lines'}; a CSV with a header line and labels is needed"
        )
    return header, lines


def _plain(name: str) -> str:
    return name.lower().replace(" ", "_").replace("-", "_")


def _column(header: Sequence[str], names: Sequence[str], table: Path, by: str) -> str:
    found = [name for name in header if _plain(name) in names or _plain(name).replace("_", "") in names]
    if len(found) != 1:
        raise RequestError(
            f"{table}: {'no' if not found else 'more than one'} column for --by {by}; exactly one named {names[0]} "
            f"(or {', '.join(names[1:])}) is needed"
        )
    return found[0]


def _label_columns(header: Sequence[str], keys: Sequence[str], wanted: Sequence[str], table: Path) -> list[str]:
    for name in wanted:
        if name not in header:
            raise RequestError(f"{table}: no column {name!r}{near(name, header)} among {', '.join(header)}")
        if name in keys:
            raise RequestError(f"column {name!r} is the key; it stays behind: name label columns only")
    labels = list(wanted) or [name for name in header if name not in keys]
    if not labels:
        raise RequestError(f"{table}: no label column beside the key")
    for name in labels:
        if _plain(name) == "series_id":
            raise RequestError(f"column {name!r} would hide the series id that is written; rename it")
        if _NAMES.search(_plain(name)):
            raise RequestError(
                f"column {name!r} is named like an identifier, a date or free text and will not be copied out of the private part; "
                "take the others with --columns, or rename it if it is a label"
            )
    return labels


def _check_labels(labels: Sequence[str], lines: Sequence[Mapping[str, str]], own: Sequence[set[str]], anybody: set[str]) -> None:
    """Refuse columns whose values are no labels; values are never part of a message.

    Args:
        labels: Columns.
        lines: Lines of the table.
        own: Per line the PatientIDs and accession numbers it belongs to, and its key.
        anybody: Those of the whole archive; words are compared with them, numbers only with those of their line.
    """
    for name in labels:
        values = [line[name] for line in lines if line[name]]
        words = {value for value in values if not _is_number(value)}
        dates = sum(bool(_DATE.fullmatch(value)) for value in values)
        known = sum(normalise(line[name]) in ids for line, ids in zip(lines, own) if line[name])
        why = ""
        if len(words) > MAX_WORDS:
            why = f"holds more than {MAX_WORDS} different words"
        if any(len(word) > MAX_LENGTH for word in words):
            why = f"holds texts of more than {MAX_LENGTH} characters"
        for what, pattern in _LOOKS.items():
            if any(pattern.search(word) for word in words):
                why = f"holds what looks like {what}"
        # One volume or one grade may look like a date or be equal to a short PatientID by chance; a column is not.
        if dates > len(values) / 2:
            why = "holds what looks like a date"
        if known > len(values) / 10 or {normalise(word) for word in words} & anybody:
            why = "holds patient identities or accession numbers of this archive"
        if why:
            raise RequestError(
                f"column {name!r} {why}; labels are numbers or few short words: take the other columns with --columns, or code this one"
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class _Finder:
    """Looks keys up in the private tables.

    Args:
        archive: The index.
        by: Way of joining.
        keys: The keys that will be asked for.
    """

    def __init__(self, archive: Archive, by: str, keys: Sequence[tuple[str, ...]]) -> None:
        self._by = by
        rows: dict[str, SeriesRow] = {row.series_id: row for row in archive.select(rejected=True)}
        self._rows = rows
        owner = owner_series(archive, ["accession", "mrn", "study_date", "study_uid", "uids"])
        self.identities = {
            row["series_id"]: {normalise(row[name]) for name in ("accession", "mrn") if row[name]} for row in owner.rows
        }
        self._index: dict[tuple[str, ...], list[str]] = defaultdict(list)
        if by in ("sop_uid", "path"):
            self._add_files(archive, {key[0] for key in keys if key[0]})
        else:
            needed = {"accession": ("accession",), "mrn_date": ("mrn", "study_date"), "study_uid": ()}[by]
            self._need(by, [name for name in owner.missing if name in needed], archive)
            for record in owner.rows:
                if record["series_id"] in rows:
                    key = self._key_of(record)
                    if key is not None:
                        self._index[key].append(record["series_id"])
            if by == "study_uid" and not self._index:
                self._need(by, ["study_uid"], archive)

    def _need(self, by: str, missing: Sequence[str], archive: Archive) -> None:
        missing = [name for name in missing if name != "series_id"]
        if missing:
            raise RequestError(
                f"the index {archive.path} holds no {' and no '.join(missing)}, so labels cannot be joined by {by}: the files name none, or "
                f"an older version made it (run `medssl index` again); other ways are {', '.join(name for name in KEYS if name != by)}"
            )

    def _key_of(self, record: Mapping[str, Any]) -> tuple[str, ...] | None:
        if self._by == "accession":
            return (normalise(record["accession"]),) if record["accession"] else None
        if self._by == "study_uid":
            uid = study_uid_of(dict(record))
            return (normalise(uid),) if uid else None
        day = read_date(str(record["study_date"] or ""))
        return (normalise(record["mrn"]), day) if record["mrn"] and day else None

    def _add_files(self, archive: Archive, wanted: set[str]) -> None:
        if self._by == "sop_uid":
            table = owner_files(archive, ["sop_uid"], f"sop_uid {LISTED}", sorted(wanted))
            self._need(self._by, table.missing, archive)
            for file in table.rows:
                self._index[(file["sop_uid"],)].append(file["series_id"])
            return
        # A path of the table is the end of a path of the archive: of a file, or of the folder that holds it.
        ends: dict[str, set[str]] = defaultdict(set)
        for clean in filter(None, map(_clean, wanted)):
            ends[clean.rpartition("/")[2]].add(clean)
        parts = "string_split(path, '/')"
        table = owner_files(archive, ["path"], f"{parts}[-1] {LISTED} OR {parts}[-2] {LISTED}", sorted(ends))
        for file in table.rows:
            whole = str(file["path"])
            folder, _, name = whole.rpartition("/")
            for end, place in ((name, whole), (folder.rpartition("/")[2], folder)):
                for clean in ends.get(end, ()):
                    if place == clean or (not clean.startswith("/") and place.endswith(f"/{clean}")):
                        self._index[(clean,)].append(file["series_id"])

    def find(self, key: tuple[str, ...]) -> tuple[str, list[str]]:
        """Return a reason of `REASONS` and the series of a key."""
        if not all(key):
            return "no_key", []
        if self._by == "mrn_date":
            day = read_date(key[1])
            if day is None:
                return "bad_date", []
            key = (normalise(key[0]), day)
        elif self._by == "path":
            key = (_clean(key[0]),)
        else:
            key = (normalise(key[0]),)
        series = sorted(set(self._index.get(key, ())))
        if not series:
            return "no_match", []
        if len({self._rows[name].patient_id for name in series if name in self._rows}) > 1:
            return "several_patients", series
        if len({self._rows[name].study_id for name in series if name in self._rows}) > 1:
            return "several_studies", series
        if self._by in ("sop_uid", "path") and len(series) > 1:
            return "several_files", series
        return "matched", series


def _clean(path: str) -> str:
    clean = path.replace("\\", "/").rstrip("/")
    while clean.startswith("./"):
        clean = clean[2:]
    return clean


def read_date(text: str) -> str | None:
    """Return a date as YYYYMMDD, or None: YYYYMMDD, YYYY-MM-DD (also with . or /) and DD.MM.YYYY are read.

    Day and month around slashes mean other things in other countries and are refused.
    """
    match = re.fullmatch(r"(\d{4})([-./]?)(\d{2})\2(\d{2})", text.strip())
    if match:
        year, _, month, day = match.groups()
    else:
        match = re.fullmatch(r"(\d{1,2})\.(\d{1,2})\.(\d{4})", text.strip())
        if not match:
            return None
        day, month, year = match.groups()
    if not (1 <= int(month) <= 12 and 1 <= int(day) <= 31 and int(year) > 1900):
        return None
    return f"{year}{int(month):02d}{int(day):02d}"


def _write(out: Path, labels: Sequence[str], found: Mapping[str, tuple[str, ...]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["series_id", *labels])
    for series in sorted(found):
        writer.writerow([series, *found[series]])
    aside = out.with_name(f"{TEMPORARY}{os.getpid()}-{out.name}")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as handle:
            handle.write(text.getvalue())
        os.replace(aside, out)
    except OSError as err:
        raise StoreError(f"{out} cannot be written ({err.strerror}); name a file in a folder that you may write to") from err
    finally:
        aside.unlink(missing_ok=True)
