"""What finding pairs costs beside a training step: Alice on the hippocampus volumes, matched by embeddings from the store.

    python -m benchmarks.alice_runs --folder runs/hippocampus      # matcher and embeddings
    python -m benchmarks.mining_share --folder runs/hippocampus

The recipe as committed is trained for a few steps through `medssl.api.pretrain`, every step a measurement, and every draw of a pair is timed
where the loop calls it: seed point, partner, embeddings read and matched, crops placed. The share is the time of all draws over the time of
all steps; draws run beside the step, so that what a step waits for is less. One thread for the network.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.alice_runs import ARMS
from benchmarks.common import Check, Result, finish, parser
from medssl import api
from medssl.sampling.pairs import PairDraw, PairSampler
from medssl.types import DrawKey

LIMIT = 0.10


class Timed:
    """`PairSampler.draw`, with the seconds of every call that a training step asked for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._draw, self._lock = PairSampler.draw, threading.Lock()

    def patched(self) -> Any:
        """Return a context in which all samplers are timed."""

        def draw(sampler: PairSampler, key: DrawKey) -> PairDraw:
            begin = time.perf_counter()
            found = self._draw(sampler, key)
            with self._lock:
                self.seconds.append(time.perf_counter() - begin)
            return found

        return mock.patch.object(PairSampler, "draw", draw)


def measure(recipe: Path, overrides: list[str], steps: int, out: Path) -> dict[str, Any]:
    """Train and return the row of a recipe; the first step, which starts threads and caches, and the audit before it do not count."""
    timed = Timed()
    quiet = ["train.log_every=1", "train.monitor_items=0", "train.tensorboard=false", "optim.schedule.warmup_steps=1"]
    with timed.patched():
        api.pretrain(recipe, [*overrides, *quiet, f"train.steps={steps}", f"out={out}"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    spent = [line["seconds_per_step"] for line in lines if "data_wait" in line][1:]
    batch = api.load_recipe(recipe, [*overrides, "out=none"]).train.batch
    draws = timed.seconds[-batch * len(spent) :]
    return {
        "recipe": recipe.stem,
        "steps": len(spent),
        "batch": batch,
        "draw_ms": 1000 * sum(draws) / len(draws),
        "step_ms": 1000 * sum(spent) / len(spent),
        "share": sum(draws) / sum(spent),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, repeats=30)
    options.add_argument("--folder", type=Path, default=Path("runs/hippocampus"), help="of alice_runs; holds archive and matcher")
    given = options.parse_args(argv)
    torch.set_num_threads(1)
    sampler = f"data.sampler.matcher={{name: embedding, weights: {given.folder / 'matcher'}}}"
    with tempfile.TemporaryDirectory() as scratch:
        row = measure(ARMS["alice"], [f"data.index={given.folder / 'archive'}", sampler], given.repeats, Path(scratch) / "run")
    check = Check("draws of pairs over steps", row["share"], LIMIT, at_least=False)
    return finish(Result("mining_share", [row], [check], vars(given)), given.out)


if __name__ == "__main__":
    main()
