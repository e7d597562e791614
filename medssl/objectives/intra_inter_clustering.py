"""Joint pretraining on images and volumes: slices and volumes are clustered, hidden slice embeddings are predicted.

Three terms over one `SliceVolumeEncoder`:

- L_intra: two views of a slice or a 2D image (and small crops of it) agree on prototypes; the head is an MLP on the slice token.
- L_inter: two views of a volume agree on prototypes; the volume embedding itself is scored, there is no head.
- L_mask: embeddings of hidden slices are predicted from the other slices through the aggregator.

A step brings images or stacks, never both: images train L_intra, stacks train all three. Slice n of both views of a stack must show the
same place, as the views of `PlaneViews` do.

Targets are balanced assignments of the other view (`swav`) or cluster labels from a memory bank (`deepcluster`).

Reference:
    Nguyen et al. 2023, "Joint Self-Supervised Image-Volume Representation Learning with Intra-Inter Contrastive Clustering"
    (arXiv 2212.01893); Caron et al. 2020 (SwAV and its DeepCluster-v2). We differ: the three terms are trained together; L_mask is over
    hidden slices only, with layer-normalised targets that get no gradient (the raw scale would drive the loss); prototypes of
    `deepcluster` are never trained by gradient; before the first clustering, `deepcluster` takes balanced assignments to its random
    prototypes as targets instead of skipping the epoch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.errors import RequestError, TrainingStopped, near
from medssl.layers.planes import slices_of
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
from medssl.layers.sinkhorn import gather_rows, sinkhorn, sum_ranks
from medssl.layers.spherical_kmeans import spherical_kmeans
from medssl.layers.standardise import standardised
from medssl.seeding import counter_rng
from medssl.types import Embed, Part, StepContext, Views, ViewSpec

logger = logging.getLogger(__name__)
TERMS = ("intra", "inter", "mask")


def swap_loss(targets: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
    """Return the cross-entropy of every crop with the assignments of every other target crop, summed over samples.

    Args:
        targets: T tensors (M, K), assignments of the first T crops.
        logits: All crops (M, K), the T target crops first; scores over temperature.

    Returns:
        Scalar: sum over samples of the mean over pairs (target, other crop).

    Reference:
        Caron et al. 2020, equation 2 and section 3.3; with two crops this is -1/2 sum_b [q^t log p^s + q^s log p^t].
    """
    logs = [functional.log_softmax(row, dim=1) for row in logits]
    pairs = [-(q * logs[s]).sum() for t, q in enumerate(targets) for s in range(len(logits)) if s != t]
    return torch.stack(pairs).mean()


def hidden_count(slices: int, ratio: float) -> int:
    """Return how many of n slices are hidden: ceil(ratio n), at least one left; none where there is only one."""
    return min(math.ceil(ratio * slices - 1e-9), slices - 1) if slices > 1 else 0


def hide_slices(valid: Tensor, ids: Sequence[int], ratio: float, *seed: int) -> Tensor:
    """Choose the slices to hide, the same in both views of an item; a pure function of seed and id.

    Args:
        valid: (B, N) bool.
        ids: B ids.
        ratio: Share to hide.
        seed: What the choice depends on besides the id, for instance (seed of the run, step).

    Returns:
        (B, N) bool, True = hidden.
    """
    hidden = torch.zeros(valid.shape, dtype=torch.bool)
    for row, (flags, item) in enumerate(zip(valid.cpu(), ids)):
        places = flags.nonzero()[:, 0]
        order = counter_rng(*seed, item, "hidden slices").permutation(len(places))
        hidden[row, places[order[: hidden_count(len(places), ratio)].tolist()]] = True
    return hidden.to(valid.device)


def masked_loss(prediction: Tensor, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Return the squared error of predicted slice embeddings, mean over channels, summed over hidden slices.

    Args:
        prediction: (..., E).
        tokens: (..., E) slice embeddings; the target is their layer norm, without gradient.
        hidden: (...) bool.
    """
    kind = torch.promote_types(prediction.dtype, torch.float32)
    target = functional.layer_norm(tokens.detach().to(kind), tokens.shape[-1:])
    return (prediction[hidden].to(kind) - target[hidden]).square().mean(dim=-1).sum()


