"""Attention over slices: what doubling the slices costs, per-query and grouped deformable beside dense attention.

    python -m benchmarks.deformable_attention

One block, forward and backward, at the card's sizes (width 640, 8 heads of 64). Dense is torch's fused attention between the
same projections. The target is on the per-query flavour; the grouped one is quadratic by design and shown beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Check, Result, finish, interleave, milliseconds, parser, times_faster
from medssl.layers.deformable import GroupedOffsets, PerQuerySampling

TARGET = 2.2
"""How many times longer twice the slices may take."""


class Dense(nn.Module):
    """Every slice looks at every slice.

    Args:
        dim: Width.
        heads: Heads.
        dim_head: Width of a head.
    """

    def __init__(self, dim: int, *, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * dim_head)
        self.out = nn.Linear(heads * dim_head, dim)

    def forward(self, x: Tensor, valid: Tensor | None = None, z_mm: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


FLAVOURS: dict[str, type[nn.Module]] = {"per_query": PerQuerySampling, "grouped": GroupedOffsets, "dense": Dense}


def stepper(layer: nn.Module, batch: int, slices: int, dim: int) -> Callable[[], None]:
    """Return a call of one forward and backward pass."""
    tokens = torch.randn(batch, slices, dim, requires_grad=True)
    z_mm = 2.5 * torch.arange(slices).expand(batch, -1)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        tokens.grad = None
        layer(tokens, None, z_mm).sum().backward()

    return step


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__)
    options_parser.add_argument("--slices", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    options_parser.add_argument("--flavours", nargs="+", choices=sorted(FLAVOURS), default=sorted(FLAVOURS))
    options_parser.add_argument("--grouped-up-to", type=int, default=512, help="its bias takes gigabytes beyond")
    options_parser.add_argument("--batch", type=int, default=2)
    options_parser.add_argument("--dim", type=int, default=640)
    options_parser.add_argument("--heads", type=int, default=8)
    options_parser.add_argument("--dim-head", type=int, default=64)
    options = options_parser.parse_args(argv)
    torch.manual_seed(0)
    calls: dict[str, Callable[[], None]] = {}
    for flavour in options.flavours:
        layer = FLAVOURS[flavour](options.dim, heads=options.heads, dim_head=options.dim_head)
        for slices in options.slices:
            if flavour != "grouped" or slices <= options.grouped_up_to:
                calls[f"{flavour} {slices}"] = stepper(layer, options.batch, slices, options.dim)
    seconds = interleave(calls, repeats=options.repeats)
    rows, checks = [], []
    for name in calls:
        flavour, slices = name.split()
        half, ours = f"{flavour} {int(slices) // 2}", f"per_query {slices}"
        cost = times_faster(seconds, half, name) if half in calls else None
        rows.append(
            {
                "attention": flavour,
                "slices": int(slices),
                **milliseconds(seconds, name),
                "cost_of_doubling_to_here": cost,
                "times_slower_than_per_query": times_faster(seconds, ours, name) if ours in calls else None,
            }
        )
        if flavour == "per_query" and int(slices) >= 512:
            checks.append(Check(f"per-query, {int(slices) // 2} to {slices} slices, times longer", cost, TARGET, at_least=False))
    notes = [f"forward and backward of one block, width {options.dim}, {options.heads} heads of {options.dim_head}, float32"]
    return finish(Result("deformable_attention", rows, checks, vars(options), notes, {"seconds": seconds}), options.out)


if __name__ == "__main__":
    main()
