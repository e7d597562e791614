"""Round trips, boxes, atomicity and sharing of the store."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.domains.ct import CT
from medssl.domains.mri import MRI
from medssl.errors import RequestError, StoreError
from medssl.store.manifest import ItemRecord, checksum, read_manifest, store_key
from medssl.store.reader import StoreReader
from medssl.store.writer import CacheSummary, cache_items, compress, create_store, write_item
from medssl.types import ImageMeta, Sample
from tests.cost import times_as_long
from tests.synthetic import oblique_affine, oblique_volume, plain_affine, write_nifti

SERIES = "ab" * 16
PATIENT = "cd" * 16


@dataclass
class Row:
    series_id: str
    patient_id: str = PATIENT


class Files:
    """Stands for an index."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = {f"{i:032x}": path for i, path in enumerate(paths)}
        self.rows = [Row(series_id) for series_id in self.paths]

    def files(self, series_id: str) -> list[Path]:
        return [self.paths[series_id]]

    def source_tag(self, series_id: str) -> str:
        return checksum(self.paths[series_id].read_bytes())

    def part(self, series_id: str) -> dict[str, Any] | None:
        return None


def sample_of(image: np.ndarray, valid: np.ndarray | None = None, series_id: str = SERIES) -> Sample:
    meta = ImageMeta(series_id, "mri", "MR", "arbitrary", 2, {"mean": 1.5, "std": 2.0}, ("nan_voxels",))
    return Sample(image, (0.8, 1.1, 2.5), oblique_affine(), valid, meta)


def stored(store: Path, sample: Sample) -> StoreReader:
    if not store.exists():
        create_store(store, MRI())
    mask = sample.image[0] > np.median(sample.image)
    write_item(sample, store, patient_id=PATIENT, mask=mask)
    return StoreReader(store)


