"""Fine-tuning for classes and numbers on toy images: it learns, it is repeatable, validation alone fits, bad cases are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medssl.encoders.image2d import Image2D
from medssl.encoders.slice_volume import SliceVolumeEncoder
from medssl.encoders.vit3d import ViT3D
from medssl.errors import RequestError
from medssl.evaluation import finetune_targets as finetune_module
from medssl.evaluation import target_cases
from medssl.evaluation.cell_summary import markdown
from medssl.evaluation.clinical import clinical_facts
from medssl.evaluation.finetune_targets import TargetSettings, class_weights, finetune_targets
from medssl.evaluation.folds import deals, refuse_counts
from medssl.evaluation.learning_rates import hold_norms, layer_scales, learning_rate, parameter_groups
from medssl.evaluation.outside import Look
from medssl.evaluation.scores import mean_auc, roc_auc
from medssl.evaluation.target_cases import Cases, few_label_order, training_rows
from medssl.evaluation.target_summary import summarise
from medssl.types import EncoderOutput

QUICK = TargetSettings(steps=40, batch=8, lr=3e-2, warmup_steps=2, val_every=10, layer_decay=1.0)


class Toy(nn.Module):
    """Means over quarters of an image as tokens, a linear map of each."""

    embed_dim = 8

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 8)])

    def forward_features(self, x: Tensor) -> EncoderOutput:
        cells = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).mean(dim=4).flatten(2)  # (B, 1, 4) of (B, 1, 8, 8)
        tokens = self.blocks[1](torch.tanh(self.blocks[0](cells))).expand(-1, 3, -1)
        return EncoderOutput(tokens=tokens, grid=(3,), pooled=tokens.mean(dim=1))


class Pictures:
    """Images whose brightest quarter is the class, or whose brightness is the number."""

    def __init__(self, cases: Cases, noise: float = 0.3) -> None:
        rng = np.random.default_rng(0)
        self.images = {}
        for number, target in zip(cases.ids, cases.targets):
            image = noise * rng.normal(size=(8, 8))
            if cases.task == "classification":
                row, column = divmod(int(target), 2)
                image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
            else:
                image += target
            self.images[int(number)] = torch.from_numpy(image[None].astype(np.float32))
        self.asked: list[int] = []

    def training(self, ids: Sequence[int], step: int, seed: int, batch: int) -> tuple[Tensor, Sequence[int]]:
        chosen = [ids[int(k)] for k in np.random.default_rng([seed, step]).integers(len(ids), size=batch)]
        self.asked += chosen
        return torch.stack([self.images[k] for k in chosen]), chosen

    def plain(self, ids: Sequence[int]) -> Iterable[tuple[Tensor, Sequence[int]]]:
        for start in range(0, len(ids), 16):
            part = list(ids[start : start + 16])
            yield torch.stack([self.images[k] for k in part]), part


def make_cases(task: str = "classification", n: int = 90, classes: int = 3) -> Cases:
    rng = np.random.default_rng(1)
    ids = np.arange(100, 100 + n)
    targets = rng.integers(classes, size=n).astype(float) if task == "classification" else rng.normal(size=n) * 2 + 50
    split = np.array(["train"] * (n // 2) + ["val"] * (n // 6) + ["test"] * (n - n // 2 - n // 6))
    groups = [f"p{k // 2}" for k in range(n)]
    return Cases(ids, targets, groups, split, [f"c{k}" for k in range(classes)] if task == "classification" else [])


def run(cases: Cases, settings: TargetSettings = QUICK, **how: Any) -> Any:
    options: dict[str, Any] = {"pretrained": False, "arm": "toy", **how}
    encoder = options.pop("encoder", None) or Toy()
    return finetune_targets(encoder, options.pop("batches", None) or Pictures(cases), cases, settings, **options)


def value(result: Any, metric: str) -> float:
    return next(float(row["value"]) for row in result.rows if row["metric"] == metric)


@pytest.mark.parametrize("head", ["linear", "attention"])
def test_classes__are_learnt_and_scored_by_patient(head: str) -> None:
    cases = make_cases()
    result, network = run(cases, replace(QUICK, head=head))
    assert value(result, "auroc") > 0.95 and value(result, "balanced_accuracy") > 0.85
    assert {row["by"] for row in result.rows} == {"by patient"} and not network.training
    assert len(result.cases) == len(cases.where("test"))
    chances = np.array([case["probability"] for case in result.cases])
    assert np.allclose(chances.sum(axis=1), 1)
    assert value(result, "brier") == pytest.approx(
        np.mean([((p - np.eye(3)[int(case["target"])]) ** 2).sum() for p, case in zip(chances, result.cases)])
    )


def test_numbers__are_learnt_in_their_own_unit() -> None:
    cases = make_cases("regression")
    batches = Pictures(cases, noise=0.1)
    for number, image in batches.images.items():
        batches.images[number] = (image - 50) / 2
    result, _ = run(cases, replace(QUICK, steps=150, lr=1e-2), batches=batches)
    assert value(result, "mae") < 0.5 and value(result, "r2") > 0.9
    assert result.fitted == {} and "prediction" in result.cases[0]


def test_equal_seeds__give_equal_runs_and_another_seed_another() -> None:
    cases = make_cases()
    first, second, other = (run(cases, replace(QUICK, steps=5), seed=seed)[0] for seed in (3, 3, 4))
    assert first.cases == second.cases and first.cases != other.cases


def test_frozen_encoder__stays_as_it_was_and_its_twin_moves() -> None:
    cases, before = make_cases(), Toy().state_dict()
    for pretrained in (True, False):
        encoder = Toy()
        run(cases, replace(QUICK, steps=5, freeze_steps=5), encoder=encoder, pretrained=pretrained)
        same = all(torch.equal(a, b) for a, b in zip(before.values(), encoder.state_dict().values()))
        assert same == pretrained


class Normed(Toy):
    """With a batch norm that has seen nothing yet, after features far from mean 0 and variance 1."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, eps=1e-12)

    def forward_features(self, x: Tensor) -> EncoderOutput:
        found = super().forward_features(x)
        return EncoderOutput(tokens=found.tokens, grid=(3,), pooled=self.norm(1e-3 * found.pooled + 1))


