"""VideoMAE: targets and loss beside a loop, order, what is scored, and a ring that it must learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medssl.errors import RequestError
from medssl.layers.tokens import flatten_tokens
from medssl.objectives.video_mae import VideoMAE, low_pass, patch_statistics
from medssl.types import StepContext, ViewSpec
from tests.objectives.clips import SIZE, clip_views, encoder, specs


def objective(channels: int = 1, **changes: Any) -> VideoMAE:
    torch.manual_seed(0)
    given = {"decoder_dim": 24, "decoder_depth": 1, "mask_ratio": 0.5, **changes}
    return VideoMAE(encoder(in_channels=channels), view_specs=specs(), **given).double()


def by_hand(made: VideoMAE, views: Any, floor: float) -> float:
    """Mean over hidden tokens of the squared error of normalised pixels, written as loops over tubelets and pixels."""
    clips, mask = made.inputs(views)
    prediction = made.predict(clips, mask).detach()
    total = count = 0.0
    for m in range(len(clips)):
        for n, (t, h, w) in enumerate(np.ndindex(3, 2, 3)):
            if not bool(mask[m, t, h, w]) or not bool(clips.tokens[m, n]):
                continue
            window = (m, slice(2 * t, 2 * t + 2), slice(8 * h, 8 * h + 8), slice(8 * w, 8 * w + 8))
            real = clips.pixels[window].flatten()
            for c in range(clips.video.shape[1]):
                pixels = clips.video[(m, c, *window[1:])].flatten()
                values = [float(v) for v, ok in zip(pixels, real) if ok]
                mean = sum(values) / len(values)
                deviation = max(math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)), floor) + 1e-6
                for p, ok in enumerate(real):
                    if ok:
                        total += (float(prediction[m, n, c, p]) - (float(pixels[p]) - mean) / deviation) ** 2
                        count += 1
    return total / count


@pytest.mark.parametrize("sector", [False, True])
def test_loss__equals_a_loop_over_tubelets(sector: bool) -> None:
    made, views = objective(std_floor=0.0), clip_views(2, dtype=torch.float64)
    if sector:
        views.meta.valid["clip"][..., 2:4, 3:9] = False  # within and across patches
        views.meta.valid["clip"][1, :, 4:] = False
    with torch.no_grad():
        parts = made(views, StepContext())
    assert float(parts["loss"]) == pytest.approx(by_hand(made, views, 0.0), rel=1e-9)
    counted = made.denominators(views)
    shared = made(views, StepContext(totals={"voxels": float(counted["voxels"])}))
    assert float(shared["loss"].detach()) == pytest.approx(float(parts["loss"]), rel=1e-9)


def test_loss_of_the_mean__is_one_but_for_the_unbiased_deviation() -> None:
    """Card A: predicting each patch's mean costs exactly about 1; 127 of 128 here, since deviations are unbiased."""
    made = objective(std_floor=0.0)
    with torch.no_grad():
        parts = made(clip_views(dtype=torch.float64), StepContext())
    assert float(parts["loss_of_mean"]) == pytest.approx(127 / 128, rel=1e-4)


def test_flat_patches__do_not_blow_up() -> None:
    made, views = objective(), clip_views(dtype=torch.float64)
    views.data["clip"][..., :8] = 0.3
    views.data["clip"][0, 0, 0, 0, 0, 0] = 0.3 + 1e-7
    made(views, StepContext())["loss"].backward()
    target, _, deviation = made.target(made.inputs(views)[0])
    assert target.abs().max() < 20 and float(deviation.min()) == pytest.approx(1e-3 + 1e-6)
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())


def test_statistics__are_over_valid_pixels() -> None:
    rows = torch.randn(1, 1, 2, 6, dtype=torch.float64)
    valid = torch.tensor([True, False, True, True, False, True])[None, None, None]
    mean, deviation = patch_statistics(rows, valid, 0.0)
    kept = rows[..., valid[0, 0, 0]]
    assert torch.allclose(mean[..., 0], kept.mean(dim=-1)) and torch.allclose(deviation[..., 0], kept.std(dim=-1) + 1e-6)


def test_tubes__hide_the_same_places_in_all_tubelets_with_an_exact_count() -> None:
    made = objective(mask_ratio=0.7)
    _, mask = made.inputs(clip_views())
    assert (mask == mask[:, :1]).all() and (mask.flatten(1).sum(dim=1) == 3 * 4).all()
    _, again = made.inputs(clip_views())
    _, later = made.inputs(clip_views(step=1))
    assert torch.equal(mask, again) and not torch.equal(mask, later)
    _, anywhere = objective(masking="random", mask_ratio=0.7).inputs(clip_views())
    assert (anywhere.flatten(1).sum(dim=1) == 12).all() and not (anywhere == anywhere[:, :1]).all()


