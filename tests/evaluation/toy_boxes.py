"""Squares on noise, an encoder of three convolutions, and batches of them in memory: what tests of detection share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medssl.evaluation.box_cases import BoxCases, WholeCase
from medssl.layers.tokens import flatten_tokens
from medssl.types import EncoderOutput


class Toy(nn.Module):
    """Maps of stride 2, 4 and 8 of images or volumes."""

    embed_dim = 16
    in_channels = 1

    def __init__(self, dims: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        kind: Any = nn.Conv2d if dims == 2 else nn.Conv3d
        self.blocks = nn.ModuleList([kind(n, 16, 3, stride=2, padding=1) for n in (1, 16, 16)])

    def forward(self, x: Tensor) -> EncoderOutput:
        return self.forward_features(x)

    def forward_features(self, x: Tensor) -> EncoderOutput:
        maps = []
        for block in self.blocks:
            x = torch.relu(block(x))
            maps.append(x)
        tokens = flatten_tokens(x)
        return EncoderOutput(tokens=tokens, grid=tuple(x.shape[2:]), pooled=tokens.mean(dim=1), pyramid=tuple(maps))


def make_case(number: int, dims: int = 2, side: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an image with none, one or two squares of about 8 pixels, bright (class 0) or dark (class 1), their boxes and labels."""
    rng = np.random.default_rng(number)
    image = 0.2 * rng.normal(size=(side,) * dims)
    boxes, labels = [], []
    for k in range(number % 3):
        low = rng.integers(1, side // 2 - 9, dims)
        low[0] += k * side // 2  # one in each half, so that none hides another
        high = low + rng.integers(7, 10, dims)
        label = int(rng.integers(2))
        image[tuple(slice(a, b) for a, b in zip(low, high))] += 1.0 if label == 0 else -1.0
        boxes.append([*low, *high])
        labels.append(label)
    return image.astype(np.float32), np.array(boxes, dtype=float).reshape(-1, 2 * dims), np.array(labels, dtype=np.int64)


class Squares:
    """Batches of such cases."""

    def __init__(self, n: int = 36, dims: int = 2, side: int = 32) -> None:
        self.cases = [make_case(number, dims, side) for number in range(n)]
        self.size = (side,) * dims
        self.asked: list[int] = []

    def training(self, ids: Sequence[int], step: int, seed: int, batch: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        chosen = [ids[int(k)] for k in np.random.default_rng([seed, step]).integers(len(ids), size=batch)]
        self.asked += chosen
        images = torch.stack([torch.from_numpy(self.cases[k][0])[None] for k in chosen])
        none = torch.zeros(0, 2 * len(self.size))
        targets = [
            {
                "boxes": torch.from_numpy(self.cases[k][1]).float(),
                "labels": torch.from_numpy(self.cases[k][2]),
                "ignore": none,
            }
            for k in chosen
        ]
        return images, targets

    def whole(self, number: int) -> WholeCase:
        image, boxes, labels = self.cases[number]
        dims = image.ndim
        hidden = np.zeros(len(boxes), dtype=bool)
        return WholeCase(torch.from_numpy(image)[None, None], np.ones(dims), np.zeros(dims), boxes, labels, hidden)

    def box_cases(self, groups: bool = True, **changes: Any) -> BoxCases:
        n = len(self.cases)
        present = np.array([[int((labels == k).sum()) for k in range(2)] for _, _, labels in self.cases])
        split = np.array(["train", "train", "test", "train", "val", "test"] * (n // 6 + 1))[:n]
        own = [f"p{k // 3}" for k in range(n)] if groups else None
        facts: dict[str, Any] = {
            "ids": np.arange(n),
            "split": split,
            "groups": own,
            "classes": ("bright", "dark"),
            "present": present,
        }
        return BoxCases(**{**facts, **changes})
