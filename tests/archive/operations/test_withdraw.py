"""Withdrawal: every kind of request, what is deleted and what stays, doing it twice, indexing again, silence about people."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import duckdb
import pytest

from medssl.archive.ids import load_key
from medssl.archive.index import index
from medssl.archive.operations.decisions import apply_withdrawals, load_series, read_withdrawn
from medssl.archive.operations.split import split_archive
from medssl.archive.operations.withdraw import delete_items, read_request, withdraw
from medssl.archive.table import Archive, SeriesRow
from medssl.errors import RequestError
from medssl.sampling.items import freeze, items_hash
from medssl.sampling.items import write as write_items
from tests.archive.small import set_private, small_archive, write_scans


def ask(folder: Path, *lines: str) -> Path:
    (folder / "request.csv").write_text("kind,value,issuer\n" + "".join(f"{line}\n" for line in lines))
    return folder / "request.csv"


def patient_of(archive: Archive, number: int) -> str:
    return load_key(archive.path / "private" / "id.key").make("patient", "unknown", f"P{number:04d}")


def withdrawn(archive: Archive) -> list[SeriesRow]:
    return [row for row in archive.select(rejected=True) if row.reason == "withdrawn"]


def file_reasons(archive: Archive) -> Counter[str | None]:
    parts = json.loads((archive.path / "files.parquet" / "manifest.json").read_text())["parts"]
    assert {path.name for path in (archive.path / "files.parquet").glob("*.parquet")} == set(parts)
    return Counter(
        row[0] for part in parts for row in duckdb.sql(f"SELECT reason FROM '{archive.path / 'files.parquet' / part}'").fetchall()
    )


def test_withdraw__by_patient_id_keeps_splits_and_everybody_else(tmp_path: Path) -> None:
    archive = small_archive(tmp_path, 5)
    split_archive(archive, {"train": 0.6, "val": 0.2, "test": 0.2})
    before = {row.series_id: row for row in archive.select()}
    done = withdraw(archive, ask(tmp_path, "patient,P0002,", "patient,ABSENT,"))
    assert (done.n_series, done.n_new, done.n_patients) == (1, 1, 1)
    assert done.n_lines == {"patient": 2} and done.n_unmatched == {"patient": 1} and done.n_several == 0
    (row,) = withdrawn(archive)
    assert row.patient_id == patient_of(archive, 2)
    assert replace(row, status=before[row.series_id].status, reason=None) == before[row.series_id]  # its split stays too
    assert {one.series_id: one for one in archive.select()} == {name: one for name, one in before.items() if name != row.series_id}
    assert file_reasons(archive) == {None: 8, "withdrawn": 2}
    summary = json.loads((archive.path / "summary.json").read_text())
    assert summary["n_series_usable"] == 4 and summary["reasons"] == {"withdrawn": 2} and summary["n_files_used"] == 8
    assert summary["n_files_seen"] == summary["n_files_used"] + sum(summary["reasons"].values())
    # The pseudonym, never the PatientID, is what is remembered.
    kept = (archive.path / "private" / "withdrawn.parquet").read_bytes()
    assert b"P0002" not in kept and b"ABSENT" not in kept
    assert ("patient_id", row.patient_id) in read_withdrawn(archive.path / "private")


def test_withdraw__twice_is_once(tmp_path: Path) -> None:
    archive = small_archive(tmp_path, 3)
    request = ask(tmp_path, "patient,P0001,")
    withdraw(archive, request)
    rows, reasons = archive.select(rejected=True), file_reasons(archive)
    again = withdraw(Archive.open(archive.path), request)
    assert (again.n_series, again.n_new) == (1, 0)
    assert archive.select(rejected=True) == rows and file_reasons(archive) == reasons
    assert len(withdrawn(archive)) == 1
    # Another request adds to the first.
    assert withdraw(archive, ask(tmp_path, "patient,P0002,")).n_series == 2


@pytest.mark.parametrize("kind", ["patient_id", "study_id", "series_id", "study_uid", "accession", "mrn"])
def test_withdraw__every_kind(tmp_path: Path, kind: str) -> None:
    from pydicom.uid import generate_uid

    archive = small_archive(tmp_path, 3)
    wanted = next(row for row in archive.select() if row.patient_id == patient_of(archive, 1))
    uid = generate_uid(entropy_srcs=["P 1", "study"])
    set_private(archive, {wanted.series_id: {"accession": "ACC00001", "mrn": "OTHER7"}})
    values = {"study_uid": uid, "accession": "ACC00001", "mrn": "OTHER7"}
    value = values.get(kind) or getattr(wanted, kind)
    done = withdraw(archive, ask(tmp_path, f"{kind},{value},"))
    assert [row.series_id for row in withdrawn(archive)] == [wanted.series_id] and done.n_unmatched == {}


def test_withdraw__what_comes_back_is_withdrawn_again(tmp_path: Path) -> None:
    """`medssl index` applies the decisions with the same function."""
    archive = small_archive(tmp_path, 4)
    series = next(row.series_id for row in archive.select() if row.patient_id == patient_of(archive, 3))
    withdraw(archive, ask(tmp_path, "patient,P0001,", "patient,P0005,", f"series_id,{series},"))
    write_scans(tmp_path / "src", range(5, 6))  # of a patient who was withdrawn before coming
    index([tmp_path / "src"], archive.path)
    archive, private = Archive.open(archive.path), archive.path / "private"
    with duckdb.connect() as connection:
        load_series(archive, connection)
        connection.execute("UPDATE s SET status = 'ok', reason = NULL, series_id = md5(series_id) WHERE series_id = ?", [series])
        connection.execute(f"CREATE VIEW p AS SELECT * FROM '{private / 'series.parquet'}'")
        connection.execute(
            f"CREATE TABLE f AS SELECT CASE WHEN series_id = '{series}' THEN md5(series_id) ELSE series_id END AS series_id, digest "
            f"FROM '{private / 'files.parquet'}'"
        )
        columns = [row[0] for row in connection.execute("DESCRIBE p").fetchall()]
        apply_withdrawals(connection, private, accession="accession" in columns)
        found = connection.execute("SELECT patient_id FROM s WHERE reason = 'withdrawn' AND status = 'rejected'").fetchall()
    # 3 has another series id now and is known by its files
    assert {row[0] for row in found} == {patient_of(archive, n) for n in (1, 3, 5)}


def test_withdraw__chunks_embeddings_runs_and_exports(tmp_path: Path) -> None:
    archive = small_archive(tmp_path, 3)
    rows = archive.select()
    bad = next(row for row in rows if row.patient_id == patient_of(archive, 0))
    store, embeddings = archive.path / "store" / "mri-0123456789abcdef" / "items", tmp_path / "embeddings" / "cafe"
    extra = tmp_path / "elsewhere" / "items"
    for folder in (store, embeddings, extra):
        folder.mkdir(parents=True)
    (store.parent / "manifest.json").write_text("{}")
    for row in rows:
        for name in (
            f"{row.series_id}.json",
            f"{row.series_id}.b2nd",
            f"{row.series_id}.valid.b2nd",
            f".tmp-9-{row.series_id}.b2nd",
        ):
            (store / name).write_text("x")
        (embeddings / f"{row.series_id}.b2nd").write_text("x")
        (extra / f"{row.series_id}.json").write_text("x")
    saw, clean = tmp_path / "runs" / "saw", tmp_path / "runs" / "clean"
    for run, chosen in ((saw, rows), (clean, [row for row in rows if row is not bad])):
        items = freeze([("main", "archive", row.series_id, row.patient_id, "train") for row in chosen])
        (run / "weights" / "last").mkdir(parents=True)
        write_items(items, run / "items.parquet")
        (run / "run.json").write_text(json.dumps({"items_hash": items_hash(items)}))
        (run / "weights" / "last" / "encoder.json").write_text(json.dumps({"items_hash": items_hash(items)}))
        (tmp_path / "runs" / f"export_{run.name}").mkdir()
        (tmp_path / "runs" / f"export_{run.name}" / "manifest.json").write_text(json.dumps({"items_hash": items_hash(items)}))
    done = withdraw(
        archive,
        ask(tmp_path, "patient,P0000,"),
        stores=[tmp_path / "elsewhere"],
        embeddings=[tmp_path / "embeddings"],
        runs=[tmp_path / "runs"],
    )
    assert (done.n_stored, done.n_embeddings) == (5, 1)
    left = [path.name for folder in (store, embeddings, extra) for path in folder.iterdir()]
    assert len(left) == 2 * 6 and not any(bad.series_id in name for name in left)
    assert (store.parent / "manifest.json").exists()
    assert done.runs == [{"run": str(saw), "series": 1, "splits": {"train": 1}}]
    assert done.exports == [
        str(tmp_path / "runs" / "export_saw" / "manifest.json"),
        str(saw / "weights" / "last" / "encoder.json"),
    ]


def test_delete_items__leaves_links_targets_and_longer_names(tmp_path: Path) -> None:
    name = "a" * 32
    (tmp_path / "store").mkdir()
    (tmp_path / "outside.b2nd").write_text("x")
    (tmp_path / "store" / f"{name}.b2nd").symlink_to(tmp_path / "outside.b2nd")
    (tmp_path / "store" / f"{name}b.b2nd").write_text("x")
    assert delete_items(tmp_path / "store", [name]) == 1
    assert (tmp_path / "outside.b2nd").exists() and (tmp_path / "store" / f"{name}b.b2nd").exists()


def test_withdraw__one_patient_id_at_two_sites(tmp_path: Path) -> None:
    write_scans(tmp_path / "a", range(1))
    write_scans(tmp_path / "b", range(1), shift=9, StudyInstanceUID="1.2.3")
    index([tmp_path / "a"], tmp_path / "out", site="A")
    index([tmp_path / "b"], tmp_path / "out", site="B")
    archive = Archive.open(tmp_path / "out")
    one = withdraw(archive, ask(tmp_path, "patient,P0000,B"))
    assert one.n_series == 1 and one.n_several == 0 and withdrawn(archive)[0].site == "B"
    both = withdraw(archive, ask(tmp_path, "patient,P0000,"))
    assert both.n_series == 2 and both.n_several == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind,value\nP0002\n", "line 2: the first column is no kind; patient, patient_id"),
        ("paitent,P0002\n", r'line 1: the first column is no kind \(did you mean "patient"\?\)'),
        ("patient,\n", "line 1: no value"),
        ("kind,value\n# nothing\n", "lists nothing"),
    ],
)
def test_request__faults_say_where_and_never_what(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(RequestError, match=message) as caught:
        read_request(tmp_path / "r.csv")
    assert "P0002" not in str(caught.value)


def test_withdraw__wrong_folder_writes_nothing(tmp_path: Path) -> None:
    archive = small_archive(tmp_path, 1)
    with pytest.raises(RequestError, match="is not a folder"):
        withdraw(archive, ask(tmp_path, "patient,P0000,"), stores=[tmp_path / "no"])
    assert not (archive.path / "private" / "withdrawn.parquet").exists() and withdrawn(archive) == []
