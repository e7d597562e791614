"""Stain shift: the formula against a plain loop, levels, and images that have no stain."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from medssl.errors import RequestError
from medssl.evaluation.corruptions import KINDS, LEVELS
from medssl.evaluation.stain import BASIS, STRENGTHS, basis, check_domain, stain_shift
from medssl.seeding import counter_rng

WINDOW = {"window": [0, 255]}


def section(n: int = 2, size: int = 6) -> torch.Tensor:
    """Purple and pink on white, as shares of white."""
    stains = torch.rand(n, size, size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stains = stains * torch.tensor([0.8, 0.6, 0.05], dtype=torch.float64)
    return torch.pow(10.0, -(stains @ basis())).movedim(-1, 1).float()


def by_hand(colour: list[float], a: list[float], b: list[float]) -> list[float]:
    """One pixel, stain by stain."""
    rows = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in BASIS]
    density = [-math.log10(min(max(value, 1 / 255), 1)) for value in colour]
    s = np.linalg.solve(np.array(rows).T, density)  # density = sum of s times its row
    s = [(1 + a[k]) * s[k] + b[k] for k in range(3)]
    light = [10 ** -sum(s[k] * rows[k][c] for k in range(3)) for c in range(3)]
    return [min(max(value, 0.0), 1.0) for value in light]


@pytest.mark.parametrize("level", [1, 5])
def test_stain__equals_the_formula_pixel_by_pixel(level: int) -> None:
    x = section()
    x[0, :, 0, 0] = torch.tensor([0.0, 1.0, 0.5])  # black and white are as dark and as light as they can be
    found = stain_shift(x, level, [4, 9], normalize=WINDOW, seed=7)
    for place, key in enumerate((4, 9)):
        a, b = counter_rng(7, "corruption", "stain", key).uniform(-1, 1, size=(2, 3)) * STRENGTHS[level - 1]
        for row in range(6):
            for column in range(6):
                wanted = by_hand(x[place, :, row, column].double().tolist(), a.tolist(), b.tolist())
                assert found[place, :, row, column].tolist() == pytest.approx(wanted, abs=1e-6)


def test_levels__go_further_each_and_draws_belong_to_images() -> None:
    x = section(4)
    away = [float((stain_shift(x, level, range(4), normalize=WINDOW) - x).square().mean()) for level in range(LEVELS + 1)]
    assert away[0] == 0 and all(b > a for a, b in zip(away, away[1:])) and len(STRENGTHS) == LEVELS
    whole = stain_shift(x, 3, [5, 6, 7, 8], normalize=WINDOW)
    parts = [stain_shift(x[k : k + 1], 3, [5 + k], normalize=WINDOW) for k in range(4)]  # in any batch
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(stain_shift(x, 3, [5, 6, 7, 8], normalize=WINDOW, seed=1), whole)


def test_stain__is_the_same_however_views_are_scaled() -> None:
    x = section()
    found = stain_shift(x, 4, [0, 1], normalize=WINDOW)
    raw = stain_shift(x * 255, 4, [0, 1], normalize="none")
    signed = stain_shift(2 * x - 1, 4, [0, 1], normalize={"window": [127.5, 255]})
    assert torch.allclose(raw / 255, found, atol=1e-6) and torch.allclose((signed + 1) / 2, found, atol=1e-6)


def test_stain__refuses_what_is_not_stained() -> None:
    grey = torch.rand(2, 1, 8, 8)
    with pytest.raises(RequestError, match="it takes red, green and blue"):
        stain_shift(grey, 1, [0, 1], normalize=WINDOW)
    with pytest.raises(RequestError, match="1 of 2 images of a batch are grey"):
        stain_shift(torch.cat([grey[:1].expand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)]), 1, [0, 1], normalize=WINDOW)
    with pytest.raises(RequestError, match="normalize is zscore"):
        stain_shift(section(), 1, [0, 1], normalize="zscore")
    with pytest.raises(RequestError, match="level 6"):
        stain_shift(section(), 6, [0, 1], normalize=WINDOW)
    with pytest.raises(RequestError, match="images of domain mri are not stained"):
        check_domain("mri")
    check_domain("wsi")
    assert "stain" in KINDS
