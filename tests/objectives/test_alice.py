"""Alice: formulas against plain loops, pairs and their weights, loss floors, state, ablations."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medssl.errors import RequestError, TrainingStopped
from medssl.layers.distillation import cross_entropy, unit_spread
from medssl.layers.standardise import standardised
from medssl.objectives.alice import Alice, DistillationHead
from medssl.testing import check_objective
from medssl.training.ema import update_ema
from medssl.types import StepContext, Views
from tests.objectives.pairs import SIZES, make_alice, make_encoder, make_pairs, take, to_double

ENCODERS = ("segresnet3d", "vit3d", "swin3d")
PAINT = {"cls": 1, "patch": 1, "rec": 100}


def settle(objective: Alice, scale: float = 1.0) -> Alice:
    """Give teacher and centres values of their own, as after some training."""
    with torch.no_grad():
        for parameter in objective.teacher.parameters():
            parameter.add_(0.1 * scale * torch.randn_like(parameter) * parameter.abs().mean())
        for name, buffer in objective.named_buffers():
            if name.startswith("centres."):
                buffer.copy_(0.05 * scale * torch.randn_like(buffer))
    return objective


# -- plain loops -------------------------------------------------------------------------------------------------------


def softmax_of(row: np.ndarray) -> np.ndarray:
    powers = np.array([math.exp(value - max(row)) for value in row])
    return powers / powers.sum()


def entropy_of(teacher: np.ndarray, centre: np.ndarray, t_t: float, student: np.ndarray, t_s: float) -> float:
    p, q = softmax_of((teacher - centre) / t_t), softmax_of(student / t_s)
    return -sum(p[k] * math.log(q[k]) for k in range(len(p)))


def arrays(module: Any) -> dict[str, np.ndarray]:
    return {key: value.detach().numpy() for key, value in module.state_dict().items()}


def numbers(parts: dict[str, Tensor]) -> dict[str, float]:
    return {key: float(value.detach()) for key, value in parts.items()}


def head_of(w: dict[str, np.ndarray], x: np.ndarray, term: str, context: bool = False) -> np.ndarray:
    """Logits of one feature vector."""
    embed = "embed_context" if context else "embed"
    x = w[f"{embed}.weight"] @ x + w[f"{embed}.bias"]
    for layer in (0, 2, 4):
        x = w[f"mlp.{layer}.weight"] @ x + w[f"mlp.{layer}.bias"]
        if layer < 4:
            x = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])
    x = x / np.linalg.norm(x)
    return np.array([row @ x / np.linalg.norm(row) for row in w[f"last.{term}.weight"]])


def norm_of(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * weight + bias


def standard_of(crops: dict[Any, np.ndarray], weights: dict[Any, np.ndarray]) -> dict[Any, np.ndarray]:
    """Features (N, E) of crops, brought to mean 0 and variance 1 over the rows of all crops; weights (N,) per crop."""
    rows, share = np.concatenate(list(crops.values())), np.concatenate([weights[key] for key in crops])
    mean = sum(w * row for w, row in zip(share, rows)) / share.sum()
    variance = sum(w * (row - mean) ** 2 for w, row in zip(share, rows)) / share.sum()
    return {key: (x - mean) / np.sqrt(variance + 1e-5 * variance.mean() + 1e-12) for key, x in crops.items()}


def casa_of(casa: Any, queries: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Cross-attention over the tokens of one crop."""
    w = arrays(casa)
    width = queries.shape[1] // casa.heads
    keys, values = context @ w["key.weight"].T, context @ w["value.weight"].T
    rows = []
    for query in queries:
        q = w["query.weight"] @ query
        found = []
        for head in range(casa.heads):
            part = slice(head * width, (head + 1) * width)
            share = softmax_of(np.array([q[part] @ key[part] / math.sqrt(width) for key in keys]))
            found.append(sum(share[j] * values[j, part] for j in range(len(values))))
        x = norm_of(query + w["out.weight"] @ np.concatenate(found), w["norm_attention.weight"], w["norm_attention.bias"])
        y = np.maximum(w["mlp.0.weight"] @ x + w["mlp.0.bias"], 0)
        rows.append(norm_of(x + w["mlp.2.weight"] @ y + w["mlp.2.bias"], w["norm.weight"], w["norm.bias"]))
    return np.stack(rows)


