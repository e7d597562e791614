"""LVM-Med: two views of a batch as two graphs, and features that make a graph-matching solver pair each image with itself.

The batch is cut into graphs of N images with edges to the k nearest. Vertex affinities compare images (globally, and cell by cell where
both views show the same place), edge affinities compare differences of images. A solver finds the best matching under Gumbel noise; the
loss is its Hamming distance to the identity. The solver is not differentiable: its gradient is a difference of two matchings (IMLE).

Reference:
    Nguyen et al. 2023, "LVM-Med" (arXiv 2306.11925), section 3; Niepert et al. 2021 (implicit maximum likelihood estimation); Kipf and
    Welling 2017 for the graph convolution; Frank and Wolfe 1956 and Vogelstein et al. 2015 for the solver. We differ: degrees count the
    symmetrised graph with its self-loops (the printed formula leaves them out); Frank-Wolfe with exact line search, rounding and pairwise
    swaps instead of Lagrange decomposition; local similarities compare projected cells and carry the factor 1/2 of the paper's appendix;
    what goes into message passing is added to what comes out; noise of 0.1 instead of 1. The paper starts from ImageNet's weights. From
    none, two convolutions over the neighbours of few images leave nearly equal nodes, the edges of matchings are differences of these, and
    nothing is learnt: docs/results.md, `matching_knn`.

Shape letters: G graphs, N images of a graph, E edges of a graph, P cells of a feature map, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.errors import RequestError
from medssl.objectives._unused import freeze_unused
from medssl.types import Part, StepContext, Views, ViewSpec

EPS = 1e-6
STARTS = 8
"""Matchings from which pairs are swapped."""


def nearest_edges(z: Tensor, k: int) -> Tensor:
    """Return directed edges from every node to its k nearest by cosine.

    Args:
        z: (G, N, D).
        k: Neighbours, at most N - 1.

    Returns:
        (G, E, 2) int64 with E = N k, sorted by the first node.
    """
    groups, nodes = z.shape[:2]
    unit = functional.normalize(z.detach().float(), dim=-1, eps=EPS)
    similarity = unit @ unit.transpose(1, 2)
    similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    ends = similarity.topk(min(k, nodes - 1), dim=-1).indices  # (G, N, k)
    starts = torch.arange(nodes, device=z.device)[None, :, None].expand_as(ends)
    return torch.stack([starts, ends], dim=-1).reshape(groups, -1, 2)


def adjacency(edges: Tensor, nodes: int) -> Tensor:
    """Return the symmetric adjacency (G, N, N) of 0 and 1 of directed edges (G, E, 2)."""
    matrix = torch.zeros(len(edges), nodes, nodes, device=edges.device)
    group = torch.arange(len(edges), device=edges.device)[:, None]
    matrix[group, edges[..., 0], edges[..., 1]] = 1.0
    return torch.maximum(matrix, matrix.transpose(1, 2))


def propagation(edges: Tensor, nodes: int) -> Tensor:
    """Return D^-1/2 (A + I) D^-1/2 with D the row sums of A + I, (G, N, N)."""
    with_self = adjacency(edges, nodes) + torch.eye(nodes, device=edges.device)
    scale = with_self.sum(dim=-1).rsqrt()
    return scale[..., :, None] * with_self * scale[..., None, :]


class MessagePassing(nn.Module):
    """Graph convolutions H_l = ReLU(P H_{l-1} W_l), without ReLU after the last.

    Args:
        dim: Width.
        layers: Number of layers.
        residual: Return H_0 + H_L instead of H_L.
    """

    def __init__(self, dim: int, layers: int = 2, *, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.layers = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(layers))

    def forward(self, z: Tensor, edges: Tensor) -> Tensor:
        """Pass messages along the edges: (G, N, D) and (G, E, 2) to (G, N, D)."""
        mixing = propagation(edges, z.shape[1]).to(z.dtype)
        mixed = z
        for number, layer in enumerate(self.layers):
            mixed = mixing @ layer(functional.relu(mixed) if number else mixed)
        return z + mixed if self.residual else mixed


def cell_positions(matrix: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Return where the cells of a feature map lie in the picture.

    Args:
        matrix: (..., 2, 3): for a point (x, y, 1) of the view, -1 to 1, its row and column in the picture.
        grid: (R, S) cells of the map.

    Returns:
        (..., P, 2) row and column, cells in the order of `flatten_tokens`.
    """
    rows, columns = ((torch.arange(n, device=matrix.device, dtype=matrix.dtype) + 0.5) * (2 / n) - 1 for n in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)], dim=-1).reshape(-1, 3)
    return points @ matrix.transpose(-1, -2)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return |a_p - b_q|^2 for (..., P, D) and (..., Q, D) as (..., P, Q)."""
    product = a @ b.transpose(-1, -2)
    return a.square().sum(dim=-1)[..., :, None] - 2 * product + b.square().sum(dim=-1)[..., None, :]


def matched_similarity(similarity: Tensor, distance: Tensor, top: int) -> Tensor:
    """Match every cell p to the closest cell m(p), keep the `top` closest pairs, and return their mean similarity.

    Args:
        similarity: (..., P, Q) cosines.
        distance: (..., P, Q).
        top: gamma.

    Returns:
        (...).
    """
    closest, match = distance.detach().min(dim=-1)  # (..., P)
    best = closest.topk(min(top, closest.shape[-1]), dim=-1, largest=False).indices
    matched = similarity.gather(-1, match[..., None])[..., 0]
    return matched.gather(-1, best).mean(dim=-1)


def local_affinity(cells: tuple[Tensor, Tensor], positions: tuple[Tensor, Tensor] | None, top: int = 20) -> Tensor:
    """Return c_lo(i, a) + c_lo(a, i) for all pairs of images of a graph.

    c_lo(i, a) is half the mean cosine over pairs matched by place plus half that over pairs matched by features; without positions it is
    the latter alone. Coordinates of different images have nothing in common; the paper compares them all the same.

    Args:
        cells: (G, N, P, D) of either view.
        positions: (G, N, P, 2) of either view, or None.
        top: gamma, pairs kept.

    Returns:
        (G, N, N), row i of the first view, column a of the second.
    """
    first, second = (q.float() for q in cells)
    unit = [functional.normalize(q, dim=-1, eps=EPS) for q in (first, second)]
    similarity = unit[0][:, :, None] @ unit[1][:, None].transpose(-1, -2)  # (G, N, N, P, P)
    with torch.no_grad():
        distances = [squared_distances(first[:, :, None], second[:, None])]
        if positions is not None:
            distances.append(squared_distances(positions[0].float()[:, :, None], positions[1].float()[:, None]))
    there = [matched_similarity(similarity, distance, top) for distance in distances]
    back = [matched_similarity(similarity.transpose(-1, -2), distance.transpose(-1, -2), top) for distance in distances]
    return (torch.stack(there) + torch.stack(back)).mean(dim=0)


def edge_affinity(first: Tensor, second: Tensor, edges: tuple[Tensor, Tensor]) -> Tensor:
    """Return cos(z_i - z_j, z_a - z_b) for all edges (i, j) of one graph and (a, b) of the other.

    Args:
        first: (G, N, D).
        second: (G, N, D).
        edges: (G, E, 2) of either.

    Returns:
        (G, E, E).
    """
    differences = []
    for z, ends in ((first, edges[0]), (second, edges[1])):
        group = torch.arange(len(z), device=z.device)[:, None]
        step = z[group, ends[..., 0]] - z[group, ends[..., 1]]
        differences.append(functional.normalize(step.float(), dim=-1, eps=EPS))
    return differences[0] @ differences[1].transpose(1, 2)


def lawler_matrix(affinity: np.ndarray, edges: tuple[np.ndarray, np.ndarray], nodes: int) -> np.ndarray:
    """Return M (G, N N, N N) with M[(i, a), (j, b)] = c_e(ia, jb), zero where there is no edge.

    Args:
        affinity: (G, E, E).
        edges: (G, E, 2) of either graph.
        nodes: N.
    """
    matrix = np.zeros((len(affinity), nodes * nodes, nodes * nodes))
    first, second = edges
    rows = first[:, :, None, 0] * nodes + second[:, None, :, 0]
    columns = first[:, :, None, 1] * nodes + second[:, None, :, 1]
    matrix[np.arange(len(affinity))[:, None, None], rows, columns] = affinity
    return matrix


def linear_assignment(scores: np.ndarray) -> np.ndarray:
    """Return the best permutation of each graph, (G, N): i is matched to entry i."""
    from scipy.optimize import linear_sum_assignment

    return np.stack([linear_sum_assignment(matrix, maximize=True)[1] for matrix in scores])


def objective_value(scores: np.ndarray, matrix: np.ndarray, matching: np.ndarray) -> np.ndarray:
    """Return the value of matchings of one graph.

    Args:
        scores: (N, N) vertex affinities.
        matrix: (N N, N N), see `lawler_matrix`.
        matching: (..., N).

    Returns:
        (...).
    """
    nodes = len(scores)
    chosen = np.arange(nodes) * nodes + matching
    edges: np.ndarray = matrix[chosen[..., :, None], chosen[..., None, :]].sum(axis=(-1, -2))
    return edges + scores[np.arange(nodes), matching].sum(axis=-1)  # type: ignore[no-any-return]


def solve(scores: np.ndarray, matrix: np.ndarray | None = None, *, iterations: int = 30, swaps: bool = True) -> np.ndarray:
    """Find good matchings: maximise sum c_v v_ia + sum c_e v_ia v_jb over permutations v.

    Frank-Wolfe on doubly stochastic matrices from the centre, with exact line search; the end point is rounded by linear assignment; then
    pairs are swapped while that helps. Without edges the linear assignment is exact.

    Args:
        scores: (G, N, N) vertex affinities.
        matrix: (G, N N, N N), see `lawler_matrix`; None for first order.
        iterations: At most so many steps.
        swaps: Improve by pairwise swaps.

    Returns:
        (G, N) int64.
    """
    if matrix is None:
        return linear_assignment(scores)
    groups, nodes = scores.shape[:2]
    linear = scores.reshape(groups, -1)
    both = matrix + matrix.transpose(0, 2, 1)
    x = np.full_like(linear, 1 / nodes)
    places = np.arange(nodes) * nodes
    corners = [linear_assignment(scores)]
    for _ in range(iterations):
        slope = linear + np.matmul(both, x[..., None])[..., 0]
        corners.append(linear_assignment(slope.reshape(scores.shape)))
        direction = -x
        direction[np.arange(groups)[:, None], places + corners[-1]] += 1
        first = (slope * direction).sum(axis=1)
        second = 0.5 * (direction * np.matmul(both, direction[..., None])[..., 0]).sum(axis=1)
        # f(x + t d) = f + first t + second t^2: concave along d has its top inside, convex at the far end
        length = np.where(second < 0, np.clip(first / np.maximum(-2 * second, 1e-12), 0, 1), (first + second > 0).astype(float))
        length[first <= 1e-9] = 0
        if not length.any():
            break
        x = x + length[:, None] * direction
    corners.append(linear_assignment(x.reshape(scores.shape)))
    tries = np.stack(corners, axis=1)  # (G, steps + 2, N): every corner on the way is a matching for free
    return np.stack([_best(*graph, swaps) for graph in zip(scores, matrix, tries)])


def _best(scores: np.ndarray, matrix: np.ndarray, tries: np.ndarray, swaps: bool) -> np.ndarray:
    """Return the best of some matchings (T, N); with swaps, of what the best few of them become."""
    tries = np.unique(tries, axis=0)
    values = objective_value(scores, matrix, tries)
    if swaps:
        tries = swap_pairs(scores, matrix, tries[np.argsort(-values, kind="stable")[:STARTS]])
        values = objective_value(scores, matrix, tries)
    return tries[int(values.argmax())]  # type: ignore[no-any-return]


def swap_pairs(scores: np.ndarray, matrix: np.ndarray, matchings: np.ndarray) -> np.ndarray:
    """Swap the best pair of each matching as long as that raises its value.

    Args:
        scores: (N, N).
        matrix: (N N, N N).
        matchings: (T, N).

    Returns:
        (T, N): no swap of a pair helps any more.
    """
    count, nodes = matchings.shape
    both = (matrix + matrix.T).reshape(nodes, nodes, nodes, nodes)
    rows, nodes_range = np.arange(count)[:, None], np.arange(nodes)
    matchings = matchings.copy()
    while True:
        # worth[t, i, b] is what i -> p_t(b) brings together with all others where they are
        pull = scores + both[:, :, nodes_range, matchings].sum(axis=3).transpose(2, 0, 1)  # (T, N, N)
        worth = np.take_along_axis(pull, np.repeat(matchings[:, None], nodes, axis=1), axis=2)
        own = np.diagonal(worth, axis1=1, axis2=2)
        mine, other = matchings[:, :, None], matchings[:, None, :]
        i, j = nodes_range[:, None], nodes_range[None, :]
        pair = both[i, mine, j, other] + both[i, other, j, mine]
        gain = worth + worth.transpose(0, 2, 1) - own[:, :, None] - own[:, None, :] + pair
        gain[:, nodes_range, nodes_range] = 0
        best = gain.reshape(count, -1).argmax(axis=1)
        better = np.take_along_axis(gain.reshape(count, -1), best[:, None], axis=1) > 1e-9
        if not better.any():
            return matchings
        ends = np.stack([best // nodes, best % nodes], axis=1)
        swapped = matchings[rows, ends[:, ::-1]]
        matchings[rows, ends] = np.where(better, swapped, matchings[rows, ends])


def identity_is_best(scores: np.ndarray, affinity: np.ndarray, edges: tuple[np.ndarray, np.ndarray], bonus: float) -> np.ndarray:
    """Tell for which graphs the identity surely wins once every match gets `bonus` and every mismatch loses it.

    A node that is matched otherwise loses 2 bonus. It gains at most its best other vertex affinity, and on each of its edges the best
    edge affinity there is (or nothing) in place of the present one.

    Args:
        scores: (G, N, N).
        affinity: (G, E, E).
        edges: (G, E, 2) of either graph.
        bonus: lambda.

    Returns:
        (G,) bool.
    """
    groups = len(scores)
    gain = scores.max(axis=2) - np.diagonal(scores, axis1=1, axis2=2)  # (G, N)
    if affinity.shape[1]:
        same = (edges[0][:, :, None] == edges[1][:, None]).all(axis=-1)  # (G, E, E): an edge and its image under the identity
        present = (affinity * same).sum(axis=2)
        edge_gain = np.maximum(affinity.max(axis=2), 0) - present  # (G, E)
        for end in (0, 1):
            np.add.at(gain, (np.arange(groups)[:, None], edges[0][..., end]), edge_gain)
    return gain.max(axis=1) < 2 * bonus  # type: ignore[no-any-return]


class _Matching(torch.autograd.Function):
    """Hamming distance of the solver's matching to the identity, per graph; backward by perturbation."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, affinity: Tensor, first: Tensor, second: Tensor, noise: float, strength: float, fast: bool
    ) -> tuple[Tensor, Tensor]:
        kind, device = scores.dtype, scores.device
        groups, nodes = scores.shape[:2]
        c_v, c_e = (perturbed(c.detach().double().cpu(), noise).numpy() for c in (scores, affinity))
        edges = (first.cpu().numpy(), second.cpu().numpy())
        found = _solve_edges(c_v, c_e, edges)
        wanted = np.tile(np.arange(nodes), (groups, 1))
        hard = ~identity_is_best(c_v, c_e, edges, strength) if fast else np.ones(groups, dtype=bool)
        if hard.any():
            # c - lambda grad L, grad L = 1 - 2 v*; the edges of the loss are zero
            pushed = c_v[hard] - strength * (1 - 2 * np.eye(nodes))
            wanted[hard] = _solve_edges(pushed, c_e[hard], (edges[0][hard], edges[1][hard]))
        grad_v = (np.eye(nodes)[found] - np.eye(nodes)[wanted]) / strength
        grad_e = (_edge_hits(found, edges) - _edge_hits(wanted, edges)) / strength
        ctx.save_for_backward(*(torch.from_numpy(grad).to(device, kind) for grad in (grad_v, grad_e.astype(np.float64))))
        matching = torch.from_numpy(found).to(device)
        misses = (matching != torch.arange(nodes, device=device)).sum(dim=1)
        ctx.mark_non_differentiable(matching)
        return 2.0 * misses.to(kind), matching

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_v, grad_e = ctx.saved_tensors
        # the matching was perturbed by the gradient of one graph's own loss; how losses are averaged only scales the result
        return grads[0][:, None, None] * grad_v, grads[0][:, None, None] * grad_e, None, None, None, None, None


