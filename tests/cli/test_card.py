"""medssl card: exit status, differences, files written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cards.small_index import row, write_index
from tests.cli.test_bad_input import medssl


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_index(tmp_path / "index", [row(i, i, modality="CT", domain="ct") for i in range(20)])


def test_build_then_check_then_render(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = tmp_path / "cards" / "ours.yaml"
    status, out, _ = medssl(capsys, "card", "build", archive, "--name", "ours", "--k", 5, "--out", card, "--json")
    assert status == 0
    left = json.loads(out)["open_fields"]
    assert "licence.id" in left
    # A draft is valid, equal to its index, and not finished.
    status, out, _ = medssl(capsys, "card", "check", card, "--archive", archive)
    assert status == 1 and out.count("to fill: ") == len(left) and "the card says" not in out
    card.write_text(card.read_text().replace("???", "said"))
    status, out, _ = medssl(capsys, "card", "check", card, "--archive", archive)
    assert status == 0 and out == f"{card}: valid, equal to the index\n"
    for target, name in (("markdown", "ours.md"), ("croissant", "ours.json")):
        status, _, _ = medssl(capsys, "card", "render", card, "--to", target, "--out", tmp_path / name)
        assert status == 0
    assert (tmp_path / "ours.md").read_text().startswith("---\npretty_name: said\n")
    assert json.loads((tmp_path / "ours.json").read_text())["name"] == "ours"


def test_check__lists_every_difference_and_exits_1(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = tmp_path / "ours.yaml"
    medssl(capsys, "card", "build", archive, "--name", "ours", "--k", 5, "--out", card)
    card.write_text(card.read_text().replace("???", "said").replace("CT: 20", "CT: 21"))
    status, out, _ = medssl(capsys, "card", "check", card, "--archive", archive, "--json")
    found = json.loads(out)
    assert status == 1
    assert found["differences"] == [
        "counts.series_by.modality.CT: the card says 21, found 20",
        "counts.patients_by.modality.CT: the card says 21, found 20",
    ]


def test_build__takes_the_name_of_the_file_and_says_what_belongs_where(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "mine.yaml"
    status, out, _ = medssl(capsys, "card", "build", archive, "--k", 21, "--out", card)
    assert status == 0 and "fewer than 21 patients, so every count is hidden; a set that is public anyway" in out
    lines = card.read_text().splitlines()
    assert "name: mine" in lines
    assert "  review: ???  # Ethics committee or its waiver" in lines
    assert all("#" in line for line in lines if line.endswith("???") and ":" in line)
    status, _, err = medssl(capsys, "card", "build", archive, "--out", tmp_path / "Not Good.yaml")
    assert status == 2 and "name: lower-case letters, digits" in err


def test_where__is_the_part_of_the_index_that_a_card_is_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(i, i, modality="CT", domain="ct", site="a" if i < 12 else "b") for i in range(20)]
    archive, card = write_index(tmp_path / "index", rows), tmp_path / "a.yaml"
    assert medssl(capsys, "card", "build", archive, "--k", 2, "--where", "site = 'a'", "--out", card)[0] == 0
    card.write_text(card.read_text().replace("???", "said"))
    assert "  patients: 12" in card.read_text().splitlines()
    assert medssl(capsys, "card", "check", card, "--archive", archive, "--where", "site = 'a'")[0] == 0
    status, out, _ = medssl(capsys, "card", "check", card, "--archive", archive)
    assert status == 1 and "counts.patients: the card says 12, found 20" in out
    status, _, err = medssl(capsys, "card", "check", card, "--where", "site = 'a'")
    assert status == 2 and "give --archive too" in err
    status, _, err = medssl(capsys, "card", "check", card, "--archive", archive, "--where", "site = 'c'")
    assert status == 2 and "has no usable series where site = 'c'" in err


def test_render__says_that_a_card_is_a_draft(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = tmp_path / "ours.yaml"
    _, out, _ = medssl(capsys, "card", "build", archive, "--k", 5, "--out", card, "--json")
    left = json.loads(out)["open_fields"]
    status, out, _ = medssl(capsys, "card", "render", card, "--to", "markdown", "--out", tmp_path / "a.md")
    assert status == 0 and out.endswith(f"the card is a draft, {len(left)} fields still say ???\n")


def test_invalid_card__exits_2_with_all_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("name: bad\ntitel: x\nlicence: {id: MIT, basis: owner}\n")
    status, out, err = medssl(capsys, "card", "check", tmp_path / "bad.yaml")
    assert status == 2 and out == ""
    assert 'titel: unknown key (did you mean "title"?)' in err and "provenance: required and missing" in err


def test_wrong_requests__exit_2_and_write_nothing(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.yaml"
    for arguments in (
        ("build", archive, "--name", "Not A Name", "--out", out),
        ("build", archive, "--name", "ok", "--k", 0, "--out", out),
        ("build", tmp_path, "--name", "ok", "--out", out),
        ("render", "no_such_card", "--to", "markdown", "--out", out),
        ("render", "msd", "--to", "html", "--out", out),
        ("check", "msd", "--archive", archive),
    ):
        status, _, err = medssl(capsys, "card", *arguments)
        assert status == 2 and err.startswith("medssl: "), arguments
    assert not out.exists()


def test_shipped_cards__by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert medssl(capsys, "card", "check", "msd")[:2] == (0, "msd: valid\n")
    assert medssl(capsys, "card", "render", "acdc", "--to", "markdown", "--out", tmp_path / "a.md")[0] == 0
    assert "University Hospital of Dijon" in (tmp_path / "a.md").read_text()
