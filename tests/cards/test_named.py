"""Cards that a recipe names: which series they are about, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medssl.archive.table import Archive
from medssl.cards.build import draft_card
from medssl.cards.named import (
    SourceCards,
    assign,
    card_facts,
    card_limits,
    card_notes,
    index_notes,
    limits_of,
    name_faults,
    open_references,
    source_notes,
)
from medssl.cards.schema import Card, card_hash, dump_card, parse_card
from medssl.errors import RequestError
from tests.cards.small_index import row, write_index
from tests.cards.test_build import filled


def card_of(name: str = "ours", **changes: Any) -> Card:
    raw = {
        "name": name,
        "title": "Ours",
        "description": "Ours.",
        "provenance": {"source": "us", "obtain": "ask"},
        "licence": {"id": "MIT", "basis": "owner"},
    }
    return parse_card({**raw, **changes})


def write(folder: Path, name: str = "ours", **changes: Any) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(dump_card(card_of(name, **changes)))
    return str(path)


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    """Twelve CT series of site `a`, eight MR series of site `b`."""
    rows = [row(i, i, modality="CT", domain="ct", site="a") for i in range(12)]
    rows += [row(50 + i, 50 + i, modality="MR", domain="mri", site="b") for i in range(8)]
    return Archive.open(write_index(tmp_path / "index", rows))


def test_one_card__is_about_every_series(archive: Archive, tmp_path: Path) -> None:
    found = assign(archive, {write(tmp_path): None}, "main")
    assert list(found.cards) == ["ours"] and set(found.of_series.values()) == {"ours"} and len(found.of_series) == 20


def test_conditions__give_each_series_its_card(archive: Archive, tmp_path: Path) -> None:
    found = assign(archive, {write(tmp_path, "a"): "site = 'a'", write(tmp_path, "b"): "site = 'b'"}, "main")
    names = list(found.of_series.values())
    assert (names.count("a"), names.count("b")) == (12, 8)
    assert [found.of_series[each.series_id] for each in archive.select("modality = 'MR'")] == ["b"] * 8


def test_wrong_conditions__are_refused(archive: Archive, tmp_path: Path) -> None:
    a, b = write(tmp_path, "a"), write(tmp_path, "b")
    with pytest.raises(RequestError, match=r"meets the conditions of the cards a and b; .* exclude each other"):
        assign(archive, {a: "site = 'a'", b: None}, "main")
    with pytest.raises(RequestError, match="is not a condition"):
        assign(archive, {a: "site ="}, "main")
    (tmp_path / "copy.yaml").write_text((tmp_path / "a.yaml").read_text())
    with pytest.raises(RequestError, match="names the card a twice"):
        assign(archive, {a: "site = 'a'", str(tmp_path / "copy.yaml"): "site = 'b'"}, "main")


def test_references__every_fault_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: bad\ntitel: x\n")
    references = [write(tmp_path), "msd_hipocampus", str(tmp_path / "none.yaml"), str(tmp_path / "bad.yaml")]
    cards, faults = open_references("data.card", references)
    assert [card.name for card in cards] == ["ours"]
    assert all(fault.startswith("data.card: ") for fault in faults)
    text = "\n".join(faults)
    assert 'no card "msd_hipocampus"' in text and '(did you mean "msd_hippocampus"?)' in text
    assert f"no card file {tmp_path / 'none.yaml'}" in text
    assert 'titel: unknown key (did you mean "title"?)' in text and "licence: required and missing" in text
    _, (fault,) = open_references("data.card", ["zzz"])  # nothing is near: all names are listed
    assert "comes with medssl: acdc, amos, " in fault


def test_two_cards_of_one_name__are_a_fault_unless_they_are_the_same() -> None:
    assert name_faults("data.card", [card_of(), card_of()]) == []
    (fault,) = name_faults("data.card", [card_of(), card_of(title="Theirs")])
    assert 'two different cards have the name "ours"' in fault


def test_no_card__is_one_gentle_note(archive: Archive) -> None:
    (note,) = source_notes("main", "data.card", assign(archive, {}, "main"), archive.select(), "ct")
    assert "source main names no data card" in note and "medssl card build" in note and "data.card=NAME.yaml" in note


def test_what_does_not_fit_the_source__is_noted(archive: Archive, tmp_path: Path) -> None:
    found = assign(archive, {write(tmp_path, "a", domains=["ct"]): "site = 'a'", write(tmp_path, "c"): "site = 'c'"}, "main")
    notes = source_notes("main", "data.card", found, archive.select("split <> 'test'"), "mri")
    assert "source main: 8 of 20 selected series have no data card; see data.card" in notes
    assert any("none of the selected series is of card c" in note for note in notes)
    assert "source main: card a is about ct, the source reads mri" in notes
    assert len(notes) == 3


def test_counts_that_are_not_those_of_the_index__are_noted(archive: Archive) -> None:
    card = filled(draft_card(archive, "part", k=2, where="site = 'a'"))
    right = SourceCards({"part": card}, {"part": "site = 'a'"}, {each.series_id: "part" for each in archive.select("site = 'a'")})
    assert index_notes(right, archive) == []
    assert card.counts is not None and card.counts.series == 12  # the part alone was counted
    (note,) = index_notes(SourceCards({"part": card}, {"part": None}, right.of_series), archive)
    assert "card part and the index differ in" in note and "counts.patients: the card says 12, found 20" in note


@pytest.mark.parametrize(
    ("licence", "limits"),
    [
        ("CC-BY-4.0", set()),
        ("CC0-1.0", set()),
        ("CC-BY-NC-SA-4.0", {"non-commercial", "share-alike"}),
        ("CC BY-NC-ND 4.0", {"non-commercial", "no-derivatives"}),
        ("CC-BY-4.0 AND CC-BY-NC-4.0", {"non-commercial"}),
        ("Stanford EchoNet-Dynamic non-commercial data use agreement", {"non-commercial"}),
        ("research only, ask us", {"research-only"}),
        ("MIT", set()),
        ("Apache-2.0", set()),
        ("NC-17", set()),
        ("unknown", set()),
    ],
)
def test_limits__are_read_from_the_identifier(licence: str, limits: set[str]) -> None:
    assert limits_of(licence) == limits


def test_terms_that_the_weights_do_not_keep__are_noted() -> None:
    closed = card_of(licence={"id": "CC-BY-NC-SA-4.0", "basis": "owner"})
    assert card_notes(closed, "CC-BY-NC-SA-4.0") == []
    assert card_notes(closed, "CC-BY-NC-4.0") == [
        "card ours (CC-BY-NC-SA-4.0, share-alike): the data must be passed on under the same licence; "
        "the licence of the weights is CC-BY-NC-4.0"
    ]
    both = card_notes(closed, "Apache-2.0")
    assert len(both) == 2 and "may not be used commercially; the licence of the weights is Apache-2.0" in both[0]
    assert len(card_notes(closed, "unknown")) == 2
    stated = card_of(licence={"id": "Our agreement", "basis": "owner", "limits": ["no-redistribution", "research-only"]})
    assert card_limits(stated) == ["research-only", "no-redistribution"]
    assert [note.partition(": ")[2] for note in card_notes(stated, "MIT")] == [
        "the data may be used for research only; the licence of the weights is MIT",
        "the data may not be passed on; the licence of the weights is MIT",
    ]
    assert card_notes(card_of(), "Apache-2.0") == []
    (note,) = card_notes(card_of(licence={"id": "unknown", "basis": "unstated"}), "MIT")
    assert "names no licence" in note
    draft = card_of(title="???", licence={"id": "???", "basis": "owner"})
    assert "is a draft with 2 fields to fill" in card_notes(draft, "MIT")[0]


def test_facts__name_version_licence_hash() -> None:
    card = card_of(version="7")
    assert card_facts(card) == {"name": "ours", "version": "7", "licence": "MIT", "card_hash": card_hash(card)}
