"""Walk the raw bytes of a DICOM data set: only the elements asked for are kept, all others are stepped over.

pydicom builds an object for every nested element: a multi-frame file of 20,000 frames holds hundreds of thousands, and building
them takes minutes and gigabytes. Here the bytes are read piece by piece, and nothing is longer in memory than one sequence; what a length
promises is never allocated before the bytes are there.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from medssl.errors import ImageError

FIRST_BYTES = 1 << 16
MAX_SEQUENCE_BYTES = 1 << 28
"""Of one element of the top level that is looked into; 20,000 frames of a scanner take 20 to 100 MB."""
MAX_INFLATED_BYTES = 1 << 28
"""Of the header of a deflated file: a few KB inflate to gigabytes where somebody wants them to."""
FORMS_FROM, MAX_FORMS, MAX_FORM_ELEMENTS = 256, 24, 500
"""From which item on forms are kept (making one costs as much as walking over twenty), how many at once, and of how many elements."""
UNDEFINED = 0xFFFFFFFF
META_SYNTAX = 0x00020010
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
PIXEL_DATA = 0x7FE00010
PIXELS = (0x7FE00008, 0x7FE00009, PIXEL_DATA)
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
        pixel_offset: Where the value of PixelData starts; None without it (floating point pixels included) or in a deflated file.
        pixel_length: Its length; None for encapsulated pixels.
        cut: The bytes ended inside an element.
    """

    elements: Found
    items: dict[int, list[Any]]
    big_endian: bool = False
    syntax: str = ""
    pixel_offset: int | None = None
    pixel_length: int | None = None
    cut: bool = False

    def get(self, tag: int, vr: str) -> Any:
        """Return the converted value of an element (see `convert`), or None."""
        return convert(self.elements.get(tag), vr, self.big_endian)


Each = Mapping[int, Callable[[Found], Any]]


class BoundedFile(io.BufferedReader):
    """A file for parsers that allocate what a length field promises, up to 4 GB, before they read it."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """Read, asking for no more than there is."""
        if size is not None and size > FIRST_BYTES:
            size = min(size, max(0, self.size - self.tell()))
        return super().read(size)


def read_raw(path: Path, leaves: Collection[int], *, inside: Collection[int] = (), each: Each | None = None) -> RawHeader:
    """Collect elements of a DICOM file up to its pixel data.

    Args:
        path: The file.
        leaves: Tags wanted. Of those that occur several times, the last of the top level counts, else the first.
        inside: Sequences to look into; their leaves are put beside those around them.
        each: Sequence of the top level -> what to make of the leaves of each of its items.

    Raises:
        ImageError: `unreadable`: the data set cannot be parsed.
    """
    with open(path, "rb") as handle:
        header = parse_stream(handle, os.fstat(handle.fileno()).st_size, leaves, inside=inside, each=each)
    if header.cut:
        raise ImageError("unreadable", "the DICOM header ends inside an element; copy the file again from its source")
    return header


def parse_raw(head: bytes, leaves: Collection[int], *, inside: Collection[int] = (), each: Each | None = None) -> RawHeader | None:
    """Do the same with the first bytes of a file; None where they end before the header does, or cannot be parsed."""
    try:
        header = parse_stream(io.BytesIO(head), None, leaves, inside=inside, each=each)
    except ImageError:
        return None
    return None if header.cut else header


def parse_stream(
    stream: BinaryIO, size: int | None, leaves: Collection[int], *, inside: Collection[int] = (), each: Each | None = None
) -> RawHeader:
    """Do the same with an open file; where it ends inside an element, what was found before is returned, with `cut`.

    Args:
        stream: The file, or its beginning.
        size: Bytes of the whole file; None: unknown, its end is then no end of the header.
        leaves: See `read_raw`.
        inside: See `read_raw`.
        each: See `read_raw`.

    Raises:
        ImageError: `unreadable`.
    """
    try:
        return _parse(_Window(stream), size, frozenset(leaves), frozenset(inside), each or {})
    except (struct.error, ValueError, IndexError, OverflowError, zlib.error) as err:
        raise ImageError(
            "unreadable", f"DICOM header cannot be parsed ({type(err).__name__}); copy the file again from its source"
        ) from err


class _Window:
    """The part of a stream that is in memory: `data`, which starts at byte `base`."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.base = stream, 0
        self.data: bytes = stream.read(FIRST_BYTES)

    def move(self, pos: int) -> bool:
        """Drop what lies before a place in `data` and read on behind it; False at the end of the stream."""
        kept = self.data[pos:]
        if len(kept) > MAX_SEQUENCE_BYTES:
            raise ValueError("a sequence too long")
        if pos > len(self.data):
            self.stream.seek(self.base + pos)
        more = self.stream.read(max(FIRST_BYTES, 15 * len(kept)))
        self.base += pos
        self.data = kept + more
        return bool(more)


