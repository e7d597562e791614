"""The cards of the test images against the images: counts by other means than the code that wrote them."""

from __future__ import annotations

import csv
import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medssl.archive.index import index
from medssl.cards.build import draft_card
from medssl.cards.check import check_card
from medssl.cards.schema import load_card

CARDS = sorted((Path(__file__).resolve().parents[2] / "data_cards" / "test_images").glob("*.yaml"))
Count = Callable[[Path], int]


def files(pattern: str, without: str = "\0") -> Count:
    return lambda folder: sum(without not in path.name for path in folder.glob(pattern))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as handle:
        return list(csv.DictReader(handle))


def column(name: str, key: str) -> Count:
    return lambda folder: len({row[key] for row in rows_of(folder / name)})


def lines(name: str) -> Count:
    return lambda folder: len(rows_of(folder / name))


def arrays(*names: str) -> Count:
    """Lengths from the headers inside the zip, without numpy's own reader of archives."""

    def count(folder: Path) -> int:
        total = 0
        for name in names:
            with zipfile.ZipFile(folder / f"{name}.npz") as archive:
                for split in ("train", "val", "test"):
                    with archive.open(f"{split}_images.npy") as handle:
                        version = np.lib.format.read_magic(handle)
                        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                        total += read(handle)[0][0]
        return total

    return count


COUNTED: dict[str, dict[str, Count]] = {
    "msd_hippocampus": {"volumes": files("images/*.nii.gz"), "label_maps": files("labels/*.nii.gz")},
    "medmnist": {
        "pneumoniamnist": arrays("pneumoniamnist"),
        "breastmnist": arrays("breastmnist"),
        "adrenalmnist3d": arrays("adrenalmnist3d_64"),
        "images": arrays("pneumoniamnist", "breastmnist", "adrenalmnist3d_64"),
    },
    "cxr_hannover": {"images": files("images/*.png"), "patients": column("metadata.csv", "patient_id")},
    "us_lung_video": {"clips": files("cc-by*/*"), "patients": column("metadata.csv", "patient")},
    "us_breast_busi": {"images": files("*/*.png", without="_mask"), "masks": files("*/*_mask*.png")},
    "cine_mr_sunnybrook": {"files_dicom": files("**/*.dcm"), "contours": files("**/*.txt")},
    "ct_ge_gantry_tilt": {"files_dicom": files("*.dcm")},
    "ct_covid_ct_md": {"files_dicom": files("P002/*.dcm")},
    "ct_mr_totalseg_examples": {"volumes": files("example_*_sm.nii.gz"), "label_maps": files("example_seg*.nii.gz")},
    "mr_dicom_nih": {"files_dicom": files("**/*.dcm")},
    "mr_dicom_t1_studyforrest": {"files_dicom": files("*.dcm")},
    "nifti_misc": {"files_nifti": files("*.nii.gz")},
    "nifti_orientations": {"volumes": files("*.nii.gz")},
    "nrrd_pyradiomics": {"volumes": files("*.nrrd", without="label"), "label_maps": files("*label.nrrd")},
    "wsi": {"slides": files("*.svs")},
    "wsi_multistain": {"images": files("*.jpg")},
    "histology_tiles_nct_crc": {"images": files("*.tif")},
    "fluorescence_ht29": {"images": files("*.tif")},
    "bccd": {"images": files("JPEGImages/*.jpg"), "boxes": lines("boxes.csv")},
    "dicom_multiframe": {"files_dicom": files("*.dcm")},
    "dicom_odd": {"files_dicom": files("**/*.dcm")},
}


@pytest.mark.data
def test_every_folder__has_a_card(shared_data: Path) -> None:
    folders = {path.name for path in shared_data.iterdir() if path.is_dir()}
    assert folders == {path.stem for path in CARDS} == set(COUNTED)


@pytest.mark.data
def test_draft_of_real_volumes__counted_again(shared_data: Path, tmp_path: Path) -> None:
    """A card drafted from an index of the hippocampus set, against the table of splits and nibabel's headers."""
    import nibabel

    folder = shared_data / "msd_hippocampus"
    index([folder / "images"], tmp_path / "index", splits=folder / "split.csv", modality="MR")
    counts = draft_card(tmp_path / "index", "drafted").counts
    assert counts is not None
    rows = rows_of(folder / "split.csv")
    assert counts.series_by["split"] == {name: sum(row["split"] == name for row in rows) for name in ("test", "train", "val")}
    assert (counts.patients, counts.files) == (len(rows), len(list((folder / "images").glob("*.nii.gz"))))
    shapes = np.array([nibabel.load(path).shape for path in (folder / "images").glob("*.nii.gz")])  # type: ignore[attr-defined]
    for axis in range(3):
        assert counts.quartiles["mri"][f"size_{axis + 1}"] == tuple(np.percentile(shapes[:, axis], (25, 50, 75)))


@pytest.mark.data
@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_card__equals_the_files(path: Path, shared_data: Path) -> None:
    card = load_card(path)
    found = check_card(card, files=shared_data / card.name)
    assert (found.differences, found.compared) == ([], ("files",))
    # The digest again, from the hashes that came with the images.
    listed = [row for row in rows_of(shared_data / "manifest.csv") if row["file"].split("/")[0] == card.name]
    assert card.files is not None
    assert (len(listed), sum(int(row["bytes"]) for row in listed)) == (card.files.count, card.files.bytes)
    digest = hashlib.sha256("".join(f"{row['sha256']}\n" for row in sorted(listed, key=lambda row: row["sha256"])).encode())
    assert digest.hexdigest() == card.hashes.files


@pytest.mark.data
@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_stated_numbers__counted_again(path: Path, shared_data: Path) -> None:
    card = load_card(path)
    counted = {name: number.value for name, number in card.stated.items() if (number.support or "").startswith("counted in")}
    assert counted == {name: count(shared_data / card.name) for name, count in COUNTED[card.name].items()}


@pytest.mark.data
def test_splits__counted_again(shared_data: Path) -> None:
    card = load_card(next(path for path in CARDS if path.stem == "msd_hippocampus"))
    rows = rows_of(shared_data / card.name / "split.csv")
    assert {name: said.text for name, said in card.splits.items()} == {
        name: f"{sum(row['split'] == name for row in rows)} volumes" for name in ("train", "val", "test")
    }
