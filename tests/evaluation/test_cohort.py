from __future__ import annotations

import json
from pathlib import Path

import pytest

from medssl.errors import RequestError
from medssl.evaluation.cohort import Cohort, stem


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def folder(tmp_path: Path, lines: list[str], header: str = "file,split,few_label_rank,patient") -> Path:
    for line in lines:
        name = line.split(",")[0]
        touch(tmp_path / "images" / name, tmp_path / "labels" / name)
    (tmp_path / "split.csv").write_text("\n".join([header, *lines]) + "\n")
    return tmp_path


def test_folder__few_labels_follow_the_rank_not_the_table(tmp_path: Path) -> None:
    lines = ["a.nii.gz,train,3,p1", "b.nii.gz,train,1,p2", "c.nii.gz,train,,p3", "d.nii.gz,train,2,p4"]
    cohort = Cohort.load(folder(tmp_path, [*lines, "e.nii.gz,test,,p5", "f.nii.gz,valid,,p6"]))
    assert [case.patient for case in cohort.first(2)] == ["p2", "p4"]
    assert [case.patient for case in cohort.first(None)] == ["p2", "p4", "p1", "p3"]
    assert [case.patient for case in cohort.split("val")] == ["p6"]
    with pytest.raises(RequestError, match="5 labelled training cases asked for, it has 4; choose 1 to 4"):
        cohort.first(5)


def test_ids__are_places_in_the_table_and_say_nothing_of_names(tmp_path: Path) -> None:
    lines = ["DOE_JOHN.nii.gz,train,1,DOE", "x.nii.gz,test,,y", "DOE_2.nii.gz,train,,DOE"]
    cohort = Cohort.load(folder(tmp_path, lines))
    assert [case.id for case in cohort.cases] == ["case0001", "case0002", "case0003"]
    assert [case.patient_id for case in cohort.cases] == ["patient0001", "patient0002", "patient0001"]


def test_folder__takes_dicom_folders_label_names_and_unlabelled_test_cases(tmp_path: Path) -> None:
    touch(tmp_path / "images" / "p" / "1.dcm", tmp_path / "images" / "q.nii", tmp_path / "images" / "r" / "1.dcm")
    touch(tmp_path / "labels" / "p.nii.gz", tmp_path / "labels" / "other.nii.gz")
    (tmp_path / "split.csv").write_text("file,split,label\np,train,\nr,val,other.nii.gz\nq.nii,test,\n")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "2": "liver", "1": "spleen"}}))
    cohort = Cohort.load(tmp_path)
    assert [case.label.name if case.label else None for case in cohort.cases] == ["p.nii.gz", "other.nii.gz", None]
    assert cohort.split("test") == []
    assert dict(cohort.structures) == {1: "spleen", 2: "liver"}


def test_decathlon_json__maps_its_three_lists(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("i/1.nii", "l/1.nii", "i/2.nii", "l/2.nii", "i/3.nii")))
    content = {
        "labels": {"0": "background", "1": "Anterior"},
        "training": [{"image": "./i/1.nii", "label": "./l/1.nii", "patient": 7}],
        "validation": [{"image": "i/2.nii", "label": "l/2.nii"}],
        "test": ["i/3.nii"],
    }
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(content))
    cohort = Cohort.load(path)
    assert [(case.split, case.patient, case.label is None) for case in cohort.cases] == [
        ("train", "7", False),
        ("val", "2", False),
        ("test", "3", True),
    ]
    assert Cohort.load(tmp_path).cases == cohort.cases
    path.write_text(json.dumps({"images": []}))
    with pytest.raises(RequestError, match="no key training"):
        Cohort.load(path)
    path.write_text("{")
    with pytest.raises(RequestError, match="not readable as JSON"):
        Cohort.load(path)


def test_nnunet_raw__reads_channels_labels_and_an_own_split(tmp_path: Path) -> None:
    touch(*(tmp_path / f"imagesTr/c{i}_0000.nii.gz" for i in range(3)))
    touch(*(tmp_path / f"labelsTr/c{i}.nii.gz" for i in range(3)))
    touch(tmp_path / "imagesTs/t_0000.nii.gz")
    content = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    cohort = Cohort.load(tmp_path)
    assert [case.split for case in cohort.cases] == ["train"] * 3 + ["test"]
    assert dict(cohort.structures) == {1: "a", 2: "b"}
    (tmp_path / "split.csv").write_text("file,split,few_label_rank\nc0,test,\nc1,train,2\nc2,train,1\n")
    assert [case.patient for case in Cohort.load(tmp_path).first(2)] == ["c2", "c1"]
    assert [case.patient for case in Cohort.load(tmp_path).split("test")] == ["c0"]
    (tmp_path / "dataset.json").write_text(json.dumps({**content, "channel_names": {"0": "T1", "1": "T2"}}))
    with pytest.raises(
        RequestError, match=r"imagesTr case 1 of 3 \(by name\): lacks <case>_0001\.nii\.gz; dataset\.json names 2 channels"
    ):
        Cohort.load(tmp_path)


