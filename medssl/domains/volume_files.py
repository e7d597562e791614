"""Read one volume from NIfTI, NRRD, MetaImage or a DICOM series into canonical axes.

All formats end as (X, Y, Z) in the closest RAS+ orientation with a RAS+ affine in mm, as nibabel and MONAI deliver
NIfTI. DICOM and ITK worlds are LPS: they are converted here and nowhere else. Voxels are read in slabs and kept in
the narrowest dtype that holds all of them (uint8, int16, else float32), so that peak memory is about the size of the
result.
"""

from __future__ import annotations

import gzip
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.dicom_header import (
    LOSSY_SYNTAXES,
    UNCOMPRESSED,
    Header,
    find_decoder,
    read_header,
    syntax_name,
)
from medssl.archive.dicom_series import SliceGeometry, slice_geometry
from medssl.archive.dicom_tags import READ_KEYS
from medssl.archive.file_headers import (
    FLIP,
    HEAD_BYTES,
    VolumeHeader,
    inflate,
    parse_nifti,
    read_volume_header,
    sniff,
)
from medssl.archive.reasons import SERIES_REASONS
from medssl.errors import GeometryError, ImageError

SLAB_BYTES = 8 << 20
GRID_TOLERANCE = 0.1
"""Largest distance between corresponding corner voxels of image and label, in units of the smallest voxel edge."""
ANISOTROPY = 1.2
"""A voxel edge longer than the others by this factor is taken for the slice axis where the header does not name one."""
READ_THREADS = 4


@dataclass
class RawVolume:
    """A volume as its file holds it, in canonical axes.

    Args:
        array: (X, Y, Z) uint8, int16 or float32; rescale slope and intercept are applied; may be a strided view.
        affine: (4, 4) float64, voxel centre index to RAS+ mm.
        spacing_mm: (3,) voxel edges along X, Y, Z.
        slice_axis: Array axis along which slices lie, or None.
        modality: DICOM modality (`CT`, `MR`, ...), or `unknown`.
        flags: Quality flags (see `archive.reasons.FLAGS`).
        valid: (X, Y, Z) bool, False = padding or not finite (such voxels hold 0); None when all are valid.
        units: `HU`, `arbitrary`, or `unknown` for formats that cannot say.
        image_type: DICOM ImageType values; empty for other formats.
    """

    array: np.ndarray
    affine: np.ndarray
    spacing_mm: tuple[float, float, float]
    slice_axis: int | None
    modality: str = "unknown"
    flags: tuple[str, ...] = ()
    valid: np.ndarray | None = None
    units: str = "unknown"
    image_type: tuple[str, ...] = ()


def read_volume(files: Sequence[Path], part: Mapping[str, Any] | None = None) -> RawVolume:
    """Read the files of one volume, whatever their format and names.

    Args:
        files: One NIfTI, NRRD or MetaImage file (a header with detached data may bring its data files along), or the
            DICOM slices of one volume in any order.
        part: See `domains.base.Domain.read`.

    Raises:
        ImageError: The volume cannot be used; `reason` says why: `unreadable`, `truncated`, `not_3d`, `not_scalar`,
            `no_spacing`, `constant`, `no_finite_voxels`, `no_decoder` and others of `archive.reasons.IMAGE_REASONS`.
        GeometryError: DICOM slices that form no regular, orthogonal grid.
    """
    assert part is None
    volume, stack = _read(files)
    if stack.high < stack.low:
        raise ImageError("no_finite_voxels", "no finite voxel outside padding; leave this image out or repair it")
    if stack.high == stack.low:
        raise ImageError("constant", f"all voxels are {stack.low:g}; an image needs contrast; leave it out")
    return volume


