"""Tiny image files for tests, all written from one array and one affine.

Every maker takes an array (X, Y, Z) and a 4x4 affine (voxel centre index to RAS+ mm), whatever the axis order of the
array: an array stored as LPS comes with an LPS-like affine. `oblique_volume` gives a pair whose three axes differ in
length, spacing and direction, so that a swapped or flipped axis cannot pass unnoticed.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = (20, 26, 14)
SPACING_MM = (0.8, 1.1, 2.5)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def rotation(angles_deg: Sequence[float]) -> np.ndarray:
    """Return the 3x3 rotation about X, then Y, then Z."""
    a, b, c = np.deg2rad(np.asarray(angles_deg, dtype=np.float64))
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    matrix: np.ndarray = rz @ ry @ rx
    return matrix


def oblique_affine(
    spacing_mm: Sequence[float] = SPACING_MM,
    angles_deg: Sequence[float] = (9.0, -7.0, 14.0),
    origin_mm: Sequence[float] = (-31.0, 17.0, 5.0),
) -> np.ndarray:
    """Return a RAS+ affine whose axes are rotated against the patient's."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles_deg) @ np.diag(np.asarray(spacing_mm, dtype=np.float64))
    affine[:3, 3] = origin_mm
    return affine


def plain_affine(spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """Return an axis-aligned RAS+ affine with its origin at zero."""
    return np.diag([*spacing_mm, 1.0])


def oblique_volume(shape: tuple[int, int, int] = SHAPE, *, seed: int = 0, dtype: Any = np.int16) -> tuple[np.ndarray, np.ndarray]:
    """Return an asymmetric volume and its oblique affine: a bright off-centre ellipsoid, shaded, in dark noise.

    The seed moves the ellipsoid a little, so that its outline (a label map) differs from case to case as well.
    """
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    body = ((grid[0] - 0.2 + 0.03 * (seed % 11)) / 0.7) ** 2 + (grid[1] / 0.8) ** 2 + ((grid[2] + 0.1) / 0.75) ** 2 < 1
    values = body * (300 + 90 * grid[0] + 50 * grid[1] + 25 * grid[2]) + rng.normal(0, 4, shape)
    return np.clip(np.rint(values), 0, None).astype(dtype), oblique_affine()


def reorient(array: np.ndarray, affine: np.ndarray, axes: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the same volume stored in another axis order, for instance `LPS` or `PIR`, with its affine."""
    import nibabel as nib

    now = nib.orientations.io_orientation(affine)
    want = nib.orientations.axcodes2ornt(tuple(axes))
    change = nib.orientations.ornt_transform(now, want)
    stored = nib.orientations.apply_orientation(array, change)
    return np.ascontiguousarray(stored), affine @ nib.orientations.inv_ornt_aff(change, array.shape)


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray, *, slope: float | None = None, intercept: float = 0.0) -> Path:
    """Write NIfTI-1 (`.nii` or `.nii.gz`); `slope` and `intercept` go into the header, the array is stored as it is."""
    import nibabel as nib

    header = nib.Nifti1Header()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_xyzt_units("mm", "sec")
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1, strip_shears=True)
    header["magic"], header["vox_offset"] = b"n+1", 352
    if slope is not None:
        header["scl_slope"], header["scl_inter"] = slope, intercept
    data = header.binaryblock + b"\0" * 4 + array.tobytes(order="F")
    path.write_bytes(gzip.compress(data, 1, mtime=0) if path.name.endswith(".gz") else data)
    return path


def write_itk(path: Path, array: np.ndarray, affine: np.ndarray, *, compress: bool = False) -> Path:
    """Write NRRD, NHDR, MHA or MHD (the suffix decides) through SimpleITK."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing([float(value) for value in spacing])
    image.SetOrigin([float(value) for value in lps[:3, 3]])
    image.SetDirection([float(value) for value in (lps[:3, :3] / spacing).ravel()])
    sitk.WriteImage(image, str(path), compress)
    return path


def _decimal(value: float) -> str:
    """Return a DICOM decimal string: at most 16 characters."""
    for digits in range(14, 4, -1):
        text = f"{float(value):.{digits}g}"
        if len(text) <= 16:
            return text
    raise ValueError(value)


SOP_CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
    "MG": "1.2.840.10008.5.1.4.1.1.1.2",
}
SYNTAXES = {
    "implicit": "1.2.840.10008.1.2",
    "explicit": "1.2.840.10008.1.2.1",
    "big": "1.2.840.10008.1.2.2",
    "deflated": "1.2.840.10008.1.2.1.99",
    "rle": "1.2.840.10008.1.2.5",
    "jpegls": "1.2.840.10008.1.2.4.80",
}


def write_dicom_series(
    folder: Path,
    array: np.ndarray,
    affine: np.ndarray,
    *,
    modality: str = "MR",
    slope: float | Sequence[float] = 1.0,
    intercept: float | Sequence[float] = 0.0,
    patient_id: str = "P0001",
    patient_name: str = "Phantom^One",
    uid_seed: str = "medssl",
    syntax: str = "explicit",
    bits_stored: int | None = None,
    shuffle: bool = True,
    suffix: str = ".dcm",
    extra: dict[str, Any] | None = None,
) -> list[Path]:
    """Write one single-slice DICOM file per index of the array's last axis.

    Args:
        folder: Created when absent.
        array: (X, Y, Z) stored values, int16, uint16 or uint8: X runs along a row, Y down the column, Z over slices.
        affine: Voxel index to RAS+ mm; a sheared one gives a tilted gantry.
        modality: `CT` or `MR`.
        slope: Rescale slope, one or one per slice.
        intercept: Rescale intercept, one or one per slice.
        patient_id: PatientID.
        patient_name: PatientName.
        uid_seed: Study, series and instance UIDs derive from it.
        syntax: A key of `SYNTAXES`.
        bits_stored: BitsStored; all bits by default.
        shuffle: Name the files in an order that is not the slice order.
        suffix: End of the file names; may be empty.
        extra: Keyword -> value set on every slice; a list with one entry per slice sets one each.

    Returns:
        The paths in slice order.
    """
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    n = array.shape[2]
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    cosines = np.concatenate([lps[:3, 0] / spacing[0], lps[:3, 1] / spacing[1]])
    slopes = np.broadcast_to(np.asarray(slope, dtype=np.float64), n)
    intercepts = np.broadcast_to(np.asarray(intercept, dtype=np.float64), n)
    names = np.random.default_rng(3).permutation(n) if shuffle else np.arange(n)
    bits = array.dtype.itemsize * 8
    paths = []
    for k in range(n):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = UID(SOP_CLASSES[modality])
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[uid_seed, "instance", str(k)])
        meta.TransferSyntaxUID = UID(SYNTAXES["explicit" if syntax in ("rle", "jpegls") else syntax])
        path = folder / f"{names[k]:04d}{suffix}"
        ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID = meta.MediaStorageSOPClassUID
        ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID = generate_uid(entropy_srcs=[uid_seed, "study"])
        ds.SeriesInstanceUID = generate_uid(entropy_srcs=[uid_seed, "series"])
        ds.FrameOfReferenceUID = generate_uid(entropy_srcs=[uid_seed, "frame"])
        ds.PatientID, ds.PatientName, ds.PatientSex = patient_id, patient_name, "O"
        ds.Modality, ds.Manufacturer, ds.SeriesNumber, ds.InstanceNumber = modality, "medssl tests", 1, k + 1
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.SliceThickness = _decimal(spacing[2])
        ds.ImageOrientationPatient = [_decimal(value) for value in cosines]
        ds.ImagePositionPatient = [_decimal(value) for value in (lps @ [0.0, 0.0, k, 1.0])[:3]]
        ds.PixelSpacing = [_decimal(spacing[1]), _decimal(spacing[0])]
        ds.Rows, ds.Columns = int(array.shape[1]), int(array.shape[0])
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored = bits, bits_stored or bits
        ds.HighBit = ds.BitsStored - 1
        ds.PixelRepresentation = int(array.dtype.kind == "i")
        ds.RescaleSlope, ds.RescaleIntercept = _decimal(slopes[k]), _decimal(intercepts[k])
        if modality == "CT":
            ds.RescaleType = "HU"
        for keyword, value in (extra or {}).items():
            setattr(ds, keyword, value[k] if isinstance(value, list) and len(value) == n else value)
        pixels = np.ascontiguousarray(array[:, :, k].T)
        data = pixels.astype(pixels.dtype.newbyteorder(">")) if syntax == "big" else pixels
        ds.PixelData = data.tobytes()
        ds["PixelData"].VR = "OB" if bits == 8 else "OW"
        if syntax in ("rle", "jpegls"):
            ds.compress(UID(SYNTAXES[syntax]), pixels, encoding_plugin="pydicom" if syntax == "rle" else "")
        pydicom.dcmwrite(path, ds, enforce_file_format=True)
        paths.append(path)
    return paths


def write_cohort(
    folder: Path, n: int = 6, *, shape: tuple[int, int, int] = SHAPE, label: bool = False, splits: bool = True
) -> Path:
    """Write `images/case_00.nii.gz` and so on, optionally `labels/` on the same grids, and `split.csv`.

    The labels are 0 outside and 1 inside the ellipsoid. Of six cases four are train, one val and one test.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = ["file,split,few_label_rank"]
    for i in range(n):
        array, affine = oblique_volume(shape, seed=i)
        name = f"case_{i:02d}.nii.gz"
        write_nifti(folder / "images" / name, array, affine)
        if label:
            (folder / "labels").mkdir(exist_ok=True)
            write_nifti(folder / "labels" / name, (array > 120).astype(np.uint8), affine)
        split = ("train", "train", "train", "train", "val", "test")[i % 6]
        rows.append(f"{name},{split},{i + 1 if split == 'train' else ''}")
    if splits:
        (folder / "split.csv").write_text("\n".join(rows) + "\n")
    return folder
