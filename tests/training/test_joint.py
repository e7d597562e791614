"""Joint runs through the real loop, with real checkpoint files: a resumed run gives the same bits, two processes what one gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from medssl.errors import StoreError, TrainingStopped
from medssl.training import checkpoint
from tests.training.joint_toy import CLUSTERING, OBJECTIVES, run

ROOT = Path(__file__).resolve().parents[2]
BUFFERS = {
    "swav": ("prototypes.0.weight", "queue.rows", "queue.filled", "alarm.smoothed", "alarm.since"),
    "deepcluster": ("prototypes.0.weight", "prototypes.0.active", "bank.rows", "bank.filled", "bank.labels", "alarm.smoothed"),
}
"""What the objective must remember between steps, besides weights, for each clustering term."""


def lines(out: Path) -> list[dict[str, Any]]:
    """The logged metrics of a run, without clocks."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("data_wait", "seconds_per_step", "time")} for line in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Uninterrupted runs, made once each."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def get(name: str) -> tuple[Path, dict[str, Any]]:
        if name not in made:
            out = tmp_path_factory.mktemp(name) / "run"
            made[name] = (out, run(out, name))
        return made[name]

    return get


# 20 items and batches of 4: an epoch, and with it a clustering, begins at 0, 5 and 10; checkpoints at 3, 6, 9, 12
@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("swav", 8),
        *(
            pytest.param(name, stop, marks=pytest.mark.slow)
            for name in OBJECTIVES
            for stop in (5, 8, 12)
            if (name, stop) != ("swav", 8)
        ),
    ],
)
def test_stopped_anywhere__resumes_to_the_same_bits(name: str, stop: int, whole: Any, tmp_path: Path) -> None:
    out, expected = whole(name)
    with pytest.raises(StoreError):
        run(tmp_path / "run", name, kill_at=stop)
    done = [int(path.name.removeprefix("step_")) for path in checkpoint.step_folders(tmp_path / "run" / "checkpoints")]
    assert done[-1] == stop // 3 * 3
    found = run(tmp_path / "run", name, seed=1, resume=True)  # other start weights: everything comes from the checkpoint
    assert found["state"].keys() == expected["state"].keys()
    unequal = [key for key, value in expected["state"].items() if not torch.equal(found["state"][key], value)]
    assert unequal == []
    assert lines(tmp_path / "run") == lines(out)


@pytest.mark.parametrize("name", CLUSTERING)
def test_run__has_something_to_remember(name: str, whole: Any) -> None:
    """Both sources were used, queues and banks hold something, clusters were made and prototypes have moved."""
    _, found = whole(name)
    assert set(found["sources"].values()) == {"stacks", "slices"}
    state = found["state"]
    for term in ("intra", "inter"):
        assert {f"{term}.{buffer}" for buffer in BUFFERS[name]} <= set(state)
    if name == "swav":
        assert int(state["inter.queue.filled"]) == 9 and int(state["intra.queue.filled"]) == 40
        assert (state["intra.prototypes.0.weight"].norm(dim=1) - 1).abs().max() < 1e-6
    else:
        assert (state["inter.bank.labels"] >= 0).any(dim=1).all() and (state["intra.bank.labels"] >= 0).any()
        assert 3 < int(state["inter.prototypes.1.active"]) <= 11
        assert state["inter.bank.filled"][:11].any() and not state["inter.bank.filled"][11:].any()


@pytest.mark.parametrize("name", CLUSTERING)
def test_loss_stuck_at_ln_k__stops_the_run_and_keeps_the_checkpoint(name: str, tmp_path: Path) -> None:
    """Card 9.4, through the loop: predictions are uniform at this temperature; an epoch is five steps."""
    changes = {"temperature": 1e6, "alarm": {"epochs": 1, "steps": 6}}
    with pytest.raises(TrainingStopped, match=r"loss_(intra|inter) has stayed at ln K = .* for more than 1 epochs"):
        run(tmp_path / "run", name, 30, changes=changes)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["status"] == "failed" and "clusters have collapsed" in facts["message"]
    done = [int(path.name.removeprefix("step_")) for path in checkpoint.step_folders(tmp_path / "run" / "checkpoints")]
    assert done[-1] >= 9