def read_label(file: Path, like: Any) -> np.ndarray:
    """Read an integer label map on the grid of an image.

    Args:
        file: NIfTI, NRRD or MetaImage file.
        like: The image's canonical grid: anything with `affine` and an `image`, `array` or `shape`, or a pair
        (affine, shape).

    Returns:
        (X, Y, Z) uint8, int16 or int32, canonical axes.

    Raises:
        GeometryError: The grids differ: another shape, or corner voxels more than a tenth of the smallest voxel edge
        apart.
        ImageError: The file cannot be read, or holds values that are not whole numbers.
    """
    volume, _ = _read([file])
    array = volume.array
    if array.dtype == np.float32:
        whole = np.rint(array)
        if volume.valid is not None or not np.array_equal(whole, array):
            raise ImageError("unsupported_pixels", f"label {file.name}: values are not whole numbers; export labels as integers")
        array = whole.astype(np.int32)
    affine, shape = _grid(like)
    if array.shape != shape:
        raise GeometryError(
            f"label {file.name}: {_size(array.shape)} voxels on an image of {_size(shape)}; they must share one grid; "
            "resample the label to its image with nearest neighbours",
            reason="geometry",
        )
    corners = np.array([[x, y, z, 1] for x in (0, shape[0] - 1) for y in (0, shape[1] - 1) for z in (0, shape[2] - 1)])
    apart = float(np.linalg.norm(corners @ (volume.affine - affine).T, axis=1).max())
    limit = GRID_TOLERANCE * min(volume.spacing_mm)
    if apart > limit:
        raise GeometryError(
            f"label {file.name}: lies up to {apart:.2f} mm away from its image; at most {limit:.2f} mm is accepted; "
            "resample the label to its image with nearest neighbours",
            reason="geometry",
        )
    return np.ascontiguousarray(array)


def _size(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape)


