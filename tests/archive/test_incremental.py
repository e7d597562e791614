"""Indexing again what has changed: the same tables as from nothing, whatever changed and wherever a run was cut off."""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from medssl.archive import grouping, known
from medssl.archive._parquet import short
from medssl.archive.index import ScanOptions, index
from medssl.archive.operations.split import split_archive
from medssl.archive.operations.withdraw import withdraw
from medssl.archive.table import Archive
from tests.archive.test_columns import twins
from tests.synthetic import plain_affine, write_itk, write_nifti
from tests.synthetic_multiframe import write_enhanced
from tests.synthetic_tree import template, write_tree

DECISIONS = ("id.key", "splits.parquet", "withdrawn.parquet")


class Killed(BaseException):
    """Stands for a kill between two steps."""


@contextmanager
def killed_after(steps: int) -> Iterator[None]:
    """Raise at a replacement of a file after so many of them."""
    real, left = os.replace, [steps]

    def replace(source: Any, target: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        real(source, target)

    os.replace = replace  # type: ignore[assignment]
    try:
        yield
    except Killed:
        pass
    finally:
        os.replace = real


def tables(out: Path) -> dict[str, list[str]]:
    """Return the rows of every table that an index leaves, sorted, and its counts."""
    parts = json.loads((out / "files.parquet" / "manifest.json").read_text())["parts"]
    queries = {
        name: f"'{out / name}'"
        for name in ("series.parquet", *(f"private/{n}.parquet" for n in ("series", "files", "rows", "marks")))
    }
    queries["files"] = f"read_parquet({[str(out / 'files.parquet' / part) for part in parts]})"
    queries["listing"] = f"(FROM '{out / 'private' / 'listing.parquet'}' WHERE reason IS DISTINCT FROM 'folder')"
    found = {name: sorted(map(repr, duckdb.sql(f"SELECT * FROM {query}").fetchall())) for name, query in queries.items()}
    summary = json.loads((out / "summary.json").read_text())
    return {**found, "summary": sorted(f"{name}: {value}" for name, value in summary.items() if name != "n_files_scanned")}


def from_nothing(source: Path, out: Path, folder: Path) -> dict[str, list[str]]:
    """Return the tables of a new index with the key and the decisions of another one."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "private").mkdir(parents=True)
    for name in DECISIONS:
        if (out / "private" / name).exists():
            shutil.copy(out / "private" / name, folder / "private" / name)
    index([source], folder)
    return tables(folder)


class Tree:
    """A tree of files that changes at random.

    Args:
        folder: Where it lies.
        seed: Of the changes.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.root, self.attic, self.rng = folder / "src", folder / "attic", random.Random(seed)
        self.n, self.gone = 0, {}  # type: int, dict[Path, Path]
        self.touched: list[Path] = []
        self.vanished = False
        write_tree(self.root, 5, 4)
        self.attic.mkdir()
        (folder / "twins").mkdir()
        self.pairs = sorted(twins(folder / "twins").iterdir())
        self.volume = np.arange(60, dtype=np.int16).reshape(3, 4, 5)

    def change(self, n: int) -> None:
        """Make some changes."""
        self.touched, self.vanished = [], False
        kinds = (
            self.add, self.rewrite, self.delete, self.restore, self.copy, self.conflict, self.person, self.twin, self.detached,
            self.container, self.volume_file, self.odd, self.rename,
        )  # fmt: skip
        for kind in self.rng.choices(kinds, k=n):
            self.n += 1
            kind()

    def one(self, name: str = "*_*") -> Path:
        return self.rng.choice(sorted(path for path in self.root.rglob(name) if path.is_file() and path.stat().st_size > 1000))

    def put(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)
        self.touched.append(path)

    def add(self) -> None:
        write_tree(self.root / f"more{self.n}", 1, 3, start=self.rng.randrange(8))
        self.touched += [path for path in (self.root / f"more{self.n}").rglob("*_*") if path.is_file()]

    def rewrite(self) -> None:
        path = self.one()
        self.put(path, path.read_bytes()[:-1] + bytes([self.n % 256]))

    def delete(self) -> None:
        path = self.one()
        self.gone[path] = self.attic / f"{self.n}"
        path.rename(self.gone[path])
        self.vanished = True

    def restore(self) -> None:
        for path, place in self.gone.items():
            place.rename(path)  # with the time that it had
            self.touched.append(path)
        self.gone.clear()

    def copy(self) -> None:
        self.put(self.root / f"copy_{self.n}", self.one().read_bytes())

    def conflict(self) -> None:
        self.put(self.root / f"conflict_{self.n}", self.one().read_bytes()[:-1] + bytes([self.n % 256]))

    def person(self) -> None:
        path = self.one()
        data = path.read_bytes()
        at = template()[0].index(b"F ", template()[0].index(b"P2000000"))
        self.put(path, data[:at] + self.rng.choice([b"M ", b"F "]) + data[at + 2 :])

    def twin(self) -> None:
        made = self.rng.choice(self.pairs)
        path = self.root / made.name
        if path.exists():
            path.unlink()
            self.vanished = True
        else:
            self.put(path, made.read_bytes())

    def detached(self) -> None:
        path = self.root / "detached.mhd"
        if not path.exists():
            write_itk(path, self.volume, np.eye(4))
        elif self.rng.random() < 0.5:
            path.with_suffix(".raw").write_bytes((self.volume + self.n).tobytes())
        else:
            path.unlink()
            self.vanished = True
            return
        self.touched += [path, path.with_suffix(".raw")]

    def container(self) -> None:
        path = self.root / "some.zip"
        with zipfile.ZipFile(path, "w") as handle:
            for k in range(self.rng.randrange(1, 4)):
                handle.write(self.one(), f"{k}.dcm")
        self.touched.append(path)

    def volume_file(self) -> None:
        path = self.root / "volume.nii"
        write_nifti(path, self.volume + self.n, np.eye(4))
        side = self.root / "volume.json"
        if side.exists():
            side.unlink()
            self.vanished = True
        else:
            self.put(side, json.dumps({"Modality": "MR", "EchoTime": 0.01}).encode())
        self.touched.append(path)

    def odd(self) -> None:
        link = self.root / "link"
        if link.is_symlink():
            link.unlink()
            self.vanished = True
        else:
            link.symlink_to(self.root / "nowhere")
            self.touched.append(link)
        self.put(self.root / f"text_{self.n}", b"x" * self.rng.randrange(3))

    def rename(self) -> None:
        path = self.one()
        target = path.with_name(f"renamed_{self.n}")
        path.rename(target)
        self.vanished = True


def replay(folder: Path, seed: int, steps: int) -> int:
    """Change a tree and index it step by step; after each run that ends the tables are those of an index from nothing."""
    tree, out = Tree(folder, seed), folder / "out"
    index([tree.root], out)
    compared = 0
    for step in range(steps):
        tree.change(tree.rng.randrange(1, 6))
        only = None
        if not tree.vanished and tree.touched and tree.rng.random() < 0.6:
            only = folder / "list.txt"
            only.write_text("\n".join(map(str, tree.touched)))
        if tree.rng.random() < 0.3:
            with killed_after(tree.rng.randrange(20)):
                index([tree.root], out, options=ScanOptions(only=only))
        index([tree.root], out, options=ScanOptions(only=only))
        found, expected = tables(out), from_nothing(tree.root, out, folder / "whole")
        assert found == expected, (seed, step)
        compared += 1
        if tree.rng.random() < 0.2:
            archive = Archive.open(out)
            if tree.rng.random() < 0.5:
                split_archive(archive, {"train": 0.4, "val": 0.3, "test": 0.3})
            else:
                (folder / "request.csv").write_text(f"kind,value\npatient,P{tree.rng.randrange(6):07d}\n")
                withdraw(archive, folder / "request.csv")
    return compared


@pytest.mark.parametrize(("seed", "share"), [(0, 0.0), (1, 0.05), (2, 1.0)])
def test_random_changes__tables_as_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, share: float) -> None:
    monkeypatch.setattr(known, "RECENT_SHARE", share)
    assert replay(tmp_path, seed, 3) == 3


