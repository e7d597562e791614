"""Images inside zip, tar and gzip: the same series as outside, and a reason for what cannot be read."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from medssl.archive.headers import containers
from medssl.archive.index import index
from medssl.archive.scanning.scan import scan_file
from medssl.archive.table import Archive
from medssl.domains.mri import MRI
from medssl.errors import ImageError, StoreError
from tests.synthetic import oblique_volume, write_dicom_series, write_nifti


def cohort(folder: Path) -> Path:
    array, affine = oblique_volume()
    write_dicom_series(folder / "scan", array, affine)
    write_nifti(folder / "scan.nii", array, affine)
    return folder


def packed(source: Path, target: Path, form: str) -> Path:
    files = sorted(path for path in source.rglob("*") if path.is_file())
    target.mkdir()
    if form == "zip":
        with zipfile.ZipFile(target / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in files:
                archive.write(path, path.relative_to(source))
    elif form.startswith("tar"):
        with tarfile.open(target / "all.bin", form.replace("tar", "w")) as tar:
            for path in files:
                tar.add(path, str(path.relative_to(source)))
    else:
        for path in files:
            (target / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return target


@pytest.mark.parametrize(
    "form", ["zip", "tar", pytest.param("tar:gz", marks=pytest.mark.slow), pytest.param("tar:xz", marks=pytest.mark.slow), "gz"]
)
def test_members__give_the_same_samples_as_files(tmp_path: Path, form: str) -> None:
    source = cohort(tmp_path / "src")
    index([source], tmp_path / "a", modality="MR")
    key = tmp_path / "a" / "private" / "id.key"
    summary = index([packed(source, tmp_path / "packed", form)], tmp_path / "b", modality="MR", key_file=key)
    loose, inside = Archive.open(tmp_path / "a"), Archive.open(tmp_path / "b")
    assert summary.n_files_used == 15 and set(summary.reasons) == {"container"}
    expected = {tuple(row.shape): MRI().read(loose.files(row.series_id), series_id="0" * 32).image for row in loose.select()}
    assert len(inside.select()) == len(loose.select()) == 2
    for row in inside.select():
        files = inside.files(row.series_id)
        assert np.array_equal(MRI().read(files, series_id="0" * 32).image, expected[tuple(row.shape)])
        assert all(
            (tmp_path / "b" / "private") in path.parents and path.stat().st_mode & 0o077 == 0
            for path in files
            if "gz" not in path.suffix
        )
    assert index([tmp_path / "packed"], tmp_path / "b", key_file=key).n_files_scanned == 0


def test_copy_inside_a_container__is_a_duplicate(tmp_path: Path) -> None:
    source = cohort(tmp_path / "src")
    packed(source, source / "packed", "zip")
    summary = index([source], tmp_path / "out")
    assert summary.reasons == {"container": 1, "duplicate": 15} and summary.n_files_used == 15


def test_damaged_and_hostile_containers__have_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "src"
    whole = packed(cohort(tmp_path / "loose"), source, "zip") / "all.zip"
    data = whole.read_bytes()
    (source / "cut.zip").write_bytes(data[: len(data) // 2])
    with zipfile.ZipFile(source / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(50 << 20))
    with tarfile.open(source / "links.tar", "w") as tar:
        link = tarfile.TarInfo("../../etc/passwd")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        inner = tarfile.TarInfo("../../outside.txt")
        inner.size = 5
        tar.addfile(inner, io.BytesIO(b"hello"))
    flags = bytearray(data)
    for mark in (b"PK\x03\x04", b"PK\x01\x02"):
        place = flags.index(mark)
        flags[place + (6 if mark == b"PK\x03\x04" else 8)] |= 1
    (source / "secret.zip").write_bytes(bytes(flags))
    monkeypatch.setattr(containers, "MAX_RATIO", 500)
    summary = index([source], tmp_path / "out")
    assert summary.reasons["container"] == 4  # nothing in the cut one can be opened: it is one unreadable file
    assert summary.reasons["unreadable"] == 1 and summary.reasons["encrypted"] == 1 and summary.reasons["container_limit"] == 1
    assert summary.reasons["broken_link"] == 1 and summary.reasons["not_image"] == 1
    assert not list(tmp_path.parent.glob("outside.txt"))


def test_unpacked_member__is_made_anew_when_its_container_has_changed(tmp_path: Path) -> None:
    container, folder = tmp_path / "a.zip", tmp_path / "private" / "unpacked"
    for content in (b"one", b"another"):
        with zipfile.ZipFile(container, "w") as archive:
            archive.writestr("x.dcm", content)
        path = containers.unpack(f"{container}{containers.SEPARATOR}x.dcm", folder)
        assert path.read_bytes() == content
        assert containers.unpack(f"{container}{containers.SEPARATOR}x.dcm", folder) == path
    containers.forget_unpacked(folder)
    assert not folder.exists() and folder.parent.exists()


def many(path: Path, n: int, form: str) -> list[str]:
    """Write a container of n small files that do not compress, and return their private paths in no order."""
    rng = np.random.default_rng(0)
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for k in range(n):
                archive.writestr(f"{k}.dcm", rng.bytes(600))
    else:
        with tarfile.open(path, form.replace("tar", "w")) as tar:
            for k in range(n):
                info = tarfile.TarInfo(f"./{k}.dcm")
                info.size = 600
                tar.addfile(info, io.BytesIO(rng.bytes(600)))
    return [f"{path}{containers.SEPARATOR}{k}.dcm" for k in rng.permutation(n)]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="bytes read are counted by Linux")
@pytest.mark.parametrize("form", ["zip", "tar", "tar:gz"])
def test_unpacking_one_by_one__reads_twice_as_much_of_twice_as_many(tmp_path: Path, form: str) -> None:
    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    cost = []
    for n in (1000, 2000):
        paths = many(tmp_path / f"{n}.bin", n, form)
        before = bytes_read()
        found = [containers.unpack(path, tmp_path / str(n), lambda paths=paths: paths) for path in paths]
        cost.append(bytes_read() - before)
        assert len({path.read_bytes() for path in found}) == n
    assert 1.5 < cost[1] / cost[0] < 2.5  # one walk each for every member: 4


@pytest.mark.parametrize("form", ["tar", "tar:gz"])
def test_names_with_a_leading_dot_or_slash__are_found(tmp_path: Path, form: str) -> None:
    """`tar -C FOLDER -cf X .` names its members `./a`."""
    source = cohort(tmp_path / "src")
    with tarfile.open(tmp_path / "all.bin", form.replace("tar", "w")) as tar:
        for path in sorted(source.rglob("*.*")):
            info = tar.gettarinfo(str(path), f"./{path.relative_to(source)}")
            info.name = info.name if path.suffix == ".nii" else f"/{info.name}"
            tar.addfile(info, io.BytesIO(path.read_bytes()))
    index([tmp_path / "all.bin"], tmp_path / "out", modality="MR")
    archive = Archive.open(tmp_path / "out")
    first = archive.first_paths()
    assert {row.series_id for row in archive.select()} <= set(first) and not list((tmp_path / "out" / "private").glob("unpacked/*"))
    n_files = {len(archive.files(row.series_id)) for row in archive.select()}
    assert n_files == {1, 14} and len(list((tmp_path / "out" / "private" / "unpacked").iterdir())) == 15


def test_compressed_tar__is_read_once_for_all_its_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = packed(cohort(tmp_path / "src"), tmp_path / "packed", "tar:gz")
    index([key], tmp_path / "out", modality="MR")
    archive = Archive.open(tmp_path / "out")
    passes, walk = [], containers.members

    def counted(path: Path, kind: str) -> object:
        passes.append(path)
        return walk(path, kind)

    monkeypatch.setattr(containers, "members", counted)
    files = [archive.files(row.series_id) for row in archive.select()]
    assert sorted(len(paths) for paths in files) == [1, 14] and len(passes) == 1


def test_full_disk__is_no_change_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index([packed(cohort(tmp_path / "src"), tmp_path / "packed", "zip")], tmp_path / "out", modality="MR")
    archive = Archive.open(tmp_path / "out")
    (row, _) = archive.select()

    def full(stream: object, target: int) -> str | None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(containers, "copy_limited", full)
    with pytest.raises(StoreError, match="the disk is full"):
        archive.files(row.series_id)
    assert not any((tmp_path / "out" / "private" / "unpacked").iterdir())


def test_damaged_member__loses_itself_and_not_the_others(tmp_path: Path) -> None:
    array, affine = oblique_volume()
    path = tmp_path / "all.zip"
    names = [write_nifti(tmp_path / f"{k}.nii", array + k, affine) for k in range(3)]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(name, name.name)
        place = archive.infolist()[1].header_offset
    data = bytearray(path.read_bytes())
    data[place + 200 : place + 260] = bytes(60)
    path.write_bytes(bytes(data))
    assert [row["reason"] for row in scan_file(str(path))] == ["container", None, "unreadable", None]


@pytest.mark.parametrize("form", ["gz", "bz2", "xz"])
def test_damaged_stream__is_no_fault_of_the_storage(tmp_path: Path, form: str) -> None:
    """Above 5 % of them an index run would stop: damage must not look like an outage."""
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[form]
    data = bytearray(pack(write_nifti(tmp_path / "v.png", *oblique_volume()).read_bytes() * 3))
    data[len(data) // 2] ^= 0xFF
    path = tmp_path / f"v.{form}"
    path.write_bytes(b"\x1f\x8b" + bytes(data[2:]) if form == "gz" else bytes(data))
    reasons = {row["reason"] for row in scan_file(str(path))}
    assert reasons <= {"container", "unreadable", "truncated"} and reasons != {"container"}


def test_damaged_member__is_not_unpacked_in_part(tmp_path: Path) -> None:
    path = tmp_path / "v.bz2"
    data = bytearray(bz2.compress(np.random.default_rng(0).bytes(2_000_000)))
    data[-1000] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(ImageError, match="member of a container is damaged"):
        containers.unpack(f"{path}{containers.SEPARATOR}v", tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())
