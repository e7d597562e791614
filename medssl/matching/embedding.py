"""Match by dense anatomical embedding: where in the target is the vector most like that of the point?"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.matching.base import Matches, MatchVolume, checked_points, no_matches
from medssl.matching.cells import VolumeEmbedding
from medssl.matching.network import MatcherNetwork
from medssl.matching.store import EmbeddingReader, find_folder

KEPT = 4
"""Embeddings made on the spot that are kept: those of the volumes at hand."""


class EmbeddingMatcher:
    """Matches with a trained network; the score is the mean of the fine and the coarse cosine.

    Args:
        weights: Run folder or weights of the objective `anatomical_embedding`.
        store: Folder of the store whose embeddings are read; None embeds every volume on the spot, as `medssl match` does for files.
        step_mm: Step of the embeddings (see `MatcherNetwork`).
        spacing_mm: Spacing that the weights must have been trained at; None takes theirs.
        memory_mb: Embeddings kept in memory, in MB.
        device: Where volumes without an embedding in the store are embedded.

    Raises:
        WeightsError: The weights are no matcher.
        RequestError: The store's embeddings are missing, or were made with other weights, at another spacing or step.
    """

    name = "embedding"

    def __init__(
        self,
        weights: Path | str,
        *,
        store: Path | str | None = None,
        step_mm: float | None = None,
        spacing_mm: Any = None,
        memory_mb: float = 1024,
        device: str = "cpu",
    ) -> None:
        self.network = MatcherNetwork(weights, step_mm=step_mm, spacing_mm=spacing_mm, device=device)
        self.reader: EmbeddingReader | None = None
        self.store_key = ""
        if store is not None:
            from medssl.store.reader import StoreReader

            self.store_key = StoreReader(Path(store)).key
            self.reader = EmbeddingReader(find_folder(Path(store), self.network.manifest(self.store_key)), memory_mb)
        self._made: OrderedDict[int, tuple[MatchVolume, VolumeEmbedding]] = OrderedDict()

    def require(self, versions: dict[str, str]) -> None:
        """Raise unless these volumes of the store have embeddings (series_id -> version).

        Raises:
            RequestError: Some have none, or stale ones.
        """
        if self.reader is not None:
            self.reader.require(versions)

    def embedding(self, volume: MatchVolume) -> VolumeEmbedding:
        """Return the embedding of a volume, from the store where it has one."""
        if self.reader is not None and self.reader.usable(volume.name, volume.version):
            return self.reader.read(volume.name)
        if id(volume) not in self._made:
            while len(self._made) >= KEPT:
                self._made.popitem(last=False)
            self._made[id(volume)] = (volume, self.network.embed(volume, self.store_key))
        return self._made[id(volume)][1]

    def match(self, source: MatchVolume, points_mm: np.ndarray, target: MatchVolume) -> Matches:
        """See `base.Matcher`."""
        return match_embeddings(self.embedding(source), source, points_mm, self.embedding(target), target)

    def similarity(
        self, source: MatchVolume, point_mm: np.ndarray, target: MatchVolume
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the score of every fine cell of the target for one point (NaN outside the body), and origin and step of cells, item mm."""
        fine, coarse = self.embedding(source).query(source.to_item(checked_points([point_mm])))
        there = self.embedding(target)
        return there.similarity(fine[0], coarse[0]), there.fine.origin_mm, there.fine.step_mm


def match_embeddings(
    here: VolumeEmbedding, source: MatchVolume, points_mm: np.ndarray, there: VolumeEmbedding, target: MatchVolume
) -> Matches:
    """Find points of one embedded volume in another.

    Args:
        here: Embedding of the source.
        source: Frame of the source.
        points_mm: (N, 3) world mm.
        there: Embedding of the target.
        target: Frame of the target.

    Raises:
        RequestError: The two embeddings were not made alike.
    """
    if here.key != there.key:
        raise RequestError(
            f"series {here.name} and {there.name}: their embeddings were made with different weights, spacing or step, and such vectors "
            "cannot be compared; run `medssl embed` for both with the same weights and step"
        )
    items = source.to_item(checked_points(points_mm))
    fine, coarse = here.query(items)
    usable = source.inside(items) & (np.abs(fine).sum(axis=1) > 0)
    result = no_matches(len(items))
    for k in np.flatnonzero(usable):
        place, score = there.find(fine[k], coarse[k])
        result.points_mm[k] = target.to_world(place[None])[0]
        result.scores[k] = max(score, 0.0)
    return result
