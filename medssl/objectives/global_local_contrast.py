"""Global and local contrast with the place of a slice in its volume as the cue.

Global: slices at the same relative position of different volumes are alike, slices of other parts differ; trains the encoder. Local:
within a feature map of a small decoder, different places differ, and the same place agrees under a change of intensities.

Contrast sees the slices of one micro-batch of one process: negatives are not gathered. Two processes equal one that takes the batch in two
micro-steps, not one that sees it whole; choose `train.micro_batch` so that each holds all partitions several times.

Reference:
    Chaitanya et al. 2020, "Contrastive learning of global and local features for medical image segmentation with limited annotations"
    (arXiv 2006.10511), sections 3.1 and 3.2. We differ: losses are means over pairs (the released code divides sums of ordered pairs by
    batch rows); batches and partitions are explicit masks, for any number of partitions; slices without content are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.errors import RequestError, near
from medssl.objectives._unused import freeze_unused
from medssl.types import EncoderOutput, Part, StepContext, Views, ViewSpec

TERMS = ("global", "local")
NEIGHBOURS = 5
COLLAPSED = 0.95
"""Mean cosine between different regions above which features are as good as constant."""


def partition_of(share: Tensor, partitions: int) -> Tensor:
    """Return which of S equal parts of its volume a slice lies in.

    Args:
        share: How far along the volume, 0 (first slice) to 1 (last); NaN belongs to no volume. A share on a border, up to the rounding
            of float32, belongs to the part behind it, as in `sampling.planes.partition_planes`.
        partitions: S.

    Returns:
        int64, 0 to S - 1; -1 for NaN.
    """
    part = (share.nan_to_num(0.0) * partitions + 1e-5).long().clamp(0, partitions - 1)
    return torch.where(share.isnan(), -1, part)


def contrast_pairs(
    slices: Tensor, volumes: Tensor, parts: Tensor, views: Tensor, variant: str, within: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return which rows are positives and negatives of which.

    Args:
        slices: (M,) which slice a row is a view of.
        volumes: (M,) which volume it comes from.
        parts: (M,) which partition it lies in; with `within`, its place.
        views: (M,) which view it is.
        variant: `random`: views of one slice against everything else (SimCLR, the paper's G^R). `part_negatives`: the same positives,
            negatives from other partitions only (G^D-). `part`: also the same view of slices of other volumes in the same partition
            (G^D).
        within: Take places that are nearer to each other than this for one partition.

    Returns:
        positives and negatives, (M, M) bool; row a lists the positives and negatives of anchor a.

    Reference:
        Zeng et al. 2021, "Positional contrastive learning for volumetric medical image segmentation", for `within`.
    """

    def same(x: Tensor) -> Tensor:
        return x[:, None] == x[None, :]

    positives = same(slices) & ~torch.eye(len(slices), dtype=torch.bool, device=slices.device)
    if variant == "random":
        return positives, ~same(slices)
    together = same(parts) if within is None else (parts[:, None] - parts[None, :]).abs() < within
    if variant == "part":
        positives = positives & ~same(views) | together & ~same(volumes) & same(views)
    return positives, ~together


def pair_loss(similarity: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Return the mean over positive pairs of -log( e^s(a,b) / ( e^s(a,b) + sum over negatives n of a of e^s(a,n) ) ).

    Args:
        similarity: (..., M, R) cosines over temperature.
        positives: (..., M, R) bool.
        negatives: (..., M, R) bool.
    """
    against = similarity.masked_fill(~negatives, -torch.inf).logsumexp(dim=-1, keepdim=True)
    losses = torch.logaddexp(similarity, against) - similarity
    return losses.masked_fill(~positives, 0.0).sum() / positives.sum().clamp_min(1)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines between (..., M, D) and (..., R, D) as (..., M, R), in float32 or better."""
    unit = [functional.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-6) for x in (a, b)]
    return unit[0] @ unit[1].transpose(-1, -2)


