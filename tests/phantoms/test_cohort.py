from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest

from medssl.domains.volume_files import read_label, read_volume
from medssl.errors import RequestError, StoreError
from medssl.evaluation.cohort import Cohort
from medssl.phantoms import ORGAN_NAMES, make_cohort
from medssl.phantoms import cohort as cohort_module
from medssl.phantoms.cohort import write_dicom_series

SIZE = (28, 24, 20)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "cohort"
    return make_cohort(out, patients=12, seed=5, size=SIZE, dicom_fraction=0.5)


def rows_of(cohort: Path) -> list[dict[str, str]]:
    with (cohort / "split.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def nifti_ras(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import nibabel

    image = nibabel.as_closest_canonical(nibabel.load(path))
    return np.asarray(image.dataobj), image.affine


def dicom_ras(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a series with SimpleITK and turn it into RAS."""
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = sitk.DICOMOrient(reader.Execute(), "RAS")  # SimpleITK names directions by where the axis points to
    to_ras = np.diag([-1.0, -1.0, 1.0])
    affine = np.eye(4)
    affine[:3, :3] = to_ras @ np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    affine[:3, 3] = to_ras @ np.array(image.GetOrigin())
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), affine


def test_make_cohort__same_seed_same_bytes(tmp_path: Path) -> None:
    arguments = {"patients": 4, "size": (20, 20, 16), "dicom_fraction": 0.5}
    first = digests(make_cohort(tmp_path / "a", seed=1, **arguments))
    assert first == digests(make_cohort(tmp_path / "b", seed=1, **arguments))
    other = digests(make_cohort(tmp_path / "c", seed=2, **arguments))
    assert first["split.csv"] != other["split.csv"]
    assert not {d for name, d in first.items() if "images" in name} & set(other.values())


def test_make_cohort__image_and_label_share_a_grid_in_both_formats(cohort: Path) -> None:
    kinds = set()
    for row in rows_of(cohort):
        source = cohort / "images" / row["file"]
        kinds.add(source.is_dir())
        image, affine = dicom_ras(source) if source.is_dir() else nifti_ras(source)
        labels, label_affine = nifti_ras(cohort / "labels" / row["label"])
        assert image.shape == labels.shape == SIZE
        assert affine == pytest.approx(label_affine, abs=1e-4)
        assert np.issubdtype(image.dtype, np.integer) and labels.dtype == np.uint8
        # Voxels, not only headers: tissue under the labels, air where the grid begins.
        assert image[labels > 0].mean() > 3 * np.median(image[[0, -1]][:, [0, -1]])
    assert kinds == {True, False}


def test_make_cohort__reader_of_the_package_agrees(cohort: Path) -> None:
    for row in rows_of(cohort):
        source = cohort / "images" / row["file"]
        files = sorted(source.iterdir()) if source.is_dir() else [source]
        raw = read_volume(files)
        expected, affine = dicom_ras(source) if source.is_dir() else nifti_ras(source)
        assert np.array_equal(raw.array, expected)
        assert raw.affine == pytest.approx(affine, abs=1e-4)
        labels = read_label(cohort / "labels" / row["label"], raw)
        assert np.array_equal(labels, nifti_ras(cohort / "labels" / row["label"])[0])


def test_make_cohort__is_a_cohort_to_fine_tune_on(cohort: Path) -> None:
    loaded = Cohort.load(cohort)
    assert dict(loaded.structures) == dict(enumerate(ORGAN_NAMES, start=1))
    assert [len(loaded.split(name)) for name in ("train", "val", "test")] == [7, 2, 3]
    assert [case.rank for case in loaded.first(3)] == [1, 2, 3]
    assert {case.image.is_dir() for case in loaded.cases} == {True, False}
    assert all(case.label is not None and case.label.is_file() for case in loaded.cases)


def test_make_cohort__geometry_varies_between_patients(cohort: Path) -> None:
    import nibabel

    affines, codes = [], set()
    for row in rows_of(cohort):
        image = nibabel.load(cohort / "labels" / row["label"])
        affines.append(image.affine)
        codes.add("".join(nibabel.aff2axcodes(image.affine)))
    spacings = np.array([np.linalg.norm(a[:3, :3], axis=0) for a in affines])
    oblique = [np.abs(a[:3, :3]).max(axis=0) < np.linalg.norm(a[:3, :3], axis=0) - 1e-3 for a in affines]
    assert 0 < sum(map(np.any, oblique)) < len(affines)
    assert codes == {"RAS", "LAS"}
    assert len(np.unique(spacings.round(3), axis=0)) == len(affines)


def test_make_cohort__splits_are_by_patient_and_ranks_cover_train(cohort: Path) -> None:
    rows = rows_of(cohort)
    by_split = {name: {row["patient"] for row in rows if row["split"] == name} for name in ("train", "val", "test")}
    assert [len(by_split[name]) for name in ("train", "val", "test")] == [7, 2, 3]
    assert sum(map(len, by_split.values())) == len(rows) == 12
    ranks = sorted(int(row["few_label_rank"]) for row in rows if row["split"] == "train")
    assert ranks == list(range(1, 8))
    assert all(row["few_label_rank"] == "" for row in rows if row["split"] != "train")


def test_make_cohort__table_holds_the_truth_of_the_labels(cohort: Path) -> None:
    for row in rows_of(cohort):
        labels, affine = nifti_ras(cohort / "labels" / row["label"])
        ml = abs(np.linalg.det(affine[:3, :3])) / 1000
        for k, name in enumerate(ORGAN_NAMES, start=1):
            assert float(row[f"{name}_ml"]) == pytest.approx((labels == k).sum() * ml, rel=1e-3, abs=0.006)
        assert row["small_kidney"] in "01" and row["fatty"] in "01"


def test_make_cohort__dicom_files_say_what_they_are(cohort: Path) -> None:
    import pydicom

    row = next(row for row in rows_of(cohort) if (cohort / "images" / row["file"]).is_dir())
    sets = [pydicom.dcmread(path) for path in sorted((cohort / "images" / row["file"]).iterdir())]
    assert {ds.PatientID for ds in sets} == {row["patient"]}
    assert {ds.SOPClassUID.name for ds in sets} == {"MR Image Storage"}
    assert len({ds.SeriesInstanceUID for ds in sets}) == 1
    assert len({ds.SOPInstanceUID for ds in sets}) == len(sets)
    assert all(len(str(value)) <= 16 for ds in sets for value in ds.ImagePositionPatient)


@pytest.mark.parametrize("plane", ["axial", "coronal"])
def test_write_dicom_series__voxel_stays_at_its_place_in_the_patient(tmp_path: Path, plane: str) -> None:
    import SimpleITK as sitk

    array = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)
    affine = np.eye(4)
    affine[:3, :3] = cohort_module.rotation(np.array([4.0, -7.0, 9.0])) @ np.diag([2.0, 2.5, 3.0])
    affine[:3, 3] = [-10, 20, 30]
    write_dicom_series(tmp_path / "series", array, affine, patient_id="phantom", plane=plane)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "series")))
    image = reader.Execute()
    for index in [(0, 0, 0), (4, 0, 0), (0, 5, 0), (0, 0, 6), (3, 2, 5)]:
        lps = np.diag([-1.0, -1.0, 1.0]) @ (affine @ [*index, 1])[:3]
        found = image.TransformPhysicalPointToIndex(lps.tolist())
        assert image[found] == array[index]
        assert image.TransformIndexToPhysicalPoint(found) == pytest.approx(lps.tolist(), abs=1e-4)


def test_make_cohort__finished_folder_is_kept_and_a_foreign_one_refused(cohort: Path, tmp_path: Path) -> None:
    before = digests(cohort)
    assert make_cohort(cohort, patients=12, seed=5, size=SIZE, dicom_fraction=0.5) == cohort
    assert digests(cohort) == before
    with pytest.raises(RequestError, match="holds something else"):
        make_cohort(cohort, patients=12, seed=6, size=SIZE, dicom_fraction=0.5)
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(RequestError, match="choose a new folder"):
        make_cohort(tmp_path, patients=3, size=SIZE)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_make_cohort__failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cohort_module, "write_nifti", full)
    with pytest.raises(StoreError, match="the disk is full while writing cohort"):
        make_cohort(tmp_path / "cohort", patients=3, size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_make_cohort__progress_and_bad_arguments(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    make_cohort(tmp_path / "c", patients=3, size=(16, 16, 16), on_progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(RequestError, match="3 or more"):
        make_cohort(tmp_path / "d", patients=2)
    with pytest.raises(RequestError, match="share from 0 to 1"):
        make_cohort(tmp_path / "d", dicom_fraction=30)
