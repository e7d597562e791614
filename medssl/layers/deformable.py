"""Deformable one-dimensional attention over the slices of a stack, and the aggregator built on it.

Tokens (B, N, E) are slices, channels are E: attention runs from slice to slice. `valid` (B, N) says which slices are real; `z_mm` (B, N)
where they lie. Slices that are not valid are not there: both flavours work on the valid slices alone, numbered 0 .. n - 1 in the order
given, so padding at the end, at the start or in the middle changes nothing, receives no gradient and may hold anything.

Offsets are counted in slices, so that one setting suits stacks of 0.5 mm and of 5 mm; what a step is worth in millimetres reaches the
attention through the position code and, in `GroupedOffsets`, through the distances of the bias.

Shape letters: B stacks, N slots, n valid slices, E width, H heads, P points, G offset groups, M keys, D width of a head.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from medssl.errors import near
from medssl.layers.tokens import gather_tokens
from medssl.types import EncoderOutput


class ValidOrder(NamedTuple):
    """Where the valid slices are.

    Args:
        valid: (B, N) bool.
        slot: (B, N) int64, slot of the k-th valid slice; the slots that are not valid follow.
        rank: (B, N) int64, how many valid slices lie before a slot.
        n: (B,) int64, number of valid slices, but 1 where there is none, so that nothing is divided by zero.
    """

    valid: Tensor
    slot: Tensor
    rank: Tensor
    n: Tensor


def order_of(tokens: Tensor, valid: Tensor | None) -> ValidOrder:
    """Number the valid slices of each stack.

    Args:
        tokens: (B, N, E).
        valid: (B, N) bool; None means all.
    """
    if valid is None:
        valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if valid.shape != tokens.shape[:2] or valid.dtype != torch.bool:
        raise ValueError(
            f"valid is {valid.dtype} {tuple(valid.shape)}; it must be bool {tuple(tokens.shape[:2])}, one flag per slice, True = real"
        )
    count = valid.long().cumsum(dim=1)
    return ValidOrder(
        valid=valid,
        slot=torch.argsort((~valid).byte(), dim=1, stable=True),
        rank=(count - 1).clamp(min=0),
        n=count[:, -1].clamp(min=1),
    )


def blank(tokens: Tensor, valid: Tensor) -> Tensor:
    """Set tokens that are not valid to zero; unlike a product, this lets neither NaN nor a gradient through."""
    return tokens.masked_fill(~valid[..., None], 0.0)


def linear_weights(position: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours and weights of linear interpolation; positions outside [0, n - 1] are moved to the border.

    Args:
        position: (B, ...), in slices, float32 or better.
        count: (B,) int64, n.

    Returns:
        Index (B, ..., 2) int64 of the slices before and after, and their weights (B, ..., 2), which sum to one and carry the gradient.
    """
    last = (count - 1).view(-1, *[1] * (position.ndim - 1))
    position = torch.minimum(position.clamp(min=0), last.to(position.dtype))
    whole = torch.nan_to_num(position.detach()).floor().long()  # a NaN must end in the loss, not in an index out of range
    low = torch.minimum(whole, last - 1).clamp(min=0)
    fraction = position - low
    return torch.stack([low, torch.minimum(low + 1, last)], dim=-1), torch.stack([1 - fraction, fraction], dim=-1)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Gather (B, G, N, D) at (B, G, ...) int64 to (B, G, ..., D)."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, values.shape[-1])
    return values.gather(2, flat).reshape(*index.shape, values.shape[-1])


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision up: positions along 1,000 slices do not fit bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class PerQuerySampling(nn.Module):
    """Every slice looks at `points` places per head that it chooses itself: linear in N.

    For query i, head h and point p:  t = rank(i) + offset_hp(x_i),  a = softmax_p(weight_h(x_i)),  out_i = W_o concat_h sum_p a V_h(t),
    with V_h = x W_v interpolated linearly between valid neighbours. A place outside the stack is moved to its first or last valid slice.
    That differs from the 2D original, where values of padding are zeros that dilute the sum: here every sample is of a valid slice, so
    the weights always sum to one over valid samples.

    At the start offsets do not depend on x: heads look back and forth in turn, point p at p slices, all with equal weight.

    Args:
        dim: E.
        heads: H.
        dim_head: D.
        points: P, samples per query and head.

    Reference:
        Zhu et al. 2021 (Deformable DETR), equation 2 and appendix A.3, with one level and one axis.
    """

    def __init__(self, dim: int, *, heads: int = 8, dim_head: int = 64, points: int = 4) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.value = nn.Linear(dim, heads * dim_head)
        self.offset = nn.Linear(dim, heads * points)
        self.weight = nn.Linear(dim, heads * points)
        self.out = nn.Linear(heads * dim_head, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with even weights over points that lie 1 .. P slices behind (even heads) or ahead (odd heads)."""
        for layer in (self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.offset, self.weight):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        sign = torch.tensor([-1.0, 1.0]).repeat(self.heads)[: self.heads]
        with torch.no_grad():
            self.offset.bias.copy_((sign[:, None] * torch.arange(1, self.points + 1)).flatten())

    def forward(self, tokens: Tensor, valid: Tensor | None = None, z_mm: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            tokens: (B, N, E).
            valid: (B, N) bool; None means all.
            z_mm: Not used here: places are counted in slices.

        Returns:
            (B, N, E), zero where not valid.
        """
        order = order_of(tokens, valid)
        x = blank(tokens, order.valid)
        by_head = (*x.shape[:2], self.heads, -1)
        value = gather_tokens(self.value(x), order.slot).reshape(by_head)  # (B, n, H, D)
        share = self.weight(x).reshape(by_head).softmax(dim=-1)  # (B, N, H, P)
        offset = at_least_float32(self.offset(x)).reshape(by_head)
        index, weight = linear_weights(order.rank[..., None, None] + offset, order.n)
        mixed = weighted_rows(value, index.flatten(3), (weight * share[..., None]).flatten(3).to(value.dtype))  # (B, N, H, D)
        return blank(self.out(mixed.flatten(2)), order.valid)


def weighted_rows(values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Sum_k weight[b, i, h, k] * values[b, index[b, i, h, k], h] without ever holding the gathered rows.

    Args:
        values: (B, n, H, D).
        index: (B, N, H, K) int64.
        weight: (B, N, H, K), of the dtype of `values`.

    Returns:
        (B, N, H, D).
    """
    batch, slots, heads, width = values.shape
    stack = torch.arange(batch, device=values.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=values.device).view(1, 1, -1, 1)
    row = (stack * slots + index) * heads + head  # rows of all stacks and heads in one table
    flat = values.reshape(-1, width)
    picked = nn.functional.embedding_bag(row.flatten(0, 2), flat, per_sample_weights=weight.flatten(0, 2), mode="sum")
    return picked.reshape(*index.shape[:3], width)


class GroupedLinear(nn.Module):
    """One bias-free linear map per group: (B, N, G, in) to (B, N, G, out).

    Args:
        groups: G.
        width_in: Channels of a group.
        width_out: Channels it gets.
    """

    def __init__(self, groups: int, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, width_in, width_out).uniform_(-(width_in**-0.5), width_in**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Apply each group's map."""
        return torch.einsum("bngi,gio->bngo", x, self.weight)


class GroupedOffsets(nn.Module):
    """Every slice looks at the same M = ceil(n / stride) keys, which move along the stack: quadratic, N * M scores and biases per head.

    q = x W_q;  D_m = offset_range * tanh(w . GELU(DWConv(q))) per group, in units of a key's cell;  t_m = (m + D_m + 0.5) * n / M - 0.5,
    moved to the border where outside;  k, v = x(t_m) W_k, W_v;  out_i = W_o concat_h softmax_m(q_i . k_m / sqrt(D) + b_h(i, m)) v_m with
    b_h = MLP(sign(u) log(1 + |u|)), u the distance of slice i from key m. W_q, W_k, W_v and the offsets have one map per group.

    The MLP of the bias runs on every (group, slice, key): at 1,000 slices and width 640 that is 1.3 GB per layer and stack in training.

    Args:
        dim: E, a multiple of `groups`.
        heads: H.
        dim_head: D.
        groups: G, divides `heads`; None means one per head.
        stride: Slices per key.
        offset_range: How many cells a key may move.
        kernel: Width of the convolution that sees the queries, at least `stride`.
        distance: `mm` takes u from `z_mm`, `index` counts slices.

    Reference:
        Xia et al. 2022, "Vision transformer with deformable attention", section 3.2, in one axis as used by Nguyen et al. 2023
        (arXiv 2212.01893), with tokens = slices. The key grid is that of half-pixel centres throughout, which the block used there mixes
        with end-aligned positions and zero padding, so that the outermost keys lose half their weight.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        dim_head: int = 64,
        groups: int | None = None,
        stride: int = 4,
        offset_range: float = 2.0,
        kernel: int = 6,
        distance: Literal["mm", "index"] = "mm",
    ) -> None:
        super().__init__()
        groups = groups or heads
        if dim % groups or heads % groups:
            raise ValueError(f"{groups} groups must divide both the width {dim} and the {heads} heads; change one of them")
        if kernel < stride:
            raise ValueError(
                f"kernel {kernel} is narrower than the stride {stride}, so slices would be skipped; use at least {stride}"
            )
        if distance not in ("mm", "index"):
            raise ValueError(f'distance is "{distance}"; accepted: "mm" (from z_mm) or "index" (counted in slices)')
        self.heads, self.groups, self.stride, self.kernel = heads, groups, stride, kernel
        self.offset_range, self.distance = offset_range, distance
        width, inner = dim // groups, heads * dim_head // groups
        self.query = GroupedLinear(groups, width, inner)
        self.key = GroupedLinear(groups, width, inner)
        self.value = GroupedLinear(groups, width, inner)
        self.out = nn.Linear(heads * dim_head, dim)
        self.spread = nn.Conv1d(inner, inner, kernel, stride=stride, groups=inner)
        self.move = nn.Conv1d(inner, 1, 1, bias=False)
        hidden = max(dim // 4, 1)
        self.bias = nn.Sequential(
            *[nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, heads // groups)]
        )

    def key_positions(self, query: Tensor, order: ValidOrder) -> tuple[Tensor, Tensor]:
        """Place the keys.

        Args:
            query: (B, n, G, D * H / G), zero past the valid slices.
            order: The valid slices.

        Returns:
            Positions (B, G, M) in slices, not yet moved to the border, and which keys exist (B, M), bool.
        """
        batch, slots = query.shape[:2]
        keys = -(-slots // self.stride)
        left = (self.kernel - self.stride) // 2
        right = (keys - 1) * self.stride + self.kernel - slots - left
        seen = nn.functional.pad(query.permute(0, 2, 3, 1).flatten(0, 1), (left, right))  # (B * G, D, n + pads)
        moved = self.move(nn.functional.gelu(self.spread(seen))).reshape(batch, self.groups, keys)
        offset = self.offset_range * torch.tanh(at_least_float32(moved))
        own = torch.div(order.n + self.stride - 1, self.stride, rounding_mode="floor")  # (B,) keys of this stack
        number = torch.arange(keys, device=query.device)
        cell = (order.n / own).to(offset.dtype)[:, None, None]
        return (number + offset + 0.5) * cell - 0.5, number < own[:, None]

    def relative_bias(self, place: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Bias (B, H, n, M) from places (B, n) of the slices and the neighbours and weights (B, G, M, 2) of the keys."""
        where = place[:, None, :, None].expand(-1, self.groups, -1, -1)
        keys = (pick(where, index)[..., 0] * weight).sum(dim=-1)  # (B, G, M)
        distance = where - keys[:, :, None]  # (B, G, n, M)
        bias = self.bias((distance.sign() * distance.abs().log1p())[..., None])  # (B, G, n, M, H / G)
        return bias.permute(0, 1, 4, 2, 3).flatten(1, 2)  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, valid: Tensor | None = None, z_mm: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            tokens: (B, N, E).
            valid: (B, N) bool; None means all.
            z_mm: (B, N) position of each slice, needed for `distance="mm"`.

        Returns:
            (B, N, E), zero where not valid.
        """
        order = order_of(tokens, valid)
        x = gather_tokens(blank(tokens, order.valid), order.slot)  # valid slices first, then zeros
        grouped = x.reshape(*x.shape[:2], self.groups, -1)
        query = self.query(grouped)
        position, exists = self.key_positions(query, order)
        index, weight = linear_weights(position, order.n)
        near_two = pick(grouped.transpose(1, 2), index)  # (B, G, M, 2, E / G)
        sampled = (near_two * weight[..., None].to(x.dtype)).sum(dim=3).transpose(1, 2)  # (B, M, G, E / G)
        q, k, v = (t.reshape(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in (query, self.key(sampled), self.value(sampled)))
        bias = self.relative_bias(self._places(order, z_mm, position.dtype), index, weight)
        score = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5 + bias
        attention = score.masked_fill(~exists[:, None, None], float("-inf")).softmax(dim=-1)
        out = self.out((attention.to(v.dtype) @ v).transpose(1, 2).flatten(2))  # (B, n, E)
        return blank(gather_tokens(out, order.rank), order.valid)

    def _places(self, order: ValidOrder, z_mm: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Places (B, n) from which distances are taken."""
        if self.distance == "index":
            return torch.arange(order.slot.shape[1], device=order.slot.device, dtype=dtype).expand(order.slot.shape)
        return positions_of(order, z_mm).to(dtype).gather(1, order.slot)


def positions_of(order: ValidOrder, z_mm: Tensor | None) -> Tensor:
    """Return z (B, N) with zeros where not valid.

    Raises:
        ValueError: Positions are needed and missing, or of another shape.
    """
    shape = tuple(order.valid.shape)
    if z_mm is None:
        if shape[1] == 1:  # an image: distance to itself
            return torch.zeros(shape, device=order.valid.device)
        raise ValueError(
            f"stacks of {shape[1]} slices came without z_mm: nothing assumes a step of 1 mm; pass the position of every slice "
            '(for clips the time of every frame), or build the aggregator with position="index" to use the order alone'
        )
    if tuple(z_mm.shape) != shape:
        raise ValueError(f"z_mm has shape {tuple(z_mm.shape)}; it must be {shape}, the position of every slice in mm")
    return at_least_float32(z_mm).masked_fill(~order.valid, 0.0)


def sincos_code(position: Tensor, dim: int) -> Tensor:
    """Sine and cosine of a position at frequencies 10000^(-i/n); for 0, 1, 2 ... the table of `sincos_positions`.

    Wavelengths run from 6 to 60,000 units: slices 1 mm apart and a body of 2 m both fit, and so do frame times in ms.

    Args:
        position: (B, N).
        dim: E; an odd last channel is zero.

    Returns:
        (B, N, E).
    """
    position = at_least_float32(position)
    half = dim // 2
    frequency = 10000.0 ** (-torch.arange(half, device=position.device, dtype=position.dtype) / max(half, 1))
    angle = position[..., None] * frequency
    return nn.functional.pad(torch.cat([angle.sin(), angle.cos()], dim=-1), (0, dim - 2 * half))


ATTENTION: dict[str, type[PerQuerySampling] | type[GroupedOffsets]] = {"per_query": PerQuerySampling, "grouped": GroupedOffsets}
"""Flavours of `SliceAggregator`."""


class AggregatorLayer(nn.Module):
    """Deformable attention and a feed-forward block, each with a residual, norm and dropout.

    Args:
        attention: The attention.
        dim: E.
        hidden_dim: Width of the feed-forward block.
        dropout: Share dropped.
        norm: `post` normalises after each sum, `pre` before each block.
    """

    def __init__(self, attention: nn.Module, dim: int, hidden_dim: int, dropout: float, norm: str) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.attention = attention
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)
        self.feed_forward = nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden_dim, dim))

    def forward(self, x: Tensor, valid: Tensor, z_mm: Tensor | None) -> Tensor:
        """Run one layer on (B, N, E)."""
        if self.pre:
            x = x + self.drop(self.attention(self.norm1(x), valid, z_mm))
            return x + self.drop(self.feed_forward(self.norm2(x)))  # type: ignore[no-any-return]
        x = self.drop(self.norm1(x + self.attention(x, valid, z_mm)))
        return self.drop(self.norm2(x + self.feed_forward(x)))  # type: ignore[no-any-return]


