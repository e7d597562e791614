"""The pass of `index --pixels`: results in the private part, flags in the index; killed, changed, indexed again."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.archive._parquet import read_table
from medssl.archive.index import index
from medssl.archive.operations.leakage import find_leakage
from medssl.archive.operations.split import split_archive
from medssl.archive.operations.withdraw import withdraw
from medssl.archive.pixels.found import PIXEL_COLUMNS, pixel_counts
from medssl.archive.reasons import FLAGS, IMAGE_REASONS, PRIVACY_FLAGS
from medssl.archive.table import Archive
from medssl.cli.data import _pixel_lines
from medssl.domains import pixel_pass
from medssl.domains.pixel_pass import PixelSummary, look_at_pixels
from medssl.errors import RequestError
from tests.archive.pixels.test_burned_in import tissue, written
from tests.synthetic import oblique_volume, plain_affine, write_dicom_series, write_nifti
from tests.synthetic_planar import write_planar_dicom


def results(archive: Path) -> dict[str, dict[str, Any]]:
    return {row["series_id"]: row for row in read_table([archive / "private" / "pixels.parquet"], PIXEL_COLUMNS)}


def hashes(archive: Path) -> dict[str, tuple[str | None, str | None]]:
    names = ("series_id", "content_hash", "perceptual_hash")
    return {row["series_id"]: (row[names[1]], row[names[2]]) for row in read_table([archive / "private" / "series.parquet"], names)}


def look(src: Path, out: Path, **options: Any) -> PixelSummary:
    index([src], out, **options)
    return look_at_pixels(out)


def volumes(folder: Path, n: int) -> None:
    folder.mkdir()
    for k in range(n):
        write_nifti(folder / f"{k}.nii.gz", *oblique_volume((12, 10, 6), seed=k))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A CT, a constant MR, a radiograph with words, one with a marker, a blank one, and a broken one."""
    src = tmp_path / "src"
    volume, _ = oblique_volume((20, 24, 6))
    write_dicom_series(src / "ct", volume - 1000, plain_affine((1.0, 1.0, 2.0)), modality="CT", uid_seed="ct")
    write_dicom_series(src / "flat", np.full((9, 8, 4), 7, np.int16), plain_affine((1.0, 1.0, 2.0)), uid_seed="flat")
    from benchmarks.burned_in import draw

    dark = tissue((400, 400)) // 2
    blank = np.zeros((200, 200), np.uint8)
    blank[:5, :5] = 90
    pictures = {
        "words": written(tissue()),
        "marker": draw(dark, 40, np.random.default_rng(3), ["L"]).array,
        "blank": blank,
    }
    for name, picture in pictures.items():
        write_planar_dicom(src / f"{name}.dcm", picture, SeriesInstanceUID=f"1.2.{len(name)}", PatientID=name)
    broken = write_planar_dicom(src / "broken.dcm", tissue((64, 64)), syntax="rle", SeriesInstanceUID="1.2.99", PatientID="b")
    data = broken.read_bytes()
    at = data.rfind(b"\xfe\xff\x00\xe0") + 8
    broken.write_bytes(data[:at] + b"\x07" * 64 + data[at + 64 :])  # the header stays whole, the frame does not
    return src


