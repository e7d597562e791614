"""Headers of pictures, clips and slides in common formats. No pixel is decoded and no text of the file is returned.

Pillow, tifffile and PyAV parse; dots per inch say how large a picture is printed and are never taken for spacing.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medssl.archive.headers.file_headers import IMAGE_KINDS, VIDEO_KINDS
from medssl.archive.headers.tiff_structure import check_structure
from medssl.errors import ImageError

TAIL_BYTES = 65536
_ENDS = {"png": b"IEND", "jpeg": b"\xff\xd9", "gif": b"\x3b"}
_MODES = {
    "1": ("uint8", 1, 1, "MONOCHROME2"), "L": ("uint8", 8, 1, "MONOCHROME2"), "LA": ("uint8", 8, 1, "MONOCHROME2"),
    "P": ("uint8", 8, 3, "PALETTE COLOR"), "PA": ("uint8", 8, 3, "PALETTE COLOR"), "RGB": ("uint8", 8, 3, "RGB"), "RGBA": ("uint8", 8, 3, "RGB"),
    "RGBX": ("uint8", 8, 3, "RGB"), "YCbCr": ("uint8", 8, 3, "YBR_FULL"), "CMYK": ("uint8", 8, 4, "other"), "LAB": ("uint8", 8, 3, "other"),
    "I;16": ("uint16", 16, 1, "MONOCHROME2"), "I;16B": ("uint16", 16, 1, "MONOCHROME2"), "I": ("int32", 32, 1, "MONOCHROME2"),
    "F": ("float32", 32, 1, "MONOCHROME2"),
}  # fmt: skip
"""Pillow's mode -> dtype, bits, channels, photometric interpretation."""