class _Inflated:
    """A deflated data set as a stream that is read forwards."""

    def __init__(self, packed: bytes, stream: BinaryIO) -> None:
        self.packed, self.stream, self.place = packed, stream, 0
        self.inflater = zlib.decompressobj(-15)

    def read(self, n: int) -> bytes:
        parts, want = [], min(n, MAX_INFLATED_BYTES - self.place)
        while want > 0 and not self.inflater.eof:
            self.packed = self.packed or self.stream.read(FIRST_BYTES)
            part = self.inflater.decompress(self.packed, want)
            if not part and not self.packed:
                break
            self.packed = self.inflater.unconsumed_tail
            parts.append(part)
            want -= len(part)
            self.place += len(part)
        return b"".join(parts)

    def seek(self, place: int) -> None:
        while place > self.place and self.read(min(place - self.place, 1 << 20)):
            pass


def _parse(window: _Window, size: int | None, leaves: frozenset[int], inside: frozenset[int], each: Each) -> RawHeader:
    header = RawHeader({}, {tag: [] for tag in each})
    meta: Found = {}
    known, end = size is not None, size or 0
    pos = 132 if window.data[128:132] == b"DICM" else 0
    # The meta group is explicit little endian, whatever follows.
    walker, in_meta = _Walker(window.data, True, "<", frozenset((META_SYNTAX,)), frozenset()), True
    while True:
        if len(window.data) - pos < 12:
            window.move(pos)
            pos = 0
        if in_meta and window.data[pos : pos + 2] != b"\x02\0":
            header.syntax = meta.get(META_SYNTAX, (b"", b""))[1].decode("latin-1").strip(" \0")
            if header.syntax == DEFLATED:
                window, pos, end = _Window(_Inflated(window.data[pos:], window.stream)), 0, MAX_INFLATED_BYTES
            walker, in_meta = _dataset_walker(window.data[pos:], header, leaves, inside), False
        walker.data = data = window.data
        try:
            tag, vr, start, length = walker.element(pos)
            if tag in PIXELS:
                if tag == PIXEL_DATA and header.syntax != DEFLATED:
                    header.pixel_offset = window.base + start
                    header.pixel_length = None if length == UNDEFINED else length
                return header
            if tag in each:
                made: list[Any] = []
                pos = walker.items(start, length, lambda found, make=each[tag], made=made: made.append(make(found)))  # type: ignore[misc]
                header.items[tag] += made
            elif tag in inside:
                pos = walker.inner(start, length, header.elements)
            elif length == UNDEFINED:
                pos = walker.skip(start, vr)
            else:
                pos = start + length
                if tag in walker.leaves:
                    if pos > len(data):
                        raise _TooShortError
                    (meta if in_meta else header.elements)[tag] = (vr, data[start:pos])
        except _TooShortError:
            if not window.move(pos):
                # Fewer bytes than an element's head are padding.
                header.cut = not known or len(window.data) >= 8 or window.base > end
                return header
            pos = 0


def _dataset_walker(data: bytes, header: RawHeader, leaves: frozenset[int], inside: frozenset[int]) -> _Walker:
    """Find out byte order and form, and the transfer syntax where the file does not state it."""
    header.big_endian = header.syntax == "1.2.840.10008.1.2.2" or (not header.syntax and data[:2] == b"\0\x08")
    explicit = data[4:6].isalpha() and data[4:6].isupper()
    if not header.syntax:
        header.syntax = "1.2.840.10008.1.2.2" if header.big_endian else ("1.2.840.10008.1.2.1" if explicit else "1.2.840.10008.1.2")
    return _Walker(b"", explicit, ">" if header.big_endian else "<", leaves, inside)


