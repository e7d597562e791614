"""Read a DICOM volume: single slices, the frames of a multi-frame file, or the tiles of a Siemens mosaic."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.headers.dicom_header import LOSSY_SYNTAXES, UNCOMPRESSED, Header, read_header, syntax_name
from medssl.archive.headers.dicom_raw import convert, read_raw
from medssl.archive.headers.dicom_series import SliceGeometry, mosaic_geometry, slice_geometry, split_series
from medssl.archive.headers.dicom_tags import READ_KEYS
from medssl.archive.headers.mosaic import mosaic_layout
from medssl.archive.headers.multiframe import frame_headers, frame_numbers
from medssl.domains.dicom_pixels import frame_spans, load_slice, padding_limits
from medssl.domains.resample import regrid
from medssl.domains.volume_stack import RawVolume, Stack, canonical, fault
from medssl.errors import GeometryError, ImageError

READ_THREADS = 4
DECODED_AHEAD = 16
N_FRAMES = 0x00280008
PHILIPS = b"Philips MR Imaging DD 001"
PHILIPS_BLOCKS = range(0x10, 0x18)
COMPONENTS = {"M": "magnitude", "P": "phase", "R": "real", "I": "imaginary"}


def read_dicom(files: Sequence[Path], part: Mapping[str, Any] | None, *, philips_scaling: bool = False) -> tuple[RawVolume, Stack]:
    """Read one volume.

    Args:
        files: Its slices in any order, one multi-frame file, or one mosaic.
        part: `{"frames": ranges}` of a multi-frame file (`archive.multiframe.ranges`), or None.
        philips_scaling: Turn display values of Philips MR into floating point values (see `domains.mri`).

    Raises:
        ImageError: See `volume_files.read_volume`.
    """
    files, headers = _frames(files[0], part) if _is_multiframe(files, part) else _slices(files)
    for header in headers:
        _check_pixels(header)
    if any("MOSAIC" in header.get("image_type", ()) for header in headers):
        stack, geometry, headers = _mosaic(files, headers, philips_scaling)
    else:
        geometry = _stack_geometry(headers)
        files = [files[i] for i in geometry.order]
        headers = [headers[i] for i in geometry.order]
        _scale_philips(files, headers, philips_scaling)
        shape = (len(files), int(headers[0]["rows"]), int(headers[0]["columns"]))
        stack = _fast_stack(files, headers, shape) or _slow_stack(files, headers, shape)
    if stack.valid is not None and "nan_voxels" not in stack.flags:
        stack.flag("padding")
    stack = regrid(stack, geometry)
    return _finish(stack, geometry, headers)


def _finish(stack: Stack, geometry: SliceGeometry, headers: Sequence[Header]) -> tuple[RawVolume, Stack]:
    first = headers[0]
    flags = list(geometry.flags)
    if any(syntax_name(header["syntax"]) in LOSSY_SYNTAXES for header in headers):
        flags.append("lossy")
    modality = str(first.get("modality", "unknown"))
    units = "arbitrary"
    if modality == "CT":
        units = "HU" if {header.get("rescale_type") for header in headers} <= {None, "HU"} else "unknown"
    image_type = tuple(first.get("image_type", ()))
    facts: dict[str, str | float | bool] = {}
    if modality == "MR":
        facts["component"] = component(image_type, first.get("component"))
    assert geometry.affine is not None
    return canonical(stack, geometry.affine, 2, flags, modality=modality, units=units, image_type=image_type, facts=facts)


def component(image_type: Sequence[str], stated: str | None = None) -> str:
    """Return magnitude, phase, real, imaginary or unknown.

    Args:
        image_type: ImageType or FrameType: its third value starts with M, P, R or I (`M`, `M_FFE`, `PHASE MAP`).
        stated: ComplexImageComponent (0008,9208), which counts first.
    """
    if stated is not None and stated.lower() in COMPONENTS.values():
        return stated.lower()
    third = image_type[2].upper() if len(image_type) > 2 else ""
    letter = third.split("_")[0].split(" ")[0]
    letter = {"PHASE": "P", "REAL": "R", "IMAGINARY": "I", "MAGNITUDE": "M"}.get(letter, letter)
    return COMPONENTS.get(letter, "unknown")


def _is_multiframe(files: Sequence[Path], part: Mapping[str, Any] | None) -> bool:
    """Look at the number of frames first: a header parser would build thousands of frames on the way."""
    if part is not None and "frames" in part:
        return True
    return len(files) == 1 and int(read_raw(files[0], (N_FRAMES,)).get(N_FRAMES, "IS") or 1) > 1


def _frames(path: Path, part: Mapping[str, Any] | None) -> tuple[list[Path], list[Header]]:
    """Return the file once per frame, and headers that point to single frames."""
    headers = frame_headers(path)
    if part is not None and "frames" in part:
        numbers = frame_numbers(part["frames"])
        if max(numbers) >= len(headers):
            raise ImageError("not_3d", "frames beyond the last one; the file has changed; index it again")
    else:
        groups = split_series(headers)
        if len(groups) != 1:
            raise ImageError("not_3d", f"{len(groups)} volumes in one file; name one with part; index the file to split it")
        numbers = list(groups[0].indices)
    first = headers[0]
    n_frames, syntax = len(headers), first["syntax"]
    spans = None if syntax in UNCOMPRESSED else frame_spans(path, first, n_frames)
    size = int(first.get("rows") or 0) * int(first.get("columns") or 0) * int(first.get("bits_allocated") or 0) // 8
    chosen = []
    for k in numbers:
        header = {**headers[k], "frame": k, "n_frames": n_frames, "frame_spans": spans}
        if spans is None and first["pixel_offset"] is not None:
            header["pixel_offset"] = first["pixel_offset"] + k * size
            header["pixel_length"] = min(size, max(0, (first["pixel_length"] or 0) - k * size))
        chosen.append(header)
    return [path] * len(chosen), chosen


def _slices(files: Sequence[Path]) -> tuple[list[Path], list[Header]]:
    headers = []
    for path in files:
        header = read_header(path, READ_KEYS)
        if int(header.get("n_frames") or 1) > 1:
            raise ImageError("not_3d", "several multi-frame files in one volume; name one with part; index the folder to split it")
        if "position" not in header:  # one enhanced frame per file: the position is in its functional groups
            header |= {k: v for k, v in frame_headers(path)[0].items() if k not in header or k == "image_type"}
        headers.append(header)
    return list(files), headers


def _check_pixels(header: Header) -> None:
    if header.get("samples_per_pixel", 1) != 1:
        raise fault("not_scalar")
    if header.get("photometric", "MONOCHROME2") != "MONOCHROME2":
        raise fault("photometric")
    if len(header.get("position") or ()) != 3 or len(header.get("orientation") or ()) != 6:
        raise fault("no_position")
    allocated = header.get("bits_allocated")
    if "rows" not in header or "columns" not in header or allocated not in (8, 16, 32):
        raise fault("unsupported_pixels")
    if not 0 <= int(header.get("bits_stored") or 0) <= allocated:
        raise fault("unsupported_pixels")


def _stack_geometry(headers: Sequence[Header]) -> SliceGeometry:
    """Check that slices form one volume and return their geometry."""
    first = headers[0]
    base = np.array([*first["orientation"], *(first.get("pixel_spacing") or ())])
    seen: set[tuple[float, ...]] = set()
    for header in headers:
        same = all(header.get(name) == first.get(name) for name in ("rows", "columns", "modality", "bits_allocated"))
        grid = (*header["orientation"], *(header.get("pixel_spacing") or ()))
        if not same or (grid not in seen and (len(grid) != len(base) or not np.allclose(grid, base, rtol=1e-3, atol=2e-3))):
            raise GeometryError(
                "slices of different size, spacing or orientation; one volume is needed; index the folder to split it"
            )
        seen.add(grid)
    positions = np.array([header["position"] for header in headers], dtype=np.float64)
    geometry = slice_geometry(positions, first["orientation"], first.get("pixel_spacing"))
    if geometry.faults:
        raise fault(geometry.faults[0])
    return geometry


def _mosaic(files: Sequence[Path], headers: list[Header], philips_scaling: bool) -> tuple[Stack, SliceGeometry, list[Header]]:
    """Cut the one image into the slices of its volume."""
    if len(files) != 1:
        raise ImageError("not_3d", f"{len(files)} mosaics are as many volumes; name one file; index the folder to split it")
    header = {**headers[0], "mosaic": mosaic_layout(files[0])}
    geometry = mosaic_geometry(header)
    if geometry.faults:
        raise fault(geometry.faults[0])
    layout = header["mosaic"]
    grid, (rows, columns) = int(layout["grid"]), layout["tile"]
    pixels, invalid = load_slice(files[0], header, (int(header["rows"]), int(header["columns"])))

    def tiles(image: np.ndarray) -> np.ndarray:
        cut: np.ndarray = image.reshape(grid, rows, grid, columns).swapaxes(1, 2).reshape(grid * grid, rows, columns)
        return np.asarray(cut[geometry.order])

    stack = Stack((int(layout["n"]), rows, columns))
    stack.put(0, tiles(pixels), None if invalid is None else tiles(invalid))
    return stack, geometry, [header]


def _scale_philips(files: Sequence[Path], headers: Sequence[Header], wanted: bool) -> None:
    """Replace slope and intercept so that stored values become floating point values.

    With stored value SV, rescale slope RS, intercept RI and the private scale slope SS (2005,100E), the display value is
    DV = SV * RS + RI and the floating point value FP = DV / (RS * SS) = SV / SS + RI / (RS * SS).
    """
    slopes = {float(header.get("slope", 1.0)) for header in headers}
    # Display values of slices with different slopes cannot be compared, whatever was asked for.
    if headers[0].get("modality") != "MR" or not (wanted or len(slopes) > 1):
        return
    scales = [_scale_slope(path, header) for path, header in zip(files, headers)]
    if not all(scales) or 0.0 in slopes:
        return
    for header, scale in zip(headers, scales):
        assert scale is not None
        slope, intercept = float(header.get("slope", 1.0)), float(header.get("intercept", 0.0))
        header["slope"], header["intercept"] = 1.0 / scale, intercept / (slope * scale)


def _scale_slope(path: Path, header: Header) -> float | None:
    if "scale_slope" in header:
        return float(header["scale_slope"])
    if "frame" in header:
        return None
    creators = [0x20050000 | block for block in PHILIPS_BLOCKS]
    values = [0x20050000 | block << 8 | 0x0E for block in PHILIPS_BLOCKS]
    raw = read_raw(path, {*creators, *values})
    for creator, value in zip(creators, values):
        if raw.elements.get(creator, (b"", b""))[1].strip(b" \0") == PHILIPS:
            scale = convert(raw.elements.get(value), "FL", raw.big_endian)
            return None if scale is None else float(scale)
    return None


def _pool(n: int) -> int:
    return max(1, min(READ_THREADS, os.cpu_count() or 1, n // 8))


def _fast_stack(files: Sequence[Path], headers: Sequence[Header], shape: tuple[int, int, int]) -> Stack | None:
    """Read uncompressed 16-bit slices that fit int16 straight into their place; None when that does not apply."""
    first = headers[0]
    bits = int(first.get("bits_stored") or 16)
    signed = bool(first.get("pixel_representation"))
    expected = shape[1] * shape[2] * 2
    intercepts: list[int] = []
    for header in headers:
        slope, intercept = float(header.get("slope", 1.0)), float(header.get("intercept", 0.0))
        layout = (header.get("bits_stored") or 16, bool(header.get("pixel_representation")))
        low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
        if (
            UNCOMPRESSED.get(header["syntax"]) not in ("implicit_le", "explicit_le")
            or header["bits_allocated"] != 16
            or layout != (bits, signed)
            or header["pixel_offset"] is None
            or header["pixel_length"] is None
            or slope != 1.0
            or not intercept.is_integer()
            or low + intercept < -32768
            or high + intercept > 32767
        ):
            return None
        if min(header["pixel_length"], header["file_bytes"] - header["pixel_offset"]) < expected:
            raise ImageError("truncated", "a slice has fewer bytes than pixels; copy the series again from its source")
        intercepts.append(int(intercept))
    words = np.empty(shape, dtype="<i2")
    paddings = [padding_limits(header) for header in headers]
    stack = Stack((1, 1, 1))
    stack.array = words
    if any(padding is not None for padding in paddings):
        stack.valid = np.ones(shape, dtype=bool)

    def load(k: int) -> tuple[int, int]:
        target = words[k]
        with open(files[k], "rb", buffering=0) as handle:
            handle.seek(headers[k]["pixel_offset"])
            if handle.readinto(memoryview(target).cast("B")) != expected:
                raise ImageError("truncated", "a slice ended while it was read; copy the series again from its source")
        padding, invalid = paddings[k], None
        if padding is not None:
            raw = target if signed else target.view("<u2")
            invalid = (raw >= padding[0]) & (raw <= padding[1])
        if bits < 16:
            if signed:
                np.left_shift(target, 16 - bits, out=target)
                np.right_shift(target, 16 - bits, out=target)
            else:
                np.bitwise_and(target, (1 << bits) - 1, out=target)
        if intercepts[k]:
            np.add(target, intercepts[k], out=target)
        if invalid is not None and invalid.any():
            assert stack.valid is not None
            np.logical_not(invalid, out=stack.valid[k])
            target[invalid] = 0
            kept = target[~invalid]
            return (int(kept.min()), int(kept.max())) if kept.size else (32767, -32768)
        return int(target.min()), int(target.max())

    with ThreadPoolExecutor(_pool(len(files))) as pool:
        ranges = list(pool.map(load, range(len(files))))
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    if low <= high:
        stack.low, stack.high = float(low), float(high)
    if stack.valid is not None and stack.valid.all():
        stack.valid = None
    if low >= 0 and high <= 255:
        stack.array = words.astype(np.uint8)
    else:
        stack.array = words.astype(np.int16, copy=False)
    return stack


def _slow_stack(files: Sequence[Path], headers: Sequence[Header], shape: tuple[int, int, int]) -> Stack:
    """Decode slice by slice."""
    stack = Stack(shape)

    def load(k: int) -> tuple[np.ndarray, np.ndarray | None]:
        return load_slice(files[k], headers[k], shape[1:])

    # In runs: decoders faster than this loop would pile up wide temporaries of the whole volume.
    with ThreadPoolExecutor(_pool(len(files))) as pool:
        for start in range(0, len(files), DECODED_AHEAD):
            run = range(start, min(start + DECODED_AHEAD, len(files)))
            for k, (pixels, invalid) in zip(run, pool.map(load, run)):
                stack.put(k, pixels[None], None if invalid is None else invalid[None])
    return stack
