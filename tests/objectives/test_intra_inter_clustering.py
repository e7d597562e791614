"""Intra-inter clustering: formulas in float64, stop-gradients, and sanity experiments 9.2 to 9.4 and 9.8 of the method card."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize

from medssl.errors import RequestError, TrainingStopped
from medssl.layers.prototypes import UNLABELLED
from medssl.objectives.intra_inter_clustering import IntraInterClustering, hidden_count, hide_slices, masked_loss, swap_loss
from medssl.testing import check_objective
from medssl.types import StepContext, Views
from tests.layers.test_prototypes import plain_sinkhorn
from tests.objectives.stacks import SPECS, FakeStackEncoder, make_views


def build(seed: int = 0, dtype: torch.dtype = torch.float32, dim: int = 16, **changes: Any) -> IntraInterClustering:
    torch.manual_seed(seed)
    arguments = {"view_specs": SPECS, "items": 12, "intra_prototypes": 8, "inter_prototypes": 4, "projector_dim": 8}
    return IntraInterClustering(FakeStackEncoder(dim), **{**arguments, "freeze_prototypes": 0, "standardise": False, **changes}).to(
        dtype
    )


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def plain_swap(embeddings: list[Tensor], prototypes: Tensor) -> float:
    """L_swap of the card for crops (M, E), targets from the first two, as plain loops."""
    c = prototypes.tolist()
    unit = [[[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in z.tolist()] for z in embeddings]
    scores = [[[sum(a * b for a, b in zip(row, k)) for k in c] for row in z] for z in unit]
    total = 0.0
    for t in (0, 1):
        q = plain_sinkhorn(scores[t], 0.05, 3)
        for s in range(len(scores)):
            if s != t:
                for b in range(len(q)):
                    p = softmax([v / 0.1 for v in scores[s][b]])
                    total -= sum(x * math.log(y) for x, y in zip(q[b], p))
    return total / len(unit[0]) / (2 * (len(scores) - 1))


def train(
    objective: IntraInterClustering, batches: list[Views], steps: int, start: int = 0, lr: float = 3e-3
) -> list[dict[str, float]]:
    """The order of the loop: forward, optimiser, after_step. AdamW is rebuilt at every call."""
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=lr)
    seen = []
    for step in range(start, start + steps):
        ctx = StepContext(step=step)
        parts = objective(batches[step % len(batches)], ctx)
        optimiser.zero_grad()
        parts["loss"].backward()
        optimiser.step()
        objective.after_step(ctx)
        seen.append({name: float(value.detach()) for name, value in parts.items()})
    return seen


@pytest.mark.parametrize("local", [False, True])
def test_intra_on_images__equals_plain_loops(local: bool) -> None:
    objective = build(dtype=torch.float64)
    views = make_views("image", 5, local=local, dtype=torch.float64)
    parts = objective(views, StepContext())
    names = ["image"] + ["image_local"] * local
    with torch.no_grad():
        crops = [
            objective.projector(objective.encoder.embed_slices(views[name][:, v : v + 1])[:, 0])
            for name in names
            for v in range(views[name].shape[1])
        ]
    assert len(crops) == (5 if local else 2)
    expected = plain_swap(crops, objective.intra.heads[0].weight)
    assert float(parts["loss_intra"].detach()) == pytest.approx(expected, rel=1e-9)
    assert torch.equal(parts["loss"], parts["loss_intra"])
    assert "loss_inter" not in parts and "loss_mask" not in parts


def test_stacks__all_three_terms_equal_plain_loops() -> None:
    objective = build(dtype=torch.float64, weights={"intra": 0.5, "inter": 2.0, "mask": 3.0})
    views = make_views("stack", 4, dtype=torch.float64)
    hidden = torch.zeros(4, 2, 6, dtype=torch.bool)
    hidden[0, :, 2] = hidden[1, :, 1] = hidden[1, :, 5] = True  # slice 5 of item 1 is padding
    views.data["stack_mask"] = hidden
    parts = {name: float(value.detach()) for name, value in objective(views, StepContext()).items()}
    depth = views["stack_depth"][0, 0]
    slices: list[list[Tensor]] = [[], []]
    volumes: list[list[Tensor]] = [[], []]
    error, count = 0.0, 0
    with torch.no_grad():
        for b in range(4):
            n = 4 if b % 2 else 6
            for v in (0, 1):
                tokens = objective.encoder.embed_slices(views["stack"][b : b + 1, v, :n])
                slices[v] += list(objective.projector(tokens[0]))
                volumes[v].append(objective.encoder.aggregator(tokens, None, depth[None, :n]).pooled[0])
                places = [i for i in range(n) if hidden[b, v, i]]
                shown = tokens.clone()
                shown[0, places] = objective.mask_token
                guess = objective.predictor(objective.encoder.aggregator(shown, None, depth[None, :n]).tokens)[0]
                for i in places:
                    row = tokens[0, i].tolist()
                    mean = sum(row) / len(row)
                    std = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row) + 1e-5)
                    error += sum((g - (x - mean) / std) ** 2 for g, x in zip(guess[i].tolist(), row)) / len(row)
                    count += 1
    assert count == 4 and len(slices[0]) == 20
    assert parts["loss_intra"] == pytest.approx(
        plain_swap([torch.stack(s) for s in slices], objective.intra.heads[0].weight), rel=1e-9
    )
    assert parts["loss_inter"] == pytest.approx(
        plain_swap([torch.stack(v) for v in volumes], objective.inter.heads[0].weight), rel=1e-9
    )
    assert parts["loss_mask"] == pytest.approx(error / count, rel=1e-9)
    assert parts["loss"] == pytest.approx(0.5 * parts["loss_intra"] + 2 * parts["loss_inter"] + 3 * parts["loss_mask"])
    stage = objective(views, StepContext(loss_weights={"inter": 0.0}))
    assert float(stage["loss"].detach()) == pytest.approx(0.5 * parts["loss_intra"] + 3 * parts["loss_mask"])


def test_volume_layout__is_the_stack_of_its_slices() -> None:
    objective = build(dtype=torch.float64)
    volume = make_views("volume", 3, dtype=torch.float64)
    hidden = torch.zeros(3, 2, 5, dtype=torch.bool)
    hidden[:, :, 1] = True
    volume.data["volume_mask"] = hidden
    stack = make_views("stack", 3, dtype=torch.float64)
    turned = volume["volume"].movedim(-1, 2).transpose(-1, -2).flip(-2, -1)  # slices as they are shown
    stack.data = {"stack": turned, "stack_mask": hidden}
    stack.data["stack_depth"] = (2.5 * torch.arange(5.0)).expand(3, 2, 5)
    stack.meta.valid["stack"] = volume.meta.valid["volume"].movedim(-1, 2)
    one, other = objective(volume, StepContext()), objective(stack, StepContext())
    assert one["loss"].detach() == pytest.approx(float(other["loss"].detach()), rel=1e-6)  # spacing is kept in float32


def test_contract__deepcluster() -> None:
    """Sinkhorn sees one micro-batch, so only cluster labels average over micro-steps as `check_objective` wants it."""
    objective = build(mode="deepcluster")
    views = make_views("stack", 4)
    train(objective, [views], 1)
    objective.on_epoch(StepContext())
    check_objective(objective, views, steps=15)


def test_contract__swav() -> None:
    objective = build()
    views = make_views("stack", 4)
    assert {name: int(count) for name, count in objective.denominators(views).items()} == {"intra": 20, "inter": 4, "mask": 8}
    objective(views, StepContext())["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
    seen = train(objective, [views], 15)
    assert seen[-1]["loss"] < seen[0]["loss"]


def test_denominators__average_uneven_micro_steps() -> None:
    objective = build(mode="deepcluster")
    train(objective, [make_views("stack", 4)], 1)
    objective.on_epoch(StepContext())
    halves = [make_views("stack", 1), make_views("stack", 3, first=1)]
    counts = [objective.denominators(half) for half in halves]
    totals = {name: float(counts[0][name] + counts[1][name]) for name in counts[0]}
    assert totals == {"intra": 20, "inter": 4, "mask": 8}
    whole = objective(make_views("stack", 4), StepContext(totals=totals))
    split = [objective(half, StepContext(totals=totals, micro_steps=2)) for half in halves]
    for name in ("loss", "loss_intra", "loss_inter", "loss_mask"):
        assert float(whole[name].detach()) == pytest.approx(float((split[0][name] + split[1][name]).detach()) / 2, rel=1e-5)


def test_targets__carry_no_gradient() -> None:
    torch.manual_seed(0)
    objective = build()
    z = [normalize(torch.randn(6, 8), dim=1).requires_grad_(True) for _ in range(3)]
    objective.intra(z, torch.arange(6))[0].backward()
    with torch.no_grad():
        head = objective.intra.heads[0]
        targets = [objective.intra._assign(head, v, head(z[v])) for v in (0, 1)]
    again = [row.detach().clone().requires_grad_(True) for row in z]
    swap_loss(targets, [head(row) / 0.1 for row in again]).backward()
    assert all(torch.allclose(a.grad, b.grad) for a, b in zip(z, again))  # type: ignore[arg-type]
    tokens = torch.randn(2, 5, 4, requires_grad=True)
    masked_loss(torch.randn(2, 5, 4, requires_grad=True), tokens, torch.ones(2, 5, dtype=torch.bool)).backward()
    assert tokens.grad is None


def test_mask__hidden_input_slices_do_not_change_the_prediction() -> None:
    """Card 9.8."""
    objective = build().eval()
    views = make_views("stack", 2)
    views.data["stack_mask"] = torch.zeros(2, 2, 6, dtype=torch.bool)
    views.data["stack_mask"][:, :, 2] = True
    seen: list[Tensor] = []
    objective.predictor.register_forward_hook(lambda _m, _i, out: seen.append(out))
    objective(views, StepContext())
    views.data["stack"] = views["stack"].clone()
    views.data["stack"][:, :, 2] += 100 * torch.randn(2, 2, 1, 8, 8)
    objective(views, StepContext())
    assert torch.equal(seen[0], seen[1])
    views.data["stack"][:, :, 3] += 1
    objective(views, StepContext())
    assert not torch.allclose(seen[0], seen[2])


def test_mask__beats_the_mean_predictor_on_smooth_stacks() -> None:
    """Card 9.8: neighbours are alike, so what is hidden can be told from what is shown."""
    objective = build(weights={"mask": 1.0}, mask_ratio=0.3)
    for parameter in objective.encoder.slice_encoder.parameters():
        parameter.requires_grad_(False)
    objective.encoder.projection.requires_grad_(False)
    batches = []
    for number in range(12):
        views = make_views("stack", 16, first=16 * number)
        x = views["stack"]
        views.data["stack"] = x[:, :, :1] + 0.3 * (x - x[:, :, :1])  # neighbours alike
        batches.append(views)
    test = batches.pop()
    train(objective, batches, 150, lr=1e-2)
    objective.eval()
    ours = float(objective(test, StepContext(step=7))["loss_mask"].detach())
    real = [views.meta.valid["stack"].flatten(0, 1)[..., 0, 0] for views in batches]
    tokens = [objective.encoder.embed_slices(views["stack"].flatten(0, 1))[flags] for views, flags in zip(batches, real)]
    mean = layer_norm(torch.cat(tokens).detach(), (16,)).mean(dim=0)
    objective.predictor.register_forward_hook(lambda _module, _input, out: mean.expand_as(out))
    theirs = float(objective(test, StepContext(step=7))["loss_mask"].detach())
    assert ours < 0.5 * theirs


def test_hidden_slices__counts_and_repeatability() -> None:
    assert [hidden_count(n, 0.1) for n in (0, 1, 2, 10, 11, 30, 64)] == [0, 0, 1, 1, 2, 3, 7]
    assert hidden_count(2, 0.9) == 1
    valid = torch.ones(3, 20, dtype=torch.bool)
    valid[1, 5:] = False
    valid[2] = False
    hidden = hide_slices(valid, [3, 4, 5], 0.25, 0, 7)
    assert hidden.sum(dim=1).tolist() == [5, 2, 0] and not (hidden & ~valid).any()
    assert torch.equal(hide_slices(valid[1:], [4, 5], 0.25, 0, 7), hidden[1:])
    assert not torch.equal(hide_slices(valid, [3, 4, 5], 0.25, 0, 8), hidden)


def test_prototypes__have_length_one_after_every_step() -> None:
    """Card 9.3."""
    objective = build()
    before = objective.inter.heads[0].weight.detach().clone()
    for step in range(5):
        train(objective, [make_views("stack", 4)], 1, start=step)
        for head in (*objective.intra.heads, *objective.inter.heads):
            assert (head.weight.norm(dim=1) - 1).abs().max() < 1e-6
    assert not torch.allclose(objective.inter.heads[0].weight, before)


def test_freeze_prototypes__keeps_them_at_first() -> None:
    objective = build(freeze_prototypes=3)
    before = objective.intra.heads[0].weight.detach().clone()
    for step in range(4):
        optimiser = torch.optim.SGD(objective.parameters(), lr=0.1)
        objective(make_views("stack", 4), StepContext(step=step))["loss"].backward()
        optimiser.step()
        objective.after_step(StepContext(step=step))
        assert torch.allclose(objective.intra.heads[0].weight, before, atol=1e-6) == (step < 3)


def test_deepcluster__starts_at_ln_k_with_random_labels() -> None:
    """Card 9.4: K = 4, 1.386; small weights make predictions near uniform only at high temperature."""
    objective = build(mode="deepcluster", inter_prototypes=[4, 4, 4], weights={"inter": 1.0}, temperature=1.0)
    assert objective.inter.bank is not None
    objective.inter.bank.labels.copy_(torch.randint(0, 4, (3, 12), generator=torch.Generator().manual_seed(0)))
    loss = objective(make_views("stack", 12), StepContext())["loss_inter"]
    assert float(loss.detach()) == pytest.approx(math.log(4), abs=0.25)
    assert not list(objective.inter.parameters())


def test_deepcluster__labels_are_those_of_the_bank() -> None:
    objective = build(mode="deepcluster", dtype=torch.float64, weights={"inter": 1.0}, inter_prototypes=[3, 3], items=6)
    views = make_views("stack", 4, dtype=torch.float64)
    head = objective.inter
    first = objective(views, StepContext())["loss_inter"]
    assert torch.isfinite(first) and head.bank is not None and not head.bank.clustered  # balanced targets until then
    objective.after_step(StepContext())
    assert head.bank.filled.tolist() == [True] * 4 + [False] * 2
    objective.on_epoch(StepContext())
    assert (head.bank.labels[:, :4] >= 0).all() and (head.bank.labels[:, 4:] == UNLABELLED).all()
    for number, prototypes in enumerate(head.heads):
        nearest = (head.bank.rows[number % 2, :4] @ prototypes.weight.T).argmax(dim=1)
        assert torch.equal(nearest, head.bank.labels[number, :4])
    more = make_views("stack", 6, dtype=torch.float64)
    parts = objective(more, StepContext(step=1))
    assert {k: int(v) for k, v in objective.denominators(more).items()} == {"inter": 4}  # items 4 and 5 have no label yet
    with torch.no_grad():
        stacks = objective._stacks(more, "stack")
        tokens = objective.encoder.embed_slices(stacks.x.flatten(0, 1), stacks.valid.flatten(0, 1))
        pooled = objective.encoder.aggregator(tokens, stacks.valid.flatten(0, 1), more["stack_depth"].flatten(0, 1)).pooled
    z = normalize(pooled, dim=1).reshape(6, 2, -1)
    total = 0.0
    for number, prototypes in enumerate(head.heads):
        for b in range(4):
            for v in (0, 1):
                p = softmax([float(s) / 0.1 for s in prototypes.weight @ z[b, v]])
                total -= math.log(p[int(head.bank.labels[number, b])])
    assert float(parts["loss_inter"].detach()) == pytest.approx(total / (2 * 4 * 2), rel=1e-9)


def test_deepcluster__slices_share_slots_by_place() -> None:
    objective = build(mode="deepcluster", places=3, items=4)
    train(objective, [make_views("stack", 2)], 1)
    assert objective.intra.bank is not None
    assert objective.intra.bank.filled.tolist() == [True] * 3 + [True, True, False] + [False] * 6  # item 1 holds 4 of 6 slices
    train(objective, [make_views("image", 1, first=3)], 1, start=1)
    assert objective.intra.bank.filled[9:].tolist() == [True, False, False]


def test_fewer_items_than_prototypes__are_clamped() -> None:
    objective = build(mode="deepcluster", inter_prototypes=50, intra_prototypes=200)
    views = make_views("stack", 3)
    train(objective, [views], 1)
    objective.on_epoch(StepContext())
    assert int(objective.inter.heads[0].active) == 3
    parts = objective(views, StepContext(step=1))
    parts["loss"].backward()
    assert all(torch.isfinite(value) for value in parts.values())
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters() if p.grad is not None)


def test_few_samples_per_prototype__is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Card 9.2."""
    objective = build(inter_prototypes=3000, weights={"inter": 1.0})
    with caplog.at_level(logging.WARNING):
        train(objective, [make_views("stack", 6)], 2)
    assert len(caplog.records) == 1 and "teach little" in caplog.text
    quiet = build(inter_prototypes=30, inter_queue=40, weights={"inter": 1.0})
    caplog.clear()
    train(quiet, [make_views("stack", 6)], 1)
    assert not caplog.records


