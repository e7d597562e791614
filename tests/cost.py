"""What a call costs: counted where an operation can be counted, timed beside a peer where it cannot.

Counts are the same on a busy machine as on a quiet one; wall clocks are for the benchmarks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def flops(call: Callable[[], object]) -> int:
    """Count the floating-point operations of matrix products, those of attention and of a backward pass in `call` among them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return int(counter.get_total_flops())


class _Elements(TorchDispatchMode):
    """Counts the elements of what operations return, views left out: what element-wise work, gathers and biases cost."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.total += sum(leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor))
        return found


def elements(call: Callable[[], object]) -> int:
    """Count the elements that the operations in `call` write."""
    with _Elements() as mode, sdpa_kernel(SDPBackend.MATH):
        call()
    return mode.total


def times_as_long(
    ours: Callable[[], object], theirs: Callable[[], object], limit: float, *, repeats: int = 9, rounds: int = 3
) -> float:
    """Return how many times as long as `theirs` a call of `ours` takes: the quickest of each among `repeats` turns.

    Another process on the same core only ever adds time, so the quickest turns are compared, and a ratio above `limit` is measured again, in
    up to so many rounds; the smallest is returned. A call that is slower by itself is slower in every round.
    """
    best = float("inf")
    for _ in range(rounds):
        spent: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
        for _ in range(repeats):
            for call, times in spent.items():
                begun = time.perf_counter()
                call()
                times.append(time.perf_counter() - begun)
        best = min(best, min(spent[ours]) / min(spent[theirs]))
        if best <= limit:
            break
    return best
