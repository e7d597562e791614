"""Tiles of a slide at its native level: our tiles beside bare OpenSlide, one process.

    python -m benchmarks.wsi_tiles [--slide FILE]

Two slides. A JPEG slide larger than OpenSlide's tile cache, read in random order, so that every tile is decoded: what a run over slides
does. A slide that fits the cache (the real one, where it is), so that almost nothing is decoded: the worst case for what we add.
Peers read the same tiles through a handle with a cache of the same size into an array: converted to RGB, which is what ours are, or
left as RGBA, which nobody can train on but costs least.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Check, Result, finish, interleave, milliseconds, parser, times_faster
from medssl.domains.slides.grid import make_grid
from medssl.domains.slides.handles import CACHE_BYTES
from medssl.domains.slides.slide import open_slide
from medssl.domains.slides.tiles import Tiles

REAL = Path("../shared/data/wsi/CMU-1-Small-Region.svs")
OURS, BARE, RAW = "medssl Tiles", "bare OpenSlide, convert to RGB", "bare OpenSlide, RGBA as it comes"
EXACT = "medssl Tiles, resampled 1.003x"


def write_large(path: Path, edge: int) -> Path:
    """Write a JPEG-tiled slide of edge x edge pixels, stained and grainy."""
    import tifffile

    rng = np.random.default_rng(0)
    x = np.linspace(0, edge / 60, edge, dtype=np.float32)
    image = np.empty((edge, edge, 3), dtype=np.uint8)
    for row in range(edge):
        wave = np.sin(x + row / 90) * np.cos(row / 70 - x / 3)
        grain = rng.normal(0, 9, edge).astype(np.float32)
        for channel, (base, swing) in enumerate(((190, 40), (120, 60), (180, 35))):
            image[row, :, channel] = np.clip(base + swing * wave + grain, 0, 255)
    tifffile.imwrite(
        path,
        image,
        tile=(240, 240),
        compression="jpeg",
        compressionargs={"level": 80},
        photometric="rgb",
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
        metadata=None,
    )
    return path


def measure(path: Path, tile_px: int, tiles_per_turn: int, repeats: int) -> dict[str, list[float]]:
    """Time the same tiles, in one random order, through every reader."""
    import openslide

    slide = open_slide(path, backend="openslide")
    grid = make_grid(slide, mpp=slide.info.mpp, tile_px=tile_px)
    tiles = Tiles(slide, grid)
    # 0.3 % off the native scale: what most slides need that state 0.499 where 0.5 is asked for.
    exact = Tiles(slide, make_grid(slide, mpp=slide.info.mpp * 1.003, tile_px=tile_px))
    bare = openslide.OpenSlide(str(path))
    bare.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
    order = np.random.default_rng(1).permutation(len(exact))
    size = (tile_px, tile_px)

    def rgb(index: int) -> np.ndarray:
        x, y = grid.coords[index].tolist()
        return np.asarray(bare.read_region((x, y), 0, size).convert("RGB"))

    def raw(index: int) -> np.ndarray:
        x, y = grid.coords[index].tolist()
        return np.asarray(bare.read_region((x, y), 0, size))

    for index in order[:5]:
        np.testing.assert_array_equal(tiles.tile(int(index)).image.transpose(1, 2, 0), rgb(int(index)))
        assert tiles.tile(int(index)).native and not exact.tile(int(index)).native

    def reading(read: Callable[[int], object]) -> Callable[[], object]:
        place = 0

        def call() -> None:
            nonlocal place
            for k in range(place, place + tiles_per_turn):
                read(int(order[k % len(order)]))
            place += tiles_per_turn

        return call

    readers: dict[str, Callable[[int], object]] = {OURS: tiles.tile, BARE: rgb, RAW: raw, EXACT: exact.tile}
    return interleave({name: reading(read) for name, read in readers.items()}, repeats=repeats)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__, repeats=30)
    options_parser.add_argument("--slide", type=Path, default=REAL, help="a slide that fits the cache")
    options_parser.add_argument("--edge", type=int, default=9600, help="edge of the generated slide in pixels")
    options_parser.add_argument("--tile", type=int, default=256)
    options_parser.add_argument("--tiles", type=int, default=40, help="tiles in each turn")
    options = options_parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    checks, seconds = [], {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {"generated, decoded": write_large(Path(folder) / "large.tif", options.edge)}
        if options.slide.is_file():
            paths["given, from the cache"] = options.slide
        for what, path in paths.items():
            found = measure(path, options.tile, options.tiles, options.repeats)
            seconds[what] = found
            rows += [
                {
                    "slide": what,
                    "reader": name,
                    "tiles_per_s": options.tiles / statistics.median(found[name]),
                    **milliseconds(found, name),
                    "ours_is_times_faster": times_faster(found, OURS, name),
                }
                for name in found
            ]
            checks.append(Check(f"rate against bare OpenSlide converted to RGB, {what}", times_faster(found, OURS, BARE), 0.9))
            checks.append(Check(f"rate against bare OpenSlide as it comes, {what}", times_faster(found, OURS, RAW), 0.9))
    notes = [
        "times are per turn; tiles were checked to be equal to OpenSlide's before timing",
        "a resampled tile reads one pixel more on each side and resizes: what an exact scale costs where no level has it",
    ]
    if not options.slide.is_file():
        notes.append("the given slide is not there and was left out")
    return finish(Result("wsi_tiles", rows, checks, vars(options), notes, {"seconds": seconds}), options.out)


if __name__ == "__main__":
    main()
