"""Dates and ages as DICOM files hold them: read what is meant, refuse what cannot be, never raise."""

from __future__ import annotations

import datetime
import re

MAX_AGE = 120
FIRST_YEAR = 1880
"""No X-ray is older; an earlier date is a placeholder."""
BANDS = (
    "0-1",
    "2-11",
    "12-17",
    *(f"{low}-{low + 9}" if low != 18 else "18-29" for low in (18, *range(30, 90, 10))),
    "90+",
    "unknown",
)
_UNITS = {"D": 365.25, "W": 365.25 / 7, "M": 12.0, "Y": 1.0}


def parse_date(text: str | None) -> tuple[datetime.date | None, bool]:
    """Read a DICOM date: `YYYYMMDD`, or `YYYY.MM.DD` of ACR-NEMA.

    Returns:
        The date or None, and whether a value was there that is no possible date.
    """
    value = (text or "").strip(" \0")
    if not value:
        return None, False
    match = re.fullmatch(r"(\d{4})([.\-/]?)(\d{2})\2(\d{2})", value)
    if match is None:
        return None, True
    try:
        date = datetime.date(int(match[1]), int(match[3]), int(match[4]))
    except ValueError:
        return None, True
    return (date, False) if FIRST_YEAR <= date.year <= 2199 else (None, True)


def parse_age(text: str | None) -> float | None:
    """Return the years of an age string such as `042Y`, `18M`, `6W`, `3D`; None for anything else.

    A number without a unit may be years or months and is not read. `22Y` is one digit short of the standard and is.
    """
    match = re.fullmatch(r"(\d{1,3})([DWMY])", (text or "").strip(" \0").upper())
    if match is None:
        return None
    years = int(match[1]) / _UNITS[match[2]]
    return years if years <= MAX_AGE else None


def age_of(age: str | None, birth: str | None, study: str | None) -> tuple[float | None, tuple[str, ...]]:
    """Return the age at the study in years, and flags.

    The age tag counts if it can be read and lies within a year of the dates; else the dates count; else there is none. Zero is what
    some software writes for unknown, so it counts only where the dates agree.

    Args:
        age: PatientAge (0010,1010).
        birth: PatientBirthDate.
        study: StudyDate.

    Returns:
        Years or None; `age_conflict` when tag and dates disagree or the tag says nothing that can be, `date_invalid`.
    """
    born, bad_birth = parse_date(birth)
    seen, bad_study = parse_date(study)
    flags = ["date_invalid"] if bad_birth or bad_study else []
    by_dates = None
    if born is not None and seen is not None:
        by_dates = (seen - born).days / 365.25
        if not 0 <= by_dates <= MAX_AGE:
            by_dates, flags = None, [*flags, "age_conflict"]
    stated = parse_age(age)
    given = bool((age or "").strip(" \0"))
    if stated is not None and by_dates is not None and abs(stated - by_dates) <= 1:
        return stated, tuple(flags)
    if by_dates is not None:
        return by_dates, tuple(dict.fromkeys([*flags, "age_conflict"] if given else flags))
    if stated:
        return stated, tuple(flags)
    return None, tuple(dict.fromkeys([*flags, "age_conflict"] if given else flags))


def age_band(years: float | None) -> str:
    """Return the band of `BANDS` that an age lies in."""
    if years is None:
        return "unknown"
    for low, name in ((90, "90+"), (30, ""), (18, "18-29"), (12, "12-17"), (2, "2-11"), (0, "0-1")):
        if years >= low:
            return name or f"{int(years) // 10 * 10}-{int(years) // 10 * 10 + 9}"
    return "unknown"
