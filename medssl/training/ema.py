"""Exponential moving average of a student in a teacher."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def update_ema(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Move the teacher towards the student: teacher <- momentum * teacher + (1 - momentum) * student.

    Parameters and floating buffers are averaged, other buffers (counters) copied. Works on sharded parameters too, because student
    and teacher are sharded alike.

    Args:
        student: Trained module.
        teacher: Deep copy of the student made before wrapping, requires_grad False.
        momentum: In [0, 1].
    """
    for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        mine.lerp_(theirs.detach().to(mine.dtype), 1.0 - momentum)
    for kept, new in zip(teacher.buffers(), student.buffers(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(new.to(kept.dtype), 1.0 - momentum)
        else:
            kept.copy_(new)
