"""Heads, centre and monitors of self-distillation, beside the formulas."""

from __future__ import annotations

import math

import pytest
import torch

from medssl.layers.distillation import Centre, UnitHead, cross_entropy, entropy_share, information, unit_spread
from medssl.layers.transformer import Block, MaskedDecoder, key_bias


def test_cross_entropy__equals_a_loop() -> None:
    torch.manual_seed(0)
    teacher, student, centre = torch.randn(3, 5).double(), torch.randn(3, 5).double(), torch.randn(5).double()
    found = cross_entropy(teacher, centre, 0.04, student, 0.1)
    for b in range(3):
        p = [math.exp(float((teacher[b, k] - centre[k]) / 0.04)) for k in range(5)]
        q = [math.exp(float(student[b, k] / 0.1)) for k in range(5)]
        expected = -sum(x / sum(p) * math.log(y / sum(q)) for x, y in zip(p, q))
        assert float(found[b]) == pytest.approx(expected, rel=1e-9)


def test_entropy_share__is_one_for_uniform_and_zero_for_one_hot() -> None:
    assert float(entropy_share(torch.zeros(2, 7))) == pytest.approx(1)
    assert float(entropy_share(1e4 * torch.eye(7))) == pytest.approx(0, abs=1e-6)


def test_information__is_what_rows_are_told_apart_by() -> None:
    same, each = 1e4 * torch.eye(7)[[2] * 7], 1e4 * torch.eye(7)
    weight = torch.ones(7)
    assert float(information(torch.zeros(7, 7), weight)) == pytest.approx(0, abs=1e-6)
    assert float(information(same, weight)) == pytest.approx(0, abs=1e-6)
    assert float(information(each, weight)) == pytest.approx(1)
    assert float(information(each, torch.tensor([1.0, 1, 0, 0, 0, 0, 0]))) == pytest.approx(math.log(2) / math.log(7))


def test_unit_head__gives_cosines() -> None:
    torch.manual_seed(0)
    head = UnitHead(6, hidden=8, bottleneck=4, count=9).double()
    x = torch.randn(5, 6).double()
    z, rows = head.mlp(x).detach(), head.last.weight.detach()
    expected = [[float(z[b] @ rows[k] / z[b].norm() / rows[k].norm()) for k in range(9)] for b in range(5)]
    assert torch.allclose(head(x), torch.tensor(expected, dtype=torch.float64), atol=1e-9)
    head(x, frozen=True).sum().backward()
    assert (head.last.weight.grad == 0).all() and head.mlp[0].weight.grad.abs().sum() > 0


def test_centre__is_a_running_mean_of_raw_logits_by_weight() -> None:
    centre = Centre(3, 0.8)
    first, second = torch.tensor([[1.0, 2, 3], [5, 5, 5]]), torch.tensor([[7.0, 0, 1]])
    centre.note(first, torch.tensor([1.0, 0.0]))
    centre.note(second, torch.tensor([3.0]))
    centre.update()
    mean = (first[0] + 3 * second[0]) / 4
    assert torch.allclose(centre.value, 0.2 * mean)
    centre.update()  # nothing was seen: nothing moves
    centre.note(first, torch.zeros(2))
    centre.update()
    assert torch.allclose(centre.value, 0.2 * mean)


def test_unit_spread__is_one_for_random_directions_and_zero_for_equal_ones() -> None:
    torch.manual_seed(0)
    rows = torch.randn(4000, 8)
    spread, count = unit_spread(rows, torch.ones(4000))
    assert float(spread) == pytest.approx(1, abs=0.02) and float(count) == 4000
    spread, count = unit_spread(rows[:1] * torch.rand(6, 1), torch.tensor([1.0, 1, 1, 1, 1, 0]))
    assert float(spread) == pytest.approx(0, abs=1e-3) and float(count) == 5


def test_block__is_timms_and_leaves_keys_out() -> None:
    from timm.models.vision_transformer import Block as Stock

    torch.manual_seed(0)
    mine, x = Block(12, 3, 20).double().eval(), torch.randn(2, 7, 12).double()
    stock = Stock(12, 3, mlp_ratio=20 / 12, qkv_bias=True).double().eval()
    stock.norm1.eps = stock.norm2.eps = 1e-6
    stock.load_state_dict(mine.state_dict(), strict=True)
    assert torch.allclose(mine(x), stock(x), atol=1e-12)
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    seen = mine(x, key_bias(valid, x.dtype))
    assert torch.allclose(seen[0], mine(x)[0], atol=1e-12) and torch.allclose(seen[1, :4], mine(x[1:, :4])[0], atol=1e-12)
    nothing = mine(x, key_bias(torch.zeros(2, 7, dtype=torch.bool), x.dtype))
    assert nothing.isfinite().all()


def test_decoder__puts_visible_tokens_where_they_belong() -> None:
    """With nothing but positions and identities inside, what comes out at a place is what went in there."""
    decoder = MaskedDecoder(6, width=6, depth=0, heads=1, out=6).double()
    decoder.embed.weight.data = torch.eye(6).double()
    decoder.head.weight.data, decoder.norm = torch.eye(6).double(), torch.nn.Identity()  # type: ignore[assignment]
    decoder.mask_token.data.fill_(-1)
    tokens = torch.arange(12.0).reshape(1, 2, 6).double()
    found = decoder(tokens, torch.tensor([[4, 1]]), torch.zeros(1, 5, 6).double())
    assert torch.equal(found[0, 4], tokens[0, 0]) and torch.equal(found[0, 1], tokens[0, 1])
    assert (found[0, [0, 2, 3]] == -1).all()
