"""Read the DICOM tags that the index and the volume reader need, and where the pixels start.

Values are taken from pydicom's raw elements and converted here: that is faster than pydicom's value classes, never
raises on a malformed value, and keeps pydicom's warnings, which quote UIDs, out of the terminal.
"""

from __future__ import annotations

import functools
import math
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from medssl.archive.dicom_tags import TAGS
from medssl.errors import ImageError

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
    import pydicom

    tags = _tags(tuple(keys))
    try:
        dataset = pydicom.dcmread(stream, stop_before_pixels=True, force=True, specific_tags=list(tags))
        header: Header = {}
        for tag, element in dataset.items():
            if tag in tags:
                name, kind = tags[tag]
                value = _convert(element, tag, kind)
                if value is not None:
                    header[name] = value
        syntax = str(dataset.file_meta.get("TransferSyntaxUID", "") or "") if hasattr(dataset, "file_meta") else ""
        implicit, little = dataset.original_encoding
    except Exception as err:
        # pydicom raises many classes on malformed files; all mean the same here, and none of their texts is safe
        # to show.
        raise ImageError(
            "unreadable",
            f"DICOM header cannot be parsed ({type(err).__name__}); copy the file again from its source",
        ) from err
    if not syntax:
        syntax = "1.2.840.10008.1.2" if implicit else ("1.2.840.10008.1.2.1" if little else "1.2.840.10008.1.2.2")
    header["syntax"] = syntax
    header["file_bytes"] = size
    header["pixel_offset"], header["pixel_length"] = None, None
    if UNCOMPRESSED.get(syntax) == "deflated":
        return None if partial else header
    tag_bytes = stream.read(12)
    order = "<" if little else ">"
    if len(tag_bytes) == 12 and struct.unpack_from(f"{order}HH", tag_bytes) == (0x7FE0, 0x0010):
        width = 8 if implicit else 12
        length = struct.unpack_from(f"{order}I", tag_bytes, width - 4)[0]
        header["pixel_offset"] = stream.tell() - 12 + width
        header["pixel_length"] = None if length == 0xFFFFFFFF else length
    elif partial:
        return None  # the header goes on behind the end of the stream
    return header


@functools.cache
def _tags(keys: tuple[str, ...]) -> dict[Any, tuple[str, str]]:
    """Return pydicom's tag objects -> (name, kind); making them costs as much as reading the values."""
    from pydicom.tag import Tag

    return {Tag(TAGS[name][0]): (name, TAGS[name][1]) for name in keys}


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