class SliceAggregator(nn.Module):
    """From slice tokens to slice tokens that know their stack, and one embedding of the whole stack.

    Tokens are normalised, so that any slice encoder meets the position code at equal strength, and get the sine-cosine code of their
    physical position; a mask token put in by the caller gets it too, so it knows its place. z is measured from the mean of the valid
    slices, because the origin of a scanner's coordinates means nothing: a shift of all z_mm changes nothing.

    Args:
        dim: E.
        depth: Layers.
        heads: Attention heads.
        dim_head: Width of a head.
        hidden_dim: Width of the feed-forward blocks.
        dropout: Share dropped.
        attention: `per_query` (`PerQuerySampling`, linear in N) or `grouped` (`GroupedOffsets`, the paper's, quadratic).
        norm: `post`, as in the paper, or `pre` with a last norm.
        position: `mm` needs `z_mm`; `index` counts valid slices and uses nothing else, for stacks whose step is not known.
        points: Of `per_query`: samples per slice and head.
        stride: Of `grouped`: slices per key.
        offset_range: Of `grouped`: key cells that a key may move.
        kernel: Of `grouped`: width of the offset convolution.

    Reference:
        Nguyen et al. 2023 (arXiv 2212.01893): 4 post-norm layers of width 640. Position code and input norm are ours.
    """

    def __init__(
        self,
        dim: int = 640,
        *,
        depth: int = 4,
        heads: int = 8,
        dim_head: int = 64,
        hidden_dim: int = 720,
        dropout: float = 0.1,
        attention: Literal["per_query", "grouped"] = "per_query",
        norm: Literal["post", "pre"] = "post",
        position: Literal["mm", "index"] = "mm",
        points: int = 4,
        stride: int = 4,
        offset_range: float = 2.0,
        kernel: int = 6,
    ) -> None:
        super().__init__()
        for what, chosen, known in (
            ("attention", attention, tuple(ATTENTION)),
            ("norm", norm, ("post", "pre")),
            ("position", position, ("mm", "index")),
        ):
            if chosen not in known:
                raise ValueError(f'{what} is "{chosen}"{near(str(chosen), known)}; accepted: {", ".join(known)}')
        self.dim, self.position = dim, position

        def block() -> nn.Module:
            if attention == "per_query":
                return PerQuerySampling(dim, heads=heads, dim_head=dim_head, points=points)
            shape = {"heads": heads, "dim_head": dim_head, "stride": stride, "kernel": kernel}
            return GroupedOffsets(dim, **shape, offset_range=offset_range, distance=position)

        self.enter = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(AggregatorLayer(block(), dim, hidden_dim, dropout, norm) for _ in range(depth))
        self.leave: nn.Module = nn.LayerNorm(dim) if norm == "pre" else nn.Identity()

    def forward(self, tokens: Tensor, valid: Tensor | None = None, z_mm: Tensor | None = None) -> EncoderOutput:
        """Aggregate.

        Args:
            tokens: (B, N, E) slice embeddings; slices to be predicted hold the caller's mask token and stay valid.
            valid: (B, N) bool, True = real slice; None means all.
            z_mm: (B, N) position of each slice in mm along the stack (clips: time in ms); not needed for one slice.

        Returns:
            Tokens (B, N, E), zero where not valid; grid (N,); pooled (B, E), the mean over valid slices, zero where there is none.
        """
        order = order_of(tokens, valid)
        place = positions_of(order, z_mm) if self.position == "mm" else at_least_float32(order.rank.float())
        place = place.masked_fill(~order.valid, 0.0)
        middle = place.sum(dim=1, keepdim=True) / order.n[:, None]
        place = (place - middle).masked_fill(~order.valid, 0.0)
        x = self.enter(blank(tokens, order.valid))
        x = x + sincos_code(place, self.dim).to(x.dtype)
        for layer in self.layers:
            x = layer(x, order.valid, place)
        x = blank(self.leave(x), order.valid)
        return EncoderOutput(tokens=x, grid=(x.shape[1],), pooled=x.sum(dim=1) / order.n[:, None].to(x.dtype))
