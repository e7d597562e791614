"""Decoding ultrasound clips beside bare PyAV, in one process and with one thread each.

    python -m benchmarks.cine_decode --data ../shared/data

Both give all frames as one grey array (T, H, W), and these must be equal. The peer converts each frame with PyAV's
`to_ndarray(format="gray")`.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Check, Result, finish, interleave, milliseconds, parser, times_faster
from medssl.domains.video_files import read_video_file

CLIPS = ("Reg_pat3Image_134811.mpeg", "Reg_Image_182106_crop.mp4", "Cov_recommendations_likebutterfly_mov5.mov")
OURS, BARE = "medssl", "bare PyAV"


def bare(path: Path) -> np.ndarray:
    """Decode a clip with PyAV alone."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="gray") for frame in container.decode(stream)])


def ours(path: Path) -> np.ndarray:
    """Decode a clip with the reader."""
    return read_video_file(path).array[:, 0]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__)
    options_parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options_parser.add_argument("--clips", nargs="+", type=Path, help="clips instead of those in the data folder")
    options = options_parser.parse_args(argv)
    clips = options.clips or [options.data / "us_lung_video" / "cc-by" / name for name in CLIPS]
    rows: list[dict[str, Any]] = []
    ratios = []
    for clip in clips:
        expected = bare(clip)
        np.testing.assert_array_equal(ours(clip), expected)
        seconds = interleave({OURS: partial(ours, clip), BARE: partial(bare, clip)}, repeats=options.repeats)
        ratios.append(times_faster(seconds, OURS, BARE))
        shape = "x".join(str(size) for size in expected.shape)
        rows += [{"clip": clip.suffix[1:], "frames": shape, "reader": name, **milliseconds(seconds, name)} for name in (OURS, BARE)]
        rows[-2]["ours_is_times_faster"] = ratios[-1]
    checks = [Check("rate over bare PyAV, slowest clip", min(ratios), 0.9)]
    notes = ["frames are equal value by value", f"median over clips: {statistics.median(ratios):.2f} times as fast"]
    settings = {**vars(options), "clips": [clip.name for clip in clips]}
    return finish(Result("cine_decode", rows, checks, settings, notes), options.out)


if __name__ == "__main__":
    main()
