"""Dense anatomical embedding: every point of the body gets a vector that finds the same point in another crop, and in another patient.

Two overlapping crops of one volume are embedded at two scales. A seed point of the first crop must be closer to its own place in the
second crop than to the hardest other places of both. Where a point lies is known exactly: each view carries its map to millimetres.

Reference:
    Yan et al. 2022 (TMI), "SAM: self-supervised learning of pixel-wise anatomical embeddings in radiological images", eq. 1 and 2;
    Bai et al. 2023 (arXiv 2311.15111), UAE. Radii are in mm, and a seed whose counterpart lies beyond the second crop is never drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medssl.errors import RequestError
from medssl.layers.dense_embedding import DenseEmbedding
from medssl.layers.tokens import flatten_tokens, unflatten_tokens
from medssl.objectives._unused import freeze_unused
from medssl.types import Part, StepContext, Views, ViewSpec

LEVELS = ("fine", "coarse")


@dataclass(frozen=True)
class Lattice:
    """Where the cells of a map lie in a view.

    Args:
        grid: Cells along X, Y, Z.
        stride: Voxels per cell and axis.
        anchor: Voxel index of the centre of cell 0, along each axis.
    """

    grid: tuple[int, ...]
    stride: int
    anchor: float

    def voxels(self, device: torch.device | str) -> Tensor:
        """Return the voxel indices of the centres, (N, 3) float64, in token order."""
        axes = [torch.arange(n, dtype=torch.float64, device=device) * self.stride + self.anchor for n in self.grid]
        return flatten_tokens(torch.stack(torch.meshgrid(*axes, indexing="ij"))[None])[0]

    def places(self, view: Tensor) -> Tensor:
        """Return the centres in mm, (N, 3) float64.

        Args:
            view: (3, 4) map of the view, voxel index to mm.
        """
        return self.voxels(view.device) @ view[:, :3].T.double() + view[:, 3].double()

    def nearest(self, points: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cell nearest to each point and its distance; exact, because the axes of a view stand at right angles.

        Args:
            points: (N, 3) mm.
            view: (3, 4) map of the view.

        Returns:
            (N,) int64 numbers of cells in token order, and (N,) mm, infinite for points beyond the outermost cells by more than half a
            cell.
        """
        linear, first = view[:, :3].double(), view[:, 3].double()
        cell = (((points.double() - first) @ torch.linalg.inv(linear).T - self.anchor) / self.stride).round().long()
        last = torch.tensor(self.grid, device=view.device) - 1
        inside = ((cell >= 0) & (cell <= last)).all(dim=1)
        cell = cell.clamp_min(0).minimum(last)
        count = int(torch.tensor(self.grid).prod())
        numbers = unflatten_tokens(torch.arange(count, device=view.device).reshape(1, count, 1), self.grid)[0, 0]
        x, y, z = cell.unbind(dim=1)
        centre = (cell.double() * self.stride + self.anchor) @ linear.T + first
        distance = (centre - points).norm(dim=1).masked_fill(~inside, torch.inf)
        return numbers[x, y, z], distance

    def pick(self, voxels: Tensor) -> Tensor:
        """Return the values of the voxels at the centres.

        Args:
            voxels: (*size).

        Returns:
            (N,) in token order.
        """
        first, step = int(self.anchor), self.stride
        return flatten_tokens(voxels[None, None, first::step, first::step, first::step])[0, :, 0]


def choose(uniform: Tensor, eligible: Tensor) -> Tensor:
    """Return one eligible number for each uniform number in [0, 1), with replacement; anything where none is eligible.

    Args:
        uniform: (P,).
        eligible: (N,) bool.

    Returns:
        (P,) int64.
    """
    order = torch.argsort(eligible.to(torch.uint8), descending=True, stable=True)
    count = eligible.sum()
    return order[(uniform.double() * count).long().clamp_max(count.clamp_min(1) - 1)]


def contrast(
    query: Tensor, target: Tensor, keys: Tensor, allowed: Tensor, chance: Tensor, *, hard: int, temperature: float
) -> Tensor:
    """Return the loss of each query: its target against the hardest allowed keys and some drawn by chance.

    Args:
        query: (P, E), unit length.
        target: (P, E), unit length.
        keys: (K, E), unit length.
        allowed: (P, K) bool, True = may be a negative.
        chance: (Q,) int64, keys drawn by chance, used where allowed.
        hard: How many of the hardest keys to use.
        temperature: t.

    Returns:
        (P,) -log(exp(q.p/t) / (exp(q.p/t) + sum over negatives of exp(q.k/t))).
    """
    with torch.no_grad():
        similar = (query @ keys.T).masked_fill(~allowed, -torch.inf)
        hardest = similar.topk(min(hard, keys.shape[0]), dim=1).indices
    positive = (query * target).sum(dim=1, keepdim=True)
    near = (keys[hardest] * query[:, None]).sum(dim=2).masked_fill(~allowed.gather(1, hardest), -torch.inf)
    far = (query @ keys[chance].T).masked_fill(~allowed[:, chance], -torch.inf)
    logits = torch.cat([positive, near, far], dim=1) / temperature
    return logits.logsumexp(dim=1) - logits[:, 0]


