"""Read one volume from NIfTI, NRRD, MetaImage or DICOM into canonical axes.

All formats end as (X, Y, Z) in the closest RAS+ orientation with a RAS+ affine in mm, as nibabel and MONAI deliver
NIfTI. DICOM and ITK worlds are LPS: they are converted in `nifti_files`, `itk_files` and `dicom_volume` and nowhere
else. Voxels are read in slabs and kept in the narrowest dtype that holds all of them (uint8, int16, else float32), so
that peak memory is about the size of the result; only slices that must be moved (gantry tilt, uneven steps) are held
twice.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.headers.file_headers import HEAD_BYTES, read_volume_header, sniff
from medssl.domains.dicom_volume import read_dicom
from medssl.domains.itk_files import read_itk
from medssl.domains.nifti_files import read_nifti
from medssl.domains.planar import os_fault
from medssl.domains.volume_stack import RawVolume, Stack, size_text
from medssl.errors import GeometryError, ImageError

__all__ = ["RawVolume", "read_label", "read_volume", "volumes_in"]

GRID_TOLERANCE = 0.1
"""Largest distance between corresponding corner voxels of image and label, in units of the smallest voxel edge."""


def read_volume(files: Sequence[Path], part: Mapping[str, Any] | None = None, *, philips_scaling: bool = False) -> RawVolume:
    """Read the files of one volume, whatever their format and names.

    Args:
        files: One NIfTI, NRRD or MetaImage file (a header with detached data may bring its data files along), or the
            DICOM slices of one volume in any order.
        part: See `domains.base.Domain.read`; a range of frames may have a step (`archive.multiframe.ranges`).
        philips_scaling: See `domains.mri`.

    Raises:
        ImageError: The volume cannot be used; `reason` says why: `unreadable`, `truncated`, `not_3d`, `not_scalar`,
            `no_spacing`, `constant`, `no_finite_voxels`, `no_decoder` and others of `archive.reasons.IMAGE_REASONS`.
        GeometryError: DICOM slices that form no regular grid, not even after the corrections of
            `archive.dicom_series.slice_geometry`.
    """
    volume, stack = _read(files, part, philips_scaling)
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
    volume, _ = _read([file], None, False)
    array = volume.array
    if array.dtype == np.float32:
        whole = np.rint(array)
        if volume.valid is not None or not np.array_equal(whole, array):
            raise ImageError("unsupported_pixels", f"label {file.name}: values are not whole numbers; export labels as integers")
        array = whole.astype(np.int32)
    affine, shape = _grid(like)
    if array.shape != shape:
        raise GeometryError(
            f"label {file.name}: {size_text(array.shape)} voxels on an image of {size_text(shape)}; they must share one grid; "
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


def volumes_in(file: Path) -> int:
    """Return how many volumes a file of a single-file format has by its header; 1 where it cannot be read."""
    try:
        with open(file, "rb") as handle:
            head = handle.read(HEAD_BYTES)
        kind = sniff(head)
        if kind not in ("nifti", "nifti_gz", "nrrd", "metaimage"):
            return 1
        return int(np.prod(read_volume_header(file, kind, head).shape[3:], dtype=np.int64))
    except (OSError, EOFError, ImageError):
        return 1


def _grid(like: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    if isinstance(like, tuple):
        affine, shape = like
    else:
        affine = like.affine
        holder = next((getattr(like, name) for name in ("image", "array") if hasattr(like, name)), like)
        shape = holder.shape
    return np.asarray(affine, dtype=np.float64), tuple(int(n) for n in shape)[-3:]


def _read(files: Sequence[Path], part: Mapping[str, Any] | None, philips_scaling: bool) -> tuple[RawVolume, Stack]:
    if not files:
        raise ImageError("vanished", "no file was given; name the files of one volume")
    volume = None if part is None or "volume" not in part else int(part["volume"])
    try:
        with open(files[0], "rb") as handle:
            head = handle.read(HEAD_BYTES)
        kind = sniff(head)
        if kind in ("dicom", "dicom_wsi"):
            return read_dicom(files, part, philips_scaling=philips_scaling)
        if kind in ("nifti", "nifti_gz"):
            return read_nifti(files[0], kind, head, volume)
        if kind in ("nrrd", "metaimage"):
            return read_itk(files[0], kind, head, volume)
    except MemoryError as err:
        raise ImageError("unsupported_pixels", "the volume does not fit into memory; leave it out") from err
    except OSError as err:
        if isinstance(err, gzip.BadGzipFile):
            raise ImageError("truncated", "damaged gzip stream; copy the file again from its source") from err
        raise os_fault(err) from err
    except (EOFError, zlib.error) as err:
        raise ImageError("truncated", "the gzip stream ends early; copy the file again from its source") from err
    if kind == "empty":
        raise ImageError("empty", "the file has no bytes; copy it again from its source")
    reason = "not_image" if kind in ("other", "sidecar", "dicomdir") else "unsupported_format"
    raise ImageError(reason, "not a volume file; NIfTI, NRRD, MetaImage and DICOM series are accepted")
