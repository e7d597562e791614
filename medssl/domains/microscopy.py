"""Microscopy fields: fluorescence with one file or one page per channel, and colour; DICOM of single pictures (GM) too.

Channel names are mapped to a closed list, because a name typed at the microscope may hold anything. Names given by the recipe
are taken as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.headers.dicom_extras import read_planar_header
from medssl.archive.headers.image_scale import planar_spacing
from medssl.domains.base import named
from medssl.domains.dicom_planar import read_planar_dicom
from medssl.domains.image_files import read_image_file
from medssl.domains.planar import RawPlanar, all_valid, build_planar, content_of, equal_channels, finite, narrow
from medssl.errors import GeometryError, ImageError, RequestError
from medssl.types import Sample

CHANNEL_NAMES: dict[str, tuple[str, ...]] = {
    "dapi": ("dapi", "hoechst"),
    "gfp": ("egfp", "gfp"),
    "yfp": ("eyfp", "yfp", "venus"),
    "cfp": ("ecfp", "cfp", "cerulean"),
    "rfp": ("rfp", "mcherry", "tdtomato", "dsred"),
    "fitc": ("fitc", "alexa488", "af488"),
    "tritc": ("tritc", "rhodamine", "cy3", "alexa546", "alexa555", "alexa568", "af568"),
    "texas_red": ("texasred", "alexa594", "af594"),
    "cy5": ("cy5", "alexa647", "af647"),
    "cy7": ("cy7", "alexa750"),
    "phalloidin": ("phalloidin", "actin"),
    "phase_contrast": ("phasecontrast", "phase"),
    "dic": ("dic", "nomarski"),
    "brightfield": ("brightfield", "transmitted"),
    "red": ("red",),
    "green": ("green",),
    "blue": ("blue",),
}
"""Name -> what of a label means it, without spaces and hyphens, in the order of looking."""


class Microscopy:
    """Reads one field; several files are its channels, in the order of the files.

    Args:
        channels: Names of the channels, in order; empty takes those of the file.
    """

    name = "microscopy"
    version = 1
    kinds = ("image",)

    def __init__(self, channels: Sequence[str] = ()) -> None:
        self.channels = tuple(str(name) for name in channels)
        if len(set(self.channels)) != len(self.channels):
            raise RequestError("microscopy: channels holds a name twice; every channel needs its own")

    def params(self) -> dict[str, Any]:
        """Return the arguments."""
        return {"channels": list(self.channels)}

    def read(self, files: Sequence[Path], *, series_id: str, part: Mapping[str, Any] | None = None) -> Sample:
        """Read one field.

        Raises:
            ImageError: A file that cannot be used; `geometry` where files differ in size, or channels in number from the names.
        """
        try:
            if part is not None or not files:
                raise ImageError("unsupported_format", "a field is one image, or one file per channel, without parts")
            raw = _join([_read(path) for path in files])
            if self.channels:
                if len(self.channels) != len(raw.array):
                    raise GeometryError(
                        f"{len(raw.array)} channels for {len(self.channels)} names in `channels`; give one name each, or none"
                    )
                raw.channels = self.channels
            return build_planar(raw, all_valid(raw.array, raw.valid), series_id=series_id, domain=self.name)
        except ImageError as err:
            raise named(err, series_id) from err

    def foreground(self, sample: Sample) -> np.ndarray:
        """Return the valid pixels, (H, W) bool."""
        return all_valid(sample.image, sample.valid)


def _read(path: Path) -> RawPlanar:
    content = content_of(path)
    if content == "dicom":
        return _read_dicom(path)
    if content not in ("image", "gif"):
        raise ImageError("unsupported_format", "a microscopy field is a TIFF, PNG, JPEG or BMP image, or DICOM of one picture")
    raw = read_image_file(path)
    if raw.channels:
        raw.channels = tuple(channel_name(name) for name in raw.channels)
    elif len(raw.array) == 3 and equal_channels(raw.array):
        raw.array = raw.array[:1]
    elif len(raw.array) == 3 and "channels_assumed" not in raw.flags:
        raw.channels = ("red", "green", "blue")
    raw.facts = {}
    return raw


def _read_dicom(path: Path) -> RawPlanar:
    pixels = read_planar_dicom(path, modalities=("GM",), domain="microscopy")
    if len(pixels.frames) != 1:
        raise ImageError("multiframe", f"{len(pixels.frames)} frames; a microscopy field has one; leave this series out")
    array, flags = narrow(pixels.frames[0])
    spacing, _ = planar_spacing(read_planar_header(path))
    raw = RawPlanar(array, spacing_mm=spacing, valid=pixels.valid, modality=pixels.modality, flags=[*pixels.flags, *flags])
    finite(raw)
    if len(array) == 3:
        raw.channels = ("red", "green", "blue")
    return raw


def _join(parts: list[RawPlanar]) -> RawPlanar:
    """Put the channels of several files behind each other; their dtype is the widest of them."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if len({part.array.shape[1:] for part in parts}) > 1:
        raise GeometryError(
            f"{len(parts)} files of different size; the channels of one field share one grid; index the folder again"
        )
    if len({part.spacing_mm for part in parts}) > 1:
        raise GeometryError(f"{len(parts)} files of different pixel size; the channels of one field share one grid")
    arrays = [part.array for part in parts]
    if len({array.dtype for array in arrays}) > 1:
        wide = np.result_type(*arrays)
        arrays = [array.astype(wide if wide in (np.uint16, np.int16) else np.float32) for array in arrays]
    joined = RawPlanar(np.concatenate(arrays), spacing_mm=first.spacing_mm)
    for part in parts:
        joined.flags += [flag for flag in part.flags if flag not in joined.flags]
        if part.valid is not None:
            joined.exclude(~part.valid)
    names = [name for part in parts for name in (part.channels or ("other",) * len(part.array))]
    joined.channels = tuple(names) if any(name != "other" for name in names) else ()
    return joined


def channel_name(label: str) -> str:
    """Return the closed-list name of a channel label, `other` when it is none."""
    plain = re.sub(r"[\s_\-.]+", "", label.lower())
    return next((name for name, marks in CHANNEL_NAMES.items() if any(mark in plain for mark in marks)), "other")
