"""Frames by time: which are picked, what fills in, and what is refused."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medssl.errors import ImageError, RequestError
from medssl.sampling.clips import ClipSampler, ClipSource, MiddleClips, check_clip, clip_room_ms, pick_frames
from medssl.types import DrawKey
from medssl.views.clips import ClipFrames, ClipViews
from tests.store.test_store import SERIES
from tests.store.test_store_planar import planar, put


@dataclass
class Record:
    frame_times_ms: tuple[float, ...] | None
    shape: tuple[int, ...] = (0, 8, 8)
    series_id: str = "s" * 32


def record(n: int, step: float = 20.0) -> Record:
    return Record(tuple(step * k for k in range(n)), (n, 8, 8))


def test_pick__stride_follows_the_rate_of_the_file() -> None:
    """3.84 s at 16.7 frames a second: every third of 50, every second of 33.3, all of 16.7."""
    for fps, stride in ((50.0, 3), (100 / 3, 2), (50 / 3, 1), (100.0, 6)):
        picked = pick_frames(np.arange(400) * (1000 / fps), 50 / 3, 64, start_ms=80)
        assert picked.valid.all() and set(np.diff(picked.frames)) == {stride}
        np.testing.assert_allclose(picked.time_s, np.arange(64) * 0.06, atol=1e-9)


def test_pick__a_slow_file_keeps_its_own_rate_and_repeats_nothing() -> None:
    picked = pick_frames(np.arange(60) * 100.0, 16.7, 32)
    np.testing.assert_array_equal(picked.frames, np.arange(32))
    assert picked.valid.all() and picked.time_s[-1] == pytest.approx(3.1)


def test_pick__variable_rate_follows_the_clock(tmp_path: Path) -> None:
    """For every wanted time the nearest frame by brute force, each once."""
    rng = np.random.default_rng(0)
    times = np.concatenate([[0], np.cumsum(rng.choice([15.0, 25.0, 40.0, 200.0], 299, p=[0.4, 0.35, 0.2, 0.05]))])
    picked = pick_frames(times, 16.0, 40, start_ms=500.0)
    wanted = 500 + np.arange(200) * 62.5
    nearest = np.abs(times[None] - wanted[:, None]).argmin(axis=1)
    np.testing.assert_array_equal(picked.frames, np.unique(nearest)[:40])
    assert picked.valid.all() and (np.diff(picked.frames) > 0).all()
    np.testing.assert_allclose(picked.time_s, (times[picked.frames] - times[picked.frames[0]]) / 1000)
    assert np.ptp(np.diff(picked.time_s)) > 0.05  # and what was seen when is not hidden


def test_fill__runs_back_and_forth_or_starts_again_and_never_stands_still() -> None:
    times = np.array([0.0, 40, 80, 130])
    back = pick_frames(times, 25, 10)
    np.testing.assert_array_equal(back.frames, [0, 1, 2, 3, 2, 1, 0, 1, 2, 3])
    np.testing.assert_allclose(back.time_s * 1000, [0, 40, 80, 130, 180, 220, 260, 300, 340, 390])
    again = pick_frames(times, 25, 10, fill="loop")
    np.testing.assert_array_equal(again.frames, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1])
    np.testing.assert_allclose(again.time_s * 1000, [0, 40, 80, 130, 170, 210, 250, 300, 340, 380])
    for picked in (back, again):
        assert picked.valid.tolist() == [True] * 4 + [False] * 6
        assert (np.diff(picked.frames) != 0).all() and (np.diff(picked.time_s) > 0).all()


@pytest.mark.parametrize("fill", ["pingpong", "loop"])
def test_fill__one_and_two_frames(fill: str) -> None:
    one = pick_frames([0.0], 25, 4, fill=fill)
    assert one.frames.tolist() == [0] * 4 and one.valid.tolist() == [True, False, False, False]
    np.testing.assert_allclose(one.time_s, np.arange(4) * 0.04)
    two = pick_frames([0.0, 40.0], 25, 5, fill=fill)
    assert two.frames.tolist() == [0, 1, 0, 1, 0] and two.valid.sum() == 2
    np.testing.assert_allclose(two.time_s, np.arange(5) * 0.04)


def test_fill__starts_past_the_end_still_show_a_frame() -> None:
    assert pick_frames([0.0, 40.0], 25, 3, start_ms=900).frames.tolist() == [1, 1, 1]


def sampler(of: Record, **options: Any) -> ClipSampler:
    return ClipSampler("a", [0, 1, 2], lambda _: of, 8, 25.0, options.pop("count", 1), "pingpong", batch=4, **options)


def test_draw__is_pure_and_starts_anywhere_there_is_room() -> None:
    of = record(100)
    assert clip_room_ms(of.frame_times_ms or (), 25, 8) == 99 * 20 - 7 * 40
    first = [sampler(of).draw(DrawKey(0, step, 1)).views[0] for step in range(200)]
    starts = [int(view.frames[0]) for view in first]
    assert min(starts) < 5 and max(starts) > 80 and all(view.valid.all() for view in first)
    again = sampler(of).draw(DrawKey(0, 7, 1))
    np.testing.assert_array_equal(again.views[0].frames, first[7].frames)
    ids = [sampler(of).draw(DrawKey(0, 0, place)).id for place in range(3)]
    assert sorted(ids) == [0, 1, 2]


def test_speeds__all_alike_but_the_last() -> None:
    of = record(400)
    seen = set()
    for step in range(40):
        draw = sampler(of, speeds=[1, 2, 4], count=3).draw(DrawKey(0, step, 0))
        assert draw.speed[0] == draw.speed[1] != draw.speed[2]
        for view, speed in zip(draw.views, draw.speed):
            assert set(np.diff(view.frames)) == {2 * int(speed)}
        seen.add(draw.speed[::2])
    assert len(seen) == 6
    assert sampler(of, count=2).draw(DrawKey(0, 0, 0)).speed == (1.0, 1.0)
    for bad in ([], [0], [1, 1], "fast", [-1.0]):
        with pytest.raises(RequestError, match=r"sampler\.speeds"):
            sampler(of, speeds=bad)


def test_middle__is_the_middle_and_several_cover_all() -> None:
    of = record(101)
    draw = MiddleClips("a", [5], lambda _: of, 11, 25.0).draw(DrawKey(0, 0, 0))
    assert draw.id == 5 and draw.views[0].frames.tolist() == list(range(40, 62, 2))
    three = MiddleClips("a", [5], lambda _: of, 11, 25.0, count=3).draw(DrawKey(0, 0, 0)).views
    assert [int(view.frames[0]) for view in three] == [0, 40, 80] and three[-1].frames[-1] == 100


def test_no_frame_time__is_refused_and_not_guessed() -> None:
    with pytest.raises(ImageError, match="a rate is not guessed") as caught:
        check_clip(Record(None, (30, 8, 8)))
    assert caught.value.reason == "no_frame_time"
    with pytest.raises(ImageError, match="1 frame; a clip needs 2") as caught:
        check_clip(Record((0.0,), (1, 8, 8)))
    assert caught.value.reason == "too_short"
    check_clip(record(2))
    with pytest.raises(RequestError, match=r"no frame times; leave it out of the query"):
        sampler(Record(None)).draw(DrawKey(0, 0, 0))


def stored_source(tmp_path: Path, n: int = 30, **options: Any) -> tuple[ClipSource, np.ndarray]:
    image = np.random.default_rng(0).integers(0, 255, (n, 1, 24, 32)).astype(np.uint8)
    valid = np.zeros((24, 32), bool)
    valid[4:20, 8:24] = True
    sample = planar(np.where(valid, image, np.uint8(0)), "clip", valid, (0.3, 0.3))
    sample.meta.stats.update({"p00_5": 1.0, "p99_5": 250.0, "min": 0.0, "max": 255.0})  # type: ignore[attr-defined]
    reader = put(tmp_path / "s", sample)
    views = ClipViews(size=16, frames=8, fps=1000 / 67, normalize="none", **options)
    draw = ClipSampler("a", [0], lambda _: reader.record(SERIES), 8, views.fps, views.count, views.fill, batch=2)
    return ClipSource("a", "ultrasound", reader, {0: SERIES}, draw, views, item=ClipFrames), sample.image


def test_source__frames_of_the_store_in_the_sector(tmp_path: Path) -> None:
    source, image = stored_source(tmp_path, count=2)
    made = source.views(source.fetch([DrawKey(0, 0, 0), DrawKey(0, 0, 1)]), torch.device("cpu"))
    assert made["clip"].shape == (2, 2, 8, 1, 16, 16) and made.meta.valid["clip"].shape == (2, 2, 8, 16, 16)
    for b in range(2):
        for v in range(2):
            frames = made["clip_frame"][b, v].tolist()
            assert set(np.diff(frames)) == {2}  # 33.5 ms in the file, 67 wanted
            np.testing.assert_allclose(made["clip"][b, v].numpy(), image[frames][:, :, 4:20, 8:24], atol=1e-3)
    assert made.meta.valid["clip"].all() and made["clip_sector"].all()
    assert made.meta.spacing_mm["clip"][0, 0].tolist() == pytest.approx([0.3, 0.3])


def test_source__same_bits_from_threads_and_from_a_copy(tmp_path: Path) -> None:
    everything = {"scales": [1, 0.8], "tilt_deg": 9, "depth": (0.9, 1.1), "gain": 0.3, "tgc": 0.2, "speckle": 0.2}
    source, _ = stored_source(tmp_path, **everything)
    source.view_maker.normalize = "none"  # type: ignore[attr-defined]
    copy_of_reader = pickle.loads(pickle.dumps(source.reader))
    other = ClipSource("a", "ultrasound", copy_of_reader, {0: SERIES}, source.sampler, source.view_maker, item=ClipFrames)
    keys = [DrawKey(3, step, place) for step in range(4) for place in range(2)]
    plain = source.views(source.fetch(keys), torch.device("cpu"))
    with ThreadPoolExecutor(4) as pool:
        fetched = list(pool.map(lambda key: other.fetch([key])[0], keys))
    torch.manual_seed(9)
    threaded = other.views(fetched, torch.device("cpu"))
    for key, value in plain.data.items():
        assert torch.equal(value, threaded.data[key]), key


def test_source__a_short_file_is_filled_and_marked(tmp_path: Path) -> None:
    source, _ = stored_source(tmp_path, n=5)
    made = source.views(source.fetch([DrawKey(0, 0, 0)]), torch.device("cpu"))
    assert made["clip_frame"][0, 0].tolist() == [0, 2, 4, 2, 0, 2, 4, 2]
    assert made["clip_valid"][0, 0].tolist() == [True] * 3 + [False] * 5
    assert made.meta.valid["clip"][0, 0].flatten(1).any(1).tolist() == [True] * 3 + [False] * 5
    assert torch.equal(made["clip"][0, 0, 3], made["clip"][0, 0, 1]) and bool((made["clip_time_s"].diff() > 0).all())
