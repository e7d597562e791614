"""DICOM segmentations (Segmentation Storage, Label Map Segmentation Storage) onto the grid of their image.

Reference: DICOM PS3.3 C.8.20; bits of BINARY frames run on from one frame into the next (PS3.5 8.1.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.domains.label_files.base import Grid, LabelMap, Painter, check_frame, damaged, open_dicom, placed
from medssl.errors import GeometryError, ImageError, MedsslError

TYPES = ("BINARY", "FRACTIONAL", "LABELMAP")
THRESHOLD = 0.5
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99")


def read_dicom_seg(path: Path, grid: Grid, structures: Mapping[str, int] | None = None) -> LabelMap:
    """Read a segmentation onto the grid of the image.

    A voxel of a FRACTIONAL segment belongs to it from half of MaximumFractionalValue on, whether the fraction is a probability
    or an occupancy. Planes for which a segment has no frame hold none of it: writers leave empty frames out. A segment without
    any frame is labelled and empty.

    Args:
        path: The file.
        grid: Grid of the image; its `frame_of_reference` is compared where both state one.
        structures: Segment label to value; None numbers the labels in their order.

    Raises:
        GeometryError: Another frame of reference, planes that are not planes of the image, or none that lies in it.
        ImageError: It cannot be read.
    """
    dataset = open_dicom(path)
    try:
        return _read(dataset, grid, structures)
    except MedsslError:
        raise
    except MemoryError as err:
        raise ImageError("unsupported_pixels", "the segmentation does not fit into memory; split it") from err
    except Exception as err:  # pydicom quotes values
        raise damaged(err) from None


def segment_labels(dataset: Any) -> list[tuple[int, str]]:
    """Return (segment number, label) of all segments."""
    return [
        (int(item.SegmentNumber), str(item.get("SegmentLabel") or f"segment {item.SegmentNumber}"))
        for item in dataset.get("SegmentSequence") or ()
    ]


def _read(dataset: Any, grid: Grid, structures: Mapping[str, int] | None) -> LabelMap:
    kind = str(dataset.get("SegmentationType"))
    if kind not in TYPES:
        raise ImageError("unsupported_pixels", "no segmentation type that is known (BINARY, FRACTIONAL, LABELMAP); export it again")
    flags = check_frame(dataset.get("FrameOfReferenceUID"), grid)
    painter = Painter(grid, structures)
    labels = [(number, label) for number, label in segment_labels(dataset) if kind != "LABELMAP" or number != 0]
    values = dict(zip([number for number, _ in labels], painter.declare([label for _, label in labels])))
    frames = _Frames(dataset)
    inside = 0
    for k in range(frames.n):
        affine = frames.affine(k)
        pixels = frames.pixels(k)
        if kind == "LABELMAP":
            found = {int(value): pixels == value for value in np.unique(pixels) if value != 0}
        elif kind == "FRACTIONAL":
            found = {frames.segment(k): pixels >= THRESHOLD * float(dataset.MaximumFractionalValue)}
        else:
            found = {frames.segment(k): pixels != 0}
        for number, mask in found.items():
            if number not in values:
                raise ImageError(
                    "unsupported_pixels", f"frame {k} belongs to a segment that the file does not list; export it again"
                )
            block, start = placed(mask.T[:, :, None], affine, grid)  # (columns, rows, 1)
            inside += bool(np.all(np.less(start, grid.shape) & (np.add(start, block.shape) > 0)))
            painter.add(values[number], block, start)
    if frames.n and not inside and painter.counts["outside"]:
        raise GeometryError("the segmentation lies outside its image; give the image that it was drawn on")
    return painter.done(flags)


class _Frames:
    """The frames of a segmentation: where each lies, whose it is, and its pixels, one at a time."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.n = int(dataset.get("NumberOfFrames") or 1) if "PixelData" in dataset else 0
        self.size = int(dataset.Rows) * int(dataset.Columns) if self.n else 0
        self.bits = int(dataset.get("BitsAllocated") or 0)
        shared = dataset.get("SharedFunctionalGroupsSequence") or [{}]
        self.shared = shared[0]
        self.each: Sequence[Any] = dataset.get("PerFrameFunctionalGroupsSequence") or ()
        if len(self.each) < self.n:
            raise ImageError(
                "unreadable", f"{self.n} frames and {len(self.each)} descriptions of frames; export the segmentation again"
            )
        self.native = self.n > 0 and str(dataset.file_meta.get("TransferSyntaxUID")) in NATIVE
        need = (self.n * self.size * self.bits + 7) // 8
        if self.native and len(dataset.PixelData) < need:
            raise ImageError("truncated", "fewer bytes than pixels in the segmentation; copy it again from its source")

    def _group(self, k: int, name: str) -> Any:
        for groups in (self.each[k], self.shared):
            if name in groups and len(groups.get(name)):
                return groups.get(name)[0]
        raise GeometryError("a frame of the segmentation does not say where it lies; slides and plain pictures are not volumes")

    def segment(self, k: int) -> int:
        return int(self._group(k, "SegmentIdentificationSequence").ReferencedSegmentNumber)

    def affine(self, k: int) -> np.ndarray:
        """(column, row, 0) of a frame to RAS+ mm."""
        cosines = np.array([float(v) for v in self._group(k, "PlaneOrientationSequence").ImageOrientationPatient])
        rows, columns = (float(v) for v in self._group(k, "PixelMeasuresSequence").PixelSpacing)
        affine = np.eye(4)
        affine[:3, 0], affine[:3, 1] = cosines[:3] * columns, cosines[3:] * rows
        affine[:3, 2] = np.cross(cosines[:3], cosines[3:])  # one plane: any length does
        affine[:3, 3] = [float(v) for v in self._group(k, "PlanePositionSequence").ImagePositionPatient]
        return np.asarray(np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)

    def pixels(self, k: int) -> np.ndarray:
        """(rows, columns) stored values."""
        shape = (int(self.dataset.Rows), int(self.dataset.Columns))
        if self.native and self.bits == 1:
            first = k * self.size
            held = np.frombuffer(self.dataset.PixelData, np.uint8)[first // 8 : (first + self.size + 7) // 8]
            return np.unpackbits(held, bitorder="little")[first % 8 :][: self.size].reshape(shape)
        if self.native and self.bits in (8, 16):
            dtype = np.dtype("<u1" if self.bits == 8 else "<u2")
            return np.frombuffer(self.dataset.PixelData, dtype, self.size, k * self.size * dtype.itemsize).reshape(shape)
        from pydicom.pixels import pixel_array

        return np.asarray(pixel_array(self.dataset, index=k))
