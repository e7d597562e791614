from __future__ import annotations

import numpy as np
import pytest

from medssl.errors import RequestError
from medssl.evaluation.bootstrap import bootstrap_interval, paired_bootstrap
from medssl.seeding import counter_rng


def test_bootstrap__equals_plain_loop():
    values = np.random.default_rng(0).normal(size=9)
    groups = ["c", "a", "b", "a", "c", "a", "d", "b", "b"]
    generator = counter_rng(7, "bootstrap")
    names = sorted(set(groups))
    means = []
    for _ in range(300):
        rows = []
        for i in generator.integers(len(names), size=len(names)):
            rows += [v for v, g in zip(values, groups, strict=True) if g == names[i]]
        means.append(sum(rows) / len(rows))
    estimate, low, high = bootstrap_interval(values, groups, draws=300, seed=7, level=0.9)
    assert estimate == pytest.approx(values.mean(), abs=1e-15)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.05, 0.95])), abs=1e-12)


def test_bootstrap__approximates_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    estimate, low, high = bootstrap_interval(values, None, draws=2000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert low == pytest.approx(estimate - half, abs=0.04)
    assert high == pytest.approx(estimate + half, abs=0.04)


def test_bootstrap__groups_widen_the_interval():
    # every patient's 10 images are equal: the effective sample is 30 patients, not 300 images
    patient_values = np.random.default_rng(2).normal(size=30)
    values = np.repeat(patient_values, 10)
    groups = [f"p{i}" for i in range(30) for _ in range(10)]
    _, low, high = bootstrap_interval(values, groups)
    _, low_image, high_image = bootstrap_interval(values, None)
    ratio = (high - low) / (high_image - low_image)
    assert ratio == pytest.approx(np.sqrt(10), rel=0.12)
    _, low_patient, high_patient = bootstrap_interval(patient_values, [f"p{i}" for i in range(30)])
    assert (low, high) == pytest.approx((low_patient, high_patient), abs=1e-12)


def test_bootstrap__row_order_has_no_influence():
    values = np.random.default_rng(3).normal(size=12)
    groups = np.array(list("aabbccddeeff"))
    order = np.random.default_rng(4).permutation(12)
    assert bootstrap_interval(values, list(groups), seed=5) == pytest.approx(
        bootstrap_interval(values[order], list(groups[order]), seed=5), abs=1e-12
    )


def test_bootstrap__seed_decides():
    values = np.random.default_rng(3).normal(size=12)
    first = bootstrap_interval(values, None, seed=1, draws=50)
    assert first == bootstrap_interval(values, None, seed=1, draws=50)
    assert first != bootstrap_interval(values, None, seed=2, draws=50)


def test_bootstrap__rows_with_columns_and_other_statistic():
    rows = np.stack([np.arange(8.0), 2 * np.arange(8.0)], axis=1)
    ratio = bootstrap_interval(rows, list("aabbccdd"), draws=40, statistic=lambda r: float(r[:, 1].sum() / r[:, 0].sum()))
    assert ratio == pytest.approx((2.0, 2.0, 2.0), abs=1e-12)


def test_bootstrap__one_patient_has_no_interval():
    estimate, low, high = bootstrap_interval(np.array([1.0, 2.0]), ["a", "a"])
    assert estimate == 1.5 and np.isnan(low) and np.isnan(high)


def test_bootstrap__draws_without_result_are_left_out():
    # undefined where only zeros were drawn
    result = bootstrap_interval(
        np.array([0.0, 1.0]), None, draws=200, statistic=lambda v: float("nan") if v.sum() == 0 else float(v.max())
    )
    assert result == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("values", "groups", "match"),
    [
        ([], None, "no values"),
        ([1.0, float("nan")], None, "1 values that are not finite"),
        ([1.0, 2.0], ["a"], "1 group names for 2 values"),
    ],
)
def test_bootstrap__refuses(values, groups, match):
    with pytest.raises(RequestError, match=match):
        bootstrap_interval(np.array(values), groups)


def test_paired__is_narrower_than_the_difference_of_two_and_antisymmetric():
    generator = np.random.default_rng(5)
    difficulty = generator.normal(0, 1, size=60)
    a, b = difficulty + 0.2 + generator.normal(0, 0.05, 60), difficulty + generator.normal(0, 0.05, 60)
    groups = [f"p{i // 2}" for i in range(60)]
    difference, low, high = paired_bootstrap(a, b, groups, seed=3)
    assert difference == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    assert low > 0.15 and high < 0.25  # the unpaired interval of either mean is about 0.5 wide
    swapped = paired_bootstrap(b, a, groups, seed=3)
    assert swapped == pytest.approx((-difference, -high, -low), abs=1e-12)


def test_paired__equals_interval_of_differences_for_the_mean():
    generator = np.random.default_rng(6)
    a, b = generator.normal(size=(2, 20))
    groups = [f"p{i % 7}" for i in range(20)]
    assert paired_bootstrap(a, b, groups) == pytest.approx(bootstrap_interval(a - b, groups), abs=1e-12)


def test_paired__refuses_other_lengths():
    with pytest.raises(RequestError, match="3 values of one model and 2 of the other"):
        paired_bootstrap(np.zeros(3), np.zeros(2), None)
