"""From an ultrasound file to a training clip, beside bare PyAV decoding the same file, in one process and with one thread each.

    python -m benchmarks.clip_decode --data ../shared/data

Ours reads all frames, picks 64 of them by time and makes one augmented clip of 112 x 112: crop, tilt, depth, gain, speckle, tube masks. The
sector and the statistics are those of the store, found once beforehand. The peer only decodes all frames to grey with `to_ndarray`. A third
row takes the same clip out of a store, as training does.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cine_decode import CLIPS, bare
from benchmarks.common import Check, Result, finish, interleave, milliseconds, parser, times_faster
from medssl.domains.ultrasound import Ultrasound
from medssl.domains.video_files import read_video_file
from medssl.sampling.clips import ClipSampler, ClipSource, pick_frames
from medssl.store.reader import StoreReader
from medssl.store.writer import create_store, write_item
from medssl.types import ClipBatch, DrawKey, Sample
from medssl.views.clips import ClipFrames, ClipViews

OURS, STORE, BARE = "medssl, file", "medssl, store", "bare PyAV"
SERIES = "0" * 32


def training_views(size: int, frames: int) -> ClipViews:
    """Return the views of a pretraining recipe, everything random on."""
    return ClipViews(
        size=size,
        frames=frames,
        clip_seconds=frames * 0.06,
        scales=[1, 0.875, 0.75, 0.66],
        tilt_deg=8,
        depth=(0.9, 1.1),
        gain=0.3,
        tgc=0.3,
        gamma=(0.8, 1.25),
        speckle=0.2,
        mask={"ratio": 0.9, "patch": 16, "count": 5},
    )


def from_file(path: Path, known: Sample, views: ClipViews) -> np.ndarray:
    """Make a training clip of a file."""
    raw = read_video_file(path)
    picked = pick_frames(raw.frame_times_ms or (), views.fps, views.frames)
    used, order = np.unique(picked.frames, return_inverse=True)
    sector = np.ones(raw.array.shape[2:], dtype=bool) if known.valid is None else known.valid
    item = ClipFrames(
        raw.array[used], sector, None, order[None], picked.valid[None], picked.time_s[None], picked.frames[None], np.ones(1),
        known.meta.stats, DrawKey(0, 0, 0), 0,
    )  # fmt: skip
    clip: np.ndarray = views.batch([item], "cpu")[0]["clip"].numpy()
    return clip


def store_source(folder: Path, sample: Sample, views: ClipViews) -> ClipSource:
    """Return a source of one item in a store of its own."""
    create_store(folder, Ultrasound())
    mask = np.ones(sample.image.shape[-2:], dtype=bool) if sample.valid is None else sample.valid
    write_item(sample, folder, patient_id=SERIES, mask=mask)
    reader = StoreReader(folder)
    sampler = ClipSampler("a", [0], lambda _: reader.record(SERIES), views.frames, views.fps, 1, views.fill, batch=1)
    return ClipSource("a", "ultrasound", reader, {0: SERIES}, sampler, views, item=ClipFrames)


def from_store(source: ClipSource) -> np.ndarray:
    """Draw, read and make one training clip."""
    import torch

    clip: np.ndarray = ClipBatch.of(source.views(source.fetch([DrawKey(0, 0, 0)]), torch.device("cpu"))).video.numpy()
    return clip


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Time, print the table, write the JSON file."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options_parser.add_argument("--clips", nargs="+", type=Path, help="clips instead of those in the data folder")
    options_parser.add_argument("--size", type=int, default=112)
    options_parser.add_argument("--frames", type=int, default=64)
    options = options_parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    clips = options.clips or [options.data / "us_lung_video" / "cc-by" / name for name in CLIPS]
    views = training_views(options.size, options.frames)
    rows: list[dict[str, Any]] = []
    ratios = []
    for clip in clips:
        known = Ultrasound().read([clip], series_id=SERIES)
        with tempfile.TemporaryDirectory() as folder:
            source = store_source(Path(folder) / "store", known, views)
            shapes = {from_file(clip, known, views).shape[1:], from_store(source).transpose(0, 2, 1, 3, 4)[None].shape[1:]}
            assert len(shapes) == 1, shapes
            seconds = interleave(
                {OURS: partial(from_file, clip, known, views), STORE: partial(from_store, source), BARE: partial(bare, clip)},
                repeats=options.repeats,
            )
        ratios.append(times_faster(seconds, OURS, BARE))
        shape = "x".join(str(known.image.shape[k]) for k in (0, 2, 3))
        rows += [
            {"clip": clip.suffix[1:], "frames": shape, "what": name, **milliseconds(seconds, name)} for name in (OURS, STORE, BARE)
        ]
        rows[-3]["times_as_fast_as_bare"] = ratios[-1]
        rows[-2]["times_as_fast_as_bare"] = times_faster(seconds, STORE, BARE)
    checks = [Check("file to training clip: rate over bare PyAV decoding, slowest clip", min(ratios), 0.9)]
    notes = [f"median over clips: {statistics.median(ratios):.2f} times the rate of bare PyAV"]
    settings = {**vars(options), "clips": [clip.name for clip in clips]}
    return finish(Result("clip_decode", rows, checks, settings, notes), options.out)


if __name__ == "__main__":
    main()
