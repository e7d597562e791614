"""What clips are asked beyond one label each: the phase of the heart, the outline of a chamber, whether a clip is unlike normal ones.

The road around `evaluation.clips`: from an index and a table to arrays, and from scores to `evaluate.json`. Every table carries the untrained
encoder and raw pixels beside the weights; folds, neighbours and intervals are by patient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medssl import data_sources
from medssl.types import ClipBatch


@dataclass
class ClipLook:
    """The clips of an evaluation source, batch by batch, and what was shown of them.

    Args:
        source: Of `data_sources.evaluation_source`, with views of clips.
        device: Where views are made.
        batch: Clips per forward pass.
    """

    source: data_sources.ImageLike
    device: torch.device
    batch: int = 4

    def __post_init__(self) -> None:
        self._shown: list[dict[str, np.ndarray]] = []

    def __iter__(self) -> Iterator[tuple[ClipBatch, list[int]]]:
        name, self._shown = self.source.view_maker.name, []
        for views in data_sources.evaluation_batches(self.source, self.device, self.batch):
            parts = {part: views[f"{name}_{part}"][:, 0].cpu().numpy() for part in ("frame", "valid", "time_s", "map", "sector")}
            self._shown.append(parts)
            yield ClipBatch.of(views, name), views.meta.ids.tolist()

    @property
    def shown(self) -> dict[str, np.ndarray]:
        """What the last pass showed, N clips: `frame` (N, T) numbers in the file, `valid` (N, T), `time_s` (N, T), `map` (N, 2, 3), `sector`
        (N, h, w)."""
        found = {key: np.concatenate([one[key] for one in self._shown]) for key in self._shown[0]}
        return {**found, "sector": found["sector"][:, 0]}