def test_decathlon_folder__is_told_from_nnunet_by_its_json(tmp_path: Path) -> None:
    touch(*(tmp_path / part / f"x_{n}.nii.gz" for n in range(3) for part in ("imagesTr", "labelsTr")))
    touch(tmp_path / "imagesTs" / "x_3.nii.gz")
    training = [{"image": f"./imagesTr/x_{n}.nii.gz", "label": f"./labelsTr/x_{n}.nii.gz"} for n in range(3)]
    content = {
        "labels": {"0": "background", "1": "a"},
        "modality": {"0": "MRI"},
        "training": training,
        "test": ["./imagesTs/x_3.nii.gz"],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    cohort = Cohort.load(tmp_path)
    assert cohort.cases == Cohort.load(tmp_path / "dataset.json").cases
    assert [case.split for case in cohort.cases] == ["train"] * 3 + ["test"]
    for n in range(3):  # as nnU-Net's first version had it: the list names images that are stored with a channel number
        (tmp_path / "imagesTr" / f"x_{n}.nii.gz").rename(tmp_path / "imagesTr" / f"x_{n}_0000.nii.gz")
    old = Cohort.load(tmp_path)
    assert [case.image.name for case in old.cases] == [f"x_{n}_0000.nii.gz" for n in range(3)]


def test_csv__same_file_name_in_two_folders_are_two_cases(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a/i.nii", "a/l.nii", "b/i.nii", "b/l.nii")))
    path = tmp_path / "set.csv"
    path.write_text("image,label,split,patient\na/i.nii,a/l.nii,train,1\nb/i.nii,b/l.nii,test,2\n")
    cohort = Cohort.load(path)
    assert len({case.id for case in cohort.cases}) == 2
    assert cohort.name == "set"


def test_patients__are_those_of_the_table_and_no_file_names(tmp_path: Path) -> None:
    for side in ("train", "test"):  # as TotalSegmentator has it
        touch(*(tmp_path / f"{side}{n}" / name for n in range(2) for name in ("ct.nii.gz", "segmentations/liver.nii.gz")))
    lines = [f"{side}{n}/ct.nii.gz,{side}{n}/segmentations,{side}" for side in ("train", "test") for n in range(2)]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["image,label,split", *lines]))
    cohort = Cohort.load(path)
    assert len({case.patient for case in cohort.cases}) == 4
    assert not any(case.patient_known for case in cohort.cases)
    assert [case.split for case in cohort.dealt(4, 0, 0).cases].count("test") == 1
    path.write_text("\n".join(["image,label,split,patient", *(f"{line},p{n}" for n, line in enumerate(lines))]))
    assert [(case.patient, case.patient_known) for case in Cohort.load(path).cases] == [(f"p{n}", True) for n in range(4)]
    path.write_text("\n".join(["image,label,split,patient", *(f"{line},{'p' * (n < 2)}" for n, line in enumerate(lines))]))
    some = Cohort.load(path)
    assert [case.patient_known for case in some.cases] == [True, True, False, False]
    with pytest.raises(
        RequestError, match=r"2 of 4 labelled series have no usable patient identity.*; fill in the column patient, or remove"
    ):
        some.dealt(3, 0, 0)
    entries = [
        {"image": f"{side}{n}/ct.nii.gz", "label": f"{side}{n}/segmentations"} for side in ("train", "test") for n in range(2)
    ]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries[:2], "test": entries[2:]}))
    assert len({case.patient for case in Cohort.load(tmp_path / "list.json").cases if not case.patient_known}) == 4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a.nii,train,1,p", "b.nii,test,,p"], r"1 patient\(s\) on two sides .*train and test"),
        (["a.nii,train,1,p", "a.nii,train,2,p"], "entries 1 and 2 are the same image"),
        (["a.nii,dev,1,p"], "line 2: another split than train, val, test"),
        (["a.nii,train,first,p"], "line 2: few_label_rank is not a whole number"),
        ([], "no cases in it"),
    ],
)
def test_faults__are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(RequestError, match=message):
        Cohort.load(folder(tmp_path, lines))