def test_head__standardises_features_as_training_shows_them() -> None:
    cases = make_cases()
    result, network = run(cases, replace(QUICK, steps=2, warmup_steps=0, val_every=1, lr=1e-4), encoder=Normed())
    assert all(line["loss"] == pytest.approx(math.log(3), abs=0.3) for line in result.curve)
    assert int(network.encoder.norm.num_batches_tracked) == 2  # looking at features is no step


def test_frozen_encoder__keeps_the_statistics_of_its_norms() -> None:
    frozen, moved = Normed(), Normed()
    for encoder, steps in ((frozen, 4), (moved, 2)):
        run(make_cases(), replace(QUICK, steps=4, freeze_steps=steps), encoder=encoder, pretrained=True)
    assert torch.equal(frozen.norm.running_mean, torch.zeros(8)) and int(moved.norm.num_batches_tracked) == 2


def test_norms__of_the_encoder_alone_are_held_in_frozen_steps() -> None:
    network = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(parameter_groups(network, {"0.weight": 1.0, "0.bias": 1.0}, 0.0))
    settings = replace(QUICK, freeze_steps=3)
    for step, pretrained, learns in ((2, True, False), (3, True, True), (2, False, True)):
        hold_norms(network.train(), optimizer, step, settings, pretrained=pretrained)
        assert [module.training for module in network] == [learns, True]
    for step in (0, 3):  # an encoder that never learns keeps them throughout
        hold_norms(network.train(), optimizer, step, replace(settings, encoder_lr_scale=0.0), pretrained=True)
        assert [module.training for module in network] == [False, True]


