"""Benchmarks of the video objectives at toy size, and the token-alignment toy of card DISCOVR 10.2 with its acceptance values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import cluster_distillation_toy, relative_speed_toy, video_step
from tests.benchmarks.test_benchmarks import by, play

TOY = [
    "--frames",
    "4",
    "--size",
    "32",
    "--hidden",
    "32",
    "--layers",
    "2",
    "--heads",
    "2",
    "--batch",
    "2",
    "--head-prototypes",
    "16",
]


def test_video_step__lists_times_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[dict[str, Any]] = []

    def peak(job: dict[str, Any]) -> dict[str, float]:
        jobs.append(job)
        return {"peak_gb": float(len(jobs)), "seconds": 0.0}

    monkeypatch.setattr(video_step, "peak", peak)  # three processes of their own; see below
    content = play(video_step.main, [*TOY, "--visible", "2", "--threads", "1", "--device", "cpu"], tmp_path, repeats=1)
    rows = by(content["rows"], "what")
    assert set(rows) == {
        "encoder step",
        *(f"peak memory, {name}" for name in ("nothing trained", "video_mae", "cluster_distillation")),
    }
    assert [job["objective"] for job in jobs] == ["", "video_mae", "cluster_distillation"]
    assert rows["peak memory, cluster_distillation"]["peak_gb"] == 3
    assert all(job["size"] == (4, 32, 32) and job["encoder"]["hidden_size"] == 32 for job in jobs)


@pytest.mark.slow
def test_peak__of_training_is_above_that_of_importing() -> None:
    network = {"hidden_size": 32, "num_layers": 2, "num_heads": 4}
    job = {"size": (4, 32, 32), "encoder": network, "batch": 2, "threads": 1, "device": "cpu", "precision": "fp32"}
    nothing = video_step.peak({**job, "objective": "", "args": {}})
    for name, args in (("video_mae", {}), ("cluster_distillation", {"head_prototypes": 16})):
        found = video_step.peak({**job, "objective": name, "args": args})
        assert found["peak_gb"] > nothing["peak_gb"] and found["seconds"] > 0


@pytest.mark.slow
def test_video_step__twice_the_visible_tokens_take_little_more_than_twice_as_long(tmp_path: Path) -> None:
    sizes = ["--frames", "32", "--layers", "2", "--visible", "160", "--batch", "1", "--head-prototypes", "16", "--threads", "1"]
    content = play(video_step.main, [*sizes, "--device", "cpu"], tmp_path, repeats=9)
    (check,) = content["checks"]
    assert check["target"] == "<= 2.2" and check["value"] <= 1.25 * 2.2


def test_toy__runs(tmp_path: Path) -> None:
    content = play(cluster_distillation_toy.main, ["--seeds", "0", "--steps", "1", "--held-out", "4"], tmp_path, repeats=1)
    assert [row["tokens"] for row in content["rows"]] == ["untrained", "aligned", "released order"] and len(content["checks"]) == 2


@pytest.mark.slow
def test_toy__the_video_branch_learns_which_cluster_lies_where() -> None:
    """One seed; 700 steps of 24 clips."""
    found = cluster_distillation_toy.play(0)
    assert found["masked"] - found["shuffled"] > cluster_distillation_toy.LIFT
    assert found["visible"] > cluster_distillation_toy.VISIBLE
    assert found["prototypes_used"] == 16


def test_speed_toy__runs_and_still_rings_are_ties(tmp_path: Path) -> None:
    content = play(relative_speed_toy.main, ["--seeds", "0", "--steps", "1", "--held-out", "6"], tmp_path, repeats=1)
    assert len(content["checks"]) == 3 and 0 <= content["rows"][0]["beating"] <= 1


@pytest.mark.slow
def test_speed_toy__the_same_speed_ranks_higher() -> None:
    found = relative_speed_toy.play(0)
    low, high = relative_speed_toy.CHANCE
    assert found["beating"] > relative_speed_toy.RANKED and found["still"] == 0.5 and low < found["shuffled"] < high
