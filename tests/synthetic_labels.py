"""Tiny label files for tests: .seg.nrrd, DICOM-SEG and RTSTRUCT, written from arrays and RAS+ affines, byte by byte or through
pydicom, without any of the code that reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.synthetic import LPS, _decimal

SEG = "1.2.840.10008.5.1.4.1.1.66.4"
LABELMAP_SEG = "1.2.840.10008.5.1.4.1.1.66.7"
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"


def ellipsoid(
    shape: Sequence[int], centre: Sequence[float], radii: Sequence[float], affine: np.ndarray | None = None
) -> np.ndarray:
    """Return which voxel centres lie in an ellipsoid; centre and radii in voxels, or in mm of the affine's axes from voxel 0."""
    scale = np.ones(3) if affine is None else np.linalg.norm(affine[:3, :3], axis=0)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1) * scale
    inside: np.ndarray = (((grid - np.asarray(centre)) / np.asarray(radii)) ** 2).sum(axis=-1) <= 1
    return inside


def write_seg_nrrd(
    path: Path, layers: np.ndarray, affine: np.ndarray, segments: Sequence[Mapping[str, Any]], *, extra: Sequence[str] = ()
) -> Path:
    """Write layers (L, X, Y, Z) as Slicer does: one layer without a list axis; segments as header fields, such as Name."""
    lps = LPS @ affine
    vectors = " ".join(f"({','.join(repr(float(v)) for v in lps[:3, k])})" for k in range(3))
    many = len(layers) > 1
    lines = [
        "NRRD0004",
        "# Complete NRRD file format specification at:",
        "type: unsigned char",
        f"dimension: {4 if many else 3}",
        "space: left-posterior-superior",
        f"sizes: {' '.join(map(str, layers.shape if many else layers.shape[1:]))}",
        f"space directions: {'none ' if many else ''}{vectors}",
        f"kinds: {'list ' if many else ''}domain domain domain",
        "encoding: raw",
        f"space origin: ({','.join(repr(float(v)) for v in lps[:3, 3])})",
        *(f"Segment{k}_{key}:={value}" for k, segment in enumerate(segments) for key, value in segment.items()),
        *extra,
    ]
    data = layers if many else layers[0]
    path.write_bytes("\n".join(lines).encode() + b"\n\n" + data.astype(np.uint8).tobytes(order="F"))
    return path


def _dataset(path: Path, sop_class: str, syntax: str = "1.2.840.10008.1.2.1") -> Any:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = UID(sop_class), UID(syntax)
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name, "labels"])
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.PatientID, ds.PatientName = "P0001", "Phantom^One"
    return ds


def frame_uid(uid_seed: str = "medssl") -> str:
    """Return the frame of reference that `synthetic.write_dicom_series` gives a series."""
    from pydicom.uid import generate_uid

    return str(generate_uid(entropy_srcs=[uid_seed, "frame"]))


