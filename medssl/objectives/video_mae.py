"""VideoMAE: most tubes of a clip are hidden, a small decoder paints their normalised pixels.

A step brings, for a view named `clip`, `clip` (B, V, T, C, H, W) and `meta.valid["clip"]` (B, V, T, H, W): what lies outside the sector or
in frames that were filled in is no target, and no key in attention. Masks are those of the views (`clip_mask`) or are drawn here.

Reference:
    Tong et al. 2022, "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video Pre-Training", section 3;
    Feichtenhofer et al. 2022 (masking at random in space and time). We differ: means and deviations of a target patch are over its valid
    pixels, with a floor, since patches at the rim of a sector are nearly constant; the loss is divided by the hidden, valid pixels of the
    whole step over all ranks; there is a class token; outputs come back to the order of the grid before they meet the targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.errors import RequestError, near
from medssl.layers.pos_embed import sincos_positions
from medssl.layers.tokens import flatten_tokens, patchify, unpatchify, visible_indices
from medssl.layers.transformer import MaskedDecoder
from medssl.layers.tube_mask import tube_pattern
from medssl.objectives._clips import Clips, clip_part, clip_spec, clips_of
from medssl.seeding import counter_rng
from medssl.types import Part, StepContext, Views, ViewSpec


def patch_statistics(rows: Tensor, valid: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of the valid pixels of every patch.

    Args:
        rows: (M, N, C, P) pixels.
        valid: (M, N, 1, P) bool.
        floor: Smallest deviation.

    Returns:
        Each (M, N, C, 1): the mean, and the unbiased standard deviation + 1e-6. A patch without valid pixels has 0 and `floor`.
    """
    count = valid.sum(dim=-1, keepdim=True)
    mean = (rows * valid).sum(dim=-1, keepdim=True) / count.clamp_min(1)
    variance = ((rows - mean).square() * valid).sum(dim=-1, keepdim=True) / (count - 1).clamp_min(1)
    return mean, variance.sqrt().clamp_min(floor) + 1e-6


def low_pass(video: Tensor, valid: Tensor, sigma: float) -> Tensor:
    """Blur every frame with a Gaussian, over valid pixels only.

    Args:
        video: (M, C, T, H, W).
        valid: (M, T, H, W) bool.
        sigma: Standard deviation in pixels; 0 returns the clip itself.
    """
    if sigma == 0:
        return video
    reach = max(math.ceil(3 * sigma), 1)
    places = torch.arange(-reach, reach + 1, dtype=video.dtype, device=video.device)
    kernel = torch.exp(-0.5 * (places / sigma).square())
    weight = valid[:, None].to(video.dtype)
    planes = torch.cat([video * weight, weight], dim=1)  # (M, C + 1, T, H, W)
    shape, count = planes.shape, math.prod(planes.shape[:3])
    planes = planes.reshape(1, count, *shape[3:])  # as channels of one picture: a much faster kernel on a CPU
    for axes in ((1, 1, -1, 1), (1, 1, 1, -1)):
        taps = (kernel / kernel.sum()).reshape(axes).expand(count, -1, -1, -1)
        planes = functional.conv2d(planes, taps, padding="same", groups=count)
    planes = planes.reshape(shape)
    return planes[:, :-1] / planes[:, -1:].clamp_min(1e-6)


