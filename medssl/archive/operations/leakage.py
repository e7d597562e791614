"""What two archives have in common: patients, images, near-duplicates.

Four kinds of evidence, from certain to suspected:

- *patients*: equal pseudonymous patient ids. They compare only when both indexes were made with one id key.
- *files*: a file of the same bytes. Its digest is not keyed, so that files compare across keys.
- *content*: the same hash over canonical pixels. Not keyed either; after de-identification or conversion it alone can still match.
- *perceptual*: 64-bit perceptual hashes that differ in few bits. A suspicion, not a proof: two normal chest X-rays may
  look alike. Pairs that are certain already are not listed again.

The last two need `medssl index --pixels` on both sides. What was not compared is None, which is not the same as nothing found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from medssl.archive._parquet import connect, quote
from medssl.archive.operations.owner import LISTED, owner_series
from medssl.archive.pixels.checks import HASH_BITS, MAX_DISTANCE, NEAR_DISTANCE, near_pairs
from medssl.archive.table import Archive, SeriesRow
from medssl.errors import RequestError

Pair = tuple[str, str]


@dataclass
class Leakage:
    """What two selections have in common.

    Args:
        same_key: Whether patients could be compared.
        n_series: Rows looked at, of both.
        n_patients: Patients in both; None when they cannot be compared.
        patient_series: Series ids of these patients, of both.
        files: (series of the one, series of the other) that share the bytes of a file.
        content: The same with equal pixels; None when a side has no pixel hash at all, so that nothing was compared.
        perceptual: (series, series, bits that differ), without pairs of `files` and `content` and without series of one patient; None
            when nothing was compared.
        notes: What could not be compared, and why.
    """

    same_key: bool
    n_series: tuple[int, int]
    n_patients: int | None = None
    patient_series: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    files: list[Pair] = field(default_factory=list)
    content: list[Pair] | None = None
    perceptual: list[tuple[str, str, int]] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def found(self) -> bool:
        """Whether anything is shared or suspected to be."""
        return bool(self.n_patients or self.files or self.content or self.perceptual)


def find_leakage(
    archive: Archive,
    other: Archive,
    *,
    where: str | None = None,
    against_where: str | None = None,
    distance: int = NEAR_DISTANCE,
) -> Leakage:
    """Compare two archives, or two selections of one.

    Args:
        archive: One index.
        other: Another one, or the same; a series is not compared with itself.
        where: SQL condition on the rows of the first, for instance `split = 'train'`.
        against_where: The same for the second.
        distance: Bits by which perceptual hashes may differ.

    Raises:
        RequestError: A condition cannot be used, the distance is out of range, or a series would be on both sides.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise RequestError(f"distance: {distance}; 0 to {MAX_DISTANCE} bits of {HASH_BITS} are accepted")
    one, two = archive.select(where), other.select(against_where)
    if archive.path.resolve() == other.path.resolve():
        both = {row.series_id for row in one} & {row.series_id for row in two}
        if both:
            raise RequestError(
                f"{len(both)} series are on both sides: an archive was compared with itself; "
                "give conditions that exclude each other with --where and --against-where"
            )
    same_key = archive.key_fingerprint == other.key_fingerprint
    found = Leakage(same_key, (len(one), len(two)))
    _compare_patients(found, one, two)
    found.files = sorted(set(_same_files(archive, other, one, two)))
    hashes, pictures = _hashes(found, archive, one, "the first archive"), _hashes(found, other, two, "the second archive")
    if hashes is not None and pictures is not None:
        found.content = sorted(set(_shared(_one_each(hashes, "content_hash"), _one_each(pictures, "content_hash"))))
        patients_one, patients_two = ({row.series_id: row.patient_id for row in rows} for rows in (one, two))
        found.perceptual = []
        certain = {*found.files, *found.content}
        (lefts, bits_one), (rights, bits_two) = _bits(hashes), _bits(pictures)
        for i, j, bits in zip(*(column.tolist() for column in near_pairs(bits_one, bits_two, distance))):
            left, right = lefts[i], rights[j]
            same_patient = same_key and patients_one[left] == patients_two[right]
            if (left, right) not in certain and not same_patient:
                found.perceptual.append((left, right, bits))
        found.perceptual.sort(key=lambda pair: (pair[2], pair[0], pair[1]))
    return found


def _compare_patients(found: Leakage, one: Sequence[SeriesRow], two: Sequence[SeriesRow]) -> None:
    if not found.same_key:
        found.notes.append(
            "patients were not compared: the two indexes have different id keys, under which one person has two ids; "
            "only equal bytes and pixel hashes can match"
        )
        return
    shared = {row.patient_id for row in one} & {row.patient_id for row in two}
    found.n_patients = len(shared)
    found.patient_series = (
        [row.series_id for row in one if row.patient_id in shared],
        [row.series_id for row in two if row.patient_id in shared],
    )
    for rows, name in ((one, "first"), (two, "second")):
        n = sum("patient_unknown" in row.quality_flags for row in rows)
        if n:
            found.notes.append(f"{n} series of the {name} selection have no usable patient identity: their people may be in both")


def _same_files(archive: Archive, other: Archive, one: Sequence[SeriesRow], two: Sequence[SeriesRow]) -> Iterator[Pair]:
    """Yield pairs of series that share the bytes of a file."""
    left, right = (quote(index.path / "private" / "files.parquet") for index in (archive, other))
    connection = connect()
    try:
        pairs = connection.execute(
            f"SELECT DISTINCT a.series_id, b.series_id FROM read_parquet({left}) a JOIN read_parquet({right}) b USING (digest) "
            f"WHERE digest <> '' AND a.series_id {LISTED} AND b.series_id {LISTED}",
            [[row.series_id for row in one], [row.series_id for row in two]],
        ).fetchall()
    finally:
        connection.close()
    yield from pairs


Hashes = Mapping[str, Mapping[str, str | None]]


def _hashes(found: Leakage, archive: Archive, rows: Sequence[SeriesRow], name: str) -> Hashes | None:
    """Return series -> its pixel hashes, and note how many have none; None when none of them has any."""
    wanted = {row.series_id for row in rows}
    table = owner_series(archive, ["content_hash", "perceptual_hash"])
    hashes = {row["series_id"]: row for row in table.rows if row["series_id"] in wanted}
    if wanted and not any(row["content_hash"] or row["perceptual_hash"] for row in hashes.values()):
        found.notes.append(
            f"equal pixels and perceptual hashes were not compared: none of the {len(wanted)} series of {name} has a pixel hash; "
            "make them with `medssl index SRC... --out ARCHIVE --pixels`"
        )
        return None
    n = sum(hashes.get(series, {}).get("content_hash") is None for series in wanted)
    if n:
        found.notes.append(
            f"{n} of {len(wanted)} series of {name} have no pixel hash (not indexed with --pixels, or not read): for them only equal files are seen"
        )
    return hashes


def _one_each(hashes: Hashes, name: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for series, row in hashes.items():
        value = row[name]
        if value:
            found[value].add(series)
    return found


def _shared(one: Mapping[str, Iterable[str]], two: Mapping[str, Iterable[str]]) -> Iterator[Pair]:
    for value in one.keys() & two.keys():
        yield from ((left, right) for left in one[value] for right in two[value])


def _bits(hashes: Hashes) -> tuple[list[str], np.ndarray]:
    """Return the series that have a perceptual hash, and their hashes (N,) uint64."""
    known = {series: int(row["perceptual_hash"], 16) for series, row in hashes.items() if row["perceptual_hash"]}
    return list(known), np.array(list(known.values()), dtype=np.uint64)
