"""Heads that turn what an encoder sees into class scores or numbers, for volumes, images, clips, stacks and bags."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medssl.errors import RequestError, near
from medssl.types import EncoderOutput

HEADS = ("linear", "attention")


class LinearHead(nn.Module):
    """A linear map of the pooled feature, brought to mean 0 and variance 1 by running statistics first.

    Args:
        dim: E.
        out: Scores.

    Reference:
        The batch norm without parameters before the linear layer: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners",
        appendix A.1. Here its statistics are those of the training features from the start (`settle`), not of small batches.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.linear = nn.Linear(dim, out)
        nn.init.zeros_(self.linear.bias)
        nn.init.normal_(self.linear.weight, std=0.01)

    @torch.no_grad()
    def settle(self, rows: Tensor) -> None:
        """Take mean and std of features (N, E); a channel that does not vary, but for rounding, keeps its scale."""
        rows = rows.float()
        std, mean = torch.std_mean(rows, dim=0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6 * rows.abs().amax(dim=0), std, torch.ones_like(std)))

    def forward(self, output: EncoderOutput) -> Tensor:
        """Return scores (B, K) of the pooled features."""
        scores: Tensor = self.linear((output.pooled.float() - self.mean) / self.std)
        return scores


class AttentionHead(nn.Module):
    """Gated attention over tokens, then a linear map: a = softmax_n(w (tanh(V h_n) * sigmoid(U h_n))), scores = C (sum_n a_n h_n).

    Tokens are normalised (layer norm) first. Tokens that are all zero, of padding or outside a sector, are left out.

    Args:
        dim: E.
        out: Scores.
        hidden: Width of V and U.
        dropout: On both branches, in training.

    Reference:
        Ilse et al. 2018, "Attention-based Deep Multiple Instance Learning", equations 8 and 9.
    """

    def __init__(self, dim: int, out: int, hidden: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.value, self.gate = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.dropout = nn.Dropout(dropout)
        self.weigh = nn.Linear(hidden, 1)
        self.linear = nn.Linear(dim, out)
        nn.init.zeros_(self.linear.bias)
        nn.init.normal_(self.linear.weight, std=0.01)

    def attention(self, tokens: Tensor) -> Tensor:
        """Return what each token (B, N, E) weighs, (B, N), summing to 1; 0 for tokens that are left out."""
        h = self.norm(tokens.float())
        gated = self.dropout(torch.tanh(self.value(h))) * self.dropout(torch.sigmoid(self.gate(h)))
        seen = (tokens != 0).any(dim=-1)
        seen = seen | ~seen.any(dim=1, keepdim=True)  # a case without a token has no score to speak of, but a finite one
        return self.weigh(gated)[..., 0].masked_fill(~seen, float("-inf")).softmax(dim=1)  # type: ignore[no-any-return]

    def forward(self, output: EncoderOutput) -> Tensor:
        """Return scores (B, K) of the tokens."""
        weights = self.attention(output.tokens)
        scores: Tensor = self.linear((weights[..., None] * self.norm(output.tokens.float())).sum(dim=1))
        return scores


def build_head(name: str, dim: int, out: int, **args: Any) -> nn.Module:
    """Build a head by name.

    Args:
        name: `linear` (pooled features) or `attention` (tokens).
        dim: Width of the encoder's features.
        out: Scores: classes, or 1 for a number.
        args: Further arguments of the head.

    Raises:
        RequestError: There is no such head, or an argument is unknown.
    """
    if name not in HEADS:
        raise RequestError(f'head is "{name}"{near(name, HEADS)}; accepted: {", ".join(HEADS)}')
    if name == "linear":
        if args:
            raise RequestError(f"head linear takes no {', '.join(args)}; leave it out, or take head: attention")
        return LinearHead(dim, out)
    unknown = [key for key in args if key not in ("hidden", "dropout")]
    if unknown:
        raise RequestError(f"head attention: unknown key {unknown[0]}; accepted: hidden, dropout")
    return AttentionHead(dim, out, **args)
