from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medssl.domains.mri import MRI
from medssl.errors import RequestError
from medssl.objectives.global_local_contrast import partition_of
from medssl.sampling.planes import (
    MiddlePlanes,
    PlaneDraw,
    PlaneSampler,
    PlaneSource,
    depths,
    display,
    partition_planes,
    pixel_mm,
    read_planes,
    shares,
    slice_axis,
    spread,
)
from medssl.store.reader import StoreReader
from medssl.store.writer import create_store, write_item
from medssl.types import DrawKey, ImageMeta, Sample
from medssl.views.planes import Planes, PlaneViews
from tests.store.test_store import PATIENT, SERIES
from tests.store.test_store_planar import planar, put


@dataclass
class Record:
    shape: tuple[int, ...] = (30, 40, 100)
    kind: str = "volume"
    slice_axis: int | None = 2
    spacing_mm: tuple[float, ...] | None = (1.0, 0.5, 3.0)
    foreground: np.ndarray = field(default_factory=lambda: np.array([[1, 2, 77], [3, 4, 78]], dtype=np.uint16))
    frame_times_ms: tuple[float, ...] | None = None
    series_id: str = "s" * 32

    @property
    def voxel_mm(self) -> tuple[float, ...]:
        assert self.spacing_mm is not None
        return self.spacing_mm


def sampler(record: Record, slices: int | None, **options: Any) -> PlaneSampler:
    return PlaneSampler("a", [0, 1, 2], lambda _: record, slices, batch=4, **options)


def test_spread__covers_evenly_and_never_repeats() -> None:
    assert spread(5, 8, 0.3, 0.7) == (0, 1, 2, 3, 4)
    assert spread(100, 4, 1.0, 0.0) == (12, 37, 62, 87)
    assert spread(100, 10, 0.1, 1.0) == tuple(range(90, 100))
    for count in range(1, 60):
        for most in (1, 3, 16):
            for share in (0.01, 0.4, 1.0):
                for start in (0.0, 0.6, 1.0):
                    found = spread(count, most, share, start)
                    assert len(found) == len(set(found)) == min(count, most)
                    assert list(found) == sorted(found) and found[0] >= 0 and found[-1] < count


def test_draw__is_pure_and_follows_the_slice_axis() -> None:
    record = Record()
    draws = {sampler(record, None).draw(DrawKey(0, step, 1)) for step in range(60)}
    assert sampler(record, None).draw(DrawKey(0, 3, 2)) == sampler(record, None).draw(DrawKey(0, 3, 2))
    assert {draw.axis for draw in draws} == {2}
    through = [draw.planes[0] in (77, 78) for draw in draws]
    assert 0 < sum(through) < len(through)
    assert {sampler(record, None, foreground=1.0).draw(DrawKey(0, s, 0)).planes[0] for s in range(20)} == {77, 78}
    stack = sampler(record, 16, cover=(0.5, 0.6)).draw(DrawKey(0, 0, 0))
    assert len(stack.planes) == 16 and 45 <= stack.planes[-1] - stack.planes[0] <= 60


def test_partitions__follow_the_position_in_the_batch() -> None:
    for position in range(8):
        found = {sampler(Record(), None, partitions=4).draw(DrawKey(0, s, position)).planes[0] for s in range(50)}
        assert min(found) >= 25 * (position % 4) and max(found) < 25 * (position % 4 + 1) and len(found) > 10
    thin = Record(shape=(30, 40, 2))
    assert all(sampler(thin, None, partitions=4).draw(DrawKey(0, 0, p)).planes[0] in (0, 1) for p in range(4))