def distributed(out: Path, *names: str, strategy: str = "ddp", options: tuple[str, ...] = ()) -> list[dict[str, dict[str, Any]]]:
    """Run on two processes; per rank, what `run` returned by name, nothing where it was killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*command, "-m", "tests.training.joint_toy", str(out), *names, "--strategy", strategy, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if "--kill-at" in options:
        return []
    return [{name: torch.load(out / f"{name}_{rank}.pt") for name in names} for rank in (0, 1)]


def largest(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest difference of floating-point state; whatever counts or labels must be equal."""
    assert found.keys() == expected.keys()
    whole = {key: value for key, value in expected.items() if not value.is_floating_point()}
    assert [key for key, value in whole.items() if not torch.equal(found[key], value)] == []
    return max(float((found[key] - value).abs().max()) for key, value in expected.items() if key not in whole and value.numel())


# Sums over samples are added in another order: an error of some 1e-7 of a term at each of 14 steps of SGD.
LOSS, STATE = 1e-5, 1e-5


@pytest.mark.slow
def test_two_processes__train_what_one_does(tmp_path: Path) -> None:
    ranks = distributed(tmp_path / "two", *CLUSTERING)
    for name in CLUSTERING:
        expected = run(tmp_path / name, name, norm="each")
        one, two = (rank[name] for rank in ranks)
        assert one["sources"] == two["sources"] == expected["sources"] and len(set(one["sources"].values())) == 2
        assert [key for key, value in one["state"].items() if not torch.equal(value, two["state"][key])] == []
        assert largest(one["state"], expected["state"]) < STATE
        ours, theirs = lines(tmp_path / "two" / name), lines(tmp_path / name)
        assert [line.keys() for line in ours] == [line.keys() for line in theirs]
        for mine, other in zip(ours, theirs):
            assert {k: v for k, v in mine.items() if "loss" in k} == pytest.approx(
                {k: v for k, v in other.items() if "loss" in k}, rel=LOSS
            )


@pytest.mark.slow
def test_two_processes__resume_to_the_same_bits(tmp_path: Path) -> None:
    expected = distributed(tmp_path / "whole", *CLUSTERING)
    distributed(tmp_path / "killed", *CLUSTERING, options=("--kill-at", "8"))
    found = distributed(tmp_path / "killed", *CLUSTERING, options=("--resume",))
    for name in CLUSTERING:
        for one, two in zip(expected, found):
            assert one[name]["state"].keys() == two[name]["state"].keys()
            unequal = [key for key, value in one[name]["state"].items() if not torch.equal(value, two[name]["state"][key])]
            assert unequal == []
        assert lines(tmp_path / "killed" / name) == lines(tmp_path / "whole" / name)


@pytest.mark.slow
def test_fsdp__trains_what_one_process_does(tmp_path: Path) -> None:
    ranks = distributed(tmp_path / "two", *CLUSTERING, strategy="fsdp")
    for name in CLUSTERING:
        expected = run(tmp_path / name, name, norm="each")
        assert largest(ranks[0][name]["state"], expected["state"]) < STATE
        assert [key for key, value in ranks[0][name]["state"].items() if not torch.equal(value, ranks[1][name]["state"][key])] == []


@pytest.mark.slow
def test_contrast_and_graphs__see_the_share_of_one_process(tmp_path: Path) -> None:
    """Two processes equal one that takes the batch in two micro-steps, not one that sees it whole."""
    names = ("graph_matching", "global_local_contrast")
    ranks = distributed(tmp_path / "two", *names)
    for name in names:
        halves = run(tmp_path / "halves" / name, name, norm="each", micro_batch=4)
        whole = run(tmp_path / "whole" / name, name, norm="each")
        one, two = (rank[name] for rank in ranks)
        assert [key for key, value in one["state"].items() if not torch.equal(value, two["state"][key])] == []
        ours, same, other = (
            {key: value for key, value in found["state"].items() if "running" not in key and "batches" not in key}
            for found in (one, halves, whole)
        )
        assert largest(ours, same) < STATE  # batch norms of two processes each count half of the micro-batches
        assert largest(ours, other) > 10 * STATE
        losses = [[line["loss"] for line in lines(folder / name)] for folder in (tmp_path / "two", tmp_path / "halves")]
        assert losses[0] == pytest.approx(losses[1], rel=LOSS)
