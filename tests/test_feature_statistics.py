from __future__ import annotations

import math

import pytest
import torch

from medssl.feature_statistics import alignment, effective_rank, feature_std, uniformity


@pytest.fixture(name="features")
def _features() -> torch.Tensor:
    return torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def unit_rows(features):
    rows = features.tolist()
    return [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows]


def test_feature_std__equals_plain_loop(features):
    rows = unit_rows(features)
    stds = []
    for column in zip(*rows, strict=True):
        mean = sum(column) / 7
        stds.append(math.sqrt(sum((v - mean) ** 2 for v in column) / 7))
    assert feature_std(features).item() == pytest.approx(sum(stds) / 5, abs=1e-14)


def test_feature_std__isotropic_and_collapsed():
    isotropic = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1))
    assert feature_std(isotropic).item() == pytest.approx(1 / 8, rel=0.02)
    assert feature_std(torch.arange(1.0, 7)[:, None] * torch.ones(6, 8)).item() == pytest.approx(0.0, abs=1e-7)


def test_effective_rank__equals_plain_loop(features):
    # singular values as roots of the eigenvalues of the Gram matrix
    singular = [math.sqrt(v) for v in torch.linalg.eigvalsh(features.T @ features).tolist()]
    shares = [s / sum(singular) + 1e-7 for s in singular]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert effective_rank(features).item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_effective_rank__of_equal_singular_values_is_their_number(rank):
    q, _ = torch.linalg.qr(torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    features = 3.7 * q.clone()
    features[:, rank:] = 0
    assert effective_rank(features, eps=1e-12).item() == pytest.approx(rank, abs=1e-6)


def test_effective_rank__is_invariant_to_scale_and_rotation(features):
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    assert effective_rank(5 * features @ q).item() == pytest.approx(effective_rank(features).item(), abs=1e-10)
    assert 1 < effective_rank(features).item() < 5


def test_effective_rank__of_zeros_is_finite():
    assert effective_rank(torch.zeros(4, 3)).item() == pytest.approx(1.0, abs=1e-4)


def test_alignment__equals_plain_loop(features):
    other = features.flip(0) + 0.3
    pairs = zip(unit_rows(features), unit_rows(other), strict=True)
    distances = [math.sqrt(sum((v - w) ** 2 for v, w in zip(a, b, strict=True))) for a, b in pairs]
    assert alignment(features, other).item() == pytest.approx(sum(d**2 for d in distances) / 7, abs=1e-14)
    assert alignment(features, other, alpha=1).item() == pytest.approx(sum(distances) / 7, abs=1e-14)


def test_alignment__limits(features):
    assert alignment(features, 2 * features).item() == pytest.approx(0.0, abs=1e-15)
    assert alignment(features, -features).item() == pytest.approx(4.0, abs=1e-12)


def test_uniformity__equals_plain_loop(features):
    rows = unit_rows(features)
    potentials = []
    for i in range(7):
        for j in range(i):
            squared = sum((v - w) ** 2 for v, w in zip(rows[i], rows[j], strict=True))
            potentials.append(math.exp(-2 * squared))
    assert uniformity(features).item() == pytest.approx(math.log(sum(potentials) / 21), abs=1e-13)


def test_uniformity__spread_is_lower_than_clustered(features):
    assert uniformity(features[:1].repeat(4, 1)).item() == pytest.approx(0.0, abs=1e-12)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(opposite).item() == pytest.approx(-8.0, abs=1e-5)
    assert uniformity(features).item() < uniformity(features + 5).item()


def test_statistics__take_half_precision(features):
    half = features.to(torch.bfloat16)
    for statistic in (feature_std, effective_rank, uniformity):
        assert statistic(half).dtype == torch.float32
        assert statistic(half).item() == pytest.approx(statistic(features).item(), rel=0.02)
