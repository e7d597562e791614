"""DISCOVR: video and frame students follow their own teachers, and the video branch names the cluster of the frame teacher, place by place.

Three terms, for M clips of a micro-batch:

- `video`: class tokens of tube-masked clips predict that of the whole clip, which an exponential moving average of the student sees;
- `image`: the same for single frames, with encoders, heads and a teacher of their own;
- `cluster`: tokens decoded from a tube-masked clip and tokens of the frame teacher are compared with the same prototypes, and each side
  names the prototype that a balanced assignment gives the other: CE(s_v / T, a_i) + CE(s_i / T, a_v).

Features of the frame teacher carry no gradient; CE(s_i / T, a_v) reaches the prototypes alone. Only tokens inside the sector, of frames that
are there, take part in assignments and loss.

What a step brings, for a view named `clip`: `clip` (B, V, T, C, H, W), `meta.valid["clip"]` (B, V, T, H, W), and, where masks are views,
`clip_mask` (B, V, 1 + masked_views, h, w): the first one for `cluster`, the others for `video`.

Reference:
    Mishra et al. 2025, "DISCOVR: self-supervised learning of echocardiographic video representations via online cluster distillation"
    (arXiv 2506.11777); Caron et al. 2021 (DINO); Salehi et al. 2024 (SIGMA). We differ where the released code cannot do what the paper says:
    tokens of both branches meet in the order of the grid, one frame of each tubelet; prototypes learn from both directions; momenta and
    schedules reach the model; centres follow raw logits; the image loss is over a few frames of each clip; teachers move once per
    optimiser step; what enters the heads is standardised by running statistics. `legacy_order` brings the released order of tokens back, for
    ablation.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.errors import RequestError, TrainingStopped, near
from medssl.layers.distillation import Centre, UnitHead, cross_entropy, entropy_share, unit_spread
from medssl.layers.pos_embed import sincos_positions
from medssl.layers.prototypes import Prototypes, StuckAlarm, usage
from medssl.layers.sinkhorn import sinkhorn, sum_ranks
from medssl.layers.standardise import RunningStandard
from medssl.layers.tokens import valid_tokens, visible_indices
from medssl.layers.transformer import MaskedDecoder
from medssl.layers.tube_mask import tube_masks
from medssl.objectives._clips import Clips, clip_part, clip_spec, clips_of
from medssl.seeding import counter_rng
from medssl.types import Part, StepContext, Views, ViewSpec

logger = logging.getLogger(__name__)
TERMS = ("video", "image", "cluster")
TOKENS_PER_PROTOTYPE = 20
SPREAD = 0.3
"""Std of unit-length class tokens over a batch, in units of 1 / sqrt(E), below which they are alike."""
UNIFORM = 0.99
"""Entropy of targets as a share of ln K above which they teach nothing."""
ALARM_ROWS = 8
"""Fewer class tokens than this say nothing about a spread."""


def standardised_tokens(tokens: Tensor, valid: Tensor) -> Tensor:
    """Standardise the tokens of every frame, channel by channel, over those that are valid.

    Args:
        tokens: (..., S, E).
        valid: (..., S) bool.

    Returns:
        (tokens - mean) / sqrt(unbiased variance + 1e-6), in float32 or better.
    """
    x = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    weight = valid[..., None].to(x.dtype)
    count = weight.sum(dim=-2, keepdim=True)
    mean = (x * weight).sum(dim=-2, keepdim=True) / count.clamp_min(1)
    variance = ((x - mean).square() * weight).sum(dim=-2, keepdim=True) / (count - 1).clamp_min(1)
    return (x - mean) / (variance + 1e-6).sqrt()


def released_targets(tokens: Tensor, tubelet: int) -> Tensor:
    """Return every `tubelet`-th token of a clip, frames joined: what the released code takes where it means every second frame.

    Args:
        tokens: (M, T, S, E) of all frames.
        tubelet: Frames per token of the video branch.

    Returns:
        (M, T / tubelet * S, E).
    """
    return tokens.flatten(1, 2)[:, ::tubelet]


def released_predictions(tokens: Tensor, keep: Tensor) -> Tensor:
    """Return tokens of the grid in the order that the released decoder leaves them in: visible ones first, hidden ones after.

    Args:
        tokens: (M, N, E).
        keep: (M, K) visible places.
    """
    hidden = torch.ones(tokens.shape[:2], dtype=torch.uint8, device=tokens.device).scatter(1, keep, 0)
    order = torch.argsort(hidden, dim=1, stable=True)
    return tokens.gather(1, order[..., None].expand_as(tokens))


def prototype_sentence(tokens: int, prototypes: int) -> str | None:
    """Say when there are too few tokens for balanced assignments.

    Args:
        tokens: Tokens of a micro-batch over all processes that take part.
        prototypes: K.

    Returns:
        A sentence, or None with 20 tokens or more per prototype.
    """
    if tokens >= TOKENS_PER_PROTOTYPE * prototypes:
        return None
    return (
        f"{prototypes} prototypes share {tokens} tokens of a micro-batch, {tokens / prototypes:.1f} each; below {TOKENS_PER_PROTOTYPE} "
        f"balanced assignments follow noise: take at most {max(tokens // TOKENS_PER_PROTOTYPE, 2)} prototypes, or more clips at once"
    )


class ClusterDistillation(nn.Module):
    """Cluster distillation of clips; see the module's docstring.

    Args:
        encoder: `video_vit`, or another encoder with `takes_clips`. Its `frame_branch()` becomes the frame encoder.
        view_specs: Views of the run; one kind of clips.
        weights: Terms (`video`, `image`, `cluster`) and their weights; a term that is left out is not built, and a stage may weigh the
            others anew in `loss_weights`. Default 1 each. Without `image` the frame teacher stays as it starts.
        mask_ratio: Hidden share of the places of a frame.
        masked_views: Masks per clip, and per frame, of the two self-distillations.
        frames: Frames per clip in the image term; neighbours are nearly the same, so a few do.
        prototypes: K of the cluster term; None takes a twentieth of the tokens of one clip, the rule for a batch of one.
        head_prototypes: Outputs of the heads of the other two.
        head_hidden: Width of the heads' MLP.
        bottleneck: Its output.
        decoder_dim: Width of the decoder; None takes half of the encoder's.
        decoder_depth: Its blocks.
        decoder_heads: Its heads; None takes one for every 64 channels.
        student_temperature: T_s of the heads.
        teacher_temperature: T_t at the start and after the warm-up; below T_s, or targets teach nothing.
        temperature_warmup: Share of the run over which T_t rises (published: 30 of 400 epochs).
        teacher_momentum: Momentum of the teachers at the start; it ends at 1 by half a cosine.
        centre_momentum: Momentum of the centres and of the running statistics.
        standardise: Bring the channels of what enters the heads to mean 0 and variance 1, by running statistics of student and of teacher,
            see `RunningStandard`. False is the published form.
        cluster_temperature: T of the cluster term.
        epsilon: Of Sinkhorn.
        sinkhorn_iterations: Of Sinkhorn.
        legacy_order: Take the tokens in the order of the released code, in which targets and predictions do not show the same place. For
            ablation only; needs clips of which everything is valid.
        export: Which encoder is the part `encoder`: `video_teacher` or `video_student`.
        alarm: Changes to `StuckAlarm` of the collapse monitor: epochs, steps.
    """

    needs = ("takes_clips",)

    def __init__(
        self,
        encoder: Any,
        *,
        view_specs: Mapping[str, ViewSpec],
        weights: Mapping[str, float] | None = None,
        mask_ratio: float = 0.9,
        masked_views: int = 4,
        frames: int = 8,
        prototypes: int | None = None,
        head_prototypes: int = 16384,
        head_hidden: int = 2048,
        bottleneck: int = 256,
        decoder_dim: int | None = None,
        decoder_depth: int = 4,
        decoder_heads: int | None = None,
        student_temperature: float = 0.1,
        teacher_temperature: Sequence[float] = (0.04, 0.07),
        temperature_warmup: float = 0.075,
        teacher_momentum: float = 0.996,
        centre_momentum: float = 0.9,
        standardise: bool = True,
        cluster_temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 10,
        legacy_order: bool = False,
        export: Literal["video_teacher", "video_student"] = "video_teacher",
        alarm: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        given = {term: 1.0 for term in TERMS} if weights is None else weights
        self.weights = {term: float(weight) for term, weight in given.items() if weight}
        _check_terms(given)
        _check_temperatures(student_temperature, teacher_temperature, temperature_warmup)
        _check_numbers(mask_ratio, masked_views, frames, teacher_momentum, centre_momentum)
        self.view, spec = clip_spec(view_specs, encoder, "cluster_distillation")
        self.view_specs = {self.view: spec}
        self.encoder = encoder
        self.patch = tuple(encoder.patch_size)
        self.grid = tuple(n // p for n, p in zip(spec.size, self.patch))
        self.share = float(getattr(encoder, "valid_share", 0.25))
        self.mask_ratio, self.masked_views, self.frames = mask_ratio, masked_views, frames
        self.student_temperature = student_temperature
        self.teacher_temperature = (float(teacher_temperature[0]), float(teacher_temperature[1]))
        self.temperature_warmup, self.teacher_momentum = temperature_warmup, teacher_momentum
        self.cluster_temperature, self.epsilon, self.sinkhorn_iterations = cluster_temperature, epsilon, sinkhorn_iterations
        self.legacy_order = legacy_order
        self.export = export if "video" in self.weights else "video_student"
        self.frame_encoder = encoder.frame_branch() if {"image", "cluster"} & set(self.weights) else None
        sizes = {"hidden": head_hidden, "bottleneck": bottleneck, "count": head_prototypes}
        self.heads = nn.ModuleDict(
            {term: UnitHead(encoder.embed_dim, **sizes) for term in ("video", "image") if term in self.weights}
        )
        self.centres = nn.ModuleDict({term: Centre(head_prototypes, centre_momentum) for term in self.heads})
        self.standards = nn.ModuleDict(
            {
                f"{term}_{branch}": RunningStandard(encoder.embed_dim, centre_momentum)
                for term in self.heads
                for branch in ("student", "teacher")
                if standardise
            }
        )
        self.decoder: MaskedDecoder | None = None
        self.prototypes: Prototypes | None = None
        if "cluster" in self.weights:
            width = decoder_dim or encoder.embed_dim // 2
            heads = decoder_heads or max(width // 64, 1)
            self.decoder = MaskedDecoder(encoder.embed_dim, width=width, depth=decoder_depth, heads=heads, out=encoder.embed_dim)
            count = prototypes or max(math.prod(self.grid) // TOKENS_PER_PROTOTYPE, 8)
            self.prototypes = Prototypes(encoder.embed_dim, count)
            self.register_buffer("positions", sincos_positions(self.grid, width), persistent=False)
        self.teacher = nn.ModuleDict({name: copy.deepcopy(module) for name, module in self._averaged().items()})
        self.teacher.requires_grad_(False)
        if self.frame_encoder is not None and "image" not in self.weights:
            self.frame_encoder = None  # nothing trains it: the teacher is all there is
        self.alarm = StuckAlarm(**{"share": 0.5, **(alarm or {})})  # type: ignore[arg-type]
        self._health: list[Tensor] = []
        self._step = -1
        self._counted = False

    def _averaged(self) -> dict[str, nn.Module]:
        """The student's modules that a teacher has too, by the teacher's name."""
        found: dict[str, nn.Module | None] = {"frame_encoder": self.frame_encoder}
        if "video" in self.weights:
            found["encoder"] = self.encoder
        found |= {f"{term}_head": head for term, head in self.heads.items()}
        return {name: module for name, module in found.items() if module is not None}

    def train(self, mode: bool = True) -> ClusterDistillation:
        """Set training mode; the teachers stay in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def schedules(self, step: int, steps: int) -> dict[str, float]:
        """Return the teachers' momentum (half a cosine up to 1) and temperature (linear over its warm-up) at any step of the run."""
        progress = min(step / max(steps - 1, 1), 1.0)
        first, last = self.teacher_temperature
        risen = min(progress / self.temperature_warmup, 1.0) if self.temperature_warmup > 0 else 1.0
        momentum = 1.0 - (1.0 - self.teacher_momentum) * 0.5 * (1.0 + math.cos(math.pi * progress))
        return {"teacher_momentum": momentum, "teacher_temperature": first + (last - first) * risen}

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module, str]]:
        """Encoders and heads of the students, their counterparts, and the schedule."""
        return [(module, self.teacher[name], "teacher_momentum") for name, module in self._averaged().items()]

    def clips(self, views: Views) -> Clips:
        """Return the clips of a micro-batch."""
        return clips_of(views, self.view, self.patch, self.share)

    def frame_validity(self, clips: Clips, frames: Tensor) -> Tensor:
        """Return the valid tokens of frames (M, F) of each clip, (M, F, S) bool."""
        chosen = clips.pixels.gather(1, frames[:, :, None, None].expand(-1, -1, *clips.pixels.shape[2:]))
        real = valid_tokens(chosen.flatten(0, 1)[:, None], (1, *self.patch[1:]), self.share)
        return real.reshape(*frames.shape, -1)

    def chosen_frames(self, clips: Clips) -> tuple[Tensor, Tensor]:
        """Return the frames of the image term, (M, F) tubelet numbers, and which of them count, (M, F) bool.

        They are drawn among the tubelets of which something is valid; where these are fewer than F, the rest does not count.
        """
        seen = clips.on_grid.flatten(2).any(dim=2).cpu()
        count = min(self.frames, clips.grid[0])
        rows, kept = [], []
        for flags, seed in zip(seen, clips.seeds, strict=True):
            places = flags.nonzero()[:, 0]
            order = torch.from_numpy(counter_rng(*seed, "frames").permutation(len(places)))
            picked = places[order[:count]]
            rows.append(functional.pad(picked, (0, count - len(picked)), value=int(picked[0])))
            kept.append(torch.arange(count) < len(picked))
        device = clips.tokens.device
        return torch.stack(rows).to(device), torch.stack(kept).to(device)

    def denominators(self, views: Views) -> dict[str, Tensor]:
        """Return the clips, the frames of the image term, and the tokens of the cluster term of a micro-batch."""
        clips = self.clips(views)
        counts = {}
        if "video" in self.weights:
            counts["clips"] = torch.tensor(len(clips), device=clips.tokens.device)
        if "image" in self.weights:
            counts["frames"] = self.chosen_frames(clips)[1].sum()
        if "cluster" in self.weights:
            counts["tokens"] = clips.tokens.sum()
        return counts

    def first_frames(self, clips: Clips) -> Tensor:
        """Return the first frame of every tubelet, (M, T / tubelet)."""
        first: Tensor = torch.arange(clips.grid[0], device=clips.tokens.device) * self.patch[0]
        return first.expand(len(clips), -1)

    def forward(self, views: Views, ctx: StepContext) -> dict[str, Tensor]:
        """Return `loss`, the weighted sum of the terms, the terms `loss_*`, and monitors.

        `<term>_spread` is the std over the batch of the student's class tokens of length 1, times sqrt(E): 1 when they point everywhere, 0
        when they are alike. `<term>_teacher_entropy` and `<term>_centre_entropy` are shares of ln K: the first nears 1 when targets are
        uniform, the second nears 0 when one output takes everything. A run whose class tokens are alike with uniform targets is stopped.
        `cluster_used` is the share of prototypes in use; `cluster_agreement`, `_visible` and `_hidden` are shares of tokens whose nearest
        prototype is the same in both branches.
        """
        unknown = [name for name in ctx.loss_weights if name not in self.weights]
        if unknown:
            raise RequestError(
                f"loss_weights: no term {unknown[0]} here{near(unknown[0], self.weights)}; "
                f"built: {', '.join(self.weights)}; add it to the objective's weights"
            )
        if self._step != ctx.step:
            self._health, self._step = [], ctx.step
            for running in (*self.centres.values(), *self.standards.values()):
                running.reset()  # type: ignore[operator]
        clips = self.clips(views)
        temperature = ctx.schedules.get("teacher_temperature", self.teacher_temperature[0])
        parts = self._video_terms(clips, temperature, ctx)
        if "image" in self.weights:
            parts |= self._image_term(clips, temperature, ctx)
        self._note_health(parts)
        total = torch.stack([ctx.loss_weights.get(term, w) * parts[f"loss_{term}"] for term, w in self.weights.items()]).sum()
        return {"loss": total, **parts}

    def _video_terms(self, clips: Clips, temperature: float, ctx: StepContext) -> dict[str, Tensor]:
        """One pass of the video student over all masks of all clips, for `video` and `cluster`."""
        cluster, local = "cluster" in self.weights, self.masked_views if "video" in self.weights else 0
        if not cluster and not local:
            return {}
        masks = clips.hidden(self.mask_ratio, 1 + local)
        masks = masks if local else masks[:, :1]
        masks = masks if cluster else masks[:, 1:]
        keep = visible_indices(masks.flatten(0, 1)).reshape(*masks.shape[:2], -1)  # (M, R, K)
        pooled, tokens = self.encoder.masked(clips.video, keep, clips.pixels)
        parts: dict[str, Tensor] = {}
        if local:
            with torch.no_grad():
                whole = self._pooled(self.teacher["encoder"], clips.video, clips.pixels)
            weight = torch.ones(len(clips), device=whole.device)
            parts |= self._distilled("video", pooled[:, -local:], whole, weight, "clips", temperature, ctx)
        if cluster:
            parts |= self._cluster_term(clips, tokens[:, 0], keep[:, 0], masks[:, 0].flatten(1), ctx)
        return parts

    @staticmethod
    def _pooled(encoder: Any, video: Tensor, valid: Tensor) -> Tensor:
        embedded, real = encoder.embed(video, valid)
        return encoder.encode_valid(embedded, real, states=False)[0]  # type: ignore[no-any-return]

    def _image_term(self, clips: Clips, temperature: float, ctx: StepContext) -> dict[str, Tensor]:
        """Self-distillation of single frames, one forward pass over all of them."""
        chosen, counted = self.chosen_frames(clips)
        frames = (chosen * self.patch[0]).flatten()
        owner = torch.arange(len(clips), device=frames.device).repeat_interleave(chosen.shape[1])
        images = clips.video[owner, :, frames][:, :, None]  # (M * F, C, 1, H, W)
        pixels = clips.pixels[owner, frames][:, None]
        real = valid_tokens(pixels, (1, *self.patch[1:]), self.share).reshape(-1, 1, *clips.grid[1:])
        seeds = [(*clips.seeds[m], "frame", f) for m, f in zip(owner.tolist(), frames.tolist())]
        masks = tube_masks(real, self.mask_ratio, self.masked_views, seeds)
        keep = visible_indices(masks.flatten(0, 1)).reshape(*masks.shape[:2], -1)
        student: Any = self.frame_encoder
        student.checkpoint_blocks = self.encoder.checkpoint_blocks
        pooled, _ = student.masked(images, keep, pixels)
        with torch.no_grad():
            whole = self._pooled(self.teacher["frame_encoder"], images, pixels)
        return self._distilled("image", pooled, whole, counted.flatten().float(), "frames", temperature, ctx)

    def _distilled(
        self, term: str, student: Tensor, teacher: Tensor, weight: Tensor, count: str, temperature: float, ctx: StepContext
    ) -> dict[str, Tensor]:
        """Compare class tokens of masked views (M, R, E) with those of whole ones (M, E), which count by weight (M,)."""
        rows, repeated = student.flatten(0, 1), weight.repeat_interleave(student.shape[1])
        spread, count_rows = unit_spread(rows, repeated)
        if self.standards:
            rows = self.standards[f"{term}_student"](rows, repeated)
            teacher = self.standards[f"{term}_teacher"](teacher, weight)
        logits = self.heads[term](rows).reshape(*student.shape[:2], -1)
        with torch.no_grad():
            targets = self.teacher[f"{term}_head"](teacher)
        centre: Any = self.centres[term]
        losses = cross_entropy(targets[:, None], centre.value, temperature, logits, self.student_temperature).mean(dim=1)
        if self.training:
            centre.note(targets, weight)
        with torch.no_grad():
            shifted = (targets - centre.value.to(targets.dtype)) / temperature
            monitors = {
                f"{term}_teacher_entropy": entropy_share(shifted),
                f"{term}_centre_entropy": entropy_share(centre.value / temperature),
                f"{term}_spread": spread,
                f"{term}_rows": count_rows,
            }
        return {f"loss_{term}": ctx.mean((losses * weight).sum(), count, weight.sum()), **monitors}

    @torch.no_grad()
    def frame_features(self, clips: Clips) -> Tensor:
        """Return what the frame teacher sees at every token, standardised over each frame, (M, N, E), in the order of the grid."""
        if self.legacy_order:
            frames = torch.arange(clips.video.shape[2], device=clips.video.device).expand(len(clips), -1)
            tokens, real = self.frame_tokens(clips, frames)
            return released_targets(standardised_tokens(tokens, real), self.patch[0])
        tokens, real = self.frame_tokens(clips, self.first_frames(clips))
        return standardised_tokens(tokens, real).flatten(1, 2)  # frames before places, as the grid counts

    def frame_tokens(self, clips: Clips, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return the frame teacher's tokens (M, F, S, E) of frames (M, F), and which are valid; frames without any are left out."""
        real = self.frame_validity(clips, frames)
        owner, place = real.any(dim=2).nonzero(as_tuple=True)
        chosen = frames[owner, place]
        images, pixels = clips.video[owner, :, chosen][:, :, None], clips.pixels[owner, chosen][:, None]
        encoder: Any = self.teacher["frame_encoder"]
        embedded, valid = encoder.embed(images, pixels)
        found = encoder.encode_valid(embedded, valid, states=False)[1]
        tokens = found.new_zeros(*real.shape, found.shape[-1])
        tokens[owner, place] = found
        return tokens, real

    def decoded(self, tokens: Tensor, keep: Tensor, valid: Tensor | None) -> Tensor:
        """Return what the video branch says about every token, (M, N, E), in the order of the grid.

        Args:
            tokens: (M, K, E) visible tokens.
            keep: (M, K) their places.
            valid: (M, N) bool.
        """
        assert self.decoder is not None
        found = self.decoder(tokens, keep, self.get_buffer("positions"), valid)
        return released_predictions(found, keep) if self.legacy_order else found

    def _cluster_term(self, clips: Clips, tokens: Tensor, keep: Tensor, hidden: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        valid = clips.tokens
        if self.legacy_order and not bool(valid.all()):
            raise RequestError(
                "legacy_order mixes the places of tokens, so none can be left out; it needs clips without a sector mask and without frames "
                "that were filled in. Set legacy_order: false"
            )
        video = self.decoded(tokens, keep, valid)[valid]
        frame = self.frame_features(clips)[valid]
        return self.compare(video, frame, hidden[valid], ctx)

    def compare(self, video: Tensor, frame: Tensor, hidden: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        """Return the cluster term of tokens that show the same places.

        Args:
            video: (n, E) of the video branch.
            frame: (n, E) of the frame teacher.
            hidden: (n,) bool, hidden from the video branch; for the monitors.
            ctx: The step.
        """
        assert self.prototypes is not None
        with torch.autocast(video.device.type, enabled=False):
            scores = [self.prototypes(functional.normalize(_float(z), dim=1)) for z in (video, frame.detach())]
            balanced = [sinkhorn(s.detach(), epsilon=self.epsilon, iterations=self.sinkhorn_iterations) for s in scores]
            labels = [q.argmax(dim=1) for q in balanced]
            count = torch.tensor(len(video), device=video.device)
            of_video, of_frame = (
                ctx.mean(functional.cross_entropy(s / self.cluster_temperature, a, reduction="sum"), "tokens", count)
                for s, a in zip(scores, reversed(labels))
            )
        if not self._counted:
            self._counted = True
            sentence = prototype_sentence(int(sum_ranks(count)), self.prototypes.count)
            if sentence:
                logger.warning(sentence)
        with torch.no_grad():
            same = scores[0].argmax(dim=1) == scores[1].argmax(dim=1)
            sums = sum_ranks(torch.stack([same.sum(), (same & hidden).sum(), hidden.sum(), count]).double())
            visible = (sums[0] - sums[1]) / (sums[3] - sums[2]).clamp_min(1)
            seen = usage(balanced[1])
            monitors = {
                "cluster_agreement": sums[0] / sums[3].clamp_min(1),
                "cluster_agreement_hidden": sums[1] / sums[2].clamp_min(1),
                "cluster_agreement_visible": visible,
                "cluster_used": seen["used"],
                "cluster_sharpness": seen["sharpness"],
            }
        return {
            "loss_cluster": of_video + of_frame,
            "loss_cluster_video": of_video.detach(),
            "loss_cluster_frame": of_frame.detach(),
            **{name: value.float() for name, value in monitors.items()},
        }

    @torch.no_grad()
    def assignments(self, views: Views) -> dict[str, Tensor]:
        """Return pictures for the report: which prototype is nearest, place by place, in both branches; needs the term `cluster`.

        Returns:
            `input` (M, C, T, H, W); `mask` (M, t, h, w) bool, True = hidden from the video branch; `video` and `frame` (M, t, h, w) int64,
            numbers of prototypes, -1 where a token is not valid.
        """
        if self.prototypes is None:
            raise RequestError("assignments need the term cluster; add it to the objective's weights")
        clips = self.clips(views)
        mask = clips.hidden(self.mask_ratio, 1)[:, 0]
        keep = visible_indices(mask)
        _, tokens = self.encoder.masked(clips.video, keep[:, None], clips.pixels)
        found = {"video": self.decoded(tokens[:, 0], keep, clips.tokens), "frame": self.frame_features(clips)}
        nearest = {
            name: self.prototypes(functional.normalize(_float(z).flatten(0, 1), dim=1)).argmax(dim=1).reshape(clips.tokens.shape)
            for name, z in found.items()
        }
        maps = {name: rows.masked_fill(~clips.tokens, -1).reshape(mask.shape) for name, rows in nearest.items()}
        return {"input": clips.video, "mask": mask, **maps}

    def _note_health(self, parts: dict[str, Tensor]) -> None:
        """Keep what tells a collapse: smallest spread, smallest entropy of targets, and how many rows that was."""
        terms = list(self.heads)
        rows = {term: parts.pop(f"{term}_rows") for term in terms}
        if self.training and terms:
            worst = [torch.stack([parts[f"{t}_spread"], parts[f"{t}_teacher_entropy"], rows[t]]) for t in terms]
            self._health.append(torch.stack(worst))

    @torch.no_grad()
    def after_step(self, ctx: StepContext) -> None:
        """Put prototypes back on the sphere, move centres, and look for a collapse.

        Raises:
            TrainingStopped: The class tokens of a batch have been alike, with uniform targets, for too long.
        """
        if self.prototypes is not None:
            self.prototypes.normalise()
        for running in (*self.centres.values(), *self.standards.values()):
            running.update()  # type: ignore[operator]
        health, self._health = self._health, []
        if not health:
            return
        found = sum_ranks(torch.stack(health).mean(dim=0)) / ctx.world_size
        known = [row for row in found.tolist() if row[2] >= ALARM_ROWS]
        if not known:
            return
        spread, entropy, _ = min(known)
        if self.alarm.update(float(spread < SPREAD and entropy > UNIFORM), 1.0, ctx.step, ctx.epoch):
            raise TrainingStopped(
                f"step {ctx.step}: the class tokens of a batch are alike (spread {spread:.2g} of 1 / sqrt(E), limit {SPREAD}) and the "
                f"teacher's targets uniform, for more than {self.alarm.epochs} epochs: they have collapsed. The last checkpoint is safe. "
                "Try a lower optim.lr, more warm-up, a larger batch, fewer head_prototypes, or a stage of the cluster term alone "
                "(loss_weights: {video: 0, image: 0}) first"
            )

    def exported(self) -> dict[str, Part]:
        """The encoders: `encoder`, the video branch that `export` names; the other one under its name; the frame encoder of the teacher."""
        modules: dict[str, Any] = {"video_student": self.encoder}
        if "encoder" in self.teacher:
            modules["video_teacher"] = self.teacher["encoder"]
        modules = {"encoder": modules.pop(self.export), **modules}
        if "image" in self.weights:
            modules["image_teacher"] = self.teacher["frame_encoder"]
        parts = {name: clip_part(module, name, self.view_specs[self.view]) for name, module in modules.items()}
        parts["encoder"].manifest["branch"] = self.export
        return parts


def _float(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _check_terms(given: Mapping[str, float]) -> None:
    unknown = [term for term in given if term not in TERMS]
    if unknown:
        raise RequestError(f"weights names {unknown[0]}{near(unknown[0], TERMS)}; accepted: {', '.join(TERMS)}")
    if any(weight < 0 for weight in given.values()) or not {"video", "cluster"} & {t for t, w in given.items() if w}:
        raise RequestError(
            f"weights is {dict(given)}; accepted: 0 or more, with video or cluster above 0: else no video encoder is trained"
        )


def _check_temperatures(student: float, teacher: Sequence[float], warmup: float) -> None:
    if len(teacher) != 2 or not 0 < teacher[0] <= teacher[1] < student:
        raise RequestError(
            f"teacher_temperature is {list(teacher)} with student_temperature {student}; accepted: [first, last] with 0 < first <= last < "
            "student_temperature, for instance [0.04, 0.07] with 0.1: targets that are not sharper than predictions teach nothing"
        )
    if not 0 <= warmup <= 1:
        raise RequestError(f"temperature_warmup is {warmup}; accepted: 0 to 1, a share of the run")


def _check_numbers(mask_ratio: float, masked_views: int, frames: int, teacher_momentum: float, centre_momentum: float) -> None:
    if not 0 < mask_ratio < 1:
        raise RequestError(f"mask_ratio is {mask_ratio}; accepted: between 0 and 1, for instance 0.9")
    if masked_views < 1 or frames < 1:
        raise RequestError(f"masked_views is {masked_views} and frames {frames}; accepted: 1 or more of each")
    for name, value in (("teacher_momentum", teacher_momentum), ("centre_momentum", centre_momentum)):
        if not 0 <= value < 1:
            raise RequestError(
                f"{name} is {value}; accepted: 0 to below 1, for instance 0.996 for the teachers and 0.9 for the centres"
            )