def loops(objective: Alice, views: Views, t_cls: float, t_patch: float) -> dict[str, float]:
    """The three losses, pair by pair, crop by crop, token by token and voxel by voxel."""
    x, hidden, valid, weight = objective.inputs(views)
    batch = len(x)
    t_s = objective.student_temperature
    head, other_head = arrays(objective.head), arrays(objective.teacher["head"])
    c_cls, c_patch = (objective.get_buffer(f"centres.{term}.value").numpy() for term in ("cls", "patch"))
    patch = objective.patch
    with torch.no_grad():
        student = [[objective.encode(x[i, v : v + 1], hidden[i, v : v + 1], paint=True) for v in (0, 1)] for i in range(batch)]
        teacher = [[objective.encode(x[i, v : v + 1], None, paint=False) for v in (0, 1)] for i in range(batch)]
    crops = [(i, v) for i in range(batch) for v in (0, 1)]
    real: dict[Any, np.ndarray] = {}
    for i, v in crops:
        cells = [np.unravel_index(k, objective.grid) for k in range(math.prod(objective.grid))]
        windows = [tuple(slice(c * p, (c + 1) * p) for c, p in zip(cell, patch)) for cell in cells]
        real[i, v] = np.array([bool(valid[i, v, 0][window].any()) for window in windows])
    looks = {"student": student, "teacher": teacher}
    one = {(i, v): np.array([float(weight[i])]) for i, v in crops}
    some = {(i, v): float(weight[i]) * real[i, v] for i, v in crops}
    pooled = {side: standard_of({(i, v): look[i][v][0].pooled.numpy() for i, v in crops}, one) for side, look in looks.items()}
    tokens = {side: standard_of({(i, v): look[i][v][0].tokens[0].numpy() for i, v in crops}, some) for side, look in looks.items()}
    context = {}
    for side, look in looks.items():
        found = {(i, v): look[i][v][1][0].numpy() for i, v in crops}
        context[side] = standard_of(found, {key: np.full(len(x), float(weight[key[0]])) for key, x in found.items()})
    cls = patches = squares = voxels = 0.0
    for i in range(batch):
        w = float(weight[i])
        z_s = [head_of(head, pooled["student"][i, v][0], "cls") for v in (0, 1)]
        z_t = [head_of(other_head, pooled["teacher"][i, v][0], "cls") for v in (0, 1)]
        cls += w * 0.5 * (entropy_of(z_t[0], c_cls, t_cls, z_s[1], t_s) + entropy_of(z_t[1], c_cls, t_cls, z_s[0], t_s))
        for v in (0, 1):
            q_s = np.stack([head_of(head, token, "patch") for token in tokens["student"][i, v]])
            q_t = np.stack([head_of(other_head, token, "patch") for token in tokens["teacher"][i, v]])
            own = np.stack([head_of(head, token, "patch", True) for token in context["student"][i, v]])
            other = np.stack([head_of(other_head, token, "patch", True) for token in context["teacher"][i, v]])
            a_s, a_t = casa_of(objective.casa, q_s, own), casa_of(objective.teacher["casa"], q_t, other)
            scored = [entropy_of(a_t[k], c_patch, t_patch, a_s[k], t_s) for k in np.flatnonzero(real[i, v])]
            patches += w * 0.5 * sum(scored) / max(len(scored), 1)
            painted, true = student[i][v][2][0, 0].numpy(), x[i, v, 0].numpy()
            for place in zip(*np.nonzero((hidden[i, v, 0] & valid[i, v, 0]).numpy())):
                squares += w * (painted[place] - true[place]) ** 2
                voxels += w
    total = float(weight.sum())
    return {"loss_cls": cls / total, "loss_patch": patches / total, "loss_rec": squares / voxels}


