"""All faults in one report, round trips, hashes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from medssl.cards.schema import CardError, card_hash, dump_card, find_card, load_card, open_fields, parse_card
from medssl.errors import RequestError


def minimal(**changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "name": "set_1",
        "title": "A set",
        "description": "Two images.",
        "provenance": {"source": {"text": "Us", "support": "we made it"}, "obtain": "Ask us."},
        "licence": {"id": "CC-BY-4.0", "basis": "owner"},
    }
    return {**raw, **changes}


def test_unknown_keys__near_matches_and_all_faults_together() -> None:
    raw = minimal(descripton="typo", licence={"id": "MIT", "basis": "source", "supprot": "x"}, known_biases=[{"txt": "a"}])
    del raw["title"]
    with pytest.raises(CardError) as caught:
        parse_card(raw)
    text = "\n".join(caught.value.faults)
    assert 'descripton: unknown key (did you mean "description"?)' in text
    assert 'licence.supprot: unknown key (did you mean "support"?)' in text
    assert 'known_biases.0.txt: unknown key (did you mean "text"?)' in text
    assert "title: required and missing" in text
    assert "known_biases.0.text: required and missing" in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Has Spaces"}, "name: lower-case letters, digits, .*; found 'Has Spaces'"),
        ({"licence": {"id": "MIT", "basis": "source"}}, "licence: basis is `source`: say in `support`"),
        ({"licence": {"id": "MIT", "basis": "unstated"}}, "licence: basis is `unstated` but id is 'MIT'"),
        ({"licence": {"id": "MIT", "basis": "guess"}}, "licence.basis: .*third_party.*found 'guess'"),
        ({"stated": {"images": {"value": 3}}}, "stated.images: a stated number needs either"),
        ({"stated": {"images": {"value": -1, "from_memory": True}}}, "stated.images.value: .*greater than or equal to 0"),
        ({"description": {"text": "a", "support": "b", "from_memory": True}}, "description: give `support` or"),
        ({"domains": ["brain"]}, "domains.0: .*microscopy"),
        ({"hashes": {"files": "abc"}}, "hashes.files: .*pattern"),
        ({"format": 2}, "format: 2 is not read by this version; accepted: 1"),
        ({"provenance": {"source": "a", "obtain": "b", "url": "www.x"}}, "provenance.url: .*pattern"),
    ],
)
def test_wrong_values__say_what_is_accepted(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CardError, match=message):
        parse_card(minimal(**changes))


def test_files_that_are_no_cards__are_named(tmp_path: Path) -> None:
    with pytest.raises(CardError, match=re.escape(f"{tmp_path / 'none.yaml'}: No such file")):
        load_card(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(CardError, match="not valid YAML"):
        load_card(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("- a\n")
    with pytest.raises(CardError, match="a card is a YAML mapping of sections; found list"):
        load_card(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_bytes(b"title: \xff\xfe")
    with pytest.raises(CardError, match="not UTF-8"):
        load_card(tmp_path / "a.yaml")
    with pytest.raises(RequestError, match=r'no card "msdd"; .* \(did you mean "msd"\?\)$'):
        find_card("msdd")


def test_dump_and_load__give_the_same_card(tmp_path: Path) -> None:
    card = parse_card(minimal(known_biases=["one", {"text": "two", "from_memory": True}], splits={"train": "half"}))
    (tmp_path / "c.yaml").write_text(dump_card(card))
    assert load_card(tmp_path / "c.yaml") == card
    raw = yaml.safe_load(dump_card(card))
    assert raw["known_biases"] == ["one", {"text": "two", "from_memory": True}]
    assert "hashes" not in raw and "counts" not in raw


def test_hash__changes_with_content_and_not_with_short_forms() -> None:
    card = parse_card(minimal())
    assert card_hash(card) == card_hash(parse_card(minimal(description={"text": "Two images."})))
    assert card_hash(card) != card_hash(parse_card(minimal(description="Three images.")))
    assert re.fullmatch("[0-9a-f]{64}", card_hash(card))


def test_open_fields__are_named_by_their_path() -> None:
    card = parse_card(minimal(title="???", known_biases=["a", "???"], ethics={"consent": "???"}))
    assert open_fields(card) == ["title", "ethics.consent", "known_biases.1"]