@pytest.mark.parametrize("partitions", [2, 3, 4, 6, 10])
def test_partitions__sampler_and_objective_agree_on_every_plane(partitions: int) -> None:
    """The objective sees a float32 share, the sampler counts in whole numbers."""
    for count in [*range(1, 130), 400, 999, 1000, 1001]:
        record = Record(shape=(30, 40, count))
        share = torch.from_numpy(shares(record, PlaneDraw(0, tuple(range(count)), 2)).astype(np.float32))
        seen = partition_of(share, partitions).numpy()
        for part in range(partitions):
            places = partition_planes(count, partitions, part)
            if (seen == part).any():
                assert np.array_equal(places, np.flatnonzero(seen == part)), (count, part)
            else:  # too few planes: the nearest one to the middle of the part
                away = np.abs(share.numpy() - (part + 0.5) / partitions)
                assert len(places) == 1 and away[places[0]] == pytest.approx(away.min(), abs=1e-6)
        if count >= partitions + 1:
            assert set(seen.tolist()) == set(range(partitions))


def test_partitions__of_drawn_slices_are_those_that_the_objective_reads(tmp_path: Path) -> None:
    """Ten slices, four parts: equal counts of slices would put slice 2 into part 1, and its place says part 0."""
    image = np.random.default_rng(0).integers(0, 900, (1, 20, 24, 10)).astype(np.int16)
    reader = volume_store(tmp_path / "s", image, 2)
    draw = PlaneSampler("a", [0], lambda _: reader.record(SERIES), None, batch=8, partitions=4)
    views = PlaneViews(size=16, count=3, normalize="none")
    source = PlaneSource("a", "mri", reader, {0: SERIES}, draw, views, item=Planes)
    for step in range(12):
        made = source.views(source.fetch([DrawKey(0, step, p) for p in range(8)]), torch.device("cpu"))
        for view in range(3):
            assert partition_of(made["image_share"][:, view], 4).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_slice_axis__as_the_source_had_it_else_the_coarsest_else_z() -> None:
    assert slice_axis(Record(slice_axis=1)) == 1
    assert slice_axis(Record(slice_axis=None)) == 2
    assert slice_axis(Record(slice_axis=None, spacing_mm=(3.0, 1.0, 1.0))) == 0
    assert slice_axis(Record(slice_axis=None, spacing_mm=(1.0, 1.0, 1.0))) == 2
    assert slice_axis(Record(slice_axis=1), 0) == 0
    assert slice_axis(Record(kind="image")) is None and slice_axis(Record(kind="clip")) == 0


def test_display__puts_anterior_and_superior_up_and_the_right_side_left() -> None:
    """A volume whose voxels hold their RAS+ coordinates, asked at the corners of each picture."""
    size = (4, 5, 6)
    where = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"))
    right, anterior, superior = (n - 1 for n in size)
    axial = display(where[:, :, :, 2], 2)
    assert axial.shape == (3, 5, 4) and axial[:, 0, 0].tolist() == [right, anterior, 2] and axial[:, -1, -1].tolist() == [0, 0, 2]
    coronal = display(where[:, :, 2, :], 1)
    assert coronal[:, 0, 0].tolist() == [right, 2, superior] and coronal[:, -1, 0].tolist() == [right, 2, 0]
    sagittal = display(where[:, 2, :, :], 0)
    assert sagittal[:, 0, 0].tolist() == [2, anterior, superior] and sagittal[:, 0, -1].tolist() == [2, 0, superior]


def volume_store(folder: Path, image: np.ndarray, axis: int | None) -> StoreReader:
    sample = Sample(
        image, (1.0, 0.5, 3.0), np.diag([1.0, 0.5, 3.0, 1.0]), None, ImageMeta(SERIES, "mri", slice_axis=axis, stats={"mean": 1.0})
    )
    create_store(folder, MRI())
    write_item(sample, folder, patient_id=PATIENT, mask=np.ones(image.shape[1:], bool))
    return StoreReader(folder)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_read_planes__of_a_volume_equals_indexing(tmp_path: Path, axis: int) -> None:
    image = np.random.default_rng(0).integers(0, 900, (2, 70, 40, 100)).astype(np.int16)
    reader = volume_store(tmp_path / "s", image, axis)
    places = (3, 5, 31, 32, 39)
    got, valid = read_planes(reader, SERIES, PlaneDraw(0, places, axis))
    wanted = np.stack([display(np.take(image, p, axis + 1), axis) for p in places])
    assert got.dtype == np.int16 and np.array_equal(got, wanted) and valid.all() and valid.shape == (5, *wanted.shape[2:])
    record = reader.record(SERIES)
    assert pixel_mm(record, axis) == {0: (3.0, 0.5), 1: (3.0, 1.0), 2: (0.5, 1.0)}[axis]
    assert depths(record, PlaneDraw(0, places, axis), stack=True).tolist() == [p * (1.0, 0.5, 3.0)[axis] for p in places]


