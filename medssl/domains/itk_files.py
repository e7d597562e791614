"""Read NRRD and MetaImage, header and data in one file or two, through SimpleITK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.headers.file_headers import FLIP, read_volume_header, volume_fault
from medssl.domains.volume_stack import RawVolume, Stack, canonical, check_volume, fault, single_volume, slabs
from medssl.errors import ImageError

NAMES = {"nrrd": "NrrdImageIO", "metaimage": "MetaImageIO"}


def read_itk(path: Path, kind: str, head: bytes, volume: int | None = None) -> tuple[RawVolume, Stack]:
    """Read one volume.

    Args:
        path: The header file.
        kind: `nrrd` or `metaimage`.
        head: Its first bytes.
        volume: Number of the volume in a file of four or more dimensions, in the order of storage. An NRRD whose list
            axis comes first (diffusion) is such a file too.

    Raises:
        ImageError: See `volume_files.read_volume`.
    """
    import SimpleITK as sitk

    described = read_volume_header(path, kind, head)
    # ITK's warnings name the file and go to stderr.
    sitk.ProcessObject.GlobalWarningDisplayOff()
    reader = sitk.ImageFileReader()
    reader.SetImageIO(NAMES[kind])
    reader.SetFileName(str(path))
    flags = described.flags
    if volume is None:
        shape, _, flags = single_volume(described, None)
    try:
        if volume is not None:
            reader.ReadImageInformation()
            image, shape = _extract(path, kind, reader, volume)
        else:
            image = reader.Execute()
    except RuntimeError as err:
        raise ImageError("unreadable", f"ITK cannot read this {kind} file; write it again") from err
    view = sitk.GetArrayViewFromImage(image)  # valid only while `image` lives
    if view.shape != shape or view.dtype.kind not in "iuf":
        raise ImageError("unsupported_pixels", f"{kind} voxels of type {view.dtype} in {view.ndim} axes have no reader")
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    affine = FLIP @ affine
    if volume is not None and (reason := volume_fault(shape[::-1], affine)) is not None:
        raise fault(reason)
    stack = Stack(shape)
    for start, count in slabs(shape, view.dtype.itemsize):
        stack.put(start, view[start : start + count])
    return canonical(stack, affine, described.slice_axis, flags)


def _extract(path: Path, kind: str, reader: Any, volume: int) -> tuple[Any, tuple[int, int, int]]:
    """Return one three-dimensional image of a file of several, and its size (z, y, x)."""
    import SimpleITK as sitk

    if not _states_spacing(path, kind):
        raise fault("no_spacing")
    size = [int(n) for n in reader.GetSize()]
    components = int(reader.GetNumberOfComponents())
    counts = size[3:] if components == 1 else [components]
    n = int(np.prod(counts)) if counts else 1
    if len(size) < 3 or (components > 1 and len(size) > 3):
        raise fault("not_3d" if len(size) < 3 else "not_scalar")
    check_volume(volume, n)
    shape = (size[2], size[1], size[0])
    if components > 1:
        return sitk.VectorIndexSelectionCast(reader.Execute(), volume), shape
    if len(size) == 3:
        return reader.Execute(), shape
    index = [0, 0, 0, *(int(k) for k in np.unravel_index(volume, counts, order="F"))]
    reader.SetExtractSize([*size[:3], *([0] * len(counts))])
    reader.SetExtractIndex(index)
    return reader.Execute(), shape


def _states_spacing(path: Path, kind: str) -> bool:
    """ITK assumes 1 mm where the header says nothing."""
    with open(path, "rb") as handle:
        lines = handle.read(65536).split(b"\n")
    keys = (b"spacings", b"space directions") if kind == "nrrd" else (b"ElementSpacing", b"ElementSize")
    separator = b":" if kind == "nrrd" else b"="
    return any(line.split(separator)[0].strip().lower() in {key.lower() for key in keys} for line in lines)
