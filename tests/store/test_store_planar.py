"""Images and clips in the store: round trips, boxes, frames, atomicity; volumes keep their bytes."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.domains.mri import MRI
from medssl.domains.ultrasound import Ultrasound, frames_at
from medssl.domains.xray import XRay
from medssl.errors import RequestError, StoreError
from medssl.store.manifest import ItemRecord, describe, store_key
from medssl.store.reader import StoreReader, _runs
from medssl.store.writer import cache_items, compress, create_store, write_item
from medssl.types import ImageMeta, Kind, Sample
from tests.store.test_store import PATIENT, SERIES, Files, sample_of, stored
from tests.synthetic import oblique_volume
from tests.synthetic_planar import radiograph, us_loop, write_planar_dicom

FACTS: dict[str, str | float | bool] = {"view": "ap", "field_top": 3.0, "inverted": True}


def planar(image: np.ndarray, kind: Kind, valid: np.ndarray | None = None, spacing: Any = (0.2, 0.3)) -> Sample:
    times = tuple(33.5 * k for k in range(len(image))) if kind == "clip" else None
    n_channels = image.shape[1] if kind == "clip" else len(image)
    names = tuple(f"c{k}" for k in range(n_channels))
    stats = {"mean": 1.5, "std": 2.0}
    meta = ImageMeta(
        SERIES, "test", "US", stats=stats, flags=("lossy",), kind=kind, frame_times_ms=times, channels=names, facts=FACTS
    )
    return Sample(image, spacing, None, valid, meta)


def put(store: Path, sample: Sample) -> StoreReader:
    if not store.exists():
        create_store(store, Ultrasound())
    mask = np.ones(sample.image.shape[-2:], dtype=bool) if sample.valid is None else sample.valid
    write_item(sample, store, patient_id=PATIENT, mask=mask)
    return StoreReader(store)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("image", (1, 60, 48)),
        ("image", (3, 700, 530)),
        ("image", (6, 64, 65)),
        ("clip", (21, 1, 60, 48)),
        ("clip", (5, 3, 140, 33)),
    ],
)
@pytest.mark.parametrize("with_valid", [False, True])
def test_round_trip__bit_equal(tmp_path: Path, dtype: str, kind: Kind, shape: tuple[int, ...], with_valid: bool) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 65536, shape).astype(dtype)
    sample = planar(image, kind, rng.random(shape[-2:]) < 0.7 if with_valid else None)
    reader = put(tmp_path / "s", sample)
    back = reader.read(SERIES)
    assert back.image.tobytes() == image.tobytes() and (back.image.dtype, back.image.shape) == (image.dtype, shape)
    assert back.meta == sample.meta and back.spacing_mm == (0.2, 0.3) and back.affine is None
    assert (back.valid is not None) == with_valid
    if back.valid is not None:
        np.testing.assert_array_equal(back.valid, sample.valid)
    reader.verify(SERIES)
    record = reader.record(SERIES)
    assert record.channels * np.prod(record.shape) == image.size and record.shape[-2:] == shape[-2:]
    assert record.foreground.shape[1] == 2
    assert ItemRecord.from_json(record.to_json()).to_json() == record.to_json()


def test_no_spacing__stays_none_and_millimetres_are_refused(tmp_path: Path) -> None:
    reader = put(tmp_path / "s", planar(radiograph()[None], "image", spacing=None))
    assert reader.read(SERIES).spacing_mm is None
    with pytest.raises(RequestError, match="has no spacing and millimetres are needed"):
        _ = reader.record(SERIES).voxel_mm


@pytest.mark.parametrize("with_valid", [False, True])
def test_read_box__of_an_image_equals_a_padded_slice(tmp_path: Path, with_valid: bool) -> None:
    rng = np.random.default_rng(2)
    shape, around = (530, 90), 120
    image = rng.integers(1, 60000, (2, *shape)).astype(np.uint16)
    valid = rng.random(shape) < 0.9 if with_valid else np.ones(shape, bool)
    reader = put(tmp_path / "s", planar(image, "image", valid if with_valid else None))
    padded, padded_valid = np.pad(image, ((0, 0), (around,) * 2, (around,) * 2)), np.pad(valid, around)
    boxes = [((0, 0), shape), ((-5, 3), (40, 20)), ((520, 80), (100, 100)), ((-100, 0), (50, 50))]
    boxes += [(tuple(rng.integers(-60, 80, 2)), tuple(rng.integers(1, 100, 2))) for _ in range(20)]
    for start, size in boxes:
        got, got_valid = reader.read_box(SERIES, start, size)
        place = tuple(slice(int(s) + around, int(s) + around + int(w)) for s, w in zip(start, size))
        np.testing.assert_array_equal(got, padded[(slice(None), *place)])
        np.testing.assert_array_equal(got_valid, padded_valid[place])


@pytest.mark.parametrize("with_valid", [False, True])
def test_read_box__of_a_clip_equals_a_padded_slice(tmp_path: Path, with_valid: bool) -> None:
    rng = np.random.default_rng(3)
    image = rng.integers(1, 255, (37, 3, 50, 140)).astype(np.uint8)
    valid = rng.random((50, 140)) < 0.9 if with_valid else np.ones((50, 140), bool)
    reader = put(tmp_path / "s", planar(image, "clip", valid if with_valid else None))
    around = 100
    padded = np.pad(image, ((around,) * 2, (0, 0), (around,) * 2, (around,) * 2))
    padded_valid = np.pad(np.broadcast_to(valid, (37, 50, 140)), around)
    boxes = [((0, 0, 0), (37, 50, 140)), ((-3, -4, 100), (10, 20, 80)), ((36, 0, 0), (9, 5, 5)), ((50, 0, 0), (4, 4, 4))]
    boxes += [(tuple(rng.integers(-20, 60, 3)), tuple(rng.integers(1, 40, 3))) for _ in range(15)]
    for start, size in boxes:
        got, got_valid = reader.read_box(SERIES, start, size)
        t, r, c = (slice(int(s) + around, int(s) + around + int(w)) for s, w in zip(start, size))
        np.testing.assert_array_equal(got, padded[t, :, r, c])
        np.testing.assert_array_equal(got_valid, padded_valid[t, r, c])


def test_read_frames__any_order_repeated_and_by_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    image = rng.integers(0, 255, (90, 1, 60, 70)).astype(np.uint8)
    valid = rng.random((60, 70)) < 0.8
    reader = put(tmp_path / "s", planar(image, "clip", valid))
    times = reader.record(SERIES).frame_times_ms
    assert times is not None
    for frames in ([5], [0, 1, 2], [80, 3, 3, 40], list(frames_at(times, 10)), range(0, 90, 40), []):
        got, seen = reader.read_frames(SERIES, frames)
        np.testing.assert_array_equal(got, image[np.asarray(frames, dtype=int)])
        np.testing.assert_array_equal(seen, valid)
    got, seen = reader.read_frames(SERIES, [7, 2], (-3, 50), (20, 40))
    np.testing.assert_array_equal(got, np.pad(image[[7, 2]], ((0, 0), (0, 0), (3, 0), (0, 20)))[:, :, :20, 50:])
    np.testing.assert_array_equal(seen, np.pad(valid, ((3, 0), (0, 20)))[:20, 50:])
    again = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(again.read_frames(SERIES, [9])[0], image[[9]])
    with pytest.raises(RequestError, match="has frames 0 to 89"):
        reader.read_frames(SERIES, [90])


def test_read_frames__of_an_image_refused(tmp_path: Path) -> None:
    reader = put(tmp_path / "s", planar(radiograph()[None], "image"))
    with pytest.raises(RequestError, match="is no clip but of the kind image; use read_box"):
        reader.read_frames(SERIES, [0])


def test_runs__skip_whole_chunks() -> None:
    assert [(places.start, places.stop, wanted) for places, wanted in _runs([0, 3, 20, 60, 59, 59])] == [
        (0, 3, [0, 3, 20]),
        (3, 4, [60]),
        (4, 5, [59]),
        (5, 6, [59]),
    ]


def test_reading__decodes_only_what_it_touches(tmp_path: Path) -> None:
    """Damage in late frames must not matter to a crop of early ones."""
    image = np.random.default_rng(0).integers(0, 255, (64, 1, 128, 128)).astype(np.uint8)
    reader = put(tmp_path / "s", planar(image, "clip"))
    path = tmp_path / "s" / "items" / f"{SERIES}.b2nd"
    data = bytearray(path.read_bytes())
    late = int(len(data) * 0.9)
    data[late : late + 2000] = b"\xff" * 2000
    path.write_bytes(bytes(data))
    np.testing.assert_array_equal(reader.read_frames(SERIES, range(16), (0, 0), (100, 100))[0], image[:16, :, :100, :100])
    with pytest.raises(StoreError, match="damaged"):
        reader.verify(SERIES)


def test_volumes__keep_layout_record_and_key(tmp_path: Path) -> None:
    """Stores written before there were images stay valid: nothing new is written for a volume without facts."""
    import blosc2

    image = oblique_volume((70, 40, 80))[0][None]
    frame = blosc2.ndarray_from_cframe(compress(image))
    assert (frame.chunks, frame.blocks) == ((1, 64, 40, 64), (1, 32, 32, 32))
    record = stored(tmp_path / "s", sample_of(image)).record(SERIES)
    assert set(json.loads(record.to_json())) == {
        "affine", "channels", "checksum", "domain", "dtype", "flags", "foreground", "format", "has_valid", "modality", "n_bytes",
        "patient_id", "series_id", "shape", "slice_axis", "source", "spacing_mm", "stats", "units",
    }  # fmt: skip
    assert {name: describe(MRI())[name] for name in ("format", "axis_order", "codec")} == {
        "format": 1,
        "axis_order": "XYZ-RAS",
        "codec": {"name": "blosc2-zstd", "clevel": 1, "chunk": 64, "block": 32},
    }
    sample = sample_of(image)
    told = Sample(image, sample.spacing_mm, sample.affine, None, replace(sample.meta, facts=FACTS))
    assert stored(tmp_path / "s", told).read(SERIES).meta == told.meta


def test_describe__planar_layout_in_the_key() -> None:
    ultrasound, xray = describe(Ultrasound()), describe(XRay())
    assert (ultrasound["axis_order"], xray["axis_order"]) == ("TCHW", "CHW")
    assert ultrasound["codec"]["chunk"] == {"image": [4, 512, 512], "clip": [16, 4, 128, 128]}
    assert store_key(XRay()) != store_key(XRay(voi=True)) != store_key(XRay(crop=False))


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4, 5, 6])
def test_disk_full__nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    paths = [write_planar_dicom(tmp_path / f"{k}.dcm", us_loop(6, (60, 80), seed=k), modality="US", FrameTime=40) for k in range(3)]
    archive = Files(paths)
    create_store(tmp_path / "s", Ultrasound())
    real, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= fails_at:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="no space left"):
        cache_items(archive, archive.rows, Ultrasound(), tmp_path / "s")
    monkeypatch.undo()
    reader = StoreReader(tmp_path / "s")
    before = reader.series_ids()
    assert len(before) == (fails_at - 1) // 3  # voxels, mask and record of each
    for series_id in before:
        reader.verify(series_id)
    summary = cache_items(archive, archive.rows, Ultrasound(), tmp_path / "s")
    assert summary.written == 3 - len(before) and summary.failed == {}
    assert summary.n_raw_bytes == 3 * 6 * 60 * 80
    sample = Ultrasound().read([paths[0]], series_id=archive.rows[0].series_id)
    np.testing.assert_array_equal(reader.read(archive.rows[0].series_id).image, sample.image)


@pytest.mark.parametrize(
    ("name", "limit"), [("us_lung_video/cc-by/Reg_Image_182106_crop.mp4", 0.4), ("cxr_hannover/images/1052b0fe.png", 1.0)]
)
def test_real_items__bit_equal(tmp_path: Path, shared_data: Path, name: str, limit: float) -> None:
    domain: Any = Ultrasound() if name.startswith("us") else XRay()
    if name.startswith("us"):
        pytest.importorskip("av")
    archive = Files([shared_data / name])
    cache_items(archive, archive.rows, domain, tmp_path / "s")
    reader = StoreReader(tmp_path / "s")
    series_id = archive.rows[0].series_id
    sample = domain.read([shared_data / name], series_id=series_id)
    back = reader.read(series_id)
    np.testing.assert_array_equal(back.image, sample.image)
    assert back.meta == sample.meta and back.spacing_mm is None
    assert reader.record(series_id).n_bytes < limit * sample.image.nbytes