def test_clip__frames_are_planes_and_times_their_depth(tmp_path: Path) -> None:
    clip = np.random.default_rng(0).integers(0, 255, (21, 1, 30, 40)).astype(np.uint8)
    reader = put(tmp_path / "s", planar(clip, "clip"))
    got, valid = read_planes(reader, SERIES, PlaneDraw(0, (2, 9, 20), 0))
    assert np.array_equal(got, clip[[2, 9, 20]]) and valid.shape == (3, 30, 40)
    assert depths(reader.record(SERIES), PlaneDraw(0, (2, 9, 20), 0), stack=True).tolist() == [67.0, 301.5, 670.0]
    assert pixel_mm(reader.record(SERIES), 0) == (0.2, 0.3)


def test_frames_without_times__are_no_stack() -> None:
    record = Record(kind="clip", shape=(20, 8, 8), spacing_mm=None)
    assert depths(record, PlaneDraw(0, (3,), 0), stack=False).tolist() == [0]
    with pytest.raises(RequestError, match=r"no frame times.*frame_time_ms is not null"):
        depths(record, PlaneDraw(0, (3, 4), 0), stack=True)


def test_source__stacks_of_a_short_volume_are_padded(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 900, (1, 20, 24, 6)).astype(np.int16)
    reader = volume_store(tmp_path / "s", image, 2)
    views = PlaneViews("stack", size=(24, 20), slices=9, normalize="none", fit="crop")
    middle = MiddlePlanes("a", [0], lambda _: reader.record(SERIES), 9)
    source = PlaneSource("a", "mri", reader, {0: SERIES}, middle, views, item=Planes)
    made = source.views(source.fetch([DrawKey(0, 0, 0)]), torch.device("cpu"))
    assert made["stack"].shape == (1, 1, 9, 1, 24, 20)
    assert made.meta.valid["stack"].any(dim=(-1, -2)).tolist() == [[[True] * 6 + [False] * 3]]
    assert made["stack_depth"][0, 0].tolist() == [0, 3, 6, 9, 12, 15, 15, 15, 15]
    assert made.meta.ids.tolist() == [0] and made.batch_size == 1


def test_source__pictures_of_a_volume(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 900, (1, 20, 24, 6)).astype(np.int16)
    reader = volume_store(tmp_path / "s", image, 2)
    draw = PlaneSampler("a", [0], lambda _: reader.record(SERIES), None, batch=2)
    source = PlaneSource("a", "mri", reader, {0: SERIES}, draw, PlaneViews(size=16, count=2, normalize="none"), item=Planes)
    made = source.views(source.fetch([DrawKey(0, 0, 0), DrawKey(0, 0, 1)]), torch.device("cpu"))
    assert made["image"].shape == (2, 2, 1, 16, 16) and made["image_share"].shape == (2, 2)
    assert ((made["image_share"] >= 0) & (made["image_share"] <= 1)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cover": (0, 1)}, r"sampler\.cover"),
        ({"foreground": 2}, r"sampler\.foreground is 2"),
        ({"partitions": -1}, r"sampler\.partitions"),
        ({"axis": 3}, r"sampler\.axis"),
    ],
)
def test_bad_arguments__say_what_is_accepted(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        sampler(Record(), None, **options)
