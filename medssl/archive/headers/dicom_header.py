"""Read the DICOM tags that the index and the volume reader need, and where the pixels start.

Values are taken from the raw bytes (`dicom_raw`) and converted here: three times as fast as pydicom, never raising on a
malformed value, and without warnings that quote UIDs.
"""

from __future__ import annotations

import functools
import math
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from medssl.archive.headers.dicom_raw import parse_stream
from medssl.archive.headers.dicom_tags import TAGS

Header = dict[str, Any]

UNCOMPRESSED = {
    "1.2.840.10008.1.2": "implicit_le",
    "1.2.840.10008.1.2.1": "explicit_le",
    "1.2.840.10008.1.2.2": "explicit_be",
    "1.2.840.10008.1.2.1.99": "deflated",
}
COMPRESSED = {
    "1.2.840.10008.1.2.4.50": "jpeg_baseline",
    "1.2.840.10008.1.2.4.51": "jpeg_extended",
    "1.2.840.10008.1.2.4.57": "jpeg_lossless",
    "1.2.840.10008.1.2.4.70": "jpeg_lossless",
    "1.2.840.10008.1.2.4.80": "jpeg_ls",
    "1.2.840.10008.1.2.4.81": "jpeg_ls_near",
    "1.2.840.10008.1.2.4.90": "jpeg2000_lossless",
    "1.2.840.10008.1.2.4.91": "jpeg2000",
    "1.2.840.10008.1.2.4.201": "htj2k_lossless",
    "1.2.840.10008.1.2.4.202": "htj2k_lossless",
    "1.2.840.10008.1.2.4.203": "htj2k",
    "1.2.840.10008.1.2.5": "rle",
}
LOSSY_SYNTAXES = frozenset({"jpeg_baseline", "jpeg_extended", "jpeg_ls_near"})
ITK_SYNTAXES = frozenset({"jpeg_baseline", "jpeg_extended", "jpeg_lossless", "jpeg_ls", "jpeg2000_lossless", "jpeg2000", "rle"})
"""Syntaxes that the GDCM inside SimpleITK decodes, in case pydicom has no plug-in for them."""


def syntax_name(uid: str) -> str:
    """Return the closed-vocabulary name of a transfer syntax."""
    return UNCOMPRESSED.get(uid) or COMPRESSED.get(uid) or "other"


def read_header(path: Path, keys: Iterable[str] = tuple(TAGS)) -> Header:
    """Read one DICOM file up to its pixel data; see `parse_header`."""
    with open(path, "rb") as handle:
        header = parse_header(handle, os.fstat(handle.fileno()).st_size, keys)
    assert header is not None
    return header


def parse_header(stream: BinaryIO, size: int, keys: Iterable[str] = tuple(TAGS), *, partial: bool = False) -> Header | None:
    """Read a DICOM data set up to its pixel data.

    Args:
        stream: The file, or its beginning.
        size: Size of the whole file in bytes.
        keys: Names from `TAGS`.
        partial: The stream may end before the header does; then the answer is None.

    Returns:
        name -> value for the tags present (a malformed value counts as absent), and `syntax`, `file_bytes`,
        `pixel_offset` and `pixel_length`: where the pixel bytes start and how many there are. `pixel_offset` is None
        when there are no pixel data or when they cannot be addressed in the file (deflated); `pixel_length` is None
        for encapsulated (compressed) pixels.

    Raises:
        ImageError: `unreadable`: the data set cannot be parsed.
    """
    names = _names(tuple(keys))
    raw = parse_stream(stream, None if partial else size, names)
    if partial and raw.cut:
        return None
    header: Header = {}
    for tag, (vr, data) in raw.elements.items():
        name, kind = names[tag]
        value = _convert(_Element(data, vr.decode("latin-1") or None, not raw.big_endian), tag, kind)
        if value is not None:
            header[name] = value
    header["syntax"], header["file_bytes"] = raw.syntax, size
    header["pixel_offset"], header["pixel_length"] = raw.pixel_offset, raw.pixel_length
    return header


class _Element(NamedTuple):
    """What `_convert` needs of an element."""

    value: bytes
    VR: str | None
    is_little_endian: bool


@functools.cache
def _names(keys: tuple[str, ...]) -> dict[int, tuple[str, str]]:
    """Return tag -> (name, kind)."""
    return {TAGS[name][0]: (name, TAGS[name][1]) for name in keys}


def _convert(element: Any, tag: int, kind: str) -> Any:
    value = element.value
    if value is None:
        return None
    if not isinstance(value, bytes):  # already converted by pydicom, for instance in a deflated file
        value = "\\".join(str(part) for part in value) if not isinstance(value, str | int | float) else str(value)
        raw = value.encode("latin-1", "replace")
        binary = False
    else:
        raw = value
        binary = kind in ("integer", "binary") and (element.VR in ("US", "SS") or (element.VR in (None, "UN") and _is_binary(tag)))
        binary = binary or kind == "binary"
    try:
        vr = element.VR
        if vr in (None, "UN") and isinstance(value, bytes):  # implicit: only our own table says how it is stored
            vr = {"double": "FD", "single": "FL"}.get(kind, vr)
        return _parse(raw, kind, binary, "<" if getattr(element, "is_little_endian", True) else ">", vr)
    except (ValueError, struct.error, OverflowError):
        return None


def _is_binary(tag: int) -> bool:
    return tag in (0x00280002, 0x00280010, 0x00280011, 0x00280100, 0x00280101, 0x00280103)


def _parse(raw: bytes, kind: str, binary: bool, order: str, vr: str | None) -> Any:
    if binary:
        if kind == "binary":  # US or SS: the reader, who knows the pixel representation, decides
            return struct.unpack_from(f"{order}H", raw)[0] if len(raw) >= 2 else int(raw.decode())
        return struct.unpack_from(f"{order}{'h' if vr == 'SS' else 'H'}", raw)[0]
    if vr in ("FD", "FL"):
        number = struct.unpack_from(f"{order}{'d' if vr == 'FD' else 'f'}", raw)[0]
        return number if math.isfinite(number) else None
    text = raw.decode("latin-1").strip(" \0")
    if kind == "text":
        return text or None
    if kind == "texts":
        return [part.strip() for part in text.split("\\")] if text else None
    values = [float(part) for part in text.split("\\") if part.strip()]
    if not values or not all(math.isfinite(value) for value in values):
        return None
    if kind == "numbers":
        return values
    return values[0] if kind in ("number", "double", "single") else int(values[0])


def find_decoder(syntax: str) -> str:
    """Return what decodes a transfer syntax here: `pydicom`, `itk` (inside SimpleITK), or `none`."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    if syntax in UNCOMPRESSED:
        return "pydicom"
    try:
        if get_decoder(UID(syntax)).is_available:
            return "pydicom"
    except NotImplementedError:
        pass
    return "itk" if syntax_name(syntax) in ITK_SYNTAXES else "none"
