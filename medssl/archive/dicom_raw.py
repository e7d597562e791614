"""Walk the raw bytes of a DICOM data set: private elements and functional groups without a tree of objects.

A multi-frame file of 20,000 frames holds hundreds of thousands of nested elements. Building them as pydicom data sets takes
minutes and gigabytes; here only the leaves asked for are converted, all others are stepped over.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl.errors import ImageError

FIRST_BYTES = 1 << 18
MAX_HEADER_BYTES = 1 << 30
MAX_DEPTH = 32
UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
DEFLATED = "1.2.840.10008.1.2.1.99"
_LONG = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT", b"SV", b"UV"))
_NUMBERS = {b"US": "H", b"SS": "h", b"UL": "I", b"SL": "i", b"FL": "f", b"FD": "d", b"UV": "Q", b"SV": "q"}

Element = tuple[bytes, bytes]
"""Value representation (empty in implicit data sets) and raw value."""
Found = dict[int, Element]


class _TooShortError(Exception):
    """The bytes end inside an element."""


@dataclass
class RawHeader:
    """What `read_raw` found.

    Args:
        elements: tag -> element, of the top level and of sequences asked for (flattened).
        items: tag of a sequence -> one mapping per item, for the sequences asked for item by item.
        big_endian: Byte order of the values.
        syntax: Transfer syntax UID.
        pixel_offset: Where the value of the pixel element starts; None without pixels or in a deflated file.
        pixel_length: Its length; None for encapsulated pixels.
    """

    elements: Found
    items: dict[int, list[Any]]
    big_endian: bool
    syntax: str
    pixel_offset: int | None = None
    pixel_length: int | None = None

    def get(self, tag: int, vr: str) -> Any:
        """Return the converted value of an element (see `convert`), or None."""
        return convert(self.elements.get(tag), vr, self.big_endian)


def read_raw(
    path: Path,
    leaves: Collection[int],
    *,
    inside: Collection[int] = (),
    each: Mapping[int, Callable[[Found], Any]] | None = None,
) -> RawHeader:
    """Collect elements of a DICOM file up to its pixel data.

    Args:
        path: The file.
        leaves: Tags wanted. Where one occurs several times, the first occurrence counts.
        inside: Sequences to look into; their leaves are put beside those around them.
        each: Sequence of the top level -> what to make of the leaves of each of its items.

    Raises:
        ImageError: `unreadable`: the data set cannot be parsed.
    """
    size = os.path.getsize(path)
    wanted = FIRST_BYTES
    with open(path, "rb") as handle:
        data = b""
        while True:
            data += handle.read(wanted - len(data))
            try:
                return _parse(data, frozenset(leaves), frozenset(inside), each or {}, complete=len(data) >= size)
            except _TooShortError as err:
                if len(data) >= min(size, MAX_HEADER_BYTES) or len(data) < wanted:
                    raise ImageError(
                        "unreadable", "the DICOM header ends inside an element; copy the file again from its source"
                    ) from err
            except (struct.error, ValueError, IndexError, OverflowError, RecursionError, zlib.error) as err:
                raise ImageError(
                    "unreadable", f"DICOM header cannot be parsed ({type(err).__name__}); copy the file again from its source"
                ) from err
            wanted *= 4


def parse_raw(
    head: bytes, leaves: Collection[int], *, inside: Collection[int] = (), each: Mapping[int, Callable[[Found], Any]] | None = None
) -> RawHeader | None:
    """Do the same with the first bytes of a file; None where they end before the header does, or cannot be parsed."""
    try:
        return _parse(head, frozenset(leaves), frozenset(inside), each or {}, complete=False)
    except (_TooShortError, struct.error, ValueError, IndexError, OverflowError, RecursionError, zlib.error):
        return None


def _parse(
    data: bytes,
    leaves: frozenset[int],
    inside: frozenset[int],
    each: Mapping[int, Callable[[Found], Any]],
    *,
    complete: bool,
) -> RawHeader:
    pos = 132 if data[128:132] == b"DICM" else 0
    syntax = ""
    # The meta group is explicit little endian, whatever follows.
    while data[pos : pos + 2] == b"\x02\0":
        element, vr = struct.unpack_from("<H", data, pos + 2)[0], data[pos + 4 : pos + 6]
        start, length = _value(data, pos, vr, "<")
        if element == 0x0010:
            syntax = data[start : start + length].decode("latin-1").strip(" \0")
        pos = start + length
    offset = 0
    if syntax == DEFLATED:
        if not complete:
            raise _TooShortError
        data, pos = zlib.decompressobj(-15).decompress(data[pos:]), 0
    big = syntax == "1.2.840.10008.1.2.2" or (not syntax and data[pos : pos + 2] == b"\0\x08")
    explicit = data[pos + 4 : pos + 6].isalpha() and data[pos + 4 : pos + 6].isupper()
    if not syntax:
        syntax = "1.2.840.10008.1.2.2" if big else ("1.2.840.10008.1.2.1" if explicit else "1.2.840.10008.1.2")
    header = RawHeader({}, {tag: [] for tag in each}, big, syntax)
    walker = _Walker(data, explicit, ">" if big else "<", leaves, inside)
    end = len(data)
    while pos < end:
        if complete and end - pos < 8:
            break  # trailing bytes
        tag, vr, start, length = walker.element(pos)
        if tag in PIXELS:
            if offset == 0 and syntax != DEFLATED:
                header.pixel_offset = start
                header.pixel_length = None if length == UNDEFINED else length
            break
        if tag in each:
            make, made = each[tag], header.items[tag]

            def take(found: Found, make: Callable[[Found], Any] = make, made: list[Any] = made) -> None:
                made.append(make(found))

            pos = walker.items(start, length, None, 0, take)
        else:
            pos = walker.step(tag, vr, start, length, header.elements, 0)
    else:
        if not complete:
            raise _TooShortError
    return header


def _value(data: bytes, pos: int, vr: bytes, order: str) -> tuple[int, int]:
    """Return where the value of an explicit element starts and how long it is."""
    if vr in _LONG:
        return pos + 12, struct.unpack_from(f"{order}I", data, pos + 8)[0]
    return pos + 8, struct.unpack_from(f"{order}H", data, pos + 6)[0]


class _Walker:
    """Steps over elements, keeping the leaves wanted."""

    def __init__(self, data: bytes, explicit: bool, order: str, leaves: frozenset[int], inside: frozenset[int]) -> None:
        self.data, self.explicit, self.leaves, self.inside = data, explicit, leaves, inside
        self.head = struct.Struct(f"{order}HH").unpack_from
        self.long = struct.Struct(f"{order}I").unpack_from
        self.short = struct.Struct(f"{order}H").unpack_from

    def element(self, pos: int) -> tuple[int, bytes, int, int]:
        """Return tag, value representation, start and length of the value of the element at a position."""
        data = self.data
        if pos + 12 > len(data) and pos + 8 > len(data):
            raise _TooShortError
        group, number = self.head(data, pos)
        tag = group << 16 | number
        if group == 0xFFFE or not self.explicit:
            return tag, b"", pos + 8, self.long(data, pos + 4)[0]
        vr = data[pos + 4 : pos + 6]
        if vr in _LONG:
            if pos + 12 > len(data):
                raise _TooShortError
            return tag, vr, pos + 12, self.long(data, pos + 8)[0]
        return tag, vr, pos + 8, self.short(data, pos + 6)[0]

    def step(self, tag: int, vr: bytes, start: int, length: int, found: Found | None, depth: int) -> int:
        """Keep or step over one element and return the position behind it."""
        if length == UNDEFINED or (found is not None and tag in self.inside):
            return self.items(start, length, found if tag in self.inside else None, depth, None)
        stop = start + length
        if found is not None and tag in self.leaves and tag not in found:
            if stop > len(self.data):
                raise _TooShortError
            found[tag] = (vr, self.data[start:stop])
        return stop

    def items(self, pos: int, length: int, found: Found | None, depth: int, take: Callable[[Found], None] | None) -> int:
        """Walk the items of a sequence and return the position behind it."""
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        stop = None if length == UNDEFINED else pos + length
        while stop is None or pos < stop:
            tag, _, start, size = self.element(pos)
            if tag == SEQUENCE_END:
                return start
            if tag != ITEM:
                raise ValueError("no item")
            inner = {} if take is not None else found
            if inner is None and size != UNDEFINED:
                pos = start + size
            else:
                pos = self.dataset(start, None if size == UNDEFINED else start + size, inner, depth + 1)
            if take is not None and inner is not None:
                take(inner)
        return pos

    def dataset(self, pos: int, stop: int | None, found: Found | None, depth: int) -> int:
        """Walk the elements of an item and return the position behind it."""
        while stop is None or pos < stop:
            tag, vr, start, length = self.element(pos)
            if tag == ITEM_END:
                return start
            pos = self.step(tag, vr, start, length, found, depth)
        return pos


def convert(element: Element | None, vr: str, big_endian: bool = False) -> Any:
    """Convert a raw value; a malformed one counts as absent.

    Args:
        element: As `read_raw` keeps it, or None.
        vr: What the dictionary says: CS and LO give one string, `CS*` a list; DS, IS, US, UL, FD one number, with a star
            a list of them. The representation in the file, where it has one, decides how numbers are stored.
        big_endian: Byte order.
    """
    if element is None:
        return None
    stored, raw = element
    many, vr = vr.endswith("*"), vr.rstrip("*")
    kind = vr.encode() if stored in (b"", b"UN") else stored
    if vr in ("CS", "LO", "UI"):
        text = raw.decode("latin-1").strip(" \0")
        if many:
            return [part.strip() for part in text.split("\\")] if text else None
        return text or None
    try:
        if kind in _NUMBERS:
            code = _NUMBERS[kind]
            n = len(raw) // struct.calcsize(code)
            values: list[Any] = list(struct.unpack_from(f"{'>' if big_endian else '<'}{n}{code}", raw))
        else:
            values = [float(part) for part in raw.decode("latin-1").strip(" \0").split("\\") if part.strip()]
    except (ValueError, struct.error):
        return None
    if not values or not all(math.isfinite(value) for value in values):
        return None
    if vr in ("IS", "US", "UL"):
        values = [int(value) for value in values]
    return values if many else values[0]
