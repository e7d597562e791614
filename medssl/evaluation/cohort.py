"""A labelled cohort: which image has which label map, which patient it is of, and on which side of the split it stands.

Four forms are read:

    folder    images/, labels/, split.csv (columns file, split; optional label, few_label_rank, patient); a dataset.json
              beside them may name the structures
    JSON      a Decathlon data list: training, optional validation and test, each {image, label}
    nnU-Net   a raw folder with dataset.json, imagesTr, labelsTr, optional imagesTs and labelsTs
    CSV       columns image, label, split; optional patient, few_label_rank

An image is a file, or a folder that holds the slices of one DICOM series.

File names can hold a patient's name, and whoever can guess a name can check it against a digest. So cases and patients are called
by their place in the table; `private/cases.csv` beside the results says which they are, and messages give the line of the table.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medssl.errors import RequestError, header_words, near

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
IMAGE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
FORMS = (
    "accepted: a folder with images/, labels/ and split.csv; a Decathlon JSON; an nnU-Net raw folder with "
    "dataset.json, imagesTr and labelsTr; a CSV with columns image, label, split"
)


@dataclass(frozen=True)
class Case:
    """One volume of a cohort.

    Args:
        id: `case0001` for the first of the table.
        image: Image file, or the folder of a DICOM series.
        label: Label map; None where there is none, which only unscored test cases may have.
        patient: Patient key as the table gives it, or the file name without suffix: one patient per file. It stays inside.
        split: `train`, `val` or `test`.
        rank: Place in the few-label order, from 1; None when the table gives no order.
        patient_id: `patient0001` for the first patient of the table.
    """

    id: str
    image: Path
    label: Path | None
    patient: str
    split: str
    rank: int | None = None
    patient_id: str = ""


@dataclass(frozen=True)
class Cohort:
    """All cases of a labelled set.

    Args:
        name: Name of its folder or file.
        cases: In the order of the table.
        structures: Label value to name, without background; empty when the set names none.
        card: Name, version, licence and hash of its data card; None when it has none.
    """

    name: str
    cases: tuple[Case, ...]
    structures: Mapping[int, str] = field(default_factory=dict)
    card: Mapping[str, str] | None = None

    @classmethod
    def load(cls, path: Path | str) -> Cohort:
        """Read a cohort in one of the forms above and check it.

        Raises:
            RequestError: No such form, a missing file or column, an unknown split, or a patient on two sides.
        """
        path = Path(path)
        if not path.exists():
            raise RequestError(f"cohort {path}: nothing there; {FORMS}")
        reader = _reader(path)
        cases, structures = reader(path)
        if not cases:
            raise RequestError(f"cohort {path}: no cases in it; {FORMS}")
        _check_unique(cases, path)
        _check_patients(cases, path)
        name = path.stem if path.is_file() else path.name
        return cls(name=name, cases=tuple(_numbered(cases)), structures=structures)

    def split(self, name: str) -> list[Case]:
        """Return the labelled cases of one side of the split; training cases in few-label order."""
        cases = [case for case in self.cases if case.split == name and case.label is not None]
        if name == "train":
            cases.sort(key=lambda case: (case.rank is None, case.rank or 0))  # stable: the rest keeps its order
        return cases

    def first(self, count: int | None) -> list[Case]:
        """Return the first `count` training cases in few-label order; None returns all.

        Raises:
            RequestError: There are fewer, or none.
        """
        cases = self.split("train")
        if not cases or (count is not None and not 1 <= count <= len(cases)):
            raise RequestError(
                f"cohort {self.name}: {count} labelled training cases asked for, it has {len(cases)}; choose 1 to {len(cases)}"
                if cases
                else f"cohort {self.name}: no labelled training cases; mark some as train in its table"
            )
        return cases if count is None else cases[:count]

    def digest(self, key: bytes) -> str:
        """Return a keyed hex digest of images, splits, patients and ranks: cohorts that differ share no table.

        Args:
            key: Secret of whoever holds the results: names could be guessed from a digest without one.
        """
        rows = [
            f"{'/'.join(case.image.parts[-2:])}|{case.split}|{case.patient}|{case.rank}|{case.label is not None}"
            for case in self.cases
        ]
        return hashlib.blake2b("\n".join(rows).encode("utf-8", "surrogateescape"), digest_size=16, key=key).hexdigest()


def stem(file_name: str) -> str:
    """Return a file name without its image suffix (`.nii.gz` is one suffix)."""
    name = Path(file_name).name
    for suffix in IMAGE_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return Path(name).stem


def _reader(path: Path) -> Callable[[Path], tuple[list[Case], dict[int, str]]]:
    if path.is_file():
        readers = {".json": _read_decathlon, ".csv": _read_csv}
        if path.suffix.lower() not in readers:
            raise RequestError(f"cohort {path}: a file with suffix {path.suffix or '(none)'}; {FORMS}")
        return readers[path.suffix.lower()]
    if (path / "split.csv").is_file() and (path / "images").is_dir():
        return _read_folder
    if (path / "dataset.json").is_file() and (path / "imagesTr").is_dir():
        return _read_nnunet
    if (path / "dataset.json").is_file():
        return lambda folder: _read_decathlon(folder / "dataset.json")
    have = f"{n} other files and folders" if (n := sum(1 for _ in path.iterdir())) else "nothing"
    raise RequestError(f"cohort {path}: the folder holds {have}; {FORMS}")


def _read_folder(path: Path) -> tuple[list[Case], dict[int, str]]:
    table = path / "split.csv"
    cases = []
    for line, row in _rows(table, required=("file", "split"), optional=("label", "few_label_rank", "patient")):
        image = path / "images" / row["file"]
        name = row.get("label") or (f"{row['file']}.nii.gz" if image.is_dir() else row["file"])
        label: Path | None = path / "labels" / name
        split = _split(row["split"], table, line)
        if split == "test" and not row.get("label") and label is not None and not label.is_file():
            label = None
        cases.append(_case(table, line, image, label, split, row.get("patient"), row.get("few_label_rank")))
    named = path / "dataset.json"
    return cases, _structures(_json(named).get("labels", {})) if named.is_file() else {}


def _read_csv(path: Path) -> tuple[list[Case], dict[int, str]]:
    cases = []
    for line, row in _rows(path, required=("image", "label", "split"), optional=("few_label_rank", "patient")):
        split = _split(row["split"], path, line)
        label = path.parent / row["label"] if row["label"] else None
        cases.append(_case(path, line, path.parent / row["image"], label, split, row.get("patient"), row.get("few_label_rank")))
    return cases, {}


def _read_decathlon(path: Path) -> tuple[list[Case], dict[int, str]]:
    content = _json(path)
    if "training" not in content:
        raise RequestError(f"cohort {path}: no key training among its {len(content)}; {FORMS}")
    cases = []
    for key, split in (("training", "train"), ("validation", "val"), ("test", "test")):
        for number, item in enumerate(content.get(key, []), start=1):
            entry = {"image": item} if isinstance(item, str) else dict(item)
            if "image" not in entry:
                raise RequestError(f"cohort {path}: {key} entry {number} has no image; give {{image, label}} for each")
            label = path.parent / entry["label"] if entry.get("label") else None
            patient = str(entry["patient"]) if "patient" in entry else None
            cases.append(_case(path, number, path.parent / entry["image"], label, split, patient, None, where=key))
    return cases, _structures(content.get("labels", {}))


def _read_nnunet(path: Path) -> tuple[list[Case], dict[int, str]]:
    """Read a raw folder: `<case>_0000<ending>` in imagesTr and imagesTs, `<case><ending>` in labelsTr and labelsTs.

    A `split.csv` (columns file, split; file = case name, with or without ending) overrides the sides, which nnU-Net
    itself keeps elsewhere.
    """
    content = _json(path / "dataset.json")
    channels = content.get("channel_names", content.get("modality", {"0": "image"}))
    if len(channels) != 1:
        raise RequestError(
            f"cohort {path}: {len(channels)} channels; one channel is read so far; make a set of one of the channels"
        )
    ending = str(content.get("file_ending", ".nii.gz"))
    sides: dict[str, dict[str, str]] = {}
    if (path / "split.csv").is_file():
        for _, row in _rows(path / "split.csv", required=("file", "split"), optional=("few_label_rank", "patient")):
            sides[stem(row["file"])] = row
    cases = []
    for suffix, side in (("Tr", "train"), ("Ts", "test")):
        for number, image in enumerate(sorted((path / f"images{suffix}").glob(f"*_0000{ending}")), start=1):
            name = image.name[: -len(f"_0000{ending}")]
            row = sides.get(name, {})
            split = _split(row["split"], path / "split.csv", number) if "split" in row else side
            label: Path | None = path / f"labels{suffix}" / f"{name}{ending}"
            if suffix == "Ts" and label is not None and not label.is_file():
                label = None
            patient = row.get("patient") or name
            cases.append(_case(path, number, image, label, split, patient, row.get("few_label_rank"), where=f"images{suffix}"))
    labels = content.get("labels", {})
    flat = {name: value for name, value in labels.items() if isinstance(value, int) or str(name).isdigit() or str(value).isdigit()}
    if len(flat) != len(labels):
        raise RequestError(
            f"cohort {path}: dataset.json has region labels (lists); plain label values are read; list each structure once"
        )
    return cases, _structures(flat)


def _case(
    table: Path,
    line: int,
    image: Path,
    label: Path | None,
    split: str,
    patient: str | None,
    rank: str | None,
    *,
    where: str = "line",
) -> Case:
    """Check one entry; messages name the table and the line, never the file, whose name may be a patient's."""
    at = f"cohort {table}: {where} {line}"
    for kind, file in (("image", image), ("label", label)):
        if file is not None and not (file.is_file() or (kind == "image" and file.is_dir())):
            raise RequestError(f"{at}: its {kind} file does not exist; correct the name or remove the entry")
    if label is None and split != "test":
        raise RequestError(f"{at}: a {split} case without a label map; give one, or remove the entry")
    if rank and not rank.strip().isdigit():
        raise RequestError(f"{at}: few_label_rank is not a whole number; use 1, 2, 3 ... or leave it empty")
    return Case(
        id="",
        image=image,
        label=label,
        patient=patient or stem(image.name),
        split=split,
        rank=int(rank) if rank and rank.strip() else None,
    )


