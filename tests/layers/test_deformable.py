"""Deformable attention over slices: plain-loop references, gradients through positions, padding, any number of slices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medssl.layers.deformable import (
    GroupedLinear,
    GroupedOffsets,
    PerQuerySampling,
    SliceAggregator,
    linear_weights,
    order_of,
    pick,
    sincos_code,
)
from medssl.layers.pos_embed import sincos_positions

SMALL: dict[str, dict[str, Any]] = {
    "per_query": {"heads": 4, "dim_head": 3, "points": 2},
    "grouped": {"heads": 4, "dim_head": 3, "groups": 2, "stride": 4, "kernel": 6},
}
CLASSES = {"per_query": PerQuerySampling, "grouped": GroupedOffsets}
FLAVOURS = sorted(CLASSES)


def small(flavour: str, dim: int = 8, **changes: Any) -> Any:
    """A float64 layer whose offsets depend on its input, unlike at the start of training."""
    torch.manual_seed(1)
    layer = CLASSES[flavour](dim, **{**SMALL[flavour], **changes}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def stacks(batch: int, slices: int, dim: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and the positions of slices at uneven steps."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, slices, dim, generator=generator, dtype=torch.float64)
    step = 0.5 + 4.5 * torch.rand(batch, slices, generator=generator, dtype=torch.float64)
    return tokens, step.cumsum(dim=1) - 100


def interpolated(rows: list[Tensor], t: float | Tensor) -> Tensor:
    """Value at place t between rows, by the formula; outside, the row at the border."""
    t = min(max(float(t), 0.0), len(rows) - 1.0)
    below = min(math.floor(t), len(rows) - 1)
    above = min(below + 1, len(rows) - 1)
    return (1 - (t - below)) * rows[below] + (t - below) * rows[above]


def per_query_reference(layer: PerQuerySampling, x: Tensor, places: Tensor) -> Tensor:
    """One stack without padding, (n, E)."""
    heads, points = layer.heads, layer.points
    values = layer.value(x).reshape(len(x), heads, -1)
    out = []
    for i in range(len(x)):
        offsets = layer.offset(x[i]).reshape(heads, points)
        scores = layer.weight(x[i]).reshape(heads, points)
        joined = []
        for h in range(heads):
            share = [math.exp(s) for s in scores[h]]
            rows = [values[n, h] for n in range(len(x))]
            joined.append(sum(share[p] / sum(share) * interpolated(rows, i + offsets[h, p]) for p in range(points)))
        out.append(layer.out(torch.cat(joined)))
    return torch.stack(out)


def grouped_reference(layer: GroupedOffsets, x: Tensor, places: Tensor) -> Tensor:
    """One stack without padding, (n, E)."""
    n, groups, heads = len(x), layer.groups, layer.heads
    keys = math.ceil(n / layer.stride)
    parts = x.reshape(n, groups, -1)
    left = (layer.kernel - layer.stride) // 2
    out: list[list[Tensor]] = [[] for _ in range(n)]
    for g in range(groups):
        query = [parts[i, g] @ layer.query.weight[g] for i in range(n)]
        sampled, where = [], []
        for m in range(keys):
            window = [m * layer.stride - left + k for k in range(layer.kernel)]
            seen = layer.spread.bias.clone()  # type: ignore[union-attr]
            for k, i in enumerate(window):
                if 0 <= i < n:
                    seen = seen + layer.spread.weight[:, 0, k] * query[i]
            moved = (layer.move.weight[0, :, 0] * nn.functional.gelu(seen)).sum()
            t = (m + layer.offset_range * math.tanh(moved) + 0.5) * n / keys - 0.5
            sampled.append(interpolated([parts[i, g] for i in range(n)], t))
            where.append(interpolated(list(places), t))
        key = [s @ layer.key.weight[g] for s in sampled]
        value = [s @ layer.value.weight[g] for s in sampled]
        own = heads // groups
        for h in range(own):
            cut = slice(h * len(query[0]) // own, (h + 1) * len(query[0]) // own)
            for i in range(n):
                scores = []
                for m in range(keys):
                    u = places[i] - where[m]
                    bias = layer.bias((torch.sign(u) * torch.log(1 + u.abs()))[None])[h]
                    scores.append(query[i][cut] @ key[m][cut] / math.sqrt(cut.stop - cut.start) + bias)
                share = torch.stack(scores).exp()
                out[i].append(sum(share[m] / share.sum() * value[m][cut] for m in range(keys)))  # type: ignore[arg-type]
    return torch.stack([layer.out(torch.cat(row)) for row in out])


REFERENCES = {"per_query": per_query_reference, "grouped": grouped_reference}


@pytest.mark.parametrize("slices", [1, 2, 5, 9])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_attention__equals_a_plain_loop(flavour: str, slices: int) -> None:
    layer = small(flavour)
    tokens, z_mm = stacks(2, slices)
    with torch.no_grad():
        found = layer(tokens, None, z_mm)
        for b in range(2):
            assert torch.allclose(found[b], REFERENCES[flavour](layer, tokens[b], z_mm[b]), atol=1e-12)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_attention__with_slices_missing_equals_the_plain_loop_over_the_others(flavour: str) -> None:
    layer = small(flavour)
    tokens, z_mm = stacks(3, 11)
    valid = torch.ones(3, 11, dtype=torch.bool)
    valid[0, 6:] = False  # at the end
    valid[1, :4] = False  # at the start
    valid[2, [0, 3, 4, 9]] = False  # in between
    tokens[~valid], z_mm[~valid] = float("nan"), float("nan")
    with torch.no_grad():
        found = layer(tokens, valid, z_mm)
        for b in range(3):
            expected = REFERENCES[flavour](layer, tokens[b, valid[b]], z_mm[b, valid[b]])
            assert torch.allclose(found[b, valid[b]], expected, atol=1e-12)
    assert (found[~valid] == 0).all()


def test_grouped__counts_slices_when_asked() -> None:
    layer = small("grouped", distance="index")
    tokens, z_mm = stacks(1, 7)
    with torch.no_grad():
        expected = grouped_reference(layer, tokens[0], torch.arange(7, dtype=torch.float64))
        assert torch.allclose(layer(tokens)[0], expected, atol=1e-12)
        assert torch.equal(layer(tokens), layer(tokens, None, z_mm))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_gradcheck__through_tokens_parameters_and_sampling_positions(flavour: str) -> None:
    layer = small(flavour, dim=4, heads=2, dim_head=2, **({"groups": 2} if flavour == "grouped" else {}))
    tokens, z_mm = stacks(2, 6, dim=4)
    valid = torch.tensor([[True] * 6, [True, True, False, True, True, False]])
    names = [name for name, _ in layer.named_parameters()]
    moving = "offset.weight" if flavour == "per_query" else "spread.weight"

    def run(tokens: Tensor, z_mm: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values)), (tokens, valid, z_mm))  # type: ignore[no-any-return]

    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, (tokens.requires_grad_(), z_mm.requires_grad_(flavour == "grouped"), *values))
    (grad,) = torch.autograd.grad(run(tokens, z_mm, *values).square().sum(), values[names.index(moving)])
    assert (grad != 0).any()


def test_linear_weights__gradcheck_and_border() -> None:
    rows = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    count = torch.tensor([5, 3])
    position = torch.tensor([-1.3, 0.2, 1.7, 3.6, 9.0], dtype=torch.float64).expand(2, 3, 5).clone().requires_grad_()

    def run(position: Tensor) -> Tensor:
        index, weight = linear_weights(position, count)
        return (pick(rows, index) * weight[..., None]).sum(dim=3)

    assert torch.autograd.gradcheck(run, (position,))
    found = run(position)
    assert torch.equal(found[0, :, 0], rows[0, :, 0]) and torch.equal(found[0, :, 4], rows[0, :, 4])
    assert torch.equal(found[1, :, 3], rows[1, :, 2])  # the third of three slices, not what follows
    assert torch.allclose(found[0, :, 2], 0.3 * rows[0, :, 1] + 0.7 * rows[0, :, 2])


def test_linear_weights__nan_reaches_the_result_and_no_index() -> None:
    index, weight = linear_weights(torch.tensor([[float("nan"), float("inf")]]), torch.tensor([4]))
    assert index.tolist() == [[[0, 1], [2, 3]]]
    assert weight[0, 0].isnan().all() and weight[0, 1].tolist() == [0.0, 1.0]


def test_grouped__keys_lie_on_half_pixel_centres() -> None:
    layer = small("grouped")
    nn.init.zeros_(layer.move.weight)  # no offsets
    tokens = torch.zeros(2, 64, 2, 6, dtype=torch.float64)
    valid = torch.arange(64) < torch.tensor([[64], [6]])
    position, exists = layer.key_positions(tokens, order_of(tokens[..., 0], valid))
    assert position[0, 0].tolist() == [1.5 + 4 * m for m in range(16)]  # the released block has 0, 3.77, 8.03 ... 59.23
    assert position[1, 0, :2].tolist() == [1.0, 4.0]  # six slices, two keys
    assert exists.sum(dim=1).tolist() == [16, 2]


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("slices", [1, 2, 3, 17, 64, 200, 1000])
def test_aggregator__takes_any_number_of_slices(flavour: str, slices: int) -> None:
    torch.manual_seed(0)
    model = SliceAggregator(16, depth=2, heads=2, dim_head=8, hidden_dim=16, attention=flavour)  # type: ignore[arg-type]
    tokens = torch.randn(2, slices, 16, requires_grad=True)
    output = model(tokens, None, torch.arange(slices).expand(2, -1) * 1.25)
    assert output.tokens.shape == (2, slices, 16) and output.grid == (slices,)
    assert torch.allclose(output.pooled, output.tokens.mean(dim=1), atol=1e-6)
    output.pooled.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [tokens, *model.parameters()])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_aggregator__very_different_lengths_in_one_batch_equal_each_alone(flavour: str) -> None:
    """Card 9.7: 1 to 200 slices side by side, and a stack of nothing."""
    torch.manual_seed(0)
    model: Any = SliceAggregator(16, depth=2, heads=2, dim_head=8, attention=flavour).double().eval()  # type: ignore[arg-type]
    lengths = [1, 3, 17, 64, 200, 0]
    tokens, z_mm = stacks(len(lengths), 200, dim=16)
    valid = torch.arange(200) < torch.tensor(lengths)[:, None]
    tokens[~valid] = float("nan")
    output = model(tokens.requires_grad_(), valid, z_mm)
    for b, length in enumerate(lengths[:-1]):
        alone = model(tokens[b : b + 1, :length].detach(), None, z_mm[b : b + 1, :length])
        assert torch.allclose(output.tokens[b, :length], alone.tokens[0], atol=1e-9)
        assert torch.allclose(output.pooled[b], alone.pooled[0], atol=1e-9)
    assert (output.pooled[-1] == 0).all()
    output.pooled.square().sum().backward()
    assert tokens.grad is not None and tokens.grad.isfinite().all() and (tokens.grad[~valid] == 0).all()


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_aggregator__padding_changes_nothing_and_gets_no_gradient(flavour: str, norm: str) -> None:
    torch.manual_seed(0)
    model: Any = SliceAggregator(16, depth=3, heads=2, dim_head=8, attention=flavour, norm=norm).double().eval()  # type: ignore[arg-type]
    tokens, z_mm = stacks(2, 9, dim=16)
    bare = model(tokens, None, z_mm)
    slots = torch.tensor([1, 2, 3, 5, 6, 7, 8, 12, 13])  # five slots of padding around and between
    padded = torch.full((2, 14, 16), float("nan"), dtype=torch.float64).index_copy(1, slots, tokens).requires_grad_()
    places = torch.full((2, 14), 1e9, dtype=torch.float64).index_copy(1, slots, z_mm)
    valid = torch.zeros(2, 14, dtype=torch.bool).index_fill(1, slots, True)
    output = model(padded, valid, places)
    assert torch.allclose(output.pooled, bare.pooled, atol=1e-12)
    assert torch.allclose(output.tokens[:, slots], bare.tokens, atol=1e-12)
    output.tokens.square().sum().backward()
    assert padded.grad is not None and (padded.grad[~valid] == 0).all() and (padded.grad[valid] != 0).all()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_aggregator__a_stack_of_padding_alone_gives_zeros(flavour: str) -> None:
    torch.manual_seed(0)
    model = SliceAggregator(16, depth=2, heads=2, dim_head=8, attention=flavour).eval()  # type: ignore[arg-type]
    tokens = torch.randn(2, 5, 16, requires_grad=True)
    valid = torch.tensor([[True] * 5, [False] * 5])
    output = model(tokens, valid, torch.zeros(2, 5))
    assert (output.pooled[1] == 0).all() and (output.tokens[1] == 0).all() and (output.pooled[0] != 0).any()
    output.pooled.sum().backward()
    assert tokens.grad is not None and tokens.grad.isfinite().all() and (tokens.grad[1] == 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def reach(model: SliceAggregator, slices: int, i: int) -> list[int]:
    """Slices that token i depends on."""
    tokens = torch.randn(1, slices, model.dim, requires_grad=True)
    output = model(tokens, None, torch.arange(slices)[None] * 2.0)
    (grad,) = torch.autograd.grad(output.tokens[0, i].square().sum(), tokens)
    return grad[0].abs().sum(dim=1).nonzero()[:, 0].tolist()


def test_reach__of_one_per_query_layer_at_the_start_is_its_points_each_way() -> None:
    torch.manual_seed(0)
    model = SliceAggregator(16, depth=1, heads=2, dim_head=8, points=4).eval()
    assert reach(model, 40, 20) == list(range(16, 25))
    assert reach(model, 40, 1) == [0, 1, 2, 3, 4, 5]


def test_reach__grows_with_depth_and_is_the_whole_stack_when_grouped() -> None:
    torch.manual_seed(0)
    assert reach(SliceAggregator(16, depth=3, heads=2, dim_head=8, points=4).eval(), 40, 20) == list(range(8, 33))
    found = reach(SliceAggregator(16, depth=1, heads=2, dim_head=8, attention="grouped").eval(), 17, 8)
    assert found == list(range(17))  # keys move less than a cell at the start; their queries see every slice


@pytest.mark.parametrize(("dim", "exact", "thousands"), [(640, 477_953, 478), (64, 45_953, 46)])
def test_grouped__has_as_many_parameters_as_the_paper_block_with_the_intended_axes(dim: int, exact: int, thousands: int) -> None:
    """Width 640 is attention over slices; the released wiring gave it 64 channels, the number of slices."""
    heads, dim_head, kernel = 8, 64, 6
    inner, hidden = heads * dim_head, dim // 4
    maps = 3 * dim * inner // heads + inner * dim + dim
    offsets = dim_head * kernel + dim_head + dim_head
    bias = (hidden + hidden) + (hidden * hidden + hidden) + (hidden + 1)
    assert maps + offsets + bias == exact and round(exact / 1000) == thousands
    assert sum(p.numel() for p in GroupedOffsets(dim, heads=heads, dim_head=dim_head, kernel=kernel).parameters()) == exact


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_aggregator__the_order_of_slices_matters(flavour: str) -> None:
    torch.manual_seed(0)
    model = SliceAggregator(16, depth=2, heads=2, dim_head=8, attention=flavour).eval()  # type: ignore[arg-type]
    tokens, z_mm = stacks(1, 12, dim=16)
    tokens, z_mm = tokens.float(), z_mm.float()
    with torch.no_grad():
        base = model(tokens, None, z_mm).pooled
        for order in (torch.randperm(12), torch.arange(11, -1, -1)):
            assert (model(tokens[:, order], None, z_mm).pooled - base).abs().max() > 0.01


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_aggregator__a_shift_of_positions_changes_nothing_a_stretch_does(flavour: str) -> None:
    torch.manual_seed(0)
    model: Any = SliceAggregator(16, depth=2, heads=2, dim_head=8, attention=flavour).double().eval()  # type: ignore[arg-type]
    tokens, z_mm = stacks(2, 9, dim=16)
    with torch.no_grad():
        base = model(tokens, None, z_mm).tokens
        assert torch.allclose(model(tokens, None, z_mm + 731.5).tokens, base, atol=1e-9)
        assert (model(tokens, None, 1.5 * z_mm).tokens - base).abs().max() > 0.01


def test_aggregator__a_mask_token_knows_its_place() -> None:
    torch.manual_seed(0)
    model = SliceAggregator(16, depth=1, heads=2, dim_head=8, points=1).eval()
    tokens = torch.zeros(1, 9, 16)  # nine equal tokens: what tells them apart is the position code
    with torch.no_grad():
        found = model(tokens, None, torch.arange(9.0)[None]).tokens[0]
    assert torch.cdist(found, found).fill_diagonal_(1).min() > 0.01


def test_aggregator__index_positions_need_no_mm() -> None:
    torch.manual_seed(0)
    model = SliceAggregator(16, depth=1, heads=2, dim_head=8, position="index", attention="grouped").eval()
    tokens = torch.randn(1, 6, 16)
    with torch.no_grad():
        assert torch.equal(model(tokens).tokens, model(tokens, None, torch.rand(1, 6)).tokens)


def test_aggregator__the_scale_of_slice_embeddings_does_not_matter() -> None:
    torch.manual_seed(0)
    model = SliceAggregator(16, depth=1, heads=2, dim_head=8).eval()
    tokens, z_mm = torch.randn(1, 6, 16), torch.arange(6.0)[None]
    with torch.no_grad():
        assert torch.allclose(model(tokens, None, z_mm).tokens, model(50 * tokens, None, z_mm).tokens, atol=1e-3)


def test_sincos_code__is_the_position_table_on_whole_numbers() -> None:
    assert torch.allclose(sincos_code(torch.arange(50.0)[None], 18), sincos_positions((50,), 18), atol=1e-5)
    assert sincos_code(torch.zeros(1, 2), 7)[0, :, 6].tolist() == [0.0, 0.0]


def test_grouped_linear__keeps_groups_apart() -> None:
    layer = GroupedLinear(2, 3, 4)
    x = torch.randn(1, 5, 2, 3)
    changed = x.clone()
    changed[:, :, 1] += 1
    assert torch.equal(layer(x)[:, :, 0], layer(changed)[:, :, 0])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_aggregator__runs_under_bfloat16_autocast(flavour: str) -> None:
    torch.manual_seed(0)
    model = SliceAggregator(16, depth=2, heads=2, dim_head=8, attention=flavour).eval()  # type: ignore[arg-type]
    tokens, z_mm = torch.randn(1, 300, 16), torch.arange(300.0)[None]
    exact = model(tokens, None, z_mm).pooled
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(tokens, None, z_mm).pooled
    rough.float().sum().backward()
    assert torch.allclose(exact, rough.float(), atol=0.03)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SliceAggregator(16, attention="per_qeury"), 'did you mean "per_query"'),  # type: ignore[arg-type]
        (lambda: SliceAggregator(16, norm="batch"), "accepted: post, pre"),  # type: ignore[arg-type]
        (lambda: GroupedOffsets(20, heads=8), "8 groups must divide both the width 20"),
        (lambda: GroupedOffsets(16, kernel=3), "narrower than the stride 4"),
        (lambda: GroupedOffsets(16, distance="cm"), 'accepted: "mm"'),  # type: ignore[arg-type]
        (lambda: SliceAggregator(16, depth=1)(torch.zeros(1, 4, 16)), "nothing assumes a step of 1 mm"),
        (lambda: SliceAggregator(16, depth=1)(torch.zeros(1, 4, 16), None, torch.zeros(1, 5)), r"must be \(1, 4\)"),
        (lambda: PerQuerySampling(16)(torch.zeros(1, 4, 16), torch.ones(1, 4)), "one flag per slice"),
    ],
)
def test_errors__say_what_is_accepted(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
