"""The page of an archive: what it says, that it is private, self-contained and escaped."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from medssl.archive.operations.facts import collect_facts
from medssl.archive.reasons import FILE_REASONS, FLAGS, PRIVACY_FLAGS, SERIES_REASONS
from medssl.archive.table import Archive
from medssl.cli.thumbnails import middle, spread
from medssl.errors import RequestError
from medssl.report.archive_page import Picture, _counts, archive_report, bar, count, measure, percent, render, size, thumbnail_png
from medssl.types import ImageMeta, Sample
from tests.archive.small import set_public, small_archive
from tests.cli.test_bad_input import medssl
from tests.report.test_page import read


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    found = small_archive(tmp_path_factory.mktemp("page"), 6)
    ids = [row.series_id for row in found.select()]
    values: dict[str, dict[str, object]] = {
        name: {"split": "train", "year": 2018 + n, "site": "<b>north</b>", "vendor": "ge"} for n, name in enumerate(ids[:5])
    }
    values[ids[0]] |= {"quality_flags": ["lossy", "derived"], "privacy_flags": ["private_tags"]}
    values[ids[5]] = {"status": "rejected", "reason": "collision"}
    set_public(found, values)
    return found


def words(path: Path) -> str:
    return re.sub(r"\s+", " ", " ".join(read(path).words).replace("\u202f", " "))


def test_page__holds_counts_reasons_and_flags_with_their_meaning(archive: Archive, tmp_path: Path) -> None:
    path = archive_report(collect_facts(archive), tmp_path / "a.html")
    outline = read(path)
    assert outline.titles == [
        "Overview", "What is in it", "Spacing and size", "What was left out, and why", "Quality and privacy flags",
        "What the pixels say", "What nobody knows", "Before you use this",
    ]  # fmt: skip
    said = words(path)
    assert "5 usable series of 6" in said and "5 patients" in said and "Every patient is in one split." in said
    assert SERIES_REASONS["collision"] in said and FLAGS["lossy"] in said and FLAGS["derived"] in said
    assert all(f"{year} 1 20 % 1" in said for year in range(2018, 2023))
    assert "0.8 to 1 5 100 % 5" in said  # in-plane spacing: 1 mm
    assert "GE 5 100 % 5" in said and "split 0 of 5 0 %" in said
    assert path.stat().st_mode & 0o077 == 0


def test_page__requests_nothing_and_escapes(archive: Archive, tmp_path: Path) -> None:
    path = archive_report(collect_facts(archive), tmp_path / "a.html")
    outline, raw = read(path), path.read_text()
    assert not [
        value for _, name, value in outline.attributes if name in ("src", "href", "srcset") and not value.startswith(("#", "data:"))
    ]
    assert "<script" not in raw and "<b>north</b>" not in raw and "&lt;b&gt;north" in raw
    for row in archive.select(rejected=True):
        assert not any(name in raw for name in (row.series_id, row.patient_id, row.study_id))
    assert str(archive.path) not in raw


def test_page__torn_patients_and_wrong_totals_are_said(archive: Archive) -> None:
    facts = json.loads(json.dumps(collect_facts(archive)))
    facts["series"]["patients_torn"] = 2
    facts["files"]["used"] += 1
    page = render(facts)
    assert "2 patients are in more than one" in page and "Every patient is in one split" not in page
    assert "do not add up" in page


def test_page__says_what_the_pixels_say_or_that_nobody_looked(archive: Archive, tmp_path: Path) -> None:
    facts = collect_facts(archive)
    assert facts["pixels"] is None
    never = words(archive_report(facts, tmp_path / "a.html"))
    assert "Nobody has looked at the pixels" in never and "--out ARCHIVE --pixels" in never
    found = {
        "series": 90, "read": 80, "waiting": 7, "failed": {"truncated": 2, "timeout": 1},
        "flags": {"blank": 4, "burned_in_suspected": 11, "marker": 5, "saturated": 6},
        "near_duplicates": {"groups": 3, "series": 8, "groups_of_several_patients": 1},
    }  # fmt: skip
    try:
        archive.summary["pixels"] = found
        facts = json.loads(json.dumps(collect_facts(archive)))
    finally:
        del archive.summary["pixels"]
    said = words(archive_report(facts, tmp_path / "a.html"))
    assert "80 of 90 usable series were read, 7 not looked at yet (run the same again), 3 given up." in said
    assert f"saturated 6 6.7 % {FLAGS['saturated']}" in said and f"blank 4 4.4 % {FLAGS['blank']}" in said
    assert f"burned in suspected 11 12 % {PRIVACY_FLAGS['burned_in_suspected']}" in said
    assert f"truncated 2 2.2 % {FILE_REASONS['truncated']}" in said and f"timeout 1 1.1 % {FILE_REASONS['timeout']}" in said
    assert "8 series look alike in 3 groups; 1 of them holds several patients." in said and "Nobody has looked" not in said
    facts["pixels"] |= {"failed": [], "quality": [], "privacy": [], "near_duplicates": {}, "waiting": 0, "read": 90}
    clean = words(archive_report(facts, tmp_path / "a.html"))
    assert "90 of 90 usable series were read." in clean and "No two series look alike." in clean and "often missed" in clean


def test_page__an_empty_archive(archive: Archive, tmp_path: Path) -> None:
    class Nothing:
        summary: dict[str, object] = {}  # noqa: RUF012

        def select(self, *, rejected: bool = False) -> list[object]:
            return []

    path = archive_report(collect_facts(Nothing()), tmp_path / "a.html")  # type: ignore[arg-type]
    assert "There is no usable series." in words(path)
    with pytest.raises(RequestError, match="is a folder"):
        archive_report({}, tmp_path)


def test_report__through_the_command_line_with_images(archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = medssl(capsys, "report", archive.path, "--out", tmp_path / "a.html", "--json")
    assert status == 0 and json.loads(out) == {"report": str(tmp_path / "a.html")}
    assert "<img" not in (tmp_path / "a.html").read_text()
    status, _, _ = medssl(capsys, "report", archive.path, "--out", tmp_path / "b.html", "--with-images")
    raw = (tmp_path / "b.html").read_text()
    assert status == 0 and raw.count("<img") == 5 and "It shows images of patients." in raw
    assert os.stat(tmp_path / "b.html").st_mode & 0o077 == 0


def test_thumbnail__has_square_pixels_and_the_windowed_grey_values() -> None:
    import matplotlib.image

    plane = np.zeros((10, 40), dtype=np.int16)
    plane[:, 20:] = 1000
    picture = matplotlib.image.imread(io.BytesIO(thumbnail_png(plane, 2.0)), format="png")
    assert picture.shape[:2] == (112, 225)  # twice as high as its pixels: 20 to 40
    assert picture[:, :112, :3].max() == 0 and picture[:, 113:, :3].min() == 1
    colour = np.zeros((4, 4, 3), dtype=np.uint8)
    colour[..., 0] = 255
    red = matplotlib.image.imread(io.BytesIO(thumbnail_png(colour, 1.0)), format="png")
    assert red[0, 0, :3].tolist() == [1, 0, 0]
    page = render_images([Picture(plane, 1.0, "MR, series 01234567")])
    assert base64.b64encode(thumbnail_png(plane, 1.0)).decode() in page and "MR, series 01234567" in page


def render_images(pictures: list[Picture]) -> str:
    from medssl.report.archive_page import _images

    return _images(pictures, 1, 0)


def test_middle__of_volume_image_and_clip() -> None:
    meta = ImageMeta("0" * 32, "mri", "MR", "arbitrary", 2, {}, ())
    volume = np.arange(2 * 3 * 5, dtype=np.int16).reshape(1, 2, 3, 5)
    picture = middle(Sample(volume, (1.0, 2.0, 4.0), np.eye(4), None, meta), "x")
    assert picture is not None and picture.aspect == 2.0
    # Radiological: rows from anterior (large Y) to posterior, columns from the patient's right (large X) to the left.
    assert picture.plane.tolist() == [[int(volume[0, x, y, 2]) for x in (1, 0)] for y in (2, 1, 0)]
    image = middle(Sample(np.ones((1, 6, 4), dtype=np.uint16), (0.2, 0.1), None, None, meta), "x")
    assert image is not None and image.plane.shape == (6, 4) and image.aspect == 2.0
    clip = middle(Sample(np.arange(5 * 3 * 2 * 2, dtype=np.uint8).reshape(5, 3, 2, 2), None, None, None, meta), "x")
    assert clip is not None and clip.plane.shape == (2, 2, 3) and clip.plane[0, 0].tolist() == [24, 28, 32]


def test_spread__takes_every_modality_and_patient_before_a_second(archive: Archive) -> None:
    from dataclasses import replace

    (one,) = archive.select()[:1]
    rows = [
        replace(one, series_id=f"{n}", modality=m, patient_id=p)
        for n, (m, p) in enumerate([("CT", "a")] * 3 + [("MR", "a"), ("CT", "b")])
    ]
    assert [row.series_id for row in spread(rows, 4)] == ["0", "4", "3", "1"]


def test_bars__compare_what_is_known() -> None:
    cells = [
        {"value": "ge", "series": 4, "patients": 3},
        {"value": "united_imaging", "series": 2, "patients": 1},
        {"value": "unknown", "series": 994, "patients": 7},
    ]
    page = _counts("vendor", cells)
    assert re.findall(r"width:([\d.]+)%", page) == ["100.0", "50.0"]  # and none for unknown, which would hide the others
    assert "United Imaging" in page and "99.4 %" in page and "united_imaging" not in page
    many = [{"value": f"{k}", "series": 1, "patients": 1} for k in range(30)]
    page = _counts("site", [*many, {"value": "unknown", "series": 5, "patients": 5}])
    assert "14 others" in page and page.index("14 others") < page.index("unknown")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (0.000499, "0.000499"),
        (0.7421875, "0.742"),
        (1.0, "1"),
        (10.0, "10"),
        (9.75, "9.75"),
        (548, "548"),
        (2967, "2\u202f967"),
    ],
)
def test_measure__three_digits(value: float | None, said: str) -> None:
    assert measure(value) == said


def test_numbers__as_people_read_them() -> None:
    assert [count(value) for value in (None, 0, 12345)] == ["–", "0", "12\u202f345"]
    assert [size(value) for value in (0, 999, 1500, 2.5e8, 3.2e13)] == ["0 B", "999 B", "1.5 kB", "250 MB", "32.0 TB"]
    assert [percent(value) for value in (0, 0.0001, 0.055, 0.5, 0.9999, 1)] == [
        "0 %",
        "< 0.1 %",
        "5.5 %",
        "50 %",
        "> 99.9 %",
        "100 %",
    ]
    assert bar(0) == "" and "width:50.0%" in bar(0.5)
