"""Views of volumes, made in batches on the training device.

Drawing and applying are apart. `draw(key, v)` returns the parameters of one view as plain numbers, from the key
alone; `apply` turns fetched crops and parameters into tensors, so that a view can be stored, replayed and pictured.
Every view is computed by itself: its bits do not depend on what else is in the batch. Dense random numbers (noise,
fields) come from one device generator per view and operation, whose seed is a parameter: equal bits per device type,
equal parameters across types.

Order: geometry (flip, rotation, scale and warp in one interpolation), bias field, normalisation, contrast,
brightness, gamma, noise, padding. Where each channel is normalised by its own statistics (`Crop.channel_stats`), contrast turns about the
mean of the channel and gamma acts on its range; what is drawn (factors, bias field) is one number for all channels, and noise is white over
voxels and channels. Nothing smooths before a view is made coarser than its source, as in nnU-Net and
TorchIO.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from medssl.errors import RequestError
from medssl.seeding import counter_rng, derive_seed
from medssl.types import Box, DrawKey, ViewSpec
from medssl.views import _arguments as arguments
from medssl.views import fields, geometry, intensity
from medssl.views._arguments import Triple
from medssl.views.masks import block_mask

_SAME_SPACING = 1e-6  # relative
_ALIGNED = 1e-4  # voxels
_WARP = {"amplitude": 0.03, "exponent": 5.0, "probability": 1.0}
_BIAS = {"amplitude": 0.3, "exponent": 6.0, "probability": 1.0}


@dataclass
class Crop:
    """A piece of an item, as the reader fetched it: the drawn box and the margin that the views asked for.

    Args:
        image: (C, *n), stored dtype.
        valid: (*n) bool, True = real content.
        spacing_mm: (3,) voxel size of the item.
        origin_mm: (3,) outer corner of voxel 0 of `image` in the item's axes (see `Box`).
        box: The drawn box, without margin; the view's centre is its centre.
        stats: Intensity statistics of the item.
        key: The draw it belongs to.
        id: Row number of the item.
        channel_stats: Statistics of each channel, where each is normalised by its own; empty normalises all channels by `stats`.
    """

    image: np.ndarray
    valid: np.ndarray
    spacing_mm: Sequence[float]
    origin_mm: Sequence[float]
    box: Box
    stats: Mapping[str, float]
    key: DrawKey
    id: int
    channel_stats: Sequence[Mapping[str, float]] = ()


class VolumeViews:
    """Random views of a volume: one size and spacing, `count` per item.

    Args:
        name: Key of the views in the batch.
        size: Voxels along X, Y, Z; one number for a cube.
        spacing_mm: Voxel size of the views in mm; None keeps each item's own.
        count: Views per item, all of the same box.
        normalize: `zscore`, `percentile`, `none` or {"window": [lo, hi]}; see `intensity.normalization`.
        flip: Probability of mirroring along each axis. Mirroring loses laterality.
        rotate_deg: Largest angle about each axis; angles are uniform in [-r, r].
        scale: Range of the isotropic scale, log-uniform; above 1 a view covers more of the body than size * spacing.
        warp: Smooth random displacement: {"amplitude": 0.03 of the side, "exponent": 5, "probability": 1}; never folds.
        noise_std: White noise; its standard deviation is uniform in [0, noise_std], in normalised units.
        gamma: Range of the exponent, log-uniform, applied to the view's own intensity range.
        brightness: Offset uniform in [-b, b], in normalised units.
        contrast: Range of the stretch about the item's mean, log-uniform.
        bias_field: Multiplicative field exp(amplitude * phi) on raw intensities: {"amplitude": 0.3, "exponent": 6,
            "probability": 1}. For MR; Hounsfield units do not scale.
        mask: {"ratio": hidden share, "cell": cell edge in voxels, one number or three}; adds `<name>_mask`.
        points: {"seeds": 100, "negatives": 1000}, what a dense matcher learns from: adds `<name>_map` (B, V, 3, 4) float64, voxel index
            to mm in the item's axes, `<name>_body` (B, V, *size) bool, and uniform numbers in [0, 1) that choose seed points and random
            negatives, `<name>_seeds` (B, V, seeds) and `<name>_negatives` (B, V, negatives). Needs views without warp.
    """

    def __init__(
        self,
        name: str = "volume",
        *,
        size: int | Sequence[int],
        spacing_mm: float | Sequence[float] | None = None,
        count: int = 1,
        normalize: str | Mapping[str, Sequence[float]] = "zscore",
        flip: float | Sequence[float] = 0,
        rotate_deg: float | Sequence[float] = 0,
        scale: Sequence[float] = (1, 1),
        warp: Mapping[str, float] | None = None,
        noise_std: float = 0,
        gamma: Sequence[float] | None = None,
        brightness: float = 0,
        contrast: Sequence[float] = (1, 1),
        bias_field: Mapping[str, float] | None = None,
        mask: Mapping[str, Any] | None = None,
        points: Mapping[str, int] | None = None,
    ) -> None:
        self.name = name
        self.size = cast(tuple[int, int, int], tuple(int(n) for n in arguments.triple("size", size, whole=True, low=1)))
        self.spacing_mm = None if spacing_mm is None else arguments.triple("spacing_mm", spacing_mm, above=0)
        self.count = int(arguments.number("count", count, whole=True, low=1))
        self.normalize, self.window = arguments.normalize_mode(normalize)
        self.flip = arguments.triple("flip", flip, low=0, high=1)
        self.rotate_deg = arguments.triple("rotate_deg", rotate_deg, low=0, high=180)
        self.scale = arguments.positive_range("scale", scale)
        self.warp = arguments.field_options("warp", warp, _WARP)
        self.noise_std = arguments.number("noise_std", noise_std, low=0)
        self.gamma = None if gamma is None else arguments.positive_range("gamma", gamma)
        self.brightness = arguments.number("brightness", brightness, low=0)
        self.contrast = arguments.positive_range("contrast", contrast)
        self.bias_field = arguments.field_options("bias_field", bias_field, _BIAS)
        self.mask_ratio, self.mask_grid = arguments.mask_options(mask, self.size)
        self.points = arguments.point_options(points, warped=self.warp is not None)

    @property
    def spec(self) -> ViewSpec:
        """What these views look like to an objective."""
        return ViewSpec("volume", self.size, self.spacing_mm, self.count)

    def view_spacing_mm(self, spacing_mm: Sequence[float]) -> Triple:
        """Return the voxel size of a view of an item with this spacing."""
        x, y, z = spacing_mm if self.spacing_mm is None else self.spacing_mm
        return float(x), float(y), float(z)

    def box_size_mm(self, spacing_mm: Sequence[float]) -> Triple:
        """Return the edges of the box that a sampler must draw in an item with this spacing."""
        x, y, z = (n * s for n, s in zip(self.size, self.view_spacing_mm(spacing_mm)))
        return x, y, z

    def margin_mm(self, spacing_mm: Sequence[float], key: DrawKey | None = None) -> Triple:
        """Return what the reader must fetch beyond the box on each side, so that no view leaves what was fetched.

        Zero without rotation, scale, warp and change of spacing. Otherwise it holds the rotations, scales and displacements
        that can be drawn, and one voxel of the item for interpolation.

        Args:
            spacing_mm: Voxel size of the item.
            key: With a key, the margin that the views of this draw need, often half as many voxels to read; without, the
                margin of any draw.
        """
        spacing = self.view_spacing_mm(spacing_mm)
        moving = any(self.rotate_deg) or self.scale != (1.0, 1.0) or self.warp is not None
        if not moving and _same_spacing(spacing, spacing_mm):
            return (0.0, 0.0, 0.0)
        if key is None:
            amplitude = 0.0 if self.warp is None else self.warp["amplitude"]
            reach = geometry.reach_mm(self._half_mm(spacing, amplitude), self.rotate_deg, self.scale[1])
        else:
            drawn = [self.draw(key, v) for v in range(self.count)]
            each = [np.abs(_matrix(view)) @ self._half_mm(spacing, _amplitude(view["warp"])) for view in drawn]
            reach = np.max(each, axis=0).tolist()
        x, y, z = (max(0.0, r - n * s / 2) + float(own) for r, n, s, own in zip(reach, self.size, spacing, spacing_mm))
        return x, y, z

    def draw(self, key: DrawKey, v: int) -> dict[str, Any]:
        """Draw the parameters of one view: a pure function of its arguments, in plain numbers that JSON can hold.

        Args:
            key: The draw.
            v: Number of the view, 0 to count - 1.

        Returns:
            `flip` (3 bools), `rotate_deg` (3), `scale`, `warp` and `bias_field` ({amplitude, exponent, seed} or
            None), `contrast`, `brightness`, `gamma` (or None), `noise` ({std, seed} or None), `mask` ({ratio, grid,
            seed} or None); with points on, `points` ({seeds, negatives, seed}).
        """

        def parts(operation: str) -> tuple[int | str, ...]:
            return (key.seed, key.step, key.position, self.name, v, operation)

        def field(operation: str, options: Mapping[str, float] | None) -> dict[str, Any] | None:
            if options is None or counter_rng(*parts(operation)).random() >= options["probability"]:
                return None
            seed = derive_seed(*parts(operation))
            return {"amplitude": options["amplitude"], "exponent": options["exponent"], "seed": seed}

        def factor(operation: str, bounds: tuple[float, float]) -> float:
            if bounds[0] == bounds[1]:
                return bounds[0]
            return math.exp(counter_rng(*parts(operation)).uniform(math.log(bounds[0]), math.log(bounds[1])))

        noise = mask = None
        if self.noise_std:
            std = float(counter_rng(*parts("noise")).uniform(0, self.noise_std))
            noise = {"std": std, "seed": derive_seed(*parts("noise"))}
        if self.mask_grid is not None:
            mask = {"ratio": self.mask_ratio, "grid": list(self.mask_grid), "seed": derive_seed(*parts("mask"))}
        flips = counter_rng(*parts("flip")).random(3) if any(self.flip) else np.ones(3)
        angles = counter_rng(*parts("rotate_deg")).uniform(-1, 1, 3) if any(self.rotate_deg) else np.zeros(3)
        shift = float(counter_rng(*parts("brightness")).uniform(-1, 1)) if self.brightness else 0.0
        points = {} if self.points is None else {"points": {**self.points, "seed": derive_seed(*parts("points"))}}
        return {
            **points,
            "flip": [bool(u < p) for u, p in zip(flips, self.flip)],
            "rotate_deg": [float(u * r) for u, r in zip(angles, self.rotate_deg)],
            "scale": factor("scale", self.scale),
            "warp": field("warp", self.warp),
            "bias_field": field("bias_field", self.bias_field),
            "contrast": factor("contrast", self.contrast),
            "brightness": shift * self.brightness,
            "gamma": None if self.gamma is None else factor("gamma", self.gamma),
            "noise": noise,
            "mask": mask,
        }

    def apply(
        self,
        crops: Sequence[Crop],
        params: Sequence[Sequence[Mapping[str, Any]]],
        device: torch.device | str,
        labels: Sequence[np.ndarray] | None = None,
        *,
        points: bool = False,
    ) -> dict[str, Tensor]:
        """Turn crops and parameters into views. Deterministic: equal arguments give equal bits on a device type.

        Args:
            crops: B crops; shapes and spacings may differ, channels may not.
            params: B lists of V parameter sets, as `draw` returns them.
            device: Where the views are made.
            labels: B integer maps (*n), each on the grid of its crop; they follow the image by nearest neighbour, 0
                outside.
            points: Also return where each voxel of a view was taken from.

        Returns:
            `<name>` (B, V, C, *size) float32; `<name>_mask` (B, V, *grid) bool, True = hidden, when a mask is on;
            `valid` (B, V, *size) bool; `spacing_mm`, `positions_mm` (B, V, 3) float64, voxel size and centre of each
            view, on the CPU; `labels` (B, V, *size) int64; `points_mm` (B, V, 3, *size) float32, item axes, mm.
        """
        self._check(crops, params, labels)
        device = torch.device(device)
        rows: dict[str, list[Tensor]] = {}
        for b, crop in enumerate(crops):
            source = _Source(crop, self._normalizations(crop), None if labels is None else labels[b], device)
            for view in params[b]:
                for key, value in self._view(source, view, points).items():
                    rows.setdefault(key, []).append(value)
        out = {key: torch.stack(row).reshape(len(crops), len(params[0]), *row[0].shape) for key, row in rows.items()}
        if self.mask_grid is not None:
            hidden = [[_mask_array(view) for view in row] for row in params]
            out[f"{self.name}_mask"] = torch.from_numpy(np.array(hidden)).to(device)
        if self.points is not None:
            out[f"{self.name}_body"] = out.pop("body")
            maps = [[self.map_mm(crop.box, crop.spacing_mm, view) for view in row] for crop, row in zip(crops, params)]
            out[f"{self.name}_map"] = torch.from_numpy(np.array(maps)).to(device)
            for which in ("seeds", "negatives"):
                drawn = [[_point_numbers(view, which) for view in row] for row in params]
                out[f"{self.name}_{which}"] = torch.from_numpy(np.array(drawn, dtype=np.float32)).to(device)
        spacing = torch.tensor([self.view_spacing_mm(crop.spacing_mm) for crop in crops], dtype=torch.float64)
        centre = torch.from_numpy(np.stack([_centre_mm(crop.box) for crop in crops]))
        out["spacing_mm"] = spacing[:, None].repeat(1, len(params[0]), 1)
        out["positions_mm"] = centre[:, None].repeat(1, len(params[0]), 1)
        return out

    def batch(self, crops: Sequence[Crop], device: torch.device | str) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Draw and apply `count` views of each crop.

        Returns:
            data: `<name>` (B, V, C, *size) float32 and, when a mask is on, `<name>_mask` (B, V, *grid) bool; what `points` adds.
            valid: (B, V, *size) bool.
            spacing_mm: (B, V, 3) float64, on the CPU.
            positions_mm: (B, V, 3) float64, on the CPU.
        """
        params = [[self.draw(crop.key, v) for v in range(self.count)] for crop in crops]
        out = self.apply(crops, params, device)
        return self.keyed(out), out["valid"], out["spacing_mm"], out["positions_mm"]

    def keyed(self, out: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what of the result of `apply` goes into a batch under the name of these views."""
        return {key: value for key, value in out.items() if key == self.name or key.startswith(f"{self.name}_")}

    def map_mm(self, box: Box, spacing_mm: Sequence[float], view: Mapping[str, Any]) -> np.ndarray:
        """Return the map of a view without warp: voxel index (i, j, k) to mm in the item's axes (see `Box`).

        Args:
            box: The drawn box.
            spacing_mm: Voxel size of the item.
            view: Parameters, as `draw` returns them.

        Returns:
            (3, 4) float64.
        """
        spacing = np.asarray(self.view_spacing_mm(spacing_mm), dtype=np.float64)
        linear = _matrix(view) * spacing
        first = _centre_mm(box) + linear @ (0.5 - np.asarray(self.size) / 2)
        return np.concatenate([linear, first[:, None]], axis=1)

    def _normalizations(self, crop: Crop) -> tuple[intensity.Normalization, ...]:
        return tuple(
            intensity.normalization(self.normalize, self.window, stats, crop.id) for stats in crop.channel_stats or (crop.stats,)
        )

    def _half_mm(self, spacing: Triple, amplitude: float) -> Triple:
        """Return half the edges of the block of voxel centres, largest displacement included."""
        bound = fields.MAX_SIGMA * amplitude
        x, y, z = ((n - 1) / 2 * s + bound * n * s for n, s in zip(self.size, spacing))
        return x, y, z

    def _view(self, source: _Source, view: Mapping[str, Any], points: bool) -> dict[str, Tensor]:
        """Make one view."""
        start = self._voxel_start(source.crop, view)
        out: dict[str, Tensor] = {}
        whole = False
        if start is not None:
            out, whole = self._cut(source, start, view["flip"])
        if start is None or points:
            piece = self._piece(source, view)
            grid = self._grid(source.crop, piece, view)
            if start is None:
                out = self._interpolate(piece, grid)
                whole = piece.valid is None and not piece.clipped
            if points:
                out["points_mm"] = geometry.grid_to_mm(grid, piece.image.shape[1:], source.crop.spacing_mm, piece.origin_mm)
        x = out[self.name]
        if self.points is not None:  # the foreground of a domain is what lies at or above its own minimum
            out["body"] = (x[0] >= source.crop.stats.get("min", -math.inf)) & out["valid"]
        self._intensities_(x, source, view)
        if not whole:
            outside = ~out["valid"]
            for part, how in source.by_channel(x):
                part.masked_fill_(outside, how.padding)
        return out

    def _voxel_start(self, crop: Crop, view: Mapping[str, Any]) -> tuple[int, int, int] | None:
        """Return the first voxel of the view in the crop when indexing serves exactly, else None."""
        moved = any(view["rotate_deg"]) or view["scale"] != 1 or _amplitude(view["warp"]) > 0
        if moved or not _same_spacing(self.view_spacing_mm(crop.spacing_mm), crop.spacing_mm):
            return None
        spacing = np.asarray(crop.spacing_mm, dtype=np.float64)
        start = (_centre_mm(crop.box) - np.asarray(crop.origin_mm)) / spacing - np.asarray(self.size) / 2
        if np.abs(start - np.rint(start)).max() > _ALIGNED:
            return None
        x, y, z = np.rint(start).astype(int).tolist()
        return x, y, z

    def _cut(self, source: _Source, start: tuple[int, int, int], flip: Sequence[bool]) -> tuple[dict[str, Tensor], bool]:
        """Index a view out of a crop; what lies beyond the crop is padding. Also say whether all of the view is valid."""
        read, write = [], []
        for first, n, have in zip(start, self.size, source.valid.shape):
            low, high = max(first, 0), max(min(first + n, have), max(first, 0))
            read.append(slice(low, high))
            write.append(slice(low - first, high - first))
        at = tuple(read)
        found = {self.name: source.image[(slice(None), *at)], "valid": source.valid[at]}
        if source.labels is not None:
            found["labels"] = source.labels[at]
        inside = found["valid"].shape == self.size
        if inside:
            out = found | {self.name: found[self.name].to(torch.float32, copy=True)}
        else:
            out = self._padding(source)
            into: tuple[Any, ...] = (..., *write)
            for key, value in found.items():
                out[key][into] = value
        if source.labels is not None:
            out["labels"] = out["labels"].long()
        if any(flip):
            axes = [axis - 3 for axis in range(3) if flip[axis]]
            out = {key: value.flip(axes) for key, value in out.items()}
        return out, inside and bool(source.crop.valid[at].all())

    def _padding(self, source: _Source) -> dict[str, Tensor]:
        """Return a view without content."""
        image = torch.empty((source.image.shape[0], *self.size), dtype=torch.float32, device=source.device)
        for part, how in source.by_channel(image):
            part.fill_(how.padding_raw)
        out = {
            self.name: image,
            "valid": torch.zeros(self.size, dtype=torch.bool, device=source.device),
        }
        if source.labels is not None:
            out["labels"] = torch.zeros(self.size, dtype=torch.int64, device=source.device)
        return out

    def _piece(self, source: _Source, view: Mapping[str, Any]) -> _Piece:
        """Return the part of a crop that one view touches: the crop was fetched for the largest view that can be drawn."""
        crop = source.crop
        spacing, origin = np.asarray(crop.spacing_mm, dtype=np.float64), np.asarray(crop.origin_mm, dtype=np.float64)
        low, high = geometry.touched_voxels(
            self._half_mm(self.view_spacing_mm(crop.spacing_mm), _amplitude(view["warp"])),
            matrix=_matrix(view),
            centre_mm=_centre_mm(crop.box) - origin,
            spacing_mm=spacing,
        )
        shape = np.asarray(crop.valid.shape)
        first = np.clip(low, 0, shape - 1)
        last = np.clip(high, first + 1, shape)
        return source.piece(
            tuple(slice(i, j) for i, j in zip(first.tolist(), last.tolist())), bool((low < 0).any() or (high > shape).any())
        )

    def _grid(self, crop: Crop, piece: _Piece, view: Mapping[str, Any]) -> Tensor:
        """Return where the voxels of a view lie in a piece, (3, *size)."""
        spacing = self.view_spacing_mm(crop.spacing_mm)
        nodes = None
        if _amplitude(view["warp"]) > 0:
            warp = view["warp"]
            nodes = fields.displacement_nodes(
                self.size,
                spacing,
                amplitude=warp["amplitude"],
                exponent=warp["exponent"],
                generator=_generator(warp["seed"], piece.image.device),
            )
        return geometry.sampling_grid(
            self.size,
            spacing,
            matrix=_matrix(view),
            centre_mm=_centre_mm(crop.box) - piece.origin_mm,
            source_shape=piece.image.shape[1:],
            source_spacing_mm=crop.spacing_mm,
            displacement=nodes,
            device=piece.image.device,
        )

    def _interpolate(self, piece: _Piece, grid: Tensor) -> dict[str, Tensor]:
        """Interpolate image, valid and labels at the positions of a grid."""
        out = {self.name: geometry.sample(piece.image, grid, "bilinear")}
        if piece.valid is not None:
            out["valid"] = geometry.sample(piece.valid[None].float(), grid, "nearest")[0] > 0.5
        elif piece.clipped:
            out["valid"] = geometry.inside(grid)
        else:
            out["valid"] = torch.ones(self.size, dtype=torch.bool, device=grid.device)
        if piece.labels is not None:
            # float32 holds every label up to 2^24; nearest copies values, so they come back whole
            out["labels"] = geometry.sample(piece.labels[None].float(), grid, "nearest")[0].long()
        return out

    def _intensities_(self, x: Tensor, source: _Source, view: Mapping[str, Any]) -> None:
        """Change the intensities of a view in place, (C, *size)."""
        if _amplitude(view["bias_field"]) > 0:
            bias = view["bias_field"]
            spacing = self.view_spacing_mm(source.crop.spacing_mm)
            nodes = fields.field_nodes(self.size, spacing, bias["exponent"], _generator(bias["seed"], source.device))
            intensity.bias_(x, fields.upsample_nodes(nodes.mul_(bias["amplitude"]), self.size))
        for part, how in source.by_channel(x):
            intensity.normalize_(part, how)
            if view["contrast"] != 1:
                intensity.contrast_(part, view["contrast"], how.pivot)
            if view["brightness"] != 0:
                part.add_(view["brightness"])
            if view["gamma"] is not None and view["gamma"] != 1:
                intensity.gamma_(part, view["gamma"])
        if view["noise"] is not None:
            intensity.noise_(x, view["noise"]["std"], _generator(view["noise"]["seed"], source.device))

    def _check(
        self,
        crops: Sequence[Crop],
        params: Sequence[Sequence[Mapping[str, Any]]],
        labels: Sequence[np.ndarray] | None,
    ) -> None:
        """Refuse a batch that does not fit together."""
        if not crops:
            raise RequestError("found no crops; a batch needs at least one; check the batch size")
        if len(params) != len(crops) or {len(row) for row in params} != {len(params[0])} or not params[0]:
            raise RequestError(
                f"found parameters {[len(row) for row in params]} for {len(crops)} crops; accepted is one list per "
                "crop, all with the same number of views; pass what draw() returned"
            )
        channels = {crop.image.shape[0] for crop in crops}
        if len(channels) > 1:
            raise RequestError(
                f"items {[crop.id for crop in crops]} have {sorted(channels)} channels; a batch needs one number "
                "of channels; select items with equal channels"
            )
        for crop in crops:
            if crop.image.ndim != 4 or crop.image.shape[1:] != crop.valid.shape:
                raise RequestError(
                    f"item {crop.id}: image {crop.image.shape} with valid {crop.valid.shape}; accepted is (C, X, Y, Z) "
                    "with (X, Y, Z); check the reader"
                )
            if len(crop.channel_stats) not in (0, len(crop.image)):
                raise RequestError(
                    f"item {crop.id}: statistics of {len(crop.channel_stats)} channels for {len(crop.image)}; give those of each, or none"
                )
        for crop, label in zip(crops, labels or []):
            if label.shape != crop.valid.shape:
                raise RequestError(
                    f"item {crop.id}: labels {label.shape} on an image {crop.valid.shape}; both must have the same "
                    "grid; read the labels with the same box"
                )
        if labels is not None and len(labels) != len(crops):
            raise RequestError(f"found {len(labels)} label maps for {len(crops)} crops; give one per crop")


@dataclass
class _Piece:
    """What a view is interpolated from.

    Args:
        image: (C, *n) float32, padding at its raw stand-in: interpolation then gives no false edge.
        valid: (*n) bool; None when all is valid.
        labels: (*n) integer, or None.
        origin_mm: (3,) outer corner of its voxel 0 in the item's axes.
        clipped: Whether the view reaches beyond what was fetched.
    """

    image: Tensor
    valid: Tensor | None
    labels: Tensor | None
    origin_mm: np.ndarray
    clipped: bool


class _Source:
    """One crop on the device, shared by its views."""

    def __init__(
        self, crop: Crop, how: tuple[intensity.Normalization, ...], labels: np.ndarray | None, device: torch.device
    ) -> None:
        self.crop, self.how, self.device = crop, how, device
        self.image = _to_device(crop.image, device)
        self.valid = _to_device(crop.valid, device)
        self.labels = None if labels is None else _to_device(labels, device)

    def by_channel(self, x: Tensor) -> Iterator[tuple[Tensor, intensity.Normalization]]:
        """Yield what is normalised alike: all channels of (C, *size), or each with its own."""
        return intensity.by_channel(x, self.how)

    def piece(self, at: tuple[slice, ...], clipped: bool) -> _Piece:
        """Return a part of the crop, ready for interpolation."""
        image = self.image[(slice(None), *at)].float()
        valid = None if self.crop.valid[at].all() else self.valid[at]  # asked on the CPU: no wait for the device
        if valid is not None:
            parts = [part.masked_fill(~valid, how.padding_raw) for part, how in self.by_channel(image)]
            image = parts[0] if len(parts) == 1 else torch.cat(parts)
        labels = None if self.labels is None else self.labels[at]
        first = np.array([s.start for s in at])
        origin = np.asarray(self.crop.origin_mm) + first * np.asarray(self.crop.spacing_mm, dtype=np.float64)
        return _Piece(image, valid, labels, origin, clipped)


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Move an array to the device; nothing here writes to it."""
    if not array.flags.c_contiguous or not array.flags.writeable or not array.dtype.isnative:
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")  # from_numpy warns on read-only arrays
    tensor = torch.from_numpy(array)
    return tensor.to(device, non_blocking=True)


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def _centre_mm(box: Box) -> np.ndarray:
    return np.asarray(box.start_mm, dtype=np.float64) + np.asarray(box.size_mm, dtype=np.float64) / 2


def _matrix(view: Mapping[str, Any]) -> np.ndarray:
    return geometry.view_matrix(view["flip"], view["rotate_deg"], view["scale"])


def _amplitude(field: Mapping[str, Any] | None) -> float:
    return 0.0 if field is None else float(field["amplitude"])


def _mask_array(view: Mapping[str, Any]) -> np.ndarray:
    mask = view["mask"]
    return block_mask(mask["grid"], mask["ratio"], counter_rng(mask["seed"], "cells"))


def _point_numbers(view: Mapping[str, Any], which: str) -> np.ndarray:
    points = view["points"]
    drawn: np.ndarray = counter_rng(points["seed"], which).random(points[which], dtype=np.float32)
    return drawn


def _same_spacing(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(abs(x - y) <= _SAME_SPACING * y for x, y in zip(a, b))
