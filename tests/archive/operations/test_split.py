"""Patient-level splits: disjoint, stable under growth, close to the fractions, faithful to what the owner said."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.archive.ids import load_key
from medssl.archive.index import index
from medssl.archive.operations.decisions import apply_splits, load_series, read_splits_decided
from medssl.archive.operations.split import SPLITS, SplitSummary, assign, read_fractions, split_archive
from medssl.archive.table import Archive, SeriesRow
from medssl.errors import RequestError
from tests.archive.small import small_archive, write_scans
from tests.synthetic import oblique_volume, write_dicom_series

THIRDS = {"train": 0.8, "val": 0.1, "test": 0.1}


def row(number: int, patient: int | str, **values: object) -> SeriesRow:
    return SeriesRow(f"{number:032x}", f"{number:032x}", str(patient), **values)  # type: ignore[arg-type]


def patients_of(rows: list[SeriesRow], chosen: dict[str, str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for one in rows:
        found[chosen[one.series_id]].add(one.patient_id)
    return found


ROWS = st.lists(
    st.tuples(
        st.integers(0, 30), st.sampled_from(("CT", "MR", "US")), st.sampled_from((None, None, None, "a", "b", "c")), st.booleans()
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(ROWS, st.integers(0, 3))
def test_assign__keeps_patients_and_pairs_together_and_unknown_patients_out_of_test(
    drawn: list[tuple[int, str, str | None, bool]], seed: int
) -> None:
    rows = [
        row(n, f"anon{patient}" if anonymous else patient, modality=modality, pair_group=pair,
            quality_flags=("patient_unknown",) if anonymous else ())
        for n, (patient, modality, pair, anonymous) in enumerate(drawn)
    ]  # fmt: skip
    chosen, _ = assign(rows, THIRDS, {}, by=["modality"], seed=seed)
    groups: dict[tuple[str, str], set[str]] = defaultdict(set)
    for one in rows:
        groups["patient", one.patient_id].add(chosen[one.series_id])
        if one.pair_group:
            groups["pair", one.pair_group].add(chosen[one.series_id])
        if "patient_unknown" in one.quality_flags:
            assert chosen[one.series_id] in ("unknown", "train")
    assert all(len(splits) == 1 for splits in groups.values())


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 400), max_size=80), st.sets(st.integers(401, 800), max_size=80), st.integers(0, 3))
def test_assign__growth_moves_nobody(first: set[int], later: set[int], seed: int) -> None:
    old = [row(n, n, modality="CT" if n % 3 else "MR") for n in sorted(first)]
    new = [row(n, n, modality="CT" if n % 3 else "MR") for n in sorted(later)]
    before, decided = assign(old, THIRDS, {}, by=["modality"], seed=seed)
    summary = SplitSummary()
    after, _ = assign(old + new, THIRDS, decided, by=["modality"], seed=seed, summary=summary)
    assert {name: after[name] for name in before} == before
    assert summary.n_moved == 0 and (summary.n_kept, summary.n_drawn) == (len(old), len(new))
    assert "unknown" not in after.values()
    assert assign(old, THIRDS, {}, by=["modality"], seed=seed)[0] == before  # the same every time


@pytest.mark.parametrize("fractions", [THIRDS, {"train": 0.5, "val": 0.2, "test": 0.3}, {"train": 0.0, "val": 0.5, "test": 0.5}])
def test_assign__fractions_hold_in_every_stratum_also_after_growth(fractions: dict[str, float]) -> None:
    rows = [row(n, n // 2, modality=("CT", "MR", "US")[(n // 2) % 3], site="AB"[(n // 2) % 7 == 0]) for n in range(2400)]
    decided: dict[str, tuple[str, str]] = {}
    for grown in (600, 1000, 2400):
        chosen, decided = assign(rows[:grown], fractions, decided, by=["modality", "site"])
        for stratum in {(one.modality, one.site) for one in rows[:grown]}:
            inside = [one for one in rows[:grown] if (one.modality, one.site) == stratum]
            found = {name: len(who) for name, who in patients_of(inside, chosen).items()}
            n = sum(found.values())
            for name in SPLITS:
                assert abs(found.get(name, 0) - fractions[name] * n) <= 3
    whole = {name: len(who) for name, who in patients_of(rows, chosen).items()}
    assert all(abs(whole.get(name, 0) - fractions[name] * 1200) <= 3 for name in SPLITS)


def test_assign__many_strata_of_one_patient_still_fill_every_split() -> None:
    rows = [row(n, n, site=f"site {n}") for n in range(100)]
    chosen, _ = assign(rows, THIRDS, {}, by=["site"])
    assert Counter(chosen.values()) == {"train": 80, "val": 10, "test": 10}


def test_assign__another_seed_draws_another_split_with_the_same_counts() -> None:
    rows = [row(n, n) for n in range(200)]
    one, two = (assign(rows, THIRDS, {}, seed=seed)[0] for seed in (0, 1))
    assert one != two and Counter(one.values()) == Counter(two.values()) == {"train": 160, "val": 20, "test": 20}


def test_assign__a_tie_between_splits_follows_the_most_exposed() -> None:
    rows = [row(n, n) for n in range(40)]
    before, decided = assign(rows, THIRDS, {})
    test = next(one for one in rows if before[one.series_id] == "test")
    train = next(one for one in rows if before[one.series_id] == "train")
    summary = SplitSummary()
    after, _ = assign(rows, THIRDS, decided, ties=[[test.series_id, train.series_id]], summary=summary)
    assert after[test.series_id] == after[train.series_id] == "train" and summary.n_moved == 1
    assert {name for name in before if after[name] != before[name]} == {test.series_id}


def test_assign__a_splits_table_is_kept_and_its_patients_other_rows_follow() -> None:
    rows = [row(0, "a", split="test"), row(1, "a"), row(2, "b", split="train"), row(3, "b", split="test")]
    summary = SplitSummary()
    chosen, decisions = assign(rows, {"train": 1.0, "val": 0.0, "test": 0.0}, {}, summary=summary)
    assert [chosen[one.series_id] for one in rows] == ["test", "test", "train", "test"]
    assert decisions == {"a": ("test", "table"), "b": ("train", "table")} and summary.n_torn == 1
    # A row that a table decides later wins over what was drawn.
    _, drawn = assign([row(0, "a")], {"train": 1.0, "val": 0.0, "test": 0.0}, {})
    again, decisions = assign([replace(rows[0])], {"train": 1.0, "val": 0.0, "test": 0.0}, drawn)
    assert again == {rows[0].series_id: "test"} and decisions == {"a": ("test", "table")}


def test_assign__a_rejected_row_follows_and_does_not_count() -> None:
    rows = [row(0, "a"), row(1, "a", status="rejected"), row(2, "b", status="rejected")]
    chosen, decisions = assign(rows, {"train": 1.0, "val": 0.0, "test": 0.0}, {})
    assert [chosen[one.series_id] for one in rows] == ["train", "train", "unknown"] and set(decisions) == {"a"}


def test_assign__a_twin_without_identity_takes_its_patient_to_train() -> None:
    anonymous = row(1, "x", quality_flags=("patient_unknown",), pair_group="p")
    only_test = {"train": 0.0, "val": 0.0, "test": 1.0}
    chosen, _ = assign([row(0, "a", pair_group="p"), anonymous], only_test, {})
    assert set(chosen.values()) == {"train"}
    # Unless a table says test of the patient: then the twin is left out.
    chosen, decisions = assign([row(0, "a", pair_group="p", split="test"), anonymous], only_test, {})
    assert list(chosen.values()) == ["test", "unknown"] and "x" not in decisions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train=0.8,tset=0.2", r'did you mean "test"\?'),
        ("train=0.8", "add up to 0.8"),
        ("train=x", "'train=x'"),
        ("train=1,train=0", "once"),
    ],
)
def test_fractions__faults_named(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_fractions(text)
    with pytest.raises(RequestError) as caught:
        read_fractions("train=80")
    assert "did you mean" not in str(caught.value)  # the name is right, the number is not
    assert read_fractions("train=0.9, test=0.1") == {"train": 0.9, "val": 0.0, "test": 0.1}


def test_archive__split_is_written_and_kept_when_it_grows(tmp_path: Path) -> None:
    archive = small_archive(tmp_path, 10)
    before = archive.select()
    summary = split_archive(archive, {"train": 0.6, "val": 0.2, "test": 0.2}, by=["modality"])
    assert summary.patients == {"train": 6, "val": 2, "test": 2, "unknown": 0} and summary.n_drawn == 10
    rows = archive.select()
    assert [replace(one, split="unknown") for one in rows] == before  # nothing else has changed
    assert Archive.open(archive.path).summary["splits"] == {"train": 6, "val": 2, "test": 2}
    splits = {one.patient_id: one.split for one in rows}
    again = split_archive(archive, {"train": 0.6, "val": 0.2, "test": 0.2}, by=["modality"])
    assert again.n_drawn == 0 and again.n_kept == 10 and archive.select() == rows

    write_scans(tmp_path / "more", range(10, 14))
    index([tmp_path / "more"], archive.path)
    archive = Archive.open(archive.path)
    grown = split_archive(archive, {"train": 0.6, "val": 0.2, "test": 0.2}, by=["modality"])
    assert (grown.n_kept, grown.n_drawn, grown.n_moved) == (10, 4, 0)
    now = {one.patient_id: one.split for one in archive.select()}
    assert {name: now[name] for name in splits} == splits and len(now) == 14
    assert (archive.path / "private" / "splits.parquet").stat().st_mode & 0o077 == 0


def test_archive__indexing_again_can_take_the_decisions_up(tmp_path: Path) -> None:
    import duckdb

    archive = small_archive(tmp_path, 5)
    split_archive(archive, {"train": 0.6, "val": 0.2, "test": 0.2})
    rows = archive.select()
    index([tmp_path / "src"], archive.path)
    with duckdb.connect() as connection:
        load_series(archive, connection)
        connection.execute("UPDATE s SET split = 'unknown'")
        apply_splits(connection, archive.path / "private")
        found = connection.execute("SELECT series_id, split FROM s ORDER BY series_id").fetchall()
    assert found == [(one.series_id, one.split) for one in rows]


def test_archive__the_owners_merge_table_is_honoured(tmp_path: Path) -> None:
    archive = small_archive(tmp_path, 10)
    key = load_key(archive.path / "private" / "id.key")
    ids = {n: key.make("patient", "unknown", f"P{n:04d}") for n in range(10)}
    assert {one.patient_id for one in archive.select()} == set(ids.values())
    merge = tmp_path / "merge.csv"
    merge.write_text("patient,same_as\n" + "".join(f"P{n:04d},P{n + 1:04d}\n" for n in range(0, 10, 2)) + "P0001,ABSENT\n")
    split_archive(archive, {"train": 0.4, "val": 0.2, "test": 0.4}, merge=merge)
    splits = {one.patient_id: one.split for one in archive.select()}
    assert all(splits[ids[n]] == splits[ids[n + 1]] for n in range(0, 10, 2))
    assert Counter(splits.values()) == {"train": 4, "val": 2, "test": 4}
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RequestError, match="columns patient,same_as"):
        split_archive(archive, THIRDS, merge=tmp_path / "bad.csv")


def test_archive__redraw_forgets_the_draw_and_keeps_the_table(tmp_path: Path) -> None:
    write_scans(tmp_path / "src", range(12))
    (tmp_path / "s.csv").write_text("file,split,patient\n0003,test,P0003\n")
    index([tmp_path / "src"], tmp_path / "out", splits=tmp_path / "s.csv")
    archive = Archive.open(tmp_path / "out")
    named = next(one.patient_id for one in archive.select("split = 'test'"))
    one = split_archive(archive, {"train": 1.0, "val": 0.0, "test": 0.0})
    assert one.patients == {"train": 11, "val": 0, "test": 1, "unknown": 0} and one.n_kept == 1
    two = split_archive(archive, {"train": 0.5, "val": 0.0, "test": 0.5}, redraw=True)
    assert two.patients == {"train": 6, "val": 0, "test": 6, "unknown": 0}
    assert read_splits_decided(archive.path / "private")[named] == ("test", "table")


def test_archive__uid_conflict_and_unknown_patients(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    for n in range(6):  # 0 and 1 share instance UIDs with other pixels; 4 and 5 have no patient
        patient = f"P{n}" if n < 4 else ""
        extra = {"SOPInstanceUID": ["1.2.3", "1.2.4", "1.2.5"]} if n < 2 else {}
        write_dicom_series(tmp_path / "src" / str(n), array[..., :3] + n, affine, patient_id=patient, uid_seed=str(n), extra=extra)
    index([tmp_path / "src"], tmp_path / "out")
    archive = Archive.open(tmp_path / "out")
    conflict = archive.select("list_contains(quality_flags, 'uid_conflict')")
    assert len(conflict) == 2
    summary = split_archive(archive, {"train": 0.0, "val": 0.5, "test": 0.5})
    assert summary.n_no_patient == 2 and summary.series["unknown"] == 2
    ids = {one.series_id for one in conflict}
    assert len({one.split for one in archive.select() if one.series_id in ids}) == 1
    lost = archive.select("split = 'unknown'")
    assert all("patient_unknown" in one.quality_flags for one in lost) and len(lost) == 2


def test_archive__wrong_requests_write_nothing(tmp_path: Path) -> None:
    archive = small_archive(tmp_path, 2)
    content = (archive.path / "series.parquet").read_bytes()
    for options, message in [
        (dict(by=["modalty"]), r'did you mean "modality"'),
        (dict(merge=tmp_path / "no.csv"), "cannot be read"),
    ]:
        with pytest.raises(RequestError, match=message):
            split_archive(archive, THIRDS, **options)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="add up to 1"):
        split_archive(archive, {"train": 1.0, "val": 0.5, "test": 0.1})
    assert (archive.path / "series.parquet").read_bytes() == content
    assert not (archive.path / "private" / "splits.parquet").exists()
