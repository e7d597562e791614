"""Split the patients of an index into train, val and test.

Algorithm. Rows that must not be torn apart form a *unit*: rows of one patient, of one `pair_group`, of two patients whom
the owner says are one person, of one pixel content, and rows that one instance UID ties together. Then:

1. A unit that was decided before keeps its split. Decisions of a splits table come first, then those of earlier runs,
   which `private/splits.parquet` holds.
2. The other units are put into strata (the values of the columns `by` over the unit's usable rows) and, within each, into
   the order of a hash of seed and patient id. The patient id is itself a keyed hash, so the order is nobody's choice and
   says nothing about the patient.
3. One after the other they go where most is missing: to the split with the largest shortfall, in its stratum and over
   all together, against the fractions asked for. This keeps every stratum and the whole within a few units of the
   fractions, which a mere threshold on the hash does not.
4. The decisions are written down.

Patients added later are new units and fill what is missing; nothing decided moves. One thing does move a unit, and is
counted: when new evidence (a merge table, twins) joins units of different splits, all follow the most exposed one, train
before val before test, because who was trained on cannot be tested on.

Rows without a usable patient identity (`patient_unknown`) may belong to anybody, also to somebody in another split. Alone
they stay `unknown`; tied to a known patient they take them to train. They are never in val or test.
"""

from __future__ import annotations

import csv
import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from medssl.archive._parquet import connect, write_table
from medssl.archive.ids import normalise
from medssl.archive.operations.decisions import SPLIT_COLUMNS, load_series, read_splits_decided, write_series
from medssl.archive.operations.owner import LISTED, locked, owner_files, owner_key, owner_series
from medssl.archive.table import Archive, SeriesRow
from medssl.errors import RequestError, near

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
"""From the most to the least exposed."""
STRATA = ("modality", "domain", "site", "vendor", "sex", "age_band", "year", "body_region", "kind", "role", "scanner_id")
"""Columns to stratify by: closed vocabularies and the user's own names."""


@dataclass
class Unit:
    """Rows that stay together.

    Args:
        series_ids: Its rows.
        patients: Its patients.
        usable: Whether any row can be read as an image.
        stratum: Values of the columns to stratify by.
        anonymous: Patients whose identity is unknown.
        given: Splits that a table or an earlier run decided for its rows.
    """

    series_ids: list[str] = field(default_factory=list)
    patients: set[str] = field(default_factory=set)
    usable: bool = False
    stratum: tuple[str, ...] = ()
    anonymous: set[str] = field(default_factory=set)
    given: set[str] = field(default_factory=set)


@dataclass
class SplitSummary:
    """What `split_archive` did.

    Args:
        patients: Split -> patients with a usable row.
        series: Split -> usable rows.
        n_kept: Patients who had a split already.
        n_drawn: Patients who got one now.
        n_moved: Patients whom new evidence ties to a more exposed split, or whom a splits table has put elsewhere since.
        n_no_patient: Usable rows left `unknown` because no patient is known.
        n_torn: Patients whom the splits table itself puts into two splits; its word stands.
        strata: Stratum -> split -> patients.
        notes: What could not be looked at.
    """

    patients: dict[str, int] = field(default_factory=dict)
    series: dict[str, int] = field(default_factory=dict)
    n_kept: int = 0
    n_drawn: int = 0
    n_moved: int = 0
    n_no_patient: int = 0
    n_torn: int = 0
    strata: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_fractions(text: str) -> dict[str, float]:
    """Return the fractions of `train=0.8,val=0.1,test=0.1`.

    Raises:
        RequestError: A part cannot be read, names no split, or they do not add up to 1.
    """
    found: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if name not in SPLITS or not sign or not 0 <= number <= 1 or name in found:
            hint = "" if name in SPLITS else near(name, SPLITS)
            raise RequestError(
                f"fractions: {part!r}{hint}; {', '.join(SPLITS)} are accepted, each once with a number from 0 to 1, "
                "for instance train=0.8,val=0.1,test=0.1"
            )
        found[name] = number
    if abs(sum(found.values()) - 1) > 1e-6:
        raise RequestError(f"fractions: they add up to {sum(found.values()):g}; they must add up to 1")
    return {name: found.get(name, 0.0) for name in SPLITS}