def test_flags_and_failures__are_counted_and_reach_the_index(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = index([mixed], out)
    seen = {path: path.read_bytes() for path in mixed.rglob("*.dcm")}
    summary = look_at_pixels(out)
    assert summary.looked_at == summary.series == before.n_series_usable == 6
    assert summary.read + sum(summary.failed.values()) == 6 and set(summary.failed) <= set(IMAGE_REASONS)
    rows = {row.series_id: row for row in Archive.open(out).select()}
    flags = sorted((row.modality, *row.quality_flags, *row.privacy_flags, row.status) for row in rows.values())
    flags = [tuple(value for value in row if value not in ("patient_unknown", "patient_shared", "derived")) for row in flags]
    assert ("MR", "constant_pixels", "flagged") in flags
    assert any("burned_in_suspected" in row for row in flags) and any("marker" in row for row in flags)
    assert any("blank" in row and row[-1] == "flagged" for row in flags)
    assert set(summary.flags) <= {*FLAGS, *PRIVACY_FLAGS} and summary.flags["burned_in_suspected"] == 1 == summary.flags["marker"]
    assert summary.failed["constant"] == 1 and sum(summary.failed.values()) == 2  # the broken one and the constant one
    assert {row["reason"] is None: None for row in results(out).values()}.keys() == {True, False}
    assert json.loads((out / "summary.json").read_text())["pixels"]["read"] == 4
    # A second run looks at nothing, also after indexing again; nothing was written to the sources.
    assert look(mixed, out).looked_at == 0 and {path: path.read_bytes() for path in mixed.rglob("*.dcm")} == seen
    assert {row.series_id: row for row in Archive.open(out).select()} == rows
    for path in (out / "private").rglob("*.parquet"):
        assert path.stat().st_mode & 0o077 == 0
    public = (out / "series.parquet").read_bytes() + (out / "summary.json").read_bytes()
    assert not any(value.encode() in public for pair in hashes(out).values() for value in pair if value)


def test_changed_files__lose_flags_and_hashes_until_they_are_looked_at(tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    write_planar_dicom(src / "a.dcm", written(tissue()))
    write_planar_dicom(src / "b.dcm", tissue(seed=1), SeriesInstanceUID="1.2.3", PatientID="Q")
    first = look(src, out)
    assert first.flags == {"burned_in_suspected": 1}
    write_planar_dicom(src / "a.dcm", tissue(seed=2))
    index([src], out)
    (row,) = [row for row in Archive.open(out).select() if hashes(out)[row.series_id][0] is None]
    assert row.privacy_flags == () and pixel_counts(out) is not None
    assert json.loads((out / "summary.json").read_text())["pixels"]["waiting"] == 1
    again = look_at_pixels(out)
    assert (again.looked_at, again.read, again.flags) == (1, 2, {}) and all(all(pair) for pair in hashes(out).values())
    (src / "b.dcm").unlink()
    assert look(src, out).series == 1 == len(results(out))


def test_same_volume__dicom_and_nifti_under_two_keys(tmp_path: Path) -> None:
    """The copy is written by SimpleITK, with the padding that DICOM names left in it as -2000."""
    import SimpleITK as sitk

    volume, _ = oblique_volume((24, 20, 8))
    stored = volume - 900
    stored[:3] = -2000
    affine = plain_affine((0.8, 0.8, 2.0))
    paths = write_dicom_series(tmp_path / "dicom" / "one", stored, affine, modality="CT", extra={"PixelPaddingValue": -2000})
    other, _ = oblique_volume((24, 20, 8), seed=9)
    write_dicom_series(tmp_path / "dicom" / "two", other, affine, patient_id="Q", uid_seed="two")
    (tmp_path / "nifti").mkdir()
    image = sitk.ReadImage([str(path) for path in paths])
    sitk.WriteImage(image, str(tmp_path / "nifti" / "copy.nii.gz"))
    # The same once more with a little noise and another scale: only its looks are the same.
    noisy = sitk.AdditiveGaussianNoise(sitk.Cast(image, sitk.sitkFloat32) * 1.02, standardDeviation=1.0, seed=1)
    sitk.WriteImage(noisy, str(tmp_path / "nifti" / "noisy.nii.gz"))
    look(tmp_path / "dicom", tmp_path / "a")
    look(tmp_path / "nifti", tmp_path / "b", modality="CT")
    look(tmp_path / "nifti", tmp_path / "c")  # nobody says what it is
    one, two, three = (Archive.open(tmp_path / name) for name in "abc")
    assert one.key_fingerprint != two.key_fingerprint
    for copies in (two, three):
        found = find_leakage(one, copies)
        assert found.files == [] and found.content is not None and found.perceptual is not None
        (pair,) = found.content
        assert one.select(f"series_id = '{pair[0]}'")[0].modality == "CT"
        assert [(left, bits <= 4) for left, _, bits in found.perceptual] == [(pair[0], True)]
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["pixels"]["near_duplicates"] == {
        "groups": 1, "series": 2, "groups_of_several_patients": 1,
    }  # fmt: skip


def test_split__keeps_equal_pixels_together(tmp_path: Path) -> None:
    """Twelve patients of whom two have one image, in another file format each."""
    affine = plain_affine((1.0, 1.0, 2.0))
    for n in range(12):
        volume, _ = oblique_volume((12, 10, 4), seed=min(n, 10))  # 10 and 11 are one image
        write_dicom_series(tmp_path / "src" / str(n), volume, affine, patient_id=f"P{n:03d}", uid_seed=str(n))
    look(tmp_path / "src", tmp_path / "out")
    archive = Archive.open(tmp_path / "out")
    by_hash: dict[str, list[str]] = {}
    for series, (content, _) in hashes(archive.path).items():
        by_hash.setdefault(str(content), []).append(series)
    (twins,) = [members for members in by_hash.values() if len(members) == 2]
    for seed in range(4):
        split_archive(archive, {"train": 0.5, "val": 0.0, "test": 0.5}, seed=seed, redraw=True)
        splits = {row.series_id: row.split for row in Archive.open(archive.path).select()}
        assert splits[twins[0]] == splits[twins[1]] != "unknown" and len(set(splits.values())) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
from medssl.domains import pixel_pass
pixel_pass.PART_SERIES = 2
done, read = [], pixel_pass.look
def look(job):
    if len(done) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(job)
    return read(job)
pixel_pass.look = look
pixel_pass.look_at_pixels(Path(sys.argv[1]))
"""


def test_kill__loses_one_part_at_most(tmp_path: Path) -> None:
    volumes(tmp_path / "src", 8)
    index([tmp_path / "src"], tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    assert killed.returncode == -signal.SIGKILL and not any(any(pair) for pair in hashes(tmp_path / "out").values())
    (tmp_path / "out" / "private" / "pixels" / ".tmp-1-part-00000009.json").write_text("half a li")
    assert look_at_pixels(tmp_path / "whole").looked_at == 8
    resumed = look_at_pixels(tmp_path / "out")
    assert (resumed.looked_at, resumed.read) == (4, 8)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert list((tmp_path / "out" / "private" / "pixels").iterdir()) == []


def test_failures__are_tried_again_where_that_may_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes(tmp_path / "src", 3)
    index([tmp_path / "src"], tmp_path / "out")
    faults = iter([MemoryError(), RequestError("no package"), KeyError("a name of somebody")])

    def failing(job: pixel_pass.Job) -> Any:
        raise next(faults)

    with monkeypatch.context() as patch:
        patch.setattr(pixel_pass, "_read", failing)
        summary = look_at_pixels(tmp_path / "out")
    assert summary.failed == {"no_decoder": 1, "too_large": 1, "unreadable": 1} and summary.read == 0
    again = look_at_pixels(tmp_path / "out")  # a package may have come since; a volume too large has not shrunk
    assert (again.looked_at, again.failed, again.read) == (1, {"too_large": 1, "unreadable": 1}, 1)
    with pytest.raises(RequestError, match="holds no index"):
        look_at_pixels(tmp_path / "nothing")


@pytest.mark.slow
def test_stuck_series__is_left_behind_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes(tmp_path / "src", 3)
    index([tmp_path / "src"], tmp_path / "out")
    ids = [row.series_id for row in Archive.open(tmp_path / "out").select()]
    read, stuck = pixel_pass._read, threading.Event()

    def hung(job: pixel_pass.Job) -> Any:
        if job.series_id == ids[0]:  # the first of all
            stuck.wait(60)
        return read(job)

    with monkeypatch.context() as patch:
        patch.setattr(pixel_pass, "_read", hung)
        summary = look_at_pixels(tmp_path / "out", limit_s=2.0)
    stuck.set()
    assert (summary.left_behind, summary.failed, summary.read) == ([ids[0]], {"timeout": 1}, 2)
    assert results(tmp_path / "out")[ids[0]]["reason"] == "timeout" and all(hashes(tmp_path / "out")[ids[1]])
    assert f"series {ids[0]} took too long" in "\n".join(_pixel_lines(summary))
    again = look_at_pixels(tmp_path / "out")
    assert (again.looked_at, again.left_behind, again.failed, again.read) == (1, [], {}, 3)
    with pytest.raises(RequestError, match="limit: 0 s"):
        look_at_pixels(tmp_path / "out", limit_s=0)


@pytest.mark.slow
def test_worker_that_keeps_the_interpreter__is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread of such a process can leave the series behind."""
    volumes(tmp_path / "src", 3)
    index([tmp_path / "src"], tmp_path / "out")
    monkeypatch.setattr(pixel_pass, "PROCESSES_ABOVE", 1)
    monkeypatch.setattr(pixel_pass, "GRACE_S", 15.0)
    monkeypatch.setattr(pixel_pass, "look", keeping)
    monkeypatch.setenv("KEEPS", min(row.series_id for row in Archive.open(tmp_path / "out").select()))
    summary = look_at_pixels(tmp_path / "out", workers=2, limit_s=10.0)  # beside what the workers import
    assert (summary.failed, summary.read) == ({"timeout": 1}, 2) and summary.left_behind == [os.environ["KEEPS"]]


def keeping(job: pixel_pass.Job) -> dict[str, Any]:
    if job.series_id == os.environ["KEEPS"]:
        ctypes.PyDLL(None).sleep(300)  # holds the global interpreter lock
    return pixel_pass.look(job)


@pytest.mark.slow
def test_withdraw__takes_the_hashes_along(tmp_path: Path) -> None:
    volumes(tmp_path / "src", 3)
    look(tmp_path / "src", tmp_path / "out")
    archive = Archive.open(tmp_path / "out")
    gone, *kept = [row.series_id for row in archive.select()]
    (tmp_path / "request.csv").write_text(f"kind,value\nseries_id,{gone}\n")
    withdraw(archive, tmp_path / "request.csv")
    assert set(results(tmp_path / "out")) == set(kept)
    assert hashes(tmp_path / "out")[gone] == (None, None) and all(hashes(tmp_path / "out")[name][0] for name in kept)


@pytest.mark.slow
def test_version__another_one_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes(tmp_path / "src", 1)
    look(tmp_path / "src", tmp_path / "out")
    monkeypatch.setattr("medssl.archive.pixels.found.VERSION", 99)
    assert look_at_pixels(tmp_path / "out").looked_at == 1 and look_at_pixels(tmp_path / "out").looked_at == 0


def test_slices__text_of_every_plane_runs_along_rows(tmp_path: Path) -> None:
    """Words on axial, coronal and sagittal slices, stored as scanners do, end upright whatever the plane."""
    picture = written(tissue((160, 240)))
    noise = np.random.default_rng(0).integers(0, 12, (240, 160, 5)).astype(np.int16)
    stored = picture.T[:, :, None].astype(np.int16) + noise
    x, y, z = np.eye(3)
    planes = {"axial": (-x, -y, z), "coronal": (-x, -z, y), "sagittal": (-y, -z, x)}
    for name, (along, down, through) in planes.items():
        affine = np.eye(4)
        affine[:3, :3] = np.column_stack([along, down, 3 * through])
        write_dicom_series(tmp_path / "src" / name, stored, affine, uid_seed=name, patient_id=name)
    look(tmp_path / "src", tmp_path / "out")
    rows = Archive.open(tmp_path / "out").select()
    assert {row.plane: row.privacy_flags for row in rows} == dict.fromkeys(planes, ("burned_in_suspected",))
    for row in rows:
        archive = Archive.open(tmp_path / "out")
        job = pixel_pass.Job(row.series_id, "", "mri", "volume", None, archive.files(row.series_id), None)
        shown = pixel_pass.slices(pixel_pass._read(job))
        assert any(np.array_equal(plane, stored[:, :, k].T) for plane in shown for k in (0, 4))


def test_executor__a_lost_task_costs_one_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes(tmp_path / "src", 4)
    index([tmp_path / "src"], tmp_path / "out")
    read, seen = pixel_pass.look, []

    def once(job: pixel_pass.Job) -> dict[str, Any]:
        seen.append(job.series_id)
        if len(seen) == 2:
            raise RuntimeError("a cluster lost it")
        return read(job)

    monkeypatch.setattr(pixel_pass, "look", once)
    with ThreadPoolExecutor(1) as pool:
        assert look_at_pixels(tmp_path / "out", executor=pool).failed == {"worker_lost": 1}
        again = look_at_pixels(tmp_path / "out", executor=pool)
    assert (again.looked_at, again.read, again.failed) == (1, 4, {}) and len(seen) == 5 and seen[1] == seen[4]


@pytest.mark.slow
def test_workers__give_the_same_and_survive_one_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes(tmp_path / "src", 3)
    index([tmp_path / "src"], tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    monkeypatch.setattr(pixel_pass, "PROCESSES_ABOVE", 1)
    assert look_at_pixels(tmp_path / "one").read == 3 == look_at_pixels(tmp_path / "two", workers=2).read
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    os.truncate(tmp_path / "two" / "private" / "pixels.parquet", 0)
    (tmp_path / "two" / "private" / "pixels.parquet").unlink()
    monkeypatch.setattr(pixel_pass, "look", dying)
    summary = look_at_pixels(tmp_path / "two", workers=2)
    assert summary.failed == {"worker_lost": 3} and summary.read == 0
    monkeypatch.undo()
    assert look_at_pixels(tmp_path / "two").read == 3


def dying(job: pixel_pass.Job) -> dict[str, Any]:
    os._exit(3)


# --- real images


@pytest.mark.data
def test_real_radiographs__side_markers_are_flagged_and_not_rejected(shared_data: Path, tmp_path: Path) -> None:
    """Looked at by eye: each of these six has a letter L and nothing else."""
    (tmp_path / "src").mkdir()
    for name in ("90c1e3ef", "76093afc", "4fed5061", "53c9be49", "e1a4f870", "8da14fff"):
        (path,) = (shared_data / "cxr_hannover" / "images").glob(f"{name}*")
        (tmp_path / "src" / path.name).symlink_to(path)
    summary = look(tmp_path / "src", tmp_path / "out", modality="CR")
    rows = Archive.open(tmp_path / "out").select()
    assert len(rows) == 6 and all(row.status != "rejected" for row in rows) and summary.failed == {}
    assert summary.flags["marker"] >= 5 and summary.flags.get("burned_in_suspected", 0) <= 1


@pytest.mark.data
def test_real_ultrasound__text_on_the_screen_is_suspected(shared_data: Path, tmp_path: Path) -> None:
    """Settings, times and a hospital's name are written beside the sectors of these, where the domain's own sample is blanked."""
    (tmp_path / "src").mkdir()
    for name in (
        "dicom_multiframe/us_echo_10frames_palette_rle",
        "dicom_odd/pydicom/examples_jpeg2k",
        "dicom_odd/pydicom/examples_palette",
        "dicom_odd/pydicom/examples_rgb_color",
    ):
        path = shared_data / f"{name}.dcm"
        (tmp_path / "src" / path.name).symlink_to(path)
    summary = look(tmp_path / "src", tmp_path / "out")
    assert (summary.read, summary.flags["burned_in_suspected"]) == (4, 4)


@pytest.mark.data
def test_real_ct__equals_its_copy_by_simpleitk(shared_data: Path, tmp_path: Path) -> None:
    import SimpleITK as sitk

    folder = shared_data / "ct_covid_ct_md" / "P002"
    table = [line.split(",") for line in (shared_data / "ct_covid_ct_md" / "slices.csv").read_text().splitlines()]
    assert len(table) == 29
    index([folder], tmp_path / "a")
    archive = Archive.open(tmp_path / "a")
    (row,) = archive.select()
    files = archive.files(row.series_id)
    (tmp_path / "nifti").mkdir()
    sitk.WriteImage(sitk.ReadImage([str(path) for path in files]), str(tmp_path / "nifti" / "copy.nii.gz"))
    look_at_pixels(tmp_path / "a")
    look(tmp_path / "nifti", tmp_path / "b")
    found = find_leakage(Archive.open(tmp_path / "a"), Archive.open(tmp_path / "b"))
    assert not found.same_key and found.content is not None and len(found.content) == 1 and found.perceptual == []


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.timeout(1800)
def test_all_real_images__every_series_has_hashes_or_a_reason(shared_data: Path, tmp_path: Path) -> None:
    before = index([shared_data], tmp_path / "out")
    summary = look_at_pixels(tmp_path / "out", workers=2)
    assert summary.series == before.n_series_usable == summary.read + sum(summary.failed.values())
    assert set(summary.failed) <= set(IMAGE_REASONS)
    assert summary.read > 0.9 * summary.series
    for row in results(tmp_path / "out").values():
        assert (row["reason"] is None) == (row["content_hash"] is not None)
