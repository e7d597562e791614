"""Dates and ages of DICOM files: what is meant is read, what cannot be is null with a flag, nothing raises."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medssl.archive.rows.dates import BANDS, age_band, age_of, parse_age, parse_date


@pytest.mark.parametrize(
    ("text", "expected", "invalid"),
    [
        ("20240229", datetime.date(2024, 2, 29), False),
        ("1994.01.30", datetime.date(1994, 1, 30), False),
        ("20120000", None, True),
        ("20230229", None, True),
        ("11111111", None, True),
        ("00000000", None, True),
        ("", None, False),
        (None, None, False),
        (" 20240102\0", datetime.date(2024, 1, 2), False),
        ("2024.0102", None, True),
    ],
)
def test_parse_date__real_dates_only(text: str | None, expected: datetime.date | None, invalid: bool) -> None:
    assert parse_date(text) == (expected, invalid)


@pytest.mark.parametrize(
    ("text", "years"),
    [("042Y", 42), ("018M", 1.5), ("052W", 52 * 7 / 365.25), ("022Y", 22), ("22Y", 22), ("42", None), ("Y", None), ("999Y", None)],
)
def test_parse_age__unit_decides(text: str, years: float | None) -> None:
    assert parse_age(text) == (None if years is None else pytest.approx(years))


@pytest.mark.parametrize(
    ("age", "birth", "study", "years", "flags"),
    [
        ("042Y", "19800615", "20230101", 42, ()),  # 42.5 by the dates: the tag, within a year
        ("060Y", "19800615", "20230101", 42.5, ("age_conflict",)),
        ("000Y", None, "20180918", None, ("age_conflict",)),  # a filler, unless the dates say newborn
        ("000Y", "20180901", "20180918", 0, ()),
        ("42", "19660101", "20130717", 47.5, ("age_conflict",)),
        ("42", None, None, None, ("age_conflict",)),
        ("22Y", None, None, 22, ()),
        ("048Y", "00000000", "20120000", 48, ("date_invalid",)),
        (None, "18000101", "20040101", None, ("date_invalid",)),
        (None, "20100101", "20040101", None, ("age_conflict",)),
        (None, None, None, None, ()),
    ],
)
def test_age_of__tag_within_a_year_of_the_dates_else_dates(
    age: str | None, birth: str | None, study: str | None, years: float | None, flags: tuple[str, ...]
) -> None:
    found, raised = age_of(age, birth, study)
    assert found == (None if years is None else pytest.approx(years, abs=0.1))
    assert raised == flags


@pytest.mark.parametrize(
    ("years", "band"),
    [
        (0, "0-1"),
        (1.99, "0-1"),
        (2, "2-11"),
        (17.9, "12-17"),
        (18, "18-29"),
        (30, "30-39"),
        (89.9, "80-89"),
        (90, "90+"),
        (None, "unknown"),
    ],
)
def test_age_band__edges(years: float | None, band: str) -> None:
    assert age_band(years) == band and band in BANDS


@given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=12))
def test_age_of__never_raises(age: str, birth: str, study: str) -> None:
    years, _ = age_of(age, birth, study)
    assert age_band(years) in BANDS