def test_norms__that_are_frozen_for_good_stay_so() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self[0].eval()
            return self

    network = Frozen(nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    optimizer = torch.optim.AdamW(parameter_groups(network, {"0.weight": 1.0, "0.bias": 1.0}, 0.0))
    for step in range(4):
        hold_norms(network, optimizer, step, replace(QUICK, freeze_steps=2), pretrained=True)
        assert not network[0].training and network[1].training


def test_head__is_settled_on_a_last_batch_of_one() -> None:
    class Refuses(Normed):
        def forward_features(self, x: Tensor) -> EncoderOutput:
            if self.training and len(x) == 1:
                raise ValueError("batch norm cannot train on one image")
            return super().forward_features(x)

    cases = make_cases()
    result, _ = run(cases, replace(QUICK, steps=2, warmup_steps=0), encoder=Refuses(), labels=33)
    assert result.labels == 33 and math.isfinite(result.curve[-1]["loss"])


def test_patience__scores_the_best_state_and_says_who_chose_it() -> None:
    cases = make_cases()
    result, _ = run(cases, replace(QUICK, steps=400, patience=2, lr=0.1))
    merits = [line["val"] for line in result.curve]
    best = max(range(len(merits)), key=merits.__getitem__)
    assert result.choice == f"step {result.curve[best]['step']}, the best of 15 validation cases"
    assert len(merits) == best + 3 or result.curve[-1]["step"] == 400


@pytest.mark.parametrize(("pretrained", "freeze", "stops"), [(True, 12, 16), (False, 12, 6), (True, 40, 40)])
def test_patience__does_not_count_validations_of_the_frozen_steps(
    pretrained: bool, freeze: int, stops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    merits = iter(range(0, -100, -1))  # the first is the best
    monkeypatch.setattr(finetune_module._Learner, "merit", lambda _: float(next(merits)))
    settings = replace(QUICK, steps=40, val_every=2, patience=2, freeze_steps=freeze)
    result, _ = run(make_cases(), settings, pretrained=pretrained)
    early = ", before the encoder learnt" if pretrained else ""
    assert result.curve[-1]["step"] == stops
    assert result.choice == f"step 2, the best of 15 validation cases{early}"


def test_temperature_and_threshold__follow_validation_cases_alone() -> None:
    cases = make_cases(classes=2)
    found = run(cases)[0]
    turned = np.where(cases.split == "test", 1 - cases.targets, cases.targets)
    other = run(Cases(cases.ids, turned, cases.groups, cases.split, cases.classes), batches=Pictures(cases))[0]
    assert found.fitted == other.fitted and None not in found.fitted.values()
    assert [c["probability"] for c in found.cases] == [c["probability"] for c in other.cases]
    negatives = [c["probability"][1] < found.fitted["threshold"] for c in found.cases if c["target"] == 0]
    assert value(found, "specificity") == pytest.approx(np.mean(negatives))


def test_training__sees_the_first_labels_only() -> None:
    cases = make_cases()
    batches = Pictures(cases)
    result, _ = run(cases, replace(QUICK, steps=10), batches=batches, labels=7, seed=2)
    assert result.labels == 7 and set(batches.asked) <= {int(cases.ids[row]) for row in few_label_order(cases, 2)[:7]}


def test_few_label_order__is_nested_keeps_patients_together_and_starts_with_every_class() -> None:
    cases = make_cases(n=200, classes=4)
    order = few_label_order(cases, 0)
    assert sorted(order) == sorted(cases.where("train")) and not np.array_equal(order, few_label_order(cases, 1))
    patients = [cases.groups[int(row)] for row in order]  # type: ignore[index]
    assert all(
        patients.count(name) == 1 or abs(patients.index(name) - (len(patients) - 1 - patients[::-1].index(name))) == 1
        for name in set(patients)
    )
    majority = {
        name: int(np.bincount(cases.targets[[r for r in order if cases.groups[int(r)] == name]].astype(int)).argmax())
        for name in patients
    }  # type: ignore[index]
    first = list(dict.fromkeys(patients))[: len(set(majority.values()))]
    assert {majority[name] for name in first} == set(majority.values())


def test_layer_scales__fall_from_head_to_stem() -> None:
    encoder = ViT3D(image_size=(16, 16, 16), patch_size=8, hidden_size=24, num_layers=3, num_heads=2)
    scales = layer_scales(encoder, 0.5)
    assert set(scales) == {name for name, _ in encoder.named_parameters()}
    by_block = [scales[next(n for n, p in encoder.named_parameters() if p is next(block.parameters()))] for block in encoder.blocks]
    assert by_block == [0.5**3, 0.5**2, 0.5]
    assert {scales[name] for name in scales if "patch_embedding" in name} == {0.5**4}
    assert all(scale == 1.0 for scale in layer_scales(encoder, 1.0).values())


def test_layer_scales__of_layers_between_blocks_are_those_of_the_block_before() -> None:
    encoder = Image2D(model="test_convnext")
    scales, names = layer_scales(encoder, 0.5), [name for name, _ in encoder.named_parameters()]
    n = len(encoder.blocks)
    between = [name for name in names if ".downsample." in name]
    assert {scales[name] for name in names if ".stem" in name} == {0.5 ** (n + 1)} and between
    for name in between:
        before = max((k for k in range(names.index(name)) if ".blocks." in names[k]), default=None)
        assert scales[name] == (0.5 ** (n + 1) if before is None else scales[names[before]])
    assert max(scales[name] for name in between) < 0.5 == max(scales.values())


def test_layer_scales__of_slices_go_on_through_the_projection() -> None:
    encoder = SliceVolumeEncoder(slice_encoder={"model": "test_vit"}, dim=32)
    scales, over = layer_scales(encoder, 0.5), len(encoder.aggregator.layers)
    own = len(encoder.slice_encoder.blocks)
    assert scales["projection.weight"] == 0.5 ** (over + 1) and min(scales.values()) == 0.5 ** (own + over + 1)
    positions = [scales[name] for name in scales if name.endswith(("cls_token", "pos_embed")) and "slice_encoder" in name]
    assert set(positions) == {0.5 ** (own + over + 1)}


def test_learning_rate__warms_up_again_after_the_frozen_steps() -> None:
    settings = TargetSettings(steps=100, warmup_steps=10, freeze_steps=20)
    assert learning_rate(0, settings, 20) == (0.0, 0.1) and learning_rate(19, settings, 20) == (0.0, 1.0)
    assert learning_rate(20, settings, 20) == (0.1, 0.1) and learning_rate(29, settings, 20) == (1.0, 1.0)
    assert learning_rate(30, settings, 20)[0] == pytest.approx(1.0) and learning_rate(99, settings, 20)[0] < 0.001


def test_cases_outside_the_training_range__are_flagged_by_the_encoder_before_it_learns() -> None:
    cases = make_cases(classes=2)
    test = cases.where("test")
    odd = int(test[0])
    looks = [Look((1.0, 1.0), "ge" if row == odd else "siemens") for row in range(len(cases.ids))]
    facts = [{"sex": "F"}] * len(looks)
    result, _ = run(replace(cases, looks=looks, facts=facts), replace(QUICK, steps=3))
    assert [flag["by"] for flag in result.cases[0]["outside"]][:1] == ["vendor"] and result.cases[0]["facts"] == {"sex": "F"}
    assert not any(flag["by"] == "vendor" for case in result.cases[1:] for flag in case["outside"])
    assert result.training_range["n"] == result.labels and result.training_range["knn_limit"] > 0
    assert result.training_range["n_patients"] == len(set(cases.patients(cases.where("train")) or [])) < result.labels
    plain, _ = run(cases, replace(QUICK, steps=3))
    assert [case["probability"] for case in plain.cases] == [case["probability"] for case in result.cases]


def test_class_weights__are_one_over_the_share() -> None:
    targets = np.array([0, 0, 0, 1])
    weights = class_weights(TargetSettings(class_weights="balanced"), targets, 2)
    assert weights is not None and weights.tolist() == pytest.approx([4 / 6, 2.0])
    assert np.mean([float(weights[int(t)]) for t in targets]) == pytest.approx(1.0)
    assert class_weights(TargetSettings(), targets, 2) is None
    with pytest.raises(RequestError, match="1 numbers for 2 classes"):
        class_weights(TargetSettings(class_weights=(1.0,)), targets, 2)


def test_mean_auc__of_two_classes_is_the_usual_one() -> None:
    rng = np.random.default_rng(0)
    score, target = rng.random(30), rng.integers(2, size=30)
    assert mean_auc(np.stack([target, 1 - score, score], axis=1)) == pytest.approx(roc_auc(np.stack([target, score], axis=1)))


def test_cases_that_cannot_work__are_refused() -> None:
    cases = make_cases()
    with pytest.raises(RequestError, match="no labelled case is marked test"):
        run(replace(cases, split=np.where(cases.split == "test", "train", cases.split)))
    with pytest.raises(RequestError, match=r"c2 of 3 classes: no case among the \d+ training cases; give more labels"):
        run(replace(cases, split=np.where((cases.targets == 2) & (cases.split == "train"), "val", cases.split)))
    with pytest.raises(RequestError, match="patience needs validation cases"):
        run(replace(cases, split=np.where(cases.split == "val", "train", cases.split)), replace(QUICK, patience=3))
    with pytest.raises(RequestError, match="500 labels are asked for, and 45 training cases"):
        run(cases, labels=500)
    numbers = make_cases("regression")
    with pytest.raises(RequestError, match="training targets are 7; nothing can be learnt"):
        run(replace(numbers, targets=np.full(len(numbers.ids), 7.0)))
    with pytest.raises(
        RequestError, match=r"class_weights: numbers have no classes, .* leave it out; label_smoothing: numbers have no"
    ):
        run(numbers, replace(QUICK, class_weights="balanced", label_smoothing=0.1))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps": 0}, "steps: 0; 1 or more"),
        ({"layer_decay": 1.5}, "layer_decay: 1.5; above 0, at most 1"),
        ({"patience": 2, "val_every": 0}, "patience: 2; 1 or more, with val_every above 0"),
        ({"class_weights": "equal"}, "class_weights: 'equal'; none, balanced, or one number above 0 per class"),
        ({"flips": [-2]}, r"flips: \(-2,\); axes from 0 on, none twice"),
        ({"flips": [0, 0]}, r"flips: \(0, 0\); axes from 0 on, none twice"),
        ({"class_weights": [0, 0, 0]}, r"class_weights: \(0, 0, 0\); none, balanced, or one number above 0 per class"),
        ({"class_weights": [1, 0]}, "one number above 0 per class"),
        ({"epochs": 3}, "unknown key epochs"),
    ],
)
def test_settings_that_cannot_work__are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        TargetSettings.from_dict(changes)


