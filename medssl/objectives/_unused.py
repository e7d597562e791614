"""Parameters of an encoder that an objective does not reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from medssl.types import EncoderOutput


def freeze_unused(encoder: Any, size: Sequence[int], used: Callable[[EncoderOutput], Sequence[Tensor]]) -> None:
    """Set requires_grad False on parameters that the outputs in use do not depend on, for instance a norm before pooling.

    Args:
        encoder: The encoder.
        size: Size of an image it takes.
        used: Picks the outputs that the objective looks at.
    """
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    training = encoder.training
    device = next(encoder.parameters()).device
    output = encoder.eval().forward_features(torch.zeros(1, encoder.in_channels, *size, device=device))
    encoder.train(training)
    total = torch.stack([x.float().sum() for x in used(output)]).sum()
    for parameter, gradient in zip(parameters, torch.autograd.grad(total, parameters, allow_unused=True)):
        parameter.requires_grad_(gradient is not None)
