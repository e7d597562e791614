"""Another laboratory's stain, at five levels: the optical densities of haematoxylin, eosin and DAB are scaled and shifted.

Light that a section lets through falls exponentially with the stain in its way, so that stains add up as optical densities, not as colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from medssl.errors import RequestError
from medssl.evaluation.corruptions import LEVELS
from medssl.seeding import counter_rng

BASIS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
"""Optical densities of haematoxylin, eosin and DAB in red, green and blue (Ruifrok and Johnston 2001), before they are made of length 1."""
STRENGTHS = (0.05, 0.1, 0.15, 0.2, 0.3)
"""Largest relative change, and largest shift, of a stain. 0.05 and 0.2 are "light" and "strong" of Tellez et al.; the others are ours."""
WHITE = 255.0
DARKEST = 1 / WHITE  # light is counted in steps of an 8-bit camera: density would be infinite at 0
DOMAINS = ("wsi", "microscopy")


def basis() -> Tensor:
    """Return (3, 3) float64, one stain of length 1 per row."""
    rows = torch.tensor(BASIS, dtype=torch.float64)
    found: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return found


def stain_shift(images: Tensor, level: int, keys: Sequence[int], *, normalize: Any, seed: int = 0) -> Tensor:
    """Stain images otherwise: of each stain the density s becomes (1 + a) s + b, a and b uniform up to the strength of the level.

    Args:
        images: (B, 3, H, W) red, green, blue as an encoder sees them.
        level: 0 to 5; 0 leaves an image as it is.
        keys: (B,) number of each image; it draws the same a and b, times the strength, at all levels and in any batch.
        normalize: How the views were made from 8-bit colours: `none` or {window: [lo, hi]}; others cannot be taken back.
        seed: Of the draws.

    Returns:
        (B, 3, H, W) of the same dtype, on the same device.

    Raises:
        RequestError: The images are not red, green and blue, or are grey, the colours cannot be had back, or there is no such level.

    Reference:
        Ruifrok and Johnston 2001, "Quantification of histochemical staining by color deconvolution", equations 1 to 6; Tellez et al. 2018,
        "Whole-Slide Mitosis Detection in H&E Breast Histology Using PHH3 as a Reference", and 2019, "Quantifying the effects of data
        augmentation and stain color normalization", section 3 (HED). They draw in training; here a draw belongs to an image.
    """
    if not 0 <= level <= LEVELS:
        raise RequestError(f"level {level}; accepted: 0 to {LEVELS}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise RequestError(f"stain: a batch of shape {tuple(images.shape)}; it takes red, green and blue (B, 3, H, W)")
    low, width = _window(normalize)
    if grey := int((images == images[:, :1]).flatten(1).all(dim=1).sum()):
        raise RequestError(
            f"stain: {grey} of {len(images)} images of a batch are grey, so that nothing is stained in them; leave stain out"
        )
    if level == 0:
        return images
    strength = STRENGTHS[level - 1]
    draws = [counter_rng(seed, "corruption", "stain", int(key)).uniform(-1, 1, size=(2, 3)) for key in keys]
    scale, shift = (torch.tensor([draw[k].tolist() for draw in draws], dtype=torch.float64) * strength for k in (0, 1))
    rows = basis()
    light = ((images.double() * width + low) / WHITE).clamp(DARKEST, 1).movedim(1, -1)  # (B, H, W, 3)
    stains = -torch.log10(light) @ torch.linalg.inv(rows).to(light.device)
    stains = stains * (1 + scale[:, None, None].to(light.device)) + shift[:, None, None].to(light.device)
    changed = torch.pow(10.0, -(stains @ rows.to(light.device))).clamp(0, 1).movedim(-1, 1)
    return ((changed * WHITE - low) / width).to(images.dtype)


def check_domain(domain: str) -> None:
    """Refuse images of a domain that nobody stains: colours there are of a screen, or a map.

    Raises:
        RequestError: It is no domain of `DOMAINS`.
    """
    if domain not in DOMAINS:
        raise RequestError(f"images of domain {domain} are not stained; stain is for {' and '.join(DOMAINS)}")


def _window(normalize: Any) -> tuple[float, float]:
    """Return what was subtracted from 8-bit colours, and what they were divided by."""
    if normalize == "none":
        return 0.0, 1.0
    if isinstance(normalize, Mapping) and "window" in normalize:
        low, high = (float(value) for value in normalize["window"])
        return low, high - low
    raise RequestError(
        f"stain: normalize is {normalize}, which takes colours from the statistics of each image; they can be had back from none and from "
        "{window: [0, 255]}"
    )