def test_queue__makes_targets_sharper() -> None:
    objective = build(inter_prototypes=64, inter_queue=128, weights={"inter": 1.0})
    batches = [make_views("stack", 8, seed=seed) for seed in range(20)]
    seen = train(objective, batches, 20, lr=0.0)
    assert int(objective.inter.queue.filled) == 128  # type: ignore[union-attr]
    assert seen[-1]["inter_target_sharpness"] > seen[0]["inter_target_sharpness"] + 0.02


@pytest.mark.parametrize("mode", ["swav", "deepcluster"])
def test_resume__is_bit_exact(mode: str) -> None:
    changes: dict[str, Any] = {"mode": mode}
    if mode == "swav":
        changes |= {"intra_queue": 30, "inter_queue": 7}
    batches = [make_views("stack", 4), make_views("image", 4, first=4), make_views("stack", 4, first=8)]
    whole = build(**changes)
    optimiser = torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=0.05)

    def play(objective: IntraInterClustering, optimiser: torch.optim.SGD, steps: range) -> list[float]:
        losses = []
        for step in steps:
            if step % 3 == 0:
                objective.on_epoch(StepContext(step=step))
            ctx = StepContext(step=step)
            loss = objective(batches[step % 3], ctx)["loss"]
            optimiser.zero_grad(set_to_none=False)
            loss.backward()
            optimiser.step()
            objective.after_step(ctx)
            losses.append(float(loss.detach()))
        return losses

    play(whole, optimiser, range(5))
    state = copy.deepcopy(whole.state_dict())
    expected = play(whole, optimiser, range(5, 11))
    again = build(seed=1, **changes)
    again.load_state_dict(state, strict=True)
    found = play(again, torch.optim.SGD([p for p in again.parameters() if p.requires_grad], lr=0.05), range(5, 11))
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_single_slice__is_a_volume_too() -> None:
    objective = build()
    views = make_views("stack", 4)
    for key in ("stack", "stack_depth", "stack_share"):
        views.data[key] = views[key][:, :, :1]
    views.meta.valid["stack"] = views.meta.valid["stack"][:, :, :1]
    parts = objective(views, StepContext())
    assert float(parts["loss_mask"].detach()) == 0
    assert float(parts["loss_inter"].detach()) > 0
    parts["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters() if p.grad is not None)


def test_padding__changes_nothing() -> None:
    objective = build(dtype=torch.float64)
    views = make_views("stack", 4, dtype=torch.float64)
    before = objective(views, StepContext())
    views.data["stack"] = torch.where(
        views.meta.valid["stack"][:, :, :, None], views["stack"], torch.tensor(1e6, dtype=torch.float64)
    )
    after = objective(views, StepContext())
    assert torch.equal(before["loss"], after["loss"])


@pytest.mark.parametrize("kind", ["stack", "image"])
@pytest.mark.parametrize("mode", ["swav", "deepcluster"])
def test_nothing_real__gives_zero_and_gradients(kind: str, mode: str) -> None:
    objective = build(mode=mode)
    views = make_views(kind, 2)
    views.meta.valid[kind][:] = False
    parts = objective(views, StepContext())
    assert float(parts["loss"].detach()) == 0
    parts["loss"].backward()
    objective.after_step(StepContext())
    objective.on_epoch(StepContext())
    used = objective.projector.parameters() if kind == "image" else (p for p in objective.parameters() if p.requires_grad)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in used)
    some = make_views(kind, 3)
    some.meta.valid[kind][1] = False
    assert torch.isfinite(objective(some, StepContext())["loss"])


