"""LVM-Med: formulas, and sanity experiments 9.1 to 9.6 of the method card with its reference values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from medssl.errors import RequestError
from medssl.objectives.graph_matching import (
    GraphMatching,
    MessagePassing,
    adjacency,
    cell_positions,
    edge_affinity,
    identity_is_best,
    lawler_matrix,
    local_affinity,
    matching_loss,
    nearest_edges,
    objective_value,
    perturbed,
    solve,
    squared_distances,
    swap_pairs,
)
from medssl.types import EncoderOutput, StepContext
from tests.objectives.pictures import SPECS, FakeImageEncoder, make_pictures, place


def instances(graphs: int, nodes: int, k: int, *, noise: float = 1.0, spread: float = 0.5, seed: int = 0) -> tuple[Any, Any, Any]:
    """Perturbed affinities and edges of random graphs and noisy copies of them."""
    torch.manual_seed(seed)
    z = torch.randn(graphs, nodes, 16)
    w = z + spread * torch.randn(graphs, nodes, 16)
    edges = (nearest_edges(z, k), nearest_edges(w, k))
    scores = perturbed((normalize(z, dim=-1) @ normalize(w, dim=-1).transpose(1, 2)).double(), noise).numpy()
    affinity = perturbed(edge_affinity(z, w, edges).double(), noise).numpy()
    return scores, affinity, (edges[0].numpy(), edges[1].numpy())


def build(**changes: Any) -> GraphMatching:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"view_specs": SPECS, "dim": 16, "nodes": 4, "neighbours": 2, "top": 6}
    return GraphMatching(FakeImageEncoder(), **{**arguments, **changes})


def test_message_passing__equals_plain_loops() -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 5, 3, dtype=torch.float64)
    edges = nearest_edges(z, 2)
    net = MessagePassing(3).double()
    found = net(z, edges)
    for g in range(2):
        unit = [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in z[g].tolist()]
        link = [[0.0] * 5 for _ in range(5)]
        for i in range(5):
            near = sorted((j for j in range(5) if j != i), key=lambda j: -sum(a * b for a, b in zip(unit[i], unit[j])))[:2]
            assert sorted(near) == sorted(edges[g, edges[g, :, 0] == i, 1].tolist())
            for j in near:
                link[i][j] = link[j][i] = 1.0
        assert adjacency(edges, 5)[g].tolist() == link
        h = z[g].tolist()
        for number, layer in enumerate(net.layers):
            loops = [[link[i][j] + (i == j) for j in range(5)] for i in range(5)]
            degree = [sum(row) for row in loops]
            weight = layer.weight.tolist()
            mixed = [
                [sum(loops[i][j] / math.sqrt(degree[i] * degree[j]) * h[j][c] for j in range(5)) for c in range(3)]
                for i in range(5)
            ]
            h = [[sum(row[c] * weight[o][c] for c in range(3)) for o in range(3)] for row in mixed]
            h = [[max(v, 0.0) for v in row] for row in h] if number == 0 else h
        assert torch.allclose(found[g], torch.tensor(h, dtype=torch.float64))


def test_message_passing__may_keep_what_went_in() -> None:
    z = torch.randn(2, 5, 3)
    edges = nearest_edges(z, 2)
    plain, kept = MessagePassing(3), MessagePassing(3, residual=True)
    kept.load_state_dict(plain.state_dict())
    assert torch.allclose(kept(z, edges), z + plain(z, edges))


def test_edge_affinity_and_value__equal_plain_loops() -> None:
    torch.manual_seed(0)
    z, w = torch.randn(1, 5, 4, dtype=torch.float64), torch.randn(1, 5, 4, dtype=torch.float64)
    edges = (nearest_edges(z, 2), nearest_edges(w, 2))
    affinity = edge_affinity(z, w, edges)
    scores = torch.randn(5, 5, dtype=torch.float64)
    matching = [2, 0, 1, 4, 3]
    value = sum(float(scores[i, matching[i]]) for i in range(5))
    for e, (i, j) in enumerate(edges[0][0].tolist()):
        for f, (a, b) in enumerate(edges[1][0].tolist()):
            step, other = z[0, i] - z[0, j], w[0, a] - w[0, b]
            cosine = float(step @ other) / math.sqrt(float(step @ step) * float(other @ other))
            assert float(affinity[0, e, f]) == pytest.approx(cosine, abs=1e-6)
            value += cosine if matching[i] == a and matching[j] == b else 0.0
    matrix = lawler_matrix(affinity.numpy(), (edges[0].numpy(), edges[1].numpy()), 5)
    assert objective_value(scores.numpy(), matrix[0], np.array(matching)) == pytest.approx(value, abs=1e-5)


def test_solver__reaches_what_was_measured() -> None:
    """Card 9.1: 99.4 % of the brute-force optimum at N = 7 over 30 instances, worst 94 %; exact without noise."""
    permutations = np.array(list(itertools.permutations(range(7))))
    for noise in (1.0, 0.3):
        scores, affinity, edges = instances(30, 7, 3, noise=noise)
        matrix = lawler_matrix(affinity, edges, 7)
        found = solve(scores, matrix)
        optimum = np.array([objective_value(s, m, permutations).max() for s, m in zip(scores, matrix)])
        share = np.array([objective_value(s, m, v) for s, m, v in zip(scores, matrix, found)]) / optimum
        assert share.max() < 1 + 1e-9
        assert share.mean() >= 0.994 and share.min() >= 0.94
        assert noise == 1.0 or share.min() > 1 - 1e-9
        single = solve(scores, matrix, swaps=False)
        alone = np.array([objective_value(s, m, v) for s, m, v in zip(scores, matrix, single)]) / optimum
        assert (share >= alone - 1e-9).all() and alone.mean() > 0.96


def test_first_order__is_exact() -> None:
    scores, _, _ = instances(20, 6, 2)
    permutations = np.array(list(itertools.permutations(range(6))))
    best = [permutations[objective_value(s, np.zeros((36, 36)), permutations).argmax()] for s in scores]
    assert np.array_equal(solve(scores), np.stack(best))


def test_swaps__end_where_no_pair_helps() -> None:
    scores, affinity, edges = instances(5, 6, 2)
    matrix = lawler_matrix(affinity, edges, 6)
    starts = np.stack([np.random.default_rng(s).permutation(6) for s in range(4)])
    for s, m in zip(scores, matrix):
        ends = swap_pairs(s, m, starts)
        for start, end in zip(starts, ends):
            value = objective_value(s, m, end)
            assert value >= objective_value(s, m, start) - 1e-9
            for i, j in itertools.combinations(range(6), 2):
                other = end.copy()
                other[[i, j]] = other[[j, i]]
                assert objective_value(s, m, other) <= value + 1e-8


def smoothed_gradient(c: Tensor, draws: int, step: float) -> Tensor:
    """Finite differences of the mean Hamming distance of the best of all permutations under common Gumbel noise."""
    nodes = len(c)
    permutations = torch.tensor(list(itertools.permutations(range(nodes))))
    distance = 2.0 * (permutations != torch.arange(nodes)).sum(dim=1)
    noise = -torch.log(-torch.log(torch.rand(draws, nodes, nodes).clamp(1e-12, 1 - 1e-7)))

    def mean(scores: Tensor) -> float:
        return float(distance[(scores + noise)[:, torch.arange(nodes), permutations].sum(dim=-1).argmax(dim=1)].mean())

    gradient = torch.zeros_like(c)
    for i, a in itertools.product(range(nodes), repeat=2):
        shift = torch.zeros_like(c)
        shift[i, a] = step
        gradient[i, a] = (mean(c + shift) - mean(c - shift)) / (2 * step)
    return gradient


def test_gradient__agrees_with_finite_differences() -> None:
    """Card 9.2 and the table of section 5: cosine and norm ratio by lambda, N = 4, 20,000 draws."""
    torch.manual_seed(0)
    c = 0.5 * torch.eye(4) + 0.5 * torch.randn(4, 4)
    reference = smoothed_gradient(c, 30_000, 0.3)
    for strength, cosine, ratio in ((0.1, 0.99, 1.01), (0.5, 0.98, 1.18), (1.0, 0.95, 1.15), (80.0, 0.9, 1.45 / 80)):
        x = c.clone().requires_grad_(True)
        matching_loss(x.expand(20_000, 4, 4), strength=strength)[0].mean().backward()
        assert x.grad is not None
        assert float((x.grad * reference).sum() / x.grad.norm() / reference.norm()) > cosine
        assert float(x.grad.norm() / reference.norm()) == pytest.approx(ratio, rel=0.2)


def test_gradient__does_not_depend_on_how_graphs_are_averaged() -> None:
    """Card section 5: dividing the loss by the number of graphs must not weaken the perturbation."""
    plain, between, ends = instances(4, 6, 2, noise=0)
    scores, affinity = torch.from_numpy(plain), torch.from_numpy(between)
    pairs = (torch.from_numpy(ends[0]), torch.from_numpy(ends[1]))
    gradients = []
    for scale in (1.0, 1e-3):
        x, y = scores.clone().requires_grad_(True), affinity.clone().requires_grad_(True)
        torch.manual_seed(0)
        (scale * matching_loss(x, y, pairs, strength=4.0)[0].sum()).backward()
        assert x.grad is not None and y.grad is not None
        gradients.append((x.grad / scale, y.grad / scale))
    assert torch.allclose(gradients[0][0], gradients[1][0]) and torch.allclose(gradients[0][1], gradients[1][1])
    assert gradients[0][0].abs().sum() > 0 and gradients[0][1].abs().sum() > 0


def test_second_matching__is_the_identity_from_lambda_4() -> None:
    """Card section 5 (M): so lambda = 80 is the difference to the identity, and the fast path changes nothing."""
    scores, affinity, edges = instances(20, 16, 5)
    matrix = lawler_matrix(affinity, edges, 16)
    assert (solve(scores - 4 * (1 - 2 * np.eye(16)), matrix) == np.arange(16)).all()
    certain = identity_is_best(scores, affinity, edges, 80.0)
    assert certain.all() and not identity_is_best(scores, affinity, edges, 0.5).any()
    for strength in (0.5, 2.0, 5.0, 20.0, 40.0):
        sure = identity_is_best(scores, affinity, edges, strength)
        pushed = scores - strength * (1 - 2 * np.eye(16))
        assert (solve(pushed, matrix)[sure] == np.arange(16)).all()
    pairs = (torch.from_numpy(edges[0]), torch.from_numpy(edges[1]))
    gradients = []
    for fast in (True, False):
        x, y = torch.from_numpy(scores).requires_grad_(True), torch.from_numpy(affinity).requires_grad_(True)
        x.grad = y.grad = None
        torch.manual_seed(0)
        matching_loss(x, y, pairs, fast=fast)[0].sum().backward()
        gradients += [(x.grad.clone(), y.grad.clone())]  # type: ignore[attr-defined]
    assert torch.equal(gradients[0][0], gradients[1][0]) and torch.equal(gradients[0][1], gradients[1][1])


def test_second_matching__is_the_identity_more_often_the_larger_lambda() -> None:
    """Card section 5: 14, 31, 81 and 100 % at lambda 0.5, 1, 2 and 4. The figures below 4 depend on the instances, which the card does not
    give: how far the second view is from the first spans the range around them."""
    shares = []
    for spread in (0.5, 1.0):
        scores, affinity, edges = instances(12, 16, 5, spread=spread)
        matrix = lawler_matrix(affinity, edges, 16)
        pushed = [solve(scores - bonus * (1 - 2 * np.eye(16)), matrix) for bonus in (0.5, 1.0, 2.0, 6.0)]
        shares.append([float((found == np.arange(16)).all(axis=1).mean()) for found in pushed])
    near, far = shares
    assert near == sorted(near) and far == sorted(far) and near[-1] == far[-1] == 1
    assert all(low <= measured <= high for low, measured, high in zip(far, (0.14, 0.31, 0.81), near))


def test_identity_is_best__is_never_wrong() -> None:
    permutations = np.array(list(itertools.permutations(range(5))))
    scores, affinity, edges = instances(40, 5, 2)
    matrix = lawler_matrix(affinity, edges, 5)
    said = 0
    for bonus in (1.0, 3.0, 6.0, 10.0):
        sure = identity_is_best(scores, affinity, edges, bonus)
        for s, m in zip(scores[sure], matrix[sure]):
            best = permutations[objective_value(s - bonus * (1 - 2 * np.eye(5)), m, permutations).argmax()]
            assert best.tolist() == list(range(5))
        said += int(sure.sum())
    assert said > 40


def test_matchings__keep_the_invariants() -> None:
    """Card 9.4."""
    scores, affinity, edges = instances(6, 8, 3, noise=0)
    x, y = torch.from_numpy(scores).requires_grad_(True), torch.from_numpy(affinity).requires_grad_(True)
    pairs = (torch.from_numpy(edges[0]), torch.from_numpy(edges[1]))
    torch.manual_seed(0)
    distance, matching = matching_loss(x, y, pairs, noise=2.0, strength=3.0)
    assert torch.equal(matching.sort(dim=1).values, torch.arange(8).expand(6, 8))
    assert set(distance.tolist()) <= {0.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0} and float(distance.max().detach()) > 0
    distance.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad.sum(dim=1), torch.zeros(6, 8, dtype=torch.float64))
    assert torch.allclose(x.grad.sum(dim=2), torch.zeros(6, 8, dtype=torch.float64))


def test_equal_views_without_noise__have_distance_zero() -> None:
    """Card 9.4."""
    torch.manual_seed(0)
    z = torch.randn(5, 10, 12)
    edges = nearest_edges(z, 3)
    unit = normalize(z, dim=-1)
    distance, _ = matching_loss(unit @ unit.transpose(1, 2), edge_affinity(z, z, (edges, edges)), (edges, edges), noise=0.0)
    assert distance.tolist() == [0.0] * 5


def test_relabelling__permutes_the_matching() -> None:
    """Card 9.4: new numbers for the nodes of both graphs."""
    torch.manual_seed(0)
    z = torch.randn(6, 8, 12)
    w = (z + 0.3 * torch.randn(6, 8, 12))[:, [3, 1, 0, 2, 7, 5, 4, 6]]
    order = torch.randperm(8)

    def match(a: Tensor, b: Tensor) -> Tensor:
        edges = (nearest_edges(a, 3), nearest_edges(b, 3))
        scores = normalize(a, dim=-1) @ normalize(b, dim=-1).transpose(1, 2)
        return matching_loss(scores, edge_affinity(a, b, edges), edges, noise=0.0)[1]

    before, after = match(z, w), match(z[:, order], w[:, order])
    assert torch.equal(order[after], before[:, order])


def test_first_order__learns_as_measured() -> None:
    """Card 9.3: 16 shared and 48 nuisance dimensions (std 3), N = 16, first order: 0.07 to 1.00 in 300 steps of Adam."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 16, bias=False)
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)

    def batch() -> tuple[Tensor, Tensor]:
        shared = torch.randn(4, 16, 16)
        return tuple(torch.cat([shared, 3 * torch.randn(4, 16, 48)], dim=-1) for _ in range(2))  # type: ignore[return-value]

    def accuracy() -> float:
        with torch.no_grad():
            hits = []
            for _ in range(10):
                z = [normalize(layer(x), dim=-1) for x in batch()]
                hits.append((matching_loss(z[0] @ z[1].transpose(1, 2), noise=0.0)[1] == torch.arange(16)).float().mean())
        return float(torch.stack(hits).mean())

    assert accuracy() < 0.2
    for _ in range(300):
        z = [normalize(layer(x), dim=-1) for x in batch()]
        loss = matching_loss(z[0] @ z[1].transpose(1, 2), noise=0.1)[0].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert accuracy() > 0.99


