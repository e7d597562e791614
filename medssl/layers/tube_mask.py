"""Tube masks: one pattern of hidden places for all tubelets of a clip, so that nothing can be copied from a neighbour in time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from medssl.seeding import counter_rng


def tube_pattern(inside: np.ndarray, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Hide exactly `int(ratio * N)` of N places; what is shown is drawn inside the sector first.

    At least one place inside stays hidden where there are two or more: a clip of which all is shown teaches nothing.

    Args:
        inside: (h, w) bool.
        ratio: Hidden share, 0 <= ratio < 1.
        rng: Explicit generator.

    Returns:
        (h, w) bool, True = hidden.
    """
    shown = inside.size - int(ratio * inside.size)
    order = rng.permutation(inside.size)
    flat = inside.ravel()[order]
    first, rest = order[flat], order[~flat]
    most = min(shown, max(len(first) - 1, 1)) if int(ratio * inside.size) else shown
    chosen = np.concatenate([first[:most], rest, first[most:]])[:shown]
    hidden = np.ones(inside.size, dtype=bool)
    hidden[chosen] = False
    return hidden.reshape(inside.shape)


def tube_masks(valid: Tensor, ratio: float, count: int, seeds: Sequence[Sequence[int | str]]) -> Tensor:
    """Draw several tube masks for every clip.

    Args:
        valid: (B, T, h, w) bool, valid tokens of each clip on their grid.
        ratio: Hidden share of the places.
        count: Masks per clip (R).
        seeds: B sequences: what the masks of a clip depend on. They are drawn on the CPU, so that devices agree.

    Returns:
        (B, R, T, h, w) bool, True = hidden, the same pattern for all T.
    """
    inside = valid.any(dim=1).cpu().numpy()
    patterns = np.stack(
        [
            np.stack([tube_pattern(places, ratio, counter_rng(*seed, "tube mask", r)) for r in range(count)])
            for places, seed in zip(inside, seeds, strict=True)
        ]
    )
    return torch.from_numpy(patterns).to(valid.device)[:, :, None].expand(-1, -1, valid.shape[1], -1, -1)