class ClusterHead(nn.Module):
    """Prototypes with what gives their targets, for one term.

    Args:
        dim: E.
        prototypes: K of each head.
        mode: `swav` or `deepcluster`.
        temperature: T of the predictions.
        epsilon: Of Sinkhorn.
        iterations: Of Sinkhorn.
        queue: Earlier embeddings that take part in Sinkhorn, over all processes; 0 for none.
        slots: Slots of the memory bank (`deepcluster`).
        alarm: Passed to `StuckAlarm`.
    """

    def __init__(
        self,
        dim: int,
        prototypes: Sequence[int],
        *,
        mode: Literal["swav", "deepcluster"] = "swav",
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        queue: int = 0,
        slots: int = 0,
        alarm: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.mode, self.temperature, self.epsilon, self.iterations = mode, temperature, epsilon, iterations
        self.prototypes = nn.ModuleList(Prototypes(dim, count, learned=mode == "swav") for count in prototypes)
        self.queue = EmbeddingQueue(queue, dim) if queue else None
        self.bank = MemoryBank(slots, dim, heads=len(prototypes)) if mode == "deepcluster" else None
        self.alarm = StuckAlarm(**(alarm or {}))  # type: ignore[arg-type]
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._losses: list[Tensor] = []
        self._step = -1
        self._counted = False

    @property
    def heads(self) -> list[Prototypes]:
        """The prototypes of every head."""
        return [head for head in self.prototypes if isinstance(head, Prototypes)]

    def labelled(self, slots: Tensor) -> Tensor:
        """Return which samples take part in the loss, (M,) bool: all, but for items that a clustering has not seen yet."""
        if self.bank is None or not self.bank.clustered:
            return torch.ones(len(slots), dtype=torch.bool, device=slots.device)
        return self.bank.labels[0, slots] != UNLABELLED

    def forward(self, crops: Sequence[Tensor], slots: Tensor, *, frozen: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Score crops and compare predictions with targets.

        Args:
            crops: Embeddings (M, E) of unit length; the first two are the targets' crops.
            slots: (M,) int64 slots of the memory bank, in its mode.
            frozen: Give the prototypes a gradient of zero.

        Returns:
            The loss summed over samples and averaged over crops and heads, and monitors.
        """
        labels = self.bank.labels[:, slots] if self.bank is not None and self.bank.clustered else None
        losses, parts = [], {}
        for number, head in enumerate(self.heads):
            scores = [head(z, frozen=frozen) for z in crops]
            logits = [row / self.temperature for row in scores]
            if labels is not None:
                losses.append(torch.stack([_label_loss(row, labels[number]) for row in logits]).mean())
            else:
                targets = [self._assign(head, number_of_view, scores[number_of_view]) for number_of_view in (0, 1)]
                losses.append(swap_loss(targets, logits))
                if number == 0:
                    parts["target_sharpness"] = usage(torch.cat(targets))["sharpness"]
            if number == 0:
                seen = usage(torch.cat([row.detach().softmax(dim=1) for row in logits[:2]]))
                parts |= {"entropy": seen["entropy"], "used": seen["used"]}
        return torch.stack(losses).mean(), parts

    def _assign(self, head: Prototypes, view: int, scores: Tensor) -> Tensor:
        rows = scores.detach()
        if self.queue is not None:
            with torch.no_grad():
                rows = torch.cat([rows, head(self.queue.share(view).to(rows.dtype))])
        return sinkhorn(rows, epsilon=self.epsilon, iterations=self.iterations)[: len(scores)]

    def remember(self, crops: Sequence[Tensor], slots: Tensor, loss: Tensor, ctx: StepContext) -> None:
        """Keep what `after_step` needs: the embeddings of the two target crops of this micro-batch, and the loss."""
        if self._step != ctx.step:
            self._pending, self._losses, self._step = [], [], ctx.step
        if self.queue is not None or self.bank is not None:
            self._pending.append((slots, torch.stack([crops[0], crops[1]], dim=1).detach()))
        self._losses.append(loss.detach())
        if self.mode == "swav" and not self._counted:
            samples = int(sum_ranks(torch.tensor(len(slots), device=slots.device)))
            length = self.queue.rows.shape[1] if self.queue is not None else 0
            text = prototype_warning(samples, length, max(head.count for head in self.heads))
            self._counted = True
            if text:
                logger.warning(text)

    def after_step(self, ctx: StepContext) -> bool:
        """Renormalise prototypes, update queue or bank in global order; True when the loss has been at ln K for too long."""
        if self.mode == "swav":
            for head in self.heads:
                head.normalise()
        for slots, rows in self._pending:
            both = gather_rows(rows).transpose(0, 1)  # (2, M over all processes, E)
            if self.queue is not None:
                self.queue.push(both)
            if self.bank is not None:
                self.bank.write(gather_rows(slots), both)
        losses, self._pending, self._losses = self._losses, [], []
        if not losses:
            return False
        loss = float(sum_ranks(torch.stack(losses).double().mean())) / ctx.world_size
        return self.alarm.update(loss, self.log_k(), ctx.step, ctx.epoch)

    def log_k(self) -> float:
        """Return ln K, the loss of uniform predictions, averaged over heads."""
        counts = [math.log(max(int(head.active), 2)) for head in self.heads]
        return sum(counts) / len(counts)

    def cluster(self, generator: torch.Generator) -> None:
        """Cluster the memory bank: centroids become prototypes, labels become targets. Head h looks at bank h mod 2."""
        if self.bank is None or not bool(self.bank.filled.any()):
            return
        for number, head in enumerate(self.heads):
            rows = self.bank.rows[number % len(self.bank.rows), self.bank.filled]
            found = spherical_kmeans(rows, head.count, generator)
            head.set(found.centroids)
            self.bank.label(number, found.labels)


def _label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")


@dataclass
class _Stacks:
    """Stacks of a batch in one layout.

    Args:
        x: (B, V, N, C, H, W).
        valid: (B, V, N) bool, False where a slice holds nothing real.
        z_mm: (B, V, N), or None where nobody knows.
        share: (B, N), how far along its item a slice lies, 0 to 1.
    """

    x: Tensor
    valid: Tensor
    z_mm: Tensor | None
    share: Tensor


class IntraInterClustering(nn.Module):
    """Clustering of slices and volumes, and prediction of hidden slice embeddings; see the module's docstring.

    Args:
        encoder: `slice_volume` or another encoder with `embed_slices(stacks, valid)`, `aggregator(tokens, valid, z_mm)` and `parts()`.
        view_specs: Views of all sources by key: images, and stacks (kind `clip`, slices or frames first, with `<key>_depth` and
            `<key>_share`) or volumes. `<key>_local` are small crops of images. Two views each.
        items: Items of the run; sizes the memory bank and the default number of prototypes.
        weights: Terms (`intra`, `inter`, `mask`) and their weights; a term that is left out is not built, and a stage may weigh the
            others anew in `loss_weights`. Default 1 each.
        mode: `swav` or `deepcluster`.
        intra_prototypes: K of L_intra, or one K per head; None takes a tenth of the items, 8 to 3,000.
        inter_prototypes: The same for L_inter.
        projector_dim: Output of the head of L_intra.
        projector_hidden: Its hidden width; None takes the encoder's.
        temperature: Of the predictions.
        epsilon: Of Sinkhorn.
        sinkhorn_iterations: Of Sinkhorn.
        intra_queue: Embeddings of earlier steps in Sinkhorn, over all processes.
        inter_queue: The same for L_inter.
        freeze_prototypes: Steps during which prototypes stay as they are (`swav`).
        mask_ratio: Share of slices hidden in L_mask.
        standardise: Standardise embeddings over the micro-batch of all processes before they are scored. Embeddings of medical images of one
            kind point nearly the same way; balanced assignments of them are nearly uniform, and the quickest way down is to make them quite
            so. Standardised ones cannot all be alike, so that only agreement of views is left to learn. For small
            batches from scratch, which otherwise end at ln K.
        places: Memory slots per item in L_intra (`deepcluster`): slices of a stack share a slot when they lie in the same of this many
            parts of it.
        slice_axis: Of volumes.
        alarm: Changes to `StuckAlarm`: share, epochs, steps.
    """

    needs = ("takes_stacks",)

    def __init__(
        self,
        encoder: Any,
        *,
        view_specs: Mapping[str, ViewSpec],
        items: int = 0,
        weights: Mapping[str, float] | None = None,
        mode: Literal["swav", "deepcluster"] = "swav",
        intra_prototypes: int | Sequence[int] | None = None,
        inter_prototypes: int | Sequence[int] | None = None,
        projector_dim: int = 128,
        projector_hidden: int | None = None,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        intra_queue: int = 0,
        inter_queue: int = 0,
        freeze_prototypes: int = 313,
        mask_ratio: float = 0.1,
        standardise: bool = True,
        places: int = 16,
        slice_axis: int = 2,
        alarm: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.weights = {term: float(weight) for term, weight in (weights or dict.fromkeys(TERMS, 1.0)).items() if weight}
        self.view_specs = dict(view_specs)
        _check(self.view_specs, self.weights, mode, mask_ratio, items, intra_queue + inter_queue)
        self.encoder = encoder
        self.freeze_prototypes, self.mask_ratio, self.slice_axis = freeze_prototypes, mask_ratio, slice_axis
        self.standardise = standardise
        width = int(encoder.embed_dim)
        shared = {"mode": mode, "temperature": temperature, "epsilon": epsilon, "iterations": sinkhorn_iterations, "alarm": alarm}
        stacks = any(spec.kind != "image" for spec in self.view_specs.values())
        self.places = places if stacks else 1
        if "intra" in self.weights:
            hidden = projector_hidden or width
            self.projector = nn.Sequential(
                nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, projector_dim)
            )
            self.intra = ClusterHead(
                projector_dim,
                _counts(intra_prototypes, items),
                queue=intra_queue,
                slots=items * self.places,
                **shared,  # type: ignore[arg-type]
            )
        if "inter" in self.weights:
            self.inter = ClusterHead(width, _counts(inter_prototypes, items), queue=inter_queue, slots=items, **shared)  # type: ignore[arg-type]
        if "mask" in self.weights:
            self.mask_token = nn.Parameter(torch.randn(width))
            self.predictor = nn.Linear(width, width)
        if not {"inter", "mask"} & set(self.weights):
            for parameter in encoder.aggregator.parameters():
                parameter.requires_grad_(False)

    def _key(self, views: Views) -> str:
        """Return the key of the main view of this step's source."""
        found = [key for key in self.view_specs if key in views and not key.endswith("_local")]
        if len(found) != 1:
            raise RequestError(
                f"source {views.meta.source} brings the views {', '.join(sorted(views.data))}; accepted is exactly one of "
                f"{', '.join(key for key in self.view_specs if not key.endswith('_local'))}; name the views of the sources so"
            )
        return found[0]

    def _stacks(self, views: Views, key: str) -> _Stacks:
        x, valid, spec = views[key], views.meta.valid[key], self.view_specs[key]
        z_mm = share = None
        if spec.kind == "volume":
            x = slices_of(x, self.slice_axis)  # (B, V, N, C, H, W)
            valid = slices_of(valid, self.slice_axis, channels=False)
            if key in views.meta.spacing_mm:
                step = views.meta.spacing_mm[key][..., self.slice_axis].to(x.device)
                z_mm = (step[..., None] * torch.arange(x.shape[2], device=x.device)).float()
        elif f"{key}_depth" in views:
            z_mm = views[f"{key}_depth"]
        if f"{key}_share" in views:
            share = views[f"{key}_share"][:, 0].nan_to_num(0.0)
        else:
            share = torch.linspace(0, 1, x.shape[2], device=x.device).expand(len(x), -1)
        return _Stacks(x, valid.flatten(3).any(dim=-1), z_mm, share)

    def _hidden(self, views: Views, key: str, valid: Tensor, ctx: StepContext) -> Tensor:
        """Return which slices to hide, (B, V, N): the view's own mask, or one drawn here."""
        if f"{key}_mask" in views:
            return views[f"{key}_mask"] & valid
        hidden = hide_slices(valid.all(dim=1), views.meta.ids.tolist(), self.mask_ratio, ctx.seed, ctx.step)
        return hidden[:, None].expand_as(valid)

    def _slots(self, views: Views, share: Tensor | None, pick: Tensor) -> Tensor:
        """Return the slots in the memory bank of the samples of L_intra that `pick` selects."""
        ids = views.meta.ids.to(pick.device)
        if share is None:
            return (ids * self.places)[pick]
        place = (share * self.places).long().clamp(0, self.places - 1)
        return (ids[:, None] * self.places + place)[pick]

    def denominators(self, views: Views) -> dict[str, Tensor]:
        """Return the samples of each term in a micro-batch."""
        key = self._key(views)
        counts: dict[str, Tensor] = {}
        if self.view_specs[key].kind == "image":
            pick = views.meta.valid[key].flatten(2).any(dim=-1).all(dim=1)
            return {"intra": self.intra.labelled(self._slots(views, None, pick)).sum()} if "intra" in self.weights else counts
        stacks = self._stacks(views, key)
        both = stacks.valid.all(dim=1)
        if "intra" in self.weights:
            counts["intra"] = self.intra.labelled(self._slots(views, stacks.share, both)).sum()
        if "inter" in self.weights:
            pick = stacks.valid.any(dim=2).all(dim=1)
            counts["inter"] = self.inter.labelled(views.meta.ids.to(pick.device)[pick]).sum()
        if "mask" in self.weights:
            if f"{key}_mask" in views:
                counts["mask"] = self._hidden(views, key, stacks.valid, StepContext()).sum()
            else:
                hidden = [hidden_count(n, self.mask_ratio) for n in both.sum(dim=1).tolist()]
                counts["mask"] = torch.tensor(sum(hidden) * stacks.valid.shape[1], device=both.device)
        return counts

    def forward(self, views: Views, ctx: StepContext) -> dict[str, Tensor]:
        """Return `loss`, the weighted sum of the terms this step has, the terms `loss_*` and the monitors of the prototypes.

        `<term>_entropy` is the entropy of the mean prediction as a share of ln K, `<term>_used` the prototypes that are somebody's first
        choice as a share of what is possible, `<term>_target_sharpness` how far targets are from uniform.
        """
        unknown = [name for name in ctx.loss_weights if name not in self.weights]
        if unknown:
            raise RequestError(
                f"loss_weights: no term {unknown[0]} here{near(unknown[0], self.weights)}; "
                f"built: {', '.join(self.weights)}; add it to the objective's weights"
            )
        key = self._key(views)
        if self.view_specs[key].kind == "image":
            parts = self._image_terms(views, key, ctx)
        else:
            parts = self._stack_terms(views, key, ctx)
        weighted = [
            ctx.loss_weights.get(term, weight) * parts[f"loss_{term}"]
            for term, weight in self.weights.items()
            if f"loss_{term}" in parts
        ]
        if not weighted:
            raise RequestError(
                f"source {views.meta.source} brings images, but none of the terms {', '.join(self.weights)} uses them; "
                "give the term intra a weight, or leave the source out"
            )
        return {"loss": torch.stack(weighted).sum(), **parts}

    def _image_terms(self, views: Views, key: str, ctx: StepContext) -> dict[str, Tensor]:
        if "intra" not in self.weights:
            return {}
        valid = views.meta.valid[key].flatten(2).any(dim=-1)  # (B, V)
        pick = valid.all(dim=1)
        tokens = self.encoder.embed_slices(views[key], valid)
        crops = [tokens[pick, view] for view in range(tokens.shape[1])]
        if f"{key}_local" in views:
            small = self.encoder.embed_slices(views[f"{key}_local"])
            crops += [small[pick, view] for view in range(small.shape[1])]
        return self._cluster("intra", [self.projector(crop) for crop in crops], self._slots(views, None, pick), ctx)

    def _stack_terms(self, views: Views, key: str, ctx: StepContext) -> dict[str, Tensor]:
        stacks = self._stacks(views, key)
        batch, count, slices = stacks.valid.shape
        valid = stacks.valid.flatten(0, 1)
        z_mm = None if stacks.z_mm is None else stacks.z_mm.flatten(0, 1)
        tokens = self.encoder.embed_slices(stacks.x.flatten(0, 1), valid)  # (B * V, N, E)
        parts: dict[str, Tensor] = {}
        if "intra" in self.weights:
            pick = stacks.valid.all(dim=1)
            rows = tokens.reshape(batch, count, slices, -1)
            crops = [self.projector(rows[:, view][pick]) for view in range(count)]
            parts |= self._cluster("intra", crops, self._slots(views, stacks.share, pick), ctx)
        if "inter" in self.weights:
            pick = stacks.valid.any(dim=2).all(dim=1)
            pooled = self.encoder.aggregator(tokens, valid, z_mm).pooled.reshape(batch, count, -1)
            ids = views.meta.ids.to(pick.device)[pick]
            parts |= self._cluster("inter", [pooled[pick, view] for view in range(count)], ids, ctx)
        if "mask" in self.weights:
            hidden = self._hidden(views, key, stacks.valid, ctx).flatten(0, 1)
            filled = torch.where(hidden[..., None], self.mask_token.to(tokens.dtype), tokens)
            prediction = self.predictor(self.encoder.aggregator(filled, valid, z_mm).tokens)
            parts["loss_mask"] = ctx.mean(masked_loss(prediction, tokens, hidden), "mask", hidden.sum())
        return parts

    def _cluster(self, term: str, crops: Sequence[Tensor], slots: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        head: ClusterHead = getattr(self, term)
        if self.standardise:
            crops = list(torch.split(standardised(torch.cat(list(crops))), [len(z) for z in crops]))
        unit = [functional.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1) for z in crops]
        total, monitors = head(unit, slots, frozen=ctx.step < self.freeze_prototypes)
        loss = ctx.mean(total, term, head.labelled(slots).sum())
        if self.training:
            head.remember(unit, slots, loss, ctx)
        return {f"loss_{term}": loss, **{f"{term}_{name}": value for name, value in monitors.items()}}

    def heads(self) -> dict[str, ClusterHead]:
        """Return the terms that cluster, by name."""
        return {term: getattr(self, term) for term in ("intra", "inter") if term in self.weights}

    def after_step(self, ctx: StepContext) -> None:
        """Put prototypes back on the sphere; update queues and banks.

        Raises:
            TrainingStopped: A clustering loss has stayed at ln K.
        """
        for term, head in self.heads().items():
            if head.after_step(ctx):
                raise TrainingStopped(
                    f"step {ctx.step}: loss_{term} has stayed at ln K = {head.log_k():.2f} for more than {head.alarm.epochs} epochs: "
                    "predictions are uniform, the clusters have collapsed. The last checkpoint is safe. Try fewer prototypes, "
                    "epsilon=0.03, a higher temperature with few prototypes, more steps of freeze_prototypes, or a lower optim.lr"
                )

    def on_epoch(self, ctx: StepContext, embed: Embed | None = None) -> None:
        """Cluster the memory banks (`deepcluster`); the embeddings are those of the last epoch, so `embed` is not called."""
        for term, head in self.heads().items():
            head.cluster(ctx.generator(f"k-means {term}"))

    def exported(self) -> dict[str, Part]:
        """The parts of the encoder; prototypes, heads and banks stay behind."""
        return self.encoder.parts()  # type: ignore[no-any-return]


def _counts(prototypes: int | Sequence[int] | None, items: int) -> list[int]:
    if prototypes is None:
        return [suggested_prototypes(items)]
    return [prototypes] if isinstance(prototypes, int) else list(prototypes)


def _check(
    specs: Mapping[str, ViewSpec], weights: Mapping[str, float], mode: str, mask_ratio: float, items: int, queue: int
) -> None:
    """Refuse arguments that cannot work together."""
    unknown = [term for term in weights if term not in TERMS]
    if unknown or not weights:
        name = unknown[0] if unknown else "nothing"
        raise RequestError(f"weights names {name}{near(name, TERMS)}; accepted: {', '.join(TERMS)} with weights above 0")
    if mode not in ("swav", "deepcluster"):
        raise RequestError(f'mode is "{mode}"; accepted: swav, deepcluster')
    if not 0 < mask_ratio < 1:
        raise RequestError(f"mask_ratio is {mask_ratio}; accepted: between 0 and 1, for instance 0.1")
    main = {key: spec for key, spec in specs.items() if not key.endswith("_local")}
    few = [key for key, spec in main.items() if spec.count != 2]
    if few or not main:
        raise RequestError(
            f"view {few[0] if few else '(none)'} comes {main[few[0]].count if few else 0} times; two views are compared: set count: 2"
        )
    if all(spec.kind == "image" for spec in main.values()) and set(weights) != {"intra"}:
        raise RequestError(
            "no view holds stacks, so only L_intra can be trained; set weights: {intra: 1}, or add views with slices"
        )
    if mode == "deepcluster" and items < 1:
        raise RequestError("mode deepcluster keeps a memory bank by item; build the objective with the number of items of the run")
    if mode == "deepcluster" and queue:
        raise RequestError("mode deepcluster has a memory bank and no queue; leave the queues out, or set mode: swav")
