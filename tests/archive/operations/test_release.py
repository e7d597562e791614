"""Releases: patients are counted, small cells and their complements are hidden, nothing can be subtracted."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.archive.operations.facts import (
    BINS,
    SLICE_EDGES,
    SPACING_EDGES,
    TABLES,
    _cells,
    bin_names,
    bin_of,
    collect_facts,
    in_plane_mm,
    in_plane_pixels,
    slice_step_mm,
    slices,
)
from medssl.archive.operations.release import Release, aggregate, as_csv, release
from medssl.archive.table import SeriesRow
from medssl.errors import RequestError
from tests.archive.small import set_public, small_archive


def row(number: int, patient: str, **values: object) -> SeriesRow:
    return SeriesRow(f"{number:032x}", f"{number:032x}", patient, **values)  # type: ignore[arg-type]


def truth(rows: list[SeriesRow], name: str) -> Counter[str]:
    """Count patients per cell in another way: from the set of (patient, value)."""
    values: dict[str, set[str]] = {}
    for one in rows:
        values.setdefault(one.patient_id, set()).add(TABLES[name](one))
    return Counter(next(iter(found)) if len(found) == 1 else "several" for found in values.values())


def hidden_solutions(total: int, cells: dict[str, dict[str, int | None]]) -> list[set[int]]:
    """Return, per hidden cell, every number of patients that fits what was released: cells add up to the total, each has one or more."""
    hidden = [cell for cell, counts in cells.items() if counts["patients"] is None]
    rest = total - sum(counts["patients"] or 0 for counts in cells.values())
    options: list[set[int]] = [set() for _ in hidden]
    for numbers in itertools.product(range(1, rest + 1), repeat=max(len(hidden) - 1, 0)):
        last = rest - sum(numbers)
        if hidden and last >= 1:
            for place, number in zip(options, (*numbers, last)):
                place.add(number)
    return options


ROWS = st.lists(
    st.tuples(
        st.integers(0, 45),
        st.sampled_from(("CT", "CT", "CT", "CT", "CT", "MR", "MR", "US")),
        st.sampled_from(("F", "F", "F", "F", "M", "unknown")),
        st.integers(2017, 2019),
        st.sampled_from((1, 30, 30, 30, 120)),
    ),
    max_size=70,
)


@settings(max_examples=80, deadline=None)
@given(ROWS)
def test_release__no_cell_under_k_can_be_seen_or_subtracted(drawn: list[tuple[int, str, str, int, int]]) -> None:
    k = 5
    rows = [
        row(n, f"p{who}", modality=modality, sex=sex, year=year, n_slices=slices)
        for n, (who, modality, sex, year, slices) in enumerate(drawn)
    ]
    found = aggregate(rows, k)
    assert not [name for name in found.tables if name in BINS]  # only within a modality, which they follow from
    for title, cells in found.tables.items():
        name, total, inside = title, found.n_patients, rows
        if " (" in title:
            name, modality = title.removesuffix(")").split(" (")
            total = found.tables["modality"][modality]["patients"] or 0
            others = {one.patient_id for one in rows if one.modality != modality}
            inside = [one for one in rows if one.patient_id not in others]
        counts = truth(inside, name)
        assert sum(counts.values()) == total  # a partition: no union of cells says more than the cells
        assert set(cells) == set(counts)
        shown = {cell: values["patients"] for cell, values in cells.items()}
        for cell, count in shown.items():
            assert count is None or (count == counts[cell] and count >= k)
            assert count is None or cells[cell]["series"] is not None
            assert (count is None) == (cells[cell]["series"] is None)
        rest = total - sum(count or 0 for count in shown.values())
        assert rest == 0 or rest >= k  # what the total minus the rest leaves is no small group
        for count in shown.values():
            assert count is None or total - count == 0 or total - count >= k  # nor is a complement
        if rest <= 24 and sum(count is None for count in shown.values()) <= 3:
            for options in hidden_solutions(total, cells):
                assert len(options) > 1  # no hidden cell has one solution only
    for name in found.left_out:
        assert name not in found.tables


def test_release__counts_patients_and_not_series() -> None:
    rows = [row(n, f"p{n % 4}", modality="MR") for n in range(200)] + [row(200 + n, f"q{n}", modality="CT") for n in range(30)]
    found = aggregate(rows, 10)
    # 200 series of four patients are a small cell, and the only other cell would give it away
    assert found.n_patients == 34 and "modality" in found.left_out
    rows += [row(300 + n, f"r{n}", modality="US") for n in range(40)]
    cells = aggregate(rows, 10).tables["modality"]
    assert cells["US"] == {"patients": 40, "series": 40}
    assert cells["MR"] == cells["CT"] == {"patients": None, "series": None}


def test_release__a_patient_with_two_values_is_one_cell() -> None:
    rows = [row(n, f"p{n % 20}", modality="CT" if n < 20 else "MR") for n in range(40)] + [
        row(50 + n, f"q{n}", modality="CT") for n in range(15)
    ]
    found = aggregate(rows, 10)
    assert found.tables["modality"] == {"CT": {"patients": 15, "series": 15}, "several": {"patients": 20, "series": 40}}


def test_release__people_without_identity_are_left_out() -> None:
    rows = [row(n, f"anon{n}", quality_flags=("patient_unknown",)) for n in range(30)] + [row(100 + n, f"p{n}") for n in range(12)]
    found = aggregate(rows, 10)
    assert (found.n_patients, found.n_series, found.n_left_out_series) == (12, 12, 30)
    assert "30" not in json.dumps({name: value for name, value in found.content().items() if name != "tables"})


def test_release__written_as_json_and_csv(tmp_path: Path) -> None:
    archive = small_archive(tmp_path, 12)
    ids = [one.series_id for one in archive.select()]
    set_public(archive, {name: {"sex": "F" if n < 2 else "M", "site": "north"} for n, name in enumerate(ids)})
    found = release(archive, tmp_path / "rel", k=5)
    content = json.loads((tmp_path / "rel" / "release.json").read_text())
    assert content == json.loads(json.dumps(found.content()))
    assert content["n_patients"] == 12 and content["tables"]["site"] == {"north": {"patients": 12, "series": 12}}
    assert "sex" in content["left_out"] and "sex" not in content["tables"]  # 2 and 10: hiding both leaves nothing
    with open(tmp_path / "rel" / "release.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert {"table": "site", "value": "north", "patients": "12", "series": "12"} in lines
    assert {line["table"] for line in lines} == {"all", *content["tables"]}
    written = (tmp_path / "rel" / "release.json").read_text() + (tmp_path / "rel" / "release.csv").read_text()
    for one in archive.select():
        assert not any(name in written for name in (one.series_id, one.patient_id, one.study_id))
    assert archive.key_fingerprint not in written
    release(archive, tmp_path / "rel", k=6)  # again, over its own files


def test_release__refusals(tmp_path: Path) -> None:
    archive = small_archive(tmp_path, 6)
    with pytest.raises(RequestError, match="5 or more"):
        release(archive, tmp_path / "rel", k=2)
    with pytest.raises(RequestError, match=r"fewer than 10 patients.*splits table"):
        release(archive, tmp_path / "rel", k=10)
    with pytest.raises(RequestError, match="holds other things"):
        release(archive, tmp_path, k=5)
    assert not (tmp_path / "rel").exists()


def test_csv__hidden_counts_are_empty() -> None:
    found = Release(10, 60, 60, {"sex": {"F": {"patients": 30, "series": 30}, "M": {"patients": None, "series": None}}})
    assert as_csv(found).splitlines() == ["table,value,patients,series", "all,,60,60", "sex,F,30,30", "sex,M,,"]


def test_facts__geometry_of_rows() -> None:
    volume = row(0, "p", shape=(512, 400, 40), spacing_mm=(0.7, 0.8, 5.0), slice_axis=2, kind="volume")
    assert (in_plane_mm(volume), slice_step_mm(volume), in_plane_pixels(volume)) == (0.8, 5.0, 512)
    sagittal = row(0, "p", shape=(30, 256, 200), spacing_mm=(3.0, 1.0, 1.1), slice_axis=0, kind="volume")
    assert (in_plane_mm(sagittal), slice_step_mm(sagittal), in_plane_pixels(sagittal)) == (1.1, 3.0, 256)
    image = row(0, "p", shape=(2048, 1500), spacing_mm=(0.15, 0.14), kind="image")
    assert (in_plane_mm(image), slice_step_mm(image), in_plane_pixels(image)) == (0.15, None, 2048)
    clip = row(0, "p", shape=(90, 600, 800), kind="cine")
    assert (in_plane_mm(clip), in_plane_pixels(clip)) == (None, 800)


def test_bins__every_value_has_one_and_the_names_are_in_order() -> None:
    names = bin_names(SPACING_EDGES)
    assert len(names) == len(set(names)) == len(SPACING_EDGES) + 2
    assert [bin_of(value, SPACING_EDGES) for value in (0.01, 0.05, 0.051, 5.0, 5.1, None)] == [
        "up to 0.05", "up to 0.05", "0.05 to 0.1", "3 to 5", "over 5", "unknown",
    ]  # fmt: skip
    assert {bin_of(k / 100, SPACING_EDGES) for k in range(1, 700)} == set(names) - {"unknown"}


def test_facts__of_an_archive(tmp_path: Path) -> None:
    archive = small_archive(tmp_path, 3)
    facts = json.loads(json.dumps(collect_facts(archive)))
    assert facts["files"]["seen"] == facts["files"]["used"] == 6 and facts["files"]["reasons"] == []
    assert facts["series"]["usable"] == facts["series"]["patients"] == 3
    assert facts["tables"]["modality"] == [{"value": "MR", "series": 3, "patients": 3}]
    assert facts["tables"]["in_plane_spacing_mm"] == [{"value": "0.8 to 1", "series": 3, "patients": 3}]
    assert facts["geometry"][0]["step_mm"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    unknown = {one["column"]: one for one in facts["unknown"]}
    assert unknown["split"] == {"column": "split", "which": "", "series": 3, "unknown": 3} and unknown["year"]["unknown"] == 0
    assert unknown["weighting"]["which"] == "MR" and "kvp" not in unknown  # nobody asks an MR for its kVp


def test_facts__people_nobody_knows_are_no_patients() -> None:
    rows = [row(0, "p"), row(1, "q", quality_flags=("patient_unknown",)), row(2, "r", quality_flags=("patient_unknown",))]
    assert _cells(rows, lambda one: one.modality, None)[0] | {"value": ""} == {"value": "", "series": 3, "patients": 1}


def test_facts__volumes_that_name_no_slice_direction_have_that_of_the_largest_spacing() -> None:
    nifti = row(0, "p", shape=(20, 256, 240), spacing_mm=(4.0, 1.0, 0.9), kind="volume", n_slices=None)
    assert (slice_step_mm(nifti), in_plane_mm(nifti), in_plane_pixels(nifti), slices(nifti)) == (4.0, 1.0, 256, 20)
    cube = row(0, "p", shape=(200, 210, 180), spacing_mm=(1.0, 1.0, 1.0), kind="volume", n_slices=None)
    assert (slice_step_mm(cube), in_plane_mm(cube), in_plane_pixels(cube), slices(cube)) == (1.0, 1.0, 210, 180)
    bare = row(0, "p", shape=(20, 256, 240), kind="volume", n_slices=None)
    assert (slice_step_mm(bare), in_plane_mm(bare), slices(bare)) == (None, None, None)
    assert slices(row(0, "p", shape=(90, 600, 800), kind="cine", n_slices=None)) == 90
    assert slices(row(0, "p", shape=(600, 800), kind="image", n_slices=None)) == 1


def test_bins__of_whole_numbers_share_no_value() -> None:
    names = bin_names(SLICE_EDGES)
    assert names[:3] == ("1", "2 to 10", "11 to 25") and names[-2:] == ("over 800", "unknown")
    assert [bin_of(n, SLICE_EDGES) for n in (1, 2, 10, 11, 801)] == ["1", "2 to 10", "2 to 10", "11 to 25", "over 800"]