def _rows(table: Path, *, required: Iterable[str], optional: Iterable[str]) -> list[tuple[int, dict[str, str]]]:
    """Read a CSV with a header; return (line number, row) pairs, columns trimmed."""
    with open(table, newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        columns = [name.strip() for name in reader.fieldnames or []]
        for name in required:
            if name not in columns:
                known = {*required, *optional}
                raise RequestError(
                    f"cohort {table}: no column {name}{near(name, columns) if known & set(columns) else ''} "
                    f"(it has {header_words(columns, known)}); needed: {', '.join(required)}; "
                    f"optional: {', '.join(optional)}"
                )
        rows = []
        for line, row in enumerate(reader, start=2):
            rows.append((line, {key.strip(): (value or "").strip() for key, value in row.items() if key is not None}))
        return rows


def _split(word: str, table: Path, line: int) -> str:
    split = SPLIT_WORDS.get(word.strip().lower())
    if split is None:
        raise RequestError(f"cohort {table}: line {line}: another split than {', '.join(SPLITS)}; correct the table")
    return split


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise RequestError(f"cohort {path}: not readable as JSON ({err}); write a Decathlon or nnU-Net data list") from err
    if not isinstance(content, dict):
        raise RequestError(f"cohort {path}: the JSON holds a {type(content).__name__}, not an object; {FORMS}")
    return content


def _structures(labels: Mapping[str, Any]) -> dict[int, str]:
    """Return label value to name without background, from {"1": "liver"} (Decathlon) or {"liver": 1} (nnU-Net)."""
    pairs = [(int(k), str(v)) if str(k).isdigit() else (int(v), str(k)) for k, v in labels.items()]
    return {value: name for value, name in sorted(pairs) if value != 0}


def _numbered(cases: list[Case]) -> list[Case]:
    patients: dict[str, str] = {}
    for case in cases:
        patients.setdefault(case.patient, f"patient{len(patients) + 1:04d}")
    return [replace(case, id=f"case{k:04d}", patient_id=patients[case.patient]) for k, case in enumerate(cases, start=1)]


def _check_unique(cases: list[Case], path: Path) -> None:
    seen: dict[Path, int] = {}
    for number, case in enumerate(cases, start=1):
        image = Path(os.path.normpath(case.image))
        if image in seen:
            raise RequestError(f"cohort {path}: entries {seen[image]} and {number} are the same image file; list each image once")
        seen[image] = number


def _check_patients(cases: list[Case], path: Path) -> None:
    sides: dict[str, set[str]] = {}
    for case in cases:
        sides.setdefault(case.patient, set()).add(case.split)
    mixed = [found for found in sides.values() if len(found) > 1]
    if mixed:
        where = " and ".join(split for split in SPLITS if split in mixed[0])
        raise RequestError(
            f"cohort {path}: {len(mixed)} patient(s) on two sides of the split (the first in {where}); all images of a "
            "patient belong on one side; move them in the table"
        )
