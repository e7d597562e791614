"""Multi-frame DICOM files for tests, written byte by byte: thousands of frames in no time, any transfer syntax."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.synthetic import LPS, _decimal

LONG = ("OB", "OW", "SQ", "UN", "UT")
ENHANCED = {"CT": "1.2.840.10008.5.1.4.1.1.2.1", "MR": "1.2.840.10008.5.1.4.1.1.4.1"}


def text(values: Any) -> bytes:
    """Join values with backslashes and pad to an even length."""
    many = values if isinstance(values, list | tuple | np.ndarray) else [values]
    data = "\\".join(part if isinstance(part, str) else _decimal(float(part)) for part in many).encode()
    return data + b" " * (len(data) % 2)


class Writer:
    """Makes data elements in one encoding.

    Args:
        implicit: Implicit VR.
        big: Big endian.
        undefined: Sequences and items of undefined length.
    """

    def __init__(self, *, implicit: bool = False, big: bool = False, undefined: bool = False) -> None:
        self.implicit, self.undefined, self.order = implicit, undefined, ">" if big else "<"

    def element(self, tag: int, vr: str, value: Any) -> bytes:
        """Return one element; numbers are packed, anything else is text unless it is bytes already."""
        if vr in ("US", "SS", "UL", "FD", "FL") and not isinstance(value, bytes):
            many = value if isinstance(value, list | tuple) else [value]
            code = {"US": "H", "SS": "h", "UL": "I", "FD": "d", "FL": "f"}[vr]
            data = struct.pack(f"{self.order}{len(many)}{code}", *many)
        elif vr == "UI":
            data = value.encode() + b"\0" * (len(value) % 2)
        else:
            data = value if isinstance(value, bytes) else text(value)
        return self.head(tag, vr, len(data)) + data

    def head(self, tag: int, vr: str, length: int) -> bytes:
        head = struct.pack(f"{self.order}HH", tag >> 16, tag & 0xFFFF)
        if self.implicit:
            return head + struct.pack(f"{self.order}I", length)
        if vr in LONG:
            return head + vr.encode() + b"\0\0" + struct.pack(f"{self.order}I", length)
        return head + vr.encode() + struct.pack(f"{self.order}H", length)

    def sequence(self, tag: int, items: Sequence[bytes]) -> bytes:
        mark = f"{self.order}HHI"
        if self.undefined:
            body = b"".join(
                struct.pack(mark, 0xFFFE, 0xE000, 0xFFFFFFFF) + item + struct.pack(mark, 0xFFFE, 0xE00D, 0) for item in items
            )
            return self.head(tag, "SQ", 0xFFFFFFFF) + body + struct.pack(mark, 0xFFFE, 0xE0DD, 0)
        body = b"".join(struct.pack(mark, 0xFFFE, 0xE000, len(item)) + item for item in items)
        return self.head(tag, "SQ", len(body)) + body


def meta_group(syntax: str, sop_class: str) -> bytes:
    """Return preamble and file meta information."""
    w = Writer()
    body = w.element(0x00020001, "OB", b"\0\1") + w.element(0x00020002, "UI", sop_class)
    body += w.element(0x00020003, "UI", "1.2.3.4") + w.element(0x00020010, "UI", syntax)
    return b"\0" * 128 + b"DICM" + w.element(0x00020000, "UL", len(body)) + body


def write_enhanced(
    path: Path,
    frames: np.ndarray,
    affine: np.ndarray,
    places: Sequence[int],
    *,
    modality: str = "MR",
    syntax: str = "1.2.840.10008.1.2.1",
    undefined: bool = False,
    extra: Callable[[Writer, int], bytes] | None = None,
    rescale: Callable[[int], tuple[float, float]] | None = None,
    pixel_data: bytes | None = None,
    frame_type: Sequence[str] = ("ORIGINAL", "PRIMARY", "M", "NONE"),
) -> Path:
    """Write an enhanced CT or MR.

    Args:
        path: The file.
        frames: (N, rows, columns) stored values, uint16 or int16.
        affine: (column, row, slice) index to RAS+ mm.
        places: Slice number of each frame.
        modality: CT or MR.
        syntax: Transfer syntax UID; a compressed one needs `pixel_data`.
        undefined: Sequences of undefined length.
        extra: Frame number -> further bytes of its functional groups.
        rescale: Frame number -> slope and intercept; shared 1 and 0 (CT: -1024) by default.
        pixel_data: The value of the pixel element instead of the raw frames.
        frame_type: FrameType of all frames.
    """
    w = Writer(implicit=syntax == "1.2.840.10008.1.2", big=syntax == "1.2.840.10008.1.2.2", undefined=undefined)
    n, rows, columns = frames.shape
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    cosines = [*(lps[:3, 0] / spacing[0]), *(lps[:3, 1] / spacing[1])]

    def transformed(slope: float, intercept: float) -> bytes:
        body = w.element(0x00281052, "DS", intercept) + w.element(0x00281053, "DS", slope)
        return w.sequence(0x00289145, [body + w.element(0x00281054, "LO", "HU" if modality == "CT" else "US")])

    type_macro = 0x00189329 if modality == "CT" else 0x00189226
    shared = w.sequence(type_macro, [w.element(0x00089007, "CS", list(frame_type))])
    shared += w.sequence(0x00209116, [w.element(0x00200037, "DS", cosines)])
    measures = w.element(0x00180050, "DS", spacing[2]) + w.element(0x00280030, "DS", [spacing[1], spacing[0]])
    shared += w.sequence(0x00289110, [measures])
    if rescale is None:
        shared += transformed(1.0, -1024.0 if modality == "CT" else 0.0)
    items = []
    for k in range(n):
        position = (lps @ [0.0, 0.0, float(places[k]), 1.0])[:3]
        item = extra(w, k) if extra else b""
        item += w.sequence(0x00209113, [w.element(0x00200032, "DS", list(position))])
        if rescale is not None:
            item += transformed(*rescale(k))
        items.append(item)
    body = w.element(0x00080008, "CS", list(frame_type)) + w.element(0x00080016, "UI", ENHANCED[modality])
    body += w.element(0x00080060, "CS", modality)
    body += w.element(0x00280002, "US", 1) + w.element(0x00280004, "CS", "MONOCHROME2")
    body += w.element(0x00280008, "IS", str(n))
    for tag, value in ((0x00280010, rows), (0x00280011, columns), (0x00280100, 16), (0x00280101, 16), (0x00280102, 15)):
        body += w.element(tag, "US", value)
    body += w.element(0x00280103, "US", int(frames.dtype.kind == "i"))
    body += w.sequence(0x52009229, [shared]) + w.sequence(0x52009230, items)
    if pixel_data is None:
        raw = frames.astype(frames.dtype.newbyteorder(w.order)).tobytes()
        body += w.element(0x7FE00010, "OW", raw)
    else:
        body += w.head(0x7FE00010, "OB", 0xFFFFFFFF) + pixel_data
    path.write_bytes(meta_group(syntax, ENHANCED[modality]) + body)
    return path