def _grid(like: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    if isinstance(like, tuple):
        affine, shape = like
    else:
        affine = like.affine
        holder = next((getattr(like, name) for name in ("image", "array") if hasattr(like, name)), like)
        shape = holder.shape
    return np.asarray(affine, dtype=np.float64), tuple(int(n) for n in shape)[-3:]


class _Stack:
    """Collects slabs (z, y, x) into one array of the narrowest dtype that has held all of them so far."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.array = np.empty(shape, dtype=np.uint8)
        self.valid: np.ndarray | None = None
        self.low, self.high = np.inf, -np.inf
        self.flags: list[str] = []

    def put(self, start: int, slab: np.ndarray, invalid: np.ndarray | None = None) -> None:
        """Store a slab of any integer or real dtype; True in `invalid` excludes a voxel. The slab may be changed."""
        if slab.dtype.kind == "f":
            finite = np.isfinite(slab)
            if not finite.all():
                self.flag("nan_voxels")
                invalid = ~finite if invalid is None else invalid | ~finite
        if invalid is not None and invalid.any():
            if self.valid is None:
                self.valid = np.ones(self.array.shape, dtype=bool)
            self.valid[start : start + len(slab)] = ~invalid
            slab = np.where(invalid, slab.dtype.type(0), slab)
            kept = slab[~invalid]
        else:
            kept = slab
        if kept.size:
            self.low = min(self.low, float(kept.min()))
            self.high = max(self.high, float(kept.max()))
        self._widen(start, slab)
        self.array[start : start + len(slab)] = slab

    def flag(self, name: str) -> None:
        if name not in self.flags:
            self.flags.append(name)

    def _widen(self, start: int, slab: np.ndarray) -> None:
        low, high = float(slab.min()), float(slab.max())
        whole = slab.dtype.kind in "iub" or (
            self.array.dtype != np.float32 and low >= -32768 and high <= 32767 and bool(np.array_equal(np.rint(slab), slab))
        )
        if self.array.dtype != np.float32:
            if not whole or low < -32768 or high > 32767:
                self._change(start, np.float32)
            elif self.array.dtype == np.uint8 and (low < 0 or high > 255):
                self._change(start, np.int16)
        if self.array.dtype == np.float32 and slab.dtype != np.float32 and "float32_rounded" not in self.flags:
            exact = max(-low, high) <= 2**24 if whole else np.array_equal(slab.astype(np.float32), slab)
            if not exact:
                self.flag("float32_rounded")

    def _change(self, filled: int, dtype: Any) -> None:
        wider = np.empty(self.array.shape, dtype=dtype)
        wider[:filled] = self.array[:filled]
        self.array = wider


def _read(files: Sequence[Path]) -> tuple[RawVolume, _Stack]:
    if not files:
        raise ImageError("vanished", "no file was given; name the files of one volume")
    try:
        with open(files[0], "rb") as handle:
            head = handle.read(HEAD_BYTES)
        kind = sniff(head)
        if kind in ("dicom", "dicom_wsi"):
            return _read_dicom(files)
        if kind in ("nifti", "nifti_gz"):
            return _read_nifti(files[0], kind, head)
        if kind in ("nrrd", "metaimage"):
            return _read_itk(files[0], kind, head)
    except OSError as err:
        if isinstance(err, gzip.BadGzipFile):
            raise ImageError("truncated", "damaged gzip stream; copy the file again from its source") from err
        raise _os_error(err) from err
    except (EOFError, zlib.error) as err:
        raise ImageError("truncated", "the gzip stream ends early; copy the file again from its source") from err
    if kind == "empty":
        raise ImageError("empty", "the file has no bytes; copy it again from its source")
    reason = "not_image" if kind in ("other", "sidecar", "dicomdir") else "unsupported_format"
    raise ImageError(reason, "not a volume file; NIfTI, NRRD, MetaImage and DICOM series are accepted")


def _os_error(err: OSError) -> ImageError:
    reason = {FileNotFoundError: "vanished", PermissionError: "permission"}.get(type(err), "io_error")
    return ImageError(reason, f"a file could not be read ({err.strerror}); check that it is there and readable")


def _fault(reason: str) -> ImageError:
    text = f"{SERIES_REASONS.get(reason, reason)}; a regular three-dimensional volume is needed; leave this series out"
    geometric = ("gantry_tilt", "irregular_slices", "collision", "bad_orientation", "no_position", "single_slice")
    return GeometryError(text, reason=reason) if reason in geometric else ImageError(reason, text)


def _slabs(shape: tuple[int, int, int], itemsize: int) -> Iterator[tuple[int, int]]:
    """Yield (first, count) runs along z of about `SLAB_BYTES`."""
    step = max(1, SLAB_BYTES // max(1, shape[1] * shape[2] * itemsize))
    for start in range(0, shape[0], step):
        yield start, min(step, shape[0] - start)


def _canonical(
    stack: _Stack, affine: np.ndarray, slice_axis: int | None, flags: Sequence[str], **fields: Any
) -> tuple[RawVolume, _Stack]:
    """Turn a filled stack (z, y, x in stored order) into RAS+ axes; only views are made."""
    from nibabel import orientations

    array = stack.array.transpose(2, 1, 0)
    if slice_axis is None:
        slice_axis = _longest_edge(affine)
    change = orientations.io_orientation(affine)
    valid = None if stack.valid is None else orientations.apply_orientation(stack.valid.transpose(2, 1, 0), change)
    canonical = affine @ orientations.inv_ornt_aff(change, array.shape)
    x, y, z = (float(edge) for edge in np.linalg.norm(canonical[:3, :3], axis=0))
    return RawVolume(
        array=orientations.apply_orientation(array, change),
        affine=canonical,
        spacing_mm=(x, y, z),
        slice_axis=None if slice_axis is None else int(change[slice_axis, 0]),
        flags=tuple(dict.fromkeys([*flags, *stack.flags])),
        valid=valid,
        **fields,
    ), stack


def _longest_edge(affine: np.ndarray) -> int | None:
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    order = np.argsort(edges)
    return int(order[2]) if edges[order[2]] >= ANISOTROPY * edges[order[1]] else None


def _usable(header: VolumeHeader) -> tuple[tuple[int, int, int], np.ndarray]:
    """Return (z, y, x) and the affine of a single-file volume, or raise for its reason."""
    if header.reason is not None:
        if header.reason == "not_3d":
            raise ImageError(
                "not_3d",
                f"{len(header.shape)}D image of {_size(header.shape)}; one 3D volume is needed; split it first",
            )
        raise _fault(header.reason)
    assert header.affine is not None
    x, y, z = header.shape
    return (z, y, x), header.affine


def _read_nifti(path: Path, kind: str, head: bytes) -> tuple[RawVolume, _Stack]:
    described = read_volume_header(path, kind, head)
    shape, affine = _usable(described)
    header = parse_nifti(inflate(head, 1024) if kind == "nifti_gz" else head)
    dtype = np.dtype(header.get_data_dtype())
    slope, intercept = header.get_slope_inter()
    scale = _scaler(1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))
    stack = _Stack(shape)
    opener: Callable[..., Any] = gzip.open if kind == "nifti_gz" else open
    with opener(path, "rb") as stream:
        skip = max(int(header["vox_offset"]), 348)
        if len(stream.read(skip)) < skip:
            raise ImageError("truncated", "the file ends in its header; copy it again from its source")
        for start, count in _slabs(shape, dtype.itemsize):
            size = count * shape[1] * shape[2] * dtype.itemsize
            data = stream.read(size)
            if len(data) < size:
                raise ImageError("truncated", "the file ends before its last voxel; copy it again from its source")
            slab = np.frombuffer(data, dtype=dtype).reshape(count, shape[1], shape[2])
            stack.put(start, scale(slab))
    return _canonical(stack, affine, described.slice_axis, described.flags)


def _scaler(slope: float, intercept: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that applies slope and intercept: exactly on integers, in float64 otherwise."""
    if slope in (0.0, 1.0) and intercept == 0.0:
        return lambda slab: slab
    if slope.is_integer() and intercept.is_integer() and max(abs(slope), abs(intercept)) < 2**31:

        def whole(slab: np.ndarray) -> np.ndarray:
            if slab.dtype.kind == "f":
                return slab.astype(np.float64) * slope + intercept
            return slab.astype(np.int64) * int(slope) + int(intercept)

        return whole
    return lambda slab: slab.astype(np.float64) * slope + intercept


def _read_itk(path: Path, kind: str, head: bytes) -> tuple[RawVolume, _Stack]:
    import SimpleITK as sitk

    described = read_volume_header(path, kind, head)
    shape, _ = _usable(described)
    # ITK's warnings name the file and go to stderr.
    sitk.ProcessObject.GlobalWarningDisplayOff()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if kind == "nrrd" else "MetaImageIO")
    reader.SetFileName(str(path))
    try:
        image = reader.Execute()
    except RuntimeError as err:
        raise ImageError("unreadable", f"ITK cannot read this {kind} file; write it again") from err
    view = sitk.GetArrayViewFromImage(image)  # valid only while `image` lives
    if view.shape != shape or view.dtype.kind not in "iuf":
        raise ImageError("unsupported_pixels", f"{kind} voxels of type {view.dtype} in {view.ndim} axes have no reader")
    stack = _Stack(shape)
    for start, count in _slabs(shape, view.dtype.itemsize):
        stack.put(start, view[start : start + count])
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return _canonical(stack, FLIP @ affine, described.slice_axis, described.flags)


