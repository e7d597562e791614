"""Alice: crops of one anatomical place in two patients are positives, patches are aligned by cross-attention, hidden blocks are painted.

Three terms, for a pair of crops v = A, B of sample i, student s and teacher t (an exponential moving average that sees whole crops):

- `cls`, global and across views: 1/2 sum over u != v of H(softmax((z^t_u - c) / T_t), softmax(z^s_v / T_s)), z the logits of the pooled
  features;
- `patch`, within a view: 1/2 sum over v of the mean over tokens k of H(softmax((a^t_vk - c') / T_t), softmax(a^s_vk / T_s)), a the logits
  of encoder tokens after alignment with the tokens of the first decoder stage (CASA);
- `rec`: the squared error over hidden voxels of both views.

H(p, q) = -sum p log q, the teacher's side without gradient. c and c' are running means of the teacher's logits.

What a step brings, for a view named `volume`:

- `volume` (B, 2, C, X, Y, Z): crop A of item i, and crop B of its partner: the same place of another patient, the same size in mm;
- `volume_mask` (B, 2, *grid) bool, True = hidden, each crop its own;
- `volume_pair_weight` (B,), optional, 0 to 1: max(0, (s - 0.5) / 0.5) of the match score s. A pair of weight w counts as w pairs in every
  term, in the centres and in the denominators, so that weight 0 is as if the pair were not there. Without the key every pair counts 1;
- `meta.valid["volume"]` (B, 2, X, Y, Z): padding is no target; a pair of which one crop holds nothing real counts 0.

How pairs are made is the sampler's business: two looks at one crop (`views.count: 2`), two crops of one volume, matched or random ones.

Reference:
    Jiang et al. 2023, "Anatomical Invariance Modeling and Semantic Alignment for Self-supervised Learning in 3D Medical Image Analysis"
    (ICCV, arXiv 2302.05615). We differ where the published settings cannot work: masks are three-dimensional and per crop, hidden voxels
    are marked by a mask token or channel and alone are scored, the teacher's temperatures are other ones, every sample of a batch has its own
    partner, CASA is in the checkpoints. The teacher has a CASA of its own, averaged like the rest, and asks with its own tokens: one module
    for both, asked by the student twice, makes targets that follow the student at once and are one-hot after some thirty steps. The
    teacher's head is built as the student's (the public code shares one last layer between cls and patches in the teacher only, which no
    average of two can be). CASA's last norm starts with gain 1 / sqrt(K), so that its logits start with length 1 as those of the head do;
    at gain 1 the teacher's targets are one-hot from the first step. Heads start as those of DINO do. What enters the heads is standardised
    over the micro-batch. The decay of weights does not rise during the run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.errors import RequestError, TrainingStopped, near
from medssl.layers.distillation import Centre, UnitLinear, cross_entropy, entropy_share, information, start_small, unit_spread
from medssl.layers.pos_embed import sincos_positions
from medssl.layers.prototypes import StuckAlarm
from medssl.layers.sinkhorn import sum_ranks
from medssl.layers.standardise import standardised
from medssl.layers.tokens import flatten_tokens, unpatchify
from medssl.objectives._unused import freeze_unused
from medssl.objectives.mae_cnn import repeat_mask
from medssl.types import EncoderOutput, Part, StepContext, Views, ViewSpec

TERMS = ("cls", "patch", "rec")
TEMPERATURES = {"cls": (0.02, 0.02), "patch": (0.04, 0.07)}
"""T_t by term. With 0.04 to 0.07 for both, global targets became uniform; with 0.02 for both, targets of patches were one-hot and foretold."""
SPREAD = 0.3
"""Std of unit-length features over a batch, in units of 1 / sqrt(E), below which they are alike. Convolutions start below it."""
INFORMATION = 0.01
"""What targets tell the rows of a batch apart by, as a share of ln K, below which they teach nothing."""
ALARM_ROWS = 8
"""Fewer features than this say nothing about a spread."""


def _in_pairs(x: Tensor) -> Tensor:
    """View rows (2 B, ...) as (B, 2, ...)."""
    return x.reshape(-1, 2, *x.shape[1:])


class DistillationHead(nn.Module):
    """Logits of pooled features, of encoder tokens and of decoder tokens.

    Args:
        dim: Width of encoder tokens.
        context_dim: Width of decoder tokens; None when they are not used.
        hidden: Width of the shared MLP.
        bottleneck: Its output, brought to length 1.
        prototypes: K.
        terms: Which of `cls` and `patch` need logits.
    """

    def __init__(
        self, dim: int, context_dim: int | None, *, hidden: int, bottleneck: int, prototypes: int, terms: Sequence[str]
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, dim)
        self.embed_context = nn.Linear(context_dim, dim) if context_dim else None
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        start_small(self)
        self.last = nn.ModuleDict({term: UnitLinear(bottleneck, prototypes) for term in terms if term != "rec"})

    def forward(self, x: Tensor, term: str, *, context: bool = False, frozen: bool = False) -> Tensor:
        """Return the logits (..., K) of features (..., E).

        Args:
            x: Pooled features, encoder tokens or decoder tokens.
            term: `cls` or `patch`.
            context: Whether these are decoder tokens.
            frozen: See `UnitLinear`.
        """
        embed = self.embed_context if context and self.embed_context is not None else self.embed
        z = self.mlp(embed(x))
        z = functional.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)
        return self.last[term](z, frozen=frozen)  # type: ignore[no-any-return]


class ConditionalAlignment(nn.Module):
    """CASA: one block of cross-attention, post-norm. Encoder tokens ask, decoder tokens answer; both as logits.

    Args:
        dim: K, the width of the logits.
        heads: Attention heads; must divide `dim`.
        hidden: Width of the feed-forward layer.
        dropout: Rate, in training only. With it a changed number of processes changes results.
    """

    def __init__(self, dim: int, *, heads: int = 8, hidden: int = 2048, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.norm_attention = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norm = nn.LayerNorm(dim)
        nn.init.constant_(self.norm.weight, dim**-0.5)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Align.

        Args:
            queries: (M, N, K).
            context: (M, T, K).

        Returns:
            (M, N, K).
        """
        rate = self.dropout if self.training else 0.0
        q, k, v = (self._split(layer(x)) for layer, x in ((self.query, queries), (self.key, context), (self.value, context)))
        found = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm_attention(queries + functional.dropout(self.out(found), rate))
        return self.norm(x + functional.dropout(self.mlp(x), rate))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


