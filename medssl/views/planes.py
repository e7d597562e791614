"""Views of flat pictures: 2D images, single slices or frames, and stacks of them, made in batches on the training device.

As in `views.pipeline`, drawing and applying are apart, every view is computed by itself, and dense random numbers come from
one device generator per view and operation. All planes of a stack share one crop and one change of intensities.

A view is a rectangle of the picture, resized: the largest one that has the view's shape and lies inside the picture (`fit: crop`)
or the smallest one around it (`fit: pad`), shrunk to a random share of its area. Pixels are averaged first where the view is
coarser than the picture, so that a radiograph of 3,000 pixels shown at 64 does not alias. Shapes are kept in millimetres where
the item knows its spacing, else in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.errors import RequestError
from medssl.seeding import counter_rng, derive_seed
from medssl.types import DrawKey, ViewSpec
from medssl.views import _arguments as arguments
from medssl.views import intensity

_BLUR = {"sigma": (0.1, 2.0), "probability": 0.5}


@dataclass
class Planes:
    """One picture or a stack of planes of an item, as the reader fetched it.

    Args:
        image: (N, C, H, W), stored dtype; slices already turned as a radiologist looks at them (see `sampling.planes.display`).
        valid: (N, H, W) bool, True = real content.
        pixel_mm: (2,) step between rows and between columns; None when the item does not know.
        depth: (N,) place of each plane: mm from the first slice of the item, or ms from the first frame of a clip.
        share: (N,) the same from 0 (first) to 1 (last); NaN for a picture that belongs to no stack.
        stats: Intensity statistics of the item.
        key: The draw it belongs to.
        id: Row number of the item.
    """

    image: np.ndarray
    valid: np.ndarray
    pixel_mm: tuple[float, float] | None
    depth: np.ndarray
    share: np.ndarray
    stats: Mapping[str, float]
    key: DrawKey
    id: int


class PlaneViews:
    """Random views of pictures or of stacks of planes.

    Args:
        name: Key of the views in the batch.
        size: (H, W) in pixels; one number for a square.
        slices: Planes per view (N) for stacks; None for pictures.
        count: Views per item.
        fit: `pad` shows the whole picture and pads, `crop` fills the view and cuts.
        area: Range of the share of the area that a view covers, uniform.
        aspect: Range of the factor on width over height, log-uniform.
        flip: Probability of mirroring (up-down, left-right). Mirroring loses laterality.
        rotate_deg: Largest angle; angles are uniform in [-r, r].
        normalize: As in `VolumeViews`.
        noise_std: As in `VolumeViews`.
        gamma: As in `VolumeViews`.
        brightness: As in `VolumeViews`.
        contrast: As in `VolumeViews`.
        blur: Gaussian blur: {"sigma": [0.1, 2] pixels of the view, "probability": 0.5}.
        channels: `keep`, or `mean` for one grey channel whatever the item has.
        local: Further, smaller views under the key `<name>_local`: {"count": 4, "size": 32, "area": [0.05, 0.3]}; pictures only.
    """

    def __init__(
        self,
        name: str = "image",
        *,
        size: int | Sequence[int],
        slices: int | None = None,
        count: int = 1,
        fit: str = "pad",
        area: Sequence[float] = (1, 1),
        aspect: Sequence[float] = (1, 1),
        flip: Sequence[float] = (0, 0),
        rotate_deg: float = 0,
        normalize: str | Mapping[str, Sequence[float]] = "zscore",
        noise_std: float = 0,
        gamma: Sequence[float] | None = None,
        brightness: float = 0,
        contrast: Sequence[float] = (1, 1),
        blur: Mapping[str, Any] | None = None,
        channels: str = "keep",
        local: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.size = arguments.pair("size", size, whole=True, low=1)
        self.slices = None if slices is None else int(arguments.number("slices", slices, whole=True, low=1))
        self.count = int(arguments.number("count", count, whole=True, low=1))
        self.fit = arguments.one_of("fit", fit, ("pad", "crop"))
        self.area = arguments.share_range("area", area)
        self.aspect = arguments.positive_range("aspect", aspect)
        up, left = (arguments.number("flip", p, low=0, high=1) for p in arguments.two("flip", flip))
        self.flip = (up, left)
        self.rotate_deg = arguments.number("rotate_deg", rotate_deg, low=0, high=180)
        self.normalize, self.window = arguments.normalize_mode(normalize)
        self.noise_std = arguments.number("noise_std", noise_std, low=0)
        self.gamma = None if gamma is None else arguments.positive_range("gamma", gamma)
        self.brightness = arguments.number("brightness", brightness, low=0)
        self.contrast = arguments.positive_range("contrast", contrast)
        self.blur = _blur_options(blur)
        self.channels = arguments.one_of("channels", channels, ("keep", "mean"))
        self.local = None if local is None else self._local(local)

    def _local(self, given: Mapping[str, Any]) -> PlaneViews:
        """Return the maker of the small views: everything as in the large ones but number, size and area."""
        if self.slices is not None:
            raise RequestError("local: found small views of a stack; accepted are small views of pictures; remove local or slices")
        if not isinstance(given, Mapping) or not {"count", "size"} <= set(given):
            raise RequestError(f"local: found {given!r}; accepted is {{count: 4, size: 32, area: [0.05, 0.3]}}; change local")
        arguments.known_keys("local", given, ("count", "size", "area"))
        small = PlaneViews(
            f"{self.name}_local",
            size=given["size"],
            count=given["count"],
            fit="crop",
            area=given.get("area", (0.05, 0.3)),
            channels=self.channels,
        )
        for name in ("aspect", "flip", "rotate_deg", "normalize", "window", "noise_std", "gamma", "brightness", "contrast", "blur"):
            setattr(small, name, getattr(self, name))
        return small

    @property
    def spec(self) -> ViewSpec:
        """What these views look like to an objective; a stack is a clip whose frames are slices."""
        if self.slices is None:
            return ViewSpec("image", self.size, None, self.count)
        return ViewSpec("clip", (self.slices, *self.size), None, self.count)

    @property
    def specs(self) -> dict[str, ViewSpec]:
        """Every key that a batch holds, with its spec."""
        return {self.name: self.spec} | ({self.local.name: self.local.spec} if self.local else {})

    def draw(self, key: DrawKey, v: int) -> dict[str, Any]:
        """Draw the parameters of one view: a pure function of its arguments, in plain numbers.

        Returns:
            `area`, `aspect`, `centre` (2, shares of the room there is), `flip` (2 bools), `rotate_deg`, `contrast`, `brightness`,
            `gamma` (or None), `blur` (sigma or None), `noise` ({std, seed} or None).
        """

        def rng(operation: str) -> np.random.Generator:
            return counter_rng(key.seed, key.step, key.position, self.name, v, operation)

        def factor(operation: str, bounds: tuple[float, float]) -> float:
            if bounds[0] == bounds[1]:
                return bounds[0]
            return math.exp(rng(operation).uniform(math.log(bounds[0]), math.log(bounds[1])))

        blur = noise = None
        if self.blur is not None and rng("blur").random() < self.blur["probability"]:
            blur = float(rng("blur sigma").uniform(*self.blur["sigma"]))
        if self.noise_std:
            seed = derive_seed(key.seed, key.step, key.position, self.name, v, "noise")
            noise = {"std": float(rng("noise").uniform(0, self.noise_std)), "seed": seed}
        flips = rng("flip").random(2) if any(self.flip) else np.ones(2)
        return {
            "area": float(rng("area").uniform(*self.area)),
            "aspect": factor("aspect", self.aspect),
            "centre": [float(u) for u in rng("centre").random(2)],
            "flip": [bool(u < p) for u, p in zip(flips, self.flip)],
            "rotate_deg": float(rng("rotate_deg").uniform(-1, 1)) * self.rotate_deg,
            "contrast": factor("contrast", self.contrast),
            "brightness": float(rng("brightness").uniform(-1, 1)) * self.brightness,
            "gamma": None if self.gamma is None else factor("gamma", self.gamma),
            "blur": blur,
            "noise": noise,
        }

    def apply(
        self, items: Sequence[Planes], params: Sequence[Sequence[Mapping[str, Any]]], device: torch.device | str
    ) -> dict[str, Tensor]:
        """Turn fetched planes and parameters into views.

        Args:
            items: B items; shapes may differ.
            params: B lists of V parameter sets, as `draw` returns them.
            device: Where the views are made.

        Returns:
            `<name>` (B, V, C, H, W) float32, stacks (B, V, N, C, H, W); `valid` likewise without C, bool; `<name>_depth` and
            `<name>_share` (B, V, N) float32 for stacks, (B, V) for pictures; `<name>_map` (B, V, 2, 3) float32: for a point (x, y) of
            the view, -1 to 1, its row and column in the picture, 0 to 1; `spacing_mm` (B, V, 2) float64 on the CPU, pixel of
            the view, NaN where unknown.

        Raises:
            RequestError: The items do not fit in one batch.
        """
        items = [self._fitted(item) for item in items]
        self._check(items)
        device = torch.device(device)
        rows: dict[str, list[Tensor]] = {}
        for item, views in zip(items, params):
            how = intensity.normalization(self.normalize, self.window, item.stats, item.id)
            image = to_device(item.image, device)
            valid = None if item.valid.all() else to_device(item.valid, device)
            for view in views:
                for key, value in self._view(item, image, valid, how, view).items():
                    rows.setdefault(key, []).append(value)
        return {key: torch.stack(row).reshape(len(items), len(params[0]), *row[0].shape) for key, row in rows.items()}

    def batch(
        self, items: Sequence[Planes], device: torch.device | str
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Draw and apply `count` views of each item, and the local ones.

        Returns:
            data by key; valid and spacing_mm, each by the name of the view.
        """
        data: dict[str, Tensor] = {}
        valid, spacing = {}, {}
        for maker in (self, *([self.local] if self.local else [])):
            out = maker.apply(items, [[maker.draw(item.key, v) for v in range(maker.count)] for item in items], device)
            valid[maker.name], spacing[maker.name] = out.pop("valid"), out.pop("spacing_mm")
            data.update(out)
        return data, valid, spacing

    def _fitted(self, item: Planes) -> Planes:
        if self.channels == "mean" and item.image.shape[1] > 1:
            grey = item.image.mean(axis=1, keepdims=True, dtype=np.float32)
            return Planes(grey, item.valid, item.pixel_mm, item.depth, item.share, item.stats, item.key, item.id)
        return item

    def _check(self, items: Sequence[Planes]) -> None:
        channels = sorted({item.image.shape[1] for item in items})
        if len(channels) > 1:
            raise RequestError(
                f"items {[item.id for item in items]} have {channels} channels; a batch needs one number of channels; "
                "set channels: mean, or select items with equal channels"
            )
        for item in items:
            if item.image.ndim != 4 or item.valid.shape != (item.image.shape[0], *item.image.shape[2:]):
                raise RequestError(f"item {item.id}: image {item.image.shape} with valid {item.valid.shape}; check the reader")
            if self.slices is None and len(item.image) != 1:
                raise RequestError(f"item {item.id}: {len(item.image)} planes where views of pictures need one; set slices")
            if self.slices is not None and len(item.image) > self.slices:
                raise RequestError(f"item {item.id}: {len(item.image)} planes; the views hold {self.slices}; check the sampler")

    def _view(
        self, item: Planes, image: Tensor, valid: Tensor | None, how: intensity.Normalization, view: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        height, width = item.image.shape[2:]
        matrix, pixel = self._matrix((height, width), item.pixel_mm, view)
        x, seen = resize(image, valid, matrix, self.size, how.padding_raw)
        self._intensities_(x, how, view)
        x.masked_fill_(~seen[:, None], how.padding)
        scale = torch.tensor([[1 / height], [1 / width]], dtype=torch.float64)
        out = {
            self.name: x,
            "valid": seen,
            f"{self.name}_depth": torch.as_tensor(np.asarray(item.depth, dtype=np.float32), device=x.device),
            f"{self.name}_share": torch.as_tensor(np.asarray(item.share, dtype=np.float32), device=x.device),
            f"{self.name}_map": (torch.from_numpy(matrix) * scale).float().to(x.device),
        }
        if self.slices is None:
            out = {key: value if key.endswith("_map") else value[0] for key, value in out.items()}
        else:
            missing = self.slices - len(x)
            if missing:
                out = {
                    key: value if key.endswith("_map") else _pad_planes(value, missing, how.padding) for key, value in out.items()
                }
        out["spacing_mm"] = torch.tensor(pixel, dtype=torch.float64)
        return out

    def _matrix(
        self, shape: tuple[int, int], pixel_mm: tuple[float, float] | None, view: Mapping[str, Any]
    ) -> tuple[np.ndarray, tuple[float, float]]:
        """Return the map from (x, y, 1) of the view to (row, column) in pixels, and the pixel of the view in mm."""
        unit = np.ones(2) if pixel_mm is None else np.asarray(pixel_mm, dtype=np.float64)
        extent = np.asarray(shape) * unit
        wanted = np.asarray(self.size, dtype=np.float64)
        room = extent / wanted
        base = wanted * (room.max() if self.fit == "pad" else room.min())
        side = base * math.sqrt(view["area"]) * np.array([view["aspect"] ** -0.5, view["aspect"] ** 0.5])
        centre = np.where(side < extent, side / 2 + np.asarray(view["centre"]) * (extent - side), extent / 2)
        angle = math.radians(view["rotate_deg"])
        cos, sin = math.cos(angle), math.sin(angle)
        up, left = (-1.0 if mirrored else 1.0 for mirrored in view["flip"])
        rows = np.array([[sin * left * side[1] / 2, cos * up * side[0] / 2], [cos * left * side[1] / 2, -sin * up * side[0] / 2]])
        matrix = np.concatenate([rows, centre[:, None]], axis=1) / unit[:, None]
        pixel = side / wanted
        return matrix, (float("nan"), float("nan")) if pixel_mm is None else (float(pixel[0]), float(pixel[1]))

    def _intensities_(self, x: Tensor, how: intensity.Normalization, view: Mapping[str, Any]) -> None:
        intensity.normalize_(x, how)
        if view["contrast"] != 1:
            intensity.contrast_(x, view["contrast"], how.pivot)
        if view["brightness"] != 0:
            x.add_(view["brightness"])
        if view["gamma"] is not None and view["gamma"] != 1:
            intensity.gamma_(x, view["gamma"])
        if view["blur"] is not None:
            x.copy_(gaussian_blur(x, view["blur"]))
        if view["noise"] is not None:
            generator = torch.Generator(device=x.device).manual_seed(view["noise"]["seed"])
            intensity.noise_(x, view["noise"]["std"], generator)


def resize(image: Tensor, valid: Tensor | None, matrix: np.ndarray, size: tuple[int, int], padding: float) -> tuple[Tensor, Tensor]:
    """Show a parallelogram of each plane at another size: averaging by whole numbers first, then bilinear interpolation.

    Args:
        image: (N, C, H, W).
        valid: (N, H, W) bool, (1, H, W) for all planes, or None when all is valid.
        matrix: (2, 3): (row, column) in pixels, from the outer corner, of a point (x, y, 1) of the view with -1 <= x, y <= 1.
        size: (h, w) of the view.
        padding: Value outside the picture and where it is not valid.

    Returns:
        (N, C, h, w) float32, and (N, h, w) bool.
    """
    height, width = image.shape[2:]
    reach = np.abs(matrix[:, :2]).sum(axis=1)
    step = np.array([np.linalg.norm(matrix[:, 1]) * 2 / size[0], np.linalg.norm(matrix[:, 0]) * 2 / size[1]])
    # Rows of the view run along rows of the picture up to the rotation; the finer of both directions decides.
    turned = abs(matrix[0, 0]) > abs(matrix[0, 1])
    factor = np.maximum(1, np.floor(step[::-1] if turned else step)).astype(int)
    first = np.clip(np.floor(matrix[:, 2] - reach) - factor, 0, [height - 1, width - 1]).astype(int)
    last = np.clip(np.ceil(matrix[:, 2] + reach) + factor, first + 1, [height, width]).astype(int)
    at = (slice(first[0], last[0]), slice(first[1], last[1]))
    part = image[:, :, at[0], at[1]].float()
    inside = None if valid is None else valid[:, at[0], at[1]]
    if inside is not None:
        part = part.masked_fill(~inside[:, None], padding)
    if (factor > 1).any():
        kernel = (int(factor[0]), int(factor[1]))
        part = F.avg_pool2d(part, kernel, ceil_mode=True, count_include_pad=False)
        if inside is not None:
            inside = F.avg_pool2d(inside[:, None].float(), kernel, ceil_mode=True, count_include_pad=False)[:, 0] > 0.5
    x = (torch.arange(size[1], dtype=torch.float64) + 0.5) * (2 / size[1]) - 1
    y = (torch.arange(size[0], dtype=torch.float64) + 0.5) * (2 / size[0]) - 1
    row = matrix[0, 0] * x[None, :] + matrix[0, 1] * y[:, None] + matrix[0, 2]
    column = matrix[1, 0] * x[None, :] + matrix[1, 1] * y[:, None] + matrix[1, 2]
    seen = (row >= 0) & (row <= height) & (column >= 0) & (column <= width)
    places = [
        (where - int(start)) / int(f) * (2 / n) - 1
        for where, start, f, n in zip((column, row), first[::-1], factor[::-1], part.shape[:1:-1])
    ]
    grid = torch.stack(places, dim=-1).float().to(part.device).expand(len(part), -1, -1, -1)
    out = F.grid_sample(part, grid, mode="bilinear", padding_mode="border", align_corners=False)
    real = seen.to(part.device).expand(len(part), -1, -1)
    if inside is not None:
        kept = (
            F.grid_sample(inside[:, None].float(), grid[: len(inside)], mode="nearest", padding_mode="border", align_corners=False)[
                :, 0
            ]
            > 0.5
        )
        real = real & kept
    return out, real.contiguous()


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Blur (N, C, H, W) with a Gaussian of `sigma` pixels, cut at 3 sigma; borders are mirrored where there is room."""
    radius = min(math.ceil(3 * sigma), x.shape[-1] - 1, x.shape[-2] - 1)
    if radius < 1:
        return x
    places = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-0.5 * (places / sigma) ** 2)
    weights = weights / weights.sum()
    # all planes as channels of one picture: the same numbers as a batch of planes, and a much faster kernel on a CPU
    planes = F.pad(x.reshape(1, -1, *x.shape[-2:]), (radius, radius, radius, radius), mode="reflect")
    count = planes.shape[1]
    for shape in ((1, 1, 1, -1), (1, 1, -1, 1)):
        planes = F.conv2d(planes, weights.view(shape).expand(count, -1, -1, -1), groups=count)
    return planes.reshape(x.shape)


def _pad_planes(value: Tensor, missing: int, padding: float) -> Tensor:
    """Add empty planes at the end; their depth is that of the last plane, so that no position code leaves its range."""
    if value.dim() == 1:
        return torch.cat([value, value[-1:].expand(missing)])
    fill = False if value.dtype == torch.bool else padding
    return torch.cat([value, torch.full((missing, *value.shape[1:]), fill, dtype=value.dtype, device=value.device)])


def _blur_options(value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise RequestError(f"blur: found {value!r}; accepted is {{sigma: [0.1, 2.0], probability: 0.5}}, or null; change blur")
    arguments.known_keys("blur", value, _BLUR)
    options = {**_BLUR, **value}
    sigma = arguments.positive_range("blur.sigma", options["sigma"])
    probability = arguments.number("blur.probability", options["probability"], low=0, high=1)
    return {"sigma": sigma, "probability": probability} if probability > 0 else None


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Move an array to a device, as torch knows it: contiguous, writable, in native byte order, uint16 as int32."""
    if not array.flags.c_contiguous or not array.flags.writeable or not array.dtype.isnative:
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    if array.dtype == np.uint16:  # few torch operations know it
        array = array.astype(np.int32)
    return torch.from_numpy(array).to(device, non_blocking=True)