@pytest.mark.parametrize("name", ["segresnet3d", "vit3d"])
def test_losses__equal_plain_loops_in_float64(name: str) -> None:
    size = (8, 12, 4) if name == "segresnet3d" else SIZES[name]
    objective = settle(make_alice(name, image_size=size).double())
    views = to_double(make_pairs(name, weights=[1.0, 0.25], size=size))
    found = numbers(
        objective(views, StepContext(schedules={"teacher_temperature_cls": 0.05, "teacher_temperature_patch": 0.06}, epoch=3))
    )
    expected = loops(objective, views, 0.05, 0.06)
    for term, value in expected.items():
        assert found[term] == pytest.approx(value, rel=1e-10), term
    assert found["loss"] == pytest.approx(expected["loss_cls"] + expected["loss_patch"] + 10 * expected["loss_rec"], rel=1e-10)


def test_losses__recon_region_all_scores_every_valid_voxel() -> None:
    objective, views = make_alice(recon_region="all").double(), to_double(make_pairs())
    x, hidden, valid, _ = objective.inputs(views)
    with torch.no_grad():
        painted = objective.encode(x.flatten(0, 1), hidden.flatten(0, 1), paint=True)[2]
    error = (painted - x.flatten(0, 1)).square()[valid.flatten(0, 1)].mean()  # type: ignore[operator]
    assert float(objective(views, StepContext())["loss_rec"].detach()) == pytest.approx(float(error), rel=1e-10)


# -- contract ----------------------------------------------------------------------------------------------------------


def test_alice__says_at_the_start_that_crops_are_too_small_to_decode() -> None:
    with pytest.raises(ValueError, match=r"one cell at stride 32.*use 64 voxels"):
        make_alice("swin3d", image_size=(32, 32, 32))
    make_alice("swin3d", image_size=(32, 32, 32), weights={"cls": 1})  # decodes nothing


@pytest.mark.parametrize("name", ["segresnet3d", "vit3d", pytest.param("swin3d", marks=pytest.mark.slow)])
def test_alice__keeps_the_contract(name: str) -> None:
    """In few steps the reconstruction must weigh most: as the centres move away from 0, targets say more, and what is harder costs more."""
    steps, lr = (4, 1e-3) if name == "swin3d" else (10, 3e-3)
    objective, views = make_alice(name, weights=PAINT), make_pairs(name, weights=[1.0, 0.5])
    check_objective(objective, views, steps=steps, lr=lr, separable=False)


def test_published_form__averages_over_micro_steps() -> None:
    """Without statistics of a micro-batch, a batch may be cut in any way."""
    objective, views = make_alice("vit3d", standardise=False, weights=PAINT), make_pairs("vit3d", weights=[1.0, 0.5])
    check_objective(objective, views, steps=10, lr=3e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"casa": "none"},
        {"weights": {"cls": 1, "patch": 1}},
        {"weights": {"cls": 1}},
        {"weights": {"patch": 1, "rec": 1}, "casa": "none"},
        {"weights": {"cls": 1, "rec": 1}},
    ],
    ids=["no casa", "no rec", "cls", "patch rec", "cls rec"],
)
@pytest.mark.parametrize("name", ["segresnet3d", "vit3d"])
def test_ablations__leave_no_parameter_without_gradient(name: str, changes: dict[str, Any]) -> None:
    objective = make_alice(name, **changes)
    parts = objective(make_pairs(name), StepContext())
    parts["loss"].backward()
    assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []
    wanted = changes.get("weights", {"cls": 1, "patch": 1, "rec": 1})
    assert {key for key in parts if key.startswith("loss_")} == {f"loss_{term}" for term in wanted}
    assert (objective.casa is not None) == (changes.get("casa") != "none" and "patch" in wanted)
    assert ("decoder" in objective.exported()) == (name != "vit3d" and "rec" in wanted)