def region_centres(height: int, width: int) -> Tensor:
    """Return the 13 region centres (13, 2) of a map: corners, middles of edges, centre, and the four quarter points.

    Raises:
        RequestError: The map is so small that 3 x 3 regions overlap.
    """

    def at(share: float, size: int) -> int:
        return min(max(round(share * (size - 1)), 1), size - 2)

    grid = [(at(i / 2, height), at(j / 2, width)) for i in range(3) for j in range(3)]
    centres = torch.tensor(grid + [(at(i, height), at(j, width)) for i in (0.25, 0.75) for j in (0.25, 0.75)])
    apart = (centres[:, None] - centres[None]).abs().amax(dim=-1) + 3 * torch.eye(len(centres), dtype=torch.int64)
    if int(apart.min()) < 3:
        raise RequestError(
            f"a feature map of {height} x {width} cells is too small for 13 regions of 3 x 3; use larger views or more decoder_blocks "
            "(15 x 15 cells are enough)"
        )
    return centres


def neighbours(centres: Tensor) -> Tensor:
    """Return the 5 nearest other regions of each, (13, 5), ties by number."""
    distance = (centres[:, None] - centres[None]).square().sum(dim=-1).double()
    distance.fill_diagonal_(torch.inf)
    return distance.argsort(dim=1, stable=True)[:, :NEIGHBOURS]


def local_loss(first: Tensor, second: Tensor, near_by: Tensor, temperature: float = 0.1) -> Tensor:
    """Contrast regions of two maps of the same picture: same place in the other map against neighbours in both maps.

    Args:
        first: (B, A, D) region embeddings of one map.
        second: (B, A, D) of the other.
        near_by: (A, 5) negatives of each region.
        temperature: Of the cosines.

    Returns:
        Mean over pictures, regions and both directions.
    """
    regions = len(near_by)
    eye = torch.eye(regions, dtype=torch.bool, device=first.device)
    near_mask = torch.zeros_like(eye).scatter_(1, near_by.to(first.device), True)
    positives = torch.cat([torch.zeros_like(eye), eye], dim=1)  # own map, other map
    negatives = torch.cat([near_mask, near_mask], dim=1)
    losses = []
    for own, other in ((first, second), (second, first)):
        similarity = cosines(own, torch.cat([own, other], dim=1)) / temperature  # (B, A, 2 A)
        shape = similarity.shape
        losses.append(pair_loss(similarity, positives.expand(shape), negatives.expand(shape)))
    return torch.stack(losses).mean()


def off_region_cosine(regions: Tensor) -> Tensor:
    """Return the mean cosine between different regions of one map, (B, A, D): near 1 when features are constant."""
    count = regions.shape[1]
    similarity = cosines(regions, regions)
    total = similarity.sum(dim=(1, 2)) - similarity.diagonal(dim1=1, dim2=2).sum(dim=1)
    return total.mean() / (count * (count - 1))