def _read_dicom(files: Sequence[Path]) -> tuple[RawVolume, _Stack]:
    headers = [read_header(path, READ_KEYS) for path in files]
    geometry = _dicom_geometry(headers)
    files = [files[i] for i in geometry.order]
    headers = [headers[i] for i in geometry.order]
    first = headers[0]
    shape = (len(files), int(first["rows"]), int(first["columns"]))
    stack = _fast_stack(files, headers, shape) or _slow_stack(files, headers, shape)
    if stack.valid is not None and "nan_voxels" not in stack.flags:
        stack.flag("padding")
    flags = ["lossy"] if any(syntax_name(header["syntax"]) in LOSSY_SYNTAXES for header in headers) else []
    modality = str(first.get("modality", "unknown"))
    rescale = {header.get("rescale_type") for header in headers}
    units = "arbitrary"
    if modality == "CT":
        units = "HU" if rescale <= {None, "HU"} else "unknown"
    assert geometry.affine is not None
    return _canonical(
        stack, geometry.affine, 2, flags, modality=modality, units=units, image_type=tuple(first.get("image_type", ()))
    )


def _dicom_geometry(headers: Sequence[Header]) -> SliceGeometry:
    """Check that slices form one volume and return their order and affine."""
    for header in headers:
        if int(header.get("n_frames") or 1) > 1:
            raise _fault("multiframe")
        if "MOSAIC" in header.get("image_type", ()):
            raise _fault("mosaic")
        if header.get("samples_per_pixel", 1) != 1:
            raise _fault("not_scalar")
        if header.get("photometric", "MONOCHROME2") != "MONOCHROME2":
            raise _fault("photometric")
        if len(header.get("position", ())) != 3 or len(header.get("orientation", ())) != 6:
            raise _fault("no_position")
        if "rows" not in header or "columns" not in header or header.get("bits_allocated") not in (8, 16, 32):
            raise _fault("unsupported_pixels")
    first = headers[0]
    for header in headers:
        same = all(header.get(name) == first.get(name) for name in ("rows", "columns", "modality", "bits_allocated"))
        grid = [*header["orientation"], *header.get("pixel_spacing", ())]
        base = [*first["orientation"], *first.get("pixel_spacing", ())]
        if not same or len(grid) != len(base) or not np.allclose(grid, base, rtol=1e-3, atol=2e-3):
            raise GeometryError(
                "slices of different size, spacing or orientation; one volume is needed; index the folder to split it"
            )
    positions = np.array([header["position"] for header in headers], dtype=np.float64)
    geometry = slice_geometry(positions, first["orientation"], first.get("pixel_spacing"))
    if geometry.faults:
        raise _fault(geometry.faults[0])
    return geometry


