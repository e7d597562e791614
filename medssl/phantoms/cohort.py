"""Write a labelled phantom cohort as real files: NIfTI volumes and DICOM series, labels, and a split table.

Layout, as `Cohort.load` reads it::

    OUT/images/phantom_0000.nii.gz      int16, RAS or LAS storage, oblique for a third of the patients
    OUT/images/phantom_0001/            a DICOM series: MR Image Storage, axial or coronal, one file per slice
    OUT/labels/phantom_0001.nii.gz      uint8, on the grid of the image
    OUT/split.csv                       one row per patient
    OUT/dataset.json                    names of the label values, Decathlon style
    OUT/phantoms.json                   parameters
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.phantoms.body import ORGAN_NAMES, Phantom, Size, draw_phantom, rotation
from medssl.phantoms.folder import write_whole
from medssl.seeding import counter_rng, derive_seed

FORMAT = 1
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])

# Plane -> (array axis along a row, its sign), (axis down a column, its sign), slice axis. Signs are against RAS: rows
# run to the patient's left, and down the picture runs posterior (axial) or inferior (coronal), as scanners write them.
_PLANES: dict[str, tuple[tuple[int, int], tuple[int, int], int]] = {
    "axial": ((0, -1), (1, -1), 2),
    "coronal": ((0, -1), (2, -1), 1),
}


def make_cohort(
    out: Path,
    *,
    patients: int = 60,
    seed: int = 0,
    size: Size = (64, 56, 48),
    dicom_fraction: float = 0.3,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a cohort of phantoms and return its folder; equal arguments give equal bytes.

    The folder appears under its name only when it is complete. A folder that holds this very cohort is left as it is.

    Args:
        out: Folder to make; must not exist, or be empty, or hold the same cohort.
        patients: Number of patients, at least 3; one volume each.
        seed: Another seed gives other patients.
        size: Voxels along X, Y, Z.
        dicom_fraction: Share of the patients written as DICOM series, 0 to 1; the rest is NIfTI.
        on_progress: Called with (patients written, patients).

    Raises:
        RequestError: The folder holds something else, or an argument is out of range.
    """
    out = Path(out)
    if patients < 3:
        raise RequestError(f"patients={patients}: train, val and test need one patient each; give 3 or more")
    if not 0 <= dicom_fraction <= 1:
        raise RequestError(f"dicom_fraction={dicom_fraction}: expected a share from 0 to 1")
    parameters = {
        "format": FORMAT,
        "patients": patients,
        "seed": seed,
        "size": list(size),
        "dicom_fraction": dicom_fraction,
        "structures": list(ORGAN_NAMES),
    }

    def write(folder: Path) -> None:
        _write_split(folder / "split.csv", _write_patients(folder, parameters, on_progress))
        names = {"0": "background", **{str(k): name for k, name in enumerate(ORGAN_NAMES, start=1)}}
        dataset = {
            "name": "medssl phantoms",
            "modality": {"0": "MR"},
            "labels": names,
            "licence": "generated, no patients",
        }
        (folder / "dataset.json").write_text(json.dumps(dataset, indent=1) + "\n")

    return write_whole(out, "phantoms.json", parameters, write, what="phantom cohort")


def _write_patients(
    folder: Path, parameters: Mapping[str, Any], on_progress: Callable[[int, int], None] | None
) -> list[dict[str, Any]]:
    """Write images and labels of all patients and return the rows of the split table."""
    patients, seed = parameters["patients"], parameters["seed"]
    order = counter_rng("phantom_cohort", seed, "split").permutation(patients)
    n_test, n_val = max(1, round(0.25 * patients)), max(1, round(0.15 * patients))
    as_dicom = np.zeros(patients, bool)
    n_dicom = round(patients * parameters["dicom_fraction"])
    as_dicom[counter_rng("phantom_cohort", seed, "format").permutation(patients)[:n_dicom]] = True
    split = dict.fromkeys(order[:n_test].tolist(), "test") | dict.fromkeys(order[n_test : n_test + n_val].tolist(), "val")
    rank = {int(patient): k for k, patient in enumerate(order[n_test + n_val :], start=1)}

    rows = []
    for patient in range(patients):
        name = f"phantom_{patient:04d}"
        rng = counter_rng("phantom_cohort", seed, "file", patient)
        phantom = draw_phantom(derive_seed("phantom_cohort", seed, patient), size=tuple(parameters["size"]))
        affine, labels = _affine(rng, phantom), phantom.labels
        image = np.round(np.clip(phantom.image * rng.uniform(500, 1800), 0, 4095)).astype(np.int16)
        if as_dicom[patient]:
            plane = "coronal" if rng.random() < 0.25 else "axial"
            write_dicom_series(folder / "images" / name, image, affine, patient_id=name, plane=plane, seed=seed)
            file = name
        else:
            file = f"{name}.nii.gz"
            if rng.random() < 1 / 3:  # LAS, as dcm2niix writes it
                image, labels, affine = _flip_x(image, labels, affine)
            write_nifti(folder / "images" / file, image, affine)
        write_nifti(folder / "labels" / f"{name}.nii.gz", labels, affine)
        rows.append(
            {
                "file": file,
                "label": f"{name}.nii.gz",
                "split": split.get(patient, "train"),
                "patient": name,
                "few_label_rank": rank.get(patient, ""),
                **{key: int(value) for key, value in phantom.attributes.items()},
                **{f"{organ}_ml": f"{ml:.2f}" for organ, ml in phantom.organ_ml().items()},
            }
        )
        if on_progress is not None:
            on_progress(patient + 1, patients)
    return rows


