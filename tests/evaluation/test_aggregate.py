"""Aggregation over tasks against worked examples; what is missing stays missing."""

from __future__ import annotations

import numpy as np
import pytest

from medssl.evaluation.aggregate import aggregate, holm, pairs, z_scores

TABLE = {
    "a": {"x": 0.9, "y": 0.7, "z": 0.8},
    "b": {"x": 3.0, "y": 1.0, "z": float("nan"), "w": 2.0},
    "c": {"x": 0.5},
    "d": {"x": 0.81, "y": 0.8, "z": float("nan")},
}


def test_z_scores__are_signed_and_leave_out_what_cannot_be_compared() -> None:
    found = z_scores(TABLE, {"b": False})
    assert set(found) == {"a", "b"} and "z" not in found["b"]
    spread = np.std([0.9, 0.7, 0.8])
    assert found["a"]["x"] == pytest.approx(0.1 / spread) and found["a"]["z"] == pytest.approx(0, abs=1e-9)
    edge = pytest.approx(np.sqrt(1.5))
    assert found["b"]["y"] == edge and -found["b"]["x"] == edge and found["b"]["w"] == 0
    assert z_scores({"a": {"x": 1.0, "y": 1.0, "z": 1.0}}) == {"a": {"x": 0.0, "y": 0.0, "z": 0.0}}


def test_two_models__have_no_z_and_are_named_with_their_difference() -> None:
    """Of two, one has +1 and the other -1, whether they differ by 0.01 or by 0.5."""
    assert z_scores({"t": {"x": 0.81, "y": 0.8}}) == {}
    assert pairs(TABLE) == [{"task": "d", "models": ["x", "y"], "difference": pytest.approx(0.01)}]
    assert aggregate({"t": {"x": 0.81, "y": 0.8}})[0] == {"model": "x", "z": None, "rank": None, "tasks": 0, "missing": 0}


def test_aggregate__weighs_kinds_alike_and_counts_missing_cells() -> None:
    first, last = {"x": 3.0, "y": 1.0, "z": 2.0}, {"x": 1.0, "y": 3.0, "z": 2.0}
    table, edge = {"m1": first, "m2": first, "u": last}, np.sqrt(1.5)
    alike = {row["model"]: row["z"] for row in aggregate(table)}
    assert alike == {"x": pytest.approx(edge / 3), "y": pytest.approx(-edge / 3), "z": pytest.approx(0)}
    by_kind = {row["model"]: row["z"] for row in aggregate(table, kinds={"m1": "mri", "m2": "mri", "u": "us"})}
    assert by_kind == dict.fromkeys("xyz", pytest.approx(0))
    rows = {row["model"]: row for row in aggregate(TABLE, {"b": False})}
    assert rows["z"]["missing"] == 1 and rows["z"]["tasks"] == 1 and rows["x"]["rank"] == pytest.approx((1 + 3) / 2)


def test_equal_scores__share_a_rank() -> None:
    rows = {row["model"]: row["rank"] for row in aggregate({"t": {"x": 1.0, "y": 1.0, "z": 0.0}})}
    assert rows == {"x": 1.5, "y": 1.5, "z": 3.0}


def test_holm__worked_example() -> None:
    """0.01 under 0.05 / 4, 0.013 under 0.05 / 3, 0.03 not under 0.05 / 2: it and all after it stay."""
    assert holm([0.03, 0.01, 0.04, 0.013]) == [False, True, False, True]
    assert holm([]) == [] and holm([0.2]) == [False]
