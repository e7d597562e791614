"""Pairs of crops: pure draws, one size in mm, what is dropped and counted, and the spacing bug of the published code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medssl.domains.mri import MRI
from medssl.domains.statistics import foreground
from medssl.errors import RequestError, TrainingStopped
from medssl.matching.base import Matches, MatchVolume
from medssl.sampling.pairs import WATCHED, PairSampler, PairSource, box_around, centre_inside, pair_weight
from medssl.store.reader import StoreReader
from medssl.store.writer import create_store, write_item
from medssl.types import DrawKey
from medssl.views.pipeline import Crop, VolumeViews
from tests.matching import toy

IDS = [2, 3, 5, 8]


@dataclass
class Known:
    """Knows where everything is: phantoms that differ by a shift only. `score` may depend on the target."""

    shifts: dict[str, np.ndarray]
    score: float | Callable[[str], float] = 0.9
    calls: int = 0

    def match(self, source: MatchVolume, points_mm: np.ndarray, target: MatchVolume) -> Matches:
        self.calls += 1
        score = self.score(target.name) if callable(self.score) else self.score
        found = points_mm + self.shifts[target.name] - self.shifts[source.name]
        return Matches(found if score > 0 else np.full_like(found, np.nan), np.full(len(points_mm), max(score, 0.0)))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    """One body four times: shifted, and at 2, 1, 2 and 4 mm."""
    folder = tmp_path_factory.mktemp("pairs") / "store"
    create_store(folder, MRI())
    for k, (spacing, shift) in enumerate(zip((2.0, 1.0, 2.0, 4.0), SHIFTS)):
        sample, _ = toy.phantom(5, spacing=spacing, at_mm=shift)
        sample.meta.__dict__["series_id"] = f"{k:032x}"
        write_item(sample, folder, patient_id=f"{k // 2 if k < 2 else k:032x}", mask=foreground(sample.image[0]))
    return StoreReader(folder)


SHIFTS = [np.array(v, dtype=float) for v in ((0, 0, 0), (8, -6, 4), (-6, 4, 10), (2, 8, -8))]
PATIENTS = {2: "a", 3: "b", 5: "b", 8: "c"}


def views(**changes: Any) -> VolumeViews:
    return VolumeViews("volume", size=16, spacing_mm=2.0, count=2, normalize="none", **changes)


def sampler(reader: StoreReader, **changes: Any) -> PairSampler:
    series = {item: f"{k:032x}" for k, item in enumerate(IDS)}
    known = Known({f"{k:032x}": shift for k, shift in enumerate(SHIFTS)}, changes.pop("score", 0.9))
    volumes = {item: MatchVolume.of_store(reader, name) for item, name in series.items()}
    given = {"batch": 4, "matcher": known, **changes}
    patients = given.pop("patients", PATIENTS)
    ids = given.pop("ids", IDS)
    return PairSampler(
        "a", ids, lambda item: reader.record(series[item]), patients, views().box_size_mm, volumes.__getitem__, **given
    )


def source(reader: StoreReader, maker: VolumeViews, **changes: Any) -> PairSource:
    series = {item: f"{k:032x}" for k, item in enumerate(IDS)}
    return PairSource("a", "mri", reader, series, sampler(reader, **changes), maker, item=Crop)


@pytest.mark.parametrize("pairs", ["matched", "same_volume", "random"])
def test_draw__is_a_pure_function_of_the_key(reader: StoreReader, pairs: str) -> None:
    one, other = sampler(reader, pairs=pairs), sampler(reader, pairs=pairs)
    keys = [DrawKey(0, step, place) for step in range(3) for place in range(4)]
    forwards = [one.draw(key) for key in keys]
    assert [other.draw(key) for key in reversed(keys)] == forwards[::-1]
    assert len(set(forwards)) == len(keys)
    assert sampler(reader, pairs=pairs).draw(DrawKey(1, 0, 0)) != forwards[0]
    for first in range(0, len(keys), 4):  # one pass over the items per step of four
        assert sorted(draw.ids[0] for draw in forwards[first : first + 4]) == IDS


def test_partners__are_of_another_patient_and_show_the_same_region(reader: StoreReader) -> None:
    matched = sampler(reader)
    draws = [matched.draw(DrawKey(0, step, place)) for step in range(12) for place in range(4)]
    assert all(PATIENTS[draw.ids[0]] != PATIENTS[draw.ids[1]] for draw in draws)
    assert {draw.ids for draw in draws} == {(a, b) for a in IDS for b in IDS if PATIENTS[a] != PATIENTS[b]}
    regions = {2: frozenset({"head"}), 3: frozenset({"abdomen", "pelvis"}), 5: frozenset(), 8: frozenset({"abdomen"})}
    apart = sampler(reader, regions=regions)
    found = {draw.ids for step in range(12) for place in range(4) if (draw := apart.draw(DrawKey(0, step, place))).weight > 0}
    assert found == {(2, 5), (3, 8), (8, 3), (5, 2), (5, 8), (8, 5)}


def test_boxes__have_one_size_in_mm_and_hold_the_point_at_the_same_place(reader: StoreReader) -> None:
    matched = sampler(reader)
    for step in range(8):
        for place in range(4):
            draw = matched.draw(DrawKey(0, step, place))
            assert draw.boxes[0].size_mm == draw.boxes[1].size_mm == (32.0, 32.0, 32.0)
            a, b = (
                matched.volumes(item).to_world((np.array(box.start_mm) + 16)[None])[0]  # type: ignore[attr-defined]
                for item, box in zip(draw.ids, draw.boxes)
            )
            shift = SHIFTS[IDS.index(draw.ids[1])] - SHIFTS[IDS.index(draw.ids[0])]
            np.testing.assert_allclose(b - a, shift, atol=1e-9)
            assert draw.score == 0.9 and draw.weight == pytest.approx(0.8)


def test_first_crop__is_centred_on_a_body_point_or_moved_inside(reader: StoreReader) -> None:
    matched = sampler(reader)
    for step in range(10):
        draw = matched.draw(DrawKey(0, step, 0))
        record = reader.record(f"{IDS.index(draw.ids[0]):032x}")
        start = np.array(draw.boxes[0].start_mm)
        assert (start >= -1e-9).all() and (start + 32 <= 128 + 1e-9).all()
        points = (record.foreground + 0.5) * record.voxel_mm
        assert (np.abs(points - start - 16).max(axis=1) <= record.voxel_mm[0] / 2 + 1e-9).any() or (start % 96 == 0).any()


@pytest.mark.parametrize(("score", "weight"), [(0.2, 0.0), (0.5, 0.0), (0.6, 0.2), (0.75, 0.5), (1.0, 1.0), (1.2, 1.0)])
def test_pair_weight__formula(score: float, weight: float) -> None:
    assert pair_weight(score) == pytest.approx(weight)


def test_scale__crops_in_mm_agree_across_voxel_sizes_and_native_ones_do_not(reader: StoreReader) -> None:
    """Card alice, 10.3: A at 2 mm, B at 1 mm. The published code cuts 64 voxels out of each."""
    maker = views()
    found = source(reader, maker, pairs="matched")
    same, native = [], []
    for step in range(40):
        key = DrawKey(0, step, 1)
        draw = found.sampler.draw(key)
        if {IDS.index(item) for item in draw.ids} != {0, 1}:
            continue
        batch = found.views(found.fetch([key]), torch.device("cpu"))
        a, b = batch["volume"][0, 0, 0].numpy(), batch["volume"][0, 1, 0].numpy()
        seen = batch.meta.valid["volume"][0].numpy().all(axis=0)
        same.append(np.corrcoef(a[seen], b[seen])[0, 1])
        crops = []
        for item, box in zip(draw.ids, draw.boxes):
            record = reader.record(found.series[item])
            centre = (np.array(box.start_mm) + 16) / record.voxel_mm
            crops.append(reader.read_box(record.series_id, np.round(centre).astype(int) - 8, (16, 16, 16))[0][0])
        if min(c.std() for c in crops) > 0:
            native.append(np.corrcoef(crops[0].ravel(), crops[1].ravel())[0, 1])
    assert len(same) >= 5
    assert np.median(same) > 0.9
    assert np.median(native) < 0.8


def test_views__are_two_per_item_in_their_own_frames(reader: StoreReader) -> None:
    maker = views(mask={"ratio": 0.5, "cell": 4}, points={"seeds": 5, "negatives": 3}, noise_std=1.0)
    made = source(reader, maker)
    keys = [DrawKey(3, 1, place) for place in range(3)]
    batch = made.views(made.fetch(keys), torch.device("cpu"))
    assert batch["volume"].shape == (3, 2, 1, 16, 16, 16) and batch["volume_mask"].shape == (3, 2, 4, 4, 4)
    assert not torch.equal(batch["volume_mask"][:, 0], batch["volume_mask"][:, 1]), "each crop has its own mask"
    assert batch["volume_pair_weight"].tolist() == pytest.approx([0.8] * 3)
    assert batch["volume_map"].shape == (3, 2, 3, 4) and batch["volume_seeds"].shape == (3, 2, 5)
    draws = [made.sampler.draw(key) for key in keys]
    assert batch.meta.ids.tolist() == [draw.ids[0] for draw in draws] and batch.meta.keys == tuple(keys)
    assert batch["volume_partner"].tolist() == [draw.ids[1] for draw in draws]
    centres = np.array([[np.array(box.start_mm) + 16 for box in draw.boxes] for draw in draws])
    np.testing.assert_allclose(batch.meta.positions_mm["volume"].numpy(), centres)
    alone = made.views(made.fetch(keys[1:2]), torch.device("cpu"))
    for key in ("volume", "volume_mask", "volume_map", "volume_seeds"):
        assert torch.equal(alone[key][0], batch[key][1]), "a view does not depend on what else is in its batch"


def test_dropped_pairs__weigh_nothing_are_counted_and_stop_the_run(reader: StoreReader) -> None:
    poor = sampler(reader, score=0.45, attempts=1)
    draw = poor.draw(DrawKey(0, 0, 0))
    assert draw.weight == 0 and draw.score == 0.45 and (poor.tried, poor.dropped) == (1, 1)
    with pytest.raises(
        RequestError, match=r"source a: 32 of 32 candidate pairs were dropped, .* narrow the query to one body region"
    ):
        sampler(reader, score=0.45, attempts=1).audit()
    for step in range(1, WATCHED - 1):
        poor.draw(DrawKey(0, step, 0))
    with pytest.raises(TrainingStopped, match=rf"source a: {WATCHED} of {WATCHED} candidate pairs were dropped"):
        poor.draw(DrawKey(0, WATCHED, 0))
    good = sampler(reader)
    good.audit()
    assert (good.tried, good.dropped) == (0, 0), "what was tried before the run is not counted in it"


def test_no_overlap_in_body_region__other_candidates_are_tried_and_the_draw_stays_pure(reader: StoreReader) -> None:
    bad = f"{3:032x}"
    some = sampler(reader, score=lambda name: 0.0 if name == bad else 0.9, attempts=8)
    draws = [some.draw(DrawKey(0, step, place)) for step in range(4) for place in range(4)]
    assert some.dropped > 0 and some.tried == 16 + some.dropped
    assert all(draw.weight > 0 for draw in draws) and 8 not in {draw.ids[1] for draw in draws}
    again = sampler(reader, score=lambda name: 0.0 if name == bad else 0.9, attempts=8)
    assert [again.draw(DrawKey(0, step, place)) for step in range(4) for place in range(4)] == draws
    lonely = sampler(reader, regions={2: frozenset({"head"}), **{item: frozenset({"foot"}) for item in IDS[1:]}})
    found = [lonely.draw(DrawKey(0, step, place)) for step in range(2) for place in range(4)]
    assert {draw.weight for draw in found if draw.ids[0] == 2} == {0.0} and lonely.dropped > 0


def test_one_volume_archive__takes_same_volume_pairs_only(reader: StoreReader) -> None:
    with pytest.raises(
        RequestError, match=r"holds volumes of one patient only, and pairs: matched takes two patients; .* same_volume"
    ):
        sampler(reader, ids=[3, 5])
    with pytest.raises(RequestError, match="holds volumes of one patient only, and pairs: random"):
        sampler(reader, ids=[2], pairs="random")
    draw = sampler(reader, ids=[2], pairs="same_volume", matcher=None).draw(DrawKey(0, 0, 0))
    assert draw.ids == (2, 2) and draw.weight == 1 and draw.boxes[0] != draw.boxes[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": "matchd"}, r'unknown kind "matchd" \(did you mean "matched"\?\)'),
        ({"matcher": None}, "sampler.matcher: required where sampler.pairs is matched"),
        ({"min_score": 1.0}, "sampler.min_score is 1.0; accepted: 0 up to, and without, 1"),
        ({"attempts": 0}, "attempts is 0 and shift 0.25; accepted"),
        ({"shift": 0.5}, "shift 0.5; accepted"),
    ],
)
def test_bad_arguments__are_sentences(reader: StoreReader, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        sampler(reader, **changes)


def test_centre_inside__formula() -> None:
    size, extent = np.array([10.0, 10.0, 30.0]), np.array([40.0, 40.0, 20.0])
    assert centre_inside(np.array([1.0, 50.0, 3.0]), size, extent).tolist() == [5.0, 35.0, 10.0]
    assert centre_inside(np.array([20.0, 6.0, 3.0]), size, extent).tolist() == [20.0, 6.0, 10.0]
    assert box_around(np.array([20.0, 6.0, 10.0]), size).start_mm == (15.0, 1.0, -5.0)


def test_same_volume__centres_are_moved_by_the_shift_at_most(reader: StoreReader, tmp_path: Path) -> None:
    near = sampler(reader, pairs="same_volume", matcher=None, shift=0.1)
    apart = []
    for step in range(30):
        draw = near.draw(DrawKey(0, step, 0))
        assert draw.ids[0] == draw.ids[1]
        apart.append(np.subtract(draw.boxes[0].start_mm, draw.boxes[1].start_mm))
    assert 3 < np.abs(apart).max() <= 2 * 0.1 * 32
