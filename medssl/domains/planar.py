"""What the readers of two-dimensional images and of clips share: the raw image, its dtype, colour, and the sample made of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.headers.file_headers import HEAD_BYTES, sniff
from medssl.domains.statistics import intensity_stats, rounded
from medssl.errors import ImageError
from medssl.types import ImageMeta, Kind, Sample

MAX_PIXELS = 100_000_000
"""Per frame. The largest radiographs have 25 million; larger images are slides, which the domain wsi reads in tiles."""
MAX_BYTES = 4 << 30
"""Of one decoded image or clip, which is held in memory whole."""
LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601, the weights of the Y that JPEG and ultrasound machines store."""


@dataclass
class RawPlanar:
    """An image or a clip as its files hold it.

    Args:
        array: (C, H, W), or (T, C, H, W) for a clip; uint8, uint16, int16 or float32.
        kind: `image` or `clip`.
        spacing_mm: Step between rows and between columns, or None.
        valid: (H, W) bool, False = padding or excluded; None when everything is valid.
        modality: DICOM modality, or `unknown`.
        flags: Quality flags (see `archive.reasons.FLAGS`).
        channels: Channel names.
        frame_times_ms: Start of each frame of a clip from 0, or None.
        facts: See `types.ImageMeta.facts`.
    """

    array: np.ndarray
    kind: Kind = "image"
    spacing_mm: tuple[float, float] | None = None
    valid: np.ndarray | None = None
    modality: str = "unknown"
    flags: list[str] = field(default_factory=list)
    channels: tuple[str, ...] = ()
    frame_times_ms: tuple[float, ...] | None = None
    facts: dict[str, str | float | bool] = field(default_factory=dict)

    def flag(self, name: str) -> None:
        """Add a flag once."""
        if name not in self.flags:
            self.flags.append(name)

    def exclude(self, mask: np.ndarray) -> None:
        """Mark pixels (H, W) bool as not valid."""
        if mask.any():
            self.valid = ~mask if self.valid is None else self.valid & ~mask


def content_of(path: Path) -> str:
    """Tell what a file is from its first bytes: `dicom`, `image`, `gif`, `video`, or raise.

    Raises:
        ImageError: It cannot be opened, is empty, or is something else (`unsupported_format`, `not_image`).
    """
    try:
        with open(path, "rb") as handle:
            head = handle.read(HEAD_BYTES)
    except OSError as err:
        raise os_fault(err) from err
    if not head:
        raise ImageError("empty", "the file has no bytes; copy it again from its source")
    if head[128:132] == b"DICM":  # first: a preamble may make a DICOM file look like a TIFF as well
        return "dicom"
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM")):
        return "image"
    if head.startswith(b"GIF8"):
        return "gif"
    boxes = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
    if head[:4] in (b"\0\0\x01\xba", b"\0\0\x01\xb3", b"\x1aE\xdf\xa3") or head[4:8] in boxes:
        return "video"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "video"
    found = sniff(head)
    if found == "dicom":
        return found
    reason = "not_image" if found == "other" else "unsupported_format"
    raise ImageError(reason, "not a planar image or a clip; DICOM, PNG, JPEG, TIFF, BMP, GIF, AVI, MP4, MOV and MPEG are accepted")


def os_fault(err: OSError) -> ImageError:
    """Return the error for a file that the operating system, or a decoder that raises the same class, could not read."""
    if err.errno is None:
        return ImageError("unreadable", f"a file could not be parsed ({type(err).__name__}); copy it again from its source")
    reason = {FileNotFoundError: "vanished", PermissionError: "permission"}.get(type(err), "io_error")
    return ImageError(reason, f"a file could not be read ({err.strerror}); check that it is there and readable")


