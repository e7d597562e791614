"""Boxes in pictures, as people have them: COCO JSON, Pascal VOC XML, CSV.

    COCO   one JSON with images, annotations (bbox x, y, width, height; iscrowd marks what counts neither way) and categories
    VOC    a folder of XML files, one per picture (object: name, bndbox, optional difficult, which counts neither way)
    CSV    columns image, class, xmin, ymin, xmax, ymax; optional ignore (0 or 1). A line with an image alone says that it has no box

Edges are places between pixels, from the outer corner of the first pixel: a box from 0 to 10 has 10 pixels. Here and everywhere else boxes
are (low row, low column, high row, high column). A picture that the file does not list is unlabelled, which is not empty. Pictures are named
by file name or by path: `BoxTable.names_of` says which image file that is.

A box without an area is refused, or with `drop_empty` dropped and counted. A box that reaches beyond its picture is clipped and counted.

Names of pictures can hold a patient's name: messages say which file and row, and for a folder of XML files which one in the order of names.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from medssl.errors import RequestError, header_words
from medssl.evaluation.file_names import is_fixed, join_names, plain_name

FORMS = "accepted: a COCO .json, a folder of Pascal VOC .xml files, a .csv with columns image, class, xmin, ymin, xmax, ymax"
COLUMNS = ("image", "class", "xmin", "ymin", "xmax", "ymax")
YES, NO = ("1", "true", "yes"), ("", "0", "false", "no")


@dataclass(frozen=True)
class PictureBoxes:
    """Boxes of one picture.

    Args:
        boxes: (N, 4) float64.
        labels: (N,) int64, place in the classes.
        ignore: (N,) bool, counts neither way.
        region: (N,) bool, those of `ignore` that hold any number of objects (`iscrowd`).
    """

    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    region: np.ndarray


@dataclass
class BoxTable:
    """What a file of boxes says.

    Args:
        path: The file or folder.
        classes: Names, in the order given or sorted.
        pictures: Name or path as the file has it, with `/` -> its boxes, each with where it stands.
        counts: `pictures`, `boxes`, `dropped_empty`, `clipped`, `dropped_outside`, `ignored`.
        fixed: Names that mean one place alone, see `file_names.is_fixed`.
    """

    path: Path
    classes: tuple[str, ...]
    pictures: dict[str, list[_Row]]
    drop_empty: bool
    counts: Counter[str] = field(default_factory=Counter)
    fixed: frozenset[str] = frozenset()

    def names_of(self, files: Sequence[Path], chosen: Sequence[bool] | None = None) -> list[str | None]:
        """Return the names under which the file lists pictures; see `file_names.join_names`.

        Args:
            files: Image files, all that a name could mean.
            chosen: Whether each is asked for; None for all.

        Raises:
            RequestError: A picture lies at no path that the file names, and several files or pictures have its name.
        """
        try:
            return join_names(self.pictures, files, self.path.parent, fixed=self.fixed, chosen=chosen)
        except RequestError as err:
            raise RequestError(f"boxes: {err}") from None

    def listed(self, name: str) -> str | None:
        """Return the name under which the file lists a picture; see `names_of`."""
        return self.names_of([Path(name)])[0]

    def of(self, name: str, size: Sequence[int]) -> PictureBoxes | None:
        """Return the boxes of a picture, clipped to it; None where the file does not list it.

        Args:
            name: As the file of boxes has it, or as `listed` finds it.
            size: (rows, columns).

        Raises:
            RequestError: A box lies wholly outside, and `drop_empty` is off.
        """
        listed = name if name in self.pictures else self.listed(name)
        if listed is None:
            return None
        rows = self.pictures[listed]
        kept = []
        limit = np.array([*size, *size], dtype=np.float64)
        for row in rows:
            box = np.clip(row.box, 0, limit)
            if not (box[2:] > box[:2]).all():
                if not self.drop_empty:
                    raise RequestError(
                        f"boxes {self.path}: {row.where}: the box lies outside its picture; correct it, or set boxes.drop_empty: true, "
                        "which leaves such boxes out and counts them"
                    )
                self.counts["dropped_outside"] += 1
                continue
            self.counts["clipped"] += int((box != row.box).any())
            kept.append((box, row))
        self.counts["pictures"] += 1
        self.counts["boxes"] += len(kept)
        self.counts["ignored"] += sum(row.ignore for _, row in kept)
        return PictureBoxes(
            np.array([box for box, _ in kept], dtype=np.float64).reshape(-1, 4),
            np.array([self.classes.index(row.label) for _, row in kept], dtype=np.int64),
            np.array([row.ignore for _, row in kept], dtype=bool),
            np.array([row.region for _, row in kept], dtype=bool),
        )


@dataclass(frozen=True)
class _Row:
    """One box and where it stands: `line 7`."""

    label: str
    box: np.ndarray
    ignore: bool
    where: str
    region: bool = False


def read_boxes(path: Path | str, *, classes: Sequence[str] | None = None, drop_empty: bool = False) -> BoxTable:
    """Read a file of boxes.

    Args:
        path: See the forms above.
        classes: Names of the classes; None takes those that the file has, sorted.
        drop_empty: Whether to leave out boxes without an area, and count them.

    Raises:
        RequestError: No such file or form, a box without an area, numbers that are none, or a class that is not listed.
    """
    path = Path(path)
    if not path.exists():
        raise RequestError(f"boxes {path}: nothing there; {FORMS}")
    kind = "folder" if path.is_dir() else path.suffix.lower()
    readers = {"folder": _read_voc, ".xml": _read_voc, ".json": _read_coco, ".csv": _read_csv}
    if kind not in readers:
        raise RequestError(f"boxes {path}: a file with suffix {path.suffix or '(none)'}; {FORMS}")
    pictures: dict[str, list[_Row]] = {}
    fixed: set[str] = set()
    dropped = 0
    for name, row in readers[kind](path):
        own = plain_name(name, path.parent)
        rows = pictures.setdefault(own, [])
        if is_fixed(name):
            fixed.add(own)
        if row is None:
            continue
        if not np.isfinite(row.box).all():
            raise RequestError(f"boxes {path}: {row.where}: an edge is not a number; correct it")
        if (row.box[2:] > row.box[:2]).all():
            rows.append(row)
        elif drop_empty:
            dropped += 1
        else:
            raise RequestError(
                f"boxes {path}: {row.where}: a box without an area ({_sides(row.box)}); correct it, or set boxes.drop_empty: true, which "
                "leaves such boxes out and counts them"
            )
    if not pictures:
        raise RequestError(f"boxes {path}: no picture in it; {FORMS}")
    found = sorted({row.label for rows in pictures.values() for row in rows})
    names = tuple(found) if classes is None else tuple(str(name) for name in classes)
    if len(set(names)) < len(names):
        raise RequestError(f"boxes.classes: {', '.join(names)}; give each class once")
    for row in (row for rows in pictures.values() for row in rows):
        if row.label not in names:
            raise RequestError(
                f"boxes {path}: {row.where}: a class that boxes.classes does not list; listed are "
                f"{', '.join(names)}: list it, or correct the file"
            )
    return BoxTable(path, names, pictures, drop_empty, Counter(dropped_empty=dropped), frozenset(fixed))


def _sides(box: np.ndarray) -> str:
    return f"{box[3] - box[1]:g} wide, {box[2] - box[0]:g} high"


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _box(left: Any, top: Any, right: Any, bottom: Any) -> np.ndarray:
    return np.array([_number(v) for v in (top, left, bottom, right)], dtype=np.float64)


def _flag(text: Any, path: Path, where: str) -> bool:
    word = str("" if text is None else text).strip().lower()
    if word not in YES + NO:
        raise RequestError(f"boxes {path}: {where}: ignore or difficult is neither 0 nor 1; correct it")
    return word in YES


def _read_csv(path: Path) -> Iterator[tuple[str, _Row | None]]:
    with open(path, newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        columns = reader.fieldnames or []
        missing = [name for name in COLUMNS if name not in columns]
        if missing:
            raise RequestError(
                f"boxes {path}: no column {', '.join(missing)}; it has {header_words(columns, (*COLUMNS, 'ignore'))}; needed: "
                f"{', '.join(COLUMNS)}; optional: ignore"
            )
        for line, row in enumerate(reader, start=2):
            name, label = (row["image"] or "").strip(), (row["class"] or "").strip()
            if not name:
                raise RequestError(f"boxes {path}: line {line}: no image; name one")
            edges = [row[key] for key in ("xmin", "ymin", "xmax", "ymax")]
            if not label and not any(edges):
                yield name, None
                continue
            if not label:
                raise RequestError(f"boxes {path}: line {line}: a box without a class; name one")
            yield name, _Row(label, _box(*edges), _flag(row.get("ignore"), path, f"line {line}"), f"line {line}")


def _read_voc(path: Path) -> Iterator[tuple[str, _Row | None]]:
    files = sorted(path.glob("*.xml")) if path.is_dir() else [path]
    if not files:
        raise RequestError(f"boxes {path}: no .xml file in this folder; {FORMS}")
    for number, file in enumerate(files, start=1):
        at = f"file {number} of {len(files)} in the order of names" if path.is_dir() else "the file"
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as err:
            raise RequestError(f"boxes {path}: {at}: not readable as XML (line {err.position[0]}); save it again") from None
        yield file.stem, None
        for place, item in enumerate(root.iter("object"), start=1):
            where = f"{at}, object {place}"
            edges = [item.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
            label = (item.findtext("name") or "").strip()
            if not label:
                raise RequestError(f"boxes {path}: {where}: a box without a class; name one")
            yield file.stem, _Row(label, _box(*edges), _flag(item.findtext("difficult"), path, where), where)


def _read_coco(path: Path) -> Iterator[tuple[str, _Row | None]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise RequestError(f"boxes {path}: not readable as JSON; save it as COCO instances") from err
    if not isinstance(content, dict):
        raise RequestError(f"boxes {path}: no COCO instances (a list of results, perhaps); save images, annotations and categories")
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(content.get(key), list)]
    if missing:
        raise RequestError(f"boxes {path}: no list {', '.join(missing)}; a COCO file has images, annotations and categories")
    names = {item["id"]: str(item["file_name"]) for item in content["images"]}
    double = sum(n for n in Counter(plain_name(name, path.parent) for name in names.values()).values() if n > 1)
    if double or len(names) < len(content["images"]):
        raise RequestError(
            f"boxes {path}: {double} of {len(content['images'])} images share a file name or an id with another; give each image an id and a "
            "path of its own"
        )
    labels = {item["id"]: str(item["name"]) for item in content["categories"]}
    for name in names.values():
        yield name, None
    for number, item in enumerate(content["annotations"], start=1):
        where = f"annotation {number}"
        if item.get("image_id") not in names or item.get("category_id") not in labels:
            raise RequestError(f"boxes {path}: {where}: its image or category is not listed; list it, or remove the annotation")
        values = [_number(v) for v in item.get("bbox") or ()]
        if len(values) != 4:
            raise RequestError(f"boxes {path}: {where}: bbox is not x, y, width, height; correct it")
        x, y, width, height = values
        crowd = bool(item.get("iscrowd", 0))
        row = _Row(labels[item["category_id"]], _box(x, y, x + width, y + height), crowd, where, crowd)
        yield names[item["image_id"]], row
