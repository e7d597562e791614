"""RSPNet: of two clips of a cine, which one plays as fast as a third? And is it the same cine at all?

Absolute speed of an echocardiogram is confounded with the heart rate; the ratio of two samplings of one cine is not. A step brings three
views of each item, as the sampler `clips` with `speeds: [1, 2]` and views with `count: 3` draw them: an anchor q, a clip k of the same speed,
and a clip k' of another one. With heads A and M on the pooled features, unit length, and keys from a slow copy of encoder and heads:

- `motion`: mean of max(0, margin - (q_M.k_M - q_M.k'_M) / T);
- `appearance`: CE([q_A.k_A, q_A.n] / T, 0) + CE([q_A.k'_A, q_A.n] / T, 0), n a queue of earlier keys: a cine is itself at any speed.

Views are `clip` (B, 3, T, C, H, W), `meta.valid["clip"]`, and `clip_time_s` (B, 3, T): a file that is slower than asked for is shown at its
own rate, so the speeds that count are those that were shown. Items of which the three do not come out as wanted do not take part.

Reference:
    Chen et al. 2021, "RSPNet: Relative Speed Perception for Unsupervised Video Representation Learning" (AAAI), equations 2 to 5. The margin
    is over the temperature, as in the published code: 2.0 is 0.14 in cosines. We differ: clips that a file is too short for would give their
    speed away by their length, so all three are cut to the frames that the shortest one has.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.errors import RequestError, near
from medssl.layers.prototypes import EmbeddingQueue
from medssl.layers.sinkhorn import gather_rows
from medssl.objectives._clips import clip_part, clip_spec, clips_of
from medssl.types import Part, StepContext, Views, ViewSpec

TERMS = ("motion", "appearance")
SAME_SPEED = 1.1
"""Largest ratio of frame steps that still counts as one speed."""
OTHER_SPEED = 1.25
"""Smallest ratio that counts as another."""


def ranking_loss(query: Tensor, same: Tensor, other: Tensor, *, margin: float, temperature: float) -> Tensor:
    """Return max(0, margin - (q.k - q.k') / T) per row.

    Args:
        query: (B, E) of length 1.
        same: (B, E) keys of the same speed.
        other: (B, E) keys of another speed.
        margin: In units of the temperature.
        temperature: T.
    """
    return (margin - (query * (same - other)).sum(dim=1) / temperature).clamp_min(0)


def discrimination_loss(query: Tensor, key: Tensor, negatives: Tensor, *, temperature: float) -> Tensor:
    """Return -log of the share of exp(q.k / T) in it and the exp(q.n / T), per row.

    Args:
        query: (B, E) of length 1.
        key: (B, E).
        negatives: (Q, E).
        temperature: T.
    """
    logits = torch.cat([(query * key).sum(dim=1, keepdim=True), query @ negatives.T], dim=1) / temperature
    return functional.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64), reduction="none")


class SpeedHeads(nn.Module):
    """One linear head for appearance and one for motion, both brought to length 1, in float32 or better.

    Args:
        dim: Inputs.
        out: Outputs.
        terms: Which heads there are.
    """

    def __init__(self, dim: int, out: int, terms: Mapping[str, float]) -> None:
        super().__init__()
        self.linear = nn.ModuleDict({term: nn.Linear(dim, out) for term in terms})

    def forward(self, pooled: Tensor) -> dict[str, Tensor]:
        """Return the embeddings (B, out) of pooled features (B, dim), by term."""
        found = {term: layer(pooled) for term, layer in self.linear.items()}
        return {term: functional.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1) for term, z in found.items()}


class RelativeSpeed(nn.Module):
    """Ranking of playback speeds, and discrimination of cines; see the module's docstring.

    Args:
        encoder: Any encoder of clips.
        view_specs: Views of the run; one kind of clips, three of each item.
        weights: Terms (`motion`, `appearance`) and their weights; a term that is left out is not built, and a stage may weigh the others
            anew in `loss_weights`. Default 1 each.
        dim: Width of the heads.
        margin: Of the ranking, in units of the temperature.
        temperature: T.
        queue: Keys of other cines, over all processes.
        key_momentum: Momentum of the slow copy.
    """

    needs = ("takes_clips",)

    def __init__(
        self,
        encoder: Any,
        *,
        view_specs: Mapping[str, ViewSpec],
        weights: Mapping[str, float] | None = None,
        dim: int = 128,
        margin: float = 2.0,
        temperature: float = 0.07,
        queue: int = 16384,
        key_momentum: float = 0.999,
    ) -> None:
        super().__init__()
        given = {term: 1.0 for term in TERMS} if weights is None else weights
        self.weights = {term: float(weight) for term, weight in given.items() if weight}
        _check(given, self.weights, margin, temperature, key_momentum)
        self.view, spec = clip_spec(view_specs, encoder, "relative_speed")
        if spec.count != 3:
            raise RequestError(
                f"relative_speed compares three clips of a cine, views bring {spec.count}; set views.count: 3 and sampler.speeds: [1, 2]"
            )
        self.view_specs = {self.view: spec}
        self.encoder = encoder
        self.patch = tuple(encoder.patch_size)
        self.share = float(getattr(encoder, "valid_share", 0.25))
        self.margin, self.temperature, self.key_momentum = margin, temperature, key_momentum
        self.heads = SpeedHeads(encoder.embed_dim, dim, self.weights)
        self.keys = nn.ModuleDict({"encoder": copy.deepcopy(encoder), "heads": copy.deepcopy(self.heads)}).requires_grad_(False)
        self.queue = EmbeddingQueue(queue, dim, views=1) if "appearance" in self.weights else None
        if self.queue is not None:  # full of random directions at first, so that the loss has one scale from the first step
            self.queue.push(functional.normalize(torch.randn(1, queue, dim), dim=2))
        self._pending: list[Tensor] = []
        self._step = -1

    def train(self, mode: bool = True) -> RelativeSpeed:
        """Set training mode; the slow copy stays in evaluation mode."""
        super().train(mode)
        self.keys.eval()
        return self

    def schedules(self, step: int, steps: int) -> dict[str, float]:
        """The momentum of the slow copy, which is constant."""
        return {"key_momentum": self.key_momentum}

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module, str]]:
        """Encoder and heads, their slow copies, and the schedule."""
        return [(self.encoder, self.keys["encoder"], "key_momentum"), (self.heads, self.keys["heads"], "key_momentum")]

    def inputs(self, views: Views) -> tuple[Tensor, Tensor, Tensor]:
        """Return clips (B, 3, C, T, H, W), their valid pixels (B, 3, T, H, W) cut to one length, and which items take part (B,).

        Raises:
            RequestError: There are not three views of each item.
        """
        x = views[self.view]
        if x.shape[1] != 3:
            raise RequestError(
                f"source {views.meta.source} brings {x.shape[1]} view(s) of {self.view}; relative_speed compares three: views.count: 3"
            )
        clips = clips_of(views, self.view, self.patch, self.share)
        pixels = clips.pixels.reshape(len(x), 3, *clips.pixels.shape[1:])
        frames = pixels.flatten(3).any(dim=3).sum(dim=2)  # (B, 3); true frames come first
        length = frames.amin(dim=1) // self.patch[0] * self.patch[0]
        inside = torch.arange(x.shape[2], device=x.device) < length[:, None]
        pixels = pixels & inside[:, None, :, None, None]
        return clips.video.reshape(len(x), 3, *clips.video.shape[1:]), pixels, self._comparable(views, length)

    def _comparable(self, views: Views, length: Tensor) -> Tensor:
        """Return which items show two clips of one speed and a third of another."""
        key = f"{self.view}_time_s"
        if key not in views:
            return torch.ones(len(length), dtype=torch.bool, device=length.device)
        last = views[key].gather(2, (length - 1)[:, None, None].expand(-1, 3, 1))[..., 0]
        step = ((last - views[key][..., 0]) / (length - 1).clamp_min(1)[:, None]).clamp_min(1e-6).log()  # (B, 3)
        same, other = (step[:, 1] - step[:, 0]).abs(), (step[:, 2] - step[:, 0]).abs()
        return (same <= math.log(SAME_SPEED)) & (other >= math.log(OTHER_SPEED))

    def denominators(self, views: Views) -> dict[str, Tensor]:
        """Return the items of a micro-batch that take part."""
        return {"items": self.inputs(views)[2].sum()}

    def forward(self, views: Views, ctx: StepContext) -> dict[str, Tensor]:
        """Return `loss`, the weighted sum of the terms, the terms `loss_*`, and monitors.

        `comparable` is the share of items that take part, `speed_accuracy` the share of those whose clip of the same speed ranks higher
        (a tie is half).
        """
        unknown = [name for name in ctx.loss_weights if name not in self.weights]
        if unknown:
            raise RequestError(
                f"loss_weights: no term {unknown[0]} here{near(unknown[0], self.weights)}; "
                f"built: {', '.join(self.weights)}; add it to the objective's weights"
            )
        if self._step != ctx.step:
            self._pending, self._step = [], ctx.step
        video, pixels, comparable = self.inputs(views)
        weight = comparable.float()
        query = self.heads(self.encoder.forward_features(video[:, 0], valid=pixels[:, 0]).pooled)
        with torch.no_grad():
            encoder: Any = self.keys["encoder"]
            same, other = (self.keys["heads"](encoder.forward_features(video[:, v], valid=pixels[:, v]).pooled) for v in (1, 2))
        parts = {"comparable": weight.mean()}
        with torch.autocast(video.device.type, enabled=False):
            if "motion" in self.weights:
                triple = (query["motion"], same["motion"], other["motion"])
                losses = ranking_loss(*triple, margin=self.margin, temperature=self.temperature)
                parts["loss_motion"] = ctx.mean((losses * weight).sum(), "items", weight.sum())
                gap = (triple[0].detach() * (triple[1] - triple[2])).sum(dim=1)
                right = (gap > 0).float() + 0.5 * (gap == 0).float()
                parts["speed_accuracy"] = (right * weight).sum() / weight.sum().clamp_min(1)
            if self.queue is not None:
                negatives = self.queue.rows[0].to(query["appearance"].dtype)
                losses = torch.stack(
                    [
                        discrimination_loss(query["appearance"], key["appearance"], negatives, temperature=self.temperature)
                        for key in (same, other)
                    ]
                ).sum(dim=0)
                parts["loss_appearance"] = ctx.mean((losses * weight).sum(), "items", weight.sum())
                if self.training:
                    self._pending.append(other["appearance"].detach())
        total = torch.stack([ctx.loss_weights.get(term, w) * parts[f"loss_{term}"] for term, w in self.weights.items()]).sum()
        return {"loss": total, **parts}

    @torch.no_grad()
    def after_step(self, ctx: StepContext) -> None:
        """Put the keys of the other speed into the queue, in global order."""
        pending, self._pending = self._pending, []
        if self.queue is not None:
            for rows in pending:
                self.queue.push(gather_rows(rows)[None])

    def exported(self) -> dict[str, Part]:
        """The encoder; heads, slow copy and queue stay behind."""
        return {"encoder": clip_part(self.encoder, "encoder", self.view_specs[self.view])}


def _check(given: Mapping[str, float], kept: Mapping[str, float], margin: float, temperature: float, momentum: float) -> None:
    unknown = [term for term in given if term not in TERMS]
    if unknown or not kept or any(weight < 0 for weight in given.values()):
        name = f"names {unknown[0]}{near(unknown[0], TERMS)}" if unknown else f"is {dict(given)}"
        raise RequestError(f"weights {name}; accepted: {', '.join(TERMS)} with weights of 0 or more, one above 0")
    if margin <= 0 or temperature <= 0:
        raise RequestError(f"margin is {margin} and temperature {temperature}; accepted: above 0, for instance 2.0 and 0.07")
    if not 0 <= momentum < 1:
        raise RequestError(f"key_momentum is {momentum}; accepted: 0 to below 1, for instance 0.999")
