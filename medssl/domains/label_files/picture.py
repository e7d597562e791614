"""Read the label map of a picture: values on the picture's own pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.headers.file_headers import HEAD_BYTES, sniff
from medssl.domains.label_files.base import LabelMap
from medssl.domains.planar import check_size, os_fault, quiet_decoders
from medssl.domains.volume_stack import size_text
from medssl.errors import GeometryError, ImageError

FORMS = "accepted: PNG, TIFF and BMP of label values (grey or palette), and NIfTI of one slice (columns along its first axis, rows along its second)"


def read_picture_labels(path: Path, shape: Sequence[int]) -> LabelMap:
    """Read a label map of values onto the pixels of its picture.

    Palette images are read as their indices, whatever the colours. NIfTI is taken pixel by pixel; its position in space is not looked at,
    since a picture has none.

    Args:
        path: PNG, TIFF, BMP, or NIfTI of one slice.
        shape: Rows and columns of the picture.

    Returns:
        (H, W, 1), values as stored.

    Raises:
        GeometryError: It has other rows and columns.
        ImageError: It is none of these forms, is in colour, or cannot be read.
    """
    quiet_decoders()
    try:
        with open(path, "rb") as handle:
            head = handle.read(HEAD_BYTES)
        if head.startswith((b"\x89PNG", b"II*\0", b"MM\0*", b"BM")):
            array = _indices(path)
        elif sniff(head) in ("nifti", "nifti_gz"):
            array = _one_slice(path)
        else:
            raise ImageError("unsupported_format", f"no label map of a picture; {FORMS}")
    except OSError as err:
        raise os_fault(err) from err
    except (ImageError, MemoryError):
        raise
    except Exception as err:  # decoders raise many classes on damaged files
        raise ImageError("unreadable", f"a label map could not be decoded ({type(err).__name__}); copy it again") from None
    if array.shape != tuple(shape):
        raise GeometryError(
            f"labels of {size_text(array.shape)} pixels on a picture of {size_text(shape)} (rows by columns); they must share one grid; "
            "resample the label to its picture with nearest neighbours",
            reason="geometry",
        )
    return LabelMap(np.ascontiguousarray(array[..., None]), named=False)


def _indices(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as picture:
        check_size(picture.height, picture.width, picture.height * picture.width * 4)
        if int(getattr(picture, "n_frames", 1)) > 1:
            raise ImageError("unsupported_pixels", "a label map of several pages; save one")
        if picture.mode not in ("1", "L", "P", "I", "F") and not picture.mode.startswith("I;16"):
            raise ImageError(
                "unsupported_pixels", f"a label map in colour ({picture.mode}); save the label values as grey or palette"
            )
        return _whole(np.asarray(picture))


def _one_slice(path: Path) -> np.ndarray:
    import nibabel

    image: Any = nibabel.load(path)
    shape = tuple(int(n) for n in image.shape)
    if len(shape) < 2 or any(n != 1 for n in shape[2:]):
        raise ImageError(
            "unsupported_pixels", f"a label map of {size_text(shape)} voxels for one picture; give the slice of it alone"
        )
    check_size(shape[1], shape[0], shape[0] * shape[1] * 8)
    return _whole(np.asanyarray(image.dataobj).reshape(shape[:2]).T)


def _whole(array: np.ndarray) -> np.ndarray:
    whole = np.rint(array).astype(np.int64) if array.dtype.kind == "f" else array.astype(np.int64)
    if array.dtype.kind == "f" and not np.array_equal(whole, array):
        raise ImageError("unsupported_pixels", "a label map with values that are not whole numbers; export labels as integers")
    clipped: np.ndarray = np.clip(whole, -(2**31), 2**31 - 1).astype(np.int32)
    return clipped