def split_archive(
    archive: Archive,
    fractions: Mapping[str, float],
    *,
    by: Sequence[str] = (),
    seed: int = 0,
    merge: Path | None = None,
    key_file: Path | None = None,
    redraw: bool = False,
) -> SplitSummary:
    """Give every patient of an index a split and write it into `series.parquet`.

    Args:
        archive: The index; its folder must be writable.
        fractions: Of patients, for train, val and test; they add up to 1.
        by: Columns whose values keep these fractions each, see `STRATA`.
        seed: Another one draws another split; only for what is not decided yet.
        merge: CSV `patient,same_as[,issuer,same_as_issuer]`: PatientIDs of one person.
        key_file: The owner's id key where it is not inside the index; only a merge table needs it.
        redraw: Forget what earlier runs drew (a splits table stays). Runs made with the old split are no longer disjoint
            from the new test patients.

    Raises:
        RequestError: A fraction, a column or the merge table is wrong. Nothing was written.
        StoreError: Writing failed; run again.
    """
    if sorted(fractions) != sorted(SPLITS) or abs(sum(fractions.values()) - 1) > 1e-6 or min(fractions.values()) < 0:
        raise RequestError(f"fractions: {dict(fractions)}; train, val and test are needed and add up to 1")
    for name in by:
        if name not in STRATA:
            raise RequestError(f"by: {name!r}{near(name, STRATA)}; accepted are {', '.join(STRATA)}")
    private = archive.path / "private"
    with locked(archive):
        rows = archive.select(rejected=True)
        decided = read_splits_decided(private)
        summary = SplitSummary()
        ties = [*_ties(archive, rows, summary), *_merged(archive, rows, merge, key_file)]
        if redraw:
            drawn = {patient for patient, (_, origin) in decided.items() if origin == "drawn"}
            rows = [_undecided(row) if row.patient_id in drawn and row.split == decided[row.patient_id][0] else row for row in rows]
            decided = {patient: value for patient, value in decided.items() if patient not in drawn}
        chosen, decisions = assign(rows, fractions, decided, by=by, seed=seed, ties=ties, summary=summary)
        records = ({"patient_id": who, "split": split, "origin": origin} for who, (split, origin) in sorted(decisions.items()))
        write_table(private / "splits.parquet", SPLIT_COLUMNS, records)
        _write(archive, chosen)
    return summary


def assign(
    rows: Sequence[SeriesRow],
    fractions: Mapping[str, float],
    decided: Mapping[str, tuple[str, str]],
    *,
    by: Sequence[str] = (),
    seed: int = 0,
    ties: Iterable[Sequence[str]] = (),
    summary: SplitSummary | None = None,
) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """Choose a split for every row.

    Args:
        rows: All rows of an index.
        fractions: For train, val and test.
        decided: patient_id -> (split, origin) of earlier runs.
        by: Columns to stratify by.
        seed: Seed.
        ties: Groups of series ids that stay together beyond patient and pair group.
        summary: Filled in when given.

    Returns:
        series_id -> split, and the decisions to keep: patient_id -> (split, origin).
    """
    summary = SplitSummary() if summary is None else summary
    by_id = {row.series_id: row for row in rows}
    # What a row says that no earlier run decided comes from a splits table.
    table = {row.series_id for row in rows if row.split in SPLITS and decided.get(row.patient_id, ("", ""))[0] != row.split}
    units = build_units(rows, ties, decided, by)
    result: dict[str, str] = {}
    for unit in units:
        said = {by_id[series].split for series in unit.series_ids if series in table}
        split = next((name for name in SPLITS if name in (said or unit.given)), "unknown")
        if unit.anonymous and not said and (unit.given or unit.anonymous != unit.patients):
            split = "train"
        if split != "unknown":
            result[_name(unit)] = split
    _draw(
        [unit for unit in units if unit.usable and not unit.anonymous and _name(unit) not in result], units, result, fractions, seed
    )
    chosen: dict[str, str] = {}
    decisions = dict(decided)
    for unit in units:
        split = result.get(_name(unit), "unknown")
        for series in unit.series_ids:
            hidden = by_id[series].patient_id in unit.anonymous and split != "train"
            chosen[series] = by_id[series].split if series in table else ("unknown" if hidden else split)
        for patient in unit.patients if split != "unknown" else ():
            before = decided.get(patient, ("", ""))[0]
            if before == split or (patient in unit.anonymous and split != "train"):
                continue
            summary.n_moved += before != ""
            said_so = any(by_id[series].patient_id == patient for series in unit.series_ids if series in table)
            decisions[patient] = (split, "table" if said_so else "drawn")
    _count(summary, units, result, by_id, chosen, decided, table)
    return chosen, decisions