def test_prediction__is_in_the_order_of_the_grid() -> None:
    """A visible patch that is changed moves, most of all, what is painted at its own place."""
    made = objective(decoder_depth=0)
    views = clip_views(1, dtype=torch.float64)
    clips, mask = made.inputs(views)
    visible = flatten_tokens((~mask)[:, None])[0, :, 0].nonzero()[:, 0]
    place = int(visible[-1])
    t, h, w = (int(i) for i in np.unravel_index(place, (3, 2, 3)))
    with torch.no_grad():
        before = made.predict(clips, mask)
        clips.video[0, :, 2 * t : 2 * t + 2, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8] *= -3
        moved = (made.predict(clips, mask) - before).square().sum(dim=(2, 3))[0]
    assert int(moved.argmax()) == place and (moved[~torch.isin(torch.arange(18), visible)] == 0).all()


def test_low_pass__equals_a_loop_and_looks_at_valid_pixels_only() -> None:
    video = torch.randn(1, 2, 2, 9, 11, dtype=torch.float64)
    valid = torch.rand(1, 2, 9, 11) > 0.3
    found = low_pass(video, valid, 1.0)
    for t, y, x in ((0, 4, 5), (1, 0, 0), (1, 8, 3)):
        total = weight = 0.0
        for dy in range(-3, 4):
            for dx in range(-3, 4):
                if 0 <= y + dy < 9 and 0 <= x + dx < 11 and bool(valid[0, t, y + dy, x + dx]):
                    share = math.exp(-(dy**2 + dx**2) / 2)
                    weight += share
                    total += share * float(video[0, 1, t, y + dy, x + dx])
        assert float(found[0, 1, t, y, x]) == pytest.approx(total / weight, rel=1e-9)
    assert low_pass(video, valid, 0) is video
    assert float(low_pass(torch.full_like(video, 3.0), valid, 1.0)[0, 0, 0, 4, 4]) == pytest.approx(3.0)


def test_reconstruction__of_a_perfect_prediction_is_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    made, views = objective(channels=2), clip_views(2, dtype=torch.float64)
    views.data["clip"] = torch.cat([views["clip"], 2 * views["clip"] + 1], dim=3)
    monkeypatch.setattr(made, "predict", lambda clips, mask: made.target(clips)[0])
    pictures = made.reconstruct(views)
    assert torch.allclose(pictures["output"], pictures["input"], atol=1e-9)
    assert pictures["mask"].shape == (2, *SIZE) and pictures["masked"].shape == (2, 2, *SIZE)
    assert (pictures["masked"].amin(dim=(1, 2, 3, 4)) == pictures["input"].amin(dim=(1, 2, 3, 4))).all()
    assert torch.equal((pictures["masked"] == pictures["input"]).all(dim=1), ~pictures["mask"])


def test_bad_arguments__are_named() -> None:
    for changes, text in (
        ({"mask_ratio": 0.0}, "mask_ratio is 0.0; accepted: between 0 and 1"),
        ({"masking": "tub"}, 'masking is "tub" .did you mean "?tube'),
        ({"std_floor": -1}, "std_floor is -1"),
        ({"view_specs": {"clip": ViewSpec("volume", SIZE)}}, "needs one kind of views that are clips; found none"),
    ):
        with pytest.raises(RequestError, match=text):
            VideoMAE(encoder(), **{"view_specs": specs(), **changes})


@pytest.mark.slow
def test_a_moving_ring_without_speckle__is_learnt_below_a_fifth() -> None:
    """Card A: below 0.2 in 1,000 steps."""
    from benchmarks.cluster_distillation_toy import clip_views as ring_views
    from benchmarks.cluster_distillation_toy import ring_clip
    from medssl.encoders.video_vit import VideoViT
    from medssl.seeding import counter_rng
    from medssl.training.schedules import warmup_cosine

    torch.manual_seed(0)
    model = VideoViT(image_size=(8, 48, 48), patch_size=8, hidden_size=64, num_layers=2, num_heads=4)
    made = VideoMAE(
        model, view_specs={"clip": ViewSpec("clip", (8, 48, 48))}, mask_ratio=0.5, decoder_dim=64, decoder_depth=2, std_floor=0.03
    )
    optimiser = torch.optim.AdamW(made.parameters(), lr=2e-3)
    losses: list[Tensor] = []
    for step in range(1000):
        for group in optimiser.param_groups:
            group["lr"] = warmup_cosine(step, steps=1000, base=2e-3, warmup=20)
        rng = counter_rng(0, step, "ring clips")
        clips = np.stack([ring_clip(rng, speckle=0.0) for _ in range(16)])
        loss = made(ring_views(clips, 0, step), StepContext(step=step))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    assert float(torch.stack(losses[-20:]).mean()) < 0.2 < float(torch.stack(losses[:20]).mean())