def test_constant_slices__stay_finite() -> None:
    objective = build()
    views = make_views("stack", 3)
    views.data["stack"] = torch.zeros_like(views["stack"])
    parts = objective(views, StepContext())
    parts["loss"].backward()
    assert all(torch.isfinite(value) for value in parts.values())
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters() if p.grad is not None)


def test_autocast__scores_in_float32() -> None:
    objective = build()
    views = make_views("stack", 4)
    full = objective(views, StepContext())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = objective(views, StepContext())
    assert half["loss"].dtype == torch.float32
    assert float(half["loss"].detach()) == pytest.approx(float(full["loss"].detach()), rel=0.1)


def test_alarm__stops_a_run_at_ln_k() -> None:
    """Card 9.4."""
    objective = build(mode="deepcluster", weights={"inter": 1.0}, temperature=1e6, alarm={"steps": 10})
    for step in range(25):
        ctx = StepContext(step=step, epoch=step // 4)
        objective(make_views("stack", 4), ctx)
        if step < 24:
            objective.after_step(ctx)
    with pytest.raises(TrainingStopped, match=r"stayed at ln K = 1\.39 for more than 5 epochs"):
        objective.after_step(ctx)


def test_clustering__learns_the_shapes() -> None:
    """Stacks of three kinds, in views that differ by noise: most of the volume clusters come to hold one kind."""
    kinds = [make_views("stack", 1, seed=99 + k)["stack"][0, 0] for k in range(3)]
    objective = build(inter_prototypes=3, intra_prototypes=8)
    batches = []
    for number in range(6):
        views = make_views("stack", 12, first=12 * number)
        views.meta.valid["stack"][:] = True
        noise = torch.randn(12, 2, 6, 1, 8, 8, generator=torch.Generator().manual_seed(number))
        views.data["stack"] = torch.stack([kinds[b % 3] for b in range(12)])[:, None] + 0.3 * noise
        batches.append(views)
    test = batches.pop()
    train(objective, batches, 60)
    objective.eval()
    stacks = objective._stacks(test, "stack")
    tokens = objective.encoder.embed_slices(stacks.x[:, 0], stacks.valid[:, 0])
    pooled = objective.encoder.aggregator(tokens, stacks.valid[:, 0], test["stack_depth"][:, 0]).pooled
    labels = objective.inter.heads[0](normalize(pooled, dim=1)).argmax(dim=1).tolist()
    assert len({tuple(labels[k::3]) for k in range(3)}) == 3 and all(len(set(labels[k::3])) == 1 for k in range(3))


def test_terms__left_out_are_not_built() -> None:
    flat = build(weights={"intra": 1.0}, view_specs={"image": SPECS["image"]})
    assert not any(p.requires_grad for p in flat.encoder.aggregator.parameters())
    views = make_views("image", 4)
    flat(views, StepContext())["loss"].backward()
    assert all(p.grad is not None for p in flat.parameters() if p.requires_grad)
    inter = build(weights={"inter": 1.0})
    inter(make_views("stack", 4), StepContext())["loss"].backward()
    assert all(p.grad is not None for p in inter.parameters() if p.requires_grad)
    with pytest.raises(RequestError, match="none of the terms inter uses them"):
        inter(views, StepContext())
    with pytest.raises(RequestError, match="no term mask here; built: inter; add it"):
        inter(make_views("stack", 4), StepContext(loss_weights={"mask": 1.0}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"intar": 1.0}}, r'weights names intar \(did you mean "intra"\?\)'),
        ({"mode": "kmeans"}, "accepted: swav, deepcluster"),
        ({"mask_ratio": 1.0}, "between 0 and 1"),
        ({"mode": "deepcluster", "items": 0}, "number of items"),
        ({"mode": "deepcluster", "inter_queue": 5}, "memory bank and no queue"),
        ({"view_specs": {"image": SPECS["image"]}}, "only L_intra can be trained"),
        ({"view_specs": {"image": SPECS["image_local"]}}, "set count: 2"),
    ],
)
def test_bad_arguments__say_what_is_accepted(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build(**changes)


def test_unknown_views__name_what_is_accepted() -> None:
    views = make_views("image", 2)
    views.data = {"picture": views["image"]}
    with pytest.raises(RequestError, match="brings the views picture; accepted is exactly one of image, stack, volume"):
        build()(views, StepContext())