def test_second_order__withstands_noise() -> None:
    """Card 9.6 and section 5: a perfect encoder under Gumbel(0, 1): second order 0.94, first order 0.15; 0.79 at noise 0.3, 1 at 0.1, and
    0.93 at noise 1 with a margin of 4."""
    torch.manual_seed(0)
    z = torch.randn(40, 16, 32)
    edges = nearest_edges(z, 5)
    perfect = torch.eye(16).expand(40, 16, 16)

    def share(affinity: Tensor | None, noise: float) -> float:
        return float((matching_loss(perfect, affinity, (edges, edges), noise=noise)[1] == torch.arange(16)).float().mean())

    assert share(edge_affinity(z, z, (edges, edges)), 1.0) >= 0.9
    assert share(None, 1.0) <= 0.25
    assert share(None, 0.3) == pytest.approx(0.79, abs=0.06)
    assert share(None, 0.1) == 1.0
    wide = matching_loss(4 * torch.eye(16).expand(200, 16, 16))[1] == torch.arange(16)
    assert float(wide.float().mean()) == pytest.approx(0.93, abs=0.03)


def plain_local(q: Tensor, r: Tensor, near: Tensor | None, top: int) -> float:
    """c_lo(i, a) of the card for the cells q (P, D) and r (Q, D), and distances of places (P, Q)."""
    terms = []
    features = [[sum((a - b) ** 2 for a, b in zip(x, y)) for y in r.tolist()] for x in q.tolist()]
    for distance in [features] + ([] if near is None else [near.tolist()]):
        pairs = sorted((min(row), p, row.index(min(row))) for p, row in enumerate(distance))[:top]
        cosines = [float(q[p] @ r[m]) / math.sqrt(float(q[p] @ q[p]) * float(r[m] @ r[m])) for _, p, m in pairs]
        terms.append(sum(cosines) / len(cosines))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("by_place", [True, False])
