"""Drafting a card from an index and comparing it with data."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from medssl.archive.index import index
from medssl.archive.table import Archive, SeriesRow
from medssl.cards.build import draft_card, write_card
from medssl.cards.check import check_card
from medssl.cards.count import count_files
from medssl.cards.schema import Card, dump_card, load_card, open_fields, parse_card
from medssl.errors import RequestError
from medssl.phantoms.cohort import make_cohort
from tests.cards.small_index import row, write_index


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cohort of six phantoms, some of them DICOM series, and its index."""
    root = tmp_path_factory.mktemp("cards")
    cohort = make_cohort(root / "cohort", patients=6, size=(16, 16, 16), dicom_fraction=0.5)
    index([cohort / "images"], root / "index", modality="MR", splits=cohort / "split.csv", site="Northern Hospital")
    return cohort, root / "index"


def test_draft__holds_no_id_and_no_path(phantoms: tuple[Path, Path], tmp_path: Path) -> None:
    cohort, archive = phantoms
    card = draft_card(archive, "phantoms", k=2)
    text = write_card(card, tmp_path / "phantoms.yaml").read_text()
    rows = Archive.open(archive).select(rejected=True)
    assert len(rows) >= 6
    ids = {value for each in rows for value in (each.series_id, each.study_id, each.patient_id, each.scanner_id) if value}
    digests = {digest for each in rows for digest in Archive.open(archive).digests(each.series_id)}
    assert not [value for value in ids | digests if value in text]
    assert str(cohort.parent) not in text and "phantom_0" not in text and "/" not in text and "Northern" not in text
    # what looks like an id is one of the two hashes
    assert set(re.findall(r"[0-9a-f]{32,}", text)) == {card.hashes.index}
    assert load_card(tmp_path / "phantoms.yaml") == card


def test_draft__counts_what_the_index_holds(phantoms: tuple[Path, Path]) -> None:
    card = draft_card(phantoms[1], "phantoms", k=1)
    rows = Archive.open(phantoms[1]).select()
    assert card.counts is not None
    assert (card.counts.patients, card.counts.series) == (6, 6)
    assert card.counts.files == sum(each.n_files for each in rows)
    assert card.counts.series_by["split"] == {
        name: sum(each.split == name for each in rows) for name in sorted({each.split for each in rows})
    }
    assert card.modalities == ["MR"] and card.domains == ["mri"]
    low, middle, high = card.counts.quartiles["mri"]["spacing_1_mm"]
    assert low <= middle <= high and min(each.spacing_mm[0] for each in rows if each.spacing_mm) <= middle


def test_draft__of_fewer_than_k_patients_shows_no_number(phantoms: tuple[Path, Path]) -> None:
    card = draft_card(phantoms[1], "phantoms", k=10)
    assert card.counts is not None
    assert {card.counts.patients, card.counts.studies, card.counts.series, card.counts.files} == {"hidden"}
    assert set(card.counts.series_by.values()) == set(card.counts.patients_by.values()) == {"withheld"}  # type: ignore[arg-type]
    assert card.counts.quartiles == {} and card.hashes.index is None and card.modalities == []


def test_small_cells__and_their_complements_are_hidden(tmp_path: Path) -> None:
    rows = [row(i, i, modality="CT", domain="ct", sex="F" if i % 2 else "M") for i in range(40)]
    rows += [row(100 + i, 100 + i, modality="MR", domain="mri", sex="F") for i in range(12)]
    rows += [row(200 + i, 200, modality="US", domain="ultrasound", sex="O") for i in range(30)]  # 30 series of one patient
    card = draft_card(write_index(tmp_path / "index", rows), "small", k=10)
    counts = card.counts
    assert counts is not None
    assert counts.series_by["modality"] == {"CT": 40, "MR": "hidden", "US": "hidden"}
    assert counts.patients_by["modality"] == {"CT": 40, "MR": "hidden", "US": "hidden"}
    assert counts.series_by["sex"] == {"F": 32, "M": "hidden", "O": "hidden"}
    assert counts.series_by["role"] == {"unknown": 82} and counts.patients == 53
    assert list(counts.quartiles) == []  # these rows state neither spacing nor shape


def test_series_of_unknown_people__may_all_be_of_one(tmp_path: Path) -> None:
    def unknown(number: int, **values: object) -> SeriesRow:
        return row(number, number, quality_flags=("patient_unknown",), **values)

    rows = [row(i, i, modality="CT") for i in range(20)]
    rows += [row(100 + i, 100 + i, modality="MR") for i in range(9)] + [unknown(200 + i, modality="MR") for i in range(30)]
    rows += [unknown(300 + i, modality="DX") for i in range(30)]
    counts = draft_card(write_index(tmp_path / "mixed", rows), "mixed", k=10).counts
    assert counts is not None and counts.patients == 29
    assert counts.patients_by["modality"] == counts.series_by["modality"] == {"CT": 20, "MR": "hidden", "DX": "hidden"}
    alone = write_index(tmp_path / "alone", [unknown(i, modality="DX") for i in range(30)])
    hidden, shown = (draft_card(alone, "alone", k=k).counts for k in (2, 1))
    assert hidden is not None and shown is not None
    assert hidden.series == hidden.patients == "hidden" and (shown.series, shown.patients) == (30, 1)


