"""Clips of a batch of views, in the layout that video encoders take, and what is random about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from medssl.errors import RequestError
from medssl.layers.tokens import valid_tokens
from medssl.layers.tube_mask import tube_masks
from medssl.types import Part, Views, ViewSpec


@dataclass
class Clips:
    """M = B * V clips of a micro-batch, items in front.

    Args:
        video: (M, C, T, H, W).
        pixels: (M, T, H, W) bool, True = inside the sector, of a frame that is there.
        tokens: (M, N) bool, tokens that show enough of that.
        grid: Token grid (T, h, w).
        seeds: What the random choices for each clip depend on.
        masks: (M, R, h, w) bool tube masks that came with the views, True = hidden; None when they did not.
    """

    video: Tensor
    pixels: Tensor
    tokens: Tensor
    grid: tuple[int, ...]
    seeds: list[tuple[int | str, ...]]
    masks: Tensor | None

    def __len__(self) -> int:
        return len(self.video)

    @property
    def on_grid(self) -> Tensor:
        """Valid tokens on their grid, (M, T, h, w)."""
        return self.tokens.reshape(-1, *self.grid)

    def hidden(self, ratio: float, count: int) -> Tensor:
        """Return tube masks (M, count, T, h, w), True = hidden: those of the views where they bring as many, or masks drawn here.

        Raises:
            RequestError: The masks of the views are on another grid.
        """
        if self.masks is None or self.masks.shape[1] < count:
            return tube_masks(self.on_grid, ratio, count, self.seeds)
        if tuple(self.masks.shape[2:]) != self.grid[1:]:
            raise RequestError(
                f"views.mask: masks of {tuple(self.masks.shape[2:])} patches, the encoder has {self.grid[1:]}; set mask.patch to the "
                "encoder's patch_size, or leave mask out"
            )
        return self.masks[:, :count, None].expand(-1, -1, self.grid[0], -1, -1)


def clip_spec(view_specs: Mapping[str, ViewSpec], encoder: Any, name: str) -> tuple[str, ViewSpec]:
    """Return the key and the spec of the clips among the views of a run.

    Raises:
        RequestError: There are none, several, or clips that the encoder does not take.
    """
    found = {key: spec for key, spec in view_specs.items() if spec.kind == "clip"}
    if len(found) != 1:
        raise RequestError(
            f"{name} needs one kind of views that are clips; found {', '.join(found) or 'none'}; set views.kind: clip"
        )
    ((key, spec),) = found.items()
    try:
        encoder.check_size(spec.size)
    except ValueError as err:
        raise RequestError(f"views of {name}, (frames, height, width) = {tuple(spec.size)}: {err}") from err
    return key, spec


def clip_part(encoder: Any, group: str, spec: ViewSpec) -> Part:
    """Return an exportable part of an encoder of clips, with what its clips were like in the manifest."""
    part: Part = encoder.part(group)
    frames, *_ = spec.size
    part.manifest["clip"] = {"frames": frames, "fps": spec.fps, "tubelet": encoder.patch_size[0]}
    return part


def clips_of(views: Views, key: str, patch: Sequence[int], share: float = 0.25) -> Clips:
    """Take the clips out of a batch.

    Args:
        views: `<key>` (B, V, T, C, H, W), with `meta.valid` (B, V, T, H, W), and `<key>_mask` (B, V, R, h, w) where masks are views.
        key: Key of the views.
        patch: (frames, rows, columns) of a token.
        share: See `valid_tokens`.

    Raises:
        RequestError: A clip has fewer frames than a tubelet, or nothing that is valid.
    """
    x = views[key]
    if x.ndim != 6 or x.shape[2] < patch[0]:
        raise RequestError(
            f"source {views.meta.source}: views {key} of shape {tuple(x.shape)}; accepted: clips (B, V, T, C, H, W) of at least "
            f"{patch[0]} frames, one tubelet; set views.frames, and leave shorter cines out of the query"
        )
    video = x.flatten(0, 1).transpose(1, 2)
    pixels = views.meta.valid[key].flatten(0, 1)
    real = valid_tokens(pixels, patch, share)
    empty = (~real.any(dim=1)).nonzero()[:, 0].tolist()
    if empty:
        raise RequestError(
            f"source {views.meta.source}: clips {empty} of the batch have no valid token; their sector is empty, or they have fewer than "
            f"{patch[0]} frames that are not filled in; leave these items out of the query"
        )
    grid = tuple(n // p for n, p in zip(video.shape[2:], patch))
    masks = views[f"{key}_mask"].flatten(0, 1) if f"{key}_mask" in views else None
    return Clips(video, pixels, real, grid, _seeds(views, x.shape[1]), masks)


def _seeds(views: Views, count: int) -> list[tuple[int | str, ...]]:
    """One seed per clip: the key of its draw, or its id where nobody drew it."""
    if views.meta.keys:
        items: list[tuple[int | str, ...]] = [(key.seed, key.step, key.position) for key in views.meta.keys]
    else:
        items = [("id", item) for item in views.meta.ids.tolist()]
    return [(*item, v) for item in items for v in range(count)]
