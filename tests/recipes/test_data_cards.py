"""A recipe names cards; items, run.json, weights, results, exports and the report carry them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from medssl import api
from medssl.archive.table import Archive
from medssl.cards.schema import load_card, shipped_cards
from medssl.errors import RecipeError, RequestError
from medssl.recipe import shipped
from medssl.report.page import report
from medssl.sampling.items import read as read_items
from medssl.weights import load_part, read_manifest
from tests.cli.test_bad_input import medssl

SMOKE = shipped()["smoke/mae_cnn_segresnet3d_mri"]
SHORT = ["train.steps=1", "train.batch=2", "train.monitor_items=0", "views.mask.cell=4"]
CARD = """\
format: 1
name: ours          # comments, order and line breaks do not count
version: '3'
title: Phantoms
description: "Drawn by medssl; \u00e4 and \u2264 are hashed as UTF-8."
licence: {id: CC-BY-NC-4.0, basis: owner}
provenance: {source: medssl, obtain: make_cohort}
domains: [mri]
"""


def write(folder: Path, name: str = "ours", **changes: Any) -> Path:
    raw = {**yaml.safe_load(CARD), "name": name, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(CARD if raw == yaml.safe_load(CARD) else yaml.safe_dump(raw))
    return path


def independent_hash(path: Path) -> str:
    """As docs/data_cards.md says, without medssl."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def run(archive: Path, out: Path, *overrides: str, resume: bool = False) -> list[str]:
    """Pretrain for a step and return the notes."""
    notes: list[str] = []
    api.pretrain(SMOKE, [f"data.index={archive}", f"out={out}", *SHORT, *overrides], resume=resume, on_note=notes.append)
    return notes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data_cards")


@pytest.fixture(scope="module")
def weights(folder: Path, phantom_archive: Path) -> tuple[Path, Path, list[str]]:
    """(run folder, card, notes) of a run whose licence does not keep the card's."""
    card = write(folder)
    notes = run(phantom_archive, folder / "run", f"data.card={card}", "export.licence=Apache-2.0")
    return folder / "run", card, notes


def test_shipped_cards__hash_is_an_independent_sha256() -> None:
    """Every shipped card is written in full, so its hash can be computed without medssl."""
    from medssl.cards.schema import card_hash

    cards = shipped_cards()
    assert len(cards) == 40
    assert [name for name, path in cards.items() if card_hash(load_card(path)) != independent_hash(path)] == []


def test_manifest__carries_the_card(weights: tuple[Path, Path, list[str]]) -> None:
    path, card, notes = weights
    expected = {"name": "ours", "version": "3", "licence": "CC-BY-NC-4.0", "card_hash": independent_hash(card), "notes": notes}
    assert len(notes) == 1 and "may not be used commercially; the licence of the weights is Apache-2.0" in notes[0]
    _, manifest = load_part(path)
    assert manifest["data_cards"] == [expected]
    assert read_manifest(path, "decoder")["data_cards"] == [expected]
    facts = json.loads((path / "run.json").read_text())
    assert facts["data_cards"] == [expected] and facts["data_card_notes"] == notes
    assert str(card.parent) not in (path / "weights" / "last" / "encoder.json").read_text()


def test_items__record_their_card(weights: tuple[Path, Path, list[str]]) -> None:
    assert {item.card for item in read_items(weights[0] / "items.parquet")} == {"ours"}


def test_items__of_several_sets_in_one_index(folder: Path, phantom_archive: Path) -> None:
    thin, thick = write(folder, "half_a"), write(folder, "half_b", licence={"id": "MIT", "basis": "owner"})
    low, *_, high = sorted(row.series_id for row in Archive.open(phantom_archive).select("split = 'train'"))
    where = {str(thin): f"series_id <= '{low}'", str(thick): f"series_id >= '{high}'"}
    notes = run(phantom_archive, folder / "halves", f"data.card={json.dumps(where)}", "export.licence=CC-BY-NC-4.0")
    items = read_items(folder / "halves" / "items.parquet")
    expected = ["half_a" if item.series_id == low else "half_b" if item.series_id == high else "index" for item in items]
    assert [item.card for item in items] == expected and len(set(expected)) == 3
    assert [(item.card, item.series_id) for item in items] == sorted((item.card, item.series_id) for item in items)
    without = expected.count("index")
    assert notes == [f"source main: {without} of {len(items)} selected series have no data card; see data.card"]
    assert [card["name"] for card in read_manifest(folder / "halves")["data_cards"]] == ["half_a", "half_b"]