class AnatomicalEmbedding(nn.Module):
    """Dense contrast between two crops of one volume, at a fine and at a coarse scale.

    Args:
        encoder: Has `forward_features` with a `pyramid`, and says in `pyramid_centres` where its cells are centred.
        image_size: Size (X, Y, Z) of the views in voxels.
        spacing_mm: Their voxel size; the matcher works at this spacing for ever.
        view: Key of the pair of views; `<view>_map`, `_body`, `_seeds` and `_negatives` come with it (`views.points`).
        dim: Channels of both maps.
        fine_stride: Stride of the fine map in voxels.
        temperature: t.
        hard: Hardest negatives of a seed, fine and coarse.
        positive_mm: A seed counts when the nearest cell of the other view is closer than this, fine and coarse; None is half a cell.
        ignore_mm: Cells of both views closer than this to a seed are no negatives; None is 3 cells, fine, and 1.5 cells, coarse.
    """

    needs = ("pyramid_centres",)
    pairs = ("same_volume",)
    points = True

    def __init__(
        self,
        encoder: Any,
        *,
        image_size: tuple[int, ...],
        spacing_mm: Sequence[float] | None,
        view: str = "volume",
        dim: int = 64,
        fine_stride: int = 2,
        temperature: float = 0.5,
        hard: Sequence[int] = (500, 200),
        positive_mm: Sequence[float] | None = None,
        ignore_mm: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if spacing_mm is None:
            raise RequestError(
                "views.spacing_mm: required by objective anatomical_embedding: a matcher works at one spacing; for instance spacing_mm: 2"
            )
        if temperature <= 0:
            raise RequestError(f"objective.temperature is {temperature}; accepted: a number above 0")
        encoder.check_size(image_size)
        self.encoder = encoder
        self.view = view
        spacing = [float(s) for s in spacing_mm]
        self.view_specs = {view: ViewSpec("volume", tuple(image_size), tuple(spacing), 2)}
        channels, strides = pyramid_shape(encoder, image_size)
        freeze_unused(encoder, image_size, lambda output: output.pyramid)
        self.head = DenseEmbedding(channels, strides, fine_stride=fine_stride, dim=dim)
        self.temperature = temperature
        self.hard = dict(zip(LEVELS, two("hard", hard)))
        self.lattices = {
            level: lattice(image_size, stride, encoder.pyramid_centres) for level, stride in zip(LEVELS, (fine_stride, strides[-1]))
        }
        cells = [stride * max(spacing) for stride in (fine_stride, strides[-1])]
        given = two("positive_mm", positive_mm) if positive_mm is not None else [cells[0] / 2, cells[1] / 2]
        spared = two("ignore_mm", ignore_mm) if ignore_mm is not None else [3 * cells[0], 1.5 * cells[1]]
        self.positive_mm, self.ignore_mm = dict(zip(LEVELS, given)), dict(zip(LEVELS, spared))
        for level in LEVELS:
            if not 0 < self.positive_mm[level] <= self.ignore_mm[level]:
                raise RequestError(
                    f"objective: {level} positive_mm is {self.positive_mm[level]:g} and ignore_mm {self.ignore_mm[level]:g}; "
                    "accepted: 0 < positive_mm <= ignore_mm"
                )

    def _eligible(self, views: Views, b: int, level: str) -> tuple[Tensor, Tensor]:
        """Return which cells of the first view may be seeds, (N,) bool, and the cell of the second view nearest to each, (N,)."""
        cells, maps = self.lattices[level], views[f"{self.view}_map"][b]
        partner, distance = cells.nearest(cells.places(maps[0]), maps[1])
        inside = cells.pick(views[f"{self.view}_body"][b, 0])
        return inside & (distance < self.positive_mm[level]), partner

    def denominators(self, views: Views) -> dict[str, Tensor]:
        """Return the number of seeds of a micro-batch at both levels."""
        self._check(views)
        drawn = views[f"{self.view}_seeds"].shape[-1]
        usable = {
            level: torch.stack([self._eligible(views, b, level)[0].any() for b in range(views.batch_size)]) for level in LEVELS
        }
        return {f"{level}_seeds": usable[level].sum().float() * drawn for level in LEVELS}

    def forward(self, views: Views, ctx: StepContext) -> dict[str, Tensor]:
        """Return `loss` = `fine` + `coarse`, and `fine_error_mm`, `coarse_error_mm`: how far seeds are found from where they belong."""
        self._check(views)
        images = views[self.view]
        maps = self.head(self.encoder.forward_features(images.flatten(0, 1)).pyramid)
        parts: dict[str, Tensor] = {}
        with torch.autocast(images.device.type, enabled=False):
            for level, embedding in zip(LEVELS, maps):
                tokens = flatten_tokens(embedding if embedding.dtype == torch.float64 else embedding.float())
                done = [self._level(views, b, level, tokens[2 * b], tokens[2 * b + 1]) for b in range(views.batch_size)]
                total, count, error = (torch.stack(column).sum() for column in zip(*done))
                parts[level] = ctx.mean(total, f"{level}_seeds", count)
                parts[f"{level}_error_mm"] = error / count.clamp_min(1)
        return {"loss": parts["fine"] + parts["coarse"], **parts}

    def _level(self, views: Views, b: int, level: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum of losses, the number of seeds and the sum of retrieval errors of one sample."""
        cells, maps = self.lattices[level], views[f"{self.view}_map"][b]
        eligible, partner = self._eligible(views, b, level)
        seeds = choose(views[f"{self.view}_seeds"][b, 0], eligible)
        usable = eligible.any().to(first.dtype)
        places = [cells.places(view) for view in maps]
        both = torch.cat(places).to(first.dtype)
        valid = torch.cat([cells.pick(view) for view in views.meta.valid[self.view][b]])
        at = places[0][seeds].to(first.dtype)
        allowed = (torch.cdist(at, both) > self.ignore_mm[level]) & valid
        keys = torch.cat([first, second])
        chance = (views[f"{self.view}_negatives"][b, 0].double() * len(keys)).long()
        query = first[seeds]
        losses = contrast(query, second[partner[seeds]], keys, allowed, chance, hard=self.hard[level], temperature=self.temperature)
        with torch.no_grad():
            found = places[1][(query @ second.T).argmax(dim=1)].to(at.dtype)
            error = (found - at).norm(dim=1).sum() * usable
        return losses.sum() * usable, usable * len(seeds), error

    def _check(self, views: Views) -> None:
        if f"{self.view}_map" not in views or views[self.view].shape[1] != 2:
            raise RequestError(
                f"source {views.meta.source} brings {', '.join(sorted(views.data))}; objective anatomical_embedding needs two views with "
                "points: set views.kind: pair, views.points: {} and sampler.pairs: same_volume"
            )
        partner = views.data.get(f"{self.view}_partner")
        if partner is not None and (partner.cpu() != views.meta.ids.cpu()).any():
            raise RequestError(
                f"source {views.meta.source} pairs different volumes, whose points have no known counterparts; set sampler.pairs: same_volume "
                "for objective anatomical_embedding"
            )

    def exported(self) -> dict[str, Part]:
        """The encoder, and the two maps made of its pyramid as a part of its own, `embedding`."""
        encoder = self.encoder.part("encoder")
        facts = {
            "dim": self.head.dim,
            "fine_stride": self.head.fine_stride,
            "coarse_stride": self.head.coarse_stride,
            "centres": self.encoder.pyramid_centres,
        }
        return {"encoder": encoder, "embedding": Part(self.head, {**encoder.manifest, "embedding": facts}, prefix="")}


def lattice(size: Sequence[int], stride: int, centres: str) -> Lattice:
    """Return where the cells of a map lie, for an encoder whose cells are centred on the `first` voxel or in the `middle`."""
    return Lattice(tuple(n // stride for n in size), stride, 0.0 if centres == "first" else (stride - 1) / 2)


def pyramid_shape(encoder: Any, size: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return channels and strides of an encoder's pyramid.

    Raises:
        RequestError: A level does not divide the image evenly.
    """
    device = next(encoder.parameters()).device
    with torch.no_grad():
        pyramid = encoder.forward_features(torch.zeros(1, encoder.in_channels, *size, device=device)).pyramid
    strides = [{n // m for n, m in zip(size, level.shape[2:])} for level in pyramid]
    if not pyramid or any(len(found) > 1 for found in strides):
        raise RequestError(
            f"encoder {encoder.name}: its pyramid has the sizes {[tuple(level.shape[2:]) for level in pyramid]} of an image of "
            f"{tuple(size)}; one stride for all axes is needed; choose sizes that are multiples of {tuple(encoder.patch_size)}"
        )
    return [level.shape[1] for level in pyramid], [found.pop() for found in strides]


def two(name: str, value: Sequence[Any]) -> list[Any]:
    """Return two values, fine and coarse.

    Raises:
        RequestError: There are not two.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise RequestError(f"objective.{name}: found {value!r}; accepted is two numbers, [fine, coarse]")
    return list(value)
