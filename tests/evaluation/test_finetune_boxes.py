"""Fine-tuning for boxes on toy images and volumes: it learns, it is repeatable, the twin differs in weights alone, bad cases are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from medssl.errors import RequestError, TrainingStopped
from medssl.evaluation import box_cases, box_summary, clinical_boxes
from medssl.evaluation.box_cases import few_label_order, image_boxes, training_rows
from medssl.evaluation.detection import match_classes, mean_average_precision
from medssl.evaluation.finetune_boxes import BoxSettings, finetune_boxes, middle, padded
from medssl.evaluation.folds import deal, deals, pool_folds, refuse_counts
from medssl.evaluation.outside import Look
from medssl.evaluation.settings import settings_of
from tests.evaluation.toy_boxes import Squares, Toy

DETECTOR = {"strides": (4, 8), "width": 16, "anchor_scale": 2.0}
QUICK = BoxSettings(detector=DETECTOR, steps=4, batch=4, lr=3e-3, warmup_steps=1)


def run(squares: Squares, settings: BoxSettings = QUICK, **how: Any) -> Any:
    options: dict[str, Any] = {"pretrained": False, "arm": "toy", **how}
    encoder = options.pop("encoder", None) or Toy(len(squares.size))
    cases = options.pop("cases", None) or squares.box_cases()
    return finetune_boxes(encoder, squares, cases, settings, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("dims", "least"), [(2, 0.8), (3, 0.5)])
def test_squares__are_learnt(dims: int, least: float) -> None:
    squares = Squares(72, dims=dims)
    untrained, _ = run(squares, replace(QUICK, steps=1, warmup_steps=0, lr=1e-9))
    result, network = run(squares, replace(QUICK, steps=150, batch=8, warmup_steps=10, lr=2e-3))
    assert result.rows[0]["metric"] == "map_10_50" and result.rows[0]["value"] > least and not network.training
    assert untrained.rows[0]["value"] < 0.1
    assert result.rows[0]["low"] < result.rows[0]["value"] and result.rows[0]["by"] == "by patient"
    again = mean_average_precision(match_classes([image_boxes(case) for case in result.cases], 2))
    assert again == pytest.approx(result.rows[0]["value"], abs=0.01)


def test_equal_seeds__give_equal_runs_and_another_seed_another() -> None:
    squares = Squares(18)
    for loss in ("focal", "bce"):  # the second draws its background
        settings = replace(QUICK, detector={**DETECTOR, "class_loss": loss})
        first, second, other = (run(squares, settings, seed=seed)[0] for seed in (3, 3, 4))
        assert first.curve == second.curve and first.cases == second.cases and first.curve != other.curve


def test_twin__sees_the_same_cases_and_starts_from_the_same_head() -> None:
    squares = Squares(18)
    seen, heads = [], []
    for pretrained, encoder in ((True, Toy(seed=1)), (False, Toy(seed=2))):
        squares.asked = []
        _, network = run(squares, replace(QUICK, lr=1e-12), pretrained=pretrained, encoder=encoder)
        seen.append(squares.asked)
        heads.append({k: v for k, v in network.state_dict().items() if "encoder" not in k})
    assert seen[0] == seen[1]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(heads[0].values(), heads[1].values()))


def test_frozen_encoder__stays_as_it_was_and_its_twin_moves() -> None:
    before = Toy().state_dict()
    for pretrained in (True, False):
        encoder = Toy()
        run(Squares(18), replace(QUICK, freeze_steps=4), encoder=encoder, pretrained=pretrained)
        same = all(torch.equal(a, b) for a, b in zip(before.values(), encoder.state_dict().values()))
        assert same == pretrained


def test_patience__scores_the_best_state_and_says_who_chose_it() -> None:
    result, _ = run(Squares(18), replace(QUICK, steps=6, val_every=2, patience=1))
    assert result.choice.endswith("the best of 3 validation cases") and "val" in result.curve[0]
    cases = Squares(18).box_cases()
    cases = replace(cases, split=np.where(cases.split == "val", "train", cases.split))
    with pytest.raises(RequestError, match="no labelled case is marked val"):
        run(Squares(18), replace(QUICK, val_every=2, patience=1), cases=cases)


def test_few_label_order__begins_with_all_classes_and_keeps_patients_together() -> None:
    squares = Squares(60)
    cases = squares.box_cases()
    orders = [few_label_order(cases, seed) for seed in range(5)]
    assert sorted(orders[0]) == sorted(cases.where("train")) and len({tuple(order) for order in orders}) == 5
    for order in orders:
        patients = cases.patients(order) or []
        assert len(set(patients)) == sum(a != b for a, b in zip(patients, [None, *patients]))
        assert (cases.present[order[:4]].sum(axis=0) > 0).all()  # two patients of two images each
    ranked = replace(cases, ranks=np.where(cases.ids == 7, 1.0, np.nan))
    assert few_label_order(ranked, 0)[0] == 7


def test_bad_cases__are_refused_before_training() -> None:
    squares = Squares(18)
    cases = squares.box_cases()
    gone = cases.present.copy()
    gone[cases.split == "train", 1] = 0
    with pytest.raises(RequestError, match="class dark has no box among the 9 training cases"):
        run(squares, cases=replace(cases, present=gone))
    with pytest.raises(RequestError, match="no case with boxes is marked test"):
        run(squares, cases=replace(cases, split=np.full(18, "train")))
    with pytest.raises(RequestError, match="no test case has a box"):
        run(squares, cases=replace(cases, present=np.where((cases.split == "test")[:, None], 0, cases.present)))
    with pytest.raises(RequestError, match="99 labels are asked for, and 9 training cases have boxes"):
        run(squares, labels=99)


def test_loss_that_is_no_number__stops() -> None:
    squares = Squares(18)
    image = squares.cases[1][0]
    image[:] = 1e30
    with pytest.raises((TrainingStopped, ValueError)):
        run(squares, replace(QUICK, lr=1e6, steps=20))


def test_settings__are_checked_together() -> None:
    with pytest.raises(RequestError, match=r'unknown key stepps \(did you mean "steps"\?\)'):
        settings_of(BoxSettings, {"stepps": 3})
    with pytest.raises(
        RequestError, match=r"steps: 0; 1 or more; warmup_steps: 0; 0 to below steps, which is 0; detector\.nms: 2; between 0 and 1"
    ):
        settings_of(BoxSettings, {"steps": 0, "warmup_steps": 0, "detector": {"nms": 2}})
    with pytest.raises(RequestError, match=r'unknown key detector\.strids \(did you mean "strides"\?\)'):
        settings_of(BoxSettings, {"detector": {"strids": [4]}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"detector": {"strides": 8}}, r"detector\.strides: 8; a list, each a whole number"),
        ({"detector": {"anchor_shapes": [1, 2]}}, r"detector\.anchor_shapes: \[1, 2\]; a list, each a list, each a number"),
        (
            {"detector": {"strides": [8], "candidates": 1}},
            r"detector\.candidates: 1; 1 or more, 2 or more where there is one level",
        ),
        ({"steps": "10", "lr": "fast"}, "steps: '10'; a whole number; lr: 'fast'; a number"),
        ({"batch": 1.5, "split": 1}, r"batch: 1\.5; a whole number; split: 1; true or false"),
        ({"flips": [-1]}, r"flips: \(-1,\); axes from 0 on, none twice"),
        ({"flips": [1, 1]}, r"flips: \(1, 1\); axes from 0 on, none twice"),
        ({"augment": 3, "patience": True}, "augment: 3; keys and values; patience: True; a whole number or null"),
    ],
)
def test_settings_of_other_types__are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        settings_of(BoxSettings, values)


def test_settings_of_the_right_types__are_taken() -> None:
    found = settings_of(BoxSettings, {"lr": 1, "patience": None, "detector": {"anchor_shapes": [[1, 2.0]], "strides": [8]}})
    assert found.network.anchor_shapes == ([1, 2.0],) and found.lr == 1
    assert settings_of(BoxSettings, {"detector": {"strides": [8, 16], "candidates": 1}}).network.candidates == 1


def test_flips__are_of_test_images_alone_and_must_be_axes_that_they_have() -> None:
    squares = Squares(18)
    plain, flipped = (run(squares, replace(QUICK, steps=20, flips=flips))[0] for flips in ((), (0, 1)))
    assert [row["loss"] for row in plain.curve] == [row["loss"] for row in flipped.curve]
    assert [case["real"] for case in plain.cases] == [case["real"] for case in flipped.cases]
    assert any(case["found"] for case in flipped.cases) and [c["found"] for c in plain.cases] != [c["found"] for c in flipped.cases]
    squares.asked = []
    with pytest.raises(RequestError, match=r"flips: \[0, 2\]; these images have 2 axes; name some of 0 to 1"):
        run(squares, replace(QUICK, flips=(0, 2)))
    assert not squares.asked


def test_padding__is_behind_the_end() -> None:
    image = torch.ones(1, 1, 3, 4)
    out = padded(image, (4, 6), -2.0)
    assert (
        out.shape == (1, 1, 4, 6)
        and (out[0, 0, :3, :4] == 1).all()
        and (out[0, 0, 3] == -2).all()
        and (out[0, 0, :, 4:] == -2).all()
    )


def test_folds__test_every_patient_once_and_each_has_all_classes() -> None:
    cases = Squares(60).box_cases()
    dealt = deals(cases, 4, [0, 1], training_rows)
    for seed in (0, 1):
        folds = [dealt[seed, k] for k in range(4)]
        assert sum((one.split == "test").astype(int) for one in folds).tolist() == [1] * 60
        for one in folds:
            sides = [set(one.patients(one.where(side)) or []) for side in ("train", "val", "test")]
            assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
            assert (one.present[one.where("test")].sum(axis=0) > 0).all()
    assert (dealt[0, 0].split != dealt[1, 0].split).any()
    with pytest.raises(RequestError, match="folds: 21, and the labelled cases are of 20 patients"):
        deal(cases, 21, 0, 0)


@pytest.mark.parametrize("n", [60, 61, 62])
@pytest.mark.parametrize("seed", range(4))
def test_folds__have_as_many_boxes_of_a_rare_class(n: int, seed: int) -> None:
    cases = Squares(n).box_cases(groups=False)
    rare = cases.present.copy()
    rare[:, 1] = 0
    rare[:60:10, 1] = 1  # in 6 of them
    folds = [deal(replace(cases, present=rare), 3, seed, k) for k in range(3)]
    assert [int(one.present[one.where("test"), 1].sum()) for one in folds] == [2, 2, 2]


def test_fold_without_a_box_to_test__is_scored_with_the_others() -> None:
    cases = Squares(18).box_cases(groups=False)
    few = np.zeros_like(cases.present)
    few[[0, 1, 2, 3]] = 1  # both classes, in four cases of five folds
    cases = replace(cases, present=few)
    dealt = deals(cases, 5, [0], training_rows)
    assert not all(one.present[one.where("test")].any() for one in dealt.values())
    with pytest.raises(RequestError, match="no test case has a box, so nothing can be scored"):
        training_rows(replace(dealt[0, 0], split=np.where(cases.present.any(axis=1), "train", "test"), one_fold=False), None, 0)
    few[[1, 2, 3], 1] = 0
    with pytest.raises(
        RequestError, match=r"class dark has no box among the .* training cases of a fold; give more labels, ask for fewer"
    ):
        deals(replace(cases, present=few), 5, [0], training_rows)


def test_order__is_drawn_once_for_all_label_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    drawn = box_cases.counter_rng
    monkeypatch.setattr(box_cases, "counter_rng", lambda seed, *names: asked.append(seed) or drawn(seed, *names))
    dealt = deals(Squares(60).box_cases(), 3, [0, 1], training_rows)
    refuse_counts(dealt, [10, 12, 14, 16], training_rows)
    assert sorted(asked) == [0, 0, 0, 1, 1, 1]


def test_unlike_cases__are_flagged_and_the_threshold_is_fitted_on_validation() -> None:
    squares = Squares(18)
    cases = squares.box_cases()
    looks = [Look((1.0, 1.0), "siemens") for _ in range(18)]
    odd = int(cases.where("test")[0])
    looks[odd] = Look((5.0, 1.0), "ge")
    facts = [{"sex": "F"} for _ in range(18)]
    result, _ = run(squares, cases=replace(cases, looks=looks, facts=facts))
    flags = {case["id"]: {flag["by"] for flag in case["outside"]} for case in result.cases}
    assert {"spacing", "vendor"} <= flags[odd] and all(not found & {"spacing", "vendor"} for k, found in flags.items() if k != odd)
    assert result.training_range["n"] == 9 and result.cases[0]["facts"] == {"sex": "F"}
    assert result.fitted["threshold"] is not None and result.fitted["rate"] == 1.0
    without = replace(cases, split=np.where(cases.split == "val", "train", cases.split))
    assert run(squares, cases=without)[0].fitted["threshold"] is None


def test_middle__is_cut_or_padded_at_both_ends() -> None:
    case = Squares(3).whole(1)
    assert torch.equal(middle(case, (16, 32))[0, 0], case.image[0, 0, 8:24])
    wide = middle(replace(case, padding=7.0), (32, 35))
    assert (
        wide.shape == (1, 1, 32, 35)
        and (wide[..., 0] == 7).all()
        and (wide[..., -2:] == 7).all()
        and torch.equal(wide[..., 1:33], case.image)
    )


def test_pooled_folds__keep_the_scores_of_classes_apart() -> None:
    rows = [{"metric": "ap_50", "class": name, "value": value} for name, value in (("a", 0.2), ("b", 0.6))]
    shared = {"arm": "x", "labels": 3, "seed": 0, "rows": rows, "cases": [], "seconds": {"train": 1.0}, "of_folds": 2}
    (pooled,) = pool_folds([{**shared, "fold": fold} for fold in (0, 1)])
    assert {row["class"]: row["value"] for row in pooled["rows"]} == {"a": 0.2, "b": 0.6}


def cell_of_boxes(fold: int | None, scores: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return a result whose pictures have one box, found with the first score, and something for nothing with the second."""
    a, b = [0.0, 0.0, 9.0, 9.0], [20.0, 20.0, 29.0, 29.0]
    cases = [
        {
            "series_id": f"{fold}{k}",
            "patient_id": f"p{fold}{k}",
            "real": [[a, 0, False, False]],
            "found": [[a, 0, right], [b, 0, wrong]],
        }
        for k, (right, wrong) in enumerate(scores)
    ]
    shared = {
        "task": "detection",
        "arm": "scratch",
        "labels": 3,
        "seed": 0,
        "classes": ["a"],
        "rows": [],
        "seconds": {"train": 1.0},
    }
    return {**shared, "cases": cases, "fold": fold, "of_folds": None if fold is None else 2}


