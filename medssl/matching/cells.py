"""The embedding of one volume as int8 maps, how its cells lie, and how a point is looked for in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

AROUND = tuple((np.indices((5, 5, 5)).reshape(3, -1).T - 2) * step for step in (1 / 2, 1 / 8, 1 / 32, 1 / 128))
"""Offsets in cells at which a match is refined, one list after the other; the last step is 1/128 of a cell."""
CLIMBS = 3
"""How often a list is tried again from where it led to."""
FIRST_BAND = 0.1
"""How far below the best coarse similarity the first candidates lie."""
ROWS = 65536
"""Cells compared at a time: 16 MB of float32 at 64 channels."""


@dataclass(frozen=True)
class CellMap:
    """One level: unit vectors on a lattice in item mm.

    Args:
        vectors: (X, Y, Z, E) int8, times one scale the embedding; all 0 outside the body of a fine map.
        origin_mm: (3,) centre of cell 0.
        step_mm: (3,) between cells.
    """

    vectors: np.ndarray
    origin_mm: np.ndarray
    step_mm: np.ndarray

    @property
    def grid(self) -> tuple[int, ...]:
        """(X, Y, Z) cells."""
        return tuple(self.vectors.shape[:3])

    def cell_of(self, item_mm: np.ndarray) -> np.ndarray:
        """Turn item mm (N, 3) into fractional cells."""
        return np.asarray((item_mm - self.origin_mm) / self.step_mm)

    def at(self, cells: np.ndarray) -> np.ndarray:
        """Return unit vectors at fractional cells, trilinear between them and constant beyond the outermost.

        Args:
            cells: (N, 3).

        Returns:
            (N, E) float32; 0 where all neighbours are.
        """
        last = np.asarray(self.grid) - 1
        cells = np.clip(cells, 0, last)
        low = np.minimum(cells.astype(np.int64), np.maximum(last - 1, 0))
        part = (cells - low).astype(np.float32)
        total = np.zeros((len(cells), self.vectors.shape[3]), dtype=np.float32)
        for corner in range(8):
            bits = np.array([corner >> 2 & 1, corner >> 1 & 1, corner & 1])
            weight = np.where(bits, part, 1 - part).prod(axis=1)
            x, y, z = np.minimum(low + bits, last).T
            total += weight[:, None] * self.vectors[x, y, z]
        return unit(total)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors of length 1 along the last axis; zeros stay zeros."""
    length = np.sqrt(np.einsum("...e,...e->...", vectors, vectors))[..., None]
    return np.asarray(np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0))