def quiet_decoders() -> None:
    """Keep the loggers of pydicom, tifffile and Pillow silent: their lines name files and quote headers."""
    for name in ("pydicom", "tifffile", "PIL"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def one_file(files: Sequence[Path]) -> Path:
    """Return the only file of a planar image.

    Raises:
        ImageError: There are none, or several.
    """
    if len(files) != 1:
        raise ImageError("vanished" if not files else "geometry", f"{len(files)} files; a planar image or a clip is one file")
    return files[0]


def check_size(height: int, width: int, n_bytes: int) -> None:
    """Refuse what a header promises before memory is taken for it.

    Args:
        height: Rows.
        width: Columns.
        n_bytes: Of all frames and channels, decoded.

    Raises:
        ImageError: Nothing, or more than a reader that holds the image in memory should take.
    """
    if height < 1 or width < 1:
        raise ImageError("unreadable", f"the header states {height}x{width} pixels; copy the file again from its source")
    if height * width > MAX_PIXELS or n_bytes > MAX_BYTES:
        raise ImageError(
            "unsupported_pixels",
            f"{height}x{width} pixels, {n_bytes / 2**30:.1f} GiB decoded; at most {MAX_PIXELS // 10**6} megapixels and "
            f"{MAX_BYTES >> 30} GiB are read whole; read slides with the domain wsi, and long clips in parts",
        )


def narrow(array: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return an array as uint8, uint16, int16 or float32, whichever holds it without loss, and flags.

    8-bit and 16-bit integers keep their type, so that the images of one set share it. Others go to the narrowest of the
    four that holds all values. Only what needs more than 24 bits is rounded, and flagged `float32_rounded`.

    Args:
        array: Finite, any integer, bool or real type.
    """
    if array.dtype == bool:
        return array.astype(np.uint8), ()
    if array.dtype in (np.uint8, np.uint16, np.int16, np.float32):
        return array.astype(array.dtype.newbyteorder("="), copy=False), ()
    if array.dtype == np.float16:
        return array.astype(np.float32), ()
    if array.dtype.kind in "iu":
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        for dtype in (np.uint8, np.uint16, np.int16):
            if dtype != np.uint8 or array.dtype == np.int8:
                info = np.iinfo(dtype)
                if low >= info.min and high <= info.max:
                    return array.astype(dtype), ()
        return array.astype(np.float32), (() if max(-low, high) <= 2**24 else ("float32_rounded",))
    if array.dtype.kind != "f":
        raise ImageError("unsupported_pixels", f"pixels of type {array.dtype}; integers and real numbers are accepted")
    single = array.astype(np.float32)
    return single, (() if np.array_equal(single, array) else ("float32_rounded",))


def finite(raw: RawPlanar) -> None:
    """Replace NaN and infinity by 0 and mark such pixels as not valid."""
    if raw.array.dtype.kind != "f":
        return
    bad = ~np.isfinite(raw.array)
    if bad.any():
        raw.array = np.where(bad, raw.array.dtype.type(0), raw.array)
        raw.exclude(bad.reshape(-1, *bad.shape[-2:]).any(axis=0))
        raw.flag("nan_voxels")


def luma(array: np.ndarray) -> np.ndarray:
    """Return (..., 1, H, W) of the same integer type from (..., 3, H, W); exact where the three channels are equal."""
    red, green, blue = (array[..., k, :, :] for k in range(3))
    value = LUMA[0] * red.astype(np.float32) + LUMA[1] * green.astype(np.float32) + LUMA[2] * blue.astype(np.float32)
    if array.dtype.kind != "f":
        value = np.rint(value)
    grey: np.ndarray = value.astype(array.dtype)[..., None, :, :]
    return grey


def equal_channels(array: np.ndarray) -> bool:
    """Return whether the three channels of (..., 3, H, W) are the same."""
    first = array[..., 0, :, :]
    return bool(np.array_equal(first, array[..., 1, :, :]) and np.array_equal(first, array[..., 2, :, :]))


def build_planar(raw: RawPlanar, mask: np.ndarray, *, series_id: str, domain: str) -> Sample:
    """Put a raw image or clip and its foreground into a `Sample`.

    Statistics are those of all channels and frames; an image of several channels has those of channel k too, as `mean_k`
    and so on.

    Args:
        raw: The image or clip.
        mask: (H, W) bool foreground.
        series_id: Pseudonymous id.
        domain: Domain name.

    Raises:
        ImageError: `constant` or `no_finite_voxels`.
    """
    array = raw.array
    if raw.valid is not None and raw.valid.all():
        raw.valid = None
    if raw.valid is not None and not raw.valid.any():
        raise ImageError("no_finite_voxels", "no valid pixel; leave this image out or repair it")
    seen = np.broadcast_to(raw.valid, array.shape) if raw.valid is not None else None
    stats = dict(intensity_stats(array, np.broadcast_to(mask, array.shape), seen))
    if stats["min"] == stats["max"]:
        raise ImageError("constant", f"all pixels are {stats['min']:g}; an image needs contrast; leave it out")
    if raw.kind == "image" and len(array) > 1:
        for k, channel in enumerate(array):
            stats |= {f"{name}_{k}": value for name, value in intensity_stats(channel, mask, raw.valid).items()}
            del stats[f"foreground_fraction_{k}"]
    meta = ImageMeta(
        series_id=series_id,
        domain=domain,
        modality=raw.modality,
        stats=rounded(stats),
        flags=tuple(raw.flags),
        kind=raw.kind,
        frame_times_ms=raw.frame_times_ms,
        channels=raw.channels,
        facts=_plain(raw.facts),
    )
    return Sample(np.ascontiguousarray(array), raw.spacing_mm, None, raw.valid, meta)


def _plain(facts: Mapping[str, Any]) -> dict[str, str | float | bool]:
    return {name: float(f"{value:.9g}") if isinstance(value, float) else value for name, value in facts.items()}


def all_valid(array: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """Return the valid pixels (H, W) of an image or clip: the foreground where nothing else tells it from background."""
    return np.ones(array.shape[-2:], dtype=bool) if valid is None else valid


def frame_indices(part: Mapping[str, Any] | None, n_frames: int) -> list[int]:
    """Return which frames a part names, in its order; all of them without a part.

    Raises:
        ImageError: The part names something else, or frames that the file does not have.
    """
    if part is None:
        return list(range(n_frames))
    if set(part) != {"frames"}:
        raise ImageError(
            "unsupported_format", f"a part of the kind {'/'.join(sorted(part))}; planar images have parts by frames only"
        )
    indices = [index for start, stop in part["frames"] for index in range(int(start), int(stop))]
    if not indices or min(indices) < 0 or max(indices) >= n_frames:
        raise ImageError("geometry", f"frames outside the {n_frames} of the file; index the archive again")
    return indices