def test_open_fields__are_marked_and_named(phantoms: tuple[Path, Path]) -> None:
    left = open_fields(draft_card(phantoms[1], "phantoms", k=2))
    for name in ("title", "description", "licence.id", "ethics.consent", "collection.sites", "known_biases.0", "use.intended.0"):
        assert name in left


def test_check__equal_index_and_another_key(tmp_path: Path) -> None:
    rows = [row(i, i, modality="CT", domain="ct") for i in range(20)]
    card = filled(draft_card(write_index(tmp_path / "a", rows), "set", k=5))
    assert check_card(card, archive=tmp_path / "a").ok
    # other ids of the same files, as another id key gives
    others = [row(1000 + i, 500 + i, modality="CT", domain="ct") for i in range(20)]
    found = check_card(card, archive=write_index(tmp_path / "b", others, key="1" * 16))
    assert found.ok and found.compared == ("index",)


def test_check__names_every_difference(tmp_path: Path) -> None:
    rows = [row(i, i, modality="CT", domain="ct") for i in range(20)]
    card = filled(draft_card(write_index(tmp_path / "a", rows), "set", k=5))
    more = [
        *rows[:19],
        row(50, 50, modality="MR", domain="mri"),
        *(row(60 + i, 60 + i, modality="MR", domain="mri") for i in range(6)),
    ]
    found = check_card(card, archive=write_index(tmp_path / "b", more)).differences
    assert "counts.patients: the card says 20, found 26" in found
    assert "counts.series_by.modality.CT: the card says 20, found 19" in found
    assert "counts.series_by.modality.MR: the card says nothing, found 7" in found
    assert any(line.startswith("hashes.index: the card says ") for line in found)
    # the same numbers from other files: only the digest can tell
    swapped = [row(i, i, modality="CT", domain="ct") for i in range(21)][1:]
    archive = write_index(tmp_path / "c", [row(99, 99, modality="PT", status="rejected", reason="no_domain"), *swapped])
    assert [line.partition(":")[0] for line in check_card(card, archive=archive).differences] == ["hashes.index"]


def test_files__digest_is_what_a_shell_computes(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.nii.gz").write_bytes(b"one")
    (tmp_path / "deep" / "1.2.840.113").write_bytes(b"two" * 1000)
    (tmp_path / "deep" / "er" / "DICOMDIR").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "a.nii.gz")
    files, digest = count_files(tmp_path)
    shell = f"find '{tmp_path}' -type f -exec sha256sum {{}} + | cut -c1-64 | LC_ALL=C sort | sha256sum"
    assert subprocess.run(shell, shell=True, capture_output=True, text=True, check=True).stdout.split()[0] == digest
    assert (files.count, files.bytes) == (3, 3003)
    assert files.by_suffix == {".nii.gz": 1, "none": 1, "other": 1}


def test_check__files(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"one")
    files, digest = count_files(tmp_path)
    card = filled_card(files=files.model_dump(), hashes={"files": digest})
    assert check_card(card, files=tmp_path).ok
    (tmp_path / "a.dcm").rename(tmp_path / "b.dcm")
    assert check_card(card, files=tmp_path).ok  # names do not matter
    (tmp_path / "b.dcm").write_bytes(b"two")
    assert check_card(card, files=tmp_path).differences == [
        f"hashes.files: the card says {digest}, found "
        + hashlib.sha256((hashlib.sha256(b"two").hexdigest() + "\n").encode()).hexdigest()
    ]
    (tmp_path / "c.txt").write_text("x")
    assert "files.by_suffix..txt: the card says nothing, found 1" in check_card(card, files=tmp_path).differences


def test_requests_that_cannot_be_answered(tmp_path: Path) -> None:
    card = filled_card()
    with pytest.raises(RequestError, match="no `files` to compare"):
        check_card(card, files=tmp_path)
    with pytest.raises(RequestError, match="no `counts` to compare"):
        check_card(card, archive=tmp_path)
    with pytest.raises(RequestError, match="holds no files"):
        count_files(tmp_path)
    with pytest.raises(RequestError, match="no such folder"):
        count_files(tmp_path / "none")
    with pytest.raises(RequestError, match="k is 0"):
        draft_card(tmp_path, "x", k=0)
    with pytest.raises(RequestError, match="no usable series"):
        draft_card(write_index(tmp_path / "empty", [row(1, 1, status="rejected")]), "x")
    write_card(card, tmp_path / "card.yaml")
    with pytest.raises(RequestError, match="exists and may hold what somebody wrote"):
        write_card(card, tmp_path / "card.yaml")


def filled(card: Card) -> Card:
    """Return a draft in which somebody has written something everywhere."""
    return parse_card(yaml.safe_load(dump_card(card).replace("???", "said")))


def filled_card(**changes: object) -> Card:
    raw = {
        "name": "x",
        "title": "X",
        "description": "x",
        "provenance": {"source": "x", "obtain": "x"},
        "licence": {"id": "MIT", "basis": "owner"},
    }
    return parse_card({**raw, **changes})