def test_missing_things__are_named_without_file_names(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nothing there; accepted: a folder with images"):
        Cohort.load(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="the folder holds nothing"):
        Cohort.load(tmp_path)
    path = folder(tmp_path, ["DOE.nii,train,1,p"])
    (path / "labels" / "DOE.nii").unlink()
    with pytest.raises(RequestError, match="line 2: its label file does not exist") as caught:
        Cohort.load(path)
    assert "DOE" not in str(caught.value)
    (path / "split.csv").write_text("flie,split\nx,train\n")
    with pytest.raises(RequestError, match=r'no column file \(did you mean "flie"\?\).*needed: file, split'):
        Cohort.load(path)
    (path / "notes.txt").touch()
    with pytest.raises(RequestError, match=r"a file with suffix \.txt"):
        Cohort.load(path / "notes.txt")


def test_digest__changes_with_name_split_and_rank_and_with_the_key(tmp_path: Path) -> None:
    tables = (
        ["a.nii,train,1,p", "b.nii,train,2,q"],
        ["a.nii,train,2,p", "b.nii,train,1,q"],
        ["a.nii,train,1,p", "b.nii,test,,q"],
        ["a.nii,train,1,p", "c.nii,train,2,q"],
    )
    found = {Cohort.load(folder(tmp_path, table)).digest(b"key") for table in tables}
    cohort = Cohort.load(folder(tmp_path, tables[0]))
    assert len(found) == 4 and cohort.digest(b"key") in found and cohort.digest(b"another") not in found


def test_stem__takes_nii_gz_as_one_suffix() -> None:
    assert stem("a.b.nii.gz") == "a.b"
    assert stem("a.nrrd") == "a"


@pytest.mark.data
def test_hippocampus__has_the_documented_sides(shared_data: Path) -> None:
    cohort = Cohort.load(shared_data / "msd_hippocampus")
    assert [len(cohort.split(side)) for side in ("train", "val", "test")] == [130, 20, 50]
    assert [case.image.name for case in cohort.first(2)] == ["hippocampus_394.nii.gz", "hippocampus_107.nii.gz"]


def test_labelled__names_structures_by_name_or_value(tmp_path: Path) -> None:
    cohort_path = folder(tmp_path, ["a.nii,train,Left Lung;2", "b.nii,train,", "c.nii,test,2"], header="file,split,labelled")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"left_lung": 1, "liver": 2, "ignore": 3}}))
    cohort = Cohort.load(cohort_path)
    assert [case.labelled for case in cohort.cases] == [(1, 2), None, (2,)]
    assert dict(cohort.structures) == {1: "left_lung", 2: "liver"}
    assert cohort.ignore == 3
    assert {case.rules.values for case in cohort.cases} == {frozenset({1, 2})}
    for wrong in ("spleen", "3", "0"):
        folder(tmp_path, [f"a.nii,train,{wrong}"], header="file,split,labelled")
        with pytest.raises(RequestError, match="labelled names a structure that is not listed; listed are left_lung, liver"):
            Cohort.load(tmp_path)


def test_raters__stand_in_columns_and_lists(tmp_path: Path) -> None:
    touch(tmp_path / "i.nii", tmp_path / "a.nii", tmp_path / "b.nii", tmp_path / "c.nii")
    table = tmp_path / "t.csv"
    table.write_text("image,label,split,label_2,label_3\ni.nii,a.nii,train,b.nii,c.nii\n")
    case = Cohort.load(table).cases[0]
    assert [path.name for path in case.maps] == ["a.nii", "b.nii", "c.nii"]
    path = tmp_path / "list.json"
    entry = {"image": "i.nii", "label": ["a.nii", "b.nii"], "labelled": ["liver"]}
    path.write_text(json.dumps({"labels": {"0": "background", "1": "liver"}, "training": [entry]}))
    case = Cohort.load(path).cases[0]
    assert [found.name for found in case.maps] == ["a.nii", "b.nii"]
    assert case.labelled == (1,)
    one = Cohort.load(path).digest(b"k")
    path.write_text(json.dumps({"labels": {"0": "background", "1": "liver"}, "training": [{**entry, "label": ["a.nii"]}]}))
    assert Cohort.load(path).digest(b"k") != one
    table.write_text("image,label,split,label_2\ni.nii,a.nii,train,x.nii\n")
    with pytest.raises(RequestError, match="line 2: its label file does not exist"):
        Cohort.load(table)


def test_folder__finds_labels_of_another_form_by_the_name_of_the_image(tmp_path: Path) -> None:
    names = ("a.nii.gz", "b.nii.gz", "c.nii.gz")
    touch(*(tmp_path / "images" / name for name in names), tmp_path / "images" / "d" / "1.dcm")
    touch(tmp_path / "labels" / "a.seg.nrrd", tmp_path / "labels" / "b" / "liver.nii.gz", tmp_path / "labels" / "c.dcm")
    touch(tmp_path / "labels" / "d.dcm")
    (tmp_path / "split.csv").write_text("file,split\n" + "".join(f"{name},train\n" for name in (*names, "d")))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"liver": 1}}))
    found = [case.label.name for case in Cohort.load(tmp_path).cases if case.label]
    assert found == ["a.seg.nrrd", "b", "c.dcm", "d.dcm"]


def test_names_in_files__are_numbered_and_stay_inside(tmp_path: Path) -> None:
    for case, organs in (("a", ("Spleen", "liver")), ("b", ("liver", "DOE_JOHN"))):
        touch(tmp_path / "images" / f"{case}.nii.gz", *(tmp_path / "labels" / case / f"{name}.nii.gz" for name in organs))
    touch(tmp_path / "images" / "c.nii.gz", tmp_path / "labels" / "c" / "other.nii.gz")
    (tmp_path / "split.csv").write_text("file,split\na.nii.gz,train\nb.nii.gz,train\nc.nii.gz,test\n")
    cohort = Cohort.load(tmp_path)
    assert dict(cohort.structures) == {1: "structure_1", 2: "structure_2", 3: "structure_3"}
    assert dict(cohort.file_names) == {1: "doe john", 2: "liver", 3: "spleen"}
    touch(tmp_path / "labels" / "b.nii.gz")
    with pytest.raises(RequestError, match="some label files name their structures and some hold values alone"):
        Cohort.load(tmp_path)