@pytest.mark.parametrize(
    ("shown", "match"),
    [
        (lambda images: images, r"flips: \[0, 2\]; these images have 2 axes; name some of 0 to 1"),
        (lambda images: images.flatten(2), "flips mirror images and volumes; set flips: \\[\\] for stacks, clips and bags"),
        (lambda images: SimpleNamespace(slices=images), "flips mirror images and volumes"),
    ],
)
def test_flips_that_images_do_not_have__are_refused_before_the_first_step(
    shown: Callable[[Tensor], Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shown(Pictures):
        def plain(self, ids: Sequence[int]) -> Iterable[tuple[Any, Sequence[int]]]:
            plain = super().plain
            return ((shown(images), own) for images, own in plain(ids))

    cases = make_cases()
    monkeypatch.setattr(finetune_module, "_network", None)
    with pytest.raises(RequestError, match=match):
        run(cases, replace(QUICK, flips=(0, 2)), batches=Shown(cases))


def test_flips__are_averaged_within_each_case() -> None:
    cases, settings = make_cases(), replace(QUICK, steps=2, warmup_steps=0)
    batches = Pictures(cases)
    flipped, network = run(cases, replace(settings, flips=(0, 1)), batches=batches)
    with torch.no_grad():
        for case in flipped.cases[:3]:
            image = batches.images[case["id"]][None]
            looks = [network(look).double() for look in (image, image.flip(2), image.flip(3))]
            wanted = torch.softmax(torch.stack(looks).mean(dim=0) / flipped.fitted["temperature"], dim=1)[0]
            assert case["probability"] == pytest.approx(wanted.tolist(), abs=1e-6)


def cell_of_classes(fold: int, pairs: Sequence[tuple[int, float]]) -> dict[str, Any]:
    cases = [
        {"series_id": f"{fold}{k}", "patient_id": f"p{fold}{k}", "target": float(target), "probability": [1 - p, p]}
        for k, (target, p) in enumerate(pairs)
    ]
    shared = {"task": "classification", "labels": 8, "seed": 0, "arm": "scratch", "rows": [], "seconds": {"train": 1.0}}
    return {**shared, "fold": fold, "of_folds": 3, "cases": cases}


def test_auc_of_folds__ranks_the_cases_of_one_network_alone() -> None:
    folds = [cell_of_classes(k, [(0, 0.1 + 0.3 * k), (1, 0.3 + 0.3 * k)] * 3) for k in range(3)]
    (row,) = summarise(folds, draws=50)["rows"]
    assert (
        row["value"] == 1.0 and row["seed_means"] == [1.0] and row["low"] == row["high"] == 1.0
    )  # 0.83 where all are ranked together
    one_class = [*folds[:2], cell_of_classes(2, [(1, 0.0)] * 4)]
    assert summarise(one_class, draws=50)["rows"][0]["value"] == 1.0  # a fold without both says nothing
    assert clinical_facts(folds, draws=5)["headlines"][0]["value"] == 1.0


def test_errors_of_folds__are_those_of_all_cases() -> None:
    folds = [{**cell_of_classes(k, [(0, 0.5)] * (k + 1)), "task": "regression"} for k in range(3)]
    for fold in folds:
        for case in fold["cases"]:
            del case["probability"]
            case["prediction"] = float(fold["fold"])
    assert summarise(folds, draws=5)["rows"][0]["value"] == pytest.approx((0 + 2 * 1 + 3 * 2) / 6)


def test_test_cases_without_a_class__are_refused_before_training_but_for_folds() -> None:
    split = np.array(["train", "train", "test"] * 6)
    targets = np.array([0.0, 1.0, 1.0] * 6)
    cases = Cases(np.arange(18), targets, [f"p{k}" for k in range(18)], split, ["absent", "present"])
    with pytest.raises(RequestError, match="absent of 2 classes: no case among the 6 test cases, so that no AUC can be given"):
        training_rows(cases, None, 0)
    assert len(training_rows(replace(cases, one_fold=True), None, 0)) == 12
    alone = cell_of_classes(0, [(1, 0.4)] * 4)
    summary = summarise([{**alone, "arm": arm, "fold": None} for arm in ("scratch", "pretrained")], draws=5)
    assert summary["rows"][0]["value"] is None and summary["differences"][0]["difference"] is None
    json.dumps(summary, allow_nan=False)
    assert "| 8 | scratch | - (-) | - |" in markdown(summary)


def test_order__is_drawn_once_for_all_label_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = Cases(np.arange(60), np.arange(60) % 2.0, [f"p{k // 2}" for k in range(60)], np.array(["train"] * 60), ["a", "b"])
    asked: list[str] = []
    drawn = target_cases.counter_rng
    monkeypatch.setattr(target_cases, "counter_rng", lambda seed, *names: asked.append(names[-1]) or drawn(seed, *names))
    dealt = deals(cases, 3, [0], training_rows)
    refuse_counts(dealt, [4, 6, 8], training_rows)
    assert len(asked) == 3 * len(set(asked))
