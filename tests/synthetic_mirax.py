"""A MIRAX slide of several files, as small as OpenSlide accepts it."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np

SLIDE_ID = "0123456789abcdef0123456789abcdef"


def write_mirax(path: Path, *, tile: int = 64, mpp: float = 0.25, seed: int = 0) -> Path:
    """Write `path` (.mrxs) and the folder of its name: Slidedat.ini, Index.dat, Data0000.dat with two tiles side by side."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    data, entries = bytearray(b"01.02" + SLIDE_ID.encode()), []
    for number in range(2):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (tile, tile, 3), dtype=np.uint8)).save(stream, "JPEG")
        entries.append((number, len(data), len(stream.getvalue()), 0))
        data += stream.getvalue()
    (folder / "Data0000.dat").write_bytes(data)
    # Two roots, the pointer to the one level, its list head, one page of entries.
    start = 5 + len(SLIDE_ID)
    index = struct.pack("<5i", start + 8, 0, start + 12, 0, start + 20)
    index += struct.pack("<2i", len(entries), 0) + b"".join(struct.pack("<4i", *entry) for entry in entries)
    (folder / "Index.dat").write_bytes(b"01.02" + SLIDE_ID.encode() + index)
    (folder / "Slidedat.ini").write_bytes(
        f"""\ufeff[GENERAL]
SLIDE_VERSION=01.02
SLIDE_ID={SLIDE_ID}
IMAGENUMBER_X=2
IMAGENUMBER_Y=1
OBJECTIVE_MAGNIFICATION=40
[HIERARCHICAL]
HIER_COUNT=1
NONHIER_COUNT=0
INDEXFILE=Index.dat
HIER_0_NAME=Slide zoom level
HIER_0_COUNT=1
HIER_0_VAL_0=ZoomLevel_0
HIER_0_VAL_0_SECTION=LAYER_0_LEVEL_0_SECTION
[DATAFILE]
FILE_COUNT=1
FILE_0=Data0000.dat
[LAYER_0_LEVEL_0_SECTION]
OVERLAP_X=0
OVERLAP_Y=0
MICROMETER_PER_PIXEL_X={mpp}
MICROMETER_PER_PIXEL_Y={mpp}
IMAGE_FORMAT=JPEG
IMAGE_FILL_COLOR_BGR=16777215
DIGITIZER_WIDTH={tile}
DIGITIZER_HEIGHT={tile}
IMAGE_CONCAT_FACTOR=0
""".replace("\n", "\r\n").encode()
    )
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(stream, "JPEG")
    path.write_bytes(stream.getvalue())
    return path
