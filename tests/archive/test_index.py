"""Counts, ids, privacy, resuming and refusals of the index."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from medssl.archive.index import IndexSummary, index, read_splits, stem
from medssl.archive.reasons import FILE_REASONS, FLAGS, SERIES_REASONS
from medssl.archive.rows.attributes import MODALITIES
from medssl.archive.table import Archive, SeriesRow
from medssl.domains.volume_files import read_volume
from medssl.errors import RequestError
from medssl.registry import DOMAINS, lookup
from tests.synthetic import oblique_volume, reorient, write_cohort, write_dicom_series, write_itk, write_nifti


def consistent(summary: IndexSummary, out: Path) -> list[tuple[str, str | None, str | None]]:
    """Check that totals add up, also in the tables on disk, and return the rows of files.parquet."""
    assert summary.n_files_seen == summary.n_files_used + sum(summary.reasons.values())
    parts = json.loads((out / "files.parquet" / "manifest.json").read_text())["parts"]
    files = [row for part in parts for row in duckdb.sql(f"select * from '{out / 'files.parquet' / part}'").fetchall()]
    assert len(files) == summary.n_files_seen and len({row[0] for row in files}) == len(files)
    assert Counter(row[2] for row in files if row[2]) == summary.reasons
    rows = Archive.open(out).select(rejected=True)
    assert len(rows) == summary.n_series == len({row.series_id for row in rows})
    own = {
        row[0]
        for row in duckdb.sql(f"select series_id from '{out / 'private' / 'series.parquet'}' where files_of is null").fetchall()
    }
    assert sum(row.n_files for row in rows if row.series_id in own) == sum(row[1] is not None for row in files)
    assert set(summary.reasons) <= {*FILE_REASONS, *SERIES_REASONS}
    assert {flag for row in rows for flag in row.quality_flags} <= set(FLAGS)
    return files


def mixed(folder: Path) -> Path:
    """Two good series, and one of everything that is not."""
    array, affine = oblique_volume()
    write_dicom_series(folder / "a" / "dicom", *reorient(array, affine, "LPS"), suffix="")
    write_nifti(folder / "a" / "good.nii.gz", array, affine)
    (folder / "b").mkdir()
    (folder / "b" / "notes.txt").write_text("hello")
    (folder / "b" / "empty.dcm").touch()
    (folder / "b" / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 50)
    data = write_nifti(folder / "b" / "cut.nii", array, affine).read_bytes()
    (folder / "b" / "cut.nii").write_bytes(data[:-200])
    shutil.copy(folder / "a" / "good.nii.gz", folder / "b" / "again.nii.gz")
    write_nifti(folder / "b" / "four.nii", np.stack([array, array], axis=-1), affine)
    broken = bytearray(data)
    broken[70:72] = b"\x39\x30"  # a data type that does not exist
    (folder / "b" / "odd.nii").write_bytes(bytes(broken))
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "b" / "nowhere").symlink_to(folder / "absent")
    os.mkfifo(folder / "b" / "pipe")
    return folder


def test_counts__seen_is_used_plus_reasons(tmp_path: Path) -> None:
    source = mixed(tmp_path / "src")
    summary = index([source], tmp_path / "out")
    consistent(summary, tmp_path / "out")
    assert summary.reasons == {
        "broken_link": 1, "duplicate": 1, "empty": 1, "linked_folder": 1, "not_image": 2, "truncated": 1, "unreadable": 2,
    }  # fmt: skip
    assert summary.n_files_used == 14 + 1 + 1
    assert (summary.n_series, summary.n_series_usable) == (4, 4)
    assert summary.domains == {"mri": 1, "unknown": 3}


def test_series_rows__what_the_reader_finds(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    write_dicom_series(tmp_path / "src" / "d", *reorient(array, affine, "PIR"))
    for i, name in enumerate(("v.nii.gz", "v.nrrd", "v.mha", "w.mhd", "x.nhdr")):
        writer = write_nifti if ".nii" in name else write_itk
        writer(tmp_path / "src" / name, *reorient(array + i, affine, "LPS"))
    summary = index([tmp_path / "src"], tmp_path / "out", site="North")
    consistent(summary, tmp_path / "out")
    archive = Archive.open(tmp_path / "out")
    rows = archive.select()
    # The raw files behind MHD and NHDR belong to their headers.
    assert sorted(row.n_files for row in rows) == [1, 1, 1, 2, 2, 20]
    for row in rows:
        raw = read_volume(archive.files(row.series_id))
        assert row.shape == raw.array.shape == (20, 26, 14)
        assert row.spacing_mm == pytest.approx(raw.spacing_mm, rel=1e-5)
        assert row.site == "North"
        assert len(archive.digests(row.series_id)) == row.n_files
    (dicom,) = archive.select("modality = 'MR'")
    assert (dicom.orientation, dicom.slice_axis, dicom.plane, dicom.n_slices) == ("PIR", 0, "sagittal", 20)
    assert dicom.slice_step_mm == pytest.approx(0.8) and dicom.tilt_deg == pytest.approx(0, abs=0.01)
    assert (dicom.vendor, dicom.transfer_syntax, dicom.dtype, dicom.units) == ("other", "explicit_le", "int16", "arbitrary")
    # Files come in slice order, whatever their names.
    paths = archive.files(dicom.series_id)
    assert paths != sorted(paths)
    assert archive.first_paths() == {row.series_id: archive.files(row.series_id)[0] for row in archive.select()}


def test_content_not_name__decides(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    write_nifti(tmp_path / "v.nii.gz", array, affine).rename(tmp_path / "scan")
    for path in write_dicom_series(tmp_path / "d", array, affine, uid_seed="x"):
        # Without its preamble and meta header, as old archives hold it.
        import pydicom

        ds = pydicom.dcmread(path)
        dataset = pydicom.Dataset({element.tag: element for element in ds})
        with open(path, "wb") as handle:
            pydicom.dcmwrite(handle, dataset, implicit_vr=False, little_endian=True)
        path.rename(path.with_suffix(".nii"))
    summary = index([tmp_path], tmp_path / "out")
    assert summary.n_series_usable == 2 and summary.reasons == {}
    archive = Archive.open(tmp_path / "out")
    (row,) = archive.select("n_files > 1")
    np.testing.assert_array_equal(read_volume(archive.files(row.series_id)).array, array)


def test_second_run__scans_only_what_is_new_or_changed(tmp_path: Path) -> None:
    source, out = write_cohort(tmp_path / "src", 4) / "images", tmp_path / "out"
    first = index([source], out)
    assert first.n_files_scanned == 4
    before = Archive.open(out).select()
    again = index([source], out)
    assert again.n_files_scanned == 0 and Archive.open(out).select() == before
    write_nifti(source / "new.nii", oblique_volume(seed=50)[0], oblique_volume()[1])
    write_nifti(source / "case_00.nii.gz", oblique_volume(seed=51)[0], oblique_volume()[1])
    (source / "case_01.nii.gz").unlink()
    third = index([source], out)
    assert third.n_files_scanned == 2 and third.n_series == 4
    consistent(third, out)
    fresh = index([source], tmp_path / "fresh", key_file=out / "private" / "id.key")
    assert fresh.n_files_scanned == 4
    assert Archive.open(tmp_path / "fresh").select() == Archive.open(out).select()


def test_second_source__joins_and_keeps_the_first(tmp_path: Path) -> None:
    one, two = write_cohort(tmp_path / "one", 2), tmp_path / "two"
    write_dicom_series(two, *oblique_volume(seed=30))
    index([one / "images"], tmp_path / "out", site="A", splits=one / "split.csv")
    summary = index([two], tmp_path / "out", site="B")
    assert summary.n_series == 3 and summary.splits == {"train": 2, "unknown": 1}
    assert sorted(row.site for row in Archive.open(tmp_path / "out").select()) == ["A", "A", "B"]


def test_folders_of_label_maps__are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    array, affine = oblique_volume()
    for folder, value in (("imagesTr", 1), ("labelsTr", 2), ("labelled", 3)):
        (tmp_path / "set" / folder).mkdir(parents=True)
        write_nifti(tmp_path / "set" / folder / "case.nii", array + value, affine)
    assert index([tmp_path / "set" / "imagesTr"], tmp_path / "images").n_files_used == 1
    assert "label maps" not in caplog.text
    assert index([tmp_path / "set"], tmp_path / "all").n_files_used == 3
    assert "1 used files lie in folders that are named as those of label maps are" in caplog.text
    assert str(tmp_path) not in caplog.text


def test_detached_data__a_change_is_seen(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    write_itk(tmp_path / "src.mhd", array, affine)
    index([tmp_path / "src.mhd"], tmp_path / "out")
    (before,) = Archive.open(tmp_path / "out").select()
    raw = next(tmp_path.glob("*.raw"))
    raw.write_bytes(raw.read_bytes()[::-1])
    assert index([tmp_path / "src.mhd"], tmp_path / "out").n_files_scanned == 1
    (after,) = Archive.open(tmp_path / "out").select()
    assert before.series_id != after.series_id


@pytest.mark.parametrize("content", ["nothing", "links"])
def test_empty_folder__request_error_and_nothing_written(tmp_path: Path, content: str) -> None:
    (tmp_path / "src").mkdir()
    if content == "links":
        (tmp_path / "src" / "loop").symlink_to(tmp_path)
    with pytest.raises(RequestError, match=r"no (readable )?file there.*accepted are DICOM, NIfTI.*slides.*check the path"):
        index([tmp_path / "src"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_requests__refused_before_anything_is_written(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "src", 2)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    weak = tmp_path / "weak.key"
    weak.write_text("0" * 64)
    weak.chmod(0o644)
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(sources=[tmp_path / "absent"]), "does not exist"),
        (dict(sources=[]), "no source was given"),
        (dict(out=other), "is not empty and holds no index"),
        (dict(out=other / "mine.txt"), "is a file"),
        (dict(key_file=tmp_path / "no.key"), "No such file"),
        (dict(key_file=weak), "chmod 600"),
        (dict(splits=tmp_path / "no.csv"), "cannot be read"),
        (dict(workers=0), "1 or more"),
    ]
    for changes, message in cases:
        arguments: dict[str, Any] = {"sources": [source], "out": tmp_path / "out", **changes}
        with pytest.raises(RequestError, match=message):
            index(arguments.pop("sources"), arguments.pop("out"), **arguments)
    assert not (tmp_path / "out").exists() and [path.name for path in other.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,split\na,train\n", "no column file among name, split"),
        ("file,split\na,dev\n", "line 2: another split than train, val, test, unknown"),
        ("file,split\na,train\na,test\n", "line 3: a file that is in train and in test"),
        ("file,split,patient\na,train,p\nb,test,p\n", "one patient is in train and in test"),
        ("", "no column file and split among none"),
        ("doe.nii,train\nroe.nii,test\n", "no column file and split among 2 that are not known here"),
    ],
)
def test_splits__faults_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(RequestError, match=message):
        read_splits(tmp_path / "s.csv")


def test_splits__fill_split_and_patient(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "src", 6, label=True)
    array, affine = oblique_volume(seed=40)
    write_dicom_series(source / "series_a", array, affine)
    with open(source / "split.csv", "a") as handle:
        handle.write("series_a,test,\n")
    summary = index([source], tmp_path / "out", splits=source / "split.csv")
    assert summary.splits == {"test": 3, "train": 8, "val": 2}
    rows = Archive.open(tmp_path / "out").select()
    # Image and label of one case, named alike, are one patient; nobody is unknown.
    assert sorted(Counter(row.patient_id for row in rows).values()) == [1, 2, 2, 2, 2, 2, 2]
    assert all("patient_unknown" not in row.quality_flags for row in rows)
    without = index([source], tmp_path / "out2")
    assert without.splits == {"unknown": 13}
    unknown = Archive.open(tmp_path / "out2").select("modality = 'unknown'")
    assert len({row.patient_id for row in unknown}) == 12
    assert all("patient_unknown" in row.quality_flags for row in unknown)
    # Running again without the table keeps what it said.
    assert index([source], tmp_path / "out").splits == summary.splits


def test_stem__strips_image_suffixes_only() -> None:
    assert [stem(name) for name in ("a/b.nii.gz", "c.x.NRRD", "d.dcm", "e")] == ["b", "c.x", "d", "e"]


def test_patients__placeholders_and_shared_ids_never_merge(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    ids = ["P7", "P7", "", "", "NOID", "NOID", "000000", "SHARED", "SHARED"]
    for i, patient_id in enumerate(ids):
        extra = {"PatientSex": "M" if i % 2 else "F"} if patient_id == "SHARED" else {}
        write_dicom_series(tmp_path / "s" / str(i), array[..., :3] + i, affine, patient_id=patient_id, uid_seed=str(i), extra=extra)
    index([tmp_path / "s"], tmp_path / "out")
    rows = Archive.open(tmp_path / "out").select()
    counts = Counter(row.patient_id for row in rows)
    assert sorted(counts.values()) == [1, 1, 1, 1, 1, 1, 1, 2]
    assert sum("patient_unknown" in row.quality_flags for row in rows) == 7
    assert sum("patient_shared" in row.quality_flags for row in rows) == 2


def test_key__decides_the_ids_and_another_one_is_refused(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "src", 2)
    key = tmp_path / "own.key"
    key.write_text("1" * 64)
    key.chmod(0o600)
    index([source], tmp_path / "one", key_file=key)
    index([source], tmp_path / "two", key_file=key)
    index([source], tmp_path / "three")
    ids = [[row.series_id for row in Archive.open(tmp_path / name).select()] for name in ("one", "two", "three")]
    assert ids[0] == ids[1] and not set(ids[0]) & set(ids[2])
    assert not (tmp_path / "one" / "private" / "id.key").exists()
    other = tmp_path / "other.key"
    other.write_text("2" * 64)
    other.chmod(0o600)
    with pytest.raises(RequestError, match="another id key"):
        index([source], tmp_path / "one", key_file=other)
    with pytest.raises(RequestError, match="give the same one"):
        index([source], tmp_path / "one")


def test_modes__owner_only(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "src", 2)
    old = os.umask(0)
    try:
        index([source], tmp_path / "out")
    finally:
        os.umask(old)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_privacy__no_identifier_path_or_uid_outside_private(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    array, affine = oblique_volume()
    secret: dict[str, Any] = {"patient_id": "MRN4711", "patient_name": "Doe^Jane", "uid_seed": "secret"}
    extra = {
        "InstitutionName": "StVincent", "AccessionNumber": "ACC99", "SeriesDescription": "Doe Jane brain",
        "BodyPartExamined": "JANE BRAIN", "Manufacturer": "JaneCorp", "PatientBirthDate": "19700102",
        "ImageType": ["ORIGINAL", "JANE"], "RescaleType": "JANE", "PatientSex": "J", "IssuerOfPatientID": "StVincentMPI",
    }  # fmt: skip
    paths = write_dicom_series(tmp_path / "jane_doe", array, affine, extra=extra, **secret)
    write_nifti(tmp_path / "jane_doe" / "jane.nii", array, affine)
    import pydicom

    ds = pydicom.dcmread(paths[0])
    with caplog.at_level(0):
        summary = index([tmp_path / "jane_doe"], tmp_path / "out", site="siteA")
    out = tmp_path / "out"
    texts = [repr(summary), caplog.text]
    for path in out.rglob("*"):
        if path.is_file() and "private" not in path.parts:
            texts.append(path.read_bytes().decode("latin-1"))
            if path.suffix == ".parquet":
                texts.append(repr(duckdb.sql(f"select * from '{path}'").fetchall()))
    words = ["mrn4711", "jane", "stvincent", "acc99", "19700102", str(tmp_path).lower()]
    words += [str(ds[name].value) for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")]
    for text in texts:
        for word in words:
            assert word not in text.lower(), word
    rows = Archive.open(out).select()
    assert {row.vendor for row in rows} == {"other", "unknown"} and {row.sex for row in rows} == {"unknown"}
    assert all(row.modality in {*MODALITIES, "unknown", "other"} for row in rows)


def test_unreadable_folder__recorded(open_folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    source = write_cohort(open_folder / "src", 2)
    (source / "closed").mkdir(mode=0o700)
    (source / "images" / "case_01.nii.gz").chmod(0o600)
    done = run_as_nobody(open_folder, source)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reasons"] == {"not_image": 1, "permission": 2}


def test_no_write_permission__request_error(open_folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    source = write_cohort(open_folder / "src", 2)
    done = run_as_nobody(open_folder, source, writable=False)
    assert done.returncode == 2, done.stderr
    assert "cannot be written (Permission denied)" in done.stdout
    assert not list((open_folder / "nobody").iterdir())


def run_as_nobody(folder: Path, source: Path, *, writable: bool = True) -> subprocess.CompletedProcess[str]:
    place = folder / "nobody"
    place.mkdir(mode=0o755)
    if writable:
        os.chown(place, 65534, 65534)
    code = """
        import json, os, sys
        from dataclasses import asdict
        from pathlib import Path
        from medssl.archive.index import index
        from medssl.errors import RequestError
        import nibabel, duckdb, pydicom.pixels
        os.setgid(65534); os.setuid(65534)
        try:
            print(json.dumps(asdict(index([Path(sys.argv[1])], Path(sys.argv[2])))))
        except RequestError as err:
            print(err)
            sys.exit(err.exit_code)
    """
    return run_python(code, source, place / "out")


def run_python(code: str, *args: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )


@pytest.mark.parametrize(
    "at", ["scan-00000002", pytest.param("series", marks=pytest.mark.slow), pytest.param("summary", marks=pytest.mark.slow)]
)
def test_kill__loses_at_most_the_batch_and_the_next_run_completes(tmp_path: Path, at: str) -> None:
    source = write_cohort(tmp_path / "src", 9)
    code = """
        import os, signal, sys
        from pathlib import Path
        import medssl.archive.index as module
        import medssl.archive.scanning.sweep
        medssl.archive.scanning.sweep.BATCH = 2
        real = os.replace
        def replace(source, target):
            if sys.argv[3] in f"{Path(target).parent.name}-{Path(target).stem}".replace("part-", ""):
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)
        os.replace = replace
        module.index([Path(sys.argv[1])], Path(sys.argv[2]))
    """
    assert run_python(code, source, tmp_path / "out", Path(at)).returncode == -signal.SIGKILL
    if at.startswith("scan"):
        with pytest.raises(RequestError, match="no summary"):
            Archive.open(tmp_path / "out")
    summary = index([source], tmp_path / "out")
    assert summary.n_files_scanned == (10 - 4 if at.startswith("scan") else 0)
    consistent(summary, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob(".tmp-*")]
    key = tmp_path / "out" / "private" / "id.key"
    index([source], tmp_path / "whole", key_file=key)
    assert Archive.open(tmp_path / "whole").select(rejected=True) == Archive.open(tmp_path / "out").select(rejected=True)


def test_two_runs_at_once__second_refused(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "src", 2)

    def second(done: int, total: int) -> None:
        with pytest.raises(RequestError, match="is being indexed by another process"):
            index([source], tmp_path / "out")

    index([source], tmp_path / "out", on_progress=second)


def test_own_output_below_the_source__not_indexed(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "src", 2)
    first = index([source], source / "index")
    assert index([source], source / "index").n_files_seen == first.n_files_seen == 3


def test_progress__ends_at_the_total(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "src", 3)
    calls: list[tuple[int, int]] = []
    index([source], tmp_path / "out", on_progress=lambda *call: calls.append(call))
    assert calls[0] == (0, 4) and calls[-1] == (4, 4)


def test_select__sql_without_access_to_anything_else(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "src", 4)
    index([source / "images"], tmp_path / "out", splits=source / "split.csv")
    archive = Archive.open(tmp_path / "out")
    assert len(archive.select("split = 'train' and shape[1] = 20 and list_contains(quality_flags, 'lossy') = false")) == 4
    assert archive.select("spacing_mm[3] < 2") == []
    assert isinstance(archive.select()[0], SeriesRow)
    for where, message in [
        ("modalty = 'MR'", r'did you mean "modality"\?.*columns: series_id, study_id'),
        ("split = ", "is not a condition"),
        (f"1 = (select count(*) from read_text('{source / 'split.csv'}'))", "is not a condition"),
        ("true); drop table series; --", "is not a condition|more than one statement"),
    ]:
        with pytest.raises(RequestError, match=message):
            archive.select(where)
    with pytest.raises(RequestError, match="has no series"):
        archive.files("0" * 32)
    with pytest.raises(RequestError, match="holds no index"):
        Archive.open(tmp_path)


def test_real_archive__counts_and_verdicts(tmp_path: Path, shared_data: Path) -> None:
    names = ("ct_ge_gantry_tilt", "ct_covid_ct_md", "mr_dicom_nih", "mr_dicom_t1_studyforrest", "nifti_misc", "dicom_odd")
    started = time.perf_counter()
    summary = index([shared_data / name for name in names], tmp_path / "out")
    assert time.perf_counter() - started < 60
    consistent(summary, tmp_path / "out")
    archive = Archive.open(tmp_path / "out")
    # Two blocks, although AcquisitionNumber takes 21 values.
    blocks = archive.select("volume_axis = 'block'")
    assert sorted((row.n_slices, row.slice_step_mm) for row in blocks) == [(14, 4.22), (14, 7.38)]
    assert all(row.tilt_deg == pytest.approx(18.5, abs=0.1) for row in blocks)
    # One series although every SOPInstanceUID is empty.
    (covid,) = archive.select("transfer_syntax = 'jpeg_lossless' and n_slices = 28")
    assert (covid.domain, covid.units, covid.status, covid.spacing_mm) == ("ct", "HU", "ok", (0.603516, 0.603516, 2.0))
    # 15 slices x 10 times although no temporal tag varies: ten volumes, not one of 150 slices.
    fmri = archive.select("volume_axis = 'visit' and vendor = 'ge'")
    assert [row.shape for row in fmri] == [(64, 64, 15)] * 10
    assert sorted(row.volume_index for row in fmri) == list(range(10)) and {row.volume_axis for row in fmri} == {"visit"}
    assert all("patient_unknown" in row.quality_flags for row in fmri)  # PatientID DEV
    numbers = [sorted(int(path.stem.rpartition("-")[2]) for path in archive.files(row.series_id)) for row in fmri]
    assert sorted(n for part in numbers for n in part) == list(range(1, 151))
    for row in fmri:
        k = row.volume_index
        assert numbers[fmri.index(row)] == list(range(15 * k + 1, 15 * k + 16))
    mosaics = archive.select("volume_axis = 'mosaic' or vendor = 'siemens' and modality = 'MR' and n_slices = 5")
    assert len(mosaics) == 4 and {row.shape[:2] for row in mosaics} == {(72, 72)}
    (t1,) = archive.select("n_slices = 24 and domain = 'mri' and vendor = 'other'")
    assert (t1.role, t1.quality_flags, t1.plane) == ("source", ("age_conflict", "derived"), "axial")  # its PatientAge is "42"
    assert {row.reason for row in archive.select("domain = 'unknown'", rejected=True)} >= {None, "not_scalar"}


@pytest.mark.parametrize(
    ("names", "at_least"),
    [
        (
            ("mr_dicom_nih", "mr_dicom_t1_studyforrest", "nifti_misc", "nrrd_pyradiomics", "ct_mr_totalseg_examples", "dicom_odd"),
            40,
        ),
        pytest.param(
            (
                "dicom_multiframe",
                "nifti_orientations",
                "cxr_hannover",
                "us_lung_video/cc-by",
                "fluorescence_ht29",
                "wsi",
                "wsi_multistain",
            ),
            50,
            marks=pytest.mark.slow,
        ),
        (("ct_ge_gantry_tilt", "ct_covid_ct_md", "cine_mr_sunnybrook"), 20),
    ],
)
def test_usable_rows_of_real_data__can_all_be_read(
    tmp_path: Path, shared_data: Path, names: tuple[str, ...], at_least: int
) -> None:
    """What a header can tell is told by the index, so reading what it offers does not fail."""
    index([shared_data / name for name in names], tmp_path / "out")
    archive = Archive.open(tmp_path / "out")
    rows = [row for row in archive.select() if row.kind != "slide"]
    assert len(rows) >= at_least
    for row in rows:
        files, part = archive.files(row.series_id), archive.part(row.series_id)
        if row.kind == "volume":
            raw = read_volume(files, part)
            assert raw.array.shape == row.shape
            assert row.spacing_mm is None or raw.spacing_mm == pytest.approx(row.spacing_mm, rel=1e-4)
            assert raw.slice_axis == row.slice_axis or row.slice_axis is None
            continue
        name = row.domain if row.domain in DOMAINS else ("ultrasound" if row.kind == "cine" else "microscopy")
        sample = lookup("domain", name)().read(files, series_id=row.series_id, part=part)
        assert sample.image.shape[-2:] == row.shape[-2:]
        assert sample.image.ndim == (4 if row.kind == "cine" else 3)


def test_whole_shared_data__every_file_has_a_row_or_a_reason(tmp_path: Path, shared_data: Path) -> None:
    summary = index([shared_data / "dicom_odd"], tmp_path / "out")
    consistent(summary, tmp_path / "out")
    assert summary.n_files_seen == sum(1 for path in (shared_data / "dicom_odd").rglob("*") if path.is_file())


def test_modality__named_for_files_that_do_not_say(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    write_nifti(tmp_path / "s.nii.gz", array, affine)
    for i, name in enumerate(("a.nii.gz", "b.nii.gz")):
        (tmp_path / "src").mkdir(exist_ok=True)
        write_nifti(tmp_path / "src" / name, array + i, affine)
    (tmp_path / "src" / "b.json").write_text('{"Modality": "MR", "Manufacturer": "Siemens", "MagneticFieldStrength": 3}')
    write_dicom_series(tmp_path / "src" / "ct", array - 300, affine, modality="CT")
    summary = index([tmp_path / "src"], tmp_path / "out")
    assert summary.domains == {"ct": 1, "mri": 1, "unknown": 1} and summary.reasons == {"sidecar": 1}
    (sided,) = Archive.open(tmp_path / "out").select("domain = 'mri'")
    assert (sided.vendor, sided.field_strength_t) == ("siemens", 3)
    assert index([tmp_path / "src"], tmp_path / "out", modality="CT").domains == {"ct": 2, "mri": 1}
