"""Video vision transformer over tubelets, and the same over single frames: one class, two tubelet lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medssl.encoders.base import Encoder
from medssl.layers.pos_embed import resized_places, sincos_at
from medssl.layers.tokens import flatten_tokens, gather_tokens, scatter_tokens, unflatten_tokens, valid_tokens
from medssl.layers.transformer import Block, key_bias, start_like_vit
from medssl.types import EncoderOutput, Part, Stack

TOKEN_ORDER_3D = "n = (t * H + h) * W + w"


@lru_cache(maxsize=16)
def factorised_positions(
    grid: tuple[int, ...], dim: int, table: tuple[int, ...], time: str, device: str, dtype: torch.dtype
) -> Tensor:
    """Return sine-cosine positions of a token grid (T, H, W), the channels shared out over the three axes.

    Args:
        grid: Token grid.
        dim: Channels E.
        table: Grid that the encoder was made for. Other heights and widths span the same picture, so their cells lie between those of the
            table.
        time: `resize` does the same along time; `index` counts, so that a longer clip goes on where a shorter one ends.
        device: Where the table is wanted.
        dtype: Its kind.

    Returns:
        (1, N, E). It is shared: do not write to it.
    """
    places = [resized_places(n, n0) for n, n0 in zip(grid, table)]
    if time == "index":
        places[0] = torch.arange(grid[0], dtype=torch.float64)
    return sincos_at(places, dim).to(device, dtype)


class PatchEmbed(nn.Module):
    """The patch embedding, under timm's name.

    Args:
        in_channels: C.
        dim: E.
        patch: (frames, rows, columns).
    """

    def __init__(self, in_channels: int, dim: int, patch: Sequence[int]) -> None:
        super().__init__()
        frames, rows, columns = patch
        self.proj = nn.Conv3d(in_channels, dim, (frames, rows, columns), (frames, rows, columns))

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, N, E) of clips (B, C, T, H, W)."""
        return flatten_tokens(self.proj(x))


