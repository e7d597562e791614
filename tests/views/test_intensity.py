from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from medssl.errors import RequestError
from medssl.views.intensity import bias_, contrast_, gamma_, noise_, normalization, normalize_

STATS = {"mean": 300.0, "std": 120.0, "p00_5": 10.0, "p99_5": 900.0, "min": -4000.0, "max": 5000.0}
RAW = torch.tensor([-4000.0, 10.0, 300.0, 455.0, 900.0, 5000.0])


def test_normalize__equals_the_formulas() -> None:
    x = RAW.double().numpy()
    zscore = normalize_(RAW.clone(), normalization("zscore", None, STATS, 0))
    assert np.allclose(zscore.numpy(), (x - 300) / 120, rtol=1e-6)
    percentile = normalize_(RAW.clone(), normalization("percentile", None, STATS, 0))
    assert np.allclose(percentile.numpy(), np.clip((x - 10) / 890, 0, 1), rtol=1e-6)
    window = normalize_(RAW.clone(), normalization("window", (-100.0, 700.0), {}, 0))
    assert np.allclose(window.numpy(), np.clip((x + 100) / 800, 0, 1), rtol=1e-6)
    assert torch.equal(normalize_(RAW.clone(), normalization("none", None, {}, 0)), RAW)


def test_padding__is_the_normalised_minimum_but_no_outlier() -> None:
    assert normalization("zscore", None, STATS, 0).padding == pytest.approx((10 - 300) / 120)
    assert normalization("zscore", None, {**STATS, "min": 10.0}, 0).padding == pytest.approx((10 - 300) / 120)
    assert normalization("percentile", None, STATS, 0).padding == 0
    assert normalization("window", (-1000.0, 400.0), STATS, 0).padding == 0
    assert normalization("window", (-1000.0, 400.0), STATS, 0).padding_raw == -1000
    assert normalization("none", None, STATS, 0).padding == 10
    assert normalization("none", None, {}, 0).padding == 0


def test_constant_item__becomes_finite() -> None:
    flat = {"mean": 5.0, "std": 0.0, "p00_5": 5.0, "p99_5": 5.0, "min": 5.0}
    for name in ("zscore", "percentile"):
        assert torch.equal(normalize_(torch.full((3,), 5.0), normalization(name, None, flat, 0)), torch.zeros(3))


def test_normalization__names_missing_statistics() -> None:
    with pytest.raises(RequestError, match=r"item 7: no statistics std, min, p00_5 \(found: mean\).*needs.*store again"):
        normalization("zscore", None, {"mean": 1.0}, 7)


def test_random_changes__equal_the_formulas() -> None:
    x = torch.linspace(-1, 3, 60, dtype=torch.float32).reshape(1, 3, 4, 5)
    reference = x.double().numpy()
    assert np.allclose(contrast_(x.clone(), 1.4, 0.5).numpy(), (reference - 0.5) * 1.4 + 0.5, atol=1e-6)
    assert np.allclose(gamma_(x.clone(), 0.7).numpy(), ((reference + 1) / 4) ** 0.7 * 4 - 1, atol=1e-5)
    log_gain = torch.full((1, 3, 4, 5), 0.3)
    assert np.allclose(bias_(x.clone(), log_gain).numpy(), reference * math.exp(0.3), rtol=1e-6)
    assert torch.equal(gamma_(torch.ones(1, 2, 2, 2), 2.0), torch.ones(1, 2, 2, 2))


def test_noise__has_the_asked_deviation_and_follows_its_generator() -> None:
    zero = torch.zeros(1, 40, 40, 40)
    one, two = (noise_(zero.clone(), 0.2, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert float(one.std()) == pytest.approx(0.2, rel=0.02)
    assert float(one.mean()) == pytest.approx(0, abs=0.005)
