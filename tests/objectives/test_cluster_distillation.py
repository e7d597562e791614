"""Cluster distillation: places, gradients, teachers, centres, schedules (card DISCOVR, sections 9 and 10.1)."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from medssl.errors import RequestError, TrainingStopped
from medssl.layers.sinkhorn import sinkhorn
from medssl.layers.tokens import flatten_tokens, patchify, visible_indices
from medssl.objectives.cluster_distillation import (
    ClusterDistillation,
    prototype_sentence,
    released_predictions,
    released_targets,
    standardised_tokens,
)
from medssl.training.ema import update_ema
from medssl.types import StepContext, Views
from tests.objectives.clips import SIZE, clip_views, coordinates, encoder, specs

SMALL: dict[str, Any] = {
    "head_prototypes": 12,
    "head_hidden": 16,
    "bottleneck": 8,
    "decoder_dim": 24,
    "decoder_depth": 1,
    "prototypes": 3,
    "frames": 2,
    "masked_views": 2,
    "mask_ratio": 0.5,
}


def objective(**changes: Any) -> ClusterDistillation:
    torch.manual_seed(0)
    return ClusterDistillation(encoder(), view_specs=specs(), **{**SMALL, **changes}).train()


class Places(nn.Module):
    """A frame encoder whose token is the mean of its patch, in channel 0."""

    def embed(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return patchify(x, (1, 8, 8)).mean(dim=2, keepdim=True), None

    def encode_valid(self, tokens: Tensor, valid: Tensor | None, *, states: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        return tokens.mean(dim=1), tokens, []


class Identity(nn.Module):
    """A decoder that returns visible tokens where they belong, and -1 elsewhere."""

    def forward(self, tokens: Tensor, keep: Tensor, positions: Tensor, valid: Tensor | None) -> Tensor:
        fill = torch.full((len(tokens), positions.shape[1], tokens.shape[2]), -1.0)
        return fill.scatter(1, keep[..., None].expand_as(tokens), tokens)


def paths(legacy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return what target path and decoder path say at every token of clips that hold their own coordinates, and which are hidden."""
    made = objective(weights={"cluster": 1}, legacy_order=legacy)
    views, cell = coordinates()
    made.teacher["frame_encoder"] = Places()
    made.decoder = Identity()  # type: ignore[assignment]
    clips = made.clips(views)
    masks = clips.hidden(0.5, 1)[:, 0]
    keep = visible_indices(masks)
    visible = cell[keep][..., None]
    import medssl.objectives.cluster_distillation as module

    plain = module.standardised_tokens
    try:
        module.standardised_tokens = lambda tokens, valid: tokens  # what is standardised holds no coordinates any more
        target = made.frame_features(clips)[..., 0]
    finally:
        module.standardised_tokens = plain
    return target, made.decoded(visible, keep, None)[..., 0], flatten_tokens(masks[:, None])[..., 0]


def test_round_trip__coordinates_come_out_where_they_went_in() -> None:
    target, decoded, hidden = paths(legacy=False)
    _, cell = coordinates()
    assert torch.equal(target, cell.expand(2, -1))
    assert torch.equal(decoded[~hidden], target[~hidden]) and (decoded[hidden] == -1).all()


def test_round_trip__of_the_released_order_fails() -> None:
    """The defect that the test above is there for: targets and predictions of one index show different places."""
    target, decoded, hidden = paths(legacy=True)
    _, cell = coordinates()
    assert (target[0] != cell).float().mean() > 0.5
    assert (decoded[0] != -1).nonzero()[:, 0].tolist() == list(range(int((~hidden[0]).sum())))


def test_released_order__by_hand() -> None:
    """T = 4 frames of S = 3 tokens: every second token of 12, where every second frame would be 0 1 2 6 7 8."""
    tokens = torch.arange(12.0).reshape(1, 4, 3, 1)
    assert released_targets(tokens, 2)[0, :, 0].tolist() == [0, 2, 4, 6, 8, 10]
    grid = torch.arange(6.0).reshape(1, 6, 1)
    assert released_predictions(grid, torch.tensor([[1, 4]]))[0, :, 0].tolist() == [1, 4, 0, 2, 3, 5]


