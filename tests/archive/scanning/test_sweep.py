"""What hospital storage does to a scan: errors that pass, outages, hung files, dead workers, partial listings."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medssl.archive.index import IndexSummary, ScanOptions, index
from medssl.archive.paths import to_path, to_text
from medssl.archive.scanning import listing, scan, sweep
from medssl.archive.table import Archive
from medssl.errors import RequestError, StoreError
from tests.synthetic import write_cohort
from tests.synthetic_tree import write_tree


def rows_of(out: Path) -> list[Any]:
    return Archive.open(out).select(rejected=True)


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[str, int], int | None]) -> dict[str, int]:
    """Make opening a path raise the error number that `fails(path, attempt)` returns."""
    real, tries = open, {}

    def fake(path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, str):
            tries[path] = tries.get(path, 0) + 1
            number = fails(path, tries[path])
            if number:
                raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(scan, "open", fake, raising=False)
    monkeypatch.setattr(scan, "PAUSES_S", (0.0, 0.0))
    return tries


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_transient_errors__are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    write_tree(tmp_path / "src", 1, 6)
    tries = failing(monkeypatch, lambda path, n: number if path.endswith("3") and n < 3 else None)
    summary = index([tmp_path / "src"], tmp_path / "out")
    assert summary.n_files_used == 6 and summary.reasons == {}
    assert max(tries.values()) == 3


def test_lasting_error__is_a_reason_and_tried_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path / "src", 1, 6)
    with monkeypatch.context() as patch:
        failing(patch, lambda path, n: errno.EIO if path.endswith("3") else None)
        assert index([tmp_path / "src"], tmp_path / "out").reasons["io_retry"] == 1
    summary = index([tmp_path / "src"], tmp_path / "out")
    assert (summary.n_files_scanned, summary.n_files_used, summary.reasons) == (1, 6, {})


def test_outage__stops_and_does_not_blame_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n = write_tree(tmp_path / "src", 8, 60)
    monkeypatch.setattr(sweep, "BATCH", 40)
    with monkeypatch.context() as patch:
        failing(patch, lambda path, _: errno.EIO if int(path[-3:]) >= 100 else None)
        with pytest.raises(StoreError, match=r"of the last \d+ files could not be read .* outage of the storage"):
            index([tmp_path / "src"], tmp_path / "out")
    summary = index([tmp_path / "src"], tmp_path / "out")
    assert (summary.n_files_used, summary.reasons) == (n, {})
    assert 0 < n - summary.n_files_scanned <= 400  # what was scanned before the outage is kept


def test_hung_file__is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path / "src", 1, 5)
    real = scan.scan_file
    monkeypatch.setattr(scan, "scan_file", lambda path: time.sleep(40) if path.endswith("2") else real(path))
    started = time.monotonic()
    summary = index([tmp_path / "src"], tmp_path / "out", options=ScanOptions(limit_s=1.5))
    assert time.monotonic() - started < 20
    assert summary.reasons["timeout"] == 1 and summary.n_files_seen == 5


def _dies(paths: list[str], **kwargs: Any) -> Any:
    if any(path.endswith("07") for path in paths):
        os._exit(9)
    return scan.scan_batch(paths, **kwargs)


def test_dead_worker__costs_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path / "src", 1, 12)
    monkeypatch.setattr(sweep, "PROCESSES_ABOVE", 0)
    monkeypatch.setattr(sweep, "BATCH", 4)
    monkeypatch.setattr(sweep, "scan_batch", _dies)
    summary = index([tmp_path / "src"], tmp_path / "out")
    assert summary.n_files_seen == 12 and summary.reasons.get("worker_lost") == 1


def test_processes_and_threads__same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path / "src", 3, 20)
    index([tmp_path / "src"], tmp_path / "a")
    monkeypatch.setattr(sweep, "PROCESSES_ABOVE", 0)
    monkeypatch.setattr(sweep, "BATCH", 8)
    key = tmp_path / "a" / "private" / "id.key"
    index([tmp_path / "src"], tmp_path / "b", key_file=key)
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")


def test_dask__same_rows(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="the extra cluster is not installed")
    write_tree(tmp_path / "src", 3, 20)
    index([tmp_path / "src"], tmp_path / "a")
    key = tmp_path / "a" / "private" / "id.key"
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None, protocol="tcp", host="127.0.0.1"
        ) as cluster,
        distributed.Client(cluster) as client,
        client.get_executor() as executor,
    ):
        summary = index([tmp_path / "src"], tmp_path / "b", key_file=key, options=ScanOptions(executor=executor))
    assert summary.n_files_scanned == 60
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")


def test_settle__young_files_wait_for_the_next_run(tmp_path: Path) -> None:
    write_tree(tmp_path / "src", 1, 4)
    old = sorted(path for path in (tmp_path / "src").rglob("*") if path.is_file())[:3]
    for path in old:
        os.utime(path, (1e9, 1e9))
    summary = index([tmp_path / "src"], tmp_path / "out", options=ScanOptions(settle_s=3600))
    assert (summary.n_files_used, summary.reasons) == (3, {"arriving": 1})
    assert index([tmp_path / "src"], tmp_path / "out").n_files_used == 4


def test_list__only_the_named_paths_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "src"
    write_tree(source, 4, 10)
    index([source], tmp_path / "out")
    key = tmp_path / "out" / "private" / "id.key"
    write_tree(source, 1, 10, start=3)  # series 3 again, under other names: duplicates
    write_tree(source, 1, 10, start=9)  # a new series
    gone = next(path for path in sorted(source.rglob("0_*")) if path.is_file())
    gone.unlink()
    new = [str(path) for path in source.rglob("*_*") if path.is_file() and not path.name.startswith("0_")]
    (tmp_path / "changes.txt").write_text("\n".join([*new, str(gone.relative_to(source))]))
    monkeypatch.setattr(listing, "walk", None)
    summary = index([source], tmp_path / "out", options=ScanOptions(only=tmp_path / "changes.txt"))
    assert summary.n_files_scanned == len(new) == 20
    assert summary.reasons == {"duplicate": 10, "vanished": 1}
    monkeypatch.undo()
    index([source], tmp_path / "whole", key_file=key)
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "out")
    (tmp_path / "changes.txt").write_text("/elsewhere/file")
    with pytest.raises(RequestError, match="line 1 lies outside the sources"):
        index([source], tmp_path / "out", options=ScanOptions(only=tmp_path / "changes.txt"))


def test_source__has_one_name_however_it_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    n = write_tree(source, 2, 3)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert index([Path("../src")], out).n_files_seen == n
    os.rmdir(tmp_path / "elsewhere")  # nothing depends on the way
    again = index([source], out)
    assert (again.n_files_seen, again.n_files_scanned, again.reasons) == (n, 0, {})
    monkeypatch.chdir(source)
    one = next(path for path in source.rglob("*") if path.is_file())
    (tmp_path / "changes.txt").write_text(f"{one.relative_to(source)}\n")
    assert index([Path("../src")], out, options=ScanOptions(only=tmp_path / "changes.txt")).n_files_seen == n


def test_source__keeps_the_name_of_an_index_that_kept_dots_and_links_lead_where_they_lead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    n = write_tree(source, 2, 3)
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "deep")
    write_tree(tmp_path / "far" / "src", 1, 2)
    assert index([tmp_path / "link" / ".." / "src"], tmp_path / "other").n_files_seen == 2  # far/src, not src
    dotted = tmp_path / "far" / ".." / "src"
    with monkeypatch.context() as patch:
        patch.setattr("medssl.archive.index._source", lambda path, known: path.absolute())  # as it was before
        index([dotted], out)
    again = index([source], out)
    assert (again.n_files_seen, again.n_files_scanned) == (n, 0)  # under its old name again, not twice
    assert list(json.loads((out / "private" / "state.json").read_text())["sources"]) == [str(dotted)]


def test_prune__unchanged_folders_are_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "src"
    write_tree(source, 4, 200)
    first = index([source], tmp_path / "out")
    real, listed = os.scandir, []

    def scandir(path: Any) -> Any:
        if str(path).startswith(str(source)):
            listed.append(str(path))
        return real(path)

    monkeypatch.setattr(listing.os, "scandir", scandir)
    second = index([source], tmp_path / "out", options=ScanOptions(prune=True))
    assert listed == [] and second.n_files_seen == first.n_files_seen and second.n_files_scanned == 0
    shutil.copy(next(iter(source.rglob("*_*"))), source / "000" / "01" / "copy")
    listed.clear()
    third = index([source], tmp_path / "out", options=ScanOptions(prune=True))
    assert listed == [str(source / "000" / "01")]
    assert third.n_files_seen == first.n_files_seen + 1 and third.reasons == {"duplicate": 1}


def incremental(tmp_path: Path, source: Path, change: Callable[[], object]) -> tuple[IndexSummary, list[Any], list[Any]]:
    """Index, change, index again; return the second summary and the rows beside those of a fresh index."""
    index([source], tmp_path / "out")
    change()
    second = index([source], tmp_path / "out")
    key = tmp_path / "out" / "private" / "id.key"
    index([source], tmp_path / "whole", key_file=key)
    return second, rows_of(tmp_path / "out"), rows_of(tmp_path / "whole")


def test_incremental__equals_an_index_from_nothing(tmp_path: Path) -> None:
    import pydicom

    source = tmp_path / "src"
    write_tree(source, 6, 8)
    write_cohort(source / "nifti", 2)
    files = sorted(path for path in source.rglob("0_*") if path.is_file())

    def change() -> None:
        files[0].unlink()  # one series shrinks
        shutil.copy(files[1], source / "copy")  # a duplicate appears, and goes to another series' group
        write_tree(source / "more", 2, 8, start=20)
        other = pydicom.dcmread(files[2])  # the same UID with other pixels
        other.PixelData = bytes(512)
        other.save_as(source / "conflict")
        person = pydicom.dcmread(files[3])  # the same PatientID on somebody of the other sex
        person.PatientSex = "M"
        person.StudyInstanceUID = person.SeriesInstanceUID = "1.2.3.4"
        person.SOPInstanceUID = "1.2.3.5"
        person.save_as(source / "person")

    second, found, expected = incremental(tmp_path, source, change)
    assert second.n_files_scanned == 19
    assert found == expected
    assert any("uid_conflict" in row.quality_flags for row in found) and any("patient_shared" in row.quality_flags for row in found)


def test_study_rank_and_best__by_date_and_slices(tmp_path: Path) -> None:
    source = tmp_path / "src"
    write_tree(source, 2, 8)  # two studies of one patient, dated alike
    rows = index([source], tmp_path / "out") and rows_of(tmp_path / "out")
    assert {row.patient_id for row in rows} == {rows[0].patient_id} and sorted(row.study_rank for row in rows) == [0, 1]
    assert all(row.best_in_study for row in rows) and sum(bool(row.best_in_patient) for row in rows) == 1


def test_odd_names__survive(tmp_path: Path) -> None:
    write_tree(tmp_path / "src", 1, 4)
    files = sorted(path for path in (tmp_path / "src").rglob("*") if path.is_file())
    os.rename(files[0], os.fsencode(tmp_path / "src") + b"/M\xfcller")
    os.rename(files[1], tmp_path / "src" / "with 'quote' and ü")
    summary = index([tmp_path / "src"], tmp_path / "out")
    archive = Archive.open(tmp_path / "out")
    assert summary.n_files_used == 4
    assert all(path.exists() for path in archive.files(archive.select()[0].series_id))
    name = os.fsdecode(b"/a/M\xfcller")
    assert to_path(to_text(name)) == name and to_text(name).encode()


def test_two_reads__and_one_open_for_a_dicom_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_data: Path) -> None:
    opened, reads = [], []
    real = open

    class Counting:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *args: object) -> None:
            self.handle.close()

        def read(self, n: int = -1) -> bytes:
            reads.append(n)
            return bytes(self.handle.read(n))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.handle, name)

    def fake(path: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(path)
        return Counting(real(path, *args, **kwargs))

    monkeypatch.setattr(scan, "open", fake, raising=False)
    for path in sorted((shared_data / "ct_ge_gantry_tilt").rglob("*.dcm"))[:5]:
        opened.clear()
        reads.clear()
        row = scan.scan_file(str(path))[0]
        assert row["kind"] == "dicom" and row["reason"] is None
        assert len(opened) == 1 and len(reads) <= 2
