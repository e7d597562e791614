"""Which items a step takes, and reading them ahead of it. All of it is a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from medssl.seeding import counter_rng
from medssl.training.distributed import World
from medssl.training.settings import LoopSettings
from medssl.types import DrawKey, Source


def pick_source(sources: Mapping[str, Source], seed: int, step: int) -> Source:
    """Choose the source of a step: it depends on (seed, step) alone, so that all ranks agree."""
    names = list(sources)
    if len(names) == 1:
        return sources[names[0]]
    weights = [sources[name].weight for name in names]
    total = sum(weights)
    draw = counter_rng(seed, step, "source").choice(len(names), p=[w / total for w in weights])
    return sources[names[int(draw)]]


def batch_keys(seed: int, step: int, micro_step: int, micro: int, world: World) -> list[DrawKey]:
    """Return the draw keys of one micro-batch on this rank; positions run over ranks and micro-steps."""
    first = (micro_step * world.size + world.rank) * micro
    return [DrawKey(seed, step, first + i) for i in range(micro)]


class Prefetcher:
    """Reads the micro-batches of coming steps in threads. Reading is a pure function of the step, so a resumed run reads the same.

    Args:
        sources: Name -> source.
        settings: The loop's settings.
        world: This process.
        last: First step that is not run.
    """

    def __init__(self, sources: Mapping[str, Source], settings: LoopSettings, world: World, last: int) -> None:
        self.sources = sources
        self.settings = settings
        self.world = world
        self.last = last
        self.micro_steps, self.micro = settings.micro_steps(world.size)
        self.pool = ThreadPoolExecutor(max(settings.workers, 1), thread_name_prefix="medssl-read")
        self.ahead: dict[int, list[Future[Any]]] = {}

    def _submit(self, step: int) -> None:
        if step < self.last and step not in self.ahead:
            source = pick_source(self.sources, self.settings.seed, step)
            self.ahead[step] = [
                self.pool.submit(source.fetch, batch_keys(self.settings.seed, step, m, self.micro, self.world))
                for m in range(self.micro_steps)
            ]

    def get(self, step: int) -> tuple[Source, list[Any]]:
        """Return the source and what it fetched for each micro-step."""
        depth = 2 if self.settings.workers else 0
        for later in range(step, step + depth + 1):
            self._submit(later)
        fetched = [future.result() for future in self.ahead.pop(step)]
        return pick_source(self.sources, self.settings.seed, step), fetched

    def close(self) -> None:
        """Drop what was read ahead."""
        self.pool.shutdown(wait=True, cancel_futures=True)
