"""One point looked for in the embedding of a whole volume, bytes of embeddings, and what mining costs beside a training step.

    python -m benchmarks.match_point

The embedding is made up: smooth unit vectors of 64 channels, int8, in a body that fills 55 % of the volume, as if 256^3 voxels of 2 mm had
been embedded: fine cells of 4 mm (128^3), coarse ones of 16 mm (32^3). The same at 8 mm (64^3). The worst case asks for a vector that is
nowhere, so that no bound helps. One thread. Mining reads two embeddings of an abdomen of 400 x 300 x 500 mm at 8 mm from disk and matches.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Check, Result, finish, interleave, milliseconds, parser
from medssl.matching.base import MatchVolume
from medssl.matching.cells import CellMap, VolumeEmbedding, quantise, unit
from medssl.matching.embedding import match_embeddings
from medssl.matching.store import EmbeddingManifest, EmbeddingReader, open_folder, write_embedding

CHANNELS = 64
LIMIT_MS = 50.0


def waves(grid: tuple[int, ...], step_mm: float, seed: int, length_mm: float) -> np.ndarray:
    """Return smooth vectors (X, Y, Z, E): a few plane waves per channel, the same field at every step."""
    rng = np.random.default_rng(seed)
    axes = [np.arange(n, dtype=np.float32) * step_mm for n in grid]
    out = np.empty((*grid, CHANNELS), dtype=np.float32)
    for channel in range(CHANNELS):
        total = np.zeros(grid, dtype=np.float32)
        for _ in range(3):
            k = rng.normal(0, 2 * np.pi / length_mm, 3).astype(np.float32)
            x, y, z = (np.exp(1j * (k[a] * axes[a])).astype(np.complex64) for a in range(3))
            total += np.real(np.exp(1j * rng.uniform(0, 6.28)) * x[:, None, None] * (y[:, None] * z[None])[None])
        out[..., channel] = total
    return out


def make(grid: tuple[int, ...], step_mm: float, seed: int = 0) -> VolumeEmbedding:
    """Return an embedding whose body is an ellipsoid of 55 % of the volume."""
    fine = unit(waves(grid, step_mm, seed, 120.0))
    lines = np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in grid], indexing="ij", sparse=True)
    fine[sum(line**2 for line in lines) > 1.05] = 0
    coarse_grid = tuple(max(2, int(np.ceil(n * step_mm / 16))) for n in grid)
    coarse = unit(waves(coarse_grid, 16.0, seed + 1, 400.0))
    maps = [CellMap(quantise(part)[0], np.full(3, 1.0), np.full(3, size)) for part, size in ((fine, step_mm), (coarse, 16.0))]
    return VolumeEmbedding(maps[0], maps[1], "benchmark", f"{seed:032x}")


def frame(grid: tuple[int, ...], step_mm: float, name: str) -> MatchVolume:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    shape = tuple(round(n * step_mm / 2) for n in grid)
    return MatchVolume(name, affine, (2.0, 2.0, 2.0), shape, lambda: None, "v")  # type: ignore[arg-type, return-value]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__)
    options_parser.add_argument("--cells", type=int, default=128, help="fine cells of 4 mm along an edge")
    options_parser.add_argument("--abdomen", type=int, nargs=3, default=[200, 150, 250], help="voxels of 2 mm")
    options = options_parser.parse_args(argv)
    rng = np.random.default_rng(0)
    rows, checks = [], []
    for step, cells in ((4.0, options.cells), (8.0, options.cells // 2)):
        there = make((cells,) * 3, step)
        there.coarse_similarity(np.zeros(CHANNELS, dtype=np.float32))  # lattices and norms, once per volume
        centre = there.fine.origin_mm + step * cells / 2
        points = centre + rng.uniform(-0.3, 0.3, size=(64, 3)) * step * cells
        fine, coarse = there.query(points)
        lost = unit(rng.normal(size=(2, CHANNELS)).astype(np.float32))
        numbers = iter(range(10**6))

        def near(
            there: VolumeEmbedding = there, fine: np.ndarray = fine, coarse: np.ndarray = coarse, numbers: Any = numbers
        ) -> object:
            k = next(numbers) % 64
            noisy = unit((fine[k] + 0.05 * coarse[k - 1])[None])[0]
            return there.find(noisy, coarse[k])

        def worst(there: VolumeEmbedding = there, lost: np.ndarray = lost) -> object:
            return there.find(lost[0], lost[1])

        seconds = interleave({"a place that is there": near, "a vector that is nowhere": worst}, repeats=options.repeats)
        for name in seconds:
            rows.append({"embedding": f"{cells}^3 cells of {step:g} mm", "query": name, **milliseconds(seconds, name)})
        checks.append(Check(f"one point, {cells}^3 cells of {step:g} mm, ms", rows[-2]["median_ms"], LIMIT_MS, at_least=False))
    with tempfile.TemporaryDirectory() as folder:
        for step, limit in ((4.0, 65.0), (8.0, 10.0)):
            grid = tuple(int(np.ceil(n * 2 / step)) for n in options.abdomen)
            manifest = EmbeddingManifest("benchmark", (2.0,) * 3, (step,) * 3, (16.0,) * 3, CHANNELS, "none")
            place = open_folder(Path(folder), manifest)
            sizes = [write_embedding(place, f"{seed:032x}", make(grid, step, seed), "v") for seed in range(2)]
            rows.append(
                {
                    "embedding": f"{'x'.join(map(str, grid))} cells of {step:g} mm",
                    "query": "bytes on disk, MB",
                    "median_ms": None,
                    "mb": max(sizes) / 1e6,
                }
            )
            checks.append(Check(f"abdomen at {step:g} mm, MB", max(sizes) / 1e6, limit, at_least=False))
        a, b = (frame(grid, 8.0, f"{seed:032x}") for seed in range(2))
        point = a.to_world(a.extent_mm[None] / 2)
        warm = EmbeddingReader(place)

        def mine(reader: EmbeddingReader) -> object:
            return match_embeddings(reader.read(a.name), a, point, reader.read(b.name), b)

        seconds = interleave(
            {"from disk": lambda: mine(EmbeddingReader(place)), "in memory": lambda: mine(warm)}, repeats=options.repeats
        )
        for name in seconds:
            rows.append({"embedding": "abdomen at 8 mm", "query": f"mining one pair, {name}", **milliseconds(seconds, name)})
    details = {"median_s": {name: statistics.median(values) for name, values in seconds.items()}}
    return finish(Result("match_point", rows, checks, vars(options), details=details), options.out)


if __name__ == "__main__":
    main()