def build_units(
    rows: Sequence[SeriesRow], ties: Iterable[Sequence[str]], decided: Mapping[str, tuple[str, str]], by: Sequence[str]
) -> list[Unit]:
    """Return the units of an index, ordered by their first patient."""
    parent: dict[Hashable, Hashable] = {}

    def find(x: Hashable) -> Hashable:
        while parent.setdefault(x, x) != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    for row in rows:
        parent[find(("series", row.series_id))] = find(("patient", row.patient_id))
        if row.pair_group is not None:
            parent[find(("pair", row.pair_group))] = find(("patient", row.patient_id))
    for first, *others in (group for group in ties if group):
        for other in others:
            parent[find(("series", other))] = find(("series", first))
    units: dict[Hashable, Unit] = defaultdict(Unit)
    values: dict[Hashable, list[set[str]]] = defaultdict(lambda: [set() for _ in by])
    identified: set[str] = {row.patient_id for row in rows if "patient_unknown" not in row.quality_flags}
    for row in rows:
        place = find(("series", row.series_id))
        unit = units[place]
        unit.series_ids.append(row.series_id)
        unit.patients.add(row.patient_id)
        unit.usable |= row.status != "rejected"
        if row.patient_id not in identified:
            unit.anonymous.add(row.patient_id)
        if row.split in SPLITS:
            unit.given.add(row.split)
        if row.patient_id in decided:
            unit.given.add(decided[row.patient_id][0])
        if row.status != "rejected":
            for seen, name in zip(values[place], by):
                seen.add(_word(getattr(row, name)))
    for place, unit in units.items():
        unit.stratum = tuple("+".join(sorted(seen)) for seen in values[place])
    return sorted(units.values(), key=_name)


def _draw(free: Sequence[Unit], units: Sequence[Unit], result: dict[str, str], fractions: Mapping[str, float], seed: int) -> None:
    """Put free units where most is missing, stratum by stratum in hash order."""
    whole: Counter[str] = Counter()
    strata: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for unit in units:
        split = result.get(_name(unit))
        if unit.usable and split is not None:
            whole[split] += 1
            strata[unit.stratum][split] += 1
    open_to = [name for name in SPLITS if fractions[name] > 0]
    for unit in sorted(free, key=lambda unit: (unit.stratum, order_of(seed, _name(unit)))):
        counts = strata[unit.stratum]

        def missing(name: str, counts: Counter[str] = counts) -> float:
            return sum(fractions[name] * (c.total() + 1) - c[name] for c in (counts, whole))

        split = max(open_to, key=missing)
        result[_name(unit)] = split
        whole[split] += 1
        counts[split] += 1


def order_of(seed: int, patient_id: str) -> str:
    """Return the place of a unit in the order of drawing."""
    return hashlib.blake2b(f"{seed} {patient_id}".encode(), digest_size=16).hexdigest()


def _name(unit: Unit) -> str:
    return min(unit.patients)


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return "+".join(sorted(str(part) for part in value)) or "unknown"
    return "unknown" if value is None else str(value)


def _undecided(row: SeriesRow) -> SeriesRow:
    return SeriesRow(**{**asdict(row), "split": "unknown"})


def _count(
    summary: SplitSummary,
    units: Sequence[Unit],
    result: Mapping[str, str],
    by_id: Mapping[str, SeriesRow],
    chosen: Mapping[str, str],
    decided: Mapping[str, tuple[str, str]],
    table: set[str],
) -> None:
    patients: dict[str, set[str]] = defaultdict(set)
    strata: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys((*SPLITS, "unknown"), 0))
    torn: dict[str, set[str]] = defaultdict(set)
    series = Counter({name: 0 for name in (*SPLITS, "unknown")})
    for series_id, split in chosen.items():
        row = by_id[series_id]
        torn[row.patient_id].add(split)
        if row.status != "rejected":
            series[split] += 1
            patients[split].add(row.patient_id)
            summary.n_no_patient += split == "unknown" and "patient_unknown" in row.quality_flags
    for unit in units:
        split = result.get(_name(unit), "unknown")
        if unit.usable:
            strata[", ".join(unit.stratum) or "all"][split] += 1
        given = {by_id[series_id].patient_id for series_id in unit.series_ids if series_id in table}
        for patient in unit.patients - unit.anonymous if unit.usable and split != "unknown" else ():
            summary.n_kept += patient in decided or patient in given
            summary.n_drawn += patient not in decided and patient not in given
    summary.patients = {name: len(patients[name]) for name in (*SPLITS, "unknown")}
    summary.series = dict(series)
    summary.strata = {name: dict(counts) for name, counts in sorted(strata.items())}
    summary.n_torn = sum(len(splits - {"unknown"}) > 1 for splits in torn.values())
    if summary.n_torn:
        logger.warning("%d patients are in more than one split; the splits table says so: correct it", summary.n_torn)


