"""Corruptions: levels grow, seeds repeat, each does what it is called."""

from __future__ import annotations

import math

import pytest
import torch

from medssl.errors import RequestError
from medssl.evaluation.corruptions import LEVELS, STRENGTHS, corrupt, corrupt_seen, relative_robustness
from medssl.types import ClipBatch, Stack


def picture(shape: tuple[int, ...] = (2, 1, 24, 20, 16)) -> torch.Tensor:
    axes = [torch.linspace(-2, 2, n) for n in shape[2:]]
    grid = torch.meshgrid(*axes, indexing="ij")
    ball = (sum(g**2 for g in grid) < 1).float() * 5 + sum(torch.sin(3 * g) for g in grid)
    ball = ball + 0.3 * torch.randn(ball.shape, generator=torch.Generator().manual_seed(0))  # no line of k-space is empty
    return torch.stack([ball, 2 * ball + 3])[:, None]


@pytest.mark.parametrize("shape", [(2, 1, 24, 20, 48), (2, 1, 24, 48)])
@pytest.mark.parametrize("kind", sorted(STRENGTHS))
def test_levels__take_more_away_each_and_repeat(kind: str, shape: tuple[int, ...]) -> None:
    x = picture(shape)
    away = []
    for level in range(LEVELS + 1):
        found = corrupt(x, kind, level, [4, 9], seed=3)
        assert found.shape == x.shape and found.dtype == x.dtype and found.isfinite().all()
        assert torch.equal(found, corrupt(x, kind, level, [4, 9], seed=3))
        away.append(float((found - x).square().mean()))
    assert away[0] == 0 and all(b > a for a, b in zip(away, away[1:])), away


@pytest.mark.parametrize("kind", sorted(STRENGTHS))
def test_corruption__is_the_images_own_in_any_batch(kind: str) -> None:
    x = picture()[:1].expand(3, -1, -1, -1, -1)
    together = corrupt(x, kind, 3, [5, 6, 7])
    assert torch.equal(together[1:2], corrupt(x[:1], kind, 3, [6]))
    assert torch.equal(together[0], together[1]) == (kind not in ("noise", "motion"))  # others are not drawn


@pytest.mark.parametrize("kind", sorted(STRENGTHS))
def test_corruption__means_the_same_at_another_scale(kind: str) -> None:
    x = picture()
    assert torch.allclose(corrupt(7 * x, kind, 3, [0, 1]), 7 * corrupt(x, kind, 3, [0, 1]), rtol=1e-3, atol=1e-3)


def test_noise__has_the_std_it_says() -> None:
    x = torch.zeros(1, 1, 40, 40, 40)
    x[:, :, 20:] = 2.0
    found = corrupt(x, "noise", 4, [0]) - x
    assert float(found.std()) == pytest.approx(STRENGTHS["noise"][3] * float(x.std()), rel=0.02)


def test_blur__equals_a_gaussian_in_the_middle_and_keeps_constants() -> None:
    x = torch.zeros(1, 1, 21, 21)
    x[0, 0, 10, 10] = 1.0
    found, sigma = corrupt(x, "blur", 3, [0])[0, 0], STRENGTHS["blur"][2]
    weights = torch.tensor([math.exp(-0.5 * (k / sigma) ** 2) for k in range(-3, 4)])
    weights = weights / weights.sum()
    assert torch.allclose(found[7:14, 7:14], torch.outer(weights, weights), atol=1e-6)
    assert torch.allclose(corrupt(torch.ones(1, 1, 9, 9), "blur", 5, [0]), torch.ones(1, 1, 9, 9))


def test_contrast__keeps_the_mean() -> None:
    x = picture()
    found = corrupt(x, "contrast", 2, [0, 1])
    assert torch.allclose(found.mean(dim=(1, 2, 3, 4)), x.mean(dim=(1, 2, 3, 4)), atol=1e-4)
    assert torch.allclose(found.std(dim=(1, 2, 3, 4)), 0.7 * x.std(dim=(1, 2, 3, 4)), rtol=1e-4)