def cohort(folder: Path, n: int = 4) -> Files:
    folder.mkdir(exist_ok=True)
    return Files([write_nifti(folder / f"{i}.nii.gz", *oblique_volume(seed=i)) for i in range(n)])


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
@pytest.mark.parametrize("shape", [(20, 26, 14), (70, 65, 33), (64, 64, 64), (3, 130, 5)])
def test_round_trip__bit_equal(tmp_path: Path, dtype: str, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(1)
    image = (rng.normal(0, 1, (2, *shape)) * 100).astype(dtype)
    sample = sample_of(image)
    reader = stored(tmp_path / "s", sample)
    back = reader.read(SERIES)
    assert back.image.tobytes() == image.tobytes() and back.image.dtype == image.dtype
    np.testing.assert_array_equal(back.affine, sample.affine)
    assert back.spacing_mm == sample.spacing_mm and back.meta == sample.meta and back.valid is None
    reader.verify(SERIES)


def test_round_trip__float_bits_survive(tmp_path: Path) -> None:
    image = np.array([0.0, -0.0, 1e-42, np.pi, 3e38, -1.5], dtype=np.float32).reshape(1, 3, 2, 1)
    assert stored(tmp_path / "s", sample_of(image)).read(SERIES).image.tobytes() == image.tobytes()


def test_strided_views__stored_like_their_copies() -> None:
    image = np.arange(70 * 65 * 40, dtype=np.int16).reshape(70, 65, 40)
    view = image.transpose(2, 0, 1)[::-1, :, ::-1][None]
    assert compress(view) == compress(np.ascontiguousarray(view))


@pytest.mark.parametrize("with_valid", [False, True])
def test_read_box__equals_a_padded_slice(tmp_path: Path, with_valid: bool) -> None:
    rng = np.random.default_rng(2)
    shape = (70, 40, 66)
    image = rng.integers(1, 1000, (1, *shape)).astype(np.int16)
    valid = rng.random(shape) < 0.9 if with_valid else None
    reader = stored(tmp_path / "s", sample_of(image, valid))
    around = 80
    padded = np.pad(image[0], around)
    padded_valid = np.pad(np.ones(shape, dtype=bool) if valid is None else valid, around)
    boxes = [((0, 0, 0), shape), ((-5, 3, 60), (20, 20, 20)), ((69, 39, 65), (3, 3, 3)), ((-9, -9, -9), (90, 60, 90))]
    boxes += [(tuple(rng.integers(-10, 60, 3)), tuple(rng.integers(1, 70, 3))) for _ in range(20)]
    boxes += [((100, 0, 0), (4, 4, 4)), ((-20, 0, 0), (20, 5, 5))]
    for start, size in boxes:
        got, got_valid = reader.read_box(SERIES, start, size)
        place = tuple(slice(int(s) + around, int(s) + around + int(w)) for s, w in zip(start, size))
        expected = np.zeros(tuple(int(w) for w in size), dtype=np.int16)
        expected_valid = np.zeros_like(expected, dtype=bool)
        part = padded[place]
        expected[tuple(slice(n) for n in part.shape)] = part
        expected_valid[tuple(slice(n) for n in part.shape)] = padded_valid[place]
        np.testing.assert_array_equal(got[0], expected)
        np.testing.assert_array_equal(got_valid, expected_valid)
        assert got.dtype == np.int16 and got_valid.dtype == bool


def test_read_box__decodes_only_what_it_touches(tmp_path: Path) -> None:
    """Damage in one corner of the frame must not matter to a crop in another."""
    rng = np.random.default_rng(0)
    image = rng.integers(-3000, 3000, (1, 128, 128, 128)).astype(np.int16)
    reader = stored(tmp_path / "s", sample_of(image))
    path = tmp_path / "s" / "items" / f"{SERIES}.b2nd"
    data = bytearray(path.read_bytes())
    # Noise does not compress: chunk k of 8 lies at about k eighths of the file.
    middle = int(len(data) * 7.5 / 8)
    data[middle : middle + 2000] = b"\xff" * 2000
    path.write_bytes(bytes(data))
    first, _ = reader.read_box(SERIES, (0, 0, 0), (64, 64, 64))
    np.testing.assert_array_equal(first[0], image[0, :64, :64, :64])
    with pytest.raises(StoreError, match="damaged"):
        reader.verify(SERIES)


def test_valid__stored_only_when_something_is_invalid(tmp_path: Path) -> None:
    image = oblique_volume()[0][None]
    reader = stored(tmp_path / "s", sample_of(image, np.ones(image.shape[1:], dtype=bool)))
    assert not reader.record(SERIES).has_valid and reader.read(SERIES).valid is None
    assert len(list((tmp_path / "s" / "items").iterdir())) == 2
    valid = np.ones(image.shape[1:], dtype=bool)
    valid[3] = False
    reader = stored(tmp_path / "s", sample_of(image, valid))
    back = reader.read(SERIES).valid
    assert back is not None
    np.testing.assert_array_equal(back, valid)
    reader = stored(tmp_path / "s", sample_of(image))
    assert len(list((tmp_path / "s" / "items").iterdir())) == 2


def test_record__json_round_trip_and_content(tmp_path: Path) -> None:
    image = oblique_volume()[0][None]
    record = stored(tmp_path / "s", sample_of(image)).record(SERIES)
    again = ItemRecord.from_json(record.to_json())
    assert again.to_json() == record.to_json()
    np.testing.assert_array_equal(again.affine, oblique_affine())
    assert again.foreground.dtype == np.uint16 and len(again.foreground) == 512
    assert (image[0] > np.median(image))[tuple(again.foreground.T.astype(int))].all()
    assert (again.shape, again.channels, again.dtype, again.patient_id) == ((20, 26, 14), 1, "int16", PATIENT)
    assert again.n_bytes == (tmp_path / "s" / "items" / f"{SERIES}.b2nd").stat().st_size
    with pytest.raises(ValueError, match="not an item record"):
        ItemRecord.from_json("{}")


def test_cache_items__same_key_same_bytes_whatever_the_executor(tmp_path: Path) -> None:
    archive = cohort(tmp_path / "c")
    first = cache_items(archive, archive.rows, MRI(), tmp_path / "one")
    with ThreadPoolExecutor(3) as pool:
        cache_items(archive, archive.rows[::-1], MRI(), tmp_path / "two", executor=pool)
    assert (first.written, first.present, first.failed) == (4, 0, {})
    assert first.n_raw_bytes == 4 * 20 * 26 * 14 * 2 > first.n_bytes > 0
    one = {path.relative_to(tmp_path / "one"): path.read_bytes() for path in (tmp_path / "one").rglob("*.*")}
    assert len(one) == 9
    assert one == {path.relative_to(tmp_path / "two"): path.read_bytes() for path in (tmp_path / "two").rglob("*.*")}


def test_cache_items__second_run_writes_what_is_missing_or_changed(tmp_path: Path) -> None:
    archive = cohort(tmp_path / "c")
    calls: list[tuple[int, int]] = []
    cache_items(archive, archive.rows[:3], MRI(), tmp_path / "s")
    summary = cache_items(archive, archive.rows, MRI(), tmp_path / "s", on_progress=lambda *a: calls.append(a))
    assert (summary.written, summary.present) == (1, 3)
    assert calls == [(3, 4), (4, 4)]
    write_nifti(archive.paths[archive.rows[0].series_id], oblique_volume(seed=9)[0], plain_affine())
    summary = cache_items(archive, archive.rows, MRI(), tmp_path / "s")
    assert (summary.written, summary.present) == (1, 3)
    np.testing.assert_array_equal(StoreReader(tmp_path / "s").read(archive.rows[0].series_id).image[0], oblique_volume(seed=9)[0])


def test_cache_items__bad_images_are_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    archive = cohort(tmp_path / "c", 5)
    ids = [row.series_id for row in archive.rows]
    array, affine = oblique_volume()
    archive.paths[ids[0]].write_bytes(archive.paths[ids[0]].read_bytes()[:500])
    write_nifti(archive.paths[ids[1]], np.full_like(array, 3), affine)
    write_nifti(archive.paths[ids[2]], np.stack([array, array], axis=-1), affine)
    archive.paths[ids[3]].write_text("not an image")
    summary = cache_items(archive, archive.rows, MRI(), tmp_path / "s")
    assert summary.written == 1
    reasons = {series_id: reason for series_id, (reason, _) in summary.failed.items()}
    assert reasons == {ids[0]: "truncated", ids[1]: "constant", ids[2]: "not_3d", ids[3]: "not_image"}
    for series_id, (_, message) in summary.failed.items():
        assert message.startswith(f"series {series_id}: ") and str(tmp_path) not in message
    assert StoreReader(tmp_path / "s").series_ids() == [ids[4]]


class Crashing(MRI):
    """A domain with a bug."""

    def read(self, files: Sequence[Path], *, series_id: str, part: Any = None) -> Sample:
        if series_id.endswith("1"):
            raise KeyError("/secret/path")
        if series_id.endswith("2"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(files, series_id=series_id)


def test_cache_items__a_readers_bug_costs_one_item(tmp_path: Path) -> None:
    archive = cohort(tmp_path / "c", 2)
    summary = cache_items(archive, archive.rows, Crashing(), tmp_path / "s")
    assert summary.written == 1
    reason, message = summary.failed[archive.rows[1].series_id]
    assert reason == "unreadable" and "KeyError" in message and "secret" not in message


def test_cache_items__a_lost_worker_costs_a_retry(tmp_path: Path) -> None:
    archive = cohort(tmp_path / "c", 3)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        summary = cache_items(archive, archive.rows, Crashing(), tmp_path / "s", executor=pool)
    assert summary.failed[archive.rows[2].series_id][0] == "worker_lost"
    assert cache_items(archive, archive.rows, MRI(), tmp_path / "s").failed == {}
    assert len(StoreReader(tmp_path / "s").series_ids()) == 3


def test_manifest__every_parameter_and_another_key_refused(tmp_path: Path) -> None:
    create_store(tmp_path / "s", CT(body_hu=-400))
    manifest = read_manifest(tmp_path / "s")
    assert manifest is not None
    assert manifest["domain"] == {"name": "ct", "version": 2, "params": {"body_hu": -400.0, "keep_table": True}}
    assert manifest["codec"] == {"name": "blosc2-zstd", "clevel": 1, "chunk": 64, "block": 32}
    assert manifest["key"] == store_key(CT(body_hu=-400)) != store_key(CT()) != store_key(MRI())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RequestError, match=r"holds a store with key .* \(domain ct\).* name another folder"):
        cache_items(Files([]), [], MRI(), tmp_path / "s")
    assert sorted(tmp_path.rglob("*")) == before


def test_foreign_folder__refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(RequestError, match=r"is not empty and has no manifest\.json"):
        cache_items(Files([]), [], MRI(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_modes__owner_only(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        archive = cohort(tmp_path / "c", 1)
        cache_items(archive, archive.rows, MRI(), tmp_path / "s")
    finally:
        os.umask(old)
    for path in [tmp_path / "s", *(tmp_path / "s").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


@pytest.mark.parametrize("fails_at", [1, 2, 3, 5, 7])
def test_disk_full__earlier_items_stay_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    archive = cohort(tmp_path / "c")
    create_store(tmp_path / "s", MRI())
    real: Callable[[int], None] = os.fsync
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"no space left in .* complete and stay valid; free some space and run the same command"):
        cache_items(archive, archive.rows, MRI(), tmp_path / "s")
    monkeypatch.undo()
    reader = StoreReader(tmp_path / "s")
    assert len(reader.series_ids()) == (fails_at - 1) // 2
    assert len(list((tmp_path / "s" / "items").iterdir())) == 2 * len(reader.series_ids())
    for series_id in reader.series_ids():
        reader.verify(series_id)
    missing = 4 - len(reader.series_ids())
    assert cache_items(archive, archive.rows, MRI(), tmp_path / "s").written == missing


def test_file_size_limit__store_error_in_a_real_process(tmp_path: Path) -> None:
    archive = cohort(tmp_path / "c", 1)
    big = np.random.default_rng(0).integers(0, 30000, (64, 64, 40)).astype(np.int16)
    write_nifti(archive.paths[archive.rows[0].series_id], big, plain_affine())
    code = """
        import resource, signal, sys
        from pathlib import Path
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        from tests.store.test_store import Files
        from medssl.domains.mri import MRI
        from medssl.errors import StoreError
        from medssl.store.writer import cache_items
        archive = Files([Path(sys.argv[1])])
        try:
            cache_items(archive, archive.rows, MRI(), Path(sys.argv[2]))
        except StoreError as err:
            print(err)
            sys.exit(err.exit_code)
    """
    source = archive.paths[archive.rows[0].series_id]
    done = run_python(code, source, tmp_path / "s")
    assert done.returncode == 1, done.stderr
    assert "no space left" in done.stdout
    assert [path.name for path in (tmp_path / "s").rglob("*")] in (["items", "manifest.json"], ["manifest.json", "items"])


def run_python(code: str, *args: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_no_write_permission__request_error_as_another_user(open_folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    code = """
        import os, sys
        from pathlib import Path
        from medssl.domains.mri import MRI
        from medssl.errors import RequestError
        from medssl.store.writer import cache_items
        import medssl.store.manifest, json, numpy
        os.setgid(65534); os.setuid(65534)
        try:
            cache_items(None, [], MRI(), Path(sys.argv[1]) / "store")
        except RequestError as err:
            print(err)
            sys.exit(err.exit_code)
    """
    locked = open_folder / "locked"
    locked.mkdir(mode=0o755)
    done = run_python(code, locked)
    assert done.returncode == 2, done.stderr
    assert "cannot be written (Permission denied)" in done.stdout
    assert list(locked.iterdir()) == []


def test_killed_writer__store_stays_usable(tmp_path: Path) -> None:
    archive = cohort(tmp_path / "c", 1)
    code = """
        import os, signal, sys
        from pathlib import Path
        from tests.store.test_store import Files
        from medssl.domains.mri import MRI
        from medssl.store.writer import cache_items
        real, calls = os.replace, []
        def replace(*args):
            calls.append(args)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)
        os.replace = replace
        archive = Files([Path(sys.argv[1])])
        cache_items(archive, archive.rows, MRI(), Path(sys.argv[2]))
    """
    done = run_python(code, archive.paths[archive.rows[0].series_id], tmp_path / "s")
    assert done.returncode == -signal.SIGKILL
    assert StoreReader(tmp_path / "s").series_ids() == []
    assert any(path.name.startswith(".tmp-") for path in (tmp_path / "s" / "items").iterdir())
    assert cache_items(archive, archive.rows, MRI(), tmp_path / "s").written == 1
    assert not any(path.name.startswith(".tmp-") for path in (tmp_path / "s").rglob("*"))


def checks(reader: StoreReader, series_id: str, n: int, seed: int) -> int:
    rng = np.random.default_rng(seed)
    total = 0
    for _ in range(n):
        start = [int(place) for place in rng.integers(-10, 60, 3)]
        total += int(reader.read_box(series_id, start, (24, 24, 24))[0].sum(dtype=np.int64))
    return total


@pytest.mark.slow
def test_reader__threads_fork_spawn_and_pickle_agree(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 500, (1, 80, 70, 90)).astype(np.int16)
    reader = stored(tmp_path / "s", sample_of(image))
    expected = [checks(reader, SERIES, 10, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(checks, [reader] * 4, [SERIES] * 4, [10] * 4, range(4))) == expected
    assert checks(pickle.loads(pickle.dumps(reader)), SERIES, 10, 0) == expected[0]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(checks, [reader] * 2, [SERIES] * 2, [10] * 2, range(2))) == expected[:2]


def test_reader__works_in_a_forked_child(tmp_path: Path) -> None:
    """Forked in a fresh process: this one may hold threads of other tests."""
    image = np.random.default_rng(0).integers(0, 500, (1, 80, 70, 90)).astype(np.int16)
    stored(tmp_path / "s", sample_of(image))
    code = """
        import os, sys
        from pathlib import Path
        from medssl.store.reader import StoreReader
        reader = StoreReader(Path(sys.argv[1]))
        name = reader.series_ids()[0]
        total = int(reader.read(name).image.sum())
        pid = os.fork()
        if pid == 0:
            os._exit(0 if int(reader.read(name).image.sum()) == total else 3)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    assert run_python(code, tmp_path / "s").returncode == 0


def test_reader__leaks_no_handle(tmp_path: Path) -> None:
    image = oblique_volume()[0][None]
    reader = stored(tmp_path / "s", sample_of(image))
    reader.read(SERIES)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        reader.read_box(SERIES, (0, 0, 0), (8, 8, 8))
    assert len(os.listdir("/proc/self/fd")) == before


def test_reader__errors_name_the_series_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no store"):
        StoreReader(tmp_path)
    reader = stored(tmp_path / "s", sample_of(oblique_volume()[0][None]))
    with pytest.raises(StoreError, match=r"is not in the store .* run `medssl cache` again"):
        reader.record("0" * 32)
    (tmp_path / "s" / "items" / f"{SERIES}.b2nd").write_bytes(b"junk")
    with pytest.raises(StoreError, match=f"series {SERIES} is damaged"):
        reader.read(SERIES)
    (tmp_path / "s" / "items" / f"{SERIES}.b2nd").unlink()
    with pytest.raises(StoreError, match=r"cannot be read .* \(No such file or directory\); see whether the store was moved"):
        reader.read(SERIES)
    (tmp_path / "s" / "items" / f"{SERIES}.json").write_text("{")
    with pytest.raises(StoreError, match="is damaged"):
        StoreReader(tmp_path / "s").record(SERIES)
    assert SERIES in reader and "0" * 32 not in reader


def test_real_ct__at_most_half_of_raw_and_bit_equal(tmp_path: Path, shared_data: Path) -> None:
    sources = {
        "covid": sorted((shared_data / "ct_covid_ct_md" / "P002").iterdir()),
        "totalseg": [shared_data / "ct_mr_totalseg_examples" / "example_ct_sm.nii.gz"],
    }
    create_store(tmp_path / "s", CT())
    for i, files in enumerate(sources.values()):
        sample = CT().read(files, series_id=f"{i:032x}")
        record = write_item(sample, tmp_path / "s", patient_id=PATIENT, mask=CT().foreground(sample))
        assert record.n_bytes <= 0.5 * sample.image.nbytes
        np.testing.assert_array_equal(StoreReader(tmp_path / "s").read(record.series_id).image, sample.image)


@pytest.mark.slow
def test_cache__large_volume_stays_under_memory_limit(tmp_path: Path) -> None:
    shape = (512, 512, 400)
    rng = np.random.default_rng(0)
    path = tmp_path / "big.nii"
    header = write_nifti(tmp_path / "small.nii", np.zeros((2, 2, 2), np.int16), plain_affine()).read_bytes()[:352]
    data = bytearray(header)
    data[40:56] = np.array([3, *shape, 1, 1, 1, 1], "<i2").tobytes()
    with open(path, "wb") as handle:
        handle.write(bytes(data))
        for _ in range(shape[2]):
            handle.write((rng.normal(0, 30, shape[:2]) + rng.normal(100, 300)).astype("<i2").tobytes())
    code = """
        import sys
        from pathlib import Path
        from tests.store.test_store import Files
        from medssl.domains.mri import MRI
        from medssl.store.writer import cache_items
        archive = Files([Path(sys.argv[1])])
        summary = cache_items(archive, archive.rows, MRI(), Path(sys.argv[2]))
        assert summary.written == 1, summary
        # not ru_maxrss: a child inherits that of the process that started it
        (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM:")]
        print(int(line.split()[1]) * 1024)
    """
    done = run_python(code, path, tmp_path / "s")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.5e9


def test_summary__is_json_able() -> None:
    assert json.loads(json.dumps(asdict(CacheSummary(1, 2, {"a": ("constant", "text")}))))["failed"] == {"a": ["constant", "text"]}


def test_compress__differences_only_where_shuffling_leaves_half() -> None:
    import blosc2

    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.normal(0, 0.5, (1, 40, 40, 40)), axis=3).astype(np.int16)
    noisy = (np.cumsum(rng.normal(0, 300, (1, 40, 40, 40)), axis=3) % 2000).astype(np.int16)
    used = [blosc2.ndarray_from_cframe(compress(image)).schunk.cparams.filters for image in (smooth, noisy)]
    assert blosc2.Filter.BYTEDELTA not in used[0] and blosc2.Filter.BYTEDELTA in used[1]


@pytest.mark.slow
def test_random_crops__near_bare_blosc2(tmp_path: Path) -> None:
    """Bounded loosely; the tight figure comes from a benchmark."""
    import blosc2

    rng = np.random.default_rng(0)
    image = (np.cumsum(rng.normal(0, 2, (1, 256, 256, 128)), axis=1) + 100).astype(np.int16)
    reader = stored(tmp_path / "s", sample_of(image))
    codec = {"codec": blosc2.Codec.ZSTD, "clevel": 1, "nthreads": 1}
    bare = tmp_path / "bare.b2nd"
    blosc2.asarray(image[0], chunks=(64,) * 3, blocks=(32,) * 3, urlpath=str(bare), cparams=codec)
    opened = blosc2.open(str(bare), mode="r", dparams={"nthreads": 1})
    starts = [[int(rng.integers(0, n - 96)) for n in image.shape[1:]] for _ in range(4)]
    regions = [tuple(slice(s, s + 96) for s in start) for start in starts]

    def ours() -> list[np.ndarray]:
        return [reader.read_box(SERIES, start, (96, 96, 96))[0][0] for start in starts]

    def theirs() -> list[np.ndarray]:
        return [opened[region] for region in regions]

    np.testing.assert_array_equal(ours(), theirs())
    assert times_as_long(ours, theirs, 1.25 / 0.8) < 1.25 / 0.8


def test_reader__opens_a_replaced_file_again(tmp_path: Path) -> None:
    import blosc2

    path = tmp_path / "item.b2nd"
    reader = StoreReader.__new__(StoreReader)
    reader.__setstate__({"store": tmp_path, "manifest": {}, "key": ""})
    everything = (slice(None),)
    for value in (1, 2):
        blosc2.asarray(np.full(8, value, np.int16), urlpath=str(tmp_path / "new.b2nd"), mode="w")
        (tmp_path / "new.b2nd").replace(path)
        assert reader._decode(path, everything, "s").tolist() == [value] * 8
        assert reader._frame(path) is reader._frame(path)
