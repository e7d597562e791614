"""Make from the shared test data a tree that a user could have, and index it for the joint pretraining.

    python -m benchmarks.joint_data ../shared/data --out runs/joint/data

MedMNIST becomes PNG files (28 x 28) and NIfTI volumes with `labels.csv` (file, label, split) beside them; everything else is indexed
where it lies. Splits are those of the sets (patients of the lung ultrasound are dealt here). A training image whose pixels equal those of a
validation or test image is taken out: some MedMNIST images are in two splits. What the adrenal shapes are made of is a mask, not
Hounsfield units, so they are indexed as MR, whose values have no unit; their voxel size is unknown and written as 1.

The BUSI images are indexed apart, with pixel hashes, and `leakage.json` says what `medssl archive leakage` finds between them and the
training images of MedMNIST breast, which comes from the same source.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.index import IndexSummary, index
from medssl.archive.operations.labels import attach
from medssl.archive.operations.leakage import find_leakage
from medssl.archive.pixels.checks import content_hash
from medssl.archive.table import Archive
from medssl.weights import write_atomic

SPLITS = ("train", "val", "test")
MEDMNIST = {"pneumoniamnist": "CR", "breastmnist": "US", "adrenalmnist3d_64": "MR"}
"""Set -> modality under which it is indexed."""
VAL_EVERY = 5
"""Every fifth patient of the lung ultrasound is held out."""


def overlap(images: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return which training images have the pixels of a validation or test image, (N,) bool.

    Args:
        images: Split -> images.
    """
    held = {content_hash(image) for name in ("val", "test") for image in images[name]}
    return np.array([content_hash(image) in held for image in images["train"]], dtype=bool)


def write_medmnist(npz: Path, out: Path) -> dict[str, Any]:
    """Write one MedMNIST set as PNG or NIfTI files with `labels.csv`.

    Returns:
        Files per split, and how many training images were left out because they equal a held-out one.
    """
    with np.load(npz) as data:
        images = {name: data[f"{name}_images"] for name in SPLITS}
        labels = {name: data[f"{name}_labels"].reshape(-1) for name in SPLITS}
    out.mkdir(parents=True, exist_ok=True)
    twice = overlap(images)
    rows, counts = [], dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        for number, (image, label) in enumerate(zip(images[split], labels[split])):
            if split == "train" and twice[number]:
                continue
            name = f"{npz.stem}_{split}_{number:05d}" + (".png" if image.ndim == 2 else ".nii.gz")
            if not (out / name).exists():
                _write_image(out / name, image)
            rows.append({"file": name, "label": int(label), "split": split})
            counts[split] += 1
    write_table(out / "labels.csv", rows)
    return {**counts, "left_out_equal_to_held_out": int(twice.sum())}


