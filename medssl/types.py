"""The dataclasses that cross the borders between packages, and the axis legend.

Axes
    Volume  (C, X, Y, Z), RAS+ millimetres: X grows to the patient's right, Y to anterior, Z to superior (closest canonical
            orientation; an oblique scan keeps its oblique affine). In shape comments D, H, W name X, Y, Z in this order, never "depth".
    Image   (C, H, W).         Clip  (T, C, H, W).
    Batch   (B, V, C, *size): B items, V views of each. Clips (B, V, T, C, H, W).
    Tokens  (B, N, E), flattened by `medssl.layers.tokens` and by nothing else.
    Masks   True = hidden from the encoder.     Valid   True = real image content, False = padding or excluded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

Kind = Literal["image", "volume", "clip"]


@dataclass(frozen=True)
class ImageMeta:
    """What is known about an image apart from its voxels. Holds no patient identifier and no path.

    Args:
        series_id: Pseudonymous id of the series (32 hex digits).
        domain: Registered domain name, for instance `mri`.
        modality: DICOM modality, or `unknown`.
        units: `HU` for CT, `arbitrary` for all others.
        slice_axis: 0, 1 or 2: the array axis along which the source had slices; None when unknown and for images and clips.
        stats: Intensity statistics of the foreground, computed by the domain and not applied: `mean`, `std`, `p00_5`, `p05`,
            `p50`, `p95`, `p99_5`, `min`, `max`, `foreground_fraction` (of all voxels).
        flags: Quality flags, for instance `nan_voxels`.
        kind: `volume`, `image` or `clip`.
        frame_times_ms: Start of each frame of a clip, from 0; None for others and when unknown.
        channels: Names of the channels where they have any, for instance stains.
        facts: What else the domain found out, in closed vocabularies and numbers (view, laterality, sector).
    """

    series_id: str
    domain: str
    modality: str = "unknown"
    units: str = "arbitrary"
    slice_axis: int | None = None
    stats: Mapping[str, float] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    kind: Kind = "volume"
    frame_times_ms: tuple[float, ...] | None = None
    channels: tuple[str, ...] = ()
    facts: Mapping[str, str | float | bool] = field(default_factory=dict)


@dataclass
class Sample:
    """One canonical volume, image or clip, as a domain delivers it.

    Args:
        image: Volume (C, X, Y, Z) in RAS+, image (C, H, W), clip (T, C, H, W); the narrowest lossless dtype (uint8, int16, uint16
            for images, else float32); intensities not normalised.
        spacing_mm: Volume: (3,) voxel size along X, Y, Z in mm. Image and clip: (2,) step between rows and between columns.
            None when the source does not say; a volume always has it.
        affine: Volume: (4, 4) float64, voxel centre index to RAS+ mm. None for images and clips.
        valid: (X, Y, Z), or (H, W) for images and clips: bool, True = real content; None when everything is valid.
        meta: The rest.
    """

    image: np.ndarray
    spacing_mm: tuple[float, ...] | None
    affine: np.ndarray | None
    valid: np.ndarray | None
    meta: ImageMeta


@dataclass(frozen=True)
class Box:
    """An axis-aligned box in an item's own canonical axes.

    Args:
        start_mm: Corner with the smallest coordinates, mm along X, Y, Z from the outer corner of voxel (0, 0, 0), so that a volume
            of n voxels spans [0, n * spacing]. May lie outside the volume: the reader pads.
        size_mm: Edge lengths in mm.
    """

    start_mm: tuple[float, float, float]
    size_mm: tuple[float, float, float]


@dataclass(frozen=True)
class DrawKey:
    """What a draw depends on: nothing else may influence it.

    Args:
        seed: Seed of the run.
        step: Optimiser step, from 0.
        position: Position in the global batch of that step, running over ranks and micro-steps.
    """

    seed: int
    step: int
    position: int


@dataclass(frozen=True)
class Draw:
    """The outcome of `Sampler.draw(key)`: which items, and which box of each.

    Args:
        source: Name of the source.
        ids: Row numbers in `items.parquet`: one, or two for a cross-patient pair.
        boxes: One box per id.
    """

    source: str
    ids: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class ViewSpec:
    """What a view must look like when it reaches the objective.

    Args:
        kind: `image`, `volume` or `clip`.
        size: Spatial size in voxels, (X, Y, Z) for a volume.
        spacing_mm: Voxel size along each axis in mm; None keeps the item's own spacing.
        count: Views per item (V).
        fps: Frames per second of a clip that is sampled by time; None for anything else.
    """

    kind: Kind
    size: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None = None
    count: int = 1
    fps: float | None = None


@dataclass
class ViewsMeta:
    """What travels beside the tensors of a batch.

    Args:
        source: Name of the source; one per step, the same on all ranks.
        domain: Domain name.
        ids: (B,) int64, row numbers in `items.parquet`.
        spacing_mm: key -> (B, V, 3) float64, voxel size of each view in mm.
        positions_mm: key -> (B, V, 3) float64, centre of each view in the item's canonical axes (see `Box`), mm.
        valid: key -> (B, V, *size) bool, True = real content.
        keys: One `DrawKey` per item, so that a view can be replayed.
    """

    source: str
    domain: str
    ids: Tensor
    spacing_mm: dict[str, Tensor]
    positions_mm: dict[str, Tensor]
    valid: dict[str, Tensor]
    keys: tuple[DrawKey, ...]


@dataclass
class Views:
    """One micro-batch of views on the training device.

    Args:
        data: key -> tensor. Images (B, V, C, *size); a key `<view>_mask` is (B, V, *grid) bool, True = hidden.
        meta: Everything else.
    """

    data: dict[str, Tensor]
    meta: ViewsMeta

    def __getitem__(self, key: str) -> Tensor:
        return self.data[key]

    def __contains__(self, key: object) -> bool:
        return key in self.data

    @property
    def batch_size(self) -> int:
        """B, the number of items in this micro-batch."""
        return int(self.meta.ids.shape[0])


@dataclass
class Stack:
    """Planes of B items in order, slices or frames: what an encoder of stacks takes instead of one tensor.

    Args:
        planes: (B, N, C, H, W).
        valid: (B, N) bool, True = a real plane, False = padding.
        depth: (B, N) place of each plane: mm along the slice axis, ms for frames.
    """

    planes: Tensor
    valid: Tensor
    depth: Tensor

    def to(self, *args: Any, **kwargs: Any) -> Stack:
        """Move the planes as `Tensor.to` does, and the rest to the same device."""
        planes = self.planes.to(*args, **kwargs)
        return Stack(planes, self.valid.to(planes.device), self.depth.to(planes.device))

    def __len__(self) -> int:
        return len(self.planes)


@dataclass
class ClipBatch:
    """Clips of B items as a video encoder takes them: `encoder.forward_features(batch.video, valid=batch.pixels)`.

    Args:
        video: (B, C, T, H, W) float; outside the sector all pixels hold one constant.
        valid: (B, T) bool, True = a frame of the file that is shown for the first time; False = filled in from other frames, because
            the file ended. The true frames come first.
        sector: (B, 1, H, W) bool, True = inside the sector, the same for all frames.
        frame_time_s: (B, T) float32 seconds since the first frame shown, rising, also over frames that were filled in.
    """

    video: Tensor
    valid: Tensor
    sector: Tensor
    frame_time_s: Tensor

    @classmethod
    def of(cls, views: Views, name: str = "clip", v: int | None = 0) -> ClipBatch:
        """Take clips out of a batch of views.

        Args:
            views: Views of the kind `clip`: `<name>` (B, V, T, C, H, W), `<name>_valid` (B, V, T), `<name>_sector` (B, V, 1, H, W),
                `<name>_time_s` (B, V, T).
            name: Key of the views.
            v: Which view of each item; None takes all as one batch of B * V, items in front.
        """
        parts = [views[name], *(views[f"{name}_{part}"] for part in ("valid", "sector", "time_s"))]
        video, valid, sector, time_s = (part.flatten(0, 1) if v is None else part[:, v] for part in parts)
        return cls(video.transpose(1, 2), valid, sector, time_s)

    @property
    def pixels(self) -> Tensor:
        """(B, T, H, W) bool, True = inside the sector, of a frame that is not filled in."""
        return self.valid[:, :, None, None] & self.sector

    def to(self, *args: Any, **kwargs: Any) -> ClipBatch:
        """Move the video as `Tensor.to` does, and the rest to the same device."""
        video = self.video.to(*args, **kwargs)
        rest = (part.to(video.device) for part in (self.valid, self.sector, self.frame_time_s))
        return ClipBatch(video, *rest)

    def __len__(self) -> int:
        return len(self.video)


@dataclass
class EncoderOutput:
    """What `Encoder.forward_features` returns.

    Args:
        tokens: (B, N, E) in the order of `medssl.layers.tokens`; (B, N_kept, E) when `keep` was given.
        grid: Token grid (X, Y, Z) of the full, unmasked image.
        pooled: (B, E). The mean over the tokens present for encoders of volumes, `vit3d` too, which has no class token; for `image2d`
            what the stock network returns: the class token of most timm ViTs, a mean of the last map elsewhere.
        pyramid: Feature maps (B, C_i, *size_i) from fine to coarse; empty where an encoder has one scale or tokens were dropped.
    """

    tokens: Tensor
    grid: tuple[int, ...]
    pooled: Tensor
    pyramid: tuple[Tensor, ...] = ()


@dataclass
class Part:
    """One exportable part of an objective: `weights/<tag>/<name>.safetensors` and `.json`.

    Args:
        module: The encoder (a probe runs it); what is written is the state of its child `prefix`, under the stock network's own keys.
        manifest: Encoder name and arguments, patch, token order, channels and so on; the run adds spacing, hashes and versions.
        prefix: Prefix of state-dict keys that is written and stripped.
        keys: Prefixes, after stripping, of the keys to write; None writes all.
    """

    module: nn.Module
    manifest: dict[str, Any]
    prefix: str = "net."
    keys: tuple[str, ...] | None = None


@dataclass
class StepContext:
    """What an objective may know about the step besides its views.

    Args:
        step: Optimiser step from 0.
        epoch: Passes over the items, from 0.
        stage: Index of the stage.
        seed: Seed of the run.
        rank: Rank of this process.
        world_size: Number of processes.
        micro_steps: Micro-steps in this optimiser step.
        schedules: name -> value at this step.
        totals: Denominators of this step, summed over micro-steps and ranks (see `mean`).
        loss_weights: name -> weight of this stage.
    """

    step: int = 0
    epoch: int = 0
    stage: int = 0
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    micro_steps: int = 1
    schedules: Mapping[str, float] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)
    loss_weights: Mapping[str, float] = field(default_factory=dict)

    def mean(self, total: Tensor, count: str, local_count: Tensor) -> Tensor:
        """Divide a sum over this micro-batch by its count over the whole step.

        The loop averages the losses of all micro-steps and ranks; with this scaling that average is exactly
        (sum over everything) / (count over everything), however unevenly the count is spread.

        Args:
            total: Scalar sum over this micro-batch.
            count: Name under which `objective.denominators(views)` returned the count.
            local_count: The count of this micro-batch, used when the loop supplied none (unit tests, evaluation).
        """
        if count not in self.totals:
            return total / local_count.clamp_min(1)
        return total * (self.world_size * self.micro_steps / max(self.totals[count], 1.0))

    def generator(self, name: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a generator keyed by (seed, step, name): equal on all ranks, independent of what ran before."""
        from medssl.seeding import derive_seed

        generator = torch.Generator(device=device)
        generator.manual_seed(derive_seed(self.seed, self.step, name))
        return generator