def test_local_affinity__equals_plain_loops(by_place: bool) -> None:
    torch.manual_seed(0)
    q, r = torch.randn(1, 3, 6, 5), torch.randn(1, 3, 6, 5)
    places = (torch.rand(1, 3, 6, 2), torch.rand(1, 3, 6, 2))
    found = local_affinity((q, r), places if by_place else None, top=4)
    for i, a in itertools.product(range(3), repeat=2):
        near = torch.cdist(places[0][0, i], places[1][0, a]) if by_place else None
        expected = plain_local(q[0, i], r[0, a], near, 4) + plain_local(r[0, a], q[0, i], None if near is None else near.T, 4)
        assert float(found[0, i, a]) == pytest.approx(expected, abs=1e-5)


def test_local_affinity__of_the_same_crop_is_whole() -> None:
    """Card 9.5: c_lo(i, i) = 1, here the sum of both directions."""
    torch.manual_seed(0)
    q = torch.randn(2, 3, 12, 8)
    places = cell_positions(place().expand(2, 3, 2, 3), (3, 4))
    found = local_affinity((q, q), (places, places))
    assert torch.allclose(found.diagonal(dim1=1, dim2=2), torch.full((2, 3), 2.0))


def test_places__follow_shifts_and_mirrors() -> None:
    """Card 9.5."""
    grid = (4, 6)

    def match(a: Tensor, b: Tensor) -> list[int]:
        nearest = squared_distances(cell_positions(a, grid), cell_positions(b, grid)).argmin(dim=-1)
        return nearest.tolist()  # type: ignore[no-any-return]

    cells = np.arange(24).reshape(grid)
    assert match(place(), place()) == cells.ravel().tolist()
    shifted = place(centre=(0.5 + 1 / 4, 0.5 + 2 / 6))  # one cell down, two to the right
    expected = np.pad(cells, ((1, 0), (2, 0)), mode="edge")[:4, :6]
    assert match(place(), shifted) == expected.ravel().tolist()
    assert match(place(), place(flip=(False, True))) == cells[:, ::-1].ravel().tolist()
    assert match(place(), place(flip=(True, False))) == cells[::-1].ravel().tolist()
    corner = cell_positions(place(size=0.5, centre=(0.25, 0.25)), grid)
    assert torch.allclose(corner[0], torch.tensor([0.5 / 8, 0.5 / 12]))


