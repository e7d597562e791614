"""What a DICOM object is for: an image of the patient, a localiser, a map, a screenshot, a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from medssl.archive.rows.attributes import MODALITIES

ROLES = ("source", "localiser", "reformat", "mip", "derived_map", "screenshot", "report", "unknown")
MAPS = frozenset(
    {
        "ADC", "FA", "TRACEW", "TRACE", "CBF", "CBV", "MTT", "TTP", "TMAX", "PERFUSION", "T1_MAP", "T2_MAP", "T2STAR_MAP",
        "SUBTRACTION", "SUBTRACT", "PHASE_MAP", "FIELD_MAP", "EFV", "IODINE", "SEGMENTATION", "DOSE",
    }
)  # fmt: skip
"""ImageType values that name a map computed from other images."""
_STORAGE = "1.2.840.10008.5.1.4.1.1."
SOP_MODALITIES = {
    "1": "CR", "1.1": "DX", "1.1.1": "DX", "1.2": "MG", "1.2.1": "MG", "1.3": "IO", "1.3.1": "IO", "2": "CT", "2.1": "CT", "2.2": "CT",
    "3": "US", "3.1": "US", "4": "MR", "4.1": "MR", "4.2": "MR", "4.3": "MR", "4.4": "MR", "5": "NM", "6": "US", "6.1": "US", "6.2": "US",
    "12.1": "XA", "12.1.1": "XA", "12.2": "RF", "12.2.1": "RF", "13.1.1": "XA", "13.1.2": "XA", "13.1.3": "MG", "13.1.4": "MG", "13.1.5": "MG",
    "20": "NM", "77.1.2": "GM", "77.1.3": "GM", "77.1.6": "SM", "128": "PT", "128.1": "PT", "130": "PT", "30": "OT",
}  # fmt: skip
"""SOP class (behind `_STORAGE`) -> the modality that such an object has, whatever its Modality tag says.

Slide-coordinates microscopy (77.1.3) says SM and is a single picture, not a pyramid: it goes where GM goes."""


@lru_cache(maxsize=1024)  # asked for every file, and there are few answers
def sop_kind(uid: str) -> str:
    """Return image, segmentation, screenshot, report, rt, waveform, presentation, document, other or unknown for a SOP class UID."""
    if not uid.startswith(_STORAGE):
        return "unknown"
    tail = uid[len(_STORAGE) :]
    for kind, starts in {
        "screenshot": ("7",),
        "segmentation": ("66.4", "66.5", "66.7", "68"),
        "report": ("88",),
        "rt": ("481",),
        "waveform": ("9",),
        "presentation": ("11",),
        "document": ("104",),
        "other": ("66", "67"),
    }.items():
        if any(tail == start or tail.startswith(f"{start}.") for start in starts):
            return kind
    return "image" if tail in SOP_MODALITIES else "unknown"


def sop_modality(uid: str) -> str | None:
    """Return the modality that a SOP class stands for, or None."""
    return SOP_MODALITIES.get(uid[len(_STORAGE) :]) if uid.startswith(_STORAGE) else None


def role_of(image_type: Sequence[str], sop_class_uid: str = "") -> str:
    """Return the role of an image from ImageType (0008,0008) and its SOP class: one of `ROLES`.

    DERIVED alone does not make a map: converters write it on everything.
    """
    kind = sop_kind(sop_class_uid)
    if kind == "report":
        return "report"
    values = {part.upper() for value in image_type for part in (value, *value.replace("/", " ").split())}
    if kind == "screenshot" or {"SCREEN", "SCREENSHOT", "SCREEN SAVE", "CAPTURE"} & values:
        return "screenshot"
    if {"LOCALIZER", "SCOUT"} & values:
        return "localiser"
    if {"MIP", "MINIP", "MIN_IP", "MAX_IP", "PROJECTION"} & values:
        return "mip"
    if MAPS & values or kind == "segmentation" or sop_class_uid == f"{_STORAGE}30":
        return "derived_map"
    if {"REFORMATTED", "MPR", "CSA", "RESAMPLED", "AVERAGE"} & values:
        return "reformat"
    return "source"


def modality_of(header: Mapping[str, Any]) -> str:
    """Return the modality; what the object is (its SOP class) comes before what its Modality tag says."""
    stated = str(header.get("modality", "unknown")).upper()
    stated = stated if stated in MODALITIES else "unknown" if stated == "UNKNOWN" else "other"
    uid = header.get("sop_class_uid", "")
    if sop_kind(uid) in ("report", "rt", "waveform", "presentation", "document"):
        return stated if stated in ("SR", "RTDOSE", "ECG") else "other"
    by_class = sop_modality(uid)
    if by_class is None or stated == by_class:
        return stated
    if by_class in ("CR", "DX") and stated in ("CR", "DX", "RG", "MG", "IO", "PX", "XA", "RF"):
        return stated  # plates and general detectors are used for mammograms and teeth too, and only the tag says so
    return by_class if by_class != "OT" else "other"