def test_scores_of_folds__rank_the_boxes_of_one_network_alone() -> None:
    folds = [
        cell_of_boxes(0, [(0.3, 0.1)] * 4),
        cell_of_boxes(1, [(0.9, 0.7)] * 4),
    ]  # each right by itself, the second surer of all
    (row,) = box_summary.summarise(folds)["rows"]
    assert row["value"] == 1.0 and row["low"] == row["high"] == 1.0
    (pooled,) = pool_folds(folds)
    found = clinical_boxes.froc_row("scratch", [pooled], None, 5)
    assert found["value"] == 1.0 and found["n"] == 8 and found["n_boxes"] == 8
    places, of_group = clinical_boxes.group_map(clinical_boxes.by_name(pooled))
    assert of_group(places[:5])(places[:5]) == 1.0
    shared = [{**cell, "fold": None, "of_folds": None} for cell in folds]
    shared[0]["cases"] = [case for cell in shared for case in cell["cases"]]
    assert box_summary.summarise(shared[:1], intervals=False)["rows"][0]["value"] < 0.9


def test_groups__count_their_own_boxes_and_match_once(monkeypatch: pytest.MonkeyPatch) -> None:
    result = cell_of_boxes(None, [(0.9, 0.1), (0.2, 0.8), (0.6, 0.5)])
    asked: list[int] = []
    monkeypatch.setattr(box_summary, "match_classes", lambda images, n: asked.append(len(images)) or match_classes(images, n))
    ordered = clinical_boxes.by_name(result)
    clinical_boxes.froc_row("scratch", [ordered], None, 2)
    places, of_group = clinical_boxes.group_map(ordered)
    assert asked == [3]
    for group in ([0], [0, 1], [1, 2]):
        alone = match_classes([image_boxes(result["cases"][k]) for k in group], 1)
        assert of_group(places[group])(places[group]) == mean_average_precision(alone)
