"""Benchmarks of the video objectives at toy size, and the token-alignment toy of card DISCOVR 10.2 with its acceptance values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cluster_distillation_toy, relative_speed_toy, video_step
from medssl.encoders.video_vit import VideoViT
from tests.benchmarks.test_benchmarks import by, play
from tests.cost import flops

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


def test_video_step__twice_the_visible_tokens_cost_little_more_than_twice_as_much() -> None:
    """Counted at the sizes of the benchmark, which times the same step, but for the depth. Attention alone takes 640 to 1,280 tokens past it."""
    encoder = VideoViT(image_size=(64, 112, 112), hidden_size=384, num_layers=2, num_heads=6)
    clips = torch.randn(1, 1, 64, 112, 112)
    for visible in (160, 320):
        few, many = (flops(video_step.step(encoder, clips, n)) for n in (visible, 2 * visible))
        assert 1.5 < many / few <= video_step.LIMIT
    whole = flops(lambda: encoder(clips).tokens.square().mean().backward())
    assert whole > 4 * flops(video_step.step(encoder, clips, 160))  # what is hidden is not computed


def test_video_step__checks_each_doubling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_step, "peak", lambda job: {"peak_gb": 1.0, "seconds": 0.0})
    content = play(video_step.main, [*TOY, "--visible", "1", "2", "--threads", "1", "--device", "cpu"], tmp_path, repeats=1)
    assert [check["target"] for check in content["checks"]] == ["<= 2.2", "<= 2.2"]


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
