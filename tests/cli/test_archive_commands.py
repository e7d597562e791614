"""archive ls|split|leakage|withdraw|release, labels attach and report ARCHIVE through the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from medssl.archive.ids import load_key
from medssl.archive.index import index
from medssl.archive.table import Archive
from medssl.errors import RequestError
from tests.archive.small import set_private, set_public, small_archive, write_scans
from tests.cli.test_bad_input import medssl


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve patients: 0 to 3 of unknown modality, 4 to 11 MR with 2 slices, 11 rejected."""
    found = small_archive(tmp_path_factory.mktemp("archive"), 12)
    series = by_number(found)
    values: dict[str, dict[str, object]] = {series[n]: {"modality": "unknown", "n_slices": None if n < 2 else 2} for n in range(4)}
    values |= {series[4]: {"modality": "CT", "n_slices": None}}
    values |= {series[11]: {"status": "rejected", "reason": "collision"}}
    set_public(found, values)
    return found.path


def by_number(found: Archive) -> dict[int, str]:
    key = load_key(found.path / "private" / "id.key")
    numbers = {key.make("patient", "unknown", f"P{n:04d}"): n for n in range(20)}
    return {numbers[row.patient_id]: row.series_id for row in found.select(rejected=True)}


def test_ls__says_what_was_lost_to_unknown(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = medssl(capsys, "archive", "ls", archive, "--where", "modality = 'MR' and n_slices > 1", "--json")
    result = json.loads(out)
    assert status == 0
    assert (result["n_series"], len(result["series"]), result["n_rejected"]) == (6, 6, 1)
    # Four of unknown modality, two of which have no slices either; the CT without slices is no MR whatever it has.
    assert result["n_lost_to_unknown"] == 4 and result["unknown"] == {"modality": 4, "n_slices": 2}
    _, out, _ = medssl(capsys, "archive", "ls", archive, "--where", "modality = 'MR' and n_slices > 1", "--limit", "2")
    assert "... 4 more (--limit)\n6 series\n4 series lost because a value is unknown (modality: 4, n_slices: 2)\n1 more meet" in out
    _, out, _ = medssl(capsys, "archive", "ls", archive, "--rejected", "--where", "reason = 'collision'", "--json")
    assert json.loads(out)["n_series"] == 1 and json.loads(out)["n_lost_to_unknown"] == 0


@pytest.mark.parametrize(
    ("where", "lost"),
    [
        ("modality = 'unknown'", {}),  # asked for
        ("modality <> 'CT'", {}),  # selects them: unknown is a value
        ("modality = 'CT' or modality = 'unknown'", {}),
        ("coalesce(n_slices, 0) > 5", {}),
        ("n_slices > 5", {"n_slices": 3}),
        ("not (modality = 'MR')", {}),
        ("modality = 'MR' or n_slices > 5", {"modality": 4, "n_slices": 3}),
        ("SERIES.Modality = 'CT' AND status = 'ok'", {"modality": 4}),
        ("list_contains(body_region, 'head')", {"body_region": 11}),
        ("list_contains(quality_flags, 'lossy')", {}),  # no flag is an answer
        ("pair_group = 'x'", {}),
        ("modality in ('CT', 'US') -- a comment", {"modality": 4}),
        ("patient_id in (select patient_id from series where modality = 'CT')", {}),
    ],
)
def test_choose__lost_to_unknown(archive: Path, where: str, lost: dict[str, int]) -> None:
    found = Archive.open(archive).choose(where)
    assert found.unknown == lost
    assert found.n_undecided == (5 if lost == {"modality": 4, "n_slices": 3} else max(lost.values(), default=0))


@pytest.mark.parametrize(
    "where",
    [
        "1 = (select count(*) from read_csv('{file}'))",
        "1 = (select count(*) from read_parquet('{index}/private/series.parquet'))",
        "exists (from '{file}')",
        "exists (from '{index}/private/files.parquet')",
        "exists (select 1 from read_text('{file}'))",
        "exists (select 1 from glob('/*'))",
        "true; copy series to '{copy}'",
        "true; attach '{copy}' as other",
        "true; install httpfs",
        "true; load httpfs",
        "true; pragma database_list",
        "true; set enable_external_access = true",
        "copy series to '{copy}'",
        "pragma database_list",
        "true) or (true",
        "true) union select * from series --",
        "true) --",
        "true /*",
        "true order by 1",
        "true limit 1",
        "exists (select 1 from information_schema.tables)",
        "exists (select 1 from duckdb_settings())",
        "exists (select 1 from pragma_database_list())",
        "exists (select 1 from other.main.series)",
        "exists (with recursive t as (select 1 as n union all select n + 1 from t) select * from t)",
        "exists (from range(3))",
        "modality = $1",
        "modality = ?",
        "getenv('HOME') = 'x'",
        "nosuch = 1",
        "'",
    ],
)
def test_ls__attacks_are_refused(archive: Path, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret.csv").write_text("word\nHUSH7\n")
    condition = where.format(file=tmp_path / "secret.csv", index=archive, copy=tmp_path / "copy")
    with pytest.raises(RequestError, match=r"is not a condition that can be used|more than one statement") as caught:
        Archive.open(archive).choose(condition)
    assert "HUSH7" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"]


def test_ls__attack_through_the_command_line(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = medssl(capsys, "archive", "ls", archive, "--where", "exists (from '/etc/passwd')")
    assert status == 2 and out == "" and "may read only the table series" in err


def copy_of(archive: Path, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(archive, folder / "copy"))


def test_split__prints_counts_and_writes(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = copy_of(archive, tmp_path)
    status, out, err = medssl(capsys, "archive", "split", mine, "--fractions", "train=0.6,val=0.2,test=0.2", "--by", "modality")
    assert status == 0 and err == ""
    assert "11 were drawn" in out and "  MR" in out and "note: no pixel hashes" in out
    status, out, _ = medssl(capsys, "archive", "split", mine, "--json")
    assert status == 0 and json.loads(out)["n_kept"] == 11 and json.loads(out)["n_drawn"] == 0
    status, out, err = medssl(capsys, "archive", "split", mine, "--fractions", "train=0.6")
    assert status == 2 and "add up to 0.6" in err


def test_leakage__status_only_when_asked(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scans(tmp_path / "src", range(11, 14))
    write_scans(tmp_path / "src", range(5, 6), shift=50)
    index([tmp_path / "src"], tmp_path / "other", key_file=archive / "private" / "id.key")
    status, out, _ = medssl(capsys, "archive", "leakage", archive, "--against", tmp_path / "other")
    assert status == 0  # 11 is rejected in the first
    assert "11 series against 4" in out and "patients: 1 in both, with 1 and 1 series" in out and "equal files: 0 pairs" in out
    assert "equal pixels: not compared\nperceptual hashes: not compared\n" in out and "--out ARCHIVE --pixels" in out
    status, out, _ = medssl(capsys, "archive", "leakage", archive, "--against", tmp_path / "other", "--fail", "--json")
    assert status == 1 and json.loads(out)["found"] is True
    assert (json.loads(out)["files"], json.loads(out)["content"], json.loads(out)["perceptual"]) == ([], None, None)
    status, out, _ = medssl(
        capsys, "archive", "leakage", archive, "--against", tmp_path / "other", "--fail", "--where", "modality = 'CT'"
    )
    assert status == 0


def test_withdraw__never_shows_an_identifier(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = copy_of(archive, tmp_path)
    (tmp_path / "r.csv").write_text("kind,value\npatient,P0007\npatient,SECRET9\nstudy_uid,1.2.3.999\n")
    status, out, err = medssl(capsys, "archive", "withdraw", mine, tmp_path / "r.csv")
    assert status == 0
    assert "1 series of 1 patients are withdrawn, 1 of them new" in out
    assert "lines that match nothing now: patient: 1, study_uid: 1" in out and "were not looked for" in out
    assert not any(word in out + err for word in ("P0007", "SECRET9", "1.2.3.999"))
    _, out, _ = medssl(capsys, "archive", "ls", mine, "--rejected", "--where", "reason = 'withdrawn'", "--json")
    assert json.loads(out)["n_series"] == 1
    status, out, err = medssl(capsys, "archive", "withdraw", mine, tmp_path / "no.csv")
    assert status == 2


def test_release__through_the_command_line(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = medssl(capsys, "archive", "release", archive, "--k", "10", "--out", tmp_path / "rel")
    assert status == 0 and "11 patients in" in out
    assert {path.name for path in (tmp_path / "rel").iterdir()} == {"release.json", "release.csv"}
    status, _, err = medssl(capsys, "archive", "release", archive, "--k", "12", "--out", tmp_path / "no")
    assert status == 2 and "fewer than 12 patients" in err and not (tmp_path / "no").exists()


def test_labels__through_the_command_line(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = copy_of(archive, tmp_path)
    series = by_number(Archive.open(mine))
    set_private(Archive.open(mine), {series[n]: {"accession": f"ACC{n:05d}"} for n in range(12)})
    (tmp_path / "l.csv").write_text("Accession Number,reader,grade\nACC00003,DOE,2\nACC00011,DOE,1\nACC99999,DOE,4\n")
    arguments = ("labels", "attach", tmp_path / "l.csv", "--archive", mine, "--by", "accession", "--out", tmp_path / "o.csv")
    status, out, err = medssl(capsys, *arguments)
    assert status == 2 and "'reader' is named like an identifier" in err and not (tmp_path / "o.csv").exists()
    status, out, err = medssl(capsys, *arguments, "--columns", "grade")
    assert status == 0
    assert "1 series of 1 patients got labels (grade)" in out and "1  no_match" in out and "1  no_usable_series" in out
    assert not any(word in out + err for word in ("ACC0", "ACC9", "DOE"))
    with open(tmp_path / "o.csv", newline="") as handle:
        assert list(csv.DictReader(handle)) == [{"series_id": series[3], "grade": "2"}]


def test_index_pixels__says_what_was_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scans(tmp_path / "src", range(3))  # one image, brighter by one each
    status, out, _ = medssl(capsys, "index", tmp_path / "src", "--out", tmp_path / "out", "--pixels", "--json")
    found = json.loads(out)["pixels"]
    assert status == 0 and (found["looked_at"], found["series"], found["read"], found["failed"]) == (3, 3, 3, {})
    assert found["near_duplicates"] == {"groups": 1, "series": 3, "groups_of_several_patients": 1}
    _, out, _ = medssl(capsys, "index", tmp_path / "src", "--out", tmp_path / "out", "--pixels")
    assert "0 series looked at now; the pixels of 3 of 3 are known" in out
    assert "1 groups of near-duplicates with 3 series; 1 of them hold several patients" in out
    _, out, _ = medssl(capsys, "index", tmp_path / "src", "--out", tmp_path / "out", "--json")
    assert "pixels" not in json.loads(out) and json.loads((tmp_path / "out" / "summary.json").read_text())["pixels"]["read"] == 3