def write_dicom_seg(
    path: Path,
    masks: Mapping[str, np.ndarray],
    affine: np.ndarray,
    *,
    kind: str = "BINARY",
    frame: str | None = None,
    drop_empty: bool = True,
    maximum: int = 200,
) -> Path:
    """Write one segment per mask (X, Y, Z), planes across the last axis, X along rows; empty planes are left out.

    Args:
        path: File.
        masks: Label to bool mask; fractions from 0 to 1 where `kind` is FRACTIONAL. For LABELMAP they must not overlap.
        affine: Voxel index to RAS+ mm.
        kind: BINARY, FRACTIONAL or LABELMAP.
        frame: Frame of reference; none is written without it.
        drop_empty: Leave planes out that hold nothing of a segment.
        maximum: MaximumFractionalValue.
    """
    import pydicom
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence as Items

    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    ds = _dataset(path, LABELMAP_SEG if kind == "LABELMAP" else SEG)
    ds.Modality, ds.SegmentationType = "SEG", kind
    if frame is not None:
        ds.FrameOfReferenceUID = frame
    first = next(iter(masks.values()))
    planes = []
    if kind == "LABELMAP":
        both = np.zeros(first.shape, np.uint8)
        for number, mask in enumerate(masks.values(), start=1):
            both[mask] = number
        planes = [(0, z, both[:, :, z].T) for z in range(first.shape[2]) if both[:, :, z].any() or not drop_empty]
    else:
        for number, mask in enumerate(masks.values(), start=1):
            for z in range(first.shape[2]):
                plane = mask[:, :, z].T
                values = np.rint(plane * maximum).astype(np.uint8) if kind == "FRACTIONAL" else plane.astype(np.uint8)
                if values.any() or not drop_empty:
                    planes.append((number, z, values))
    segments, groups = [], []
    for number, label in enumerate(masks, start=1):
        item = Dataset()
        item.SegmentNumber, item.SegmentLabel, item.SegmentAlgorithmType = number, label, "MANUAL"
        segments.append(item)
    for number, z, _ in planes:
        place, item = Dataset(), Dataset()
        place.ImagePositionPatient = [_decimal(v) for v in (lps @ [0.0, 0.0, z, 1.0])[:3]]
        item.PlanePositionSequence = Items([place])
        if kind != "LABELMAP":
            whose = Dataset()
            whose.ReferencedSegmentNumber = number
            item.SegmentIdentificationSequence = Items([whose])
        groups.append(item)
    measures, direction, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [_decimal(spacing[1]), _decimal(spacing[0])]
    measures.SliceThickness = _decimal(spacing[2])
    direction.ImageOrientationPatient = [_decimal(v) for v in [*(lps[:3, 0] / spacing[0]), *(lps[:3, 1] / spacing[1])]]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Items([measures]), Items([direction])
    ds.SegmentSequence = Items(segments)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = Items([shared]), Items(groups)
    if kind == "FRACTIONAL":
        ds.SegmentationFractionalType, ds.MaximumFractionalValue = "PROBABILITY", maximum
    ds.NumberOfFrames, ds.Rows, ds.Columns = len(planes), int(first.shape[1]), int(first.shape[0])
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    bits = 1 if kind == "BINARY" else 8
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
    if planes:
        stacked = np.stack([values for _, _, values in planes])
        data = np.packbits(stacked.ravel(), bitorder="little").tobytes() if bits == 1 else stacked.tobytes()
        ds.PixelData = data + b"\0" * (len(data) % 2)
        ds["PixelData"].VR = "OB"
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
    return path


def write_rtstruct(
    path: Path, rois: Mapping[str, Sequence[tuple[str, np.ndarray]]], *, frame: str | None = None, digits: int = 4
) -> Path:
    """Write regions of (geometric type, (N, 3) points in RAS+ mm)."""
    import pydicom
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence as Items

    ds = _dataset(path, RTSTRUCT)
    ds.Modality = "RTSTRUCT"
    listed, drawn = [], []
    for number, (name, contours) in enumerate(rois.items(), start=1):
        item, roi = Dataset(), Dataset()
        item.ROINumber, item.ROIName = number, name
        if frame is not None:
            item.ReferencedFrameOfReferenceUID = frame
        roi.ReferencedROINumber = number
        pieces = []
        for kind, points in contours:
            piece = Dataset()
            piece.ContourGeometricType, piece.NumberOfContourPoints = kind, len(points)
            lps = np.asarray(points, dtype=np.float64) * (-1, -1, 1)
            piece.ContourData = [f"{v:.{digits}f}" for v in lps.ravel()]
            pieces.append(piece)
        if pieces:
            roi.ContourSequence = Items(pieces)
        listed.append(item)
        drawn.append(roi)
    ds.StructureSetROISequence, ds.ROIContourSequence = Items(listed), Items(drawn)
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
    return path


def at(affine: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return (N, 3) RAS+ mm of continuous voxel indices."""
    points: np.ndarray = np.asarray(indices) @ affine[:3, :3].T + affine[:3, 3]
    return points
