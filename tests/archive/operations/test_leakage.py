"""Overlap of two archives: by patient, by content across keys, by perceptual hash."""

from __future__ import annotations

from pathlib import Path

import pytest

from medssl.archive.index import index
from medssl.archive.operations.leakage import find_leakage
from medssl.archive.table import Archive
from medssl.errors import RequestError
from tests.archive.small import set_private, small_archive, write_scans


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Archive, Archive, Archive]:
    """P0 to P4; P3 to P7 with P3's image repeated and P4's new, same key; the same files under another key."""
    root = tmp_path_factory.mktemp("leak")
    one = small_archive(root / "one", 5)
    write_scans(root / "src", range(3, 4))
    write_scans(root / "src", range(4, 8), shift=100)
    index([root / "src"], root / "two", key_file=one.path / "private" / "id.key")
    index([root / "src"], root / "three")
    return one, Archive.open(root / "two"), Archive.open(root / "three")


def test_patients_and_files__under_one_key(three: tuple[Archive, Archive, Archive]) -> None:
    one, two, _ = three
    found = find_leakage(one, two)
    assert found.same_key and found.n_patients == 2 and found.n_series == (5, 5)
    assert [len(ids) for ids in found.patient_series] == [2, 2]
    same = {row.series_id for row in one.select()} & {row.series_id for row in two.select()}
    (pair,) = found.files
    assert pair[0] == pair[1] and pair[0] in same and found.found


def test_without_pixel_hashes__nothing_was_compared_and_that_is_said(three: tuple[Archive, Archive, Archive]) -> None:
    one, two, _ = three
    found = find_leakage(one, two)
    assert found.content is None and found.perceptual is None
    (first, second) = (note for note in found.notes if "were not compared" in note)
    assert "none of the 5 series of the first archive" in first and "the second archive" in second and "--pixels" in first
    nobody = find_leakage(one, two, where="modality = 'CT'")  # no series at all: that is a comparison, with nothing in it
    assert sum("were not compared" in note for note in nobody.notes) == 1


def test_other_key__patients_are_not_compared_and_files_are(three: tuple[Archive, Archive, Archive]) -> None:
    one, _, other = three
    found = find_leakage(one, other)
    assert not found.same_key and found.n_patients is None and found.patient_series == ([], [])
    assert len(found.files) == 1
    assert any("patients were not compared" in note and "different id keys" in note for note in found.notes)
    nothing = find_leakage(one, other, where=f"series_id <> '{found.files[0][0]}'")
    assert nothing.files == [] and not nothing.found


def test_pixel_hashes__match_across_keys(three: tuple[Archive, Archive, Archive]) -> None:
    one, _, other = three
    file_pair = find_leakage(one, other).files[0]
    left = [row.series_id for row in one.select() if row.series_id != file_pair[0]]
    right = [row.series_id for row in other.select() if row.series_id != file_pair[1]]
    base = 0x0F0F_1234_5678_9ABC
    set_private(
        one, {left[0]: {"content_hash": "c1", "perceptual_hash": f"{base:016x}"}, left[1]: {"perceptual_hash": f"{base ^ 7:016x}"}}
    )
    set_private(other, {right[0]: {"content_hash": "c1", "perceptual_hash": f"{base:016x}"}})
    found = find_leakage(one, other, distance=4)
    assert found.files == [file_pair] and found.content == [(left[0], right[0])]
    assert found.perceptual == [(left[1], right[0], 3)]  # the certain pair is not listed again
    assert find_leakage(one, other, distance=2).perceptual == []
    assert any("4 of 5 series of the first archive" in note for note in found.notes)


def test_one_archive__two_selections(three: tuple[Archive, Archive, Archive]) -> None:
    one, _, _ = three
    ids = [row.series_id for row in one.select()]
    found = find_leakage(one, one, where=f"series_id <= '{ids[1]}'", against_where=f"series_id > '{ids[1]}'")
    assert found.n_series == (2, 3) and found.n_patients == 0
    with pytest.raises(RequestError, match="5 series are on both sides"):
        find_leakage(one, one)
    with pytest.raises(RequestError, match="0 to 16 bits"):
        find_leakage(one, one, distance=17)


def test_unknown_patients__are_noted(tmp_path: Path) -> None:
    write_scans(tmp_path / "src", range(2), PatientID="")
    index([tmp_path / "src"], tmp_path / "a")
    index([tmp_path / "src"], tmp_path / "b", key_file=tmp_path / "a" / "private" / "id.key")
    found = find_leakage(Archive.open(tmp_path / "a"), Archive.open(tmp_path / "b"))
    assert found.n_patients == 2  # the same studies
    assert sum("no usable patient identity" in note for note in found.notes) == 2
