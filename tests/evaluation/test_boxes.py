"""Boxes of pictures from three kinds of files, boxes of volumes from label maps, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.errors import RequestError
from medssl.evaluation.boxes import read_boxes
from medssl.evaluation.volume_boxes import extent, parts_of, volume_boxes
from medssl.evaluation.volumes import Volume

BCCD = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "bccd"
HEADER = "image,class,xmin,ymin,xmax,ymax,ignore\n"


def table(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "boxes.csv"
    path.write_text(HEADER + "".join(line + "\n" for line in lines))
    return path


def voc(folder: Path, name: str, *objects: tuple[str, int, int, int, int, int]) -> None:
    folder.mkdir(exist_ok=True)
    items = "".join(
        f"<object><name>{label}</name><difficult>{hard}</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
        f"<ymax>{d}</ymax></bndbox></object>"
        for label, a, b, c, d, hard in objects
    )
    (folder / f"{name}.xml").write_text(f"<annotation><filename>{name}.jpg</filename>{items}</annotation>")


def test_three_forms__say_the_same(tmp_path: Path) -> None:
    """A box 10 to 30 across and 5 to 25 down, one that counts neither way, and an empty picture."""
    lines = ("a.png,cell,10,5,30,25,0", "a.png,clump,0,0,8,9,1", "b.png,,,,,,")
    voc(tmp_path / "xml", "a", ("cell", 10, 5, 30, 25, 0), ("clump", 0, 0, 8, 9, 1))
    voc(tmp_path / "xml", "b")
    coco = tmp_path / "boxes.json"
    annotations = [
        {"image_id": 7, "category_id": 2, "bbox": [10, 5, 20, 20]},
        {"image_id": 7, "category_id": 1, "bbox": [0, 0, 8, 9], "iscrowd": 1},
    ]
    images = [{"id": 7, "file_name": "images/a.png"}, {"id": 9, "file_name": "b.png"}]
    categories = [{"id": 1, "name": "clump"}, {"id": 2, "name": "cell"}]
    coco.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    for path in (table(tmp_path, *lines), tmp_path / "xml", coco):
        found = read_boxes(path)
        assert found.classes == ("cell", "clump")
        a, b = found.of("a.png", (40, 40)), found.of("b.png", (40, 40))
        assert a is not None and b is not None
        assert (
            a.boxes.tolist() == [[5, 10, 25, 30], [0, 0, 9, 8]]
            and a.labels.tolist() == [0, 1]
            and a.ignore.tolist() == [False, True]
        )
        assert a.region.tolist() == [False, path == coco]
        assert b.boxes.shape == (0, 4)
        assert found.of("c.png", (40, 40)) is None
        assert found.counts["pictures"] == 2 and found.counts["ignored"] == 1


@pytest.mark.parametrize(
    "second",
    [{"id": 2, "file_name": "train/Quill.png"}, {"id": 2, "file_name": "./train\\Quill.png"}, {"id": 1, "file_name": "other.png"}],
)
def test_coco_images_that_cannot_be_told_apart__are_refused(tmp_path: Path, second: dict[str, Any]) -> None:
    images = [{"id": 1, "file_name": "train/Quill.png"}, second]
    (tmp_path / "boxes.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    with pytest.raises(RequestError, match="of 2 images share a file name or an id with another") as caught:
        read_boxes(tmp_path / "boxes.json")
    assert "Quill" not in str(caught.value)


def test_box_without_area__is_refused_with_its_row_or_dropped_and_counted(tmp_path: Path) -> None:
    path = table(tmp_path, "Quill.png,cell,1,1,5,5,0", "Quill.png,cell,7,7,7,9,0")
    with pytest.raises(RequestError, match=r"line 3: a box without an area \(0 wide, 2 high\).*drop_empty: true") as caught:
        read_boxes(path)
    assert "Quill" not in str(caught.value)
    found = read_boxes(path, drop_empty=True)
    assert found.counts["dropped_empty"] == 1 and found.of("Quill.png", (9, 9)) is not None
    voc(tmp_path / "xml", "Quill", ("cell", 3, 3, 3, 3, 0))
    with pytest.raises(RequestError, match="file 1 of 1 in the order of names, object 1: a box without an area"):
        read_boxes(tmp_path / "xml")


def test_box_beyond_its_picture__is_clipped_and_counted(tmp_path: Path) -> None:
    path = table(tmp_path, "a.png,cell,-3,2,12,9,0", "b.png,cell,20,2,30,9,0")
    found = read_boxes(path)
    boxes = found.of("a.png", (8, 10))
    assert boxes is not None and boxes.boxes.tolist() == [[2, 0, 8, 10]] and found.counts["clipped"] == 1
    with pytest.raises(RequestError, match="line 3: the box lies outside its picture"):
        found.of("b.png", (8, 10))
    again = read_boxes(path, drop_empty=True)
    empty = again.of("b.png", (8, 10))
    assert empty is not None and len(empty.boxes) == 0 and again.counts["dropped_outside"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.png,cel,1,1,5,5,0", r"line 2: a class that boxes\.classes does not list; listed are cell, clump"),
        ("a.png,,1,1,5,5,0", "line 2: a box without a class"),
        (",cell,1,1,5,5,0", "line 2: no image"),
        ("a.png,cell,1,one,5,5,0", "line 2: an edge is not a number"),
        ("a.png,cell,1,1,5,5,maybe", "line 2: ignore or difficult is neither 0 nor 1"),
    ],
)
def test_wrong_lines__are_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_boxes(table(tmp_path, line), classes=["cell", "clump"])


def test_wrong_files__say_what_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "x.txt").touch()
    (tmp_path / "none").mkdir()
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "results.json").write_text('[{"image_id": 1, "bbox": [1, 2, 3, 4]}]')
    (tmp_path / "x.csv").write_text("image,label\n")
    (tmp_path / "x.xml").write_text("<annotation>")
    for name, message in {
        "nowhere": "nothing there; accepted: a COCO",
        "x.txt": r"suffix \.txt; accepted",
        "none": r"no \.xml file in this folder",
        "x.json": "no list images, annotations, categories",
        "results.json": "no COCO instances",
        "x.csv": "no column class, xmin, ymin, xmax, ymax",
        "x.xml": "not readable as XML",
    }.items():
        with pytest.raises(RequestError, match=message):
            read_boxes(tmp_path / name)


@pytest.mark.skipif(not BCCD.is_dir(), reason="shared data are not here")
def test_bccd__has_one_box_without_area() -> None:
    for path in (BCCD / "Annotations", BCCD / "boxes.csv"):
        with pytest.raises(RequestError, match="a box without an area"):
            read_boxes(path)
        found = read_boxes(path, drop_empty=True)
        assert found.classes == ("Platelets", "RBC", "WBC") and len(found.pictures) == 304
        assert found.counts["dropped_empty"] == 1 and sum(len(rows) for rows in found.pictures.values()) == 3980 - 1


def label_map() -> np.ndarray:
    label = np.zeros((12, 10, 8), dtype=np.int16)
    label[1:4, 2:5, 3:6] = 1
    label[8:10, 2:4, 1:2] = 1
    label[6:8, 7:9, 6:8] = 2
    return label


def test_parts__have_boxes_in_voxels_and_mm() -> None:
    found = parts_of(label_map(), [2, 1])
    assert found.boxes.tolist() == [[6, 7, 6, 8, 9, 8], [1, 2, 3, 4, 5, 6], [8, 2, 1, 10, 4, 2]]
    assert found.labels.tolist() == [0, 1, 1] and not found.ignore.any() and found.voxels.tolist() == [8, 27, 4]
    assert [found.parts[6, 7, 6], found.parts[1, 2, 3], found.parts[8, 2, 1], found.parts[0, 0, 0]] == [1, 2, 3, 0]
    assert found.boxes_mm((0.5, 1, 2))[0].tolist() == [3, 7, 12, 4, 9, 16]
    assert extent(label_map() == 2).tolist() == [6, 7, 6, 8, 9, 8]
    whole = parts_of(label_map(), [1, 2], split=False)
    assert whole.boxes.tolist() == [[1, 2, 1, 10, 5, 6], [6, 7, 6, 8, 9, 8]]
    few = parts_of(label_map(), [1, 2], min_voxels=5)
    assert len(few.boxes) == 2 and few.left_out == 1
    assert parts_of(np.zeros((4, 4, 4), dtype=np.int16), [1]).boxes.shape == (0, 6)


def test_uncertain_voxels_and_what_touches_them__count_neither_way() -> None:
    label = label_map()
    label[4, 2:5, 3:6] = -1  # beside the first part of structure 1
    found = parts_of(label, [1])
    by_box = {tuple(box): hidden for box, hidden in zip(found.boxes.tolist(), found.ignore.tolist())}
    assert by_box == {(1, 2, 3, 4, 5, 6): True, (8, 2, 1, 10, 4, 2): False, (4, 2, 3, 5, 5, 6): True}
    assert found.region.tolist() == [False, False, True]
    assert list(found.points) == [2] and found.points[2].tolist() == [
        [8, 2, 1],
        [8, 3, 1],
        [9, 2, 1],
        [9, 3, 1],
    ]  # crops go there alone


def test_parts__hold_no_mask_of_the_whole_volume() -> None:
    label = np.zeros((64, 64, 64), dtype=np.int16)
    label[::8, ::8, ::8] = 1
    found = parts_of(label, [1])
    assert len(found.boxes) == 512 and sum(mask.nbytes for _, mask in found.pieces) == 512
    assert (found.parts > 0).sum() == 512 and not any(
        isinstance(v, np.ndarray) and v.size >= label.size for v in vars(found).values()
    )


def test_maps_of_some_structures__are_refused() -> None:
    blank = np.zeros((1, 12, 10, 8))
    volume = Volume(blank, blank[0] > 0, label_map(), (1.0, 1.0, 1.0), np.eye(4), {}, labelled=(1,))
    assert len(volume_boxes(volume, [1]).boxes) == 2
    with pytest.raises(RequestError, match="does not label structure 2, which is not to say that it is absent"):
        volume_boxes(volume, [1, 2])


@pytest.mark.parametrize(
    ("listed", "files", "expected"),
    [
        (["images/a.png"], ["/data/images/a.png"], ["images/a.png"]),
        (["images\\a.png"], ["/data/images/a.png"], ["images/a.png"]),
        (["./images/a"], ["/data/images/a.png"], ["images/a"]),
        (["P1/a.png", "P2/a.png"], ["/data/P2/a.png", "/data/P1/a.png", "/data/P3/a.png"], ["P2/a.png", "P1/a.png", None]),
        (["train/a.png", "b.png"], ["/elsewhere/a.png", "/elsewhere/b.png"], ["train/a.png", "b.png"]),
        (["train/a.png", "a.png"], ["/x/train/a.png"], ["train/a.png"]),
        (["train/a.png"], ["/x/b.png"], [None]),
        (["x/a.png"], ["/q/x/a.png", "{folder}/x/a.png"], [None, "x/a.png"]),
        (["../a.png"], ["/q/a.png", "{folder}/../a.png"], [None, "{up}/a.png"]),
        (["/data/siteA/a.png"], ["/data/siteB/a.png"], [None]),  # one place alone: its name elsewhere is another picture
        (["../siteA/a.png"], ["/data/siteB/a.png"], [None]),
        (["C:\\siteA\\a.png"], ["/data/siteB/a.png"], [None]),
        (["/siteA/a.png"], ["/mnt/siteA/a.png"], ["siteA/a.png"]),
        (["a"], ["/q/a", "/r/a.png"], ["a", None]),
        (["a.png"], ["/q/a.png", "/r/a.png"], ["a.png", "a.png"]),  # the caller refuses them: which one is meant cannot be told
    ],
)
def test_names_with_folders__are_joined_by_path_then_by_a_name_that_is_unique(
    tmp_path: Path, listed: list[str], files: list[str], expected: list[str | None]
) -> None:
    found = read_boxes(table(tmp_path, *(f"{name},cell,1,1,5,5,0" for name in listed)))
    given = [Path(name.format(folder=tmp_path)) for name in files]
    wanted = [None if name is None else name.format(up=str(tmp_path.parent).lstrip("/")) for name in expected]
    assert found.names_of(given) == wanted


@pytest.mark.parametrize(
    ("listed", "files"),
    [
        (["train/Quill.png"], ["/x/P1/Quill.png", "/x/P2/Quill.png"]),
        (["train/Quill.png", "test/Quill.png"], ["/x/Quill.png"]),
        (["train/Quill", "test/Quill.png"], ["/x/Quill.png"]),
        (["train/Quill.png", "test/Quill.png"], ["/x/train/Quill.png", "/x/all/Quill.png"]),
    ],
)
def test_names_that_several_files_or_pictures_have__are_refused(tmp_path: Path, listed: list[str], files: list[str]) -> None:
    found = read_boxes(table(tmp_path, *(f"{name},cell,1,1,5,5,0" for name in listed)))
    with pytest.raises(RequestError, match="listed with a folder in which no image file lies") as caught:
        found.names_of([Path(name) for name in files])
    assert "Quill" not in str(caught.value)


def test_doubts_about_files_that_nobody_asks_for__are_no_fault(tmp_path: Path) -> None:
    found = read_boxes(table(tmp_path, "gone/a.png,cell,1,1,5,5,0", "b.png,cell,1,1,5,5,0"))
    files = [Path("/x/a.png"), Path("/y/a.png"), Path("/y/b.png")]
    assert found.names_of(files, [False, False, True]) == [None, None, "b.png"]
    with pytest.raises(RequestError, match="those of several files or lines"):
        found.names_of(files, [True, False, True])
