"""Heads against plain loops; what padding and an unknown name do."""

from __future__ import annotations

import math

import pytest
import torch

from medssl.errors import RequestError
from medssl.networks.classification import AttentionHead, LinearHead, build_head
from medssl.types import EncoderOutput


def output(tokens: torch.Tensor) -> EncoderOutput:
    return EncoderOutput(tokens=tokens, grid=(tokens.shape[1],), pooled=tokens.mean(dim=1))


def test_linear_head__standardises_by_what_it_settled_on() -> None:
    head, rows = LinearHead(4, 3), 5 + 2 * torch.randn(50, 4)
    rows[:, 2] = 7.0  # never varies
    head.settle(rows)
    found = head(output(rows[:, None]))
    scaled = torch.stack(
        [
            (row - rows.mean(dim=0)) / torch.where(rows.std(dim=0, correction=0) > 1e-6, rows.std(dim=0, correction=0), 1.0)
            for row in rows
        ]
    )
    assert torch.allclose(found, scaled @ head.linear.weight.T + head.linear.bias, atol=1e-5)
    assert found.isfinite().all()


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4])
def test_linear_head__does_not_feel_the_scale_of_features(scale: float) -> None:
    rows = 5 + 2 * torch.randn(50, 4)
    rows[:, 2] = 7.0
    head, other = LinearHead(4, 3), LinearHead(4, 3)
    other.load_state_dict(head.state_dict())
    head.settle(rows)
    other.settle(scale * rows)
    torch.testing.assert_close(other(output(scale * rows[:, None])), head(output(rows[:, None])), atol=1e-4, rtol=0)


def test_attention_head__equals_a_loop() -> None:
    head, tokens = AttentionHead(6, 2, hidden=5), torch.randn(3, 4, 6)
    tokens[1, 2:] = 0.0
    found = head(output(tokens))
    for b in range(3):
        kept = [n for n in range(4) if tokens[b, n].abs().sum() > 0]
        h = {n: torch.nn.functional.layer_norm(tokens[b, n], (6,)) for n in kept}
        score = {}
        for n in kept:
            v, u = head.value(h[n]), head.gate(h[n])
            score[n] = float(
                head.weigh(torch.tensor([math.tanh(x) / (1 + math.exp(-y)) for x, y in zip(v.tolist(), u.tolist())])).detach()
            )
        total = sum(math.exp(value) for value in score.values())
        pooled = sum(math.exp(score[n]) / total * h[n] for n in kept)
        assert torch.allclose(found[b], head.linear(pooled), atol=1e-5)
    assert head.attention(tokens)[1, 2:].abs().max() == 0
    assert torch.allclose(head.attention(tokens).sum(dim=1), torch.ones(3))


def test_attention_head__order_of_tokens_has_no_influence_and_no_token_is_finite() -> None:
    head, tokens = AttentionHead(6, 2), torch.randn(2, 7, 6)
    assert torch.allclose(head(output(tokens)), head(output(tokens[:, torch.randperm(7)])), atol=1e-6)
    assert head(output(torch.zeros(1, 3, 6))).isfinite().all()


@pytest.mark.parametrize(
    ("name", "args", "match"),
    [
        ("linaer", {}, 'head is "linaer".*accepted: linear, attention'),
        ("linear", {"hidden": 3}, "head linear takes no hidden"),
        ("attention", {"heads": 3}, "unknown key heads; accepted: hidden, dropout"),
    ],
)
def test_build_head__refuses_what_it_does_not_know(name: str, args: dict[str, int], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        build_head(name, 4, 2, **args)
    assert isinstance(build_head("attention", 4, 2, hidden=3), AttentionHead)