def _write_image(path: Path, image: np.ndarray) -> None:
    if image.ndim == 2:
        from PIL import Image

        Image.fromarray(image).save(path)
        return
    import nibabel

    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), path)  # type: ignore[attr-defined, no-untyped-call]


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV."""
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path) -> list[dict[str, str]]:
    """Read a CSV with a header."""
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def deal(patients: Iterable[str], every: int = VAL_EVERY) -> dict[str, str]:
    """Return patient -> split: every fifth of the sorted patients is `val`."""
    return {name: "val" if number % every == every - 1 else "train" for number, name in enumerate(sorted(set(patients)))}


def write_splits(shared: Path, out: Path) -> dict[str, Path]:
    """Write the splits tables of the sets that need another form than their own."""
    out.mkdir(parents=True, exist_ok=True)
    chest = read_table(shared / "cxr_hannover" / "metadata.csv")
    lung = [row for row in read_table(shared / "us_lung_video" / "metadata.csv") if row["file"].startswith("cc-by/")]
    dealt = deal(row["patient"] for row in lung)
    tables = {
        "cxr_hannover": [{"file": row["file"], "split": row["split"], "patient": f"cxr {row['patient_id']}"} for row in chest],
        "us_lung": [
            {"file": Path(row["file"]).name, "split": dealt[row["patient"]], "patient": f"lung {row['patient']}"} for row in lung
        ],
    }
    for name, rows in tables.items():
        write_table(out / f"{name}.csv", rows)
    return {name: out / f"{name}.csv" for name in tables}


def write_tree(shared: Path, out: Path) -> dict[str, Any]:
    """Write the MedMNIST sets below `out`, one folder each."""
    return {name: write_medmnist(shared / "medmnist" / f"{name}.npz", out / name) for name in MEDMNIST}


def build_index(shared: Path, tree: Path, out: Path, workers: int = 1) -> IndexSummary:
    """Index everything into one archive: MedMNIST from the tree, the others in place.

    Args:
        shared: The shared test data.
        tree: Of `write_tree`.
        out: Archive folder.
        workers: Processes.
    """
    splits = write_splits(shared, tree / "splits")
    jobs: list[dict[str, Any]] = [
        {"sources": [tree / name], "modality": modality, "splits": tree / name / "labels.csv", "site": name}
        for name, modality in MEDMNIST.items()
    ]
    hippocampus = shared / "msd_hippocampus"
    examples = shared / "ct_mr_totalseg_examples"
    series = ("ct_covid_ct_md", "ct_ge_gantry_tilt", "mr_dicom_nih", "mr_dicom_t1_studyforrest", "cine_mr_sunnybrook")
    jobs += [
        {"sources": [hippocampus / "images"], "modality": "MR", "splits": hippocampus / "split.csv", "site": "hippocampus"},
        {"sources": [examples / "example_ct_sm.nii.gz"], "modality": "CT", "site": "series"},
        {"sources": [examples / "example_mr_sm.nii.gz"], "modality": "MR", "site": "series"},
        {"sources": [shared / name for name in series], "site": "series"},
        {
            "sources": [shared / "cxr_hannover" / "images"],
            "modality": "CR",
            "splits": splits["cxr_hannover"],
            "site": "cxr_hannover",
        },
        {"sources": [shared / "us_lung_video" / "cc-by"], "modality": "US", "splits": splits["us_lung"], "site": "us_lung"},
        {"sources": [shared / "histology_tiles_nct_crc"], "modality": "GM", "site": "histology"},
    ]
    for job in jobs:
        summary = index(**job, out=out, workers=workers)
    return summary


def attach_labels(archive: Archive, tree: Path) -> dict[str, Any]:
    """Write `labels/<set>.csv` with series ids, joined by path as `medssl labels attach` does."""
    (tree / "attached").mkdir(exist_ok=True)
    done = {}
    for name in MEDMNIST:
        table, target = tree / name / "labels.csv", tree / "attached" / f"{name}.csv"
        found = attach(archive, table, target, by="path", columns=["label"], where=f"site = '{name}'")
        done[name] = {"lines": found.n_lines, "series": found.n_series, "outcome": found.lines}
    return done


def busi_leakage(shared: Path, tree: Path, out: Path, workers: int = 1, distance: int | None = None) -> dict[str, Any]:
    """Compare BUSI with the images of MedMNIST breast through two archives with pixel hashes.

    Returns:
        Images compared and the pairs that are suspected, with the bits that differ.
    """
    from medssl.domains.pixel_pass import look_at_pixels

    key = out / "breast" / "private" / "id.key"
    index([tree / "breastmnist"], out / "breast", modality="US", splits=tree / "breastmnist" / "labels.csv", workers=workers)
    pictures = [path for path in sorted((shared / "us_breast_busi").glob("*/*.png")) if "mask" not in path.stem]
    index(pictures, out / "busi", modality="US", key_file=key, workers=workers)
    for name in ("breast", "busi"):
        look_at_pixels(out / name, workers=workers)
    options = {} if distance is None else {"distance": distance}
    found = find_leakage(Archive.open(out / "busi"), Archive.open(out / "breast"), **options)
    return {
        "busi": found.n_series[0],
        "breastmnist": found.n_series[1],
        "found": found.found,
        "content": len(found.content),
        "perceptual": [{"bits": bits} for _, _, bits in found.perceptual],
        "busi_images_found": len({left for left, _, _ in found.perceptual} | {left for left, _ in found.content}),
        "notes": found.notes,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(argv)
    shared, out = options.shared.resolve(), options.out.resolve()
    facts: dict[str, Any] = {"medmnist": write_tree(shared, out / "tree")}
    summary = build_index(shared, out / "tree", out / "archive", options.workers)
    facts["index"] = {"series": summary.n_series, "usable": summary.n_series_usable, "reasons": summary.reasons}
    facts["labels"] = attach_labels(Archive.open(out / "archive"), out / "tree")
    facts["leakage"] = busi_leakage(shared, out / "tree", out, options.workers)
    write_atomic(out / "data.json", json.dumps(facts, indent=1).encode())
    print(json.dumps(facts, indent=1))
    return facts


if __name__ == "__main__":
    main()