class TokenDecoder(nn.Module):
    """A small decoder for encoders without one: what it makes of the tokens is the context, and is painted from.

    Args:
        dim: Width of encoder tokens.
        grid: Token grid.
        width: Width of the decoder.
        depth: Transformer blocks.
        heads: Attention heads.
    """

    def __init__(self, dim: int, grid: Sequence[int], *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(grid, width), persistent=False)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (M, N, width) of (M, N, dim)."""
        x = self.embed(tokens)
        x = x + self.positions.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]


class Alice(nn.Module):
    """Cross-patient self-distillation with aligned patches and masked reconstruction; see the module's docstring.

    Args:
        encoder: `swin3d`, `segresnet3d` (their own decoders give context and reconstruction) or `vit3d` (a decoder of this objective).
        image_size: Size (X, Y, Z) of the crops in voxels.
        spacing_mm: Spacing of the crops. None keeps each item's own: two crops then differ in size where their items differ in spacing.
        view: Key of the views.
        weights: Terms (`cls`, `patch`, `rec`) and their weights; a term that is left out is not built, and a stage may weigh the others anew
            in `loss_weights`. Default 1, 1 and 10, as published for images in [0, 1]; z-scored images have 10 to 20 times the variance:
            take `{cls: 1, patch: 1, rec: 1}`.
        casa: `cross_attention`, or `none`: encoder tokens are compared as they are.
        casa_heads: Attention heads of CASA; must divide `prototypes`.
        casa_hidden: Width of its feed-forward layer.
        casa_dropout: Its dropout; 0.1 is published.
        prototypes: K, logits of cls and patches.
        head_hidden: Width of the head's MLP.
        bottleneck: Its output.
        student_temperature: T_s.
        teacher_temperature: T_t at the start and after the warm-up, for both terms or by term; far enough below T_s, or targets become
            uniform: near there a student that foretells a share r of its targets has logits r T_s / T_t times as large as the teacher's.
            None is `TEMPERATURES`: the place of a crop of another patient is harder to foretell than a patch of the same crop.
        temperature_warmup: Share of the run over which T_t rises.
        standardise: Bring the channels of what enters the heads to mean 0 and variance 1 over the micro-batch of all processes, see
            `standardised`. False is the published form.
        teacher_momentum: Momentum of the teacher at the start; it ends at 1.
        centre_momentum: Momentum of the centres.
        frozen_epochs: First epochs in which the last layers stay as they are.
        recon_region: `masked` scores hidden voxels only, `all` every valid voxel.
        decoder_dim: Width of the decoder for encoders without one.
        decoder_depth: Its blocks.
        decoder_heads: Its attention heads.
        export: Whose encoder is exported: `student` or `teacher`.
        alarm: Changes to `StuckAlarm` of the collapse monitor: epochs, steps.
    """

    needs = ("marks_hidden",)
    pairs = ("matched", "same_volume", "random")
    looks = True

    def __init__(
        self,
        encoder: Any,
        *,
        image_size: tuple[int, ...],
        spacing_mm: tuple[float, ...] | None = None,
        view: str = "volume",
        weights: Mapping[str, float] | None = None,
        casa: Literal["cross_attention", "none"] = "cross_attention",
        casa_heads: int = 8,
        casa_hidden: int = 2048,
        casa_dropout: float = 0.0,
        prototypes: int = 512,
        head_hidden: int = 2048,
        bottleneck: int = 256,
        student_temperature: float = 0.1,
        teacher_temperature: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
        temperature_warmup: float = 0.1,
        standardise: bool = True,
        teacher_momentum: float = 0.996,
        centre_momentum: float = 0.9,
        frozen_epochs: int = 1,
        recon_region: Literal["masked", "all"] = "masked",
        decoder_dim: int = 192,
        decoder_depth: int = 1,
        decoder_heads: int = 6,
        export: Literal["student", "teacher"] = "student",
        alarm: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        given = {"cls": 1.0, "patch": 1.0, "rec": 10.0} if weights is None else weights
        self.weights = {term: float(weight) for term, weight in given.items() if weight}
        _check_terms(given, self.weights)
        temperatures = _by_term(teacher_temperature)
        for term in TEMPERATURES:
            _check_temperatures(student_temperature, temperatures[term], temperature_warmup)
        _check_numbers(teacher_momentum, centre_momentum, casa, casa_heads, prototypes, recon_region, export)
        aligned = "patch" in self.weights and casa == "cross_attention"
        decoded = encoder.has_decoder and (aligned or "rec" in self.weights)
        encoder.check_decoder(image_size) if decoded else encoder.check_size(image_size)
        self.encoder = encoder
        self.view = view
        self.view_specs = {view: ViewSpec("volume", tuple(image_size), spacing_mm, 2)}
        self.student_temperature = student_temperature
        self.teacher_temperature = {term: (float(first), float(last)) for term, (first, last) in temperatures.items()}
        self.temperature_warmup = temperature_warmup
        self.teacher_momentum = teacher_momentum
        self.frozen_epochs, self.recon_region, self.export = frozen_epochs, recon_region, export
        self.patch = tuple(encoder.patch_size)
        self.grid = tuple(n // p for n, p in zip(image_size, self.patch))
        self.own_decoder = not encoder.has_decoder
        self.mask_stem = encoder.mask_stem()
        self.decoder: TokenDecoder | None = None
        if self.own_decoder and (aligned or "rec" in self.weights):
            self.decoder = TokenDecoder(encoder.embed_dim, self.grid, width=decoder_dim, depth=decoder_depth, heads=decoder_heads)
        context_dim = decoder_dim if self.own_decoder else encoder.context_dim
        self.head = DistillationHead(
            encoder.embed_dim,
            context_dim if aligned else None,
            hidden=head_hidden,
            bottleneck=bottleneck,
            prototypes=prototypes,
            terms=tuple(self.weights),
        )
        self.casa = (
            ConditionalAlignment(prototypes, heads=casa_heads, hidden=casa_hidden, dropout=casa_dropout) if aligned else None
        )
        self.paint = self._painter(decoder_dim) if "rec" in self.weights else None
        if not self.own_decoder and "rec" not in self.weights:
            freeze_unused(encoder, image_size, lambda output: self._reached(output, image_size))
        self.teacher = nn.ModuleDict({name: copy.deepcopy(module) for name, module in self._averaged().items()})
        self.teacher.requires_grad_(False)
        self.centres = nn.ModuleDict({term: Centre(prototypes, centre_momentum) for term in self.head.last})
        self.standardise = standardise
        self.alarm = StuckAlarm(**{"share": 0.5, **(alarm or {})})  # type: ignore[arg-type]
        self._health: list[Tensor] = []
        self._step = -1

    def _averaged(self) -> dict[str, nn.Module]:
        """The student's modules that the teacher has too."""
        found = {"encoder": self.encoder, "decoder": self.decoder, "head": self.head, "casa": self.casa}
        return {name: module for name, module in found.items() if module is not None}

    def _painter(self, decoder_dim: int) -> nn.Module:
        if self.own_decoder:
            return nn.Linear(decoder_dim, self.encoder.in_channels * math.prod(self.patch))
        filters = self.encoder.init_filters
        return nn.Sequential(
            nn.GroupNorm(math.gcd(8, filters), filters), nn.ReLU(), nn.Conv3d(filters, self.encoder.in_channels, 1)
        )

    def _reached(self, output: EncoderOutput, image_size: Sequence[int]) -> list[Tensor]:
        """What the loss depends on where nothing is painted."""
        if self.casa is None:
            return [output.tokens]
        image = output.tokens.new_zeros(1, self.encoder.in_channels, *image_size)
        return [output.tokens, next(self.encoder.decode(output.pyramid, image))]

    def train(self, mode: bool = True) -> Alice:
        """Set training mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def schedules(self, step: int, steps: int) -> dict[str, float]:
        """Return the teacher's momentum (half a cosine up to 1) and temperatures (linear over their warm-up) at a step of the run."""
        progress = step / max(steps - 1, 1)
        risen = min(progress / self.temperature_warmup, 1.0) if self.temperature_warmup > 0 else 1.0
        momentum = 1.0 - (1.0 - self.teacher_momentum) * 0.5 * (1.0 + math.cos(math.pi * progress))
        temperatures = {
            f"teacher_temperature_{term}": first + (last - first) * risen
            for term, (first, last) in self.teacher_temperature.items()
        }
        return {"teacher_momentum": momentum, **temperatures}

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module, str]]:
        """Encoder, decoder, head and CASA of the student, their counterparts, and the schedule."""
        return [(module, self.teacher[name], "teacher_momentum") for name, module in self._averaged().items()]

    def encode(self, x: Tensor, hidden: Tensor | None, *, paint: bool) -> tuple[EncoderOutput, Tensor | None, Tensor | None]:
        """Encode and decode crops.

        Args:
            x: (M, C, X, Y, Z).
            hidden: (M, 1, X, Y, Z) bool for the student; None is the teacher, who sees all.
            paint: Whether to reconstruct.

        Returns:
            Encoder output, context tokens (M, T, E') where they are used, reconstruction (M, C, X, Y, Z) where asked for.
        """
        teacher = hidden is None
        encoder: Any = self.teacher["encoder"] if teacher else self.encoder
        extra = None if hidden is None else self.mask_stem(hidden.to(x.dtype))
        shown = x if hidden is None else x.masked_fill(hidden, 0.0)
        output = encoder.forward_features(shown, stem_extra=extra)
        if not paint and self.casa is None:
            return output, None, None
        if self.own_decoder:
            context = (self.teacher["decoder"] if teacher else self.decoder)(output.tokens)  # type: ignore[misc]
            if not paint or self.paint is None:
                return output, context, None
            return output, context, unpatchify(self.paint(context), self.grid, self.patch, x.shape[1])
        stages = encoder.decode(output.pyramid, shown)
        finest = first = next(stages)
        context = flatten_tokens(first)
        if not paint or self.paint is None:
            return output, context, None
        for finest in stages:  # noqa: B007
            pass
        return output, context, self.paint(finest)

    def inputs(self, views: Views) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return crops (B, 2, C, X, Y, Z), hidden (B, 2, 1, X, Y, Z), valid (B, 2, 1, X, Y, Z) and pair weights (B,).

        Raises:
            RequestError: The views are no pairs, or have no masks.
        """
        x = views[self.view]
        if x.shape[1] != 2:
            raise RequestError(
                f"source {views.meta.source} brings {x.shape[1]} view(s) of {self.view} per item; alice compares pairs of crops: set "
                "views.count: 2 (two looks at one crop), or a sampler that draws pairs"
            )
        if f"{self.view}_mask" not in views:
            raise RequestError(
                f"source {views.meta.source} brings no {self.view}_mask; alice hides blocks: set views.mask, for instance "
                "{ratio: 0.75, cell: 16}"
            )
        mask = views[f"{self.view}_mask"].flatten(0, 1)
        hidden = _in_pairs(repeat_mask(mask, tuple(x.shape[3:])))
        valid = views.meta.valid[self.view][:, :, None]
        pairs = views.data.get(f"{self.view}_pair_weight")
        weight = torch.ones(len(x), device=x.device) if pairs is None else pairs.reshape(len(x))
        return x, hidden, valid, weight * valid.flatten(2).any(dim=2).all(dim=1)

    def denominators(self, views: Views) -> dict[str, Tensor]:
        """Return the pairs and the scored voxels of a micro-batch, both by pair weight."""
        _, hidden, valid, weight = self.inputs(views)
        counts = {"pairs": weight.sum()}
        if "rec" in self.weights:
            counts["voxels"] = self._scored(hidden, valid, weight).sum()
        return counts

    def _scored(self, hidden: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        """Return the weight of each voxel in the reconstruction, (B, 2, 1, X, Y, Z)."""
        scored = valid & hidden if self.recon_region == "masked" else valid
        return scored.to(weight.dtype) * weight[:, None, None, None, None, None]

    def forward(self, views: Views, ctx: StepContext) -> dict[str, Tensor]:
        """Return `loss`, the weighted sum of the terms, the terms `loss_*`, and monitors.

        `cls_spread` is the std over the batch of pooled features of length 1, times sqrt(E): 1 when they point everywhere, 0 when they are
        alike. `<term>_centre_entropy`, `<term>_teacher_entropy` and `<term>_information` are shares of ln K: the first nears 0 when one
        prototype takes everything, the second nears 1 when targets are uniform and 0 when they are one-hot, the third nears 0 when targets
        say the same of every crop or patch. A run that stays below a spread of 0.3 with targets that say the same is stopped.
        """
        unknown = [name for name in ctx.loss_weights if name not in self.weights]
        if unknown:
            raise RequestError(
                f"loss_weights: no term {unknown[0]} here{near(unknown[0], self.weights)}; "
                f"built: {', '.join(self.weights)}; add it to the objective's weights"
            )
        x, hidden, valid, weight = self.inputs(views)
        temperature = {
            term: ctx.schedules.get(f"teacher_temperature_{term}", first) for term, (first, _) in self.teacher_temperature.items()
        }
        if self._step != ctx.step:
            self._health, self._step = [], ctx.step
            for centre in self.centres.values():
                centre.reset()  # type: ignore[operator]
        output, context, painted = self.encode(x.flatten(0, 1), hidden.flatten(0, 1), paint="rec" in self.weights)
        with torch.no_grad():
            target, target_context, _ = self.encode(x.flatten(0, 1), None, paint=False)
        parts: dict[str, Tensor] = {}
        frozen = ctx.epoch < self.frozen_epochs
        if "cls" in self.weights:
            parts |= self._cls(output, target, weight, temperature["cls"], ctx, frozen)
        if "patch" in self.weights:
            parts |= self._patch(output, context, target, target_context, valid, weight, temperature["patch"], ctx, frozen)
        if painted is not None:
            scored = self._scored(hidden, valid, weight)
            kind = torch.promote_types(x.dtype, torch.float32)
            error = (_in_pairs(painted).to(kind) - x.to(kind)).square().mean(dim=2, keepdim=True)  # over channels
            parts["loss_rec"] = ctx.mean((error * scored).sum(), "voxels", scored.sum())
        parts["cls_spread"], rows = unit_spread(output.pooled, weight.repeat_interleave(2))
        if self.training:
            told = [value for name, value in parts.items() if name.endswith("_information")]
            self._health.append(torch.stack([parts["cls_spread"], torch.stack(told).max(), rows]))
        total = torch.stack([ctx.loss_weights.get(term, w) * parts[f"loss_{term}"] for term, w in self.weights.items()]).sum()
        return {"loss": total, **parts}

    def _standard(self, x: Tensor, weight: Tensor) -> Tensor:
        return standardised(x, weight) if self.standardise else x

    def _cls(
        self, output: EncoderOutput, target: EncoderOutput, weight: Tensor, temperature: float, ctx: StepContext, frozen: bool
    ) -> dict[str, Tensor]:
        both = weight.repeat_interleave(2)
        student = self.head(self._standard(output.pooled, both), "cls", frozen=frozen)
        with torch.no_grad():
            teacher = self.teacher["head"](self._standard(target.pooled, both), "cls")
        student, teacher = _in_pairs(student), _in_pairs(teacher)  # (B, 2, K)
        crossed = self._compare("cls", teacher.flip(1), student, temperature).mean(dim=1)
        loss = ctx.mean((crossed * weight).sum(), "pairs", weight.sum())
        return {"loss_cls": loss, **self._monitors("cls", teacher, weight[:, None].expand(-1, 2), temperature)}

    def _patch(
        self,
        output: EncoderOutput,
        context: Tensor | None,
        target: EncoderOutput,
        target_context: Tensor | None,
        valid: Tensor,
        weight: Tensor,
        temperature: float,
        ctx: StepContext,
        frozen: bool,
    ) -> dict[str, Tensor]:
        # tokens whose cell holds nothing real are left out
        real = functional.max_pool3d(valid.flatten(0, 1).to(weight.dtype), self.patch)
        real = _in_pairs(flatten_tokens(real)[..., 0])  # (B, 2, N)
        rows = (weight[:, None, None] * real).flatten(0, 1)
        student = self.head(self._standard(output.tokens, rows), "patch", frozen=frozen)  # (2 B, N, K)
        with torch.no_grad():
            teacher = self.teacher["head"](self._standard(target.tokens, rows), "patch")
        if context is not None and target_context is not None and self.casa is not None:
            rows = weight.repeat_interleave(2)[:, None].expand(context.shape[:2])
            own = self.head(self._standard(context, rows), "patch", context=True, frozen=frozen)
            student = self.casa(student, own)
            with torch.no_grad():
                seen = self._standard(target_context, rows)
                teacher = self.teacher["casa"](teacher, self.teacher["head"](seen, "patch", context=True))
        teacher, student = _in_pairs(teacher), _in_pairs(student)
        losses = self._compare("patch", teacher, student, temperature)
        crops = (losses * real).sum(dim=2) / real.sum(dim=2).clamp_min(1)  # (B, 2)
        loss = ctx.mean((crops.mean(dim=1) * weight).sum(), "pairs", weight.sum())
        return {"loss_patch": loss, **self._monitors("patch", teacher, weight[:, None, None] * real, temperature)}

    def _compare(self, term: str, teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
        centre: Any = self.centres[term]
        return cross_entropy(teacher, centre.value, temperature, student, self.student_temperature)

    @torch.no_grad()
    def _monitors(self, term: str, teacher: Tensor, weight: Tensor, temperature: float) -> dict[str, Tensor]:
        """Note the teacher's logits (..., K) for the centre, by weight (...); return what their targets look like."""
        centre: Any = self.centres[term]
        if self.training:
            centre.note(teacher.flatten(0, -2), weight.flatten())
        shifted = (teacher - centre.value.to(teacher.dtype)) / temperature
        return {
            f"{term}_centre_entropy": entropy_share(centre.value / temperature),
            f"{term}_teacher_entropy": entropy_share(shifted),
            f"{term}_information": information(shifted, weight),
        }

    @torch.no_grad()
    def after_step(self, ctx: StepContext) -> None:
        """Move centres by what all micro-steps and processes saw, and look for a collapse.

        Raises:
            TrainingStopped: The features of a batch have been alike for too long.
        """
        for centre in self.centres.values():
            centre.update()  # type: ignore[operator]
        health, self._health = self._health, []
        if not health:
            return
        spread, told, rows = (sum_ranks(torch.stack(health).mean(dim=0)) / ctx.world_size).tolist()
        if rows < ALARM_ROWS:
            return
        alike = float(spread < SPREAD and told < INFORMATION)
        if self.alarm.update(alike, 1.0, ctx.step, ctx.epoch):
            raise TrainingStopped(
                f"step {ctx.step}: the pooled features of a batch are alike (spread {spread:.2g} of 1 / sqrt(E), limit {SPREAD}) and the "
                f"teacher's targets say the same of all, for more than {self.alarm.epochs} epochs: they have collapsed. The last checkpoint "
                "is safe. Try a lower optim.lr, more warm-up, a larger batch, a stage of reconstruction alone (loss_weights: {cls: 0, patch: "
                "0}) first, or a lower weight of cls and patch"
            )

    @torch.no_grad()
    def reconstruct(self, views: Views) -> dict[str, Tensor]:
        """Return pictures for the report: `input`, `masked`, `output` (2 B, C, X, Y, Z) and `mask` (2 B, X, Y, Z); needs the term `rec`."""
        x, hidden, _, _ = self.inputs(views)
        x, hidden = x.flatten(0, 1), hidden.flatten(0, 1)
        _, _, painted = self.encode(x, hidden, paint=True)
        blank = x.amin(dim=(1, 2, 3, 4), keepdim=True)
        shown = {"input": x, "masked": torch.where(hidden, blank, x), "mask": hidden[:, 0]}
        return shown if painted is None else {**shown, "output": torch.where(hidden, painted.float(), x.float())}

    def exported(self) -> dict[str, Part]:
        """The encoder of student or teacher, and the network's own decoder where it was trained; head, CASA and centres stay behind."""
        encoder: Any = self.encoder if self.export == "student" else self.teacher["encoder"]
        parts = {"encoder": encoder.part("encoder")}
        if not self.own_decoder and "rec" in self.weights:
            parts["decoder"] = encoder.part("decoder")
        return parts