def test_swin_without_reconstruction__trains_the_first_decoder_stage_only() -> None:
    objective = make_alice("swin3d", weights={"patch": 1})
    trained = {n.split(".")[2] for n, p in objective.encoder.named_parameters(prefix="x") if p.requires_grad}
    assert trained == {"swinViT", "encoder10", "decoder5"}
    objective(make_pairs("swin3d"), StepContext())["loss"].backward()
    assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []


def test_teacher__is_a_frozen_copy_in_evaluation_mode_and_gets_no_gradient() -> None:
    objective = make_alice().train()
    assert not any(module.training for module in objective.teacher.modules()) and objective.encoder.training
    objective(make_pairs(), StepContext())["loss"].backward()
    assert all(not p.requires_grad and p.grad is None for p in objective.teacher.parameters())
    pairs = objective.ema_pairs()
    assert len(pairs) == 3 and {schedule for _, _, schedule in pairs} == {"teacher_momentum"}
    assert all(torch.equal(a, b) for s, t, _ in pairs for a, b in zip(s.state_dict().values(), t.state_dict().values()))
    assert sum(len(list(t.parameters())) for _, t, _ in pairs) == len(list(objective.teacher.parameters()))


def test_teacher_path__asks_with_its_own_tokens_and_has_no_gradient() -> None:
    objective, views = make_alice(weights={"patch": 1}).double(), to_double(make_pairs())
    seen = []
    for casa in (objective.casa, objective.teacher["casa"]):
        casa.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))  # type: ignore[union-attr]
    objective(views, StepContext())
    assert [output.requires_grad for _, output in seen] == [True, False]
    assert not torch.equal(seen[0][0], seen[1][0])


def test_schedules__rise_as_they_should() -> None:
    objective = make_alice(temperature_warmup=0.5, teacher_temperature=(0.04, 0.07))
    first, middle, last = (objective.schedules(step, 101) for step in (0, 50, 100))
    names = ("teacher_momentum", "teacher_temperature_cls", "teacher_temperature_patch")
    for found, wanted in ((first, (0.996, 0.04, 0.04)), (middle, (0.998, 0.07, 0.07)), (last, (1.0, 0.07, 0.07))):
        assert found == {name: pytest.approx(value) for name, value in zip(names, wanted)}
    by_term = make_alice(teacher_temperature={"patch": (0.03, 0.05)}, temperature_warmup=0).schedules(1, 10)
    assert (by_term["teacher_temperature_cls"], by_term["teacher_temperature_patch"]) == (0.02, 0.05)


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_head__starts_with_what_tells_rows_apart() -> None:
    """With the usual start of linear layers the spread is 0.6: biases make rows more alike."""
    torch.manual_seed(0)
    head = DistillationHead(32, 64, hidden=256, bottleneck=64, prototypes=128, terms=("cls", "patch"))
    for layer in (head.embed, head.embed_context):
        assert layer is not None
        spread, _ = unit_spread(head.mlp(layer(torch.randn(64, layer.in_features))), torch.ones(64))
        assert spread > 0.9


def test_pair_weight_0__removes_a_pair_exactly() -> None:
    objective = settle(make_alice())
    views = make_pairs(batch=3, weights=[1.0, 0.0, 0.5])
    views.data["volume"][1] *= 50.0
    rest = take(views, [0, 2])
    results = []
    for batch in (views, rest):
        model = copy.deepcopy(objective)
        model.zero_grad()
        parts = model(batch, StepContext(totals={k: float(v) for k, v in model.denominators(batch).items()}))
        parts["loss"].backward()
        model.after_step(StepContext())
        results.append((numbers(parts), model))
    (with_it, one), (without, two) = results
    assert {key: v for key, v in with_it.items() if "teacher_entropy" not in key} == pytest.approx(
        {key: v for key, v in without.items() if "teacher_entropy" not in key}, rel=1e-5, abs=1e-6
    )
    assert torch.allclose(one.get_buffer("centres.patch.value"), two.get_buffer("centres.patch.value"), atol=1e-7)
    for (key, a), b in zip(one.named_parameters(), two.parameters()):
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-6), key


