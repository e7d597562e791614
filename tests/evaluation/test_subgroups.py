"""Subgroups: the rule of the smallest group, bands of age, the gap."""

from __future__ import annotations

import numpy as np
import pytest

from medssl.evaluation.scores import roc_auc
from medssl.evaluation.subgroups import age_band, equalised_odds, gap, subgroup_rows


@pytest.mark.parametrize(
    ("age", "band"),
    [
        (0, "0 to 17"),
        (17.9, "0 to 17"),
        (18, "18 to 39"),
        (59, "40 to 59"),
        (60, "60 to 74"),
        (75, "75 and over"),
        (None, "unknown"),
        (float("nan"), "unknown"),
    ],
)
def test_age_band(age: float | None, band: str) -> None:
    assert age_band(age) == band


def test_small_groups__have_no_number() -> None:
    values = np.concatenate([np.full(50, 0.5), np.full(49, 0.9), np.full(60, 0.7)])
    kinds = ["a"] * 50 + ["b"] * 49 + ["unknown"] * 60
    patients = [str(k // 2) for k in range(159)]
    rows = {row["group"]: row for row in subgroup_rows("m", "p", "dice", values, kinds, patients, draws=20)}
    assert rows["a"]["value"] == pytest.approx(0.5) and rows["a"]["sufficient"] and rows["a"]["n_patients"] == 25
    assert rows["b"]["value"] is None and not rows["b"]["sufficient"] and rows["b"]["n_images"] == 49
    assert gap(list(rows.values())) is None  # one group with a number: `unknown` is none


def test_groups_of_few_positives__have_no_number() -> None:
    rng = np.random.default_rng(0)
    target = np.concatenate([np.arange(60) < 9, np.arange(60) < 30])
    rows = np.stack([target, rng.random(120) + target], axis=1)
    kinds = ["few"] * 60 + ["many"] * 60
    found = {
        r["group"]: r for r in subgroup_rows("m", "p", "auroc", rows, kinds, None, statistic=roc_auc, positives=target, draws=20)
    }
    assert found["few"]["value"] is None and found["many"]["value"] == pytest.approx(roc_auc(rows[60:]))


def test_gap__lies_between_best_and_worst() -> None:
    rows = [{"group": name, "value": value} for name, value in (("a", 0.9), ("b", 0.7), ("c", 0.8), ("d", None), ("unknown", 0.1))]
    found = gap(rows)
    assert found == {"best": "a", "worst": "b", "worst_value": 0.7, "gap": pytest.approx(0.2)}


def counted(true_positive: int, positives: int, false_positive: int, negatives: int) -> tuple[np.ndarray, np.ndarray]:
    """Targets and calls of a group with so many of each."""
    targets = np.repeat([1.0, 0.0], [positives, negatives])
    calls = np.concatenate([np.arange(positives) < true_positive, np.arange(negatives) < false_positive])
    return targets, calls


def odds(parts: dict[str, tuple[np.ndarray, np.ndarray]], usable: list[str], **how: int) -> dict[str, object] | None:
    kinds = [name for name, (targets, _) in parts.items() for _ in targets]
    targets, calls = (np.concatenate([part[k] for part in parts.values()]) for k in (0, 1))
    return equalised_odds("m", "", calls, targets, kinds, [str(k // 2) for k in range(len(kinds))], usable, **how)


def test_equalised_odds__is_the_larger_spread_of_the_two_rates() -> None:
    parts = {"a": counted(18, 20, 5, 40), "b": counted(12, 20, 4, 40), "c": counted(15, 20, 20, 40), "tiny": counted(0, 3, 3, 3)}
    found = odds(parts, ["a", "b", "c"], draws=200)
    assert found is not None  # true positives 0.9, 0.6, 0.75; false positives 0.125, 0.1, 0.5
    assert found["value"] == pytest.approx(0.4) and found["rate"] == "false_positive_rate" and found["groups"] == ("c", "b")
    spread = 1.96 * (0.5 * 0.5 / 20 + 0.1 * 0.9 / 20) ** 0.5  # 20 patients of two cases alike: 0.26
    assert found["n_images"] == 180 and (found["low"], found["high"]) == pytest.approx((0.4 - spread, 0.4 + spread), abs=0.06)
    less = odds(parts, ["a", "b"], draws=20)
    assert less is not None and less["rate"] == "true_positive_rate" and less["value"] == pytest.approx(0.3)
    assert odds(parts, ["a"], draws=20) is None


def test_equalised_odds__of_groups_alike_has_an_interval_with_zero() -> None:
    found = odds({"a": counted(10, 20, 4, 40), "b": counted(10, 20, 5, 40)}, ["a", "b"], draws=200)
    assert found is not None and found["value"] == pytest.approx(0.025) and found["low"] < 0 < found["high"]  # type: ignore[operator]