def test_objective__learns_to_match() -> None:
    torch.manual_seed(0)
    objective = build(nodes=8, neighbours=3, noise=0.3)
    optimiser = torch.optim.Adam(objective.parameters(), lr=3e-3)

    def matched(first: int) -> float:
        with torch.no_grad():
            rows = [objective(make_pictures(16, seed=first + s, noise=0.6), StepContext())["matched"] for s in range(32)]
        return float(torch.stack(rows).mean())

    before = matched(1000)
    for step in range(80):
        optimiser.zero_grad()
        objective(make_pictures(16, seed=step, noise=0.6), StepContext(step=step))["loss"].backward()
        optimiser.step()
    assert matched(1000) > before + 0.1


def test_parameters_without_a_path__are_frozen() -> None:
    class Pools(FakeImageEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(self.embed_dim)  # between tokens and pooled, as in ConvNeXt

        def forward_features(self, x: Tensor, keep: Tensor | None = None) -> EncoderOutput:
            output = super().forward_features(x)
            return EncoderOutput(output.tokens, output.grid, self.norm(output.pooled), output.pyramid)

    encoder = Pools()
    objective = GraphMatching(encoder, view_specs=SPECS, dim=8, nodes=4)
    assert not encoder.norm.weight.requires_grad and encoder.net[0].weight.requires_grad and encoder.training
    objective(make_pictures(8), StepContext())["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


def test_batches__are_cut_into_graphs() -> None:
    objective = build()
    for batch in (2, 3, 4, 7, 9):
        parts = objective(make_pictures(batch), StepContext())
        parts["loss"].backward()
        assert 0 <= float(parts["matched"]) <= 1
    with pytest.raises(RequestError, match="makes no graph"):
        objective(make_pictures(1), StepContext())


def test_blank_pictures__stay_finite() -> None:
    objective = build()
    views = make_pictures(8)
    views.data["image"] = torch.zeros_like(views["image"])
    objective(views, StepContext())["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters() if p.grad is not None)


def test_local_modes() -> None:
    views = make_pictures(8)
    del views.data["image_map"]
    with pytest.raises(RequestError, match="set local_mode: feature"):
        build()(views, StepContext())
    for mode in ("feature", "none"):
        assert torch.isfinite(build(local_mode=mode)(views, StepContext())["loss"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 2.0}, "alpha 0 to 1"),
        ({"local_mode": "place"}, "accepted: both, feature, none"),
        ({"view_specs": {}}, "set count: 2"),
    ],
)
def test_bad_arguments__say_what_is_accepted(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build(**changes)
