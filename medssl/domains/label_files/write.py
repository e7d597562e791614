"""Bring a label map back to where its image came from: in the axes of its file, or as DICOM-SEG on its slices."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.headers.file_headers import HEAD_BYTES, read_volume_header, sniff
from medssl.domains.label_files.base import Grid, damaged, open_dicom, placed
from medssl.errors import GeometryError, ImageError, MedsslError, RequestError
from medssl.weights import write_private

RESEARCH_ONLY = "RESEARCH ONLY - not for diagnosis"
COPIED = (
    # who and which study: an archive files the object by these, and refuses or misfiles it without
    "SpecificCharacterSet",
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    # which images, and where they lie
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "Modality",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "Rows",
    "Columns",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
)
"""Elements of the source that are given to highdicom; it copies all of a patient and study module that it finds, free text too."""
EMPTY_WHEN_ABSENT = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
)
TISSUE = ("85756007", "SCT", "Tissue")


def in_file_axes(label: np.ndarray, affine: np.ndarray, files: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Return a map on the voxels and in the axis order of its image file, and the file's affine (RAS+ mm).

    Args:
        label: (X, Y, Z) on the image's canonical grid.
        affine: Its affine.
        files: Files of the image. DICOM series have no axis order of their own and keep the canonical one.
    """
    if len(files) == 1:
        with open(files[0], "rb") as handle:
            head = handle.read(HEAD_BYTES)
        kind = sniff(head)
        if kind in ("nifti", "nifti_gz", "nrrd", "metaimage"):
            header = read_volume_header(files[0], kind, head)
            if header.affine is not None and len(header.shape) >= 3:  # of a 4-D file each volume lies there
                x, y, z = (int(n) for n in header.shape[:3])
                turned, start = placed(label, affine, Grid(header.affine, (x, y, z)))
                if start == (0, 0, 0) and turned.shape == (x, y, z):
                    return np.ascontiguousarray(turned), header.affine
    return label, affine


def need_highdicom() -> None:
    """Raise a RequestError where highdicom is not installed, before anything is computed for it."""
    try:
        importlib.import_module("highdicom")
    except ImportError as err:
        raise RequestError('writing DICOM-SEG needs highdicom; install it with `pip install "medssl[seg]"`') from err


def check_source(files: Sequence[Path]) -> None:
    """Refuse an image on which no DICOM-SEG can be written, before anything is computed for it.

    Raises:
        RequestError: It is no series of single DICOM slices.
    """
    for path in files:
        with open(path, "rb") as handle:
            if sniff(handle.read(HEAD_BYTES)) != "dicom":
                raise RequestError(
                    "DICOM-SEG predictions need images that are DICOM series; write NIfTI, or give the series as folders"
                )
    if len(files) < 2:
        raise RequestError(
            "DICOM-SEG predictions are written for series of single slices; this image is one file (multi-frame, mosaic): write NIfTI"
        )


def write_dicom_seg(
    path: Path, label: np.ndarray, grid: Grid, files: Sequence[Path], structures: Mapping[int, str], *, version: str
) -> None:
    """Write a predicted map as DICOM-SEG (BINARY) on the slices of its source series, through highdicom.

    The object is marked RESEARCH ONLY in SeriesDescription and ContentDescription, and ContentLabel is RESEARCH_ONLY. Series and
    instance get fresh random UIDs.

    **What it holds of the patient.** PatientID, PatientName, PatientBirthDate, PatientSex, StudyInstanceUID, StudyDate, StudyTime,
    StudyID and AccessionNumber are copied from the source, as the standard asks of an object in the same study; the instance UIDs
    of the slices are referenced and their frame of reference kept. Nothing else is: no description, comment, physician or
    institution. An archive needs these to file the object, and they are identifiers: so the file is written for its owner alone
    (mode 0600 in a folder of mode 0700) and belongs into `private/`, never beside results that are passed on.

    Args:
        path: File to write, in a folder named `private` or below one.
        label: (X, Y, Z) integer on the image's canonical grid.
        grid: That grid.
        files: The source series, one file per slice, in any order.
        structures: Label value to name: the segments, in the order of their values; those that were not found stay empty.
        version: Version of medssl.

    Raises:
        RequestError: highdicom is missing, the source is no DICOM series, or `path` is not private.
        GeometryError: Slices of the source are not planes of the grid: it was resampled (gantry tilt, uneven slices).
        ImageError: A source file cannot be read.
    """
    need_highdicom()
    check_source(files)
    if "private" not in path.parts:
        raise RequestError(f"{path.name}: DICOM-SEG carries the patient's identity; write it below a folder named private")
    slices = sorted(
        (_source(file) for file in files), key=lambda ds: float(np.dot(_normal(ds), _floats(ds, "ImagePositionPatient")))
    )
    planes = np.stack([_plane(label, grid, ds) for ds in slices])  # (slices, rows, columns)
    values = sorted(structures)
    numbers = np.zeros(planes.shape, dtype=np.uint8 if len(values) < 256 else np.uint16)
    for number, value in enumerate(values, start=1):
        numbers[planes == value] = number
    try:
        content = _build(slices, numbers, [structures[value] for value in values], version)
    except MedsslError:
        raise
    except Exception as err:  # highdicom and pydicom quote values
        raise ImageError(
            "unreadable", f"highdicom cannot write a segmentation on this series ({type(err).__name__}); write NIfTI"
        ) from None
    write_private(path, content)


