"""One masked-autoencoder step: our token dropping beside the all-token form (SimMIM), the same ViT in both.

    python -m benchmarks.mae_step

Both steps are forward, backward and AdamW on the same images and the same mask, 75 % hidden. ViT-S (384 x 12 layers)
on 96^3: patch 16 gives 216 tokens, patch 8 gives 1,728. Fused attention on both sides.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Check, Result, finish, interleave, milliseconds, parser, times_faster
from medssl.data_sources import random_views
from medssl.doctor import one_step
from medssl.encoders.vit3d import ViT3D
from medssl.layers.tokens import flatten_tokens, patchify
from medssl.objectives.mae import MAE
from medssl.types import StepContext, Views
from medssl.views.pipeline import VolumeViews

TARGETS = {216: 1.6, 1728: 2.5}
"""Tokens -> how many times faster token dropping must be."""


class AllTokens(nn.Module):
    """SimMIM (Xie et al. 2022): all tokens enter the encoder, hidden ones as a learned token; a linear layer predicts the voxels.

    Args:
        encoder: The ViT.
    """

    def __init__(self, encoder: ViT3D) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.head = nn.Linear(encoder.embed_dim, encoder.in_channels * prod(encoder.patch_size))

    def forward(self, views: Views, ctx: StepContext) -> dict[str, Tensor]:
        """Return the mean absolute error over hidden voxels."""
        x = views["volume"].flatten(0, 1)
        hidden = flatten_tokens(views["volume_mask"].flatten(0, 1)[:, None])  # (B, N, 1)
        embedding = self.encoder.net.patch_embedding
        tokens = flatten_tokens(embedding.patch_embeddings(x))
        tokens = torch.where(hidden, self.mask_token.to(tokens.dtype), tokens) + embedding.position_embeddings
        for block in self.encoder.blocks:
            tokens = block(tokens)
        prediction = self.head(self.encoder.net.norm(tokens)).float()
        error = (prediction - patchify(x, self.encoder.patch_size)).abs() * hidden
        return {"loss": error.sum() / (hidden.sum() * prediction.shape[2])}


def stepper(objective: nn.Module, views: Views, precision: str) -> Callable[[], float]:
    """Return a call that does one optimiser step."""
    objective.train()
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-4)
    return lambda: one_step(objective, views, optimiser, precision, torch.device("cpu"))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__)
    options_parser.add_argument("--crop", type=int, default=96)
    options_parser.add_argument("--patches", type=int, nargs="+", default=[16, 8])
    options_parser.add_argument("--batch", type=int, default=2)
    options_parser.add_argument("--hidden", type=int, default=384)
    options_parser.add_argument("--layers", type=int, default=12)
    options_parser.add_argument("--heads", type=int, default=6)
    options_parser.add_argument("--decoder-dim", type=int, default=192)
    options_parser.add_argument("--decoder-depth", type=int, default=4)
    options_parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options_parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = options_parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    size = (options.crop,) * 3
    rows, checks, details = [], [], {}
    for patch in options.patches:
        torch.manual_seed(0)
        tokens = prod(n // patch for n in size)
        views = random_views(VolumeViews(size=size, mask={"ratio": 0.75, "cell": patch}), options.batch, 1, torch.device("cpu"))
        encoders = [
            ViT3D(image_size=size, patch_size=patch, hidden_size=options.hidden, num_layers=options.layers, num_heads=options.heads)
            for _ in range(2)
        ]
        mae = MAE(
            encoders[0],
            image_size=size,
            decoder_dim=options.decoder_dim,
            decoder_depth=options.decoder_depth,
            decoder_heads=options.decoder_dim // 32,
        )
        ours, peer = "medssl mae", "all tokens (SimMIM)"
        calls = {ours: stepper(mae, views, options.precision), peer: stepper(AllTokens(encoders[1]), views, options.precision)}
        seconds = interleave(calls, repeats=options.repeats)
        faster = times_faster(seconds, ours, peer)
        hidden = float(views["volume_mask"].float().mean())
        for name in calls:
            rows.append(
                {
                    "tokens": tokens,
                    "hidden_share": hidden,
                    "step": name,
                    **milliseconds(seconds, name),
                    "volumes_per_s": options.batch / statistics.median(seconds[name]),
                    "ours_is_times_faster": times_faster(seconds, ours, name),
                }
            )
        if tokens in TARGETS:
            checks.append(Check(f"{tokens} tokens: speed against the all-token form", faster, TARGETS[tokens]))
        details[str(tokens)] = seconds
    notes = [
        "the all-token form is defined in this file: mask tokens in the encoder, a linear head, no decoder",
        f"our decoder: {options.decoder_depth} layers of {options.decoder_dim}, as in ENVIRONMENT.md 4f",
        "the masked autoencoder's predictions differ from the all-token form's by design; speed is all that is compared here",
    ]
    return finish(Result("mae_step", rows, checks, vars(options), notes, details), options.out)


if __name__ == "__main__":
    main()
