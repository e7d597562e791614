"""Large trees of small DICOM files, written fast: one template, patched in place."""

from __future__ import annotations

import io
import random
from pathlib import Path

PIXELS = 16


def template() -> tuple[bytes, dict[str, int]]:
    """Return a DICOM file of 16x16 voxels and the byte offsets of the values that are patched."""
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    values = Dataset()
    values.file_meta = FileMetaDataset()
    values.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    values.file_meta.MediaStorageSOPClassUID = CTImageStorage
    values.file_meta.MediaStorageSOPInstanceUID = "1.2.826.0.1.900.1"
    values.SOPClassUID, values.SOPInstanceUID = CTImageStorage, "1.2.826.0.1.1000000000000"
    values.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    values.StudyDate, values.Modality, values.Manufacturer = "20240102", "CT", "SIEMENS"
    values.PatientID, values.PatientName, values.PatientSex, values.PatientAge = "P2000000", "Made^Up", "F", "042Y"
    values.StudyInstanceUID, values.SeriesInstanceUID = "1.2.826.0.1.3000000", "1.2.826.0.1.4000000"
    values.InstanceNumber, values.KVP, values.SliceThickness = "5000000", "120", "2"
    values.ImagePositionPatient = ["-10", "-10", "6000000"]
    values.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    values.PixelSpacing = [0.7, 0.7]
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = "1", "-1024", "HU"
    values.Rows = values.Columns = PIXELS
    values.BitsAllocated, values.BitsStored, values.HighBit, values.PixelRepresentation = 16, 12, 11, 0
    values.SamplesPerPixel, values.PhotometricInterpretation = 1, "MONOCHROME2"
    values.PixelData = bytes(range(256)) * 2
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, values, enforce_file_format=True)
    data = buffer.getvalue()
    marks = {
        "uid": b"1000000000000",
        "patient": b"P2000000",
        "study": b"3000000",
        "series": b"4000000",
        "number": b"5000000",
        "z": b"6000000",
    }
    return data, {name: data.rindex(mark) for name, mark in marks.items()}


def write_tree(folder: Path, n_series: int, per_series: int, *, seed: int = 0, start: int = 0) -> int:
    """Write n_series * per_series files, shuffled over folders of a few hundred files; return how many."""
    data, at = template()
    order = list(range(n_series * per_series))
    random.Random(seed).shuffle(order)
    for place, number in enumerate(order):
        series, k = divmod(number, per_series)
        series += start
        file = bytearray(data)
        for name, text in {
            "uid": f"1{series * 100000 + k:012d}",
            "patient": f"P{series // 2:07d}",
            "study": f"3{series:06d}",
            "series": f"4{series:06d}",
            "number": f"{k:07d}",
            "z": f"{k * 2:07d}",
        }.items():
            file[at[name] : at[name] + len(text)] = text.encode()
        target = folder / f"{place // 4096:03d}" / f"{place // 256 % 16:02d}"
        if place % 256 == 0:
            target.mkdir(parents=True, exist_ok=True)
        (target / f"{start}_{place:07d}").write_bytes(bytes(file))
    return len(order)
