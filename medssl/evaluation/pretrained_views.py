"""How the images of a task differ from those that weights were pretrained with: intensities, voxel size, axes.

Features of such images mean something else, and nothing crashes: a task refuses them unless its recipe says `force: true`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from medssl.errors import RequestError
from medssl.registry import lookup

log = logging.getLogger(__name__)
TOLERANCE = 0.1
"""Of voxel sizes, as a share: scanners that are set to 1 mm say 0.94 or 1.05."""
RESAMPLED = ("volume", "pair")
"""Kinds of views with a voxel size; pictures, stacks and clips are brought to a size in pixels, whatever a pixel is."""


def plain(how: Any) -> Any:
    """Return a normalisation as JSON has it, to be compared."""
    return json.loads(json.dumps(dict(how) if isinstance(how, Mapping) else how))


def normalizations(manifest: Mapping[str, Any]) -> list[Any]:
    """Return how the images of a pretraining were normalised: one way, or one for each kind of source."""
    views: Mapping[str, Any] = manifest.get("views") or {}
    ways = [dict(manifest.get("intensity") or {}).get("normalize"), *(dict(view or {}).get("normalize") for view in views.values())]
    found: list[Any] = []
    for way in ways:
        if way is not None and plain(way) not in found:
            found.append(plain(way))
    return found


def unlike_intensities(manifest: Mapping[str, Any], normalize: Any) -> str | None:
    """Say how a normalisation differs from that of the weights; None where it does not, or where nobody knows."""
    how = normalizations(manifest)
    if not how or plain(normalize) in how:
        return None
    return f"the weights were pretrained with normalize {' or '.join(map(str, how))}, the settings say {normalize}: set normalize: {how[0]}"


def unlike_spacing(manifest: Mapping[str, Any], seen: Sequence[float] | None, given: bool) -> str | None:
    """Say how voxels differ from those that the weights were pretrained with.

    Args:
        manifest: Of the weights. Only where their images were resampled to one voxel size is there anything to differ from.
        seen: Voxel size in mm that the network will see, per axis; None where images do not tell.
        given: Whether the settings ask for that size, or images have it.
    """
    known = manifest.get("spacing_mm")
    if manifest.get("spacing_source") != "views" or known is None or seen is None or len(known) != len(seen):
        return None
    if all(abs(a / b - 1) <= TOLERANCE for a, b in zip(seen, known)):
        return None
    wanted, found = (" x ".join(f"{size:g}" for size in sizes) for sizes in (known, seen))
    whose = "the settings ask for" if given else "spacing_mm is null, and training images have a median of"
    return f"the weights were pretrained at {wanted} mm, {whose} {found} mm: set spacing_mm: {list(known)}"


def unlike_axes(manifest: Mapping[str, Any]) -> str | None:
    """Say that weights were made for images with other axes than their encoder gets here."""
    order, ours = manifest.get("axis_order"), lookup("encoder", manifest["encoder"]["name"]).axis_order
    if order is None or order == ours:
        return None
    return f"the weights are for images in axis order {order}, {manifest['encoder']['name']} gets {ours} here: save or convert them in {ours}"


def unlike_views(manifest: Mapping[str, Any], views: Mapping[str, Any]) -> list[str | None]:
    """Say how the views of a source differ from those of the weights: axes, intensities, voxel size.

    Args:
        manifest: Of the weights.
        views: A `views` section, with what the weights bring where the recipe says nothing (`probe_tasks.evaluation_section`).
    """
    found = [unlike_axes(manifest), unlike_intensities(manifest, views.get("normalize", "zscore"))]
    known, given = manifest.get("spacing_mm"), views.get("spacing_mm")
    if known is None or views.get("kind", "volume") not in RESAMPLED:
        return found
    if given is not None:
        seen = [given] * len(known) if isinstance(given, int | float) else list(given)
        found.append(unlike_spacing(manifest, seen, given=True))
    elif manifest.get("spacing_source") == "views":
        at = " x ".join(f"{size:g}" for size in known)
        found.append(
            f"the weights were pretrained at {at} mm, spacing_mm: null keeps each volume's own: set spacing_mm: {list(known)}"
        )
    return found


def refuse_unlike(found: Sequence[str | None], force: bool, where: str = "") -> list[str]:
    """Return the differences that were found, and warn of them once.

    Args:
        found: Differences, None where there is none.
        force: Whether the recipe takes them.
        where: Path of the section in the recipe that they are of.

    Raises:
        RequestError: There are some, and nobody forced them.
    """
    there = [difference for difference in found if difference is not None]
    if there and not force:
        raise RequestError(
            (f"{where}: " if where else "")
            + "; ".join(there)
            + "; features would meet other images than they know; force: true does it all the same, and the result "
            "says so"
        )
    for difference in there:
        _warn(difference)
    return there


@cache
def _warn(difference: str) -> None:
    """Warn once in a process: a curve or suite asks again for each of its parts."""
    log.warning("forced: %s", difference)
