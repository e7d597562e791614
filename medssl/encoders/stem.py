"""The input convolution of an encoder, moved to another number of channels where grey is one of the two."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from medssl.errors import WeightsError


def shares(weight: Tensor, axis: int, n: int) -> Tensor:
    """Repeat along a new axis, divided by n, so that the sum over it is the weight again.

    Rounded thirds do not sum to a whole: the middle one takes what the others leave, which floating point holds exactly (n = 3) or to
    its last bit. Without that the reload check would measure rounding.

    Args:
        weight: Any shape.
        axis: Where the new axis goes.
        n: Its length.
    """
    share = weight / n
    middle = (weight.double() - (n - 1) * share.double()).to(weight.dtype)
    return torch.stack([middle if i == n // 2 else share for i in range(n)], dim=axis)


def adapt_stem(state: Mapping[str, Tensor], key: str, channels: int) -> tuple[dict[str, Tensor], list[str]]:
    """Give the stem another number of input channels, where grey is one of the two.

    Args:
        state: Tensors.
        key: The stem's weight (O, C, kh, kw).
        channels: Wanted.

    Returns:
        Tensors, and a sentence where something changed.

    Raises:
        WeightsError: From several channels to other several: there is no rule for that.
    """
    weight = state[key]
    found = weight.shape[1]
    if found == channels:
        return dict(state), []
    if found == 1:
        note = f"{key}: 1 input channel repeated to {channels}, divided by {channels}; a grey image in all channels gives equal features"
        return {**state, key: shares(weight[:, 0], 1, channels)}, [note]
    if channels == 1:
        note = f"{key}: {found} input channels summed to 1; a grey image gives what it gave in all {found} channels"
        return {**state, key: weight.sum(dim=1, keepdim=True)}, [note]
    raise WeightsError(
        f"the stem has {found} input channels and {channels} are wanted; only grey (1) can be spread over channels, or channels summed "
        "to grey; export with the channels it has, as timm and the networks of MONAI take any number"
    )
