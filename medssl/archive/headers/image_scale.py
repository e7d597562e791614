"""Scale of projections and ultrasound: millimetres per pixel, milliseconds per frame, and where they come from.

The index and the readers of `domains/` both ask here, so that a row says what its image will have. Headers are those of
`dicom_header.read_header` with what `dicom_extras` adds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Header = Mapping[str, Any]

SPACING_SOURCES = ("header", "detector", "magnification", "calibration", "region", "user", "unknown")
FPS_SOURCES = ("vector", "frame_time", "cine_rate", "recommended", "container", "timestamps", "unknown")
REGION_TYPES = ("tissue_2d", "colour_doppler", "spectral", "m_mode", "ecg", "other")
TISSUE_2D = REGION_TYPES[0]
FRAME_TIME_TOLERANCE = 0.10
"""Relative difference between stated frame times above which they conflict."""
CENTIMETRE = 3
"""PhysicalUnitsXDirection and YDirection, DICOM PS3.3 C.8.5.5.1.15."""
SPATIAL_2D, SPATIAL_M_MODE, SPATIAL_SPECTRAL = 1, 2, 3
TYPE_TISSUE, TYPE_COLOUR, TYPE_ECG = 1, 2, 10
MIN_HEART_RATE, MAX_HEART_RATE = 20.0, 400.0
PLANAR_KEYS = (
    "modality", "rows", "columns", "n_frames", "pixel_spacing", "detector_spacing", "scanned_spacing", "spacing_calibration", "magnification",
    "frame_time", "frame_time_vector", "cine_rate", "recommended_rate", "heart_rate", "view_position", "laterality", "image_laterality",
)  # fmt: skip
"""Names of `dicom_tags.TAGS` that the functions here, and the readers of planar images, look at."""


def planar_spacing(header: Header) -> tuple[tuple[float, float] | None, str]:
    """Return the spacing of a projection image in mm (row step, column step), and which plane it refers to.

    - `calibration`: PixelSpacing with a calibration type (0028,0A02), or differing from that of the detector: corrected to
      the patient (DICOM PS3.3, 10.7.1.3).
    - `magnification`: the detector's divided by EstimatedRadiographicMagnificationFactor.
    - `detector`: ImagerPixelSpacing (or NominalScannedPixelSpacing of a digitised film) alone, or PixelSpacing equal to it:
      too large by the unknown magnification.
    - `header`: PixelSpacing alone, which does not say its plane.
    - `unknown`: nothing usable; the spacing is None.
    """
    stated = _pair(header.get("pixel_spacing"))
    detector = _pair(header.get("detector_spacing")) or _pair(header.get("scanned_spacing"))
    if stated is not None and header.get("spacing_calibration"):
        return stated, "calibration"
    if detector is None:
        return (stated, "header") if stated is not None else (None, "unknown")
    if stated is not None and not all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(stated, detector)):
        return stated, "calibration"
    factor = _number(header.get("magnification"))
    if factor is not None and 1 <= factor <= 10:
        return (detector[0] / factor, detector[1] / factor), "magnification"
    return detector, "detector"


def frame_times(header: Header, n_frames: int) -> tuple[tuple[float, ...] | None, str, tuple[str, ...]]:
    """Return the start of each frame in ms from 0, where it comes from, and flags.

    Order of trust: FrameTimeVector, FrameTime, CineRate, RecommendedDisplayFrameRate. Sources whose mean steps differ by more
    than a tenth flag `frame_time_conflict`; without any source the times are None, flagged `frame_time_unknown`.

    Args:
        header: Header values.
        n_frames: Frames of the file.

    Returns:
        Times or None; `vector`, `frame_time`, `cine_rate`, `recommended` or `unknown`; flags.
    """
    vector, (source, step, flags) = frame_vector(header, n_frames), frame_step(header, n_frames)
    if step is None:
        return None, source, flags
    times: Iterable[float] = (k * step for k in range(n_frames))
    if vector is not None:
        times = itertools.accumulate((0.0, *vector))
    return tuple(float(f"{time:.9g}") for time in times), source, flags


def frame_step(header: Header, n_frames: int) -> tuple[str, float | None, tuple[str, ...]]:
    """Return where the frame times come from, their mean step in ms or None, and flags (see `frame_times`)."""
    steps: dict[str, float] = {}
    vector = frame_vector(header, n_frames)
    if vector is not None:
        steps["vector"] = sum(vector) / len(vector)
    if (step := _number(header.get("frame_time"))) is not None:
        steps["frame_time"] = step
    for name, key in (("cine_rate", "cine_rate"), ("recommended", "recommended_rate")):
        if (rate := _number(header.get(key))) is not None:
            steps[name] = 1000 / rate
    if not steps:
        return "unknown", None, ("frame_time_unknown",)
    source, step = next(iter(steps.items()))
    conflict = max(steps.values()) > (1 + FRAME_TIME_TOLERANCE) * min(steps.values())
    return source, step, ("frame_time_conflict",) if conflict else ()


def frame_vector(header: Header, n_frames: int) -> Sequence[float] | None:
    """Return the n - 1 steps of FrameTimeVector; None where it is absent or not of this length, or a step is not above 0.

    Its first entry belongs to the first frame and counts for nothing.
    """
    vector = header.get("frame_time_vector") or ()
    if len(vector) != n_frames or n_frames < 2 or min(vector[1:]) <= 0:
        return None
    steps: Sequence[float] = vector[1:]
    return steps


def heart_rate(header: Header) -> float | None:
    """Return beats per minute, or None for what no heart does."""
    rate = _number(header.get("heart_rate"))
    return rate if rate is not None and MIN_HEART_RATE <= rate <= MAX_HEART_RATE else None


@dataclass(frozen=True)
class Region:
    """One item of SequenceOfUltrasoundRegions.

    Args:
        kind: Of `REGION_TYPES`.
        box: Row start and stop, column start and stop, half-open.
        spacing_mm: (row step, column step) where both axes are in centimetres, or None.
    """

    kind: str
    box: tuple[int, int, int, int]
    spacing_mm: tuple[float, float] | None


def us_regions(header: Header) -> list[Region]:
    """Return the regions that a header describes (`dicom_extras.read_extras`); malformed items are left out."""
    found = []
    for item in header.get("us_regions") or ():
        top, bottom, left, right = item.get("box") or (-1, -1, -1, -1)
        if not (0 <= top <= bottom and 0 <= left <= right):
            continue
        spacing = None
        if item.get("units") == [CENTIMETRE, CENTIMETRE] and item.get("delta") is not None:
            down, across = (abs(step) * 10 for step in item["delta"])
            spacing = (down, across) if min(down, across) > 0 else None
        # The corners that DICOM states are pixels of the region.
        found.append(Region(_region_kind(item.get("space"), item.get("data")), (top, bottom + 1, left, right + 1), spacing))
    return found


def _region_kind(space: int | None, data: int | None) -> str:
    if space == SPATIAL_M_MODE:
        return "m_mode"
    if space == SPATIAL_SPECTRAL or (data is not None and 3 <= data <= 9):
        return "spectral"
    if data == TYPE_ECG:
        return "ecg"
    if space == SPATIAL_2D and data in (TYPE_TISSUE, TYPE_COLOUR):
        return TISSUE_2D if data == TYPE_TISSUE else "colour_doppler"
    return "other"


def regions_fit(regions: Sequence[Region], rows: int, columns: int) -> bool:
    """Return whether regions lie inside the picture.

    Where they do not, it was cut or shrunk after the machine wrote it: boxes and scale are those of another picture. One
    pixel is forgiven, because some machines write the corner after the last one.
    """
    return all(region.box[1] <= rows + 1 and region.box[3] <= columns + 1 for region in regions)


def region_spacing(regions: Sequence[Region]) -> tuple[float, float] | None:
    """Return the spacing on which all two-dimensional tissue regions agree, or None."""
    scales = {region.spacing_mm for region in regions if region.kind == TISSUE_2D}
    return scales.pop() if len(scales) == 1 else None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number > 0 else None


def _pair(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return None
    first, second = _number(value[0]), _number(value[1])
    return None if first is None or second is None else (first, second)