def test_motion__keeps_the_sum_of_every_line_of_k_space_but_moves_phases() -> None:
    x = picture()
    found = corrupt(x, "motion", 3, [0, 1])
    before, after = (torch.fft.fftn(v, dim=(2, 3)) for v in (x, found))
    assert torch.allclose(before[:, :, :, 0].abs(), after[:, :, :, 0].abs(), atol=1e-2)  # the middle stays
    assert not torch.allclose(before, after, atol=1.0)


def test_anisotropy__touches_the_last_axis_alone() -> None:
    x = torch.randn(1, 1, 5, 6, 12)
    found = corrupt(x, "anisotropy", 2, [0])  # pairs of slices are averaged and filled in linearly
    assert torch.allclose(corrupt(x[:, :, :1], "anisotropy", 2, [0]), found[:, :, :1], atol=1e-6)
    assert torch.allclose(found[..., 1], 0.75 * x[..., :2].mean(dim=-1) + 0.25 * x[..., 2:4].mean(dim=-1), atol=1e-5)


def test_unknown_kind_and_level__are_refused() -> None:
    with pytest.raises(RequestError, match=r'corruption "nosie".*did you mean'):
        corrupt(picture(), "nosie", 1, [0, 1])
    with pytest.raises(RequestError, match="level 6; accepted: 0 to 5"):
        corrupt(picture(), "noise", 6, [0, 1])


def test_relative_robustness__is_the_share_above_chance() -> None:
    assert relative_robustness(0.9, [0.8, 0.6], chance=0.5) == pytest.approx((0.75 + 0.25) / 2)
    assert math.isnan(relative_robustness(0.5, [0.4], chance=0.5)) and math.isnan(relative_robustness(0.9, [], chance=0.5))


def planes(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Two items of planes (2, N, 1, 24, 20), of which the second has two planes less, and which are real."""
    x = picture((2, 1, 24, 20, n)).permute(0, 4, 1, 2, 3).contiguous()
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[1, n - 2 :] = False
    x[~valid] = 99.0
    return x, valid


@pytest.mark.parametrize("kind", sorted(STRENGTHS))
def test_stack__is_corrupted_item_by_item_without_its_padding(kind: str) -> None:
    x, valid = planes()
    stack = Stack(x, valid, torch.arange(6.0).expand(2, -1))
    found = corrupt_seen(stack, kind, 3, [4, 9], seed=1)
    assert isinstance(found, Stack) and torch.equal(found.depth, stack.depth) and torch.equal(found.planes[~valid], x[~valid])
    assert not torch.equal(found.planes[1, :4], x[1, :4]) and float(stack.planes[~valid].min()) == 99
    alone = corrupt_seen(Stack(x[1:, :4], valid[1:, :4], stack.depth[1:, :4]), kind, 3, [9], seed=1)
    assert isinstance(alone, Stack) and torch.equal(alone.planes[0], found.planes[1, :4])
    assert torch.equal(corrupt_seen(stack, kind, 0, [4, 9]).planes, x)  # type: ignore[union-attr]


def test_blur__of_planes_stays_in_each() -> None:
    x, valid = planes()
    found = corrupt_seen(Stack(x, valid, torch.zeros(2, 6)), "blur", 3, [0, 1])
    assert isinstance(found, Stack) and torch.allclose(found.planes[0], corrupt(x[0], "blur", 3, list(range(6))), atol=1e-5)


@pytest.mark.parametrize("kind", sorted(STRENGTHS))
def test_clip__is_corrupted_inside_its_sector_in_frames_of_the_file(kind: str) -> None:
    x, valid = planes()
    sector = torch.zeros(2, 1, 24, 20, dtype=torch.bool)
    sector[..., 4:20, 3:18] = True
    clip = ClipBatch(x.transpose(1, 2), valid, sector, torch.zeros(2, 6))
    found = corrupt_seen(clip, kind, 3, [4, 9], seed=1)
    changed = (found.video != clip.video)[:, 0]  # type: ignore[union-attr]
    assert changed[0].any() and changed[1].any() and not (changed & ~clip.pixels).any()
