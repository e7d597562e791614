"""A labelled cohort: which image has which label map, which patient it is of, and on which side of the split it stands.

Five forms are read:

    folder    images/, labels/, split.csv (columns file, split; optional label, few_label_rank, patient); a dataset.json
              beside them may name the structures
    JSON      a Decathlon data list: training, optional validation and test, each {image, label}; or its folder, as Task04_Hippocampus
    nnU-Net   a raw folder with dataset.json, imagesTr, labelsTr, optional imagesTs and labelsTs
    CSV       columns image, label, split; optional patient, few_label_rank; a dataset.json beside it may name the structures
    query     a JSON {index, where, maps, attached, labels}: the series of an archive that a condition selects, `maps` a folder of
              label maps named by series id, `attached` what `medssl labels attach` wrote

An image is a file (a volume, or a picture), or a folder that holds the slices of one DICOM series. The label of a picture is PNG or TIFF of
values, or NIfTI of one slice (`domains.label_files.picture`). That of a volume is a file or folder of any form of
`domains.label_files`: a map of whole numbers, .seg.nrrd, DICOM-SEG, RTSTRUCT, or a folder of one mask per organ.

**Values.** 0 is background, -1 uncertain; a structure named `ignore` (nnU-Net), in the list or in a label file, is uncertain too. Where
structures are listed (`labels` of dataset.json), other values are refused. Forms that name their structures are matched to the list by
name; without a list the names of the training labels get 1, 2, 3 ... in their order, and are called structure_1 ...: what somebody typed
into a file stays inside.

**Unlabelled is not empty.** A form with names labels the structures that it names. A plain map labels all structures of the list,
unless the table says otherwise: a column `labelled` (names or values, separated by `;`), in a Decathlon JSON a list.

**Channels.** Volumes have several channels in two forms: in an nnU-Net raw folder whose `channel_names` (`modality` in its first version) are
several, each a file of its own (`<case>_0000`, `<case>_0001` ...), and in a Decathlon JSON whose `modality` are several, the volumes of one 4-D
file, or the files that a list `image` names. All cases of a cohort have the same channels. The other forms have one channel.

**Patients.** A column `patient` (in JSON a key of each entry) says which images are of one patient: they stay on one side, and intervals draw
them together. Without it each image stands for itself, and intervals are drawn by image.

**Several raters.** Further maps of a case stand in columns label_2, label_3 ...; in a Decathlon JSON `label` is a list.

File names can hold a patient's name, and whoever can guess a name can check it against a digest. So cases and patients are called
by their place in the table; `private/cases.csv` beside the results says which they are, and messages give the line of the table.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medssl.errors import ImageError, RequestError, header_words, near
from medssl.evaluation.scores import presence_folds
from medssl.seeding import counter_rng

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
    "dataset.json, imagesTr and labelsTr; a CSV with columns image, label, split; a JSON with index, where and maps"
)
LABEL_SUFFIXES = (".seg.nrrd", ".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".dcm", ".png", ".tif", ".tiff", "")
PLAIN_MAPS = (".nii", ".nii.gz", ".mha", ".mhd", ".png", ".tif", ".tiff")
PICTURE_ENDINGS = (".png", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class LabelRules:
    """What the values of a cohort's label maps mean; the same for all its cases.

    Args:
        names: Structure name to value, by which forms that name their structures are read.
        values: Values that stand for a structure; None where the cohort lists none and a map may hold any.
        ignore: A value that means uncertain, as -1 does; None for no other.
    """

    names: Mapping[str, int] = field(default_factory=dict)
    values: frozenset[int] | None = None
    ignore: int | None = None


@dataclass(frozen=True)
class Case:
    """One volume of a cohort.

    Args:
        id: `case0001` for the first of the table.
        image: Image file, or the folder of a DICOM series; of several channels the first, or the file of all.
        label: Label map; None where there is none, which only unscored test cases and cases with attached values may have.
        patient: Patient key as the table gives it; else a name of the image that no other case has. It stays inside.
        split: `train`, `val` or `test`.
        rank: Place in the few-label order, from 1; None when the table gives no order.
        patient_id: `patient0001` for the first patient of the table.
        raters: Label maps of further raters.
        labelled: Values of the structures that the table says the maps label; None leaves it to the maps.
        rules: What values mean.
        files: Files of the image where it is no file or folder of its own: a series of an index.
        part: What of these files the image is, as `Archive.part` gives it.
        series_id: Series of the index.
        values: What was attached to the series: column to value.
        facts: What the index says of person and scanner; empty where the case is of no index.
        patient_known: Whether the index, or the column `patient` of the table, says who the patient is.
        further: Image files, or folders, of the further channels where each has its own.
        volumes: Volumes of the one file of the image that are its channels; 1 where it is no such file.
    """

    id: str
    image: Path
    label: Path | None
    patient: str
    split: str
    rank: int | None = None
    patient_id: str = ""
    raters: tuple[Path, ...] = ()
    labelled: tuple[int, ...] | None = None
    rules: LabelRules = LabelRules()
    files: tuple[Path, ...] = ()
    part: Mapping[str, Any] | None = None
    series_id: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    patient_known: bool = True
    further: tuple[Path, ...] = ()
    volumes: int = 1

    @property
    def maps(self) -> tuple[Path, ...]:
        """Label maps of all raters."""
        return () if self.label is None else (self.label, *self.raters)

    @property
    def image_files(self) -> list[Path]:
        """Files of the image, of all its channels, DICOM slices in any order."""
        return [*self.first_files, *(file for image in self.further for file in _files_of(image))]

    @property
    def first_files(self) -> list[Path]:
        """Files that hold the first channel: the image is where these are."""
        return list(self.files) if self.files else _files_of(self.image)

    @property
    def channels(self) -> list[tuple[list[Path], Mapping[str, Any] | None]]:
        """Files of each channel of a volume, and what of them it is; a picture is one entry with all its colours."""
        if self.volumes > 1:
            return [(self.first_files, {"volume": k}) for k in range(self.volumes)]
        return [(self.first_files, self.part), *((_files_of(image), None) for image in self.further)]


def _files_of(image: Path) -> list[Path]:
    return sorted(p for p in image.rglob("*") if p.is_file()) if image.is_dir() else [image]


@dataclass(frozen=True)
class Cohort:
    """All cases of a labelled set.

    Args:
        name: Name of its folder or file.
        cases: In the order of the table.
        structures: Label value to name, without background; empty when the set names none.
        card: Name, version, licence and hash of its data card; None when it has none.
        ignore: Value of uncertain voxels besides -1; None for no other.
        file_names: Value to the name that label files have for a structure, where the cohort lists none; for `private/` only.
        left_out: Series of a query without a label.
        channel_names: Of the volumes, in their order, as the cohort's own list has them; empty where they have one channel, and for pictures.
    """

    name: str
    cases: tuple[Case, ...]
    structures: Mapping[int, str] = field(default_factory=dict)
    card: Mapping[str, str] | None = None
    ignore: int | None = None
    file_names: Mapping[int, str] = field(default_factory=dict)
    left_out: int = 0
    channel_names: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Channels of the volumes."""
        return max(1, len(self.channel_names))

    @classmethod
    def load(cls, path: Path | str, *, every: bool = False) -> Cohort:
        """Read a cohort in one of the forms above and check it.

        Args:
            path: Its folder or file.
            every: Take the names of structures from all label files instead of those for training, as where folds are dealt.

        Raises:
            RequestError: No such form, a missing file or column, an unknown split, or a patient on two sides.
        """
        path = Path(path)
        if not path.exists():
            raise RequestError(f"cohort {path}: nothing there; {FORMS}")
        table = _reader(path)(path)
        cases = table.cases
        if not cases:
            raise RequestError(f"cohort {path}: no cases in it; {FORMS}")
        _check_unique(cases, path)
        cases = _apart(cases, path if path.is_dir() else path.parent)
        _check_patients(cases, path)
        cases = _numbered(cases)
        structures, ignore = _structures(table.labels)
        names: Mapping[str, int] = {name: value for value, name in structures.items()}
        file_names: dict[int, str] = {}
        if not structures:
            names = _names_in_maps(cases if every else [case for case in cases if case.split == "train"], path)
            file_names = {value: name for name, value in names.items()}
            structures = {value: f"structure_{value}" for value in file_names}
        rules = LabelRules(names, frozenset(structures) if structures else None, ignore)
        labelled = [_values_of(names, structures, path) for names in table.labelled]
        cases = [replace(case, rules=rules, labelled=values) for case, values in zip(cases, labelled)]
        name = path.stem if path.is_file() else path.name
        return cls(
            name,
            tuple(cases),
            structures,
            ignore=ignore,
            file_names=file_names,
            left_out=table.left_out,
            channel_names=tuple(table.channel_names),
        )

    def labelled(self) -> list[Case]:
        """Return the labelled cases of all sides of the split."""
        return [case for case in self.cases if case.label is not None]

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

    def refuse_folds_of_some_unknown(self) -> None:
        """Refuse folds where some patients of the labelled cases are known and others not: dealt by case, these would be split.

        Raises:
            RequestError: It is so.
        """
        labelled = [case for case in self.cases if case.label is not None]
        unknown = sum(not case.patient_known for case in labelled)
        if 0 < unknown < len(labelled):
            remedy = (
                'leave them out, for instance with "where": "not list_contains(quality_flags, \'patient_unknown\')"'
                if any(case.series_id for case in labelled)
                else "fill in the column patient, or remove it where every image is of another patient"
            )
            raise RequestError(
                f"cohort {self.name}: folds: {unknown} of {len(labelled)} labelled series have no usable patient identity, so patients "
                f"cannot be kept together; {remedy}"
            )

    def dealt(self, folds: int, seed: int, fold: int, present: Mapping[str, Collection[int]] | None = None) -> Cohort:
        """Return the cohort with other splits: one fold of patients is tested, the next validates, the others train.

        The few-label order is drawn anew as well, patient by patient: with that of the table all folds would learn from the same few.

        Args:
            folds: Number of folds, 3 or more.
            seed: Another seed deals the patients anew.
            fold: The fold that is tested.
            present: Case id -> structures that its label map has: those that some patients lack are spread over the folds.

        Raises:
            RequestError: There are fewer labelled patients than folds, or some are unknown.
        """
        self.refuse_folds_of_some_unknown()
        places = [place for place, case in enumerate(self.cases) if case.label is not None]
        patients = [self.cases[place].patient for place in places]
        if len(set(patients)) < folds:
            raise RequestError(
                f"cohort {self.name}: {folds} folds of {len(set(patients))} labelled patients; ask for {max(3, len(set(patients)))} or fewer"
                if len(set(patients)) >= 3
                else f"cohort {self.name}: folds need 3 labelled patients or more, it has {len(set(patients))}; label more, or give splits"
            )
        held = [() if present is None else present[self.cases[place].id] for place in places]
        numbers = presence_folds(patients, held, folds=folds, seed=seed)
        cases = list(self.cases)
        names = sorted(set(patients))
        order = {names[int(k)]: rank for rank, k in enumerate(counter_rng(seed, "few labels of folds").permutation(len(names)))}
        ranked = sorted(range(len(places)), key=lambda n: (order[patients[n]], n))
        for rank, n in enumerate(ranked, start=1):
            side = "test" if numbers[n] == fold else "val" if numbers[n] == (fold + 1) % folds else "train"
            cases[places[n]] = replace(cases[places[n]], split=side, rank=rank)
        return replace(self, cases=tuple(cases))

    def digest(self, key: bytes) -> str:
        """Return a keyed hex digest of images, splits, patients and ranks: cohorts that differ share no table.

        Args:
            key: Secret of whoever holds the results: names could be guessed from a digest without one.
        """
        rows = [
            f"{'/'.join(case.image.parts[-2:])}|{case.split}|{case.patient}|{case.rank}|{case.label is not None}"
            + (f"|{len(case.raters)}|{case.labelled}" if case.raters or case.labelled is not None else "")
            + (
                f"|{case.volumes}|{['/'.join(path.parts[-2:]) for path in case.further]}"
                if case.further or case.volumes > 1
                else ""
            )
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


@dataclass
class _Table:
    """What a form says: cases, which structures the table says each labels, all structures, series left out, and channels where several."""

    labels: Mapping[str, Any] = field(default_factory=dict)
    cases: list[Case] = field(default_factory=list)
    labelled: list[list[str]] = field(default_factory=list)
    left_out: int = 0
    channel_names: list[str] = field(default_factory=list)

    def add(self, case: Case, row: Mapping[str, str]) -> None:
        self.cases.append(case)
        self.labelled.append([name.strip() for name in (row.get("labelled") or "").split(";") if name.strip()])


def _reader(path: Path) -> Callable[[Path], _Table]:
    if path.is_file():
        readers = {".json": _read_json, ".csv": _read_csv}
        if path.suffix.lower() not in readers:
            raise RequestError(f"cohort {path}: a file with suffix {path.suffix or '(none)'}; {FORMS}")
        return readers[path.suffix.lower()]
    if (path / "split.csv").is_file() and (path / "images").is_dir():
        return _read_folder
    if (path / "dataset.json").is_file() and (path / "imagesTr").is_dir() and not _is_decathlon(path):
        return _read_nnunet
    if (path / "dataset.json").is_file():
        return lambda folder: _read_decathlon(folder / "dataset.json")
    have = f"{n} other files and folders" if (n := sum(1 for _ in path.iterdir())) else "nothing"
    raise RequestError(f"cohort {path}: the folder holds {have}; {FORMS}")


def _is_decathlon(path: Path) -> bool:
    """Return whether a folder with dataset.json and imagesTr is a task of the Decathlon: its JSON lists images that have no channel number.

    nnU-Net's first version wrote such a list as well, for images that are stored as `<case>_0000`.
    """
    content = _json(path / "dataset.json")
    listed = isinstance(content.get("training"), list) and not {"channel_names", "file_ending"} & set(content)
    return listed and next((path / "imagesTr").glob("*_0000.*"), None) is None


def _read_folder(path: Path) -> _Table:
    table = path / "split.csv"
    found = _Table(_listed(path))
    for line, row in _rows(table, required=("file", "split"), optional=("label", "few_label_rank", "patient", "labelled")):
        image = path / "images" / row["file"]
        names = [row.get("label") or "", *_further(row)]
        label: Path | None = path / "labels" / names[0] if names[0] else _label_beside(path / "labels", row["file"], image.is_dir())
        split = _split(row["split"], table, line)
        if split == "test" and not names[0] and label is not None and not label.exists():
            label = None
        labels = [] if label is None else [label, *(path / "labels" / name for name in names[1:])]
        found.add(_case(table, line, image, labels, split, row), row)
    return found


def _read_csv(path: Path) -> _Table:
    found = _Table(_listed(path.parent))
    optional = ("few_label_rank", "patient", "labelled")
    for line, row in _rows(path, required=("image", "label", "split"), optional=optional):
        split = _split(row["split"], path, line)
        labels = [path.parent / name for name in (row["label"], *_further(row)) if name]
        found.add(_case(path, line, path.parent / row["image"], labels, split, row), row)
    return found


def _read_json(path: Path) -> _Table:
    return _read_query(path) if "index" in _json(path) else _read_decathlon(path)


def _read_decathlon(path: Path) -> _Table:
    content = _json(path)
    if "training" not in content:
        raise RequestError(f"cohort {path}: no key training among its {len(content)}; {FORMS}")
    found = _Table(content.get("labels", {}))
    names = _channel_names(content.get("modality"))
    counts: set[int] = set()
    for key, split in (("training", "train"), ("validation", "val"), ("test", "test")):
        for number, item in enumerate(content.get(key, []), start=1):
            entry = {"image": item} if isinstance(item, str) else dict(item)
            images = [entry["image"]] if isinstance(entry.get("image"), str) else list(entry.get("image") or [])
            if not images:
                raise RequestError(f"cohort {path}: {key} entry {number} has no image; give {{image, label}} for each")
            if len(images) > 1 and len(names) not in (1, len(images)):
                raise RequestError(
                    f"cohort {path}: {key} entry {number} has {len(images)} images, modality names {len(names)} channels; give one image for "
                    "each channel, or correct modality"
                )
            volumes = len(names) if len(images) == 1 and images[0].lower().endswith(IMAGE_SUFFIXES) else 1
            counts.add(max(volumes, len(images)))
            given = entry.get("label") or []
            labels = [path.parent / name for name in ([given] if isinstance(given, str) else given)]
            row = {"patient": str(entry["patient"])} if "patient" in entry else {}
            if "labelled" in entry:
                row["labelled"] = ";".join(str(name) for name in entry["labelled"])
            first, *further = (path.parent / name for name in images)
            case = _case(path, number, first, labels, split, row, where=key, further=further)
            found.add(replace(case, volumes=volumes), row)
    if len(counts) > 1:
        raise RequestError(
            f"cohort {path}: entries have {' and '.join(map(str, sorted(counts)))} channels; all cases of a cohort have the same: give each "
            "entry one image for each channel, or one 4-D file of them with their names as modality"
        )
    several = max(counts, default=1)
    found.channel_names = (names if len(names) == several else [str(k) for k in range(several)]) if several > 1 else []
    return found


def _channel_names(listed: Any) -> list[str]:
    """Return the channels that a dataset.json lists, {"0": "T1", "1": "T2"} or a list, in their order; one where it lists none."""
    if isinstance(listed, Mapping):
        order = sorted(listed, key=lambda key: int(key) if str(key).isdigit() else len(listed))
        listed = [listed[key] for key in order]
    return [str(name) for name in listed] if isinstance(listed, list) and listed else ["image"]


def _read_query(path: Path) -> _Table:
    """Read a query: {"index": folder, "where": SQL, "maps": folder, "attached": CSV, "labels": {"liver": 1}}."""
    from medssl.domains.label_files.index_query import select_labelled

    content = _json(path)
    known = ("index", "where", "maps", "attached", "labels")
    unknown = [f"{name}{near(name, known)}" for name in content if name not in known]
    if unknown:
        raise RequestError(f"cohort {path}: unknown key {', '.join(unknown)}; accepted are {', '.join(known)}")
    folders = {name: path.parent / content[name] if content.get(name) else None for name in ("index", "maps", "attached")}
    assert folders["index"] is not None
    if folders["maps"] is None and folders["attached"] is None:
        raise RequestError(f"cohort {path}: a query without labels; name a folder of maps, or what `medssl labels attach` wrote")
    found = select_labelled(folders["index"], content.get("where"), maps=folders["maps"], attached=folders["attached"])
    table = _Table(content.get("labels", {}), left_out=found.left_out)
    for series in found.series:
        if series.split not in SPLITS:
            raise RequestError(
                f"cohort {path}: series {series.series_id} is on no side of the split; run `medssl archive split` on the index, "
                "or leave it out with where"
            )
        table.add(
            Case(
                id="",
                image=series.files[0],
                label=series.label,
                patient=series.patient_id,
                split=series.split,
                files=series.files,
                part=series.part,
                series_id=series.series_id,
                values=series.values,
                facts=series.facts,
                patient_known=series.patient_known,
            ),
            {},
        )
    if found.left_out and not found.series:
        raise RequestError(
            f"cohort {path}: {found.left_out} series are selected and none has a label; maps are named by series id, "
            "as in the CSV of `medssl labels attach`"
        )
    return table


def _read_nnunet(path: Path) -> _Table:
    """Read a raw folder: `<case>_0000<ending>`, one file for each channel, in imagesTr and imagesTs, `<case><ending>` in labelsTr and labelsTs.

    A `split.csv` (columns file, split; file = case name, with or without ending) overrides the sides, which nnU-Net
    itself keeps elsewhere.
    """
    content = _json(path / "dataset.json")
    names = _channel_names(content.get("channel_names", content.get("modality")))
    ending = str(content.get("file_ending", ".nii.gz"))
    if ending.lower().endswith(PICTURE_ENDINGS):  # a picture holds its colours in one file
        names = ["image"]
    sides: dict[str, dict[str, str]] = {}
    if (path / "split.csv").is_file():
        for _, row in _rows(path / "split.csv", required=("file", "split"), optional=("few_label_rank", "patient", "labelled")):
            sides[stem(row["file"])] = row
    found = _Table(channel_names=names if len(names) > 1 else [])
    for suffix, side in (("Tr", "train"), ("Ts", "test")):
        for number, (name, images) in enumerate(_by_case(path, f"images{suffix}", ending, len(names)), start=1):
            row = sides.get(name, {})
            split = _split(row["split"], path / "split.csv", number) if "split" in row else side
            label: Path | None = path / f"labels{suffix}" / f"{name}{ending}"
            if suffix == "Ts" and label is not None and not label.is_file():
                label = None
            labels = [] if label is None else [label]
            facts = {**row, "name": name}
            found.add(_case(path, number, images[0], labels, split, facts, where=f"images{suffix}", further=images[1:]), facts)
    listed = content.get("labels", {})
    flat = {name: value for name, value in listed.items() if isinstance(value, int) or str(name).isdigit() or str(value).isdigit()}
    if len(flat) != len(listed):
        raise RequestError(
            f"cohort {path}: dataset.json has region labels (lists); plain label values are read; list each structure once"
        )
    found.labels = flat
    return found


def _by_case(path: Path, folder: str, ending: str, channels: int) -> list[tuple[str, list[Path]]]:
    """Return the cases of a folder of a raw data set, and the files of their channels; of one channel those with number 0000.

    Raises:
        RequestError: A case lacks a channel, or has more than are named.
    """
    found: dict[str, set[int]] = {}
    pattern = re.compile(rf"(.*)_([0-9]{{4}}){re.escape(ending)}", re.DOTALL)
    for file in (path / folder).glob(f"*_{'0000' if channels == 1 else '[0-9]' * 4}{ending}"):
        if match := pattern.fullmatch(file.name):
            found.setdefault(match[1], set()).add(int(match[2]))
    rule = f"<case>_0000{ending} to <case>_{channels - 1:04d}{ending}"
    order = sorted(found, key=lambda name: f"{name}_0000{ending}")  # as the files of the first channel stand in the folder
    for number, name in enumerate(order, start=1):
        lacking, beyond = sorted(set(range(channels)) - found[name]), sorted(found[name] - set(range(channels)))
        if lacking or beyond:
            some = ", ".join(f"<case>_{k:04d}{ending}" for k in lacking or beyond)
            raise RequestError(
                f"cohort {path}: {folder} case {number} of {len(found)} (by name): {'lacks' if lacking else 'has'} {some}; dataset.json names "
                f"{channels} channels, so a case has {rule}: "
                + (
                    "add what is missing, or remove the case"
                    if lacking
                    else "name all channels in dataset.json, or remove the file"
                )
            )
    return [(name, [path / folder / f"{name}_{k:04d}{ending}" for k in range(channels)]) for name in order]


def _case(
    table: Path,
    line: int,
    image: Path,
    labels: list[Path],
    split: str,
    row: Mapping[str, str],
    *,
    where: str = "line",
    further: Iterable[Path] = (),
) -> Case:
    """Check one entry; messages name the table and the line, never the file, whose name may be a patient's."""
    at = f"cohort {table}: {where} {line}"
    further = tuple(further)
    for kind, file in (("image", image), *(("image", other) for other in further), *(("label", label) for label in labels)):
        if not (file.is_file() or file.is_dir()):
            raise RequestError(f"{at}: its {kind} file does not exist; correct the name or remove the entry")
    if not labels and split != "test":
        raise RequestError(f"{at}: a {split} case without a label map; give one, or remove the entry")
    rank = (row.get("few_label_rank") or "").strip()
    if rank and not rank.isdigit():
        raise RequestError(f"{at}: few_label_rank is not a whole number; use 1, 2, 3 ... or leave it empty")
    return Case(
        id="",
        image=image,
        label=labels[0] if labels else None,
        patient=row.get("patient") or row.get("name") or stem(image.name),
        patient_known=bool(row.get("patient")),
        split=split,
        rank=int(rank) if rank else None,
        raters=tuple(labels[1:]),
        further=further,
    )


def _further(row: Mapping[str, str]) -> list[str]:
    """Return the maps of further raters: label_2, label_3 ..."""
    names: list[str] = []
    while row.get(f"label_{len(names) + 2}"):
        names.append(row[f"label_{len(names) + 2}"])
    return names


def _label_beside(folder: Path, image: str, is_folder: bool) -> Path:
    """Return the label of an image that the table names none for: the same name, else the same name in another form."""
    same = folder / (f"{image}.nii.gz" if is_folder else image)
    others = (folder / f"{image if is_folder else stem(image)}{suffix}" for suffix in LABEL_SUFFIXES)
    return same if same.exists() else next((path for path in others if path.exists()), same)


def _listed(folder: Path) -> Mapping[str, Any]:
    """Return the structures that a dataset.json in the folder lists."""
    named = folder / "dataset.json"
    labels: Mapping[str, Any] = _json(named).get("labels", {}) if named.is_file() else {}
    return labels


def _names_in_maps(cases: list[Case], path: Path) -> dict[str, int]:
    """Return the structures that the label files of some cases name, numbered; empty where they are plain maps.

    Raises:
        RequestError: Some name their structures and some do not, so that values would mean nothing.
        ImageError: A label cannot be read.
    """
    from medssl.domains.label_files.base import numbered
    from medssl.domains.label_files.read import names_in

    found: list[str] = []
    kinds = set()
    for case in cases:
        for file in case.maps:
            plain = file.is_file() and file.name.lower().endswith(PLAIN_MAPS)
            try:
                names = [] if plain else names_in(file)
            except ImageError as err:
                raise ImageError(err.reason, f"case {case.id}: {err}") from None
            kinds.add(bool(names))
            found += names
    if len(kinds) > 1:
        raise RequestError(
            f"cohort {path}: some label files name their structures and some hold values alone; list the structures with "
            'their values in dataset.json: {"labels": {"liver": 1}}'
        )
    return numbered(found)


def _values_of(labelled: Iterable[str], structures: Mapping[int, str], path: Path) -> tuple[int, ...] | None:
    """Return the values of structures that a table calls by name or value; None for an empty cell."""
    from medssl.domains.label_files.base import name_key

    names = {name_key(name): value for value, name in structures.items()}
    values = []
    for name in labelled:
        value = names.get(name_key(name), int(name) if name.isdigit() else None)
        if value is None or (structures and value not in structures):
            raise RequestError(
                f"cohort {path}: labelled names a structure that is not listed; listed are "
                f"{', '.join(structures.values()) or 'none'}: list it in dataset.json, or correct the table"
            )
        values.append(value)
    return tuple(sorted(set(values))) or None


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


def _structures(labels: Mapping[str, Any]) -> tuple[dict[int, str], int | None]:
    """Return label value to name without background, and the value of `ignore`.

    Both {"1": "liver"} (Decathlon) and {"liver": 1} (nnU-Net) are read. A listed -1 is what it is everywhere: uncertain.

    Raises:
        RequestError: Another value is negative.
    """
    from medssl.domains.label_files.base import IGNORE, name_key

    pairs = [(int(k), str(v)) if str(k).isdigit() else (int(v), str(k)) for k, v in labels.items()]
    ignore = next((value for value, name in pairs if name_key(name) == IGNORE), None)
    negative = sorted(value for value, _ in pairs if value < -1 and value != ignore)
    if negative:
        raise RequestError(
            f"labels of dataset.json: value{'s' * (len(negative) > 1)} {', '.join(map(str, negative))}; structures are 1 or more, background 0, "
            "uncertain -1; correct the list"
        )
    return {value: name for value, name in sorted(pairs) if value not in (0, -1, ignore)}, ignore


def _numbered(cases: list[Case]) -> list[Case]:
    patients: dict[str, str] = {}
    for case in cases:
        patients.setdefault(case.patient, f"patient{len(patients) + 1:04d}")
    return [replace(case, id=f"case{k:04d}", patient_id=patients[case.patient]) for k, case in enumerate(cases, start=1)]


def _check_unique(cases: list[Case], path: Path) -> None:
    seen: dict[tuple[Path, str], int] = {}
    for number, case in enumerate(cases, start=1):
        for file in (case.image, *case.further):
            image = (Path(os.path.normpath(file)), json.dumps(case.part))
            if image in seen:
                which = f"entries {seen[image]} and {number}" if seen[image] != number else f"two channels of entry {number}"
                raise RequestError(f"cohort {path}: {which} are the same image file; list each image once")
            seen[image] = number


def _apart(cases: list[Case], root: Path) -> list[Case]:
    """Return the cases with keys that keep unknown patients apart: where a file name occurs twice, its path from the table."""
    keys = Counter(case.patient for case in cases)

    def key(case: Case) -> str:
        image = case.image.relative_to(root) if case.image.is_relative_to(root) else case.image
        return image.as_posix()

    # an index calls unknown patients itself
    return [
        case if case.patient_known or case.series_id or keys[case.patient] == 1 else replace(case, patient=key(case))
        for case in cases
    ]


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
