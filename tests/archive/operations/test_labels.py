"""Labels by every key; what does not match is counted and never shown; identifiers stay behind."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from pydicom.uid import generate_uid

from medssl.archive.ids import load_key
from medssl.archive.index import index
from medssl.archive.operations.labels import REASONS, attach, read_date
from medssl.archive.table import Archive
from medssl.errors import RequestError
from tests.archive.small import set_private, small_archive, write_scans


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Six patients; the owner-only columns as the header pass fills them."""
    root = tmp_path_factory.mktemp("labels")
    found = small_archive(root, 6)
    by_patient = patients(found)
    values = {
        by_patient[n]: {"accession": f"ACC{n:05d}", "mrn": f"P{n:04d}", "study_date": f"2019{n % 12 + 1:02d}15"} for n in range(6)
    }
    set_private(found, values)
    uids = {}
    for series in by_patient.values():
        uids[series] = {"sop_uid": None}
    set_private(found, uids, "files")
    return found


def patients(archive: Archive) -> dict[int, str]:
    """Return patient number -> series id."""
    key = load_key(archive.path / "private" / "id.key")
    numbers = {key.make("patient", "unknown", f"P{n:04d}"): n for n in range(20)}
    return {numbers[row.patient_id]: row.series_id for row in archive.select(rejected=True)}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def read(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="") as handle:
        return {row.pop("series_id"): row for row in csv.DictReader(handle)}


KEYED = {
    "accession": ("AccessionNumber", lambda n: f"ACC{n:05d}"),
    "study_uid": ("StudyInstanceUID", lambda n: str(generate_uid(entropy_srcs=[f"P {n}", "study"]))),
    "path": ("path", lambda n: f"{n:04d}"),
    "mrn_date": ("mrn,Study Date", lambda n: f"P{n:04d},2019-{n % 12 + 1:02d}-15"),
}


@pytest.mark.parametrize("by", KEYED)
def test_attach__by_every_key(archive: Archive, tmp_path: Path, by: str) -> None:
    column, key = KEYED[by]
    lines = "".join(f"{key(n)},{n * 1.5},{'yes' if n % 2 else 'no'}\n" for n in (4, 0, 5))
    missing = "NOBODY,2019-01-01" if by == "mrn_date" else "NOBODY"
    empty = "," if by == "mrn_date" else ""
    table = write(tmp_path / "l.csv", f"{column},volume_ml,tumour\n{lines}{missing},9,no\n{empty},1,no\n")
    done = attach(archive, table, tmp_path / "out.csv", by=by)
    series = patients(archive)
    assert read(tmp_path / "out.csv") == {
        series[4]: {"volume_ml": "6.0", "tumour": "no"},
        series[0]: {"volume_ml": "0.0", "tumour": "no"},
        series[5]: {"volume_ml": "7.5", "tumour": "yes"},
    }
    assert (done.n_lines, done.n_series, done.n_patients, done.columns) == (5, 3, 3, ["volume_ml", "tumour"])
    assert done.lines == {"matched": 3, "no_key": 1, "no_match": 1} and set(done.lines) <= set(REASONS)
    assert (tmp_path / "out.csv").stat().st_mode & 0o077 == 0
    text = (tmp_path / "out.csv").read_text()
    assert not any(word in text for word in ("ACC", "P00", "2019", "NOBODY", "1.2.826"))


def test_attach__by_sop_uid(archive: Archive, tmp_path: Path) -> None:
    series = patients(archive)
    set_private(
        archive, {series[1]: {"sop_uid": "1.2.3.4.5"}, series[2]: {"sop_uid": "1.2.9"}, series[3]: {"sop_uid": "1.2.9"}}, "files"
    )
    table = write(tmp_path / "l.csv", "SOPInstanceUID,grade\n1.2.3.4.5,2\n1.2.9,3\n")
    done = attach(archive, table, tmp_path / "out.csv", by="sop_uid")
    assert read(tmp_path / "out.csv") == {series[1]: {"grade": "2"}}
    assert done.lines == {"matched": 1, "several_patients": 1}


def test_attach__path_of_a_file_and_ambiguous_names(archive: Archive, tmp_path: Path) -> None:
    series = patients(archive)
    first = archive.files(series[2])[0]
    table = write(tmp_path / "l.csv", f"file,x\n{first},1\n./0003/{first.name},2\n{first.name},3\nnope/0004,4\n")
    done = attach(archive, table, tmp_path / "out.csv", by="path")
    assert read(tmp_path / "out.csv") == {series[2]: {"x": "1"}, series[3]: {"x": "2"}}
    assert done.lines == {"matched": 2, "no_match": 1, "several_patients": 1}


def test_attach__ambiguous_and_conflicting_lines_are_left_out(archive: Archive, tmp_path: Path) -> None:
    series = patients(archive)
    lines = ["ACC00000,1", "ACC00000,1", "ACC00001,1", "ACC00001,2", "ACC00001,2", "ACC00002,5"]
    table = write(tmp_path / "l.csv", "accession,x\n" + "\n".join(lines) + "\n")
    done = attach(archive, table, tmp_path / "out.csv", by="accession")
    assert read(tmp_path / "out.csv") == {series[0]: {"x": "1"}, series[2]: {"x": "5"}}
    assert done.lines == {"matched": 2, "conflicting_labels": 3, "repeated": 1}
    narrowed = attach(archive, table, tmp_path / "out.csv", by="accession", where=f"series_id <> '{series[2]}'")
    assert narrowed.lines["no_usable_series"] == 1


