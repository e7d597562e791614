"""Read NIfTI-1 and NIfTI-2, plain or gzipped, slab by slab."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from medssl.archive.headers.file_headers import inflate, parse_nifti, read_volume_header
from medssl.domains.volume_stack import RawVolume, Stack, canonical, scaler, single_volume, slabs
from medssl.errors import ImageError

SKIP_BYTES = 4 << 20


def read_nifti(path: Path, kind: str, head: bytes, volume: int | None = None) -> tuple[RawVolume, Stack]:
    """Read one volume.

    Args:
        path: The file.
        kind: `nifti` or `nifti_gz`.
        head: Its first bytes.
        volume: Number of the volume in a file of four or more dimensions, in the order of storage.

    Raises:
        ImageError: See `volume_files.read_volume`.
    """
    described = read_volume_header(path, kind, head)
    shape, affine, flags = single_volume(described, volume)
    header = parse_nifti(inflate(head, 1024) if kind == "nifti_gz" else head)
    dtype = np.dtype(header.get_data_dtype())
    slope, intercept = header.get_slope_inter()
    scale = scaler(1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))
    stack = Stack(shape)
    opener: Callable[..., Any] = gzip.open if kind == "nifti_gz" else open
    with opener(path, "rb") as opened:
        stream = cast(BinaryIO, opened)
        before = (volume or 0) * shape[0] * shape[1] * shape[2] * dtype.itemsize
        if kind == "nifti":
            stream.seek(max(int(header["vox_offset"]), 348) + before)
        else:
            _skip(stream, max(int(header["vox_offset"]), 348) + before)
        for start, count in slabs(shape, dtype.itemsize):
            size = count * shape[1] * shape[2] * dtype.itemsize
            data = stream.read(size)
            if len(data) < size:
                raise ImageError("truncated", "the file ends before its last voxel; copy it again from its source")
            slab = np.frombuffer(data, dtype=dtype).reshape(count, shape[1], shape[2])
            stack.put(start, scale(slab))
    return canonical(stack, affine, described.slice_axis, flags)


def _skip(stream: BinaryIO, n: int) -> None:
    while n > 0:
        block = len(stream.read(min(n, SKIP_BYTES)))
        if block == 0:
            raise ImageError("truncated", "the file ends before its voxels; copy it again from its source")
        n -= block