def test_known_files__of_another_form_or_damaged_are_made_again(tmp_path: Path) -> None:
    write_tree(tmp_path / "src", 3, 4)
    index([tmp_path / "src"], tmp_path / "out")
    private = tmp_path / "out" / "private"
    path, people, expected = private / "known.parquet", private / "people.parquet", tables(tmp_path / "out")
    whole = path.read_bytes()
    for damage in (
        path.unlink,  # an index of before
        people.unlink,
        lambda: path.write_bytes(b"PAR1"),
        lambda: duckdb.sql("SELECT 1 AS part").write_parquet(str(path)),
    ):
        damage()
        assert index([tmp_path / "src"], tmp_path / "out").n_files_scanned == 0
        assert tables(tmp_path / "out") == expected
        assert path.read_bytes() == whole and people.exists()


def test_scan_parts__taken_away_are_scanned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medssl.archive.scanning.sweep.BATCH", 5)
    write_tree(tmp_path / "src", 3, 4)
    index([tmp_path / "src"], tmp_path / "out")
    expected = tables(tmp_path / "out")
    for number, n in ((1, 5), (3, 5)):
        (tmp_path / "out" / "private" / "scan" / f"part-{number:08d}.parquet").unlink()
        assert index([tmp_path / "src"], tmp_path / "out").n_files_scanned == n
        assert tables(tmp_path / "out") == expected


