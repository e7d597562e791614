"""Siemens mosaics: the slices of one volume laid out as tiles of one image.

How many tiles there are is private: element (0019,100A), or the CSA header (0029,xx10), which also holds the direction in
which slices follow each other.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

from medssl.archive.headers.dicom_raw import RawHeader, read_raw
from medssl.errors import ImageError

_N_TILES, _CSA_IMAGE = 0x0019100A, 0x00291010
_ROWS, _COLUMNS, _SPACING_BETWEEN = 0x00280010, 0x00280011, 0x00180088
MAX_CSA_TAGS = 1000


def mosaic_layout(path: Path) -> dict[str, Any]:
    """Return how a mosaic is laid out, as JSON-able values.

    Args:
        path: A DICOM file whose ImageType holds MOSAIC.

    Returns:
        `n` tiles, `grid` tiles per row and column, `tile` [rows, columns], `step_mm` between slices or None, `normal`
        in whose direction slices follow each other (LPS) or None.

    Raises:
        ImageError: `mosaic`: nothing says how many tiles there are, or they do not fill the image evenly.
    """
    raw = read_raw(path, (_N_TILES, _CSA_IMAGE, _ROWS, _COLUMNS, _SPACING_BETWEEN))
    csa = _csa(raw)
    number = raw.get(_N_TILES, "US") or _first(csa.get("NumberOfImagesInMosaic"))
    rows, columns = raw.get(_ROWS, "US") or 0, raw.get(_COLUMNS, "US") or 0
    n = int(number or 0)
    grid = math.isqrt(n - 1) + 1 if n > 0 else 0
    if n < 1 or rows % grid or columns % grid or not rows or not columns:
        raise ImageError("mosaic", "a mosaic whose header does not say how it is tiled; export it as single slices")
    normal = csa.get("SliceNormalVector", [])
    return {
        "n": n,
        "grid": grid,
        "tile": [rows // grid, columns // grid],
        "step_mm": raw.get(_SPACING_BETWEEN, "DS"),
        "normal": normal[:3] if len(normal) >= 3 else None,
    }


def _first(values: list[float] | None) -> float | None:
    return values[0] if values else None


def _csa(raw: RawHeader) -> dict[str, list[float]]:
    element = raw.elements.get(_CSA_IMAGE)
    if element is None or not element[1]:
        return {}
    try:
        return csa_numbers(element[1])
    except (struct.error, ValueError, IndexError):
        return {}


def csa_numbers(data: bytes) -> dict[str, list[float]]:
    """Return the numeric tags of a CSA header, format 1 or 2.

    Args:
        data: Value of (0029,xx10). Format 2 starts with `SV10`. Then come the number of tags and, per tag, a name of 64
            bytes, four numbers, the number of items and one unused number; per item four numbers, the first or second
            of them its length, and its text, padded to a multiple of four.
    """
    two = data[:4] == b"SV10"
    pos = 8 if two else 0
    count = struct.unpack_from("<I", data, pos)[0]
    if count > MAX_CSA_TAGS:
        raise ValueError("not a CSA header")
    pos += 8
    found: dict[str, list[float]] = {}
    first_length = 0
    for k in range(count):
        name, _, _, _, n_items, _ = struct.unpack_from("<64si4siii", data, pos)
        pos += 84
        if k == 0:
            first_length = n_items
        values = []
        for _ in range(n_items):
            lengths = struct.unpack_from("<4i", data, pos)
            pos += 16
            # Format 1 states lengths relative to the item count of the first tag.
            length = lengths[1] if two else lengths[0] - first_length
            if length < 0 or pos + length > len(data):
                raise ValueError("item outside the header")
            text = data[pos : pos + length].split(b"\0")[0].decode("latin-1").strip()
            pos += -(-length // 4) * 4
            if text:
                values.append(text)
        try:
            found[name.split(b"\0")[0].decode("latin-1")] = [float(text) for text in values]
        except ValueError:
            continue
    return found