def test_no_card__empty_list_and_a_note(folder: Path, phantom_archive: Path) -> None:
    (note,) = run(phantom_archive, folder / "none")
    assert "names no data card" in note and "medssl card build" in note
    assert read_manifest(folder / "none")["data_cards"] == []
    assert {item.card for item in read_items(folder / "none" / "items.parquet")} == {"index"}


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("msd_hipocampus", r'data.card: no card "msd_hipocampus"; .* \(did you mean "msd_hippocampus"\?\)'),
        ("nowhere/mine.yaml", "data.card: no card file nowhere/mine.yaml; draft one with `medssl card build"),
        ("[msd, acdc]", "data.card: give one card .* {CARD: SQL condition}"),
        ("{msd: 3}", "data.card: give one card"),
        ("{}", "data.card: give one card"),
    ],
)
def test_unknown_card__stops_before_anything_is_written(card: str, message: str, tmp_path: Path, phantom_archive: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        run(phantom_archive, tmp_path / "run", f"data.card={card}")
    assert list(tmp_path.iterdir()) == []


def test_wrong_condition__stops_before_anything_is_written(tmp_path: Path, phantom_archive: Path) -> None:
    with pytest.raises(RequestError, match="is not a condition that can be used"):
        run(phantom_archive, tmp_path / "run", 'data.card={msd: "sit = 1"}')
    assert list(tmp_path.iterdir()) == []


def test_changed_card__is_told_and_the_run_keeps_what_it_began_with(tmp_path: Path, phantom_archive: Path) -> None:
    card = write(tmp_path)
    before = independent_hash(card)
    arguments = (phantom_archive, tmp_path / "run", f"data.card={card}", "train.steps=2", "export.licence=CC-BY-NC-4.0")
    assert run(*arguments) == []
    card.write_text(CARD.replace("'3'", "'4'"))
    (note,) = run(*arguments, resume=True)
    assert note == "card ours was changed since the run began; run.json and weights keep what it was then"
    (carried,) = read_manifest(tmp_path / "run")["data_cards"]
    assert (carried["version"], carried["card_hash"]) == ("3", before)


def test_card_check__against_weights(
    weights: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, card, _ = weights
    assert medssl(capsys, "card", "check", card, "--weights", path)[:2] == (
        0,
        f"{card}: valid, equal to the card that the weights carry\n",
    )
    changed = write(tmp_path, version="4")
    status, out, _ = medssl(capsys, "card", "check", changed, "--weights", path)
    assert status == 1
    assert f"they carry version 3 of this card with hash {independent_hash(card)}; it was changed since" in out
    assert f"version 4 with hash {independent_hash(changed)}" in out
    status, out, _ = medssl(capsys, "card", "check", "msd", "--weights", path)
    assert status == 1 and "weights: they do not name this card; they name ours" in out


def test_export__carries_and_shows_the_card(
    weights: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, card, notes = weights
    status, out, _ = medssl(capsys, "export", path, "--to", "safetensors", "--out", tmp_path / "export")
    assert status == 0
    assert f"pretrained on: ours, version 3, CC-BY-NC-4.0, card {independent_hash(card)}\n{notes[0]}" in out
    assert read_manifest(tmp_path / "export" / "encoder.safetensors")["data_cards"] == read_manifest(path)["data_cards"]


def test_report__shows_the_card_and_its_notes(weights: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    path, card, notes = weights
    page = report(path, tmp_path / "page.html", with_images=False).read_text()
    assert f"ours, version 3, CC-BY-NC-4.0, card {independent_hash(card)}" in page and notes[0] in page


def test_evaluate__names_the_cards_of_both_sides(
    weights: tuple[Path, Path, list[str]], phantom_archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, card, _ = weights
    cohort = phantom_archive.parent / "cohort"
    header = (cohort / "split.csv").read_text().splitlines()[0].split(",")
    target = next(name for name in header if name.endswith("_ml"))
    arguments = ["evaluate", shipped()["evaluate/regression_mri"], "--weights", path, f"source.index={phantom_archive}", "k=[1]"]
    arguments += [f"table={cohort / 'split.csv'}", f"target={target}", f"out={tmp_path / 'out'}", f"source.card={card}"]
    status, out, err = medssl(capsys, *arguments)
    assert status == 0, err
    line = f"ours, version 3, CC-BY-NC-4.0, card {independent_hash(card)}"
    assert f"weights pretrained on: {line}" in out and f"evaluated on: {line}" in out
    found = json.loads((tmp_path / "out" / "evaluate.json").read_text())["data_cards"]
    assert found["weights"] == read_manifest(path)["data_cards"]
    assert [entry["card_hash"] for entry in found["evaluation"]] == [independent_hash(card)]


def test_fine_tuned_network__carries_the_cards_of_its_pretraining_and_its_cohort(
    weights: tuple[Path, Path, list[str]], phantom_archive: Path, tmp_path: Path
) -> None:
    path, card, _ = weights
    cohort_card = write(tmp_path, "cohort")
    overrides = [
        f"cohort.path={phantom_archive.parent / 'cohort'}",
        f"cohort.card={cohort_card}",
        f"out={tmp_path / 'out'}",
        "labels=1",
    ]
    overrides += [
        "settings.crop=[32, 32, 16]",
        "settings.spacing_mm=[4.0, 4.0, 4.0]",
        "settings.steps=1",
        "settings.warmup_steps=0",
        "settings.val_every=0",
        "settings.figures=0",
        "settings.overlap=0",
    ]
    summary = api.finetune(shipped()["demo/finetune"], path, overrides)
    hashes = [independent_hash(card), independent_hash(cohort_card)]
    assert [entry["card_hash"] for entry in summary["shared"]["data_cards"]["pretrained"]] == hashes
    (network,) = (tmp_path / "out").rglob("network.json")
    assert [entry["card_hash"] for entry in json.loads(network.read_text())["data_cards"]] == hashes
    with pytest.raises(RecipeError, match=r'cohort\.card: no card "cohrt"'):
        api.finetune(shipped()["demo/finetune"], path, [*overrides, "cohort.card=cohrt"])


def test_hippocampus_recipes__name_their_card() -> None:
    named = {name: yaml.safe_load(path.read_text()) for name, path in shipped().items() if "hippocampus" in name}
    assert len(named) > 5
    assert {(raw.get("data") or raw["cohort"])["card"] for raw in named.values()} == {"msd_hippocampus"}