def test_standardised_tokens__equal_a_loop_over_valid_ones() -> None:
    tokens = torch.randn(2, 5, 3, dtype=torch.float64)
    valid = torch.tensor([[True] * 5, [True, False, True, True, False]])
    found = standardised_tokens(tokens, valid)
    for b in range(2):
        for e in range(3):
            values = [float(tokens[b, n, e]) for n in range(5) if valid[b, n]]
            mean = sum(values) / len(values)
            variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
            for n in range(5):
                assert float(found[b, n, e]) == pytest.approx((float(tokens[b, n, e]) - mean) / math.sqrt(variance + 1e-6))


def test_cluster_term__equals_the_formula_and_balances_prototypes() -> None:
    """Two directions, hard labels of a balanced assignment with uniform marginals, temperature 0.1."""
    made = objective(weights={"cluster": 1}).double()
    z = [torch.randn(40, 24, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        parts = made.compare(z[0], z[1], torch.zeros(40, dtype=torch.bool), StepContext())
    assert made.prototypes is not None
    rows = made.prototypes.weight.detach()
    scores = [normalize(x, dim=1) @ rows.T for x in z]
    balanced = []
    for s in scores:
        q = (s / 0.05).exp()
        for _ in range(10):
            q = q / q.sum(dim=0, keepdim=True) * len(q) / q.shape[1]
            q = q / q.sum(dim=1, keepdim=True)
        balanced.append(q)
        mine = sinkhorn(s, epsilon=0.05, iterations=10)
        assert torch.allclose(mine, q, atol=1e-9)
        assert torch.allclose(mine.sum(dim=1), torch.ones(40, dtype=torch.float64))
    expected = 0.0
    for mine, other in ((0, 1), (1, 0)):
        for n in range(40):
            label = int(balanced[other][n].argmax())
            expected -= float((scores[mine][n] / 0.1).log_softmax(dim=0)[label]) / 40
    assert float(parts["loss_cluster"]) == pytest.approx(expected, rel=1e-9)
    assert float(parts["loss_cluster"]) == pytest.approx(float(parts["loss_cluster_video"] + parts["loss_cluster_frame"]))


def test_sinkhorn__has_uniform_marginals() -> None:
    """512 unit tokens, 64 prototypes, 10 iterations (card 9h): masses within 1e-3 of equal; more iterations, within rounding."""
    torch.manual_seed(0)
    scores = normalize(torch.randn(512, 64), dim=1) @ normalize(torch.randn(64, 64), dim=1).T
    for iterations, off in ((10, 1e-3), (100, 1e-5)):
        q = sinkhorn(scores, epsilon=0.05, iterations=iterations)
        assert (q.sum(dim=1) - 1).abs().max() < 1e-5 and (q.sum(dim=0) / (512 / 64) - 1).abs().max() < off


def reached(made: ClusterDistillation, loss: Tensor) -> set[str]:
    """Return the modules that a loss sends a gradient other than zero to."""
    made.zero_grad()
    loss.backward(retain_graph=True)
    named = {name: p.grad for name, p in made.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    return {".".join(name.split(".")[:2]) if name.startswith("heads") else name.split(".")[0] for name in named}


def test_gradients__every_term_reaches_the_modules_it_should() -> None:
    made = objective()
    parts = made(clip_views(), StepContext())
    assert reached(made, parts["loss_video"]) == {"encoder", "heads.video"}
    assert reached(made, parts["loss_image"]) == {"frame_encoder", "heads.image"}
    assert reached(made, parts["loss_cluster"]) == {"encoder", "decoder", "prototypes"}
    assert reached(made, parts["loss"]) == {"encoder", "frame_encoder", "heads.video", "heads.image", "decoder", "prototypes"}
    assert all(p.grad is None and not p.requires_grad for p in made.teacher.parameters())


def test_gradients__of_the_frame_direction_reach_the_prototypes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the released code this direction is a constant."""
    made = objective()
    kept: dict[str, Tensor] = {}
    plain = ClusterDistillation.compare

    def compare(self: Any, video: Tensor, frame: Tensor, hidden: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        kept["loss"] = plain(self, video.detach(), frame, hidden, ctx)["loss_cluster"]
        return plain(self, video, frame, hidden, ctx)

    monkeypatch.setattr(ClusterDistillation, "compare", compare)
    made(clip_views(), StepContext())
    assert reached(made, kept["loss"]) == {"prototypes"}


def test_teachers__after_one_step_are_the_closed_form_and_the_momentum_reaches_them() -> None:
    states = {}
    for momentum in (0.9, 0.996):
        made = objective(teacher_momentum=momentum)
        before = copy.deepcopy(made.teacher.state_dict())
        optimiser = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.5)
        ctx = StepContext(schedules=made.schedules(0, 100))
        made(clip_views(), ctx)["loss"].backward()
        optimiser.step()
        for student, teacher, name in made.ema_pairs():
            update_ema(student, teacher, ctx.schedules[name])
        students = {"encoder": made.encoder, "frame_encoder": made.frame_encoder, "video_head": made.heads["video"]}
        students["image_head"] = made.heads["image"]
        moved = 0.0
        for name, student in students.items():
            assert student is not None
            for key, value in student.state_dict().items():
                expected = momentum * before[f"{name}.{key}"] + (1 - momentum) * value
                assert torch.allclose(made.teacher.state_dict()[f"{name}.{key}"], expected, atol=1e-7), (name, key)
                moved += float((value - before[f"{name}.{key}"]).abs().sum())
        assert moved > 0
        states[momentum] = made.teacher.state_dict()
    assert any(not torch.equal(states[0.9][key], states[0.996][key]) for key in states[0.9])


def test_centres__follow_raw_logits_and_the_momentum_reaches_them() -> None:
    found = {}
    for momentum in (0.5, 0.9):
        made = objective(centre_momentum=momentum, standardise=False)
        views = clip_views()
        clips = made.clips(views)
        teacher: Any = made.teacher["encoder"]
        with torch.no_grad():
            logits = made.teacher["video_head"](teacher.forward_features(clips.video).pooled)
        made(views, StepContext())
        made.after_step(StepContext())
        found[momentum] = made.centres["video"].value
        assert torch.allclose(found[momentum], (1 - momentum) * logits.mean(dim=0), atol=1e-6)
        assert float(found[momentum].sum()) != pytest.approx(1 - momentum, abs=1e-2)  # probabilities would sum to that
    assert torch.allclose(found[0.5], 5 * found[0.9], atol=1e-6)


def test_schedules__are_functions_of_the_step_and_end() -> None:
    made = objective(temperature_warmup=0.1)
    first, warm, last = (made.schedules(step, 1001) for step in (0, 100, 1000))
    assert first == {"teacher_momentum": pytest.approx(0.996), "teacher_temperature": pytest.approx(0.04)}
    assert warm["teacher_temperature"] == pytest.approx(0.07) and last["teacher_temperature"] == pytest.approx(0.07)
    assert made.schedules(50, 1001)["teacher_temperature"] == pytest.approx(0.055)
    assert made.schedules(500, 1001)["teacher_momentum"] == pytest.approx(0.998)
    assert last["teacher_momentum"] == pytest.approx(1.0)
    assert made.schedules(4000, 1001) == last  # a run that is longer than planned finds no end of a table
    views = clip_views()
    cold, hot = (made(views, StepContext(schedules={"teacher_temperature": t})) for t in (0.04, 0.07))
    assert float(hot["video_teacher_entropy"]) > float(cold["video_teacher_entropy"])


def test_sector_and_padding__reach_nothing() -> None:
    """Other content outside the sector and in frames that were filled in leaves every number alone."""
    plain, changed = clip_views(sector=True, short=True), clip_views(sector=True, short=True)
    off = ~changed.meta.valid["clip"][:, :, :, None]
    changed.data["clip"] = torch.where(off, torch.full_like(changed["clip"], 9.0), changed["clip"])
    parts = [objective()(views, StepContext()) for views in (plain, changed)]
    assert all(torch.equal(value, parts[1][name]) for name, value in parts[0].items())
    counts = objective().denominators(plain)
    assert int(counts["tokens"]) == 2 * 12 + 2 * 8 and int(counts["clips"]) == 4 and int(counts["frames"]) == 8


def test_frames__are_drawn_among_those_that_are_there() -> None:
    made = objective(frames=3)
    clips = made.clips(clip_views(short=True))
    chosen, counted = made.chosen_frames(clips)
    assert counted.sum(dim=1).tolist() == [3, 2, 3, 2]
    assert sorted(chosen[0].tolist()) == [0, 1, 2] and sorted(chosen[1, :2].tolist()) == [0, 1]
    assert int(made.denominators(clip_views(short=True))["frames"]) == 10
    few = objective(frames=1)
    drawn = {int(few.chosen_frames(few.clips(clip_views(step=step)))[0][0]) for step in range(20)}
    assert drawn == {0, 1, 2}


def test_masks__of_the_views_are_taken_and_others_refused() -> None:
    made, views = objective(), clip_views()
    masks = torch.zeros(4, 1, 3, 2, 3, dtype=torch.bool)
    masks[..., 0, :] = True
    views.data["clip_mask"] = masks
    clips = made.clips(views)
    assert torch.equal(clips.hidden(0.5, 3), masks[:, 0, :, None].expand(-1, -1, 3, -1, -1))
    assert made(views, StepContext())["loss"].isfinite()
    views.data["clip_mask"] = torch.zeros(4, 1, 3, 4, 4, dtype=torch.bool)
    with pytest.raises(RequestError, match=r"masks of \(4, 4\) patches, the encoder has \(2, 3\); set mask.patch"):
        made(views, StepContext())


def test_prototypes__are_sized_by_tokens(caplog: pytest.LogCaptureFixture) -> None:
    assert prototype_sentence(2000, 100) is None
    sentence = prototype_sentence(1999, 100)
    assert sentence is not None and "20.0 each" in sentence and "at most 99 prototypes" in sentence
    objective(prototypes=3)(clip_views(), StepContext())  # 72 tokens
    assert not caplog.records
    many = objective(prototypes=5)
    for _ in range(2):
        many(clip_views(), StepContext())
    assert [record.message for record in caplog.records] == [prototype_sentence(72, 5)]
    default = objective(prototypes=None)
    assert default.prototypes is not None and default.prototypes.count == 8  # 18 tokens in a clip


def test_stages__weigh_terms_anew_and_unknown_ones_are_named() -> None:
    made = objective()
    with torch.no_grad():
        parts = made(clip_views(), StepContext(loss_weights={"video": 0, "cluster": 2}))
    assert float(parts["loss"]) == pytest.approx(float(2 * parts["loss_cluster"] + parts["loss_image"]), rel=1e-5)
    with pytest.raises(RequestError, match=r"no term clustr here .did you mean"):
        made(clip_views(), StepContext(loss_weights={"clustr": 1}))


def test_collapse__stops_the_run() -> None:
    made = objective(alarm={"epochs": 1, "steps": 3})
    for head in made.heads.values():
        head.last.weight.data[:] = head.last.weight.data[:1]  # type: ignore[union-attr, operator, index]
    for name in ("video_head", "image_head"):
        made.teacher[name].last.weight.data[:] = made.teacher[name].last.weight.data[:1].clone()  # type: ignore[union-attr, operator, index]
    views = clip_views()
    views.data["clip"] = views["clip"][:1, :].expand(4, -1, -1, -1, -1, -1) * 0.0

    def run(steps: int) -> None:
        for step in range(steps):
            made(views, StepContext(step=step, epoch=step))
            made.after_step(StepContext(step=step, epoch=step))

    with pytest.raises(TrainingStopped, match=r"class tokens of a batch are alike .* they have collapsed"):
        run(8)


def test_exports__name_teacher_student_and_frames() -> None:
    parts = objective().exported()
    assert list(parts) == ["encoder", "video_student", "image_teacher"]
    assert parts["encoder"].manifest["branch"] == "video_teacher"
    assert parts["encoder"].manifest["clip"] == {"frames": 6, "fps": None, "tubelet": 2}
    assert parts["image_teacher"].manifest["encoder"]["args"]["tubelet"] == 1
    assert parts["image_teacher"].manifest["encoder"]["args"]["image_size"] == [1, *SIZE[1:]]
    assert list(objective(export="video_student").exported()) == ["encoder", "video_teacher", "image_teacher"]
    assert list(objective(weights={"cluster": 1}).exported()) == ["encoder"]
    assert list(objective(weights={"cluster": 1, "image": 1}).exported()) == ["encoder", "image_teacher"]


def bad(views: Views, text: str) -> None:
    with pytest.raises(RequestError, match=text):
        objective()(views, StepContext())


def test_assignments__are_maps_of_both_branches() -> None:
    made, views = objective().eval(), clip_views(sector=True)
    maps = made.assignments(views)
    assert maps["input"].shape == (4, 1, *SIZE)
    for name in ("video", "frame"):
        assert maps[name].shape == maps["mask"].shape == (4, 3, 2, 3)
        assert (maps[name][..., 0] == -1).all() and ((maps[name][..., 1:] >= 0) & (maps[name][..., 1:] < 3)).all()
    clips, shown = made.clips(views), maps["mask"]
    same = (maps["video"] == maps["frame"])[clips.on_grid]
    with torch.no_grad():
        parts = made(views, StepContext())
    assert float(parts["cluster_agreement"]) == pytest.approx(float(same.float().mean()))
    assert float(parts["cluster_agreement_hidden"]) == pytest.approx(float(same[shown[clips.on_grid]].float().mean()))
    with pytest.raises(RequestError, match="assignments need the term cluster"):
        objective(weights={"video": 1}).assignments(views)


def test_bad_clips__are_named() -> None:
    one = clip_views()
    one.data["clip"] = one["clip"][:, :, :1]
    one.meta.valid["clip"] = one.meta.valid["clip"][:, :, :1]
    bad(one, "accepted: clips .B, V, T, C, H, W. of at least 2 frames, one tubelet")
    empty = clip_views()
    empty.meta.valid["clip"][2] = False
    bad(empty, r"clips \[2\] of the batch have no valid token; their sector is empty")
    short = clip_views()
    short.meta.valid["clip"][1, :, 1:] = False
    bad(short, r"clips \[1\] of the batch have no valid token; .* fewer than 2 frames that are not filled in")


def test_bad_arguments__are_named() -> None:
    for changes, text in (
        ({"weights": {"vidio": 1}}, "weights names vidio .did you mean"),
        ({"weights": {"image": 1}}, "with video or cluster above 0"),
        ({"weights": {"video": -1, "cluster": 1}}, "accepted: 0 or more"),
        ({"teacher_temperature": [0.04, 0.2]}, "last < student_temperature"),
        ({"temperature_warmup": 2}, "accepted: 0 to 1, a share of the run"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0; accepted: between 0 and 1"),
        ({"masked_views": 0}, "masked_views is 0"),
        ({"teacher_momentum": 1.0}, "teacher_momentum is 1.0; accepted: 0 to below 1"),
        ({"view_specs": {}}, "needs one kind of views that are clips; found none"),
    ):
        with pytest.raises(RequestError, match=text):
            ClusterDistillation(encoder(), **{"view_specs": specs(), **SMALL, **changes})
    with pytest.raises(RequestError, match="legacy_order mixes the places of tokens"):
        objective(legacy_order=True)(clip_views(sector=True), StepContext())
    wrong = {"clip": specs()["clip"].__class__("clip", (1, 16, 24))}
    with pytest.raises(RequestError, match=r"a clip of 1 frame.s. is shorter than a tubelet of 2"):
        ClusterDistillation(encoder(), view_specs=wrong, **SMALL)


def test_autocast__keeps_assignments_in_float32() -> None:
    made = objective()
    with torch.autocast("cpu", torch.bfloat16):
        parts = made(clip_views(), StepContext())
    assert all(value.dtype == torch.float32 and value.isfinite() for name, value in parts.items() if name.startswith("loss"))
