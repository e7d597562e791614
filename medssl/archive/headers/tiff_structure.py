"""Whether the directories of a TIFF are such that libraries may open it.

tifffile and OpenSlide trust what directories say: one that points into other data becomes thousands of pages that are parsed for minutes,
and a width of four billion becomes gigabytes of tile pointers, for want of which OpenSlide ends the process. What is looked at here are counts
and places; a file in which they are possible costs one read per page.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medssl.errors import ImageError

MAX_PAGES = 10_000
MAX_ENTRIES = 4096
SEGMENTS_MISSING = 16
"""A page may list half as many tiles or strips as its size makes, less a few: TIFF libraries forgive what some writers do."""
MAX_TILE_PIXELS = 1 << 26
SPARE_BYTES = 1 << 20
"""Values of all pages may take four times the file and so much more: pages may share them, a colour profile for instance."""
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Field type -> bytes; others are left out by all readers."""
_WIDTH, _LENGTH, _STRIPS, _SAMPLES, _ROWS, _PLANAR, _TILE_WIDTH, _TILE_LENGTH, _TILES = 256, 257, 273, 277, 278, 284, 322, 323, 324
_SUB_PAGES = (330, 34665, 34853, 40965)
"""SubIFDs, and the directories of EXIF."""
_NDPI = 65420
"""Hamamatsu writes places beyond 4 GB into files that have no room for them; only its own readers understand these."""


def check_structure(path: Path) -> None:
    """Walk over the directories of a TIFF or BigTIFF.

    Raises:
        ImageError: `truncated`: something lies behind the end of the file; `unreadable`: what directories promise cannot be.
    """
    with open(path, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        head = handle.read(16)
        order = ">" if head[:2] == b"MM" else "<"
        big = head[2:4] in (b"+\0", b"\0+")
        if len(head) < 16:
            raise _fault("truncated", "a header of less than 16 bytes")
        (first,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", head, 8 if big else 4)
        chains, seen, spent = [first], set[int](), 0
        while chains:
            start, own = chains.pop(), set[int]()
            while start:
                if start in own:  # tifffile goes round 65,536 times
                    raise _fault("unreadable", "pages in a circle")
                if start in seen:
                    break
                seen.add(start)
                own.add(start)
                if len(seen) > MAX_PAGES:
                    raise _fault("unreadable", f"more than {MAX_PAGES} pages")
                entries, start = _directory(handle, start, size, order, big)
                values: dict[int, tuple[int, int]] = {}
                for tag, count, n_bytes, place, inline in entries:
                    if tag == _NDPI:
                        return
                    spent += n_bytes if inline is None else 0
                    if inline is None and place + n_bytes > size:
                        raise _fault("truncated", "values behind the end of the file")
                    values[tag] = (count, place if inline is None else inline)
                    if tag in _SUB_PAGES:
                        chains += [inline] if inline is not None else _places(handle, place, count, n_bytes, order)
                if spent > 4 * size + SPARE_BYTES:
                    raise _fault("unreadable", "directories that share their values")
                _check_page(values)


def _fault(reason: str, what: str) -> ImageError:
    return ImageError(reason, f"a TIFF with {what}; copy the file again from its source")


def _directory(
    handle: Any, start: int, size: int, order: str, big: bool
) -> tuple[Iterator[tuple[int, int, int, int, int | None]], int]:
    """Return tag, count, bytes, place and the first value where it stands in the entry itself, of each entry; and the next directory."""
    if start + (8 if big else 2) > size:
        raise _fault("truncated", "a directory behind the end of the file")
    handle.seek(start)
    head = handle.read(8 if big else 2)
    (n,) = struct.unpack(f"{order}{'Q' if big else 'H'}", head)
    if n > MAX_ENTRIES:
        raise _fault("unreadable", f"a directory of more than {MAX_ENTRIES} entries")
    room, width = (8, 20) if big else (4, 12)
    block = handle.read(n * width + room)
    if len(block) < n * width:
        raise _fault("truncated", "a directory that the file ends in")
    # The last of some writers' directories ends without a pointer.
    following = int.from_bytes(block[n * width :], "big" if order == ">" else "little")
    return _entries(block[: n * width], order, big, room, width), following


def _entries(block: bytes, order: str, big: bool, room: int, width: int) -> Iterator[tuple[int, int, int, int, int | None]]:
    word = "Q" if big else "I"
    for at in range(0, len(block), width):
        tag, kind, count, place = struct.unpack_from(f"{order}HH{word}{word}", block, at)
        if kind not in _SIZES:
            continue
        n_bytes = count * _SIZES[kind]
        inline = None
        if n_bytes <= room:
            value = block[at + width - room : at + width - room + _SIZES[kind]]
            inline = int.from_bytes(value, "big" if order == ">" else "little")
        yield tag, count, n_bytes, place, inline


def _places(handle: Any, place: int, count: int, n_bytes: int, order: str) -> list[int]:
    width = n_bytes // count
    handle.seek(place)
    data = handle.read(min(n_bytes, MAX_PAGES * width))
    return [int.from_bytes(data[at : at + width], "big" if order == ">" else "little") for at in range(0, len(data), width)]


def _check_page(values: dict[int, tuple[int, int]]) -> None:
    """Compare the tiles or strips that a page's size makes with those it lists."""

    def value(tag: int, default: int) -> int:
        return values.get(tag, (0, default))[1]

    width, length = value(_WIDTH, 0), value(_LENGTH, 0)
    planes = value(_SAMPLES, 1) if value(_PLANAR, 1) == 2 else 1
    if _TILES in values:
        across, down = value(_TILE_WIDTH, 0), value(_TILE_LENGTH, 0)
        if not across or not down or across * down > MAX_TILE_PIXELS:
            raise _fault("unreadable", "tiles of an impossible size")
        promised, listed = -(-width // across) * -(-length // down) * planes, values[_TILES][0]
    else:
        promised, listed = -(-length // (value(_ROWS, 0) or length or 1)) * planes, values.get(_STRIPS, (0, 0))[0]
    if promised > 2 * listed + SEGMENTS_MISSING:
        raise _fault("unreadable", "fewer tiles or strips than its size makes")