def test_pair_without_content__counts_nothing() -> None:
    objective, views = make_alice(), make_pairs(batch=2)
    whole = objective.denominators(views)
    views.meta.valid["volume"][1, 0] = False  # crop A of pair 1 lies in padding
    assert float(whole["pairs"]) == 2.0 and float(objective.denominators(views)["pairs"]) == 1.0
    parts = numbers(objective(views, StepContext()))
    alone = numbers(objective(take(views, [0]), StepContext()))
    for term in ("loss_cls", "loss_patch", "loss_rec"):
        assert parts[term] == pytest.approx(alone[term], rel=1e-5), term


def test_all_pairs_of_weight_0__give_zero_gradients_and_leave_the_centre() -> None:
    objective = make_alice()
    parts = objective(make_pairs(weights=[0.0, 0.0]), StepContext())
    parts["loss"].backward()
    objective.after_step(StepContext())
    assert float(parts["loss"].detach()) == 0.0 and all(math.isfinite(value) for value in numbers(parts).values())
    assert all(float(p.grad.abs().max()) == 0.0 for p in objective.parameters() if p.grad is not None)
    assert float(objective.get_buffer("centres.cls.value").abs().max()) == 0.0


def test_views_that_are_no_pairs__are_refused() -> None:
    objective, views = make_alice(), make_pairs()
    single = {key: value[:, :1] for key, value in views.data.items()}
    with pytest.raises(RequestError, match=r"brings 1 view\(s\) of volume per item; alice compares pairs"):
        objective(Views(single, views.meta), StepContext())
    with pytest.raises(RequestError, match="brings no volume_mask; alice hides blocks"):
        objective(Views({"volume": views["volume"]}, views.meta), StepContext())


def test_masks__are_those_of_each_crop() -> None:
    """The public code shares one mask; here the reconstruction of a crop must depend on its own mask alone."""
    objective, views = make_alice(), make_pairs()
    x, hidden, _, _ = objective.inputs(views)
    with torch.no_grad():
        before = objective.encode(x.flatten(0, 1), hidden.flatten(0, 1), paint=True)[2]
        views.data["volume_mask"][1, 1] = ~views.data["volume_mask"][1, 1]
        _, hidden, _, _ = objective.inputs(views)
        after = objective.encode(x.flatten(0, 1), hidden.flatten(0, 1), paint=True)[2]
    same = [torch.allclose(a, b) for a, b in zip(before, after)]  # type: ignore[arg-type]
    assert same == [True, True, True, False]


@pytest.mark.parametrize("name", ENCODERS)
def test_student__cannot_see_hidden_voxels(name: str) -> None:
    objective, views = make_alice(name).eval(), make_pairs(name, batch=1)
    x, hidden, _, _ = objective.inputs(views)
    other = torch.where(hidden, 100.0, x)
    with torch.no_grad():
        a, b = (objective.encode(z.flatten(0, 1), hidden.flatten(0, 1), paint=True) for z in (x, other))
    assert torch.equal(a[0].tokens, b[0].tokens) and torch.equal(a[2], b[2])  # type: ignore[arg-type]


# -- loss floors (card 10.4) -------------------------------------------------------------------------------------------


def test_floor__equal_logits_and_temperatures_give_the_entropy() -> None:
    logits = torch.randn(7, 32, dtype=torch.float64)
    found = cross_entropy(logits, torch.zeros(32), 0.1, logits, 0.1)
    p = (logits / 0.1).softmax(dim=1)
    assert torch.allclose(found, -(p * p.log()).sum(dim=1), rtol=1e-12)