def _write_split(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _affine(rng: np.random.Generator, phantom: Phantom) -> np.ndarray:
    """Return a (4, 4) voxel-centre to RAS mm matrix around the scanner's centre, oblique for one patient in three."""
    turn = rotation(rng.uniform(-12, 12, 3)) if rng.random() < 1 / 3 else np.eye(3)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(phantom.spacing_mm)
    middle = (np.asarray(phantom.image.shape) - 1) / 2
    affine[:3, 3] = rng.uniform(-20, 20, 3) - affine[:3, :3] @ middle
    return affine


def _flip_x(image: np.ndarray, labels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the same volume stored from right to left."""
    flipped = affine.copy()
    flipped[:3, 3] += affine[:3, 0] * (image.shape[0] - 1)
    flipped[:3, 0] *= -1
    return image[::-1], labels[::-1], flipped


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write an integer volume as .nii.gz whose bytes depend on the arguments alone.

    Args:
        path: File to write.
        array: (X, Y, Z) int16 or uint8.
        affine: (4, 4) voxel centre to RAS mm.
    """
    import nibabel

    nifti = nibabel.Nifti1Image(np.ascontiguousarray(array), affine, dtype=array.dtype)
    nifti.header.set_xyzt_units("mm")
    nifti.set_qform(affine, code=1)
    nifti.set_sform(affine, code=1)
    path.write_bytes(gzip.compress(nifti.to_bytes(), compresslevel=1, mtime=0))  # no time stamp: same bytes each time


def write_dicom_series(
    folder: Path, array: np.ndarray, affine: np.ndarray, *, patient_id: str, plane: str = "axial", seed: int = 0
) -> None:
    """Write a volume as a folder of single-frame MR Image Storage files (uncompressed, explicit little endian).

    Args:
        folder: Folder to make.
        array: (X, Y, Z) int16 in RAS index order, values 0 to 4095.
        affine: (4, 4) voxel centre to RAS mm, columns orthogonal.
        patient_id: Phantom id; also the patient's name.
        plane: `axial` or `coronal`: how the scanner cut the slices.
        seed: Enters the UIDs.
    """
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

    (row_axis, row_sign), (column_axis, column_sign), slice_axis = _PLANES[plane]
    # Flip to the scanner's order, so that growing indices run along the DICOM directions.
    flips = [axis for axis, sign in ((row_axis, row_sign), (column_axis, column_sign)) if sign < 0]
    pixels = np.flip(array, tuple(flips))
    origin = affine[:3, 3] + sum((affine[:3, axis] * (array.shape[axis] - 1) for axis in flips), start=np.zeros(3))
    steps = affine[:3, :3].copy()
    steps[:, flips] *= -1
    spacing = np.linalg.norm(steps, axis=0)
    slices = np.ascontiguousarray(pixels.transpose(slice_axis, column_axis, row_axis)).astype("<u2")

    ids = {kind: f"2.25.{derive_seed('phantom_uid', seed, patient_id, kind)}" for kind in ("study", "series", "frame")}
    base = pydicom.Dataset()
    base.file_meta = pydicom.dataset.FileMetaDataset()
    base.file_meta.MediaStorageSOPClassUID = MRImageStorage
    base.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    base.SOPClassUID = MRImageStorage
    base.ImageType = ["ORIGINAL", "PRIMARY", "M", "SE"]
    base.Modality = "MR"
    base.Manufacturer = "medssl phantom"
    base.PatientName = f"{patient_id}^Phantom"
    base.PatientID = patient_id
    base.PatientBirthDate = base.PatientSex = base.AccessionNumber = base.StudyTime = base.StudyID = ""
    base.StudyDate = "20000101"  # phantoms were never scanned
    base.ScanningSequence, base.SequenceVariant, base.ScanOptions, base.MRAcquisitionType = "SE", "NONE", "", "2D"
    base.EchoTime, base.RepetitionTime, base.EchoTrainLength = 80, 3000, 8
    base.SeriesDescription = f"phantom {plane}"
    base.PatientPosition = "HFS"
    base.StudyInstanceUID, base.SeriesInstanceUID, base.FrameOfReferenceUID = ids["study"], ids["series"], ids["frame"]
    base.PositionReferenceIndicator = ""
    base.SeriesNumber = 1
    directions = np.concatenate([_RAS_TO_LPS @ steps[:, axis] / spacing[axis] for axis in (row_axis, column_axis)])
    base.ImageOrientationPatient = [_ds(value) for value in directions]
    base.PixelSpacing = [_ds(spacing[column_axis]), _ds(spacing[row_axis])]
    base.SliceThickness = base.SpacingBetweenSlices = _ds(spacing[slice_axis])
    base.SamplesPerPixel, base.PhotometricInterpretation = 1, "MONOCHROME2"
    base.Rows, base.Columns = slices.shape[1:]
    base.BitsAllocated, base.BitsStored, base.HighBit, base.PixelRepresentation = 16, 12, 11, 0

    folder.mkdir()
    backwards = derive_seed("phantom_order", seed, patient_id) % 2 == 1  # instance numbers need not follow position
    for k, image in enumerate(slices):
        number = len(slices) - k if backwards else k + 1
        uid = f"2.25.{derive_seed('phantom_uid', seed, patient_id, 'image', k)}"
        base.file_meta.MediaStorageSOPInstanceUID = base.SOPInstanceUID = uid
        base.InstanceNumber = number
        base.ImagePositionPatient = [_ds(value) for value in _RAS_TO_LPS @ (origin + k * steps[:, slice_axis])]
        base.PixelData = image.tobytes()
        base.save_as(folder / f"IM{number:04d}.dcm", enforce_file_format=True)


def _ds(value: float) -> str:
    """Format a decimal string: DICOM allows 16 characters."""
    return f"{value + 0.0:.10f}"[:16]