class VideoMAE(nn.Module):
    """Masked autoencoder of clips; see the module's docstring.

    Args:
        encoder: `video_vit`, or another encoder of clips that drops tokens.
        view_specs: Views of the run; one kind of clips.
        mask_ratio: Hidden share of the places (of the tokens, where `masking` is `random`).
        masking: `tube` hides one pattern in all tubelets; `random` hides tokens anywhere in space and time (ST-MAE).
        decoder_dim: Width of the decoder; None takes half of the encoder's.
        decoder_depth: Its blocks.
        decoder_heads: Its heads; None takes one for every 64 channels.
        norm_target: Standardise every patch of the target, each channel by its own mean and deviation.
        std_floor: Smallest deviation of a target patch, in units of the views.
        smooth_target: Blur the target by this many pixels: speckle is most of a patch's variance, and is not worth painting.
    """

    needs = ("takes_clips",)

    def __init__(
        self,
        encoder: Any,
        *,
        view_specs: Mapping[str, ViewSpec],
        mask_ratio: float = 0.9,
        masking: Literal["tube", "random"] = "tube",
        decoder_dim: int | None = None,
        decoder_depth: int = 4,
        decoder_heads: int | None = None,
        norm_target: bool = True,
        std_floor: float = 1e-3,
        smooth_target: float = 0.0,
    ) -> None:
        super().__init__()
        _check(mask_ratio, masking, std_floor, smooth_target)
        self.view, spec = clip_spec(view_specs, encoder, "video_mae")
        self.view_specs = {self.view: spec}
        self.encoder = encoder
        self.mask_ratio, self.masking = mask_ratio, masking
        self.norm_target, self.std_floor, self.smooth_target = norm_target, std_floor, smooth_target
        self.patch = tuple(encoder.patch_size)
        self.grid = tuple(n // p for n, p in zip(spec.size, self.patch))
        width = decoder_dim or encoder.embed_dim // 2
        heads = decoder_heads or max(width // 64, 1)
        out = encoder.in_channels * prod(self.patch)
        self.decoder = MaskedDecoder(encoder.embed_dim, width=width, depth=decoder_depth, heads=heads, out=out)
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(self.grid, width), persistent=False)

    def inputs(self, views: Views) -> tuple[Clips, Tensor]:
        """Return the clips and their masks (M, T, h, w), True = hidden."""
        clips = clips_of(views, self.view, self.patch, getattr(self.encoder, "valid_share", 0.25))
        if self.masking == "tube":
            return clips, clips.hidden(self.mask_ratio, 1)[:, 0]
        real = clips.tokens.cpu().numpy()
        rows = [tube_pattern(flags, self.mask_ratio, counter_rng(*seed, "mask")) for flags, seed in zip(real, clips.seeds)]
        return clips, torch.from_numpy(np.stack(rows)).to(clips.tokens.device).reshape(-1, *clips.grid)

    def scored(self, clips: Clips, mask: Tensor) -> Tensor:
        """Return which pixels the loss is over, (M, N, 1, P) bool: hidden, and valid, in a valid token."""
        hidden = flatten_tokens(mask[:, None])[..., 0] & clips.tokens
        return (patchify(clips.pixels[:, None], self.patch) & hidden[..., None])[:, :, None]

    @torch.no_grad()
    def target(self, clips: Clips) -> tuple[Tensor, Tensor, Tensor]:
        """Return the target rows (M, N, C, P), and the mean and deviation (M, N, C, 1) that were taken out (0 and 1 without `norm_target`)."""
        video = clips.video.to(torch.promote_types(clips.video.dtype, torch.float32))
        video = low_pass(video, clips.pixels, self.smooth_target)
        rows = patchify(video, self.patch).reshape(*clips.tokens.shape, video.shape[1], -1)
        if not self.norm_target:
            return rows, torch.zeros_like(rows[..., :1]), torch.ones_like(rows[..., :1])
        valid = patchify(clips.pixels[:, None], self.patch)[:, :, None]
        mean, deviation = patch_statistics(rows, valid, self.std_floor)
        return (rows - mean) / deviation, mean, deviation

    def predict(self, clips: Clips, mask: Tensor) -> Tensor:
        """Return what is painted, (M, N, C, P), for every token in the order of the grid."""
        keep = visible_indices(mask)
        _, tokens = self.encoder.masked(clips.video, keep[:, None], clips.pixels)
        rows = self.decoder(tokens[:, 0], keep, self.positions, clips.tokens)
        return rows.reshape(*clips.tokens.shape, clips.video.shape[1], -1)  # type: ignore[no-any-return]

    def denominators(self, views: Views) -> dict[str, Tensor]:
        """Return the number of scored values of a micro-batch."""
        clips, mask = self.inputs(views)
        return {"voxels": self.scored(clips, mask).sum() * clips.video.shape[1]}

    def forward(self, views: Views, ctx: StepContext) -> dict[str, Tensor]:
        """Return `loss`, the squared error over hidden valid pixels, and `loss_of_mean`, that of painting every patch with its mean."""
        clips, mask = self.inputs(views)
        prediction = self.predict(clips, mask)
        target, _, _ = self.target(clips)
        weight = self.scored(clips, mask)
        with torch.autocast(prediction.device.type, enabled=False):
            error = (prediction.to(target.dtype) - target).square()
            count = weight.sum() * target.shape[2]
            loss = ctx.mean((error * weight).sum(), "voxels", count)
            of_mean = ((target - target.mean(dim=-1, keepdim=True) * (not self.norm_target)).square() * weight).sum()
        return {"loss": loss, "loss_of_mean": of_mean.detach() / count.clamp_min(1)}

    @torch.no_grad()
    def reconstruct(self, views: Views) -> dict[str, Tensor]:
        """Return pictures for the report: `input`, `masked`, `output` (M, C, T, H, W) and `mask` (M, T, H, W).

        `output` shows what is painted at hidden patches and the input elsewhere; normalised targets are scaled back by the statistics of
        the true patch.
        """
        clips, mask = self.inputs(views)
        _, mean, deviation = self.target(clips)
        rows = (self.predict(clips, mask).to(mean.dtype) * deviation + mean).flatten(2)
        painted = unpatchify(rows, clips.grid, self.patch, clips.video.shape[1])
        hidden = flatten_tokens(mask[:, None]).expand(-1, -1, prod(self.patch))
        pixels = unpatchify(hidden, clips.grid, self.patch)
        blank = clips.video.amin(dim=(1, 2, 3, 4), keepdim=True)
        return {
            "input": clips.video,
            "masked": torch.where(pixels, blank, clips.video),
            "output": torch.where(pixels & clips.pixels[:, None], painted, clips.video.to(painted.dtype)),
            "mask": pixels[:, 0],
        }

    def exported(self) -> dict[str, Part]:
        """The encoder alone."""
        return {"encoder": clip_part(self.encoder, "encoder", self.view_specs[self.view])}


def _check(mask_ratio: float, masking: str, std_floor: float, smooth_target: float) -> None:
    if not 0 < mask_ratio < 1:
        raise RequestError(f"mask_ratio is {mask_ratio}; accepted: between 0 and 1, for instance 0.9")
    if masking not in ("tube", "random"):
        raise RequestError(f'masking is "{masking}"{near(masking, ("tube", "random"))}; accepted: tube, random')
    if std_floor < 0 or smooth_target < 0:
        raise RequestError(f"std_floor is {std_floor} and smooth_target {smooth_target}; accepted: 0 or more")
