"""RSPNet: both losses beside their formulas, which items take part, the queue, and what a ranking of still clips is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from medssl.errors import RequestError
from medssl.objectives.relative_speed import RelativeSpeed, discrimination_loss, ranking_loss
from medssl.training.ema import update_ema
from medssl.types import StepContext, Views
from tests.objectives.clips import clip_views, encoder, specs


def objective(**changes: Any) -> RelativeSpeed:
    torch.manual_seed(0)
    return RelativeSpeed(encoder(), view_specs=specs(3), **{"dim": 8, "queue": 10, **changes}).train()


def timed(views: Views, steps: list[list[float]]) -> Views:
    """Give each view of each item its seconds between frames."""
    frames = torch.arange(views["clip"].shape[2], dtype=torch.float32)
    views.data["clip_time_s"] = torch.tensor(steps)[:, :, None] * frames
    return views


def test_losses__equal_loops() -> None:
    torch.manual_seed(0)
    q, k, other = (normalize(torch.randn(4, 8).double(), dim=1) for _ in range(3))
    negatives = normalize(torch.randn(6, 8).double(), dim=1)
    ranking = ranking_loss(q, k, other, margin=2.0, temperature=0.07)
    telling = discrimination_loss(q, k, negatives, temperature=0.07)
    for b in range(4):
        gap = float(q[b] @ k[b] - q[b] @ other[b]) / 0.07
        assert float(ranking[b]) == pytest.approx(max(0.0, 2.0 - gap), abs=1e-9)
        right = math.exp(float(q[b] @ k[b]) / 0.07)
        rest = sum(math.exp(float(q[b] @ negatives[n]) / 0.07) for n in range(6))
        assert float(telling[b]) == pytest.approx(-math.log(right / (right + rest)), rel=1e-9)


def test_margin__is_a_seventh_in_cosines() -> None:
    """2.0 times 0.07: a gap of 0.14 costs nothing, half of it half of the margin."""
    q = torch.tensor([[1.0, 0.0]])
    near, far = (torch.tensor([[1 - gap, math.sqrt(1 - (1 - gap) ** 2)]]) for gap in (0.07, 0.14))
    assert float(ranking_loss(q, q, near, margin=2.0, temperature=0.07)) == pytest.approx(1.0, abs=1e-4)
    assert float(ranking_loss(q, q, far, margin=2.0, temperature=0.07)) == pytest.approx(0.0, abs=1e-4)


def test_gradients__reach_encoder_and_heads_and_no_key() -> None:
    made = objective()
    parts = made(clip_views(count=3), StepContext())
    parts["loss_motion"].backward(retain_graph=True)
    assert made.heads.linear["appearance"].weight.grad is None and made.heads.linear["motion"].weight.grad.abs().sum() > 0
    made.zero_grad()
    parts["loss_appearance"].backward()
    assert made.heads.linear["motion"].weight.grad is None and made.heads.linear["appearance"].weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in made.keys.parameters())
    assert all(p.grad is not None for p in made.encoder.parameters())


def test_slow_copy__after_one_step_is_the_closed_form() -> None:
    made = objective(key_momentum=0.75)
    before = {key: value.clone() for key, value in made.keys.state_dict().items()}
    with torch.no_grad():
        for parameter in made.encoder.parameters():
            parameter.add_(1.0)
    for student, teacher, name in made.ema_pairs():
        update_ema(student, teacher, made.schedules(3, 10)[name])
    for key, value in made.keys["encoder"].state_dict().items():
        assert torch.allclose(value, before[f"encoder.{key}"] + 0.25, atol=1e-6)


def test_queue__holds_the_keys_of_the_other_speed_newest_first() -> None:
    made, views = objective(), clip_views(count=3)
    assert made.queue is not None
    start = made.queue.rows.clone()
    assert torch.allclose(start.norm(dim=2), torch.ones(1, 10)) and int(made.queue.filled) == 10
    with torch.no_grad():
        pooled = made.keys["encoder"].forward_features(views["clip"][:, 2].transpose(1, 2)).pooled  # type: ignore[operator]
        keys = made.keys["heads"](pooled)["appearance"]
    made(views, StepContext())
    made.after_step(StepContext())
    assert torch.allclose(made.queue.rows[0, :4], keys.flip(0), atol=1e-6)
    assert torch.equal(made.queue.rows[0, 4:], start[0, :6])


def test_items__whose_speeds_did_not_come_out_as_wanted_do_not_take_part() -> None:
    """A file slower than asked for is shown at its own rate: then all three clips have one speed."""
    made = objective(weights={"motion": 1})
    steps = [[0.03, 0.03, 0.06], [0.03, 0.03, 0.03], [0.06, 0.06, 0.03], [0.03, 0.045, 0.06]]
    views = timed(clip_views(count=3), steps)
    assert made.inputs(views)[2].tolist() == [True, False, True, False]
    assert int(made.denominators(views)["items"]) == 2
    with torch.no_grad():
        parts = made(views, StepContext())
        both = made(timed(_rows(clip_views(count=3), [0, 2]), [steps[0], steps[2]]), StepContext())
    assert float(parts["comparable"]) == 0.5 and float(parts["loss"]) == pytest.approx(float(both["loss"]), rel=1e-5)
    nothing = made(timed(clip_views(count=3), [steps[1]] * 4), StepContext())
    assert float(nothing["loss"].detach()) == 0


def _rows(views: Views, rows: list[int]) -> Views:
    meta = views.meta
    meta.valid["clip"], meta.ids, meta.keys = meta.valid["clip"][rows], meta.ids[rows], tuple(meta.keys[n] for n in rows)
    return Views({"clip": views["clip"][rows]}, meta)


def test_length__does_not_give_the_speed_away() -> None:
    """Where the fast clip runs out of frames, the others are cut to as many."""
    made, views = objective(weights={"motion": 1}), clip_views(count=3)
    views.meta.valid["clip"][1, 2, 4:] = False
    _, pixels, _ = made.inputs(views)
    assert pixels.flatten(3).any(dim=3).sum(dim=2).tolist() == [[6, 6, 6], [4, 4, 4], [6, 6, 6], [6, 6, 6]]
    changed = clip_views(count=3)
    changed.meta.valid["clip"][1, 2, 4:] = False
    changed.data["clip"][1, 0, 4:] = 5.0
    with torch.no_grad():
        assert torch.equal(made(views, StepContext())["loss"], made(changed, StepContext())["loss"])


def test_still_clips__are_ranked_at_exactly_half() -> None:
    made, views = objective(), clip_views(count=3)
    views.data["clip"] = views["clip"][:, :1, :1].expand(-1, 3, 6, -1, -1, -1).clone()
    with torch.no_grad():
        parts = made(views, StepContext())
    assert float(parts["speed_accuracy"]) == 0.5 and float(parts["loss_motion"]) == pytest.approx(2.0, abs=1e-4)


def test_bad_arguments__are_named() -> None:
    for changes, text in (
        ({"weights": {"motoin": 1}}, "weights names motoin .did you mean"),
        ({"weights": {}}, "accepted: motion, appearance"),
        ({"margin": 0}, "margin is 0"),
        ({"key_momentum": 1.0}, "key_momentum is 1.0"),
        ({"view_specs": specs(2)}, "compares three clips of a cine, views bring 2; set views.count: 3 and sampler.speeds"),
    ):
        with pytest.raises(RequestError, match=text):
            RelativeSpeed(encoder(), **{"view_specs": specs(3), **changes})
    with pytest.raises(RequestError, match="no term motin here"):
        objective()(clip_views(count=3), StepContext(loss_weights={"motin": 1}))
    with pytest.raises(RequestError, match=r"brings 2 view.s. of clip; relative_speed compares three"):
        objective()(clip_views(count=2), StepContext())