def test_floor__uniform_predictions_give_log_k() -> None:
    found = cross_entropy(
        torch.randn(5, 512, dtype=torch.float64), torch.zeros(512), 0.04, torch.zeros(5, 512, dtype=torch.float64), 0.1
    )
    assert torch.allclose(found, torch.full_like(found, math.log(512)), rtol=1e-12)


def test_floor__random_weights_start_near_log_k() -> None:
    """ln 512 = 6.24. Bottleneck 256, so that cosines of random rows are as small as in training; a teacher of other random weights."""
    sizes = {"prototypes": 512, "bottleneck": 256, "head_hidden": 64, "casa_heads": 8}
    objective, other = make_alice(**sizes), make_alice(**sizes, seed=1)
    objective.teacher["head"].load_state_dict(other.head.state_dict())
    parts = numbers(objective(make_pairs(batch=4), StepContext()))
    assert parts["loss_cls"] == pytest.approx(math.log(512), abs=0.35)


def test_floor__teacher_equal_to_student_without_mask_and_with_a_equal_to_b() -> None:
    """L_patch is the teacher's cross-entropy with itself; at equal temperatures and no centre that is its entropy, for L_cls too."""
    objective, views = make_alice().double().eval(), to_double(make_pairs())
    objective.student_temperature = 0.04
    views.data["volume"][:, 1] = views.data["volume"][:, 0]
    views.data["volume_mask"][:] = False
    views.meta.valid["volume"][:] = True  # so that every token counts, in the loss as in the monitor
    parts = numbers(objective(views, StepContext(schedules={"teacher_temperature_cls": 0.04, "teacher_temperature_patch": 0.04})))
    for term in ("cls", "patch"):
        assert parts[f"loss_{term}"] == pytest.approx(parts[f"{term}_teacher_entropy"] * math.log(16), rel=1e-5), term
    assert parts["loss_rec"] == 0.0  # nothing was hidden


def test_casa__starts_with_targets_that_are_not_one_hot() -> None:
    """At gain 1 the logits of a layer norm have std 1: at T_t = 0.04 one prototype takes everything from the start."""
    parts = numbers(make_alice(prototypes=512, bottleneck=256, casa_heads=8)(make_pairs(), StepContext()))
    assert 0.5 < parts["patch_teacher_entropy"] < 1.0
    objective = make_alice(prototypes=512, bottleneck=256, casa_heads=8)
    for casa in (objective.casa, objective.teacher["casa"]):
        torch.nn.init.ones_(casa.norm.weight)  # type: ignore[union-attr]
    assert numbers(objective(make_pairs(), StepContext()))["patch_teacher_entropy"] < 0.2


# -- state -------------------------------------------------------------------------------------------------------------


