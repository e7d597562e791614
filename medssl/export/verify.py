"""Every export is loaded again into the stock network and compared with the encoder it came from, before it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medssl.errors import WeightsError
from medssl.export.manifest import Weights
from medssl.registry import lookup

TOLERANCE = 1e-5


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote and how it was checked.

    Args:
        files: Paths of the files, below the output folder.
        matched: Keys of the stock network that the export fills.
        missing: Keys of the stock network that keep their random start (decoder, head).
        unexpected: Keys of the export that the stock network does not know; always empty after a successful export.
        max_feature_difference: Largest absolute difference between the features of the reloaded stock network and of the
            encoder, on a fixed random image, in float64.
        notes: For people: what to load it into, and everything that was changed on the way.
    """

    files: tuple[Path, ...]
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    max_feature_difference: float
    notes: tuple[str, ...] = ()


def source_encoder(weights: Weights) -> Any:
    """Build the encoder that the weights were saved from, in eval mode and float64, and load it strictly.

    Float64 makes the comparison exact: two ways to compute the same attention differ by rounding in float32.

    Raises:
        WeightsError: The manifest names an unknown encoder, or a tensor is missing, unknown or of another shape.
    """
    from medssl.encoders.loading import load_into

    description = weights.manifest["encoder"]
    try:
        encoder = lookup("encoder", description["name"])(**description["args"])
    except (TypeError, ValueError) as err:
        raise WeightsError(
            f"the manifest describes an encoder that cannot be built ({err}); save the weights again with this medssl"
        ) from err
    load_into(encoder, weights.state, weights.manifest)
    if weights.decoder:
        load_into(encoder, weights.decoder, weights.decoder_manifest)
    return encoder.eval().double()


def random_image(channels: int, size: Sequence[int], seed: int = 0) -> Tensor:
    """Return a fixed random image (1, C, *size), float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, channels, *size, generator=generator, dtype=torch.float64)


def features(encoder: Any) -> list[Tensor]:
    """Return tokens and pooled vector of a fixed random image of a size that any encoder can take: 2, 3, ... times what it divides by."""
    size = getattr(encoder, "only_size", None) or encoder.config()["args"].get("image_size")
    stacks = getattr(encoder, "takes_stacks", False)
    if stacks:
        size = encoder.slice_encoder.only_size
        size = (*size, 5) if size else None
    size = size or [k * m for k, m in zip((2, 3, 5), getattr(encoder, "multiple", encoder.patch_size))]
    more = {"z_mm": torch.tensor([[0.0, 2.0, 3.5, 9.0, 12.0]])} if stacks else {}
    with torch.no_grad():
        output = encoder.forward_features(random_image(encoder.in_channels, size), **more)
    return [output.tokens, output.pooled]


def load_stock(network: nn.Module, state: Mapping[str, Tensor], *, allowed_missing: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Load tensors into a stock network; every key must fit, and only keys under `allowed_missing` may stay random.

    Args:
        network: Stock network, or one of its children.
        state: Tensors.
        allowed_missing: Prefixes of keys that the weights need not have; empty means strict.

    Returns:
        The missing keys, sorted.

    Raises:
        WeightsError: A key is missing or unknown, or a shape differs.
    """
    try:
        result = network.load_state_dict(dict(state), strict=False)
    except RuntimeError as err:
        raise WeightsError(f"the weights do not fit {type(network).__name__} ({err}); nothing was written") from err
    bad = [f"missing {key}" for key in result.missing_keys if not (allowed_missing and key.startswith(allowed_missing))]
    bad += [f"unexpected {key}" for key in result.unexpected_keys]
    if bad:
        raise WeightsError(
            f"the weights do not fit {type(network).__name__}: {len(bad)} fault(s), first {bad[0]}; nothing was written; "
            "check that the file is complete and that MONAI's version is the one in its manifest"
        )
    return tuple(sorted(result.missing_keys))


def compare(pairs: Sequence[tuple[Tensor, Tensor]], to: str, *, tolerance: float = TOLERANCE) -> float:
    """Return the largest absolute difference of pairs of features.

    Args:
        pairs: (of the reloaded stock network, of the source encoder).
        to: Name of the export.
        tolerance: The largest difference that is accepted; the default is for float64 on both sides.

    Raises:
        WeightsError: Shapes differ, or the difference exceeds `tolerance`.
    """
    differences = []
    for stock, source in pairs:
        if stock.shape != source.shape:
            raise WeightsError(
                f"export to {to}: the stock network returns features {tuple(stock.shape)}, the encoder {tuple(source.shape)}; "
                "nothing was written; check MONAI's version against the manifest"
            )
        differences.append((stock - source).abs().max())
    worst = float(torch.stack(differences).max())  # unlike Python's max, NaN wins
    if not worst <= tolerance:
        raise WeightsError(
            f"export to {to}: the features of the reloaded network differ by {worst:.2g}, at most {tolerance:g} is accepted; "
            "nothing was written; check MONAI's version against the manifest"
        )
    return worst


def write_pt(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a plain dictionary of tensors for users who `torch.load`; medssl itself never opens such a file but to check it."""
    torch.save({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}, path)


def read_pt(path: Path) -> dict[str, Tensor]:
    """Read a file of `write_pt` back, refusing anything but tensors."""
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def require_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> None:
    """Raise WeightsError unless both hold the same keys with the same bits."""
    if found.keys() != expected.keys() or any(not torch.equal(found[key], expected[key]) for key in expected):
        raise WeightsError(f"{name} differs from the weights after writing; nothing was left behind; run the export again")
