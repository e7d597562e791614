"""Segmentations of 3D Slicer, `.seg.nrrd`: one or more layers, and a table of segments in the header.

Reference: Slicer developer guide, "Segmentation labelmap file format (.seg.nrrd)".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medssl.archive.headers.file_headers import HEAD_BYTES
from medssl.domains.itk_files import read_itk
from medssl.domains.label_files.base import Grid, LabelMap, Painter, placed, values_in
from medssl.errors import ImageError

MAX_HEADER = 1 << 22
_PAIR = re.compile(r"Segment(\d+)_(\w+):=(.*)")


@dataclass(frozen=True)
class Segment:
    """One line of the table of segments.

    Args:
        name: Name, else its id.
        layer: Volume of the file that holds it.
        value: Its value in that volume.
    """

    name: str
    layer: int
    value: int


def read_seg_nrrd(path: Path, grid: Grid, structures: Mapping[str, int] | None = None) -> LabelMap:
    """Read a segmentation onto the grid of the image.

    The stored volume may be cropped to what was drawn: its own origin says where it lies. Its voxels must be voxels of the
    image; oversampled segmentations are refused. A file of a single voxel holds no volume: all its segments are empty. The
    extents in the header (`SegmentN_Extent`) only repeat what the voxels say and are not used.

    Args:
        path: The file.
        grid: Grid of the image.
        structures: Name to value; None numbers the segments in the order of their names.

    Raises:
        GeometryError: It lies on another grid.
        ImageError: It cannot be read, names no segment, or holds values of no segment.
    """
    fields, segments = header_of(path)
    if not segments:
        raise ImageError("unsupported_pixels", "an NRRD without a table of segments; give it as a label map of whole numbers")
    painter = Painter(grid, structures)
    values = painter.declare([segment.name for segment in segments])
    sizes = [int(n) for n in fields.get("sizes", "").split()]
    if int(np.prod(sizes)) == 1:
        return painter.done()
    with open(path, "rb") as handle:
        head = handle.read(HEAD_BYTES)
    for layer in sorted({segment.layer for segment in segments}):
        volume, _ = read_itk(path, "nrrd", head, layer if len(sizes) > 3 else None)
        array, start = placed(volume.array, volume.affine, grid)
        here = {segment.value: value for segment, value in zip(segments, values) if segment.layer == layer}
        unknown = set(values_in(array)) - {0, *here}
        if unknown:
            raise ImageError(
                "unsupported_pixels",
                f"layer {layer} holds {len(unknown)} values that no segment of the file has; save the segmentation again",
            )
        for stored, value in here.items():
            painter.add(value, array == stored, start)
    return painter.done()


def segments_of(path: Path) -> list[Segment]:
    """Return the table of segments; empty for an NRRD that is no segmentation."""
    return header_of(path)[1]


def header_of(path: Path) -> tuple[dict[str, str], list[Segment]]:
    """Return the fields of the header (`sizes`, `type` ...) and the table of segments.

    A segment without a layer is in layer 0. Files of before layers and label values (Slicer 4.10) have one layer per segment,
    with value 1.

    Raises:
        ImageError: The header does not end, or says something impossible.
    """
    with open(path, "rb") as handle:
        head = handle.read(MAX_HEADER)
    text, blank, _ = head.replace(b"\r\n", b"\n").partition(b"\n\n")
    lines = text.decode("utf-8", "replace").split("\n")
    if not blank and path.suffix.lower() != ".nhdr" and len(head) == MAX_HEADER:
        raise ImageError("unreadable", f"an NRRD header of more than {MAX_HEADER} bytes; save the segmentation again")
    fields = {key.strip(): value.strip() for key, sign, value in (line.partition(": ") for line in lines) if sign}
    table: dict[int, dict[str, str]] = {}
    for match in filter(None, map(_PAIR.match, lines)):
        table.setdefault(int(match[1]), {})[match[2]] = match[3].strip()
    old = len(table) > 1 and not any("LabelValue" in row for row in table.values())
    try:
        segments = [
            Segment(
                name=row.get("Name") or row.get("ID") or f"segment {number}",
                layer=int(row.get("Layer", number if old else 0)),
                value=int(row.get("LabelValue", 1)),
            )
            for number, row in sorted(table.items())
        ]
    except ValueError:
        raise ImageError("unreadable", "a layer or label value of a segment is no number; save the segmentation again") from None
    return fields, segments