def play(objective: Alice, optimiser: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ctx = StepContext(step=step, epoch=step // 2, schedules=objective.schedules(step, 6))
        parts = objective(make_pairs(seed=step, weights=[1.0, 0.5]), ctx)
        optimiser.zero_grad()
        parts["loss"].backward()
        optimiser.step()
        for student, teacher, schedule in objective.ema_pairs():
            update_ema(student, teacher, ctx.schedules[schedule])
        objective.after_step(ctx)
        losses.append(float(parts["loss"].detach()))
    return losses


def optimiser_of(objective: Alice) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-3)


def test_state__resumes_bit_exactly() -> None:
    through = make_alice()
    optimiser = optimiser_of(through)
    play(through, optimiser, range(3))
    saved = copy.deepcopy((through.state_dict(), optimiser.state_dict()))
    expected = play(through, optimiser, range(3, 6))
    again = make_alice(seed=9)
    other = optimiser_of(again)
    again.load_state_dict(saved[0], strict=True)
    other.load_state_dict(saved[1])
    assert play(again, other, range(3, 6)) == expected
    assert all(torch.equal(a, b) for a, b in zip(through.state_dict().values(), again.state_dict().values()))
    assert any(key.startswith("casa.") for key in saved[0]) and any(key.startswith("teacher.") for key in saved[0])
    assert float(saved[0]["centres.cls.value"].abs().max()) > 0


def test_centre__is_a_running_mean_over_pairs_by_weight() -> None:
    objective = settle(make_alice()).double()
    views = to_double(make_pairs(weights=[1.0, 0.5]))
    before = objective.get_buffer("centres.cls.value").clone()
    x = objective.inputs(views)[0]
    with torch.no_grad():
        pooled = objective.encode(x.flatten(0, 1), None, paint=False)[0].pooled
        logits = objective.teacher["head"](standardised(pooled, torch.tensor([1.0, 1.0, 0.5, 0.5]).double()), "cls")
    expected = 0.9 * before + 0.1 * (logits[0] + logits[1] + 0.5 * logits[2] + 0.5 * logits[3]) / 3
    objective(views, StepContext())
    objective.after_step(StepContext())
    assert torch.allclose(objective.get_buffer("centres.cls.value"), expected, rtol=1e-10)


def test_centre__of_two_micro_steps_is_that_of_one_step() -> None:
    views = make_pairs(weights=[1.0, 0.5])
    one, two = make_alice(standardise=False), make_alice(standardise=False)
    one(views, StepContext())
    for row in ([0], [1]):
        two(take(views, row), StepContext(micro_steps=2))
    for objective in (one, two):
        objective.after_step(StepContext())
    for term in ("cls", "patch"):
        assert torch.allclose(one.get_buffer(f"centres.{term}.value"), two.get_buffer(f"centres.{term}.value"), atol=1e-6)


def test_loss__does_not_feel_what_all_student_features_have_in_common() -> None:
    """Of a fresh network it is most of their length; with running statistics it outran them, and the heads saw nothing else."""
    views = to_double(make_pairs(batch=4))
    plain, moved = (make_alice(weights={"cls": 1}).double() for _ in range(2))
    encode = moved.encode

    def offset(*arguments: Any, **options: Any) -> Any:
        output, context, painted = encode(*arguments, **options)
        return dataclasses.replace(output, pooled=output.pooled + 100.0), context, painted

    moved.encode = offset  # type: ignore[method-assign]
    found, expected = (numbers(objective(views, StepContext()))["loss"] for objective in (moved, plain))
    assert found == pytest.approx(expected, rel=1e-9)


def test_first_epoch__leaves_the_last_layers() -> None:
    objective = make_alice(weights={"cls": 1, "patch": 1})
    for epoch, moves in ((0, False), (1, True)):
        objective.zero_grad()
        objective(make_pairs(), StepContext(epoch=epoch))["loss"].backward()
        for layer in objective.head.last.values():
            assert (float(layer.weight.grad.abs().max()) > 0) == moves  # type: ignore[union-attr]


# -- monitors ----------------------------------------------------------------------------------------------------------


def test_collapse__stops_the_run_with_advice() -> None:
    objective = make_alice(alarm={"epochs": 2, "steps": 3}, centre_momentum=0.0, weights={"cls": 1})
    views = make_pairs(batch=4)
    views.data["volume"][:] = 1.0  # the features of all pairs are alike
    with pytest.raises(TrainingStopped, match=r"pooled features of a batch are alike .*collapsed.*Try a lower optim.lr"):
        look(objective, [views] * 25)
    healthy = make_alice(alarm={"epochs": 2, "steps": 3}, centre_momentum=0.0, weights={"cls": 1})
    look(healthy, [make_pairs(batch=4, seed=step) for step in range(25)])


def test_collapse__of_targets_that_are_one_and_the_same_is_seen_too() -> None:
    """One-hot targets are far from uniform and teach as little."""
    objective = make_alice(weights={"cls": 1}, standardise=False).eval()
    views = make_pairs(batch=4)
    views.data["volume"][:] = 1.0
    objective.centres["cls"].value[0] = -100.0  # type: ignore[index,operator]
    parts = numbers(objective(views, StepContext()))
    assert parts["cls_teacher_entropy"] < 1e-3 and parts["cls_information"] < 1e-3


def look(objective: Alice, batches: list[Views]) -> None:
    """Show batches without training."""
    for step, views in enumerate(batches):
        ctx = StepContext(step=step, epoch=step)
        objective(views, ctx)
        objective.after_step(ctx)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"teacher_temperature": (0.04, 0.1)}, r"teacher_temperature is \[0.04, 0.1\] with student_temperature 0.1"),
        ({"teacher_temperature": {"cls": (0.07, 0.04)}}, "0 < first <= last < student_temperature"),
        ({"teacher_temperature": (0.0, 0.04)}, "0 < first <= last < student_temperature"),
        ({"teacher_temperature": {"patches": (0.02, 0.04)}}, r"names patches .*accepted: cls, patch"),
        ({"temperature_warmup": 30}, "temperature_warmup is 30; accepted: 0 to 1"),
        ({"weights": {"global": 1}}, "weights names global.*accepted: cls, patch, rec"),
        ({"weights": {"rec": 1}}, "with cls or patch above 0; for reconstruction alone take the objective mae"),
        ({"weights": {"cls": -1}}, "accepted: 0 or more"),
        ({"casa": "cross"}, 'casa is "cross".*accepted: cross_attention, none'),
        ({"recon_region": "hidden"}, 'recon_region is "hidden"; accepted: masked, all'),
        ({"export": "both"}, 'export is "both"; accepted: student, teacher'),
        ({"teacher_momentum": 1.0}, "teacher_momentum is 1.0; accepted: 0 to below 1"),
        ({"prototypes": 15}, "prototypes is 15 and casa_heads 2"),
    ],
)
def test_settings_that_cannot_work__are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        make_alice("vit3d", **changes)