def test_attach__two_studies_under_one_key(tmp_path: Path) -> None:
    write_scans(tmp_path / "src", [1])
    write_scans(tmp_path / "src" / "later", [1], shift=5, StudyInstanceUID="1.2.3")
    index([tmp_path / "src"], tmp_path / "out")
    archive = Archive.open(tmp_path / "out")
    rows = archive.select()
    assert len({row.patient_id for row in rows}) == 1 and len({row.study_id for row in rows}) == 2
    set_private(archive, {row.series_id: {"accession": "A7", "mrn": "P0001", "study_date": "20190215"} for row in rows})
    table = write(tmp_path / "l.csv", "mrn,date,x\nP0001,15.02.2019,1\nP0001,02/15/2019,1\n")
    done = attach(archive, table, tmp_path / "out.csv", by="mrn_date")
    assert done.lines == {"bad_date": 1, "several_studies": 1} and read(tmp_path / "out.csv") == {}


@pytest.mark.parametrize(
    ("header", "cell", "message"),
    [
        ("PatientName", "x", "named like an identifier"),
        ("birth date", "x", "named like an identifier"),
        ("reading_report", "x", "named like an identifier"),
        ("finding", "DOE^JANE", "looks like a name"),
        ("finding", "seen 2019-03-05", "looks like a date"),
        ("finding", "1.2.840.10008.1", "looks like a UID"),
        ("finding", "jane@example.org", "looks like an address"),
        ("finding", "a nodule in the upper lobe of the left lung", "more than 40 characters"),
        ("finding", "ACC{n:05d}", "patient identities or accession numbers"),
        ("finding", "201903{n:02d}", "looks like a date"),
        ("series_id", "1", "would hide"),
    ],
)
def test_attach__refuses_what_is_no_label(archive: Archive, tmp_path: Path, header: str, cell: str, message: str) -> None:
    lines = "".join(f"ACC{n:05d},{cell.format(n=n + 1)},1\n" for n in range(4))
    table = write(tmp_path / "l.csv", f"accession,{header},x\n{lines}")
    with pytest.raises(RequestError, match=message) as caught:
        attach(archive, table, tmp_path / "out.csv", by="accession")
    assert "ACC0" not in str(caught.value) and "DOE" not in str(caught.value)
    assert not (tmp_path / "out.csv").exists()
    assert attach(archive, table, tmp_path / "out.csv", by="accession", columns=["x"]).n_series == 4


def test_attach__many_words_refused_and_numbers_fine(archive: Archive, tmp_path: Path) -> None:
    table = write(
        tmp_path / "l.csv", "accession,word\n" + "".join(f"A{n},word {chr(97 + n // 26)}{chr(97 + n % 26)}\n" for n in range(70))
    )
    with pytest.raises(RequestError, match="more than 64 different words"):
        attach(archive, table, tmp_path / "out.csv", by="accession")
    table = write(tmp_path / "n.csv", "accession,volume\n" + "".join(f"ACC{n:05d},{20190301.5 + n * 7:.1f}\n" for n in range(6)))
    assert attach(archive, table, tmp_path / "out.csv", by="accession").n_series == 6


def test_attach__wrong_requests(archive: Archive, tmp_path: Path) -> None:
    table = write(tmp_path / "l.csv", "accession,x\nA,1\n")
    for options, message in [
        (dict(by="acession"), r'did you mean "accession"'),
        (dict(by="path"), "no column for --by path; exactly one named path"),
        (dict(by="accession", columns=["y"]), "no column 'y'"),
        (dict(by="accession", columns=["accession"]), "is the key"),
    ]:
        with pytest.raises(RequestError, match=message):
            attach(archive, table, tmp_path / "out.csv", **options)  # type: ignore[arg-type]


def test_attach__an_index_without_the_key_says_so(tmp_path: Path) -> None:
    from tests.synthetic import write_cohort

    source = write_cohort(tmp_path / "src", 2)
    index([source / "images"], tmp_path / "out")
    table = write(tmp_path / "l.csv", "accession,x\nA,1\n")
    with pytest.raises(RequestError, match=r"holds no accession, so labels cannot be joined by accession.*other ways are"):
        attach(Archive.open(tmp_path / "out"), table, tmp_path / "o.csv", by="accession")
    table = write(tmp_path / "l.csv", "file,x\ncase_01.nii.gz,4\n")
    assert attach(Archive.open(tmp_path / "out"), table, tmp_path / "o.csv", by="path").n_series == 1


@pytest.mark.parametrize(
    ("text", "date"),
    [("20190305", "20190305"), ("2019-03-05", "20190305"), ("2019.03.05", "20190305"), ("5.3.2019", "20190305"), ("05/03/2019", None),
     ("20191305", None), ("201903", None), ("", None)],
)  # fmt: skip
def test_read_date__only_what_is_unambiguous(text: str, date: str | None) -> None:
    assert read_date(text) == date