@dataclass(frozen=True)
class VolumeEmbedding:
    """Fine and coarse embedding of one volume.

    Args:
        fine: Zero outside the body.
        coarse: Everywhere.
        key: What matcher made it: weights, spacing, step. Only equal keys can be compared.
        name: Series, for messages.
    """

    fine: CellMap
    coarse: CellMap
    key: str
    name: str = ""

    @property
    def n_bytes(self) -> int:
        """Bytes in memory while points are looked for in it."""
        return self.fine.vectors.nbytes + 5 * self.coarse.vectors.nbytes + 12 * int(np.prod(self.fine.grid))

    @cached_property
    def _coarse_unit(self) -> np.ndarray:
        """(N, E) float32 unit vectors of the coarse cells."""
        vectors = self.coarse.vectors.reshape(-1, self.coarse.vectors.shape[3])
        return unit(vectors.astype(np.float32))

    @cached_property
    def _weights(self) -> list[np.ndarray]:
        """Along each axis (fine cells, coarse cells): what turns a coarse map into a fine one, linear between centres."""
        found = []
        for axis, n in enumerate(self.fine.grid):
            m = self.coarse.grid[axis]
            places = self.fine.origin_mm[axis] + np.arange(n) * self.fine.step_mm[axis]
            cell = np.clip((places - self.coarse.origin_mm[axis]) / self.coarse.step_mm[axis], 0, m - 1)
            low = np.minimum(cell.astype(int), max(m - 2, 0))
            weights = np.zeros((n, m), dtype=np.float32)
            np.add.at(weights, (np.arange(n), low), (1 - (cell - low)).astype(np.float32))
            np.add.at(weights, (np.arange(n), np.minimum(low + 1, m - 1)), (cell - low).astype(np.float32))
            found.append(weights)
        return found

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Return values of the coarse cells at the fine cells, trilinear.

        Args:
            values: (X', Y', Z') float32.

        Returns:
            (X, Y, Z) float32.
        """
        x, y, z = self._weights
        planes = np.matmul(y, values @ z.T)  # (X', Y, Z), no axis moved: a transposed copy would cost as much as the sums
        return np.asarray((x @ planes.reshape(len(planes), -1)).reshape(self.fine.grid))

    @cached_property
    def _coarse_inverse(self) -> np.ndarray:
        """(cells,) float32: 1 / length of the interpolated coarse vector at each fine cell, 0 outside the body."""
        square = np.zeros(self.fine.grid, dtype=np.float32)
        units = self._coarse_unit.reshape(*self.coarse.grid, -1)
        for channel in range(units.shape[3]):
            square += self.spread(units[..., channel]) ** 2
        inverse = np.zeros(square.size, dtype=np.float32)
        inverse[self.body] = 1 / np.sqrt(np.maximum(square.ravel()[self.body], 1e-12))
        return inverse

    @cached_property
    def body(self) -> np.ndarray:
        """(cells,) int64: flat numbers of the fine cells inside the body."""
        return np.flatnonzero(self.fine.vectors.any(axis=3).ravel())

    def query(self, item_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the fine and coarse unit vectors (N, E) at points (N, 3), item mm; the fine one is 0 outside the body."""
        return self.fine.at(self.fine.cell_of(item_mm)), self.coarse.at(self.coarse.cell_of(item_mm))

    def coarse_similarity(self, query: np.ndarray) -> np.ndarray:
        """Return the cosine of a coarse query with the interpolated coarse map at every fine cell, (cells,) float32; 0 outside the body."""
        values = self.spread((self._coarse_unit @ query).reshape(self.coarse.grid)).ravel()
        values *= self._coarse_inverse
        return values

    def _fine_similarity(self, cells: np.ndarray, query: np.ndarray) -> np.ndarray:
        """Return the cosine of a fine query with some cells, (N,) float32."""
        flat = self.fine.vectors.reshape(-1, self.fine.vectors.shape[3])
        out = np.empty(len(cells), dtype=np.float32)
        for first in range(0, len(cells), ROWS):
            rows = flat[cells[first : first + ROWS]].astype(np.float32)
            length = np.sqrt(np.einsum("ne,ne->n", rows, rows))
            out[first : first + ROWS] = (rows @ query) / np.maximum(length, 1e-6)
        return out

    def best_cell(self, fine: np.ndarray, coarse: np.ndarray) -> int:
        """Return the flat number of the fine cell with the highest score (fine + coarse) / 2.

        Exact without looking at every cell: the fine cosine is at most 1, so a cell whose coarse cosine c has (1 + c) / 2 below the
        best score found so far cannot win.
        """
        bound = self.coarse_similarity(coarse)
        level = float(bound[self.body].max()) - FIRST_BAND if bound.max() <= 0 else float(bound.max()) - FIRST_BAND
        cells = self._at_least(bound, level)
        best, score = self._best_of(cells, bound, fine)
        needed = 2 * score - 1
        if needed < level:
            more = self._at_least(bound, needed)
            more = more[bound[more] < level]
            if len(more):
                other, other_score = self._best_of(more, bound, fine)
                if other_score > score:
                    best = other
        return best

    def _at_least(self, bound: np.ndarray, level: float) -> np.ndarray:
        """Return the body cells whose coarse similarity is at least a level; outside the body it is 0."""
        return np.flatnonzero(bound >= level) if level > 0 else self.body[bound[self.body] >= level]

    def _best_of(self, cells: np.ndarray, coarse: np.ndarray, fine: np.ndarray) -> tuple[int, float]:
        scores = (self._fine_similarity(cells, fine) + coarse[cells]) / 2
        place = int(scores.argmax())
        return int(cells[place]), float(scores[place])

    def score_at(self, fine_cells: np.ndarray, fine: np.ndarray, coarse: np.ndarray) -> np.ndarray:
        """Return (fine + coarse) / 2 at fractional fine cells (N, 3), both maps interpolated and of unit length there, (N,) float32."""
        places = self.fine.origin_mm + fine_cells * self.fine.step_mm
        scores: np.ndarray = (self.fine.at(fine_cells) @ fine + self.coarse.at(self.coarse.cell_of(places)) @ coarse) / 2
        return scores

    def find(self, fine: np.ndarray, coarse: np.ndarray) -> tuple[np.ndarray, float]:
        """Return where a query is found, (3,) item mm, and its score.

        The best cell comes first; within a cell of it the score of the interpolated maps is climbed in steps down to 1/128 of a cell.

        Args:
            fine: (E,) unit vector.
            coarse: (E,) unit vector.
        """
        at = np.array(np.unravel_index(self.best_cell(fine, coarse), self.fine.grid), dtype=np.float64)
        last = np.asarray(self.fine.grid) - 1
        score = float(self.score_at(at[None], fine, coarse)[0])
        for around in AROUND:
            for _ in range(CLIMBS):
                tried = np.clip(at + around, 0, last)
                scores = self.score_at(tried, fine, coarse)
                place = int(scores.argmax())
                if not scores[place] > score:  # a tie stays where it is: a point found in its own volume must not move
                    break
                at, score = tried[place], float(scores[place])
        return self.fine.origin_mm + at * self.fine.step_mm, min(score, 1.0)

    def similarity(self, fine: np.ndarray, coarse: np.ndarray) -> np.ndarray:
        """Return the score of every fine cell, (X, Y, Z) float32, NaN outside the body: a picture of what else looks alike."""
        values = np.full(int(np.prod(self.fine.grid)), np.nan, dtype=np.float32)
        bound = self.coarse_similarity(coarse)
        values[self.body] = (self._fine_similarity(self.body, fine) + bound[self.body]) / 2
        return values.reshape(self.fine.grid)


def quantise(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """Return int8 and the one scale that gives the values back: value = int8 * scale.

    Args:
        vectors: float32, any shape.
    """
    scale = float(np.abs(vectors).max()) / 127 or 1.0
    return np.rint(vectors / scale).astype(np.int8), scale