def _check_terms(given: Mapping[str, float], kept: Mapping[str, float]) -> None:
    unknown = [term for term in given if term not in TERMS]
    if unknown:
        raise RequestError(f"weights names {unknown[0]}{near(unknown[0], TERMS)}; accepted: {', '.join(TERMS)}")
    if any(weight < 0 for weight in kept.values()) or not {"cls", "patch"} & set(kept):
        raise RequestError(
            f"weights is {dict(given)}; accepted: 0 or more, with cls or patch above 0; for reconstruction alone take the objective mae or "
            "mae_cnn"
        )


def _by_term(given: Sequence[float] | Mapping[str, Sequence[float]] | None) -> dict[str, Sequence[float]]:
    """Return [first, last] of each term that has targets.

    Raises:
        RequestError: Another term is named.
    """
    if given is None or isinstance(given, Mapping):
        if unknown := [term for term in given or () if term not in TEMPERATURES]:
            raise RequestError(
                f"teacher_temperature names {unknown[0]}{near(unknown[0], TEMPERATURES)}; accepted: {', '.join(TEMPERATURES)}, or one "
                "[first, last] for both"
            )
        return {**TEMPERATURES, **(given or {})}
    return dict.fromkeys(TEMPERATURES, given)


def _check_temperatures(student: float, teacher: Sequence[float], warmup: float) -> None:
    if len(teacher) != 2 or not 0 < teacher[0] <= teacher[1] < student:
        raise RequestError(
            f"teacher_temperature is {list(teacher)} with student_temperature {student}; accepted: [first, last] with 0 < first <= last < "
            "student_temperature, for instance [0.04, 0.07] with 0.1: targets that are not sharper than predictions teach nothing"
        )
    if not 0 <= warmup <= 1:
        raise RequestError(f"temperature_warmup is {warmup}; accepted: 0 to 1, a share of the run")


def _check_numbers(
    teacher_momentum: float, centre_momentum: float, casa: str, heads: int, prototypes: int, region: str, export: str
) -> None:
    for name, value in (("teacher_momentum", teacher_momentum), ("centre_momentum", centre_momentum)):
        if not 0 <= value < 1:
            raise RequestError(
                f"{name} is {value}; accepted: 0 to below 1, for instance 0.996 for the teacher and 0.9 for the centre"
            )
    for name, word, accepted in (
        ("casa", casa, ("cross_attention", "none")),
        ("recon_region", region, ("masked", "all")),
        ("export", export, ("student", "teacher")),
    ):
        if word not in accepted:
            raise RequestError(f'{name} is "{word}"{near(str(word), accepted)}; accepted: {", ".join(accepted)}')
    if prototypes < 2 or heads < 1 or prototypes % heads:
        raise RequestError(
            f"prototypes is {prototypes} and casa_heads {heads}; accepted: 2 or more prototypes, a multiple of the heads"
        )
