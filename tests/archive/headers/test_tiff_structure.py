"""Directories of a TIFF that libraries must not be given."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile

from medssl.archive.headers.image_headers import read_image_header
from medssl.archive.headers.tiff_structure import MAX_PAGES, check_structure
from medssl.archive.scanning.scan import scan_file
from medssl.domains.microscopy import Microscopy
from medssl.domains.wsi import WSI
from medssl.errors import ImageError
from tests.synthetic_slides import write_ome, write_pyramid, write_svs


def fields(path: Path) -> dict[int, int]:
    """Return where the entry of each tag of the first page starts."""
    with tifffile.TiffFile(path) as tif:
        return {tag.code: tag.offset for tag in tif.pages.first.tags}


def put(path: Path, place: int, form: str, value: int) -> Path:
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, place, value)
    path.write_bytes(bytes(data))
    return path


def test_whole_files__pass(tmp_path: Path) -> None:
    stack = np.zeros((300, 8, 9), np.uint16)
    for number, options in enumerate(
        (
            {},
            {"bigtiff": True},
            {"byteorder": ">"},
            {"bigtiff": True, "byteorder": ">"},
            {"tile": (16, 16)},
            {"imagej": True},
            {"ome": True},
        )
    ):
        path = tmp_path / f"{number}.tif"
        tifffile.imwrite(path, stack, **options)
        check_structure(path)
    for path in (write_pyramid(tmp_path / "p.tif"), write_ome(tmp_path / "o.ome.tif"), write_svs(tmp_path / "s.svs")):
        check_structure(path)


@pytest.mark.data
def test_real_files__pass(shared_data: Path) -> None:
    paths = [*shared_data.rglob("*.tif"), *shared_data.rglob("*.svs")]
    for path in paths:
        check_structure(path)
    assert len(paths) > 5


def broken(tmp_path: Path, what: str) -> Path:
    path = write_pyramid(tmp_path / "p.tif", size=(512, 384), factors=(1.0, 4.0), tile=128)
    entries = fields(path)
    with tifffile.TiffFile(path) as tif:
        second = tif.pages[1].offset
        after_second = second + 2 + 12 * len(tif.pages[1].tags)
        first = tif.pages.first.offset
    if what == "circle":
        return put(path, after_second, "<I", first)
    if what == "width":
        return put(path, entries[256] + 8, "<I", 0xFFFFFF00)
    if what == "tile":
        put(path, entries[322] + 2, "<H", 4)
        return put(path, entries[322] + 8, "<I", 1 << 30)
    if what == "count":
        return put(path, entries[324] + 4, "<I", 1 << 30)
    if what == "place":
        return put(path, entries[324] + 8, "<I", 0xFFFFFF00)
    if what == "next":
        return put(path, after_second, "<I", 0x7FFFFFFF)
    if what == "entries":
        return put(path, first, "<H", 5000)
    raise ValueError(what)


@pytest.mark.parametrize(
    ("what", "reason", "message"),
    [
        ("circle", "unreadable", "pages in a circle"),
        ("width", "unreadable", "fewer tiles or strips than its size makes"),
        ("tile", "unreadable", "tiles of an impossible size"),
        ("count", "truncated", "values behind the end of the file"),
        ("place", "truncated", "values behind the end of the file"),
        ("next", "truncated", "a directory behind the end of the file"),
        ("entries", "unreadable", "more than 4096 entries"),
    ],
)
def test_impossible_directories__reach_no_library(tmp_path: Path, what: str, reason: str, message: str) -> None:
    path = broken(tmp_path, what)
    for read in (
        lambda: check_structure(path),
        lambda: read_image_header(path, "tiff"),
        lambda: WSI().read([path], series_id="0" * 32),
        lambda: Microscopy().read([path], series_id="0" * 32),
    ):
        with pytest.raises(ImageError, match=message) as caught:
            read()
        assert caught.value.reason == reason
    assert scan_file(str(path))[0]["reason"] == reason


def test_garbage_chain__is_not_followed_for_ever(tmp_path: Path) -> None:
    """Directories of no entry, each pointing to the next: tifffile would parse 65,536 of them."""
    path = tmp_path / "chain.tif"
    n = MAX_PAGES + 5
    data = b"II*\0\x08\0\0\0" + b"".join(struct.pack("<HI", 0, 8 + 6 * (k + 1)) for k in range(n)) + bytes(16)
    path.write_bytes(data)
    with pytest.raises(ImageError, match=f"more than {MAX_PAGES} pages"):
        check_structure(path)
