"""Whether an LZW stream of a TIFF is intact.

imagecodecs (2026.3.6) takes codes of a damaged stream that its table does not hold yet for pointers, which ends the process in one
of some thousand damaged files; libtiff refuses them. Can go when imagecodecs does.
"""

from __future__ import annotations

from functools import cache

import numpy as np

CLEAR, END, FIRST = 256, 257, 258
LZW = 5
"""TIFF's Compression."""
_CODES = 4096
"""At once; writers clear the table after 3,837."""


@cache
def _widths(start: int) -> np.ndarray:
    """Return the bits of the codes from number `start` after a clearing; a table of 511 entries already takes ten (TIFF 6.0, section 13)."""
    size = np.minimum(FIRST - 1 + np.arange(start, start + _CODES), 4094)
    widths: np.ndarray = np.floor(np.log2(size + 1)).astype(np.int64) + 1
    return widths


def lzw_intact(data: bytes) -> bool:
    """Return whether every code of a stream, up to its end mark or the end of the data, is in the table when it comes."""
    if data[:2] == b"\0\1":
        return True  # the order of bits before TIFF 6.0, which is decoded by other code
    words = np.frombuffer(data + bytes(4), dtype=np.uint8).astype(np.uint32)
    bit, number, n_bits = 0, 0, 8 * len(data)
    while True:
        widths = _widths(min(number, _CODES))
        places = bit + np.concatenate([[0], np.cumsum(widths)])
        count = int(np.searchsorted(places, n_bits, side="right")) - 1  # whole codes
        if count < 1:
            return True
        places, widths = places[: count + 1], widths[:count]
        first, shift = places[:-1] >> 3, places[:-1] & 7
        three = words[first] << 16 | words[first + 1] << 8 | words[first + 2]
        codes = (three >> (24 - shift - widths).astype(np.uint32)) & ((1 << widths) - 1).astype(np.uint32)
        marks = np.flatnonzero((codes == CLEAR) | (codes == END))
        stop = int(marks[0]) if marks.size else len(codes)
        # The first code after a clearing is a byte; every later one may be the entry that it makes itself.
        limits = FIRST - 1 + np.arange(number, number + stop)
        if number == 0 and stop:
            limits[0] = 255
        if (codes[:stop] > np.minimum(limits, 4095)).any():
            return False
        if marks.size and codes[stop] == END:
            return True
        bit = int(places[stop + 1] if marks.size else places[-1])
        number = 0 if marks.size else number + stop
