"""Labels of a table joined to series: which image a name means, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medssl.errors import RequestError
from medssl.label_tables import read_targets

FILES = {
    "a1": "/data/siteA/0001.png",
    "b1": "/data/siteB/0001.png",
    "b2": "/data/siteB/0002.png",
    "ct1": "/data/ct/P1/IM1.dcm",
    "ct2": "/data/ct/P2/IM1.dcm",
    "mr1": "/data/mr/P3/IM7.dcm",
    "mr2": "/data/mr/P3/IM9.dcm",
}


def shelf_of(*chosen: str) -> Any:
    rows = {name: SimpleNamespace(series_id=name) for name in FILES}
    archive = SimpleNamespace(first_paths=lambda: {name: Path(file) for name, file in FILES.items()})
    return SimpleNamespace(rows=[rows[name] for name in chosen or FILES], archive=archive)


def read(folder: Path, *lines: str, of: tuple[str, ...] = ()) -> dict[str, str]:
    (folder / "labels.csv").write_text("\n".join(["file,y", *lines]) + "\n")
    return read_targets(str(folder / "labels.csv"), "file", "y", shelf_of(*of))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["siteA/0001.png,healthy", "siteB/0001.png,ill"], {"a1": "healthy", "b1": "ill"}),
        (["0002.png,ill"], {"b2": "ill"}),
        (["0002,ill", "0002.png,"], {"b2": "ill"}),
        (["old/0002.png,ill"], {"b2": "ill"}),
        (["/data/siteB/0001.png,ill"], {"b1": "ill"}),
        (["P1,ill", "ct/P2,healthy"], {"ct1": "ill", "ct2": "healthy"}),
        (["IM7.dcm,ill"], {"mr1": "ill"}),
        (["P3,ill"], {"mr1": "ill", "mr2": "ill"}),  # one folder, whatever series lie in it
        (["P3,ill", "P3,ill"], {"mr1": "ill", "mr2": "ill"}),
    ],
)
def test_names__are_those_of_files_and_folders(tmp_path: Path, lines: list[str], expected: dict[str, str]) -> None:
    assert read(tmp_path, *lines) == expected


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0001.png,ill"], "1 of the 1 names in labels.csv that selected series have are those of several files or folders"),
        (["IM1.dcm,ill"], "those of several files or folders"),
        (["0002.png,ill", "0002.png,healthy"], r"1 of the 1 names in column file .* stand in lines with several values of y"),
        (["x/0002.png,ill", "y/0002.png,healthy"], "labels.csv: 2 images are listed with a folder in which no image file lies"),
        (["/data/siteC/0002.png,ill"], "none of the 7 selected series is named"),
    ],
)
def test_names_that_leave_a_choice__are_refused_without_being_said(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        read(tmp_path, *lines)
    assert "000" not in str(caught.value) and "IM1" not in str(caught.value)


def read_ids(folder: Path, *lines: str, of: tuple[str, ...] = ()) -> dict[str, str]:
    (folder / "attached.csv").write_text("\n".join(["series_id,y", *lines]) + "\n")
    return read_targets(str(folder / "attached.csv"), "series_id", "y", shelf_of(*of))


def test_series_ids__name_series_and_nothing_else(tmp_path: Path) -> None:
    """Ids are compared whole: the file of another series may be called as an id is."""
    assert read_ids(tmp_path, "a1,ill", "mr2,healthy", "b2,", "gone,ill") == {"a1": "ill", "mr2": "healthy"}
    assert read_ids(tmp_path, "a1,ill", "0002,ill") == {"a1": "ill"}
    assert read_ids(tmp_path, "0002,ill", "P2,ill") == {"b2": "ill", "ct2": "ill"}  # no id: a column of names that is called so
    with pytest.raises(RequestError, match=r"1 of the 1 names in column series_id .* several values of y"):
        read_ids(tmp_path, "a1,ill", "a1,healthy")
    for lines, of in ((["a1,ill"], ("b1",)), (["0123456789abcdef,ill"], ())):
        with pytest.raises(
            RequestError, match=r"selected series is named in column series_id of attached\.csv; ids are those of one index"
        ):
            read_ids(tmp_path, *lines, of=of)


def test_narrower_selection__does_not_give_labels_of_another_folder(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="none of the 1 selected series is named"):
        read(tmp_path, "siteA/0001.png,healthy", of=("b1",))
    assert read(tmp_path, "0001.png,ill", of=("b1",)) == {"b1": "ill"}  # one name, and the recipe says which folder