def _padding(header: Header) -> tuple[int, int] | None:
    """Return the lowest and highest raw word that means padding, or None.

    Zero is honoured in CT only: MR scanners state it although air around the patient is measured as zero too.
    """
    value = header.get("padding")
    if value is None or (value == 0 and header.get("modality") != "CT"):
        return None
    words = [int(value), int(header.get("padding_limit") or value)]
    if header.get("pixel_representation") and int(header["bits_allocated"]) == 16:
        words = [(word ^ 0x8000) - 0x8000 for word in words]
    return min(words), max(words)


def _pool(n: int) -> int:
    return max(1, min(READ_THREADS, os.cpu_count() or 1, n // 8))


def _fast_stack(files: Sequence[Path], headers: Sequence[Header], shape: tuple[int, int, int]) -> _Stack | None:
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
    paddings = [_padding(header) for header in headers]
    stack = _Stack((1, 1, 1))
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


def _slow_stack(files: Sequence[Path], headers: Sequence[Header], shape: tuple[int, int, int]) -> _Stack:
    """Decode slice by slice through pydicom's plug-ins, or through ITK where there is none."""
    decoders = [_decoder(header) for header in headers]
    stack = _Stack(shape)

    def load(k: int) -> tuple[np.ndarray, np.ndarray | None]:
        header = headers[k]
        try:
            pixels, scaled = decoders[k](files[k])
        except ImageError:
            raise
        except Exception as err:  # decoders raise many classes on damaged streams
            raise ImageError(
                "unreadable", f"a slice could not be decoded ({type(err).__name__}); copy it again from its source"
            ) from err
        if pixels.shape != shape[1:]:
            raise ImageError("unreadable", "a slice decodes to another size than its header states; copy it again")
        if scaled:
            return pixels, None
        padding = _padding(header)
        invalid = None if padding is None else (pixels >= padding[0]) & (pixels <= padding[1])
        bits, allocated = int(header.get("bits_stored") or 0), int(header["bits_allocated"])
        if 0 < bits < allocated and pixels.dtype.itemsize * 8 == allocated and pixels.dtype.kind in "iu":
            shift = allocated - bits
            pixels = (pixels << shift) >> shift
        return _scaler(float(header.get("slope", 1.0)), float(header.get("intercept", 0.0)))(pixels), invalid

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's warnings quote values of the header
        with ThreadPoolExecutor(_pool(len(files))) as pool:
            for k, (pixels, invalid) in enumerate(pool.map(load, range(len(files)))):
                stack.put(k, pixels[None], None if invalid is None else invalid[None])
    return stack


def _decoder(header: Header) -> Callable[[Path], tuple[np.ndarray, bool]]:
    """Return a function from a file to its pixels (rows, columns), True when slope and intercept are applied."""
    decoder = find_decoder(header["syntax"])
    if decoder == "none":
        raise ImageError(
            "no_decoder",
            f"no decoder for {syntax_name(header['syntax'])} pixels; install the extra with "
            '`pip install "medssl[dicom]"`, then index again',
        )
    if decoder == "itk":
        return lambda path: (_itk_slice(path), True)

    def through_pydicom(path: Path) -> tuple[np.ndarray, bool]:
        import pydicom

        dataset = pydicom.dcmread(path, force=True)
        if not getattr(dataset, "file_meta", None) or "TransferSyntaxUID" not in dataset.file_meta:
            if not hasattr(dataset, "file_meta"):
                dataset.file_meta = pydicom.dataset.FileMetaDataset()
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(header["syntax"])
        return np.asarray(dataset.pixel_array), False

    return through_pydicom


def _itk_slice(path: Path) -> np.ndarray:
    import SimpleITK as sitk

    sitk.ProcessObject.GlobalWarningDisplayOff()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    array: np.ndarray = sitk.GetArrayFromImage(reader.Execute())
    return array[0] if array.ndim == 3 and len(array) == 1 else array