class _Walker:
    """Steps over the elements of `data`, keeping the leaves wanted. Nothing recurses: nesting may be as deep as it likes."""

    def __init__(self, data: bytes, explicit: bool, order: str, leaves: frozenset[int], inside: frozenset[int]) -> None:
        self.data, self.explicit, self.order, self.leaves, self.inside = data, explicit, order, leaves, inside
        self.implicit_head = struct.Struct(f"{order}HHI").unpack_from
        self.explicit_head = struct.Struct(f"{order}HH2sH").unpack_from
        self.long = struct.Struct(f"{order}I").unpack_from

    def element(self, pos: int) -> tuple[int, bytes, int, int]:
        """Return tag, value representation, start and length of the value of the element at a position."""
        try:
            if self.explicit:
                group, number, vr, length = self.explicit_head(self.data, pos)
                if vr in _LONG:
                    return group << 16 | number, vr, pos + 12, self.long(self.data, pos + 8)[0]
                if b"AA" <= vr <= b"ZZ" and group != 0xFFFE:
                    return group << 16 | number, vr, pos + 8, length
            # Delimiters have no representation, and some writers put implicit elements between explicit ones.
            group, number, length = self.implicit_head(self.data, pos)
        except struct.error as err:
            raise _TooShortError from err
        return group << 16 | number, b"", pos + 8, length

    def skip(self, pos: int, vr: bytes) -> int:
        """Return the position behind an element of undefined length, whose value starts here."""
        if self._turns_implicit(pos, vr):
            return _Walker(self.data, False, self.order, self.leaves, self.inside).items(pos, UNDEFINED, None)
        return self.items(pos, UNDEFINED, None)

    def _turns_implicit(self, pos: int, vr: bytes) -> bool:
        """Return whether the items of an element of undefined length are implicit in an explicit file: what is unknown (UN) is."""
        inner = self.data[pos + 12 : pos + 14]
        return vr == b"UN" and self.explicit and not (inner.isalpha() and inner.isupper())

    def items(self, pos: int, length: int, take: Callable[[Found], None] | None) -> int:
        """Give the leaves of each item of a sequence away and return the position behind it; None steps over everything.

        Most frames of a file have elements of the same lengths: items are compared with the form of earlier ones first, which
        is five times as fast as walking.
        """
        data, stop = self.data, None if length == UNDEFINED else pos + length
        if stop is not None and stop > len(data):
            raise _TooShortError
        forms: list[_Form] = []
        count = 0
        while stop is None or pos < stop:
            for k, form in enumerate(forms):
                match = form.match(data, pos)
                if match is not None:
                    pos = match.end()
                    if k:
                        forms.insert(0, forms.pop(k))
                    if take is not None:
                        take({tag: (vr, value) for (tag, vr), value in zip(form.kept, match.groups())})
                    break
            else:
                tag, _, start, size = self.element(pos)
                if tag == SEQUENCE_END:
                    return start
                if tag != ITEM:
                    raise ValueError("no item")
                count += 1
                seen: Seen | None = [] if count > FORMS_FROM and len(forms) < MAX_FORMS else None
                found: Found | None = None if take is None else {}
                end = self.walk(start, None if size == UNDEFINED else start + size, found, seen)
                if take is not None and found is not None:
                    take(found)
                if seen is not None and (made := _form(data, pos, start, seen, end)) is not None:
                    forms.append(made)
                pos = end
        return pos

    def inner(self, pos: int, length: int, found: Found) -> int:
        """Keep the leaves of all items of a sequence and return the position behind it."""
        own: Found = {}
        pos = self.items(pos, length, lambda item: own.update({tag: value for tag, value in item.items() if tag not in own}))
        for tag, value in own.items():
            found.setdefault(tag, value)
        return pos

    def walk(self, pos: int, stop: int | None, found: Found | None, seen: Seen | None = None) -> int:
        """Walk over an item and return the position behind.

        Args:
            pos: Where its value starts.
            stop: Where it ends; None: at its delimiter.
            found: Takes its leaves and those of its sequences of interest; None steps over everything.
            seen: Takes the elements that were walked over.
        """
        data, leaves, inside = self.data, self.leaves, self.inside
        depth = 0  # open items and sequences of undefined length
        hidden = 0 if found is None else None  # the depth of the outermost open sequence that is of no interest
        while stop is None or pos < stop:
            tag, vr, start, length = self.element(pos)
            kept = False
            next_pos = start
            if tag == ITEM:
                if length == UNDEFINED:
                    depth += 1
                elif hidden is not None:
                    next_pos = start + length
            elif tag in (ITEM_END, SEQUENCE_END):
                if depth == hidden:
                    hidden = None
                depth -= 1
            elif length == UNDEFINED and self._turns_implicit(start, vr):
                next_pos, vr = self.skip(start, vr), b"?"
            elif length == UNDEFINED:
                depth += 1
                if hidden is None and tag not in inside:
                    hidden = depth
            elif hidden is not None or tag not in inside:
                next_pos = start + length
                kept = hidden is None and tag in leaves and found is not None and tag not in found
                if kept and found is not None:
                    if next_pos > len(data):
                        raise _TooShortError
                    found[tag] = (vr, data[start:next_pos])
            if seen is not None:
                seen.append((pos, start, tag if kept else 0, vr))
            pos = next_pos
            if depth < 0:
                break
        return pos


Seen = list[tuple[int, int, int, bytes]]
"""Start of each element and of its value, its tag if it is kept, and its representation."""


@dataclass
class _Form:
    """What an item looks like byte by byte, except for its values.

    Args:
        match: Matches items of this form; one group per leaf.
        kept: Tag and representation of each group.
    """

    match: Callable[[bytes, int], re.Match[bytes] | None]
    kept: list[tuple[int, bytes]]


def _form(data: bytes, pos: int, start: int, seen: Seen, end: int) -> _Form | None:
    """Return the form of an item that was walked over, or None for one that has no fixed form."""
    if len(seen) > MAX_FORM_ELEMENTS:
        return None
    parts = [re.escape(data[pos:start])]
    for (place, value, tag, vr), (following, *_) in zip(seen, [*seen[1:], (end, end, 0, b"")]):
        if vr == b"?" or value > following:
            return None
        gap = b".{%d}" % (following - value)
        parts += [re.escape(data[place:value]), b"(" + gap + b")" if tag else gap]
    try:
        pattern = re.compile(b"".join(parts), re.DOTALL)
    except (re.error, OverflowError):
        return None
    return _Form(pattern.match, [(tag, vr) for _, _, tag, vr in seen if tag])


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