class VideoTransformer(nn.Module):
    """The parameters of a video ViT under timm's names: `cls_token`, `patch_embed.proj`, `blocks`, `norm`. Positions are computed.

    Args:
        in_channels: C.
        dim: E.
        patch: (frames, rows, columns).
        depth: Blocks.
        heads: Attention heads.
        mlp_dim: Width of the MLP.
    """

    def __init__(self, in_channels: int, dim: int, patch: Sequence[int], depth: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = PatchEmbed(in_channels, dim, patch)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        start_like_vit(self)
        nn.init.normal_(self.cls_token, std=0.02)


class VideoViT(Encoder):
    """Video ViT: tubelets of a few frames as tokens, factorised positions, a class token, token dropping, validity.

    What is not valid, outside the sector or in frames that are padding, is set to zero before the embedding, is never computed where whole
    clips are encoded, and is no key for any other token. Its tokens come back as zeros.

    A picture (B, C, H, W) is taken as a clip that stands still for one tubelet.

    Args:
        in_channels: Image channels; grey is 1.
        image_size: (T, H, W): frames and pixels that positions are made for; other sizes interpolate them.
        tubelet: Frames per token; 1 is the frame branch.
        patch_size: Pixels per token, rows and columns.
        hidden_size: Token width E.
        num_layers: Transformer blocks.
        num_heads: Attention heads; must divide `hidden_size`.
        mlp_dim: Width of the MLP; None means 4 * hidden_size.
        pool: `class` gives the class token as the clip's vector, `mean` the mean of the tokens that are valid (and present).
        time_positions: `resize` or `index`, see `factorised_positions`.
        valid_share: Share of a token's pixels that must be valid in each of its frames.

    Reference:
        Dosovitskiy et al. 2021; Arnab et al. 2021 (ViViT), section 3.2, tubelet embedding; Tong et al. 2022 (VideoMAE). Positions differ:
        a one-dimensional table over all tokens of a clip fits no other length or size.
    """

    name = "video_vit"
    library = "medssl.VideoTransformer"
    axis_order = "THW"
    drops_tokens = True
    takes_clips = True
    key_groups = {"encoder": [""], "video_teacher": [""], "video_student": [""], "image_teacher": [""]}  # noqa: RUF012
    net: VideoTransformer

    def __init__(
        self,
        *,
        in_channels: int = 1,
        image_size: Sequence[int] = (64, 112, 112),
        tubelet: int = 2,
        patch_size: int = 16,
        hidden_size: int = 384,
        num_layers: int = 12,
        num_heads: int = 6,
        mlp_dim: int | None = None,
        pool: Literal["class", "mean"] = "class",
        time_positions: Literal["resize", "index"] = "resize",
        valid_share: float = 0.25,
    ) -> None:
        if len(image_size) != 3:
            raise ValueError(f"video_vit.image_size is {list(image_size)}; accepted: [frames, height, width], as [64, 112, 112]")
        if pool not in ("class", "mean") or time_positions not in ("resize", "index"):
            raise ValueError(
                f'video_vit: pool is "{pool}", accepted: class, mean; time_positions is "{time_positions}", accepted: resize, index'
            )
        if not 0 < valid_share <= 1:
            raise ValueError(f"video_vit.valid_share is {valid_share}; accepted: above 0, up to 1")
        super().__init__(
            in_channels=in_channels,
            image_size=list(image_size),
            tubelet=tubelet,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_dim=mlp_dim or 4 * hidden_size,
            pool=pool,
            time_positions=time_positions,
            valid_share=valid_share,
        )
        self.in_channels = in_channels
        self.embed_dim = hidden_size
        self.patch_size = (tubelet, patch_size, patch_size)
        self.pool, self.time_positions, self.valid_share = pool, time_positions, valid_share
        self.single_frames = tubelet == 1 and image_size[0] == 1
        """Whether this is an encoder of single frames: it has no positions in time."""
        self.check_size(image_size)
        self.table_grid = tuple(n // p for n, p in zip(image_size, self.patch_size))
        self.net = VideoTransformer(in_channels, hidden_size, self.patch_size, num_layers, num_heads, mlp_dim or 4 * hidden_size)

    @classmethod
    def divisor(cls, args: Mapping[str, Any]) -> tuple[int, ...]:
        """The tubelet and the patch."""
        patch = args.get("patch_size", 16)
        return (args.get("tubelet", 2), patch, patch)

    def check_size(self, size: Sequence[int]) -> None:  # type: ignore[override]
        """Raise unless frames fill tubelets and pixels patches."""
        frames, *pixels = size
        tubelet, *patch = self.patch_size
        if frames < tubelet:
            raise ValueError(
                f"video_vit: a clip of {frames} frame(s) is shorter than a tubelet of {tubelet}; give longer clips, or build the "
                "encoder with tubelet: 1 for single frames"
            )
        if frames % tubelet:
            raise ValueError(f"video_vit: {frames} frames are no multiple of the tubelet {tubelet}; take a frame more or less")
        if any(n % p or n < p for n, p in zip(pixels, patch)):
            raise ValueError(
                f"video_vit: frames of {tuple(pixels)} pixels are no multiple of the patch {tuple(patch)}; crop or pad"
            )

    def frame_branch(self) -> VideoViT:
        """Return a fresh encoder of single frames that is like this one but for its tubelet of 1."""
        _, height, width = self._args["image_size"]
        return VideoViT(**{**self._args, "tubelet": 1, "image_size": (1, height, width)})

    def part(self, group: str) -> Part:
        """Describe the network for the run's `weights/` folder."""
        part = super().part(group)
        part.manifest |= {"token_order": TOKEN_ORDER_3D}
        return part

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks."""
        return list(self.net.blocks)

    def positions(self, grid: Sequence[int], like: Tensor) -> Tensor:
        """Return the positions (1, N, E) of a token grid, where and as `like` is."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return factorised_positions(tuple(grid), self.embed_dim, self.table_grid, self.time_positions, str(like.device), dtype)

    def embed(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Embed all patches, positions included.

        Args:
            x: (B, C, T, H, W).
            valid: (B, T) frames, or pixels (B, T or 1, H, W), bool; None means all.

        Returns:
            Tokens (B, N, E) before the blocks, and which are valid (B, N), None where `valid` is.

        Raises:
            ValueError: The clip does not fit, or holds nothing that is valid.
        """
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"video_vit takes clips (B, {self.in_channels}, T, H, W); found {tuple(x.shape)}; put channels before frames, and "
                f"convert the images to {self.in_channels} channel(s)"
            )
        self.check_size(x.shape[2:])
        real = None
        if valid is not None:
            pixels = (valid[:, :, None, None] if valid.ndim == 2 else valid).expand(len(x), *x.shape[2:])
            x = x.masked_fill(~pixels[:, None], 0.0)
            real = valid_tokens(pixels, self.patch_size, self.valid_share)
            empty = (~real.any(dim=1)).nonzero()[:, 0].tolist()
            if empty:
                raise ValueError(
                    f"video_vit: clips {empty} of the batch have no valid token: their sector is empty, or no {self.patch_size[0]} "
                    "frames in a row are valid; leave these clips out"
                )
        tokens = self.net.patch_embed(x)
        grid = [n // p for n, p in zip(x.shape[2:], self.patch_size)]
        return tokens + self.positions(grid, tokens).to(tokens.dtype), real

    def encode(self, tokens: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Run embedded tokens through the blocks.

        Args:
            tokens: (B, N, E), as `embed` returns them, or some of them.
            valid: (B, N) bool; the others are no keys, and zeros in the result.

        Returns:
            The pooled vector (B, E), tokens (B, N, E) after the final norm, and the state after every block, each (B, N, E).
        """
        x = torch.cat([self.net.cls_token.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        bias = None
        if valid is not None:
            bias = key_bias(torch.cat([torch.ones_like(valid[:, :1]), valid], dim=1), x.dtype)
        states = []
        for block in self.net.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, bias, use_reentrant=False)
            else:
                x = block(x, bias)
            states.append(x[:, 1:])
        x = self.net.norm(x)
        found = x[:, 1:] if valid is None else x[:, 1:].masked_fill(~valid[..., None], 0.0)
        if self.pool == "class":
            return x[:, 0], found, states
        if valid is None:
            return found.mean(dim=1), found, states
        return found.sum(dim=1) / valid.sum(dim=1, keepdim=True).clamp_min(1), found, states

    def forward_features(self, x: Tensor | Stack, keep: Tensor | None = None, valid: Tensor | None = None) -> EncoderOutput:
        """Encode clips; with `keep`, only those tokens enter the blocks.

        Args:
            x: (B, C, T, H, W); pictures (B, C, H, W), see above; or a `Stack` of frames, which knows which are valid.
            keep: (B, K) int64 token indices in the order of `flatten_tokens`.
            valid: As in `embed`.

        Returns:
            Tokens (B, N or K, E) after the final norm, zero where not valid; `pooled` by the rule of `pool`; `pyramid` holds the state
            after every block as (B, E, *grid) maps when nothing was dropped.
        """
        if isinstance(x, Stack):
            clips, valid = x.planes.movedim(2, 1), x.valid if valid is None else valid
        else:
            clips = x[:, :, None].expand(-1, -1, self.patch_size[0], -1, -1) if x.ndim == 4 else x
        tokens, real = self.embed(clips, valid)
        grid = tuple(n // p for n, p in zip(clips.shape[2:], self.patch_size))
        if keep is not None:
            seen = None if real is None else real.gather(1, keep)
            pooled, found, _ = self.encode(gather_tokens(tokens, keep), seen)
            return EncoderOutput(tokens=found, grid=grid, pooled=pooled)
        pooled, found, states = self.encode_valid(tokens, real)
        return EncoderOutput(
            tokens=found, grid=grid, pooled=pooled, pyramid=tuple(unflatten_tokens(state, grid) for state in states)
        )

    def encode_valid(self, tokens: Tensor, valid: Tensor | None, *, states: bool = True) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As `encode`, but computes only as many tokens as the clip with most valid ones has.

        Args:
            tokens: (B, N, E).
            valid: (B, N) bool.
            states: Whether the states after the blocks are wanted.
        """
        if valid is None:
            pooled, found, hidden = self.encode(tokens)
            return pooled, found, hidden if states else []
        most = int(valid.sum(dim=1).max())
        place = torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)[:, :most]
        seen = valid.gather(1, place)
        pooled, found, hidden = self.encode(gather_tokens(tokens, place), seen)

        def spread(rows: Tensor) -> Tensor:
            rows = rows.masked_fill(~seen[..., None], 0.0)
            return scatter_tokens(rows, place, rows.new_zeros(tokens.shape))

        return pooled, spread(found), [spread(state) for state in hidden] if states else []

    def masked(self, x: Tensor, keep: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode several masks of each clip, patches embedded once.

        Args:
            x: (B, C, T, H, W).
            keep: (B, R, K) int64 token indices, K visible ones of each of R masks.
            valid: As in `embed`.

        Returns:
            Pooled (B, R, E) and tokens (B, R, K, E).
        """
        tokens, real = self.embed(x, valid)
        rows = keep.flatten(1)  # (B, R * K)
        seen = None if real is None else real.gather(1, rows).reshape(-1, keep.shape[2])
        visible = gather_tokens(tokens, rows).reshape(prod(keep.shape[:2]), keep.shape[2], -1)
        pooled, found, _ = self.encode(visible, seen)
        return pooled.reshape(*keep.shape[:2], -1), found.reshape(*keep.shape, -1)
