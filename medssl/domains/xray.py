"""Radiographs: bright means dense, all bits are kept, and what the collimator shaded is not valid.

PNG, JPEG and TIFF cannot say which way they run: they are taken as bright for dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.headers.dicom_extras import read_planar_header
from medssl.archive.headers.image_scale import planar_spacing
from medssl.archive.rows.attributes import laterality, view
from medssl.domains.base import named
from medssl.domains.dicom_planar import read_planar_dicom
from medssl.domains.image_files import read_image_file
from medssl.domains.planar import (
    RawPlanar,
    all_valid,
    build_planar,
    content_of,
    equal_channels,
    finite,
    luma,
    narrow,
    one_file,
)
from medssl.errors import ImageError
from medssl.types import Sample

MODALITIES = ("CR", "DX", "RG")
FLAT = 0.04
"""Share of the intensity range within which a line counts as flat."""
STRAY = 0.02
"""Share of a line's pixels that may leave it: a marker, dust, a dead column."""
MIN_KEPT = 0.25
"""Smallest share of the image that a collimation box may have; a smaller one is a mistake and not used."""


class XRay:
    """Reads radiographs (CR, DX, digitised film).

    Args:
        voi: Apply the VOI LUT or window of DICOM files; images become float32. By default its limits are only reported.
        crop: Find the flat border around the exposed field and mark it as not valid. No pixel is removed.
        colour: Take true colour images as their luma; by default they are refused as `not_scalar`.
    """

    name = "xray"
    version = 1
    kinds = ("image",)

    def __init__(self, voi: bool = False, crop: bool = True, colour: bool = False) -> None:
        self.voi = bool(voi)
        self.crop = bool(crop)
        self.colour = bool(colour)

    def params(self) -> dict[str, Any]:
        """Return the arguments."""
        return {"voi": self.voi, "crop": self.crop, "colour": self.colour}

    def read(self, files: Sequence[Path], *, series_id: str, part: Mapping[str, Any] | None = None) -> Sample:
        """Read one radiograph.

        Raises:
            ImageError: Another modality (`no_domain`), colour (`not_scalar`), several frames (`multiframe`), or a file that
                cannot be used.
        """
        try:
            raw = self._raw(one_file(files), part)
            if self.crop:
                _mark_border(raw)
            return build_planar(raw, all_valid(raw.array, raw.valid), series_id=series_id, domain=self.name)
        except ImageError as err:
            raise named(err, series_id) from err

    def foreground(self, sample: Sample) -> np.ndarray:
        """Return the valid pixels, (H, W) bool: lungs are as dark as air beside the body."""
        return all_valid(sample.image, sample.valid)

    def _raw(self, path: Path, part: Mapping[str, Any] | None) -> RawPlanar:
        found = content_of(path)
        if found == "dicom":
            return _dicom(path, part, self.voi)
        if found not in ("image", "gif") or part is not None:
            raise ImageError("unsupported_format", "a radiograph is one DICOM, PNG, JPEG or TIFF image")
        raw = read_image_file(path)
        if len(raw.array) == 3 and (self.colour or equal_channels(raw.array)):
            raw.array = luma(raw.array)
        if len(raw.array) != 1:
            raise ImageError(
                "not_scalar", f"{len(raw.array)} channels that differ; a radiograph is grey; leave it out or set colour=true"
            )
        raw.channels, raw.spacing_mm = (), None
        raw.facts = {"view": "unknown", "laterality": "unknown", "inverted": False}
        return raw


def _dicom(path: Path, part: Mapping[str, Any] | None, voi: bool) -> RawPlanar:
    pixels = read_planar_dicom(path, part, modalities=MODALITIES, domain="xray", voi=voi)
    if len(pixels.frames) != 1:
        raise ImageError("multiframe", f"{len(pixels.frames)} frames; a radiograph has one; leave this series out")
    if pixels.frames.shape[1] != 1:
        raise ImageError("not_scalar", "a colour image; a radiograph is grey; leave it out")
    array, flags = narrow(pixels.frames[0])
    header = read_planar_header(path)
    spacing, source = planar_spacing(header)
    raw = RawPlanar(array, spacing_mm=spacing, valid=pixels.valid, modality=pixels.modality, flags=[*pixels.flags, *flags])
    finite(raw)
    raw.facts = {
        "view": view(str(header.get("view_position") or "").upper()),
        "laterality": laterality(header),
        "inverted": pixels.inverted,
        "spacing_source": source,
    }
    if pixels.window is not None:
        raw.facts["window_low"], raw.facts["window_high"] = pixels.window
    return raw


def _mark_border(raw: RawPlanar) -> None:
    top, bottom, left, right = exposed_box(raw.array[0], raw.valid)
    raw.facts |= {"field_top": float(top), "field_bottom": float(bottom), "field_left": float(left), "field_right": float(right)}
    outside = np.ones(raw.array.shape[1:], dtype=bool)
    outside[top:bottom, left:right] = False
    raw.exclude(outside)


def exposed_box(image: np.ndarray, valid: np.ndarray | None = None) -> tuple[int, int, int, int]:
    """Return the box around the exposed field: what remains when flat lines are taken off each side.

    A line is flat when nearly all its pixels lie within `FLAT` of the image's range around the line's median; shutters, black
    borders and what a collimator shades are, at any grey value. Upright boxes only: of a field that is rotated against the
    image, the upright box around it is returned.

    Args:
        image: (H, W).
        valid: (H, W) bool; what is not valid counts as flat.

    Returns:
        Row start and stop, column start and stop; the whole image when the box would be implausibly small.
    """
    height, width = image.shape
    kept = image if valid is None else image[valid]
    if kept.size == 0:
        return 0, height, 0, width
    low, high = (float(value) for value in np.quantile(kept[:: max(1, kept.size // 1_000_000)], [0.005, 0.995]))
    limit = FLAT * (high - low)
    top, bottom, left, right = 0, height, 0, width
    for _ in range(2):  # the second round sees lines without the border across their ends
        flat = _flat_rows(image[top:bottom, left:right], None if valid is None else valid[top:bottom, left:right], limit)
        top, bottom = top + _leading(flat), bottom - _leading(flat[::-1])
        if bottom <= top:
            return 0, height, 0, width
        inner = image[top:bottom, left:right].T
        flat = _flat_rows(inner, None if valid is None else valid[top:bottom, left:right].T, limit)
        left, right = left + _leading(flat), right - _leading(flat[::-1])
        if right <= left:
            return 0, height, 0, width
    if (bottom - top) * (right - left) < MIN_KEPT * height * width:
        return 0, height, 0, width
    return top, bottom, left, right


def _flat_rows(image: np.ndarray, valid: np.ndarray | None, limit: float) -> np.ndarray:
    lines = image.astype(np.float32)
    if valid is None:
        apart = np.abs(lines - np.median(lines, axis=1, keepdims=True)) > limit
        return np.asarray(apart.mean(axis=1) <= STRAY)
    flat = np.ones(len(lines), dtype=bool)
    for k, (line, seen) in enumerate(zip(lines, valid)):
        kept = line[seen]
        flat[k] = kept.size == 0 or float((np.abs(kept - np.median(kept)) > limit).mean()) <= STRAY
    return flat


def _leading(flags: np.ndarray) -> int:
    """Return how many of the first entries are true before the first that is not."""
    return len(flags) if flags.all() else int(np.argmin(flags))