def read_image_header(path: Path, kind: str) -> dict[str, Any]:
    """Read the header of a file that `sniff` called one of `IMAGE_KINDS` or `VIDEO_KINDS`.

    Args:
        path: The file.
        kind: What `sniff` returned.

    Returns:
        JSON-able values: `format`, `kind` (image, cine or slide), `shape` (H, W) or (T, H, W), `channels`, `dtype`, `bits`, `photometric`,
        `spacing_mm` (rows, columns) or None, `mpp`, `n_frames`, `frame_time_ms`, `fps_source`, `flags`, `reason`.

    Raises:
        ImageError: `unreadable`, `truncated`, or `no_decoder` for videos without the extra.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote text of the file
        if kind in VIDEO_KINDS:
            return _video(path, kind)
        if kind == "tiff":
            return _tiff(path)
        return _picture(path, kind)


def _header(form: str, shape: tuple[int, ...], **changes: Any) -> dict[str, Any]:
    return {
        "format": form,
        "kind": "image" if len(shape) == 2 else "cine",
        "shape": list(shape),
        "channels": 1,
        "dtype": "uint8",
        "bits": 8,
        "photometric": "unknown",
        "spacing_mm": None,
        "mpp": None,
        "n_frames": 1 if len(shape) == 2 else shape[0],
        "frame_time_ms": None,
        "fps_source": None,
        "flags": [],
        "reason": None,
        **changes,
    }


def _unreadable(form: str, err: Exception) -> ImageError:
    return ImageError("unreadable", f"{form} header cannot be parsed ({type(err).__name__}); copy the file again from its source")


def _picture(path: Path, kind: str) -> dict[str, Any]:
    from PIL import Image

    with open(path, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        head = handle.read(64)
        handle.seek(max(0, size - TAIL_BYTES))
        tail = handle.read(TAIL_BYTES)
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            mode, frames = picture.mode, int(getattr(picture, "n_frames", 1))
            duration = picture.info.get("duration")
    except Exception as err:  # Pillow raises many classes on damaged files
        raise _unreadable(kind, err) from err
    if kind in _ENDS and _ENDS[kind] not in tail:
        raise ImageError("truncated", f"the {kind} stream has no end; copy the file again from its source")
    dtype, bits, channels, photometric = _MODES.get(mode, ("unknown", None, None, "other"))
    if kind == "png" and len(head) >= 26 and head[24] == 16:  # Pillow names 16-bit colour RGB
        dtype, bits = "uint16", 16
    shape = (height, width) if frames == 1 else (frames, height, width)
    time_ms = float(duration) if frames > 1 and isinstance(duration, int | float) and duration > 0 else None
    lossy = {"flags": ["lossy"]} if kind == "jpeg" else {}
    return _header(
        kind,
        shape,
        channels=channels,
        dtype=dtype,
        bits=bits,
        photometric=photometric,
        frame_time_ms=time_ms,
        fps_source="container" if time_ms else None,
        **lossy,
    )


def _tiff(path: Path) -> dict[str, Any]:
    import tifffile

    from medssl.archive.headers.slide_headers import slide_header

    check_structure(path)
    with open(path, "rb") as handle:
        head = handle.read(4096)
    slide = slide_header(path, head)
    if slide is not None:
        return {**_header("tiff", tuple(slide["shape"])), **slide}
    logger = logging.getLogger("tifffile")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # its messages quote tags
    try:
        with tifffile.TiffFile(path) as tif:
            if not tif.pages:
                raise ValueError("no page")
            page: Any = tif.pages[0]
            ends = [a + b for p in tif.pages for a, b in zip(p.dataoffsets[-1:], p.databytecounts[-1:])]
            pages, samples = len(tif.pages), int(page.samplesperpixel)
            shape, dtype, bits = (int(page.imagelength), int(page.imagewidth)), page.dtype, page.bitspersample
            photometric = int(page.photometric)
            lossy = int(page.compression) in (6, 7, 33003, 33005, 34892)
            ome = tif.ome_metadata if tif.is_ome else None
    except Exception as err:  # tifffile raises many classes on damaged files
        raise _unreadable("tiff", err) from err
    finally:
        logger.setLevel(level)
    if ends and max(ends) > os.path.getsize(path):
        raise ImageError("truncated", "strips or tiles lie behind the end of the file; copy the file again from its source")
    names = {0: "MONOCHROME1", 1: "MONOCHROME2", 2: "RGB", 3: "PALETTE COLOR", 6: "YBR_FULL"}
    flags = [*(["lossy"] if lossy else []), *(["multi_page"] if pages > 1 else [])]
    return _header(
        "tiff",
        shape,
        channels=samples if pages == 1 else pages * samples,
        dtype="unknown" if dtype is None else str(dtype),
        bits=int(bits) if isinstance(bits, int) else None,
        photometric=names.get(photometric, "other"),
        spacing_mm=None if ome is None else _ome_spacing(ome),
        flags=flags,
    )


def _ome_spacing(text: str) -> list[float] | None:
    """Return (rows, columns) in mm from the physical size of OME-XML."""
    from xml.etree import ElementTree

    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        return None
    try:
        pixels = next((node for node in ElementTree.fromstring(text).iter() if node.tag.rpartition("}")[2] == "Pixels"), None)
    except ElementTree.ParseError:
        return None
    return None if pixels is None else _pair(pixels.attrib)


def _pair(values: Mapping[str, str]) -> list[float] | None:
    factors = {"m": 1e3, "cm": 10.0, "mm": 1.0, "um": 1e-3, "\u00b5m": 1e-3, "\u03bcm": 1e-3, "nm": 1e-6}
    found = []
    for axis in "YX":
        try:
            size = float(values[f"PhysicalSize{axis}"]) * factors[values.get(f"PhysicalSize{axis}Unit", "\u00b5m")]
        except (KeyError, ValueError):
            return None
        found.append(size)
    return found if all(0 < size < 100 for size in found) else None


def _video(path: Path, kind: str) -> dict[str, Any]:
    try:
        import av
    except ImportError as err:
        raise ImageError("no_decoder", 'videos need the extra video: `pip install "medssl[video]"`, then index again') from err
    av.logging.set_level(av.logging.PANIC)  # FFmpeg writes to stderr on its own
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                return _header(kind, (0, 0), reason="not_image")
            stream = container.streams.video[0]
            if stream.codec_context is None:  # a codec that FFmpeg does not know
                return _header(kind, (0, 0), reason="unreadable")
            rate, frames = stream.average_rate, int(stream.frames or 0)
            width, height = int(stream.codec_context.width), int(stream.codec_context.height)
            pixels = str(stream.codec_context.pix_fmt or "")
            if not frames:  # MPEG program streams do not count: one packet is one frame, and none is decoded
                frames = sum(1 for packet in container.demux(stream) if packet.size)
    except (av.FFmpegError, OSError, ValueError, UnicodeDecodeError) as err:
        raise _unreadable("video", err) from err
    if not width or not height:
        return _header(kind, (0, 0), reason="unreadable")
    grey = pixels.startswith("gray")
    return _header(
        kind,
        (frames, height, width),
        channels=1 if grey else 3,
        photometric="MONOCHROME2" if grey else "RGB",
        frame_time_ms=round(1000 / float(rate), 6) if rate else None,
        fps_source="container" if rate else None,
        flags=["lossy"],
    )


__all__ = ["IMAGE_KINDS", "VIDEO_KINDS", "read_image_header"]