class Objective(Protocol):
    """What the loop calls. An objective is a plain `nn.Module`; only `forward` and `view_specs` are required.

    Optional, looked up by name: `needs` (encoder attributes that must be true), `smallest_batch` (items of a forward pass),
    `check_places({source: (view key, single pictures, items)}) -> sentences` (before the run is made; may refuse it), of objectives that
    learn from pairs of crops `pairs` (what `sampler.pairs` may be), `looks` (two views of one crop will do) and `points` (they need
    `views.points`), `denominators(views) -> {name: scalar tensor}`,
    `schedules(step, steps) -> {name: value}`, `after_step(ctx)`, `on_epoch(ctx, embed)`, `reconstruct(views) -> pictures`,
    `ema_pairs() -> [(student, teacher, schedule name)]`, `exported() -> {part: Part}`.
    """

    view_specs: dict[str, ViewSpec]

    def __call__(self, views: Views, ctx: StepContext) -> dict[str, Tensor]:
        """Return `{"loss": scalar, ...parts}`."""
        ...


class Source(Protocol):
    """Where the loop gets its views from. `sampling.source.ImageSource` is the one implementation."""

    name: str
    weight: float
    domain: str

    def fetch(self, keys: list[DrawKey]) -> Any:
        """Draw and read on the CPU (any thread): no tensor of the device is touched."""
        ...

    def views(self, fetched: Any, device: torch.device) -> Views:
        """Turn what `fetch` returned into views on the device."""
        ...

    def __len__(self) -> int:
        """Number of items."""
        ...


Embed = Callable[[str], tuple[Tensor, Tensor]]
ProbeCallback = Callable[[int, Mapping[str, nn.Module]], Mapping[str, float]]
BatchIterator = Iterator[tuple[int, list[Views]]]