def _ties(archive: Archive, rows: Sequence[SeriesRow], summary: SplitSummary) -> list[list[str]]:
    """Return groups of series that share pixels or an instance UID that is in conflict."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    owner = owner_series(archive, ["content_hash"])
    if "content_hash" in owner.missing:
        summary.notes.append("no pixel hashes (index without --pixels): equal images under two patients are not seen")
    for row in owner.rows:
        if row["content_hash"]:
            groups["content", row["content_hash"]].append(row["series_id"])
    conflict = {row.series_id for row in rows if "uid_conflict" in row.quality_flags and row.pair_group is None}
    if conflict:
        files = owner_files(archive, ["sop_uid"], f"series_id {LISTED}", sorted(conflict))
        if "sop_uid" in files.missing:
            summary.notes.append("uid_conflict: no instance UIDs in the index, so all rows with this flag stay together")
            groups["conflict", ""] = sorted(conflict)
        for file in files.rows:
            if file["sop_uid"]:
                groups["sop", file["sop_uid"]].append(file["series_id"])
    return [sorted(set(group)) for group in groups.values() if len(set(group)) > 1]


def _merged(archive: Archive, rows: Sequence[SeriesRow], merge: Path | None, key_file: Path | None) -> list[list[str]]:
    """Return pairs of series, one of each of two patients whom the owner's table joins."""
    if merge is None:
        return []
    pairs = read_merges(merge)
    key = owner_key(archive, key_file)
    owner = owner_series(archive, ["mrn", "issuer"])
    first_of: dict[str, str] = {}
    by_mrn: dict[str, set[str]] = defaultdict(set)
    patient_of = {row.series_id: row.patient_id for row in rows}
    for row in rows:
        first_of.setdefault(row.patient_id, row.series_id)
    for record in owner.rows:
        if record["mrn"] and record["series_id"] in patient_of:
            by_mrn[normalise(record["mrn"])].add(patient_of[record["series_id"]])
    sites = sorted({row.site for row in rows})
    if key is None and not by_mrn:
        raise RequestError(
            f"merge {merge}: the index keeps no PatientIDs and its id key is not at hand; give the key with --key-file"
        )
    found = []
    for line, pair in enumerate(pairs, start=2):
        ids = []
        for value, issuer in pair:
            issuers = [issuer] if issuer else ["", *sites]
            keyed = {key.make("patient", name, value) for name in issuers} if key is not None else set()
            known = {patient for patient in keyed if patient in first_of}
            if not issuer:
                known |= by_mrn.get(normalise(value), set())
            if len(known) > 1:
                raise RequestError(
                    f"merge {merge}, line {line}: a PatientID stands for {len(known)} patients of different issuers; "
                    "add the columns issuer and same_as_issuer"
                )
            ids += sorted(known)
        if len(set(ids)) == 2:
            found.append([first_of[patient] for patient in ids])
    return found


def read_merges(path: Path) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Read a merge table: ((PatientID, issuer), (PatientID, issuer)) per line.

    Raises:
        RequestError: It cannot be read or lacks a column.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            names = {str(name).strip().lower() for name in reader.fieldnames or ()}
            rows = [{str(name).strip().lower(): str(value or "").strip() for name, value in row.items()} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise RequestError(
            f"merge {path} cannot be read ({type(err).__name__}); a CSV with columns patient,same_as is needed"
        ) from err
    if not {"patient", "same_as"} <= names:
        raise RequestError(f"merge {path}: columns patient,same_as (and optionally issuer,same_as_issuer) are needed")
    return [
        ((row["patient"], row.get("issuer", "")), (row["same_as"], row.get("same_as_issuer", row.get("issuer", ""))))
        for row in rows
        if row["patient"] and row["same_as"]
    ]


def _write(archive: Archive, chosen: Mapping[str, str]) -> None:
    connection = connect()
    try:
        load_series(archive, connection)
        connection.execute("CREATE TABLE chosen (series_id VARCHAR, split VARCHAR)")
        names, splits = list(chosen), list(chosen.values())
        connection.execute("INSERT INTO chosen SELECT unnest(?::VARCHAR[]), unnest(?::VARCHAR[])", [names, splits])
        connection.execute("UPDATE s SET split = c.split FROM chosen c WHERE s.series_id = c.series_id")
        write_series(archive, connection)
    finally:
        connection.close()
