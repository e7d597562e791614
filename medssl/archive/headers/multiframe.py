"""Multi-frame DICOM: one header per frame, and the volumes that the frames form.

Enhanced objects keep what frames share and what differs in functional groups; older ones point to a vector
(FrameIncrementPointer). Both become headers with the names of `dicom_tags.TAGS`, on which `split_series` works as on
single slices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.headers.dicom_header import Header
from medssl.archive.headers.dicom_raw import Found, RawHeader, convert, read_raw
from medssl.archive.headers.dicom_series import SliceGroup, split_series
from medssl.errors import ImageError

SHARED, PER_FRAME = 0x52009229, 0x52009230
MAX_FRAMES = 1_000_000

# Tag -> (name, representation). Names are those of `dicom_tags.TAGS` wherever it has one.
FRAME_TAGS: dict[int, tuple[str, str]] = {
    0x00089007: ("image_type", "CS*"),  # FrameType
    0x00089208: ("component", "CS"),  # ComplexImageComponent
    0x00180050: ("slice_thickness", "DS"),
    0x00180080: ("repetition_time", "DS"),
    0x00180088: ("spacing_between", "DS"),
    0x00189079: ("inversion_time", "FD"),  # InversionTimes
    0x00189082: ("echo_time", "FD"),  # EffectiveEchoTime
    0x00189087: ("b_value", "FD"),
    0x00200032: ("position", "DS*"),
    0x00200037: ("orientation", "DS*"),
    0x00209056: ("stack", "LO"),  # StackID
    0x00209057: ("in_stack", "UL"),  # InStackPositionNumber
    0x00209128: ("temporal_position", "UL"),  # TemporalPositionIndex
    0x00209153: ("trigger_time", "FD"),  # NominalCardiacTriggerDelayTime
    0x00209156: ("acquisition_number", "US"),  # FrameAcquisitionNumber
    0x0020930D: ("temporal_offset", "FD"),  # TemporalPositionTimeOffset
    0x00280030: ("pixel_spacing", "DS*"),
    0x00281052: ("intercept", "DS"),
    0x00281053: ("slope", "DS"),
    0x00281054: ("rescale_type", "LO"),
    0x2005100E: ("scale_slope", "FL"),  # Philips, in its private per-frame sequence
}
MACROS = frozenset(
    {
        0x00209113,  # PlanePositionSequence
        0x00209116,  # PlaneOrientationSequence
        0x00289110,  # PixelMeasuresSequence
        0x00289145,  # PixelValueTransformationSequence
        0x00209111,  # FrameContentSequence
        0x00209310,  # TemporalPositionSequence
        0x00189114,  # MREchoSequence
        0x00189117,  # MRDiffusionSequence
        0x00189115,  # MRModifierSequence
        0x00189112,  # MRTimingAndRelatedParametersSequence
        0x00189226,  # MRImageFrameTypeSequence
        0x00189329,  # CTImageFrameTypeSequence
        0x00189118,  # CardiacSynchronizationSequence
        0x2005140F,  # Philips
    }
)
TOP_TAGS: dict[int, tuple[str, str]] = {
    0x00080008: ("image_type", "CS*"),
    0x00080016: ("sop_class_uid", "UI"),
    0x00080060: ("modality", "CS"),
    0x00080070: ("manufacturer", "LO"),
    0x00180050: ("slice_thickness", "DS"),
    0x00180080: ("repetition_time", "DS"),
    0x00180081: ("echo_time", "DS"),
    0x00180088: ("spacing_between", "DS"),
    0x00200032: ("position", "DS*"),
    0x00200037: ("orientation", "DS*"),
    0x00200105: ("n_temporal_positions", "IS"),
    0x00280002: ("samples_per_pixel", "US"),
    0x00280004: ("photometric", "CS"),
    0x00280008: ("n_frames", "IS"),
    0x00280010: ("rows", "US"),
    0x00280011: ("columns", "US"),
    0x00280030: ("pixel_spacing", "DS*"),
    0x00280100: ("bits_allocated", "US"),
    0x00280101: ("bits_stored", "US"),
    0x00280103: ("pixel_representation", "US"),
    0x00280120: ("padding", "US"),
    0x00280121: ("padding_limit", "US"),
    0x00281052: ("intercept", "DS"),
    0x00281053: ("slope", "DS"),
    0x00281054: ("rescale_type", "LO"),
}
INCREMENT, FRAME_TIME, FRAME_TIMES, LOCATIONS, OFFSETS = 0x00280009, 0x00181063, 0x00181065, 0x00182005, 0x3004000C
"""FrameIncrementPointer, and FrameTime, FrameTimeVector, SliceLocationVector, GridFrameOffsetVector to which it may point."""

_REPEATED = ("image_type", "orientation", "pixel_spacing")
"""Lists that most frames repeat: kept once."""


def frame_headers(path: Path) -> list[Header]:
    """Read one header per frame of a multi-frame file.

    Args:
        path: A DICOM file with NumberOfFrames.

    Returns:
        One mapping per frame, in frame order, with the names of `dicom_tags.TAGS` that the file states; `instance_number`
        is the frame number from 1. `syntax`, `file_bytes`, `pixel_offset`, `pixel_length` are those of the file.

    Raises:
        ImageError: `unreadable`: the data set cannot be parsed, or promises no frame or more than a million. `truncated`: more
            frames than the file has room for.
    """
    shared: dict[str, Any] = {}
    pool: dict[Any, list[Any]] = {}
    raw = read_raw(
        path,
        {*TOP_TAGS, *FRAME_TAGS, INCREMENT, FRAME_TIME, FRAME_TIMES, LOCATIONS, OFFSETS},
        inside=MACROS,
        each={SHARED: _compact, PER_FRAME: _compact},
    )
    top = _named(raw.elements, TOP_TAGS, raw.big_endian, pool)
    n = int(top.get("n_frames") or 1)
    if not 1 <= n <= MAX_FRAMES:
        raise ImageError("unreadable", f"a file of {n} frames; 1 to {MAX_FRAMES} are accepted; copy it again from its source")
    size = path.stat().st_size
    if raw.pixel_offset is not None and n * _frame_bytes(top, raw) > size - raw.pixel_offset:
        raise ImageError("truncated", f"{n} frames in {size} bytes; copy the file again from its source")
    for found in raw.items[SHARED]:
        shared |= _named(dict(found), FRAME_TAGS, raw.big_endian, pool)
    base = {
        **top,
        **shared,
        "syntax": raw.syntax,
        "file_bytes": size,
        "pixel_offset": raw.pixel_offset,
        "pixel_length": raw.pixel_length,
    }
    items = raw.items[PER_FRAME]
    headers = []
    for k in range(n):
        own = _named(dict(items[k]), FRAME_TAGS, raw.big_endian, pool) if k < len(items) else {}
        headers.append({**base, **own, "instance_number": k + 1})
    _classic(headers, raw)
    for header in headers:
        if "temporal_position" not in header and "temporal_offset" in header:
            header["temporal_position"] = header["temporal_offset"]
    return headers


def _frame_bytes(top: Mapping[str, Any], raw: RawHeader) -> int:
    """Return what a frame takes at least: its pixels, or in a compressed file the head of its fragment."""
    if raw.pixel_length is None:
        return 8
    bits = int(top.get("bits_allocated") or 1) * int(top.get("samples_per_pixel") or 1)
    return max(1, int(top.get("rows") or 0) * int(top.get("columns") or 0) * bits // 8)


def _compact(found: Found) -> tuple[tuple[int, tuple[bytes, bytes]], ...]:
    return tuple(found.items())


def _named(
    found: Mapping[int, tuple[bytes, bytes]], names: Mapping[int, tuple[str, str]], big_endian: bool, pool: dict[Any, list[Any]]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for tag, element in found.items():
        if tag not in names:
            continue
        name, vr = names[tag]
        if name in _REPEATED:
            key = (name, element)
            value = pool.get(key)
            if value is None:
                value = pool[key] = convert(element, vr, big_endian)
        else:
            value = convert(element, vr, big_endian)
        if value is not None:
            values[name] = value
    return values


def _classic(headers: list[Header], raw: RawHeader) -> None:
    """Place frames without functional groups by the vector that FrameIncrementPointer names."""
    n = len(headers)
    first = headers[0]
    pointers = raw.elements.get(INCREMENT)
    if pointers is None or "position" not in raw_names(raw):
        return
    order = ">" if raw.big_endian else "<"
    pairs = np.frombuffer(pointers[1][: len(pointers[1]) // 4 * 4], dtype=f"{order}u2").reshape(-1, 2)
    for group, element in pairs.astype(np.int64).tolist():
        tag = group << 16 | element
        values = raw.get(tag, "DS*")
        if tag in (OFFSETS, LOCATIONS) and len(values or ()) == n and len(first.get("orientation") or ()) == 6:
            normal = np.cross(first["orientation"][:3], first["orientation"][3:])
            along = np.array(values) - values[0]
            for header, move in zip(headers, along):
                header["position"] = (np.asarray(first["position"], float) + move * normal).tolist()
        elif tag == FRAME_TIME and values:
            for k, header in enumerate(headers):
                header["trigger_time"] = k * float(values[0])
        elif tag == FRAME_TIMES and len(values or ()) == n:
            for header, time in zip(headers, np.cumsum(values).tolist()):
                header["trigger_time"] = time


def raw_names(raw: RawHeader) -> set[str]:
    """Return the names of the top-level elements found."""
    return {TOP_TAGS[tag][0] for tag in raw.elements if tag in TOP_TAGS}


def describe_multiframe(path: Path) -> list[dict[str, Any]]:
    """Return the volumes of a multi-frame file.

    Returns:
        One JSON-able mapping per volume: `frames` for `part` of `Domain.read` (see `ranges`), `shape` (columns, rows,
        slices), `affine`, `spacing_mm`, `step_mm`, `step_cv`, `max_gap_mm`, `tilt_deg`, `flags`, `faults`, `split_by`,
        `volume_index`, `n_volumes`, `varying`, and `first`: the header of its first frame.

    Raises:
        ImageError: As `frame_headers`.
    """
    headers = frame_headers(path)
    return [describe_group(headers, group) for group in split_series(headers)]


def describe_group(headers: Sequence[Header], group: SliceGroup) -> dict[str, Any]:
    """Return one volume as JSON-able values (see `describe_multiframe`)."""
    geometry = group.geometry
    first = headers[group.indices[0]]
    shape = geometry.shape(int(first.get("columns") or 0), int(first.get("rows") or 0))
    return {
        "frames": ranges(group.indices),
        "shape": list(shape),
        "affine": None if geometry.affine is None else geometry.affine.tolist(),
        "spacing_mm": None if geometry.spacing_mm is None else list(geometry.spacing_mm),
        "step_mm": geometry.step_mm,
        "step_cv": geometry.step_cv,
        "max_gap_mm": geometry.max_gap_mm,
        "tilt_deg": geometry.tilt_deg,
        "flags": list(group.flags),
        "faults": list(geometry.faults),
        "split_by": group.split_by,
        "volume_index": group.volume_index,
        "n_volumes": group.n_volumes,
        "varying": list(group.varying),
        "first": dict(first),
    }


def ranges(indices: Sequence[int]) -> list[list[int]]:
    """Return indices as half-open ranges, in their order.

    Args:
        indices: Frame numbers from 0.

    Returns:
        `[start, stop]`, or `[start, stop, step]` as `range` takes them where frames lie apart or run backwards; a volume
        of thousands of interleaved frames is one range.
    """
    found: list[list[int]] = []
    i = 0
    while i < len(indices):
        step = indices[i + 1] - indices[i] if i + 1 < len(indices) else 1
        j = i + 1
        while j < len(indices) and indices[j] - indices[j - 1] == step:
            j += 1
        # A run of two that is no neighbourhood says nothing about a pattern.
        if j - i == 2 and step != 1 and j < len(indices):
            j, step = i + 1, 1
        stop = indices[j - 1] + (1 if step > 0 else -1)
        found.append([indices[i], stop] if step == 1 else [indices[i], stop, step])
        i = j
    return found


def frame_numbers(parts: Sequence[Sequence[int]]) -> list[int]:
    """Return the frame numbers that `ranges` wrote.

    Raises:
        ImageError: `not_3d`: no range, or one that is none.
    """
    try:
        numbers = [k for part in parts for k in range(*(int(value) for value in part))]
    except (TypeError, ValueError) as err:
        raise ImageError("not_3d", "frames that are no half-open ranges; index the files again") from err
    if not numbers or min(numbers) < 0:
        raise ImageError("not_3d", "no frames, or negative ones; index the files again")
    return numbers
