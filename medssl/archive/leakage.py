"""What two archives have in common: patients, images, near-duplicates.

Three kinds of evidence, from certain to suspected:

- *patients*: equal pseudonymous patient ids. They compare only when both indexes were made with one id key.
- *content*: a file of the same bytes, or the same hash over canonical pixels. Neither is keyed, so both compare across
  keys; after de-identification or conversion only the pixel hash can still match.
- *perceptual*: 64-bit perceptual hashes that differ in few bits. A suspicion, not a proof: two normal chest X-rays may
  look alike. Pairs that are certain already are not listed again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from medssl.archive._parquet import connect, quote
from medssl.archive.owner import LISTED, owner_series
from medssl.archive.table import Archive, SeriesRow
from medssl.errors import RequestError

BITS = 64
DISTANCE = 4
"""Bits of 64 that may differ: rescaling and recompression of one image move few bits, other images about half of them."""

Pair = tuple[str, str]


@dataclass
class Leakage:
    """What two selections have in common.

    Args:
        same_key: Whether patients could be compared.
        n_series: Rows looked at, of both.
        n_patients: Patients in both; None when they cannot be compared.
        patient_series: Series ids of these patients, of both.
        content: (series of the one, series of the other) with equal bytes or equal pixels.
        perceptual: (series, series, bits that differ), without pairs of `content` and without series of one patient.
        notes: What could not be compared, and why.
    """

    same_key: bool
    n_series: tuple[int, int]
    n_patients: int | None = None
    patient_series: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    content: list[Pair] = field(default_factory=list)
    perceptual: list[tuple[str, str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def found(self) -> bool:
        """Whether anything is shared or suspected to be."""
        return bool(self.n_patients or self.content or self.perceptual)


def find_leakage(
    archive: Archive,
    other: Archive,
    *,
    where: str | None = None,
    against_where: str | None = None,
    distance: int = DISTANCE,
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
    if not 0 <= distance <= BITS // 4:
        raise RequestError(f"distance: {distance}; 0 to {BITS // 4} bits of {BITS} are accepted")
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
    certain = set(_same_files(archive, other, one, two))
    hashes, pictures = _hashes(found, archive, one, "the first archive"), _hashes(found, other, two, "the second archive")
    certain |= set(_shared(_one_each(hashes, "content_hash"), _one_each(pictures, "content_hash")))
    found.content = sorted(certain)
    patients_one, patients_two = ({row.series_id: row.patient_id for row in rows} for rows in (one, two))
    for left, right, bits in near_pairs(_bits(hashes), _bits(pictures), distance):
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


def _hashes(found: Leakage, archive: Archive, rows: Sequence[SeriesRow], name: str) -> dict[str, Mapping[str, str | None]]:
    """Return series -> its pixel hashes, and note how many have none."""
    wanted = {row.series_id for row in rows}
    table = owner_series(archive, ["content_hash", "perceptual_hash"])
    hashes: dict[str, Mapping[str, str | None]] = {row["series_id"]: row for row in table.rows if row["series_id"] in wanted}
    n = sum(hashes.get(series, {}).get("content_hash") is None for series in wanted)
    if n:
        found.notes.append(
            f"{n} of {len(wanted)} series of {name} have no pixel hash (index without --pixels): for them only equal files are seen"
        )
    return hashes


def _one_each(hashes: Mapping[str, Mapping[str, str | None]], name: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for series, row in hashes.items():
        value = row[name]
        if value:
            found[value].add(series)
    return found


def _shared(one: Mapping[str, Iterable[str]], two: Mapping[str, Iterable[str]]) -> Iterator[Pair]:
    for value in one.keys() & two.keys():
        yield from ((left, right) for left in one[value] for right in two[value])


def _bits(hashes: Mapping[str, Mapping[str, str | None]]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = defaultdict(list)
    for series, row in hashes.items():
        if row["perceptual_hash"]:
            found[int(str(row["perceptual_hash"]), 16)].append(series)
    return found


def near_pairs(one: Mapping[int, Sequence[str]], two: Mapping[int, Sequence[str]], distance: int) -> Iterator[tuple[str, str, int]]:
    """Yield all pairs whose 64-bit hashes differ in at most `distance` bits.

    Hashes within d bits of each other agree in at least one of d + 1 blocks, so only those that share a block are compared;
    the result is exact.

    Args:
        one: Hash -> names.
        two: Hash -> names.
        distance: Bits that may differ.
    """
    edges = [BITS * k // (distance + 1) for k in range(distance + 2)]
    blocks = [(low, (1 << (high - low)) - 1) for low, high in zip(edges, edges[1:])]
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for value in two:
        for k, (low, mask) in enumerate(blocks):
            buckets[k, (value >> low) & mask].append(value)
    for value, names in one.items():
        near = {other for k, (low, mask) in enumerate(blocks) for other in buckets.get((k, (value >> low) & mask), ())}
        for other in near:
            bits = (value ^ other).bit_count()
            if bits <= distance:
                yield from ((left, right, bits) for left in names for right in two[other])
