"""Read a label map of any form: what it is is seen in the file, not taken from its name."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from pathlib import Path

from medssl.archive.headers.dicom_raw import read_raw
from medssl.archive.headers.file_headers import HEAD_BYTES, sniff
from medssl.domains.label_files.base import Grid, LabelMap, damaged, open_dicom
from medssl.domains.label_files.dicom_seg import read_dicom_seg, segment_labels
from medssl.domains.label_files.organ_folder import organ_files, organ_name, read_organ_folder
from medssl.domains.label_files.rtstruct import read_rtstruct, regions
from medssl.domains.label_files.seg_nrrd import read_seg_nrrd, segments_of
from medssl.domains.planar import os_fault
from medssl.domains.volume_files import read_label
from medssl.errors import ImageError, MedsslError

SOP_CLASS = 0x00080016
FRAME_OF_REFERENCE = 0x00200052
SOP_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.66.4": "dicom_seg",
    "1.2.840.10008.5.1.4.1.1.66.7": "dicom_seg",
    "1.2.840.10008.5.1.4.1.1.481.3": "rtstruct",
}
FORMS = "accepted: NIfTI, NRRD and MetaImage maps, .seg.nrrd, DICOM-SEG, RTSTRUCT, and a folder of one mask per organ"


def read_labels(path: Path, grid: Grid, structures: Mapping[str, int] | None = None) -> LabelMap:
    """Read a label map of any form onto the grid of its image.

    Args:
        path: A file; or a folder of organ masks, or of one .seg.nrrd, DICOM-SEG or RTSTRUCT.
        grid: Grid of the image.
        structures: Name to value for forms that name their structures; None numbers them in the order of their names. A plain
            map of whole numbers has values and no names.

    Raises:
        GeometryError: It lies on another grid, in another frame of reference, or outside the image.
        ImageError: It cannot be read.
    """
    form, path = form_of(path)
    try:
        if form == "organ_folder":
            return read_organ_folder(path, grid, structures)
        if form == "seg_nrrd":
            return read_seg_nrrd(path, grid, structures)
        if form == "dicom_seg":
            return read_dicom_seg(path, grid, structures)
        if form == "rtstruct":
            return read_rtstruct(path, grid, structures)
        return LabelMap(read_label(path, (grid.affine, grid.shape)), named=False)
    except MedsslError:
        raise
    except (OSError, EOFError, zlib.error) as err:
        raise _fault(err) from err


def names_in(path: Path) -> list[str]:
    """Return the names of the structures that a label file labels, without reading its voxels; none for plain maps.

    The names are what somebody typed: they stay in `private/`.

    Raises:
        ImageError: It cannot be read.
    """
    form, path = form_of(path)
    try:
        if form == "organ_folder":
            return [organ_name(file) for file in organ_files(path)]
        if form == "seg_nrrd":
            return [segment.name for segment in segments_of(path)]
        if form == "dicom_seg":
            return [label for _, label in segment_labels(open_dicom(path))]
        if form == "rtstruct":
            return [roi.name for roi in regions(open_dicom(path)) if roi.contours]
    except MedsslError:
        raise
    except OSError as err:
        raise _fault(err) from err
    except Exception as err:  # pydicom quotes values
        raise damaged(err) from None
    return []


def form_of(path: Path) -> tuple[str, Path]:
    """Return `map`, `organ_folder`, `seg_nrrd`, `dicom_seg` or `rtstruct`, and what to read.

    Raises:
        ImageError: It is none of these.
    """
    try:
        if path.is_dir():
            masks = organ_files(path)
            segmentations = [file for file in masks if file.name.lower().endswith(".seg.nrrd")]
            if segmentations and len(masks) > 1:
                raise ImageError(
                    "unsupported_format",
                    f"a label folder with {len(segmentations)} .seg.nrrd among {len(masks)} label files; it may hold one .seg.nrrd alone, or one "
                    "mask per organ (.nii.gz, .nii, .nrrd, .mha, .mhd): name the .seg.nrrd itself, or remove what is too many",
                )
            if masks and not segmentations:
                return "organ_folder", path
            files = segmentations or [file for file in path.iterdir() if file.is_file()]
            if len(files) != 1:
                raise ImageError("not_image", f"a label folder of {len(files)} files and no organ mask among them; {FORMS}")
            path = files[0]
        with open(path, "rb") as handle:
            kind = sniff(handle.read(HEAD_BYTES))
        if kind == "nrrd":
            return ("seg_nrrd" if segments_of(path) else "map"), path
        if kind in ("nifti", "nifti_gz", "metaimage"):
            return "map", path
        if kind in ("dicom", "dicom_wsi"):
            sop_class = str(read_raw(path, (SOP_CLASS,)).get(SOP_CLASS, "UI") or "")
            if sop_class in SOP_CLASSES:
                return SOP_CLASSES[sop_class], path
            raise ImageError("not_image", f"a DICOM object that is neither a segmentation nor a structure set; {FORMS}")
    except OSError as err:
        raise _fault(err) from err
    raise ImageError("unsupported_format", f"no label file; {FORMS}")


def frame_of_reference(file: Path) -> str | None:
    """Return the FrameOfReferenceUID of an image file; None for other formats than DICOM, and where it is not stated."""
    try:
        with open(file, "rb") as handle:
            if sniff(handle.read(HEAD_BYTES)) != "dicom":
                return None
        return str(read_raw(file, (FRAME_OF_REFERENCE,)).get(FRAME_OF_REFERENCE, "UI") or "") or None
    except OSError as err:
        raise os_fault(err) from err


def _fault(err: BaseException) -> ImageError:
    if isinstance(err, OSError) and not isinstance(err, gzip.BadGzipFile):
        return os_fault(err)
    return ImageError("truncated", "the label file is damaged or ends early; copy it again from its source")