def _solve_edges(scores: np.ndarray, affinity: np.ndarray, edges: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return solve(scores, lawler_matrix(affinity, edges, scores.shape[1]) if affinity.shape[1] else None)


def _edge_hits(matching: np.ndarray, edges: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return y (G, E, E): 1 where a matching (G, N) takes an edge of the first graph to one of the second."""
    image = np.take_along_axis(matching[:, :, None], edges[0].reshape(len(matching), -1, 1), axis=1).reshape(edges[0].shape)
    hits: np.ndarray = (image[:, :, None] == edges[1][:, None]).all(axis=-1)
    return hits.astype(np.float64)


def perturbed(affinity: Tensor, noise: float) -> Tensor:
    """Add `noise` times Gumbel(0, 1), drawn from the global generator, which the loop seeds for each forward pass."""
    if noise == 0:
        return affinity
    uniform = torch.rand(affinity.shape, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12)
    return affinity - noise * torch.log(-torch.log(uniform))


def matching_loss(
    scores: Tensor,
    affinity: Tensor | None = None,
    edges: tuple[Tensor, Tensor] | None = None,
    *,
    noise: float = 1.0,
    strength: float = 80.0,
    fast: bool = True,
) -> tuple[Tensor, Tensor]:
    """Match the nodes of two graphs and compare with the identity.

    Args:
        scores: (G, N, N) vertex affinities.
        affinity: (G, E, E) edge affinities, None for first order.
        edges: (G, E, 2) of either graph.
        noise: Scale of the Gumbel noise.
        strength: lambda of the gradient: large takes the difference to the identity itself, over lambda.
        fast: Leave the second matching out where it is certain.

    Returns:
        Hamming distances (G,), 0, 4, 6 ... 2 N, with the gradient (v - v_lambda) / lambda; and the matchings (G, N).
    """
    if affinity is None or edges is None:
        none = torch.zeros(len(scores), 0, 2, dtype=torch.int64, device=scores.device)
        affinity, edges = scores.new_zeros(len(scores), 0, 0), (none, none)
    distance, matching = _Matching.apply(scores, affinity, *edges, noise, strength, fast)  # type: ignore[no-untyped-call]
    return distance, matching


class GraphMatching(nn.Module):
    """Second-order graph matching between two views of a batch.

    Graphs are made per process and micro-batch, anew in each step; a remainder smaller than a graph is left out. A batch smaller than
    `nodes` is one graph. So another number of processes or micro-steps makes other graphs: gradients are averaged over processes and
    weights are the same on all, but a run on two is not the run on one. Give each `train.micro_batch` a multiple of `nodes`.

    Args:
        encoder: `image2d`, or another encoder whose `forward_features` gives the cells of a feature map as tokens.
        view_specs: One view of images, twice; `<key>_map` (B, V, 2, 3) says where it lies in the picture. Small crops are not used.
        dim: Width of projector and message passing.
        layers: Graph convolutions.
        nodes: N.
        neighbours: k.
        alpha: Share of the global affinity.
        top: gamma, matched cells kept in the local affinity.
        noise: Scale of the Gumbel noise.
        strength: lambda.
        residual: Add what goes into message passing to what comes out; False with noise 1 is the published form.
        second_order: Use edges.
        local_mode: `both` matches cells by place and by features, `feature` by features alone, `none` leaves the local affinity out.

    Reference:
        Nguyen et al. 2023 (arXiv 2306.11925): dim 128, 2 layers, N 16, k 5, alpha 0.8, lambda 80, noise 1, no residual.
    """

    needs = ("takes_images",)
    smallest_batch = 2

    def __init__(
        self,
        encoder: Any,
        *,
        view_specs: Mapping[str, ViewSpec],
        dim: int = 128,
        layers: int = 2,
        nodes: int = 16,
        neighbours: int = 5,
        alpha: float = 0.8,
        top: int = 20,
        noise: float = 0.1,
        strength: float = 80.0,
        residual: bool = True,
        second_order: bool = True,
        local_mode: Literal["both", "feature", "none"] = "both",
    ) -> None:
        super().__init__()
        self.view_specs = {key: spec for key, spec in view_specs.items() if not key.endswith("_local")}
        if any(spec.kind != "image" or spec.count != 2 for spec in self.view_specs.values()) or not self.view_specs:
            raise RequestError(
                "graph_matching compares two views of images; set count: 2 and no slices in the views of every source"
            )
        if not 0 <= alpha <= 1 or nodes < 2 or neighbours < 1 or strength <= 0 or noise < 0:
            raise RequestError(
                f"graph_matching: alpha {alpha}, nodes {nodes}, neighbours {neighbours}, strength {strength}, noise {noise}; accepted: "
                "alpha 0 to 1, nodes from 2, neighbours from 1, strength above 0, noise from 0"
            )
        if local_mode not in ("both", "feature", "none"):
            raise RequestError(f'local_mode is "{local_mode}"; accepted: both, feature, none')
        self.encoder = encoder
        freeze_unused(encoder, next(iter(self.view_specs.values())).size, lambda output: [output.tokens])
        self.projector = nn.Linear(encoder.embed_dim, dim)
        self.message_passing = MessagePassing(dim, layers, residual=residual)
        self.nodes, self.neighbours, self.alpha, self.top = nodes, neighbours, alpha, top
        self.noise, self.strength, self.second_order, self.local_mode = noise, strength, second_order, local_mode

    def affinities(
        self, cells: tuple[Tensor, Tensor], positions: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """Return vertex affinities (G, N, N), edge affinities (G, E, E) or None, and the edges of both graphs.

        Args:
            cells: (G, N, P, D) projected cells of either view.
            positions: (G, N, P, 2) of either view, or None.
        """
        z = [q.mean(dim=2).float() for q in cells]
        edges = (nearest_edges(z[0], self.neighbours), nearest_edges(z[1], self.neighbours))
        first, second = (self.message_passing(row, ends).float() for row, ends in zip(z, edges))
        unit = [functional.normalize(row, dim=-1, eps=EPS) for row in (first, second)]
        scores = unit[0] @ unit[1].transpose(1, 2)
        if self.local_mode != "none":
            scores = self.alpha * scores + (1 - self.alpha) * local_affinity(cells, positions, self.top)
        return scores, edge_affinity(first, second, edges) if self.second_order else None, edges

    def forward(self, views: Views, ctx: StepContext) -> dict[str, Tensor]:
        """Return `loss`, the mean Hamming distance per graph, and `matched`, the share of images that found themselves."""
        key = next((name for name in self.view_specs if name in views), None)
        if key is None:
            raise RequestError(
                f"source {views.meta.source} brings {', '.join(sorted(views.data))}; accepted: {', '.join(self.view_specs)}"
            )
        x = views[key]
        batch = len(x)
        nodes = min(self.nodes, batch)
        if batch < 2:
            raise RequestError("a micro-batch of one image makes no graph; set train.micro_batch to 16 or more images")
        output = self.encoder.forward_features(x.flatten(0, 1))
        cells = self.projector(output.tokens)
        cells = cells.reshape(batch, 2, *cells.shape[1:])  # (B, V, P, D)
        groups = batch // nodes
        order = torch.randperm(batch)[: groups * nodes].reshape(groups, nodes).to(x.device)
        positions = None
        if self.local_mode == "both":
            if f"{key}_map" not in views:
                raise RequestError(f"views {key} come without {key}_map, their place in the picture; set local_mode: feature")
            place = cell_positions(views[f"{key}_map"], output.grid)[order]  # (G, N, V, P, 2)
            positions = (place[:, :, 0], place[:, :, 1])
        with torch.autocast(x.device.type, enabled=False):
            rows = cells.float()[order]
            scores, affinity, edges = self.affinities((rows[:, :, 0], rows[:, :, 1]), positions)
            distance, matching = matching_loss(scores, affinity, edges, noise=self.noise, strength=self.strength)
        matched = (matching == torch.arange(nodes, device=x.device)).float().mean()
        return {"loss": distance.mean(), "matched": matched}

    def exported(self) -> dict[str, Part]:
        """The encoder; projector, message passing and solver stay behind."""
        return {"encoder": self.encoder.part("encoder")}