def test_files_that_come_back__unchanged_need_no_scan(tmp_path: Path) -> None:
    source = tmp_path / "src"
    write_tree(source, 3, 4)
    index([source], tmp_path / "out")
    before = tables(tmp_path / "out")
    files = sorted(path for path in source.rglob("0_*") if path.is_file())[:5]
    for path in files:
        path.rename(tmp_path / path.name)
    assert index([source], tmp_path / "out").n_files_seen == 7
    for path in files:
        (tmp_path / path.name).rename(path)
    assert index([source], tmp_path / "out").n_files_scanned == 0
    assert tables(tmp_path / "out") == before


def count_built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the path of the first file of every group that is built from now on."""
    built: list[str] = []
    real = grouping.build_group

    def build(files: Any, *rest: Any) -> Any:
        built.append(files[0].path)
        return real(files, *rest)

    monkeypatch.setattr(grouping, "build_group", build)
    return built


def rewritten(path: Path, at: int, value: bytes) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:at] + value + data[at:][len(value) :])


def test_files_with_other_pixels__leave_rows_and_get_new_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    write_tree(source, 6, 4)
    files = sorted(path for path in source.rglob("0_*") if path.is_file())
    index([source], out)
    before, archive = tables(out), Archive.open(out)
    tags = {row.series_id: archive.source_tag(row.series_id) for row in archive.select()}
    built = count_built(monkeypatch)
    os.utime(files[5], ns=(1, 1))  # the digest of a large file does not cover all of it: the tag follows the time too
    index([source], out)
    assert built == [] and tables(out)["series.parquet"] == before["series.parquet"] and tables(out)["files"] == before["files"]
    archive = Archive.open(out)
    assert {name for name, tag in tags.items() if archive.source_tag(name) != tag} == {
        name for name in tags if files[5] in archive.files(name)
    }
    tags = {name: archive.source_tag(name) for name in tags}
    for k, path in enumerate(files[:5]):
        rewritten(path, path.stat().st_size - 1, bytes([200 + k]))
    index([source], out)
    assert built == []
    found = tables(out)
    assert found["series.parquet"] == before["series.parquet"]
    assert len(set(found["files"]) - set(before["files"])) == 5
    archive = Archive.open(out)
    touched = {name for name, tag in tags.items() if archive.source_tag(name) != tag}
    names = {str(path) for path in files[:5]}
    assert touched == {name for name in tags if names & {str(path) for path in archive.files(name)}}
    monkeypatch.undo()
    assert found == from_nothing(source, out, tmp_path / "whole")


def test_a_file_with_another_header__builds_its_group_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    write_tree(source, 6, 4)
    path = min(path for path in source.rglob("0_*") if path.is_file())
    index([source], out)
    built = count_built(monkeypatch)
    rewritten(path, template()[1]["z"], b"0000099")
    index([source], out)
    assert len(built) == 1
    monkeypatch.undo()
    assert tables(out) == from_nothing(source, out, tmp_path / "whole")


def test_members_of_a_container__are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path / "loose", 3, 4)
    files = sorted(path for path in (tmp_path / "loose").rglob("0_*") if path.is_file())
    source, out = tmp_path / "src", tmp_path / "out"
    source.mkdir()

    def pack() -> None:
        with zipfile.ZipFile(source / "some.zip", "w") as handle:
            for k, path in enumerate(files):
                handle.write(path, f"{k}.dcm")

    pack()
    index([source], out)
    built = count_built(monkeypatch)
    index([source], out)
    assert built == []
    rewritten(files[0], files[0].stat().st_size - 1, b"\x07")
    pack()
    index([source], out)
    assert built == [str(source / "some.zip")]
    monkeypatch.undo()
    assert tables(out) == from_nothing(source, out, tmp_path / "whole")


def test_an_index_of_an_older_form__is_built_again(tmp_path: Path) -> None:
    """Tables of another version may lack columns that changes are told by."""
    source, out = tmp_path / "src", tmp_path / "out"
    write_tree(source, 2, 3)
    index([source], out)
    kept, private = tables(out), out / "private"
    grouped = json.loads((private / "grouped.json").read_text())
    (private / "grouped.json").write_text(json.dumps({**grouped, "format": grouped["format"] - 1}))
    older = duckdb.sql(f"SELECT * EXCLUDE (path_id), 1::BIGINT AS source_id FROM read_parquet('{private / 'files.parquet'}')")
    older.write_parquet(str(private / "aside.parquet"))
    (private / "aside.parquet").replace(private / "files.parquet")
    index([source], out)
    assert tables(out) == kept


def test_files_of_one_number__keep_their_order_when_pixels_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    write_tree(source, 1, 6)
    files = sorted(path for path in source.rglob("0_*") if path.is_file())
    for path in files:
        rewritten(path, template()[1]["number"], b"0000001")
    index([source], out)
    built = count_built(monkeypatch)
    for k, path in enumerate(files):
        rewritten(path, path.stat().st_size - 1, bytes([200 + k]))
    index([source], out)
    assert built == []
    monkeypatch.undo()
    assert tables(out) == from_nothing(source, out, tmp_path / "whole")


def test_a_file_of_several_series__is_built_again_when_its_pixels_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pydicom

    source, out = tmp_path / "src", tmp_path / "out"
    write_tree(source, 1, 3)
    path = write_enhanced(source / "many.dcm", np.zeros((8, 5, 6), np.uint16), plain_affine(), [0, 1, 2, 3] * 2)
    values = pydicom.dcmread(path)
    values.SOPInstanceUID, values.SeriesInstanceUID = "1.2.3.4", "1.2.3.5"
    values.save_as(path)
    index([source], out)
    before = {row.series_id: Archive.open(out).source_tag(row.series_id) for row in Archive.open(out).select("kind = 'volume'")}
    built = count_built(monkeypatch)
    rewritten(path, path.stat().st_size - 1, b"\x07")
    index([source], out)
    after = {name: Archive.open(out).source_tag(name) for name in before}
    assert built == [str(path)] and sum(after[name] != tag for name, tag in before.items()) == 2
    monkeypatch.undo()
    assert tables(out) == from_nothing(source, out, tmp_path / "whole")


@pytest.mark.parametrize("prefix", ["/a", "/pacs/one/t/200000", "/pacs/one/t/2000000"])
def test_short__tells_paths_apart_that_differ_in_digits(prefix: str) -> None:
    """DuckDB's own hash takes some of such paths for others; most series of a tree were built again for nothing."""
    paths = f"SELECT printf('{prefix}/%03d/%02d/0_%07d', i // 1000, (i // 100) % 10, i) AS path FROM range(200000) t(i)"
    (counts,) = duckdb.sql(f"SELECT count(DISTINCT path), count(DISTINCT {short('path')}) FROM ({paths})").fetchall()
    assert counts == (200_000, 200_000)
