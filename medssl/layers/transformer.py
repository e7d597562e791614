"""Transformer blocks under timm's names that leave tokens out as keys, and the small decoder of masked objectives."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.layers.tokens import scatter_tokens


def key_bias(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention scores so that no token looks at the others that are not valid.

    Args:
        valid: (B, N) bool.
        dtype: Of the scores.

    Returns:
        (B, 1, 1, N): 0, or a large negative number. It is finite, so that a row without any valid key stays finite too.
    """
    bias = torch.zeros(valid.shape, dtype=dtype, device=valid.device)
    return bias.masked_fill(~valid, torch.finfo(dtype).min / 2)[:, None, None]


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        dim: E.
        heads: Heads; must divide `dim`.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} attention heads do not divide {dim} channels; choose a number that does")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return (B, N, E) of (B, N, E); `bias` as `key_bias` makes it."""
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, N, E / heads)
        found = functional.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype))
        return self.proj(found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers with GELU between.

    Args:
        dim: E.
        hidden: Width between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., E) of (..., E)."""
        return self.fc2(functional.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm transformer block with the parameters and the names of timm's.

    Args:
        dim: E.
        heads: Attention heads.
        mlp_dim: Width of the MLP.

    Reference:
        Dosovitskiy et al. 2021, equations 2 and 3.
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, mlp_dim)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return (B, N, E) of (B, N, E)."""
        x = x + self.attn(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


def start_like_vit(module: nn.Module) -> None:
    """Draw linear layers from a normal distribution of std 0.02 (cut at two), biases zero; patch embeddings as linear layers by Glorot."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02, a=-0.04, b=0.04)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv3d):
            nn.init.xavier_uniform_(part.weight.data.flatten(1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class MaskedDecoder(nn.Module):
    """Visible tokens and mask tokens, each with its position, through a few blocks; one output per token of the whole grid.

    Args:
        dim: Width of the encoder's tokens.
        width: Width of the decoder.
        depth: Blocks.
        heads: Attention heads.
        out: Width of an output.
    """

    def __init__(self, dim: int, *, width: int, depth: int, heads: int, out: int) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, out)
        start_like_vit(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, keep: Tensor, positions: Tensor, valid: Tensor | None = None) -> Tensor:
        """Decode.

        Args:
            tokens: (B, K, E) encoded visible tokens.
            keep: (B, K) int64, their places.
            positions: (1, N, width).
            valid: (B, N) bool; the others are no keys, and what comes out at their places means nothing.

        Returns:
            (B, N, out), in the order of the grid.
        """
        visible = self.embed(tokens)
        fill = self.mask_token.to(visible.dtype).expand(len(tokens), positions.shape[1], -1)
        x = scatter_tokens(visible, keep, fill) + positions.to(visible.dtype)
        bias = None if valid is None else key_bias(valid, x.dtype)
        for block in self.blocks:
            x = block(x, bias)
        return self.head(self.norm(x))  # type: ignore[no-any-return]
