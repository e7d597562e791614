"""From an index of cines to batches of clips: what is left out, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medssl import data_sources
from medssl.archive.index import index
from medssl.errors import RequestError
from medssl.recipe import SourceSection
from medssl.types import ClipBatch, DrawKey
from tests.synthetic_planar import fan, us_loop, write_planar_dicom, write_video

VIEWS: dict[str, Any] = {"kind": "clip", "size": 32, "frames": 4, "fps": 12.5, "speckle": 0.2, "mask": {"ratio": 0.75, "patch": 8}}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A steady cine, one of a variable rate, one that does not say its rate, one short and one of a single frame."""
    pytest.importorskip("av")
    root = tmp_path_factory.mktemp("cines")
    source = root / "images"
    source.mkdir()
    extra: dict[str, dict[str, Any]] = {
        "steady": {"FrameTime": 40},
        "variable": {"FrameTimeVector": [0, *([40, 80] * 8)]},
        "unknown": {},
    }
    for number, (name, tags) in enumerate(extra.items()):
        frames = us_loop(17, seed=number)
        ids = {"PatientID": f"P{number}", "SOPInstanceUID": f"1.2.3.{number}", "SeriesInstanceUID": f"1.2.4.{number}"}
        write_planar_dicom(source / f"{name}.dcm", frames, modality="US", **ids, StudyInstanceUID=f"1.2.5.{number}", **tags)
    for number, n in ((5, 3), (6, 1)):
        write_video(source / f"v{n}.avi", np.repeat(us_loop(n, seed=number)[..., None], 3, axis=-1), codec="ffv1", pixels="yuv444p")
    (root / "key").write_text("the key of tests, no patients\n")
    (root / "key").chmod(0o600)
    index([source], root / "archive", modality="US", key_file=root / "key")
    return root / "archive"


def section(archive: Path, **views: Any) -> SourceSection:
    raw = {
        "index": str(archive),
        "domain": "ultrasound",
        "sampler": {"name": "clips"},
        "views": {**VIEWS, **views},
        "where": "true",
    }
    return SourceSection.model_validate(raw)


def test_shelf__leaves_out_what_has_no_rate_or_no_motion(archive: Path) -> None:
    given = section(archive)
    assert data_sources.view_faults("views", given.views) == []
    shelf = data_sources.fill_shelf("main", given)
    reasons = sorted(reason for reason, _ in shelf.summary.failed.values())
    assert "no_frame_time" in reasons and set(reasons) <= {"no_frame_time", "too_short"}
    assert len(shelf.rows) == 3 and all(shelf.reader.record(row.series_id).frame_times_ms for row in shelf.rows)
    with pytest.raises(RequestError, match=r"none of 1 series could be cached \(no_frame_time\)"):
        data_sources.fill_shelf("main", given, "frame_time_ms is null and kind = 'cine'")


def test_training_and_evaluation__show_clips_in_their_sector(archive: Path) -> None:
    given = section(archive)
    shelf = data_sources.fill_shelf("main", given)
    items = data_sources.freeze_items([shelf], {"main": given}, {"main": _no_cards()})
    source = data_sources.training_source(shelf, given, items, batch=3)
    views = source.views(source.fetch([DrawKey(0, 0, place) for place in range(3)]), torch.device("cpu"))
    assert sorted(views.meta.ids.tolist()) == [0, 1, 2] and views["clip_mask"].shape == (3, 1, 1, 4, 4)
    clips = ClipBatch.of(views)
    assert clips.video.shape == (3, 1, 4, 32, 32) and torch.isfinite(clips.video).all()
    lengths = {item: len(shelf.reader.record(row.series_id).frame_times_ms or ()) for item, row in enumerate(shelf.rows)}
    for item, valid, time_s in zip(views.meta.ids.tolist(), clips.valid, clips.frame_time_s):
        assert bool(valid.all()) == (lengths[item] > 3) and (time_s.diff() > 0).all()
    share = clips.sector.float().mean()
    assert 0.3 < float(share) < 0.8 and fan().any()
    plain = data_sources.evaluation_source("e", shelf, given, [row.series_id for row in shelf.rows])
    batches = list(data_sources.images_and_ids(plain, torch.device("cpu"), batch=2))
    assert [ids for _, ids in batches] == [[0, 1], [2]] and isinstance(batches[0][0], ClipBatch)
    assert data_sources.specs(data_sources.make_views(given.views))["clip"].size == (4, 32, 32)


def test_random_views__are_clips() -> None:
    views = data_sources.random_views(data_sources.make_views(VIEWS), 2, 1, torch.device("cpu"))
    assert views["clip"].shape == (2, 1, 4, 1, 32, 32) and views.meta.valid["clip"].all()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"fps": None}, "two of the three"),
        ({"slices": 4}, "unknown key"),
        ({"sizes": 3}, "did you mean"),
        ({"fill": "stop"}, "fill"),
    ],
)
def test_faults__name_the_key(archive: Path, changes: dict[str, Any], match: str) -> None:
    (fault,) = data_sources.view_faults("views", {**VIEWS, **changes})
    assert fault.startswith("views.") and match in fault


def _no_cards() -> Any:
    from medssl.cards.named import SourceCards

    return SourceCards({}, {}, {})
