"""Match by place in the body: the same share of the way from one side of the body to the other, along each axis. Trains nothing."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from medssl.matching.base import Matches, MatchVolume, checked_points, coarse_body, no_matches

EDGE = 0.01
"""Share of the body's blocks that may lie beyond an edge: a couch or a cable does not move it."""


class BodyAxisMatcher:
    """Matches relative places between the bounding boxes of two bodies.

    The score is the smallest ratio of the edges of the two boxes: volumes that show different parts of the body differ in length, and
    score low. It knows nothing of organs, and a field of view that cuts the body moves every point.

    Args:
        step_mm: Edge of the blocks in which bodies are found.
    """

    name = "body_axis"

    def __init__(self, step_mm: float = 4.0) -> None:
        self.step_mm = float(step_mm)
        self._boxes = lru_cache(maxsize=4096)(self._find)

    def _find(self, volume: MatchVolume) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the corners of the body's box in item mm, the coarse body, and the edge of its blocks."""
        body, edge = coarse_body(volume.read(), self.step_mm)
        if not body.any():
            body = np.ones_like(body)
        low, high = np.empty(3), np.empty(3)
        for axis in range(3):
            share = np.cumsum(body.sum(axis=tuple(a for a in range(3) if a != axis))) / body.sum()
            low[axis] = int(np.searchsorted(share, EDGE)) * edge[axis]
            high[axis] = min((int(np.searchsorted(share, 1 - EDGE)) + 1) * edge[axis], volume.extent_mm[axis])
        return low, high, body, edge

    def match(self, source: MatchVolume, points_mm: np.ndarray, target: MatchVolume) -> Matches:
        """See `base.Matcher`."""
        points = source.to_item(checked_points(points_mm))
        low_a, high_a, _, _ = self._boxes(source)
        low_b, high_b, body, edge = self._boxes(target)
        share = (points - low_a) / np.maximum(high_a - low_a, 1e-6)
        found = low_b + share * (high_b - low_b)
        ratio = (high_a - low_a) / np.maximum(high_b - low_b, 1e-6)
        good = ((share >= 0) & (share <= 1)).all(axis=1) & target.inside(found)
        block = np.clip((np.nan_to_num(found) / edge).astype(int), 0, np.asarray(body.shape) - 1)
        good &= body[tuple(block.T)]
        result = no_matches(len(points))
        result.points_mm[good] = target.to_world(found[good])
        result.scores[good] = float(np.minimum(ratio, 1 / np.maximum(ratio, 1e-6)).min())
        return result