class _UpBlock(nn.Module):
    """Nearest x2 upsampling, 2 x 2 convolution, skip, two 3 x 3 convolutions with batch norm."""

    def __init__(self, below: int, skip: int, width: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(below, width, 2)
        layers: list[nn.Module] = []
        for channels in (width + skip, width):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = functional.interpolate(x, size=skip.shape[2:], mode="nearest")
        x = self.up(functional.pad(x, (0, 1, 0, 1)))
        return self.convolutions(torch.cat([x, skip], dim=1))  # type: ignore[no-any-return]


class GlobalLocalContrast(nn.Module):
    """Contrast of slices by their partition, and of regions within decoder maps.

    The usual schedule is two stages: `loss_weights: {local: 0}`, then `{global: 0}` with `train: ["decoder.*", "region*"]`. An encoder
    without a trained parameter runs in evaluation mode, so that its batch norms stay as they are.

    Args:
        encoder: `image2d` or another encoder whose `forward_features` gives tokens and a pyramid of maps (B, C, H, W).
        view_specs: Views of slices by key, two or more of each; `<key>_share` says where in its volume a slice lies.
        weights: Terms (`global`, `local`) and their weights; a term that is left out is not built.
        local_view: Key of the views for the local term, which differ in intensities alone; None takes those of the global term.
        variant: See `contrast_pairs`.
        partitions: S.
        within: Instead of partitions, slices nearer to each other than this are alike and all others differ; 0.1 to 0.35 of a volume.
        position: What `within` is in: `fraction` of the volume, or `mm` from its first slice (`<key>_depth`; clips: ms), where volumes
            begin at one place of the body but do not reach equally far. Partitions are fractions.
        temperature: Of the cosines.
        dim: Width of both embeddings.
        hidden: Hidden width of the global head.
        decoder_blocks: Decoder blocks under the local term (l).
        decoder_width: Channels of each decoder block.
    """

    needs = ("takes_images",)
    smallest_batch = 2

    def __init__(
        self,
        encoder: Any,
        *,
        view_specs: Mapping[str, ViewSpec],
        weights: Mapping[str, float] | None = None,
        local_view: str | None = None,
        variant: Literal["random", "part_negatives", "part"] = "part",
        partitions: int = 4,
        within: float | None = None,
        position: Literal["fraction", "mm"] = "fraction",
        temperature: float = 0.1,
        dim: int = 128,
        hidden: int = 1024,
        decoder_blocks: int = 3,
        decoder_width: int = 64,
    ) -> None:
        super().__init__()
        self.view_specs = {key: spec for key, spec in view_specs.items() if not key.endswith("_local")}
        self.weights = {term: float(weight) for term, weight in (weights or dict.fromkeys(TERMS, 1.0)).items() if weight}
        self.local_view = local_view
        _check(self.view_specs, self.weights, local_view, variant, partitions)
        _check_places(within, position, variant)
        self.encoder = encoder
        self.variant, self.partitions, self.temperature = variant, partitions, temperature
        self.within, self.position = within, position
        if "global" in self.weights:
            cells, _ = self._look(next(key for key in self.view_specs if key != local_view))
            self.head = nn.Sequential(
                nn.Flatten(), nn.Linear(cells, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, dim, bias=False)
            )
        if "local" in self.weights:
            _, maps = self._look(local_view or next(iter(self.view_specs)))
            self._build_decoder(maps, decoder_blocks, decoder_width, dim)
        freeze_unused(encoder, next(iter(self.view_specs.values())).size, self._used)

    def check_places(self, sources: Mapping[str, tuple[str, int, int]]) -> list[str]:
        """Look at what belongs to no volume and so has no place in one: the global term leaves it out, but for `variant: random`.

        Args:
            sources: Name -> key of its views, items that are single pictures, items in all.

        Returns:
            A sentence for each source that holds such pictures.

        Raises:
            RequestError: A source would train nothing, or no source trains the global term.
        """
        if "global" not in self.weights or self.variant == "random":
            return []
        seen = {name: counts for name, (key, *counts) in sources.items() if key != self.local_view}
        instead = "take variant: random, which needs no place"
        alone = [name for name, (pictures, items) in seen.items() if pictures == items]
        if alone and ("local" not in self.weights or self.local_view is not None):
            raise RequestError(
                f"source {alone[0]}: its items are all pictures that belong to no volume or clip; variant {self.variant} compares slices by "
                f"their place in one, so this source would train nothing; leave the source out, or {instead}"
            )
        if alone and len(alone) == len(seen):
            raise RequestError(
                f"all items of {', '.join(alone)} are pictures that belong to no volume or clip; variant {self.variant} compares slices by "
                f"their place in one, so the global term would train nothing; set weights: {{local: 1}}, or {instead}"
            )
        return [
            f"source {name}: {pictures} of {items} items are pictures that belong to no volume or clip; the global term leaves them out"
            for name, (pictures, items) in seen.items()
            if pictures
        ]

    def _look(self, key: str) -> tuple[int, list[tuple[int, int, int]]]:
        """Return the number of token channels in all, and (channels, height, width) of the maps at different strides."""
        training = self.encoder.training
        blank = torch.zeros(1, self.encoder.in_channels, *self.view_specs[key].size, device=next(self.encoder.parameters()).device)
        with torch.no_grad():
            output = self.encoder.eval().forward_features(blank)
        self.encoder.train(training)
        maps = [(int(level.shape[1]), int(level.shape[2]), int(level.shape[3])) for level in output.pyramid]
        return output.tokens[0].numel(), maps

    def _used(self, output: EncoderOutput) -> list[Tensor]:
        """Return the outputs of the encoder that the terms look at."""
        maps = [output.pyramid[level] for level in self.levels] if "local" in self.weights else []
        return maps + ([output.tokens] if "global" in self.weights else [])

    def _build_decoder(self, maps: list[tuple[int, int, int]], blocks: int, width: int, dim: int) -> None:
        self.levels = _levels(maps)
        if not 1 <= blocks < len(self.levels):
            raise RequestError(
                f"decoder_blocks is {blocks}; the encoder has maps at {len(self.levels)} strides, so 1 to {len(self.levels) - 1} blocks "
                "fit; choose one of them, or leave the local term out"
            )
        self.levels = self.levels[-blocks - 1 :]
        below = [maps[self.levels[-1]][0]] + [width] * blocks
        skips = [maps[level][0] for level in reversed(self.levels[:-1])]
        self.decoder = nn.ModuleList(_UpBlock(low, skip, width) for low, skip in zip(below, skips))
        self.regions = nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1)
        )
        self.region_head = nn.Linear(9 * width, dim)
        centres = region_centres(*maps[self.levels[0]][1:])
        self.centres: Tensor
        self.near_by: Tensor
        self.register_buffer("centres", centres, persistent=False)
        self.register_buffer("near_by", neighbours(centres), persistent=False)

    def train(self, mode: bool = True) -> GlobalLocalContrast:
        """Set training mode; an encoder without a trained parameter stays in evaluation mode."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.encoder.parameters()):
            self.encoder.eval()
        return self

    def decode(self, x: Tensor) -> Tensor:
        """Return the decoder map (B, width, H, W) of images (B, C, H, W)."""
        pyramid = self.encoder.forward_features(x).pyramid
        out = pyramid[self.levels[-1]]
        for block, level in zip(self.decoder, reversed(self.levels[:-1])):
            out = block(out, pyramid[level])
        return out  # type: ignore[no-any-return]

    def embed_regions(self, maps: Tensor) -> Tensor:
        """Return the embeddings of the 13 regions (B, 13, dim) of decoder maps (B, width, H, W)."""
        around = torch.arange(-1, 2, device=maps.device)
        rows = (self.centres[:, 0, None] + around)[:, :, None]  # (13, 3, 1)
        columns = (self.centres[:, 1, None] + around)[:, None, :]
        cells = self.regions(maps)[:, :, rows, columns]  # (B, width, 13, 3, 3)
        return self.region_head(cells.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _key(self, views: Views) -> str:
        found = [key for key in self.view_specs if key in views]
        if len(found) != 1:
            raise RequestError(
                f"source {views.meta.source} brings the views {', '.join(sorted(views.data))}; accepted is exactly one of "
                f"{', '.join(self.view_specs)}; name the views of the sources so"
            )
        return found[0]

    def forward(self, views: Views, ctx: StepContext) -> dict[str, Tensor]:
        """Return `loss`, the weighted sum of the terms this step has, `loss_global`, `loss_local`, and two monitors.

        `negatives` is the mean number of negatives of an anchor, `off_region_cosine` nears 1 when decoder maps become constant.
        """
        unknown = [name for name in ctx.loss_weights if name not in self.weights]
        if unknown:
            raise RequestError(
                f"loss_weights: no term {unknown[0]} here{near(unknown[0], self.weights)}; built: {', '.join(self.weights)}"
            )
        key = self._key(views)
        parts: dict[str, Tensor] = {}
        if "global" in self.weights and key != self.local_view:
            parts |= self._global(views, key)
        if "local" in self.weights and key == (self.local_view or key):
            parts |= self._local(views, key)
        losses = [
            ctx.loss_weights.get(t, weight) * parts[f"loss_{t}"] for t, weight in self.weights.items() if f"loss_{t}" in parts
        ]
        if not losses:
            raise RequestError(f"source {views.meta.source} brings {key}, which no term uses; leave the source out")
        return {"loss": torch.stack(losses).sum(), **parts}

    def _kept(self, views: Views, key: str) -> Tensor:
        """Return which slices have content in every view, (B,)."""
        x = views[key].flatten(2)
        return (views.meta.valid[key].flatten(2).any(dim=-1) & (x.amax(dim=-1) > x.amin(dim=-1))).all(dim=1)

    def _global(self, views: Views, key: str) -> dict[str, Tensor]:
        kept = self._kept(views, key)
        share = views[f"{key}_share"][:, 0] if f"{key}_share" in views else None
        if share is None and self.variant != "random":
            raise RequestError(f"views {key} come without {key}_share, the place of a slice in its volume; set variant: random")
        parts = torch.zeros_like(kept, dtype=torch.int64) if share is None else partition_of(share, self.partitions)
        if self.variant != "random":
            kept = kept & (parts >= 0)  # a picture that belongs to no volume has no partition
        if self.within is not None and share is not None:
            parts = share if self.position == "fraction" else views[f"{key}_depth"][:, 0]
        x = views[key][kept]
        count, number = x.shape[1], len(x)
        # rows: slice by slice, view by view
        z = (
            self.head(self.encoder.forward_features(views[key].flatten(0, 1)).tokens)
            .reshape(len(kept), count, -1)[kept]
            .flatten(0, 1)
        )
        slices = torch.arange(number, device=x.device).repeat_interleave(count)
        volumes = views.meta.ids.to(x.device)[kept].repeat_interleave(count)
        view = torch.arange(count, device=x.device).repeat(number)
        positives, negatives = contrast_pairs(
            slices, volumes, parts[kept].repeat_interleave(count), view, self.variant, self.within
        )
        with torch.autocast(x.device.type, enabled=False):
            loss = pair_loss(cosines(z, z) / self.temperature, positives, negatives)
        return {"loss_global": loss, "negatives": negatives.sum(dim=1).float().sum() / max(len(z), 1)}

    def _local(self, views: Views, key: str) -> dict[str, Tensor]:
        place = views.data.get(f"{key}_map")
        if place is not None and not torch.equal(place[:, 0], place[:, 1]):
            raise RequestError(
                f"the local term compares the same place in two views, but views {key} differ in geometry; give them area: [1, 1], no "
                "flip and no rotation, or make a source with such views and name them in local_view"
            )
        kept = self._kept(views, key)
        maps = self.decode(views[key][:, :2].flatten(0, 1))
        rows = self.embed_regions(maps)
        rows = rows.reshape(len(kept), 2, *rows.shape[1:])[kept]
        with torch.autocast(rows.device.type, enabled=False):
            loss = local_loss(rows[:, 0], rows[:, 1], self.near_by, self.temperature)
        apart = off_region_cosine(rows[:, 0].detach()) if len(rows) else torch.zeros((), device=rows.device)
        return {"loss_local": loss, "off_region_cosine": apart}

    def exported(self) -> dict[str, Part]:
        """The encoder; heads and decoder stay behind."""
        return {"encoder": self.encoder.part("encoder")}


def _levels(maps: list[tuple[int, int, int]]) -> list[int]:
    """Return the index of the last map at each size, fine to coarse."""
    last = {size[1:]: number for number, size in enumerate(maps)}
    return sorted(last.values())


def _check(
    specs: Mapping[str, ViewSpec], weights: Mapping[str, float], local_view: str | None, variant: str, partitions: int
) -> None:
    unknown = [term for term in weights if term not in TERMS]
    if unknown or not weights:
        name = unknown[0] if unknown else "nothing"
        raise RequestError(f"weights names {name}{near(name, TERMS)}; accepted: {', '.join(TERMS)} with weights above 0")
    if not specs or any(spec.kind != "image" or spec.count < 2 for spec in specs.values()):
        raise RequestError(
            "global_local_contrast compares views of slices; set count: 2 or more and no slices in the views of every source"
        )
    if local_view is not None and (local_view not in specs or ("global" in weights and len(specs) < 2)):
        raise RequestError(
            f'local_view is "{local_view}"; views: {", ".join(specs)}; name one of them, and leave another for the global term'
        )
    if variant not in ("random", "part_negatives", "part"):
        raise RequestError(
            f'variant is "{variant}"{near(variant, ("random", "part_negatives", "part"))}; accepted: random, part_negatives, part'
        )
    if partitions < 2:
        raise RequestError(f"partitions is {partitions}; accepted: 2 or more")


def _check_places(within: float | None, position: str, variant: str) -> None:
    if position not in ("fraction", "mm"):
        raise RequestError(f'position is "{position}"{near(position, ("fraction", "mm"))}; accepted: fraction, mm')
    if within is None and position == "mm":
        raise RequestError("position mm has no partitions; say in within how many mm apart slices still count as alike")
    if within is not None and (within <= 0 or variant == "random"):
        raise RequestError(
            f"within is {within} with variant {variant}; accepted: above 0, with part or part_negatives; random compares no places"
        )
