"""Sinkhorn, spherical k-means, prototypes, queue and bank: formulas, and sanity experiments 9.1 to 9.4 of the method card."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from medssl.layers.prototypes import (
    UNLABELLED,
    EmbeddingQueue,
    MemoryBank,
    Prototypes,
    StuckAlarm,
    prototype_warning,
    suggested_prototypes,
    usage,
)
from medssl.layers.sinkhorn import sinkhorn
from medssl.layers.spherical_kmeans import spherical_kmeans


def unit(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def plain_sinkhorn(scores: list[list[float]], epsilon: float, iterations: int) -> list[list[float]]:
    """The published listing as plain loops: K x B, all mass 1, rows to 1/K, columns to 1/B, times B at the end."""
    samples, prototypes = len(scores), len(scores[0])
    q = [[math.exp(scores[b][k] / epsilon) for b in range(samples)] for k in range(prototypes)]
    total = sum(map(sum, q))
    q = [[value / total for value in row] for row in q]
    for _ in range(iterations):
        q = [[value / sum(row) / prototypes for value in row] for row in q]
        columns = [sum(q[k][b] for k in range(prototypes)) for b in range(samples)]
        q = [[q[k][b] / columns[b] / samples for b in range(samples)] for k in range(prototypes)]
    return [[q[k][b] * samples for k in range(prototypes)] for b in range(samples)]


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_sinkhorn__equals_plain_loops(iterations: int) -> None:
    torch.manual_seed(0)
    scores = unit(7, 16, dtype=torch.float64) @ unit(5, 16, dtype=torch.float64).T
    expected = torch.tensor(plain_sinkhorn(scores.tolist(), 0.05, iterations), dtype=torch.float64)
    assert torch.allclose(sinkhorn(scores, iterations=iterations), expected, rtol=1e-12, atol=0)


def test_sinkhorn__is_balanced_as_measured() -> None:
    """Card 9.1: B = 256, K = 32, E = 128."""
    torch.manual_seed(0)
    scores = unit(256, 128) @ unit(32, 128).T
    three, ten = sinkhorn(scores), sinkhorn(scores, iterations=10)
    assert (three.sum(dim=1) - 1).abs().max() < 3e-7
    assert (three.sum(dim=0) / 8 - 1).abs().max() == pytest.approx(0.011, abs=0.001)
    assert (ten.sum(dim=0) / 8 - 1).abs().max() < 2e-6


@pytest.mark.parametrize(("samples", "prototypes", "measured"), [(256, 32, 3.86), (6, 3000, 8.45)])
def test_loss_of_random_embeddings__is_a_little_above_ln_k(samples: int, prototypes: int, measured: float) -> None:
    """Card 9.1: ln K + 0.36 to 0.44 for independent views; single draws of six samples spread by 0.08."""
    values = []
    for seed in range(20):
        torch.manual_seed(seed)
        c, s, t = unit(prototypes, 128), unit(samples, 128), unit(samples, 128)
        values.append(float(-(sinkhorn(s @ c.T) * log_softmax(t @ c.T / 0.1, dim=1)).sum(dim=1).mean()))
    assert math.log(prototypes) + 0.35 < sum(values) / len(values) < math.log(prototypes) + 0.44
    assert sum(values) / len(values) == pytest.approx(measured, abs=0.08)


def test_few_samples__give_nearly_uniform_targets() -> None:
    """Card 9.2: the released setting, 6 samples and 3,000 prototypes."""
    torch.manual_seed(0)
    q = sinkhorn(unit(6, 128) @ unit(3000, 128).T)
    assert float(q.max()) == pytest.approx(0.002, abs=0.0003)
    assert float(1 - usage(q)["sharpness"]) == pytest.approx(0.91, abs=0.01)


def test_prototype_warning__says_when_samples_are_too_few() -> None:
    assert prototype_warning(256, 0, 256) is None
    assert prototype_warning(6, 3000, 3000) is None
    assert "under one sample per prototype. " in str(prototype_warning(64, 0, 100))
    assert "teach little" in str(prototype_warning(6, 0, 301))
    assert "teach little" not in str(prototype_warning(6, 0, 300))
    assert [suggested_prototypes(n) for n in (0, 50, 3000, 10**6)] == [8, 8, 300, 3000]


def test_sinkhorn__is_float32_under_autocast_and_in_half_precision() -> None:
    torch.manual_seed(0)
    scores = unit(16, 32) @ unit(8, 32).T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn(scores), sinkhorn(scores))
        assert sinkhorn(scores).dtype == torch.float32
    half = sinkhorn(scores.half())
    assert half.dtype == torch.float32 and torch.isfinite(half).all()
    extreme = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    assert torch.isfinite(sinkhorn(extreme, epsilon=0.025)).all()


def test_sinkhorn__edges() -> None:
    assert sinkhorn(torch.zeros(0, 4)).shape == (0, 4)
    assert torch.allclose(sinkhorn(torch.zeros(3, 4)), torch.full((3, 4), 0.25))
    with pytest.raises(ValueError, match="underflows"):
        sinkhorn(torch.zeros(2, 2), epsilon=0.01)


def test_kmeans__equals_plain_loops_and_never_falls() -> None:
    """Card 9.3: the objective never falls, centroids have length 1."""
    torch.manual_seed(0)
    x = unit(60, 5, dtype=torch.float64)
    found = spherical_kmeans(x, 7, torch.Generator().manual_seed(3))
    first = torch.randperm(60, generator=torch.Generator().manual_seed(3))[:7].tolist()
    centroids = [x[i].tolist() for i in first]
    for _ in range(10):
        labels = [max(range(7), key=lambda k: sum(a * b for a, b in zip(row, centroids[k]))) for row in x.tolist()]
        for k in range(7):
            members = [row for row, label in zip(x.tolist(), labels) if label == k]
            if members:
                total = [sum(column) for column in zip(*members)]
                norm = math.sqrt(sum(v * v for v in total))
                centroids[k] = [v / norm for v in total]
    assert torch.allclose(found.centroids, torch.tensor(centroids, dtype=torch.float64))
    assert len(found.objective) == 11
    assert all(later >= earlier - 1e-12 for earlier, later in zip(found.objective, found.objective[1:]))
    assert found.objective[-1] > found.objective[0] + 0.01
    assert torch.allclose(found.centroids.norm(dim=1), torch.ones(7, dtype=torch.float64))


def test_kmeans__finds_planted_clusters() -> None:
    torch.manual_seed(0)
    centres = normalize(torch.eye(4, 16), dim=1)
    truth = torch.arange(200) % 4
    x = normalize(centres[truth] + 0.05 * torch.randn(200, 16), dim=1)
    found = max((spherical_kmeans(x, 4, torch.Generator().manual_seed(s)) for s in range(5)), key=lambda c: c.objective[-1])
    table = torch.zeros(4, 4).index_put_((truth, found.labels), torch.ones(200), accumulate=True)
    assert (table.max(dim=1).values == 50).all()


def test_kmeans__empty_clusters_keep_their_centroid() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # two equal first centroids: the second stays empty
    for seed in range(20):
        found = spherical_kmeans(x, 3, torch.Generator().manual_seed(seed))
        assert torch.isfinite(found.centroids).all()
        assert torch.allclose(found.centroids.norm(dim=1), torch.ones(3))
        assert found.objective[-1] == pytest.approx(1.0)


def test_kmeans__clamps_k_to_the_items_and_repeats() -> None:
    torch.manual_seed(0)
    x = unit(5, 8)
    found = spherical_kmeans(x, 3000, torch.Generator().manual_seed(0))
    assert found.centroids.shape == (5, 8)
    assert sorted(found.labels.tolist()) == [0, 1, 2, 3, 4]
    again = spherical_kmeans(x, 3000, torch.Generator().manual_seed(0))
    assert torch.equal(found.centroids, again.centroids)
    with pytest.raises(ValueError, match="at least one row"):
        spherical_kmeans(x[:0], 3, torch.Generator())


def test_prototypes__stay_on_the_sphere() -> None:
    """Card 9.3."""
    torch.manual_seed(0)
    head = Prototypes(16, 12)
    optimiser = torch.optim.SGD(head.parameters(), lr=1.0)
    for _ in range(5):
        optimiser.zero_grad()
        head(unit(20, 16)).square().sum().backward()
        optimiser.step()
        assert (head.weight.norm(dim=1) - 1).abs().max() > 1e-3
        head.normalise()
        assert (head.weight.norm(dim=1) - 1).abs().max() < 1e-6


def test_prototypes__frozen_have_a_zero_gradient_not_a_missing_one() -> None:
    head = Prototypes(4, 3)
    z = unit(5, 4).requires_grad_(True)
    head(z, frozen=True).square().sum().backward()
    assert head.weight.grad is not None and (head.weight.grad == 0).all()
    assert z.grad is not None and (z.grad != 0).any()
    assert not Prototypes(4, 3, learned=False).weight.requires_grad


def test_prototypes__with_fewer_centroids_the_rest_is_out() -> None:
    head = Prototypes(4, 6, learned=False)
    head.set(unit(2, 4))
    probabilities = head(unit(5, 4)).softmax(dim=1)
    assert (probabilities[:, 2:] == 0).all() and torch.allclose(probabilities.sum(dim=1), torch.ones(5))
    head.set(unit(6, 4))
    assert (head(unit(5, 4)) > -1.001).all()


def test_queue__keeps_the_newest_first() -> None:
    queue = EmbeddingQueue(5, 1)
    assert queue.share(0).shape == (0, 1)
    queue.push(torch.tensor([[[1.0], [2.0]], [[-1.0], [-2.0]]]))
    assert queue.share(0)[:, 0].tolist() == [2.0, 1.0]
    queue.push(torch.arange(3.0, 7.0).reshape(1, 4, 1).repeat(2, 1, 1))
    assert queue.share(0)[:, 0].tolist() == [6.0, 5.0, 4.0, 3.0, 2.0]
    assert queue.share(1)[:, 0].tolist() == [6.0, 5.0, 4.0, 3.0, -2.0]
    queue.push(torch.arange(10.0, 20.0).reshape(1, 10, 1).repeat(2, 1, 1))
    assert queue.share(0)[:, 0].tolist() == [19.0, 18.0, 17.0, 16.0, 15.0]


def test_bank__keeps_the_last_of_an_item() -> None:
    bank = MemoryBank(6, 1, heads=2)
    assert not bank.clustered
    bank.write(torch.tensor([4, 1, 4]), torch.tensor([[[1.0], [2.0], [3.0]], [[-1.0], [-2.0], [-3.0]]]))
    assert bank.rows[0, :, 0].tolist() == [0.0, 2.0, 0.0, 0.0, 3.0, 0.0]
    assert bank.rows[1, :, 0].tolist() == [0.0, -2.0, 0.0, 0.0, -3.0, 0.0]
    bank.label(1, torch.tensor([7, 8]))
    assert bank.labels.tolist() == [[UNLABELLED] * 6, [UNLABELLED, 7, UNLABELLED, UNLABELLED, 8, UNLABELLED]]
    assert bank.clustered
    with pytest.raises(ValueError, match="6 slots"):
        bank.write(torch.tensor([6]), torch.zeros(2, 1, 1))


def test_usage__tells_collapse_from_balance() -> None:
    even = usage(torch.eye(4))
    assert float(even["entropy"]) == pytest.approx(1) and float(even["used"]) == 1 and float(even["sharpness"]) == pytest.approx(1)
    collapsed = usage(torch.eye(4)[torch.zeros(8, dtype=torch.int64)])
    assert float(collapsed["entropy"]) == 0 and float(collapsed["used"]) == 0.25
    uniform = usage(torch.full((8, 4), 0.25))
    assert float(uniform["sharpness"]) == pytest.approx(0, abs=1e-6) and float(uniform["entropy"]) == pytest.approx(1)
    assert torch.isfinite(torch.stack(list(usage(torch.zeros(0, 4)).values()))).all()


def test_alarm__rings_after_epochs_at_ln_k_only() -> None:
    """Card 9.4: stuck at ln K for more than five epochs."""
    alarm = StuckAlarm(steps=0)
    rung = [alarm.update(math.log(4), math.log(4), step, step // 10) for step in range(100)]
    assert rung.index(True) == 60
    falling = StuckAlarm(steps=0)
    assert not any(falling.update(1.38 - 0.01 * step, math.log(4), step, step // 10) for step in range(100))
    patient = StuckAlarm(steps=1000)
    assert not any(patient.update(8.0, 8.0, step, step) for step in range(1000))