def test_loss_weights__of_a_term_that_is_not_built_are_refused() -> None:
    with pytest.raises(RequestError, match="no term rec here; built: cls"):
        make_alice("vit3d", weights={"cls": 1})(make_pairs("vit3d"), StepContext(loss_weights={"rec": 1.0}))


def test_export__of_the_teacher_has_the_teachers_weights() -> None:
    objective = settle(make_alice(export="teacher"))
    part = objective.exported()["encoder"]
    assert part.module is objective.teacher["encoder"] and part.manifest["encoder"]["name"] == "segresnet3d"
    assert make_alice().exported()["encoder"].module is not objective.encoder


def test_reconstruct__shows_the_prediction_at_hidden_voxels_only() -> None:
    objective, views = make_alice(), make_pairs()
    pictures = objective.reconstruct(views)
    shape = (4, 1, *SIZES["segresnet3d"])
    assert all(pictures[key].shape == shape for key in ("input", "masked", "output"))
    seen = ~pictures["mask"][:, None]
    assert torch.equal(pictures["output"][seen], pictures["input"][seen])
    assert "output" not in make_alice(weights={"cls": 1}).reconstruct(views)


def test_mask_token__replaces_the_embedding_of_a_hidden_patch() -> None:
    """Zeroed patch plus token: the same embedding wherever a patch is hidden, another one than that of an empty patch."""
    for name in ("vit3d", "swin3d"):
        encoder = make_encoder(name)
        stem = encoder.mask_stem()
        hidden = torch.zeros(1, 1, *SIZES[name], dtype=torch.bool)
        hidden[:, :, :16] = True
        extra = stem(hidden.float())
        assert torch.equal(extra[0, :, 0, 0, 0], stem.mask_token[0, :, 0, 0, 0])
        if name == "swin3d":
            assert extra.shape == (1, 12, 32, 16, 16) and not extra[0, :, 8:].any()
