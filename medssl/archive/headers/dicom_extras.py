"""What a DICOM header says beyond single values: what lies in sequences, and whether it holds private elements or overlays."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medssl.archive.headers.dicom_header import UNCOMPRESSED, read_header
from medssl.archive.headers.dicom_raw import Found, convert, parse_raw, read_raw
from medssl.archive.headers.image_scale import PLANAR_KEYS

US_REGIONS, SOURCE_IMAGES, INJECTIONS = 0x00186011, 0x00082112, 0x00540016
REFERENCED_UID = 0x00081155
_SINGLE = {
    "space": (0x00186012, "US"),
    "data": (0x00186014, "US"),
}
_BOX = (0x0018601A, 0x0018601E, 0x00186018, 0x0018601C)
"""MinY0, MaxY1, MinX0, MaxX1."""
_UNITS, _DELTAS = (0x00186026, 0x00186024), (0x0018602E, 0x0018602C)
"""Of Y, then of X."""
_DOSE = {"dose_bq": (0x00181074, "DS"), "half_life_s": (0x00181075, "DS")}
MAX_ITEMS = 64
WANTED = {
    "US": US_REGIONS,
    "IVUS": US_REGIONS,
    "CR": SOURCE_IMAGES,
    "DX": SOURCE_IMAGES,
    "RG": SOURCE_IMAGES,
    "MG": SOURCE_IMAGES,
    "PT": INJECTIONS,
}
"""Modality -> the sequence that is looked into."""
_LEAVES = {
    US_REGIONS: frozenset((*(tag for tag, _ in _SINGLE.values()), *_BOX, *_UNITS, *_DELTAS)),
    SOURCE_IMAGES: frozenset((REFERENCED_UID,)),
    INJECTIONS: frozenset(tag for tag, _ in _DOSE.values()),
}


def read_extras(path: Path, modality: str, head: bytes = b"") -> dict[str, Any]:
    """Read what a modality keeps in a sequence.

    Args:
        path: The file.
        modality: Its modality.
        head: Its first bytes; the file is opened again only where its header is longer.

    Returns:
        JSON-able: `us_regions` of ultrasound, for `image_scale.us_regions`; `source_images` of projections, instance UIDs;
        `injection` of PET, with `dose_bq` and `half_life_s`. Empty where the sequence is absent.

    Raises:
        ImageError: `unreadable`: the data set cannot be parsed.
    """
    wanted = WANTED.get(modality)
    if wanted is None:
        return {}
    leaves, each = _LEAVES[wanted], {wanted: dict[int, tuple[bytes, bytes]]}
    raw = (parse_raw(head, leaves, each=each) if head else None) or read_raw(path, leaves, each=each)
    items: list[Found] = raw.items[wanted][:MAX_ITEMS]
    if not items:
        return {}
    if wanted == US_REGIONS:
        return {"us_regions": [_region(item, raw.big_endian) for item in items]}
    if wanted == SOURCE_IMAGES:
        uids = [convert(item.get(REFERENCED_UID), "UI") for item in items]
        return {"source_images": sorted({str(uid) for uid in uids if uid})}
    return {"injection": _values(items[0], _DOSE, raw.big_endian)}


def _values(item: Found, names: Mapping[str, tuple[int, str]], big_endian: bool) -> dict[str, Any]:
    found = {name: convert(item.get(tag), vr, big_endian) for name, (tag, vr) in names.items()}
    return {name: value for name, value in found.items() if value is not None}


def _region(item: Found, big_endian: bool) -> dict[str, Any]:
    region = _values(item, _SINGLE, big_endian)
    for name, tags, vr in (("box", _BOX, "UL"), ("units", _UNITS, "US"), ("delta", _DELTAS, "FD")):
        values = [convert(item.get(tag), vr, big_endian) for tag in tags]
        if None not in values:
            region[name] = values
    return region


def read_planar_header(path: Path) -> dict[str, Any]:
    """Read what `image_scale` needs of one file, as the index does.

    Raises:
        ImageError: `unreadable`: the data set cannot be parsed.
    """
    header = read_header(path, PLANAR_KEYS)
    return header | read_extras(path, str(header.get("modality", "")).upper())


_FORMS = {"explicit_le": ("<", True), "explicit_be": (">", True), "implicit_le": ("<", False)}
_MARKS = (b"LO", b"UN", b"SH", b"US")
"""Representations of private creators and of the rows of overlay planes; files that were implicit once say UN."""


def signs(head: bytes, syntax: str, end: int | None) -> dict[str, bool]:
    """Return which of `private_tags` and `overlay` a header holds, as far as its first bytes go; only what is true.

    Private creators (gggg,0010 to 00FF), which precede all private elements of a block, and the rows of overlay planes are looked
    for as bytes: walking over all elements of every file would cost more than all else that the scan does. Elements inside
    sequences are found too.

    Args:
        head: First bytes of the file.
        syntax: Transfer syntax UID.
        end: Where the pixels start; None when unknown.
    """
    form = UNCOMPRESSED.get(syntax, "explicit_le")
    if form not in _FORMS:
        return {}  # deflated: the bytes are not those of the header
    order, explicit = _FORMS[form]
    start = 132 if head[128:132] == b"DICM" else 0
    stop = len(head) if end is None else min(end, len(head))
    found: dict[str, bool] = {}
    for group, element in _explicit(head, start, stop, order) if explicit else _implicit(head, start, stop):
        if group % 2 and group > 8 and 0x10 <= element <= 0xFF:
            found["private_tags"] = True
        elif element == 0x10 and not group % 2 and 0x6000 <= group <= 0x601E:
            found["overlay"] = True
    return found


def _hits(data: bytes, mark: bytes, start: int, stop: int) -> Iterator[int]:
    place = data.find(mark, start, stop)
    while place >= 0:
        yield place
        place = data.find(mark, place + 1, stop)


def _explicit(head: bytes, start: int, stop: int, order: str) -> Iterator[tuple[int, int]]:
    """Yield group and element of what looks like elements of the kinds in `_MARKS`."""
    tag = struct.Struct(f"{order}HH").unpack_from
    for mark in _MARKS:
        for place in _hits(head, mark, start + 4, stop):
            yield tag(head, place - 4)


def _implicit(head: bytes, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield group and element of what looks like elements of 2 to 64 bytes, text if they are private.

    Their types are not written, so that the value has to be looked at.
    """
    tag = struct.Struct("<HH").unpack_from
    for place in _hits(head, b"\0\0\0", start + 5, stop):
        if 2 <= head[place - 1] <= 64:
            group, element = tag(head, place - 5)
            if not group % 2 or head[place + 3 : place + 5].isalnum():
                yield group, element
