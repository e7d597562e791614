"""The page of columns names what the table has, and rows hold no other words than it lists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from medssl.archive.index import index
from medssl.archive.reasons import FLAGS, PRIVACY_FLAGS
from medssl.archive.rows.base import stored_type
from medssl.archive.table import SERIES_COLUMNS, Archive, SeriesRow
from medssl.archive.vocabularies import IDS, OPEN, VOCABULARIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "archive_columns.md"


def test_page__names_every_column_with_its_type() -> None:
    found = re.findall(r"^\| `(\w+)` \| (\S+) \|(.*)\|$", PAGE.read_text(), flags=re.MULTILINE)
    assert [(name, kind) for name, kind, _ in found] == [(name, kind.lower()) for name, kind in SERIES_COLUMNS.items()]
    for name, _, rest in found:
        unit, *texts = (cell.strip() for cell in rest.split("|"))
        assert len(texts) == 3 and all(texts), name
        suffix = re.search(r"_(mm|ms|deg|t)$", name)
        if suffix is not None:
            assert unit == {"mm": "mm", "ms": "ms", "deg": "degrees", "t": "T"}[suffix[1]], name


def test_page__lists_the_words_of_every_text_column() -> None:
    found = dict(re.findall(r"^- `(\w+)`: (.*)$", PAGE.read_text(), flags=re.MULTILINE))
    assert found == {name: ", ".join(words) for name, words in VOCABULARIES.items()}
    texts = {name for name, kind in SERIES_COLUMNS.items() if kind.startswith("VARCHAR")}
    assert texts == {*VOCABULARIES, *OPEN}
    assert all(len(set(words)) == len(words) for words in VOCABULARIES.values())


def test_docstring__names_every_column() -> None:
    assert SeriesRow.__doc__ is not None
    assert re.findall(r"^        (\w+): ", SeriesRow.__doc__, flags=re.MULTILINE) == list(SERIES_COLUMNS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (">i2", "int16"),
        ("uint8", "uint8"),
        ("f8", "float64"),
        ("rgb", "rgb"),
        ("block", "other"),
        (None, "unknown"),
        ("V3", "other"),
    ],
)
def test_stored_type__is_a_word(name: str | None, expected: str) -> None:
    assert stored_type(name) == expected and expected in VOCABULARIES["dtype"]


def in_vocabulary(row: SeriesRow) -> None:
    for name in SERIES_COLUMNS:
        value = getattr(row, name)
        if name in VOCABULARIES and value is not None:
            words = value if isinstance(value, tuple) else tuple(value.split("+")) if name == "volume_axis" else (value,)
            assert set(words) <= set(VOCABULARIES[name]), name
        elif name in IDS:
            assert value is None or re.fullmatch("[0-9a-f]{32}", value), name
    assert row.orientation == "unknown" or sorted(row.orientation.translate(str.maketrans("RLAPSI", "XXYYZZ"))) == ["X", "Y", "Z"]
    assert (row.status == "rejected") == (row.reason is not None)
    assert set(row.quality_flags) <= set(FLAGS) and set(row.privacy_flags) <= set(PRIVACY_FLAGS)


@pytest.mark.data
def test_rows_of_real_files__hold_no_other_words(shared_data: Path, tmp_path: Path) -> None:
    folders = ("dicom_odd", "dicom_multiframe", "ct_ge_gantry_tilt", "cine_mr_sunnybrook", "nifti_misc", "nrrd_pyradiomics", "wsi")
    index([shared_data / folder for folder in folders], tmp_path / "out", site="unknown")
    rows = Archive.open(tmp_path / "out").select(rejected=True)
    for row in rows:
        in_vocabulary(row)
    assert len(rows) > 100 and {row.domain for row in rows} >= {"ct", "mri", "ultrasound", "xray", "wsi", "other", "unknown"}
