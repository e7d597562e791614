"""Schedules: pure functions of the step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, steps: int, base: float, final: float = 0.0, warmup: int = 0, start: float = 0.0) -> float:
    """Linear warm-up from `start` to `base`, then half a cosine down (or up) to `final`.

    Args:
        step: 0 to steps - 1; the first warm-up step already moves off `start`, the last step reaches `final`.
        steps: Length of the schedule.
        base: Value at the end of the warm-up.
        final: Value at the last step.
        warmup: Warm-up steps.
        start: Value before the warm-up.

    Reference:
        Loshchilov and Hutter 2017 (SGDR), equation 5, without restarts.
    """
    if step < warmup:
        return start + (base - start) * (step + 1) / warmup
    progress = min((step - warmup + 1) / max(steps - warmup, 1), 1.0)
    return final + (base - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_constant_anneal(
    step: int, *, steps: int, base: float, final: float = 0.0, warmup: int = 0, anneal: int = 0, start: float = 0.0
) -> float:
    """Linear warm-up, constant `base`, then half a cosine over the last `anneal` steps to `final`.

    A run with this schedule can be prolonged: everything before the annealing does not depend on `steps`.

    Args:
        step: 0 to steps - 1.
        steps: Length of the schedule.
        base: Constant value.
        final: Value at the last step.
        warmup: Warm-up steps.
        anneal: Steps of the final descent.
        start: Value before the warm-up.
    """
    if step < steps - anneal:
        return warmup_cosine(step, steps=steps, base=base, final=base, warmup=warmup, start=start)
    return warmup_cosine(step - (steps - anneal), steps=anneal, base=base, final=final)


def schedule_value(name: str, step: int, steps: int, base: float, final: float, warmup: int, anneal: int) -> float:
    """Evaluate a named schedule (`cosine` or `constant_anneal`) at a step of its stage."""
    if name == "cosine":
        return warmup_cosine(step, steps=steps, base=base, final=final, warmup=warmup)
    return warmup_constant_anneal(step, steps=steps, base=base, final=final, warmup=warmup, anneal=anneal)
