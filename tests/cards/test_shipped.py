"""Every card in data_cards: valid, complete, supported, and rendered in both forms."""

from __future__ import annotations

import json
import logging
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from medssl.cards.render import HF_LICENCES, croissant, front_matter, markdown
from medssl.cards.schema import Card, Statement, load_card, open_fields, parse_card, shipped_cards

FOLDER = Path(__file__).resolve().parents[2] / "data_cards"
CARDS = sorted(path for path in FOLDER.rglob("*.yaml") if path.name != "template.yaml")
RDFLIB = pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a card was rendered or validated with the help of the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


ASKED_FOR = {
    "lidc_idri", "luna16", "msd", "totalsegmentator_ct", "totalsegmentator_mr", "btcv", "flare22", "amos", "openmind", "brats2021", "acdc",
    "mimic_cxr", "chexpert", "nih_cxr14", "vindr_cxr", "echonet_dynamic", "camus", "tcga", "camelyon16",
}  # fmt: skip


def test_cards__are_found_and_named_after_their_files() -> None:
    assert len(CARDS) == 40
    assert {path.stem for path in CARDS if path.parent.name == "public"} == ASKED_FOR
    assert sum(path.parent.name == "test_images" for path in CARDS) == 21
    assert {name: path.resolve() for name, path in shipped_cards().items()} == {path.stem: path for path in CARDS}
    assert [path.stem for path in CARDS if load_card(path).name != path.stem] == []


def test_template__is_valid_and_open() -> None:
    left = open_fields(load_card(FOLDER / "template.yaml"))
    assert "title" in left and "licence.id" in left and len(left) > 10


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_card__is_complete_and_every_fact_is_supported(path: Path) -> None:
    card = load_card(path)
    assert open_fields(card) == []
    assert card.counts is None and card.known_biases and card.use.intended and card.use.out_of_scope and card.stated
    assert card.licence.basis in ("source", "third_party", "memory")
    facts = [card.description, card.provenance.source, card.provenance.citation, *card.splits.values()]
    facts += [getattr(section, name) for section in (card.ethics, card.collection) for name in type(section).model_fields]
    stated = [fact for fact in facts if isinstance(fact, Statement)]
    assert len(stated) >= 2
    assert [fact.text for fact in stated if fact.support is None and not fact.from_memory] == []
    if path.parent.name == "public":
        assert card.provenance.obtain.support or card.provenance.obtain.from_memory
        assert card.hashes.files is None and card.files is None  # nobody counted them


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_card__renders_to_markdown(path: Path) -> None:
    card = load_card(path)
    text = markdown(card)
    assert text.startswith("---\n")
    front, _, body = text[4:].partition("\n---\n")
    header = yaml.safe_load(front)
    assert header == front_matter(card)
    assert header["license"] in HF_LICENCES or (header["license"] == "other" and header["license_name"] == card.licence.id)
    assert header["pretty_name"] == card.title and "medical" in header["tags"]
    assert f"\n# {card.title}\n" in body and card.description.text in body and card.provenance.obtain.text in body
    for bias in card.known_biases:
        assert bias.text in body
    for name, number in card.stated.items():
        assert f"- **{name}**: {number.value} (" in body


@RDFLIB
@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_card__renders_to_croissant_that_mlcroissant_accepts(path: Path) -> None:
    card = load_card(path)
    dataset = validated(croissant(card))
    assert dataset.metadata.ctx.is_v1_1()
    assert dataset.metadata.name == card.name
    biases = list(dataset.metadata.data_biases)
    assert [found[: len(said.text)] for found, said in zip(biases, card.known_biases, strict=True)] == [
        s.text for s in card.known_biases
    ]
    records = {record["counts/cell"]: record["counts/count"] for record in dataset.records("counts")}
    for name, number in card.stated.items():
        assert text_of(records[name]) == str(number.value)


@RDFLIB
def test_mlcroissant__finds_what_is_wrong() -> None:
    """The control of the test above: a broken description is an error there."""
    import mlcroissant

    good = croissant(load_card(FOLDER / "public" / "msd.yaml"))
    assert good["conformsTo"][0] == "http://mlcommons.org/croissant/1.1"
    wrong = json.loads(json.dumps(good))
    wrong["recordSet"][0]["field"][0]["dataType"] = None
    with pytest.raises(mlcroissant.ValidationError, match=r"valid .*dataType"):
        mlcroissant.Dataset(jsonld=wrong)
    wrong = {**good, "conformsTo": "http://mlcommons.org/croissant/9"}
    with pytest.raises(mlcroissant.ValidationError, match="conformsTo"):
        mlcroissant.Dataset(jsonld=wrong)


@RDFLIB
def test_counts_of_an_index__are_records_and_tables() -> None:
    card = with_counts()
    records = [
        {name.partition("/")[2]: text_of(value) for name, value in record.items()}
        for record in validated(croissant(card)).records("counts")
    ]
    assert {"table": "modality", "cell": "MR", "unit": "series", "count": "hidden"} in records
    assert {"table": "modality", "cell": "CT", "unit": "patients", "count": "30"} in records
    assert not [record for record in records if record["table"] == "sex"]
    text = markdown(card)
    assert "| CT | 40 | 30 |" in text and "| MR | hidden | hidden |" in text and "By sex: withheld." in text
    assert "| spacing_1_mm | 0.5 | 0.7 | 0.8 |" in text
    assert "No count is about fewer than 10 patients" in text
    assert front_matter(card)["size_categories"] == ["n<1K"]


def test_licences__that_the_hub_does_not_know_are_other() -> None:
    card = load_card(FOLDER / "public" / "mimic_cxr.yaml")
    front = front_matter(card)
    assert front["license"] == "other" and front["license_name"].startswith("PhysioNet")
    assert front["license_link"].startswith("https://physionet.org/")
    assert front["size_categories"] == ["100K<n<1M"]


def test_shared_cards__name_no_patient_of_the_test_images() -> None:
    text = "".join(path.read_text() for path in CARDS)
    assert re.findall(r"\b\d(?:\.\d+){5,}\b", text) == []  # DICOM UIDs


def validated(jsonld: dict[str, Any]) -> Any:
    """Load JSON-LD with mlcroissant, which raises on errors; only known recommendations may be left."""
    import mlcroissant

    logging.getLogger("absl").setLevel(logging.ERROR)
    dataset = mlcroissant.Dataset(jsonld=json.loads(json.dumps(jsonld)))
    assert dataset.metadata.ctx.issues.errors == set()
    left = [text for text in dataset.metadata.ctx.issues.warnings if "recommended" not in text and "MAJOR.MINOR.PATCH" not in text]
    assert left == []
    return dataset


def text_of(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def with_counts() -> Card:
    tables = {"modality": {"CT": 40, "MR": "hidden", "US": "hidden"}, "sex": "withheld"}
    people = {"modality": {"CT": 30, "MR": "hidden", "US": "hidden"}, "sex": "withheld"}
    counts = {
        "k": 10, "patients": 42, "studies": 50, "series": 60, "files": 900, "series_by": tables, "patients_by": people,
        "quartiles": {"ct": {"spacing_1_mm": [0.5, 0.7, 0.8]}},
    }  # fmt: skip
    return parse_card(
        {
            "name": "ours", "title": "Ours", "description": "Ours.", "provenance": {"source": "us", "obtain": "ask"},
            "licence": {"id": "none", "basis": "owner"}, "counts": counts,
        }
    )  # fmt: skip
