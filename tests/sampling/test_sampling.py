from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from medssl.errors import RequestError
from medssl.sampling.items import freeze, items_hash, read, write
from medssl.sampling.samplers import CentreSampler, CropSampler, item_at, place_box
from medssl.sampling.source import voxel_box
from medssl.seeding import counter_rng, derive_seed
from medssl.types import Box, DrawKey


@dataclass
class Record:
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    foreground: np.ndarray


RECORDS = {
    4: Record((40, 50, 30), (1.0, 0.5, 2.0), np.array([[30, 40, 20], [31, 41, 21]], dtype=np.uint16)),
    7: Record((10, 60, 30), (1.0, 1.0, 1.0), np.zeros((0, 3), dtype=np.uint16)),
}


def size_mm(spacing: object) -> tuple[float, float, float]:
    return (16.0, 12.0, 20.0)


def sampler(**changes: float) -> CropSampler:
    return CropSampler("a", [4, 7], RECORDS.__getitem__, size_mm, batch=4, **changes)


def test_draw__is_a_pure_function_of_the_key() -> None:
    key = DrawKey(0, 3, 2)
    assert sampler().draw(key) == sampler().draw(key)
    draws = {sampler().draw(DrawKey(0, step, position)).boxes for step in range(5) for position in range(4)}
    assert len(draws) > 10
    assert sampler().draw(DrawKey(1, 3, 2)) != sampler().draw(key)


def test_item_at__visits_every_item_once_per_epoch() -> None:
    for epoch in range(3):
        places = [item_at(DrawKey(5, number // 4, number % 4), "a", 4, 10) for number in range(epoch * 10, epoch * 10 + 10)]
        assert sorted(places) == list(range(10))
    first = [item_at(DrawKey(5, n // 4, n % 4), "a", 4, 10) for n in range(10)]
    second = [item_at(DrawKey(5, n // 4, n % 4), "a", 4, 10) for n in range(10, 20)]
    assert first != second


def test_boxes__lie_inside_where_they_fit_and_on_voxels() -> None:
    for step in range(40):
        draw = sampler().draw(DrawKey(0, step, 0))
        record = RECORDS[draw.ids[0]]
        start, size = np.array(draw.boxes[0].start_mm), np.array(draw.boxes[0].size_mm)
        extent = np.array(record.shape) * record.spacing_mm
        fits = size <= extent
        assert (start[fits] >= -1e-9).all()
        assert ((start + size)[fits] <= extent[fits] + 1e-9).all()
        voxels = start / record.spacing_mm
        assert np.allclose(voxels, voxels.round())
        centred = np.abs(start + size / 2 - extent / 2)
        assert (centred[~fits] <= np.array(record.spacing_mm)[~fits]).all()


def test_foreground__pulls_crops_towards_it() -> None:
    near = sampler(foreground=1.0)
    for step in range(20):
        draw = near.draw(DrawKey(0, step, 1))
        if draw.ids == (4,):
            point = np.array([30.5, 40.5, 20.5]) * RECORDS[4].spacing_mm
            start, size = np.array(draw.boxes[0].start_mm), np.array(draw.boxes[0].size_mm)
            assert ((start <= point) & (point <= start + size)).all()
    with pytest.raises(RequestError, match=r"sampler\.foreground is 2"):
        sampler(foreground=2.0)


def test_centre_sampler__shows_the_middle_without_randomness() -> None:
    middle = CentreSampler("a", [4, 7], RECORDS.__getitem__, size_mm)
    draw = middle.draw(DrawKey(0, 99, 0))
    assert draw.ids == (4,)
    assert draw == middle.draw(DrawKey(3, 1, 0))
    centre = np.array(draw.boxes[0].start_mm) + np.array(draw.boxes[0].size_mm) / 2
    assert np.allclose(centre, np.array(RECORDS[4].shape) * RECORDS[4].spacing_mm / 2, atol=1.0)


def test_place_box__formula() -> None:
    spacing = np.array([1.0, 1.0, 1.0])
    start = place_box(np.array([1.0, 50.0, 5.0]), np.array([10.0, 10.0, 30.0]), np.array([40.0, 40.0, 20.0]), spacing)
    assert start.tolist() == [0.0, 30.0, -5.0]


def test_voxel_box__covers_box_and_margin_and_no_more() -> None:
    assert voxel_box(Box((2.0, 4.0, 6.0), (8.0, 8.0, 8.0)), (0, 0, 0), (1.0, 2.0, 1.0)) == ((2, 2, 6), (8, 4, 8))
    assert voxel_box(Box((2.0, 4.0, 6.0), (8.0, 8.0, 8.0)), (0.5, 1.0, 0), (1.0, 2.0, 1.0)) == ((1, 1, 6), (10, 6, 8))
    assert voxel_box(Box((0.3 * 3, 0, 0), (0.3 * 5, 1, 1)), (0, 0, 0), (0.3, 1, 1)) == ((3, 0, 0), (5, 1, 1))


def test_items__are_numbered_over_all_sources_and_survive_parquet(tmp_path: Path) -> None:
    rows = [("b", "card2", "s1", "p1", "train"), ("a", "card1", "s9", "p2", "train"), ("a", "card1", "s2", "p2", "unknown")]
    items = freeze(rows)
    assert [(item.id, item.card, item.series_id) for item in items] == [(0, "card1", "s2"), (1, "card1", "s9"), (2, "card2", "s1")]
    assert freeze(rows[::-1]) == items
    write(items, tmp_path / "items.parquet")
    assert read(tmp_path / "items.parquet") == items
    assert items_hash(freeze(rows[:2])) != items_hash(items)
    assert [path.name for path in tmp_path.iterdir()] == ["items.parquet"]


def test_seeds__depend_on_every_part_and_its_place() -> None:
    assert derive_seed(1, 2, "a") == derive_seed(1, 2, "a")
    assert len({derive_seed(*parts) for parts in ((1, 2), (2, 1), (12,), ("1", "2x"), (1, 2, ""))}) == 5
    assert 0 <= derive_seed("x") < 2**63
    assert derive_seed(0, "permutation") == 1443737443330922838  # fixed for ever: runs of old versions must resume
    assert counter_rng(0, "x").random() == counter_rng(0, "x").random()