def _source(file: Path) -> Any:
    """Return the elements of a slice that the segmentation needs."""
    from pydicom.dataset import Dataset

    source = open_dicom(file)
    kept = Dataset()
    try:
        for keyword in COPIED:
            if keyword in source:
                setattr(kept, keyword, source[keyword].value)
        for keyword in EMPTY_WHEN_ABSENT:
            if keyword not in kept:
                setattr(kept, keyword, "")
        kept.ReferringPhysicianName = ""
        kept.file_meta = source.file_meta
        if (
            int(source.get("NumberOfFrames") or 1) > 1
            or "ImagePositionPatient" not in kept
            or "ImageOrientationPatient" not in kept
        ):
            raise RequestError("DICOM-SEG predictions are written for series of single slices that say where they lie; write NIfTI")
    except MedsslError:
        raise
    except Exception as err:
        raise damaged(err) from None
    return kept


def _floats(ds: Any, keyword: str) -> np.ndarray:
    return np.array([float(v) for v in ds.get(keyword)])


def _normal(ds: Any) -> np.ndarray:
    cosines = _floats(ds, "ImageOrientationPatient")
    return np.cross(cosines[:3], cosines[3:])


def _plane(label: np.ndarray, grid: Grid, ds: Any) -> np.ndarray:
    """Return (rows, columns) of a map in a slice of the source."""
    cosines, (rows_mm, columns_mm) = _floats(ds, "ImageOrientationPatient"), _floats(ds, "PixelSpacing")
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1] = cosines[:3] * columns_mm, cosines[3:] * rows_mm
    across = int(np.abs(np.linalg.inv(grid.affine[:3, :3]) @ (_normal(ds) * (-1, -1, 1))).argmax())
    lps[:3, 2], lps[:3, 3] = _normal(ds) * grid.spacing_mm[across], _floats(ds, "ImagePositionPatient")
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps
    shape = (int(ds.Columns), int(ds.Rows), 1)
    try:
        turned, (i, j, k) = placed(label, grid.affine, Grid(affine, shape))
    except GeometryError:
        raise _resampled() from None
    if (i, j) != (0, 0) or turned.shape[:2] != shape[:2] or not 0 <= -k < turned.shape[2]:
        raise _resampled()
    return np.asarray(turned[:, :, -k].T)


def _resampled() -> GeometryError:
    return GeometryError(
        "the slices of the source are not planes of the prediction's grid, onto which they were resampled (gantry tilt, uneven "
        "slices); DICOM-SEG is written on the source's own slices: write NIfTI"
    )


def _build(slices: Sequence[Any], numbers: np.ndarray, names: Sequence[str], version: str) -> bytes:
    highdicom = importlib.import_module("highdicom")
    seg = importlib.import_module("highdicom.seg")
    from pydicom.sr.coding import Code
    from pydicom.uid import generate_uid

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="medssl", version=version, family=Code("123109", "DCM", "Artificial Intelligence")
    )
    segments = [
        seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=Code(*TISSUE),
            segmented_property_type=Code(*TISSUE),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(names, start=1)
    ]
    segmentation = seg.Segmentation(
        source_images=list(slices),
        pixel_array=numbers,
        segmentation_type="BINARY",
        segment_descriptions=segments,
        series_instance_uid=generate_uid(prefix=None),
        series_number=9000,
        sop_instance_uid=generate_uid(prefix=None),
        instance_number=1,
        manufacturer="medssl",
        manufacturer_model_name="medssl",
        software_versions=version,
        device_serial_number="medssl",
        content_description=RESEARCH_ONLY,
        content_label="RESEARCH_ONLY",
        series_description=RESEARCH_ONLY,
        omit_empty_frames=bool(numbers.any()),
    )
    buffer = io.BytesIO()
    segmentation.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
