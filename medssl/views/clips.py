"""Views of ultrasound clips, sampled by time, made in batches on the training device.

As in `views.planes`, drawing and applying are apart, every view is computed by itself, and dense random numbers come from one
device generator per view and operation. All frames of a view share one crop, one tilt and one change of gain: only speckle noise
differs from frame to frame.

A view shows a square (or rectangle) around the sector, not the screen: what a scanner draws beside it takes no pixels. Shapes are kept
in millimetres where the item knows its spacing. Left and right are never swapped by default, because they tell chambers apart.

What a batch holds, for views named `clip` (`types.ClipBatch.of` takes one view of it to an encoder):
    clip (B, V, T, C, H, W) float32, outside the sector one constant;
    clip_valid (B, V, T) bool, True = a frame of the file shown for the first time, False = filled in (see `sampling.clips.pick_frames`);
    clip_sector (B, V, 1, H, W) bool, True = inside;
    clip_time_s (B, V, T) float32, seconds since the first frame shown, rising;
    clip_frame (B, V, T) int64, number of the frame in its file, for labels by frame;
    clip_speed (B, V) float32, playback speed relative to the wanted rate, as drawn by the sampler;
    clip_map (B, V, 2, 3) float32, as `views.planes` has it, for labels by pixel;
    clip_mask (B, V, M, h, w) bool where tube masks are on, True = hidden: M masks of one grid, each meant for all tubelets.
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
from medssl.views.planes import gaussian_blur, resize, to_device

SPECKLE_PIXELS = 0.7
"""Standard deviation of the blur of speckle noise: one resolution cell of a scanner is one to two pixels of a view of 112."""
FAR_APEX = 1.0
"""An apex further above the sector than so many of its heights is that of a linear probe, whose beams are parallel."""
STRAIGHT = 0.02
"""Root mean square distance from a straight line, in heights of the sector, up to which a border is straight."""


@dataclass
class ClipFrames:
    """The frames of an item that its views show, as the reader fetched them.

    Args:
        image: (N, C, H, W), stored dtype, each frame once.
        sector: (H, W) bool, True = inside the sector.
        pixel_mm: (2,) step between rows and between columns; None when the item does not know.
        order: (V, T) which of `image` each view shows when.
        valid: (V, T) bool, False = filled in.
        time_s: (V, T) seconds since the first frame of the view.
        frame: (V, T) number of each frame in its file.
        speed: (V,) playback speed.
        stats: Intensity statistics of the item inside the sector.
        key: The draw it belongs to.
        id: Row number of the item.
    """

    image: np.ndarray
    sector: np.ndarray
    pixel_mm: tuple[float, float] | None
    order: np.ndarray
    valid: np.ndarray
    time_s: np.ndarray
    frame: np.ndarray
    speed: np.ndarray
    stats: Mapping[str, float]
    key: DrawKey
    id: int


class ClipViews:
    """Random views of ultrasound clips.

    Two of `frames`, `fps` and `clip_seconds` fix the third: frames = fps * clip_seconds.

    Args:
        name: Key of the views in the batch.
        size: (H, W) in pixels; one number for a square.
        frames: Frames per view (T).
        fps: Frames per second that a view shows. A file with a lower rate is shown at its own: no frame is repeated.
        clip_seconds: Time that a view covers.
        fill: What follows where the file is shorter than the view: `pingpong` runs back and forth, `loop` starts again. Such frames are
            not valid.
        count: Views per item.
        fit: `pad` shows the whole sector and pads, `crop` fills the view and cuts.
        scales: Sides of the crop as shares of the largest one; one is drawn, its place too (VideoMAE: 1, 0.875, 0.75, 0.66).
        tilt_deg: Largest turn of the sector about its apex, as the probe tilts.
        depth: Range of the scale about the apex, log-uniform: the depth setting of the scanner.
        flip: Probability of mirroring left and right, which swaps chambers.
        normalize: As in `VolumeViews`; its statistics are those inside the sector.
        gain: Largest change of overall gain, in standard deviations of the item.
        tgc: Largest change of gain from the apex to the far end (time gain compensation), likewise.
        gamma: Range of the exponent, log-uniform, on the item's own range: the dynamic range setting.
        speckle: Multiplicative noise; its standard deviation is uniform in [0, speckle].
        channels: `mean` for one grey channel whatever the item has, or `keep`.
        mask: {"ratio": 0.9, "patch": 16, "count": 1}: tube masks under `<name>_mask`. Visible patches are taken inside the sector first.
    """

    def __init__(
        self,
        name: str = "clip",
        *,
        size: int | Sequence[int],
        frames: int | None = None,
        fps: float | None = None,
        clip_seconds: float | None = None,
        fill: str = "pingpong",
        count: int = 1,
        fit: str = "pad",
        scales: Sequence[float] = (1.0,),
        tilt_deg: float = 0,
        depth: Sequence[float] = (1, 1),
        flip: float = 0,
        normalize: str | Mapping[str, Sequence[float]] = "zscore",
        gain: float = 0,
        tgc: float = 0,
        gamma: Sequence[float] | None = None,
        speckle: float = 0,
        channels: str = "mean",
        mask: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.size = arguments.pair("size", size, whole=True, low=1)
        self.frames, self.fps = _timing(frames, fps, clip_seconds)
        self.fill = arguments.one_of("fill", fill, ("pingpong", "loop"))
        self.count = int(arguments.number("count", count, whole=True, low=1))
        self.fit = arguments.one_of("fit", fit, ("pad", "crop"))
        if not isinstance(scales, (list, tuple)) or not scales:
            raise RequestError(
                f"scales: found {scales!r}; accepted is a list such as [1, 0.875, 0.75, 0.66]; change scales of the view"
            )
        self.scales = tuple(arguments.number("scales", share, above=0, high=1) for share in scales)
        self.tilt_deg = arguments.number("tilt_deg", tilt_deg, low=0, high=180)
        self.depth = arguments.positive_range("depth", depth)
        self.flip = arguments.number("flip", flip, low=0, high=1)
        self.normalize, self.window = arguments.normalize_mode(normalize)
        self.gain = arguments.number("gain", gain, low=0)
        self.tgc = arguments.number("tgc", tgc, low=0)
        self.gamma = None if gamma is None else arguments.positive_range("gamma", gamma)
        self.speckle = arguments.number("speckle", speckle, low=0)
        self.channels = arguments.one_of("channels", channels, ("mean", "keep"))
        self.mask = _mask_options(mask, self.size)

    @property
    def spec(self) -> ViewSpec:
        """What these views look like to an objective."""
        return ViewSpec("clip", (self.frames, *self.size), None, self.count, self.fps)

    def draw(self, key: DrawKey, v: int) -> dict[str, Any]:
        """Draw the parameters of one view: a pure function of its arguments, in plain numbers.

        Returns:
            `scale`, `centre` (2, shares of the room there is), `tilt_deg`, `depth`, `flip` (bool), `gain`, `tgc`, `gamma` (or None),
            `speckle` ({std, seed} or None), `mask` ({ratio, patch, count, seed} or None).
        """

        def rng(operation: str) -> np.random.Generator:
            return counter_rng(key.seed, key.step, key.position, self.name, v, operation)

        def either(operation: str, largest: float) -> float:
            return float(rng(operation).uniform(-1, 1)) * largest if largest else 0.0

        def factor(operation: str, bounds: tuple[float, float]) -> float:
            if bounds[0] == bounds[1]:
                return bounds[0]
            return math.exp(rng(operation).uniform(math.log(bounds[0]), math.log(bounds[1])))

        speckle = mask = None
        if self.speckle:
            seed = derive_seed(key.seed, key.step, key.position, self.name, v, "speckle")
            speckle = {"std": float(rng("speckle").uniform(0, self.speckle)), "seed": seed}
        if self.mask is not None:
            mask = {**self.mask, "seed": derive_seed(key.seed, key.step, key.position, self.name, v, "mask")}
        return {
            "scale": self.scales[int(rng("scale").integers(len(self.scales)))],
            "centre": [float(u) for u in rng("centre").random(2)],
            "tilt_deg": either("tilt_deg", self.tilt_deg),
            "depth": factor("depth", self.depth),
            "flip": bool(rng("flip").random() < self.flip),
            "gain": either("gain", self.gain),
            "tgc": either("tgc", self.tgc),
            "gamma": None if self.gamma is None else factor("gamma", self.gamma),
            "speckle": speckle,
            "mask": mask,
        }

    def apply(
        self, items: Sequence[ClipFrames], params: Sequence[Sequence[Mapping[str, Any]]], device: torch.device | str
    ) -> dict[str, Tensor]:
        """Turn fetched frames and parameters into views.

        Args:
            items: B items; their frames may differ in shape.
            params: B lists of V parameter sets, as `draw` returns them.
            device: Where the views are made.

        Returns:
            What the module's text lists, and `spacing_mm` (B, V, 2) float64 on the CPU, pixel of the view, NaN where unknown.

        Raises:
            RequestError: The items do not fit in one batch.
        """
        self._check(items, params)
        device = torch.device(device)
        rows: dict[str, list[Tensor]] = {}
        for item, views in zip(items, params):
            how = intensity.normalization(self.normalize, self.window, item.stats, item.id)
            image = to_device(item.image, device)
            sector = to_device(item.sector, device)
            place = sector_place(item.sector)
            for v, view in enumerate(views):
                for key, value in self._view(item, v, image, sector, place, how, view).items():
                    rows.setdefault(key, []).append(value)
        return {key: torch.stack(row).reshape(len(items), len(params[0]), *row[0].shape) for key, row in rows.items()}

    def batch(
        self, items: Sequence[ClipFrames], device: torch.device | str
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Draw and apply `count` views of each item.

        Returns:
            data by key; valid (B, V, T, H, W) and spacing_mm, each by the name of the view.
        """
        out = self.apply(items, [[self.draw(item.key, v) for v in range(self.count)] for item in items], device)
        spacing = out.pop("spacing_mm")
        valid = out[f"{self.name}_valid"][..., None, None] & out[f"{self.name}_sector"]
        return out, {self.name: valid}, {self.name: spacing}

    def _check(self, items: Sequence[ClipFrames], params: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        channels = sorted({item.image.shape[1] for item in items})
        if self.channels == "keep" and len(channels) > 1:
            raise RequestError(
                f"items {[item.id for item in items]} have {channels} channels; a batch needs one number of channels; "
                "set channels: mean, or select items with equal channels"
            )
        for item, views in zip(items, params):
            if item.image.ndim != 4 or item.sector.shape != item.image.shape[2:] or item.order.shape != (len(views), self.frames):
                raise RequestError(
                    f"item {item.id}: frames {item.image.shape}, sector {item.sector.shape}, order {item.order.shape}; check the reader"
                )

    def _view(
        self,
        item: ClipFrames,
        v: int,
        image: Tensor,
        sector: Tensor,
        place: SectorPlace,
        how: intensity.Normalization,
        view: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        height, width = item.image.shape[2:]
        matrix, pixel = self._matrix(place, item.pixel_mm, view)
        used, order = np.unique(item.order[v], return_inverse=True)
        part = image if len(used) == len(image) else image[torch.from_numpy(used).to(image.device)]
        x, seen = resize(part, sector[None], matrix, self.size, how.padding_raw)
        if self.channels == "mean" and x.shape[1] > 1:
            x = x.mean(dim=1, keepdim=True)
        inside = seen[0]
        self._intensities_(x, inside, item.stats, matrix, place, view)
        intensity.normalize_(x, how)
        x.masked_fill_(~inside, how.padding)
        scale = torch.tensor([[1 / height], [1 / width]], dtype=torch.float64)
        out = {
            self.name: x[torch.from_numpy(order).to(x.device)],
            f"{self.name}_valid": to_device(item.valid[v], x.device),
            f"{self.name}_sector": inside[None],
            f"{self.name}_time_s": torch.from_numpy(item.time_s[v].astype(np.float32)).to(x.device),
            f"{self.name}_frame": torch.from_numpy(item.frame[v].astype(np.int64)).to(x.device),
            f"{self.name}_speed": torch.tensor(float(item.speed[v]), device=x.device),
            f"{self.name}_map": (torch.from_numpy(matrix) * scale).float().to(x.device),
            "spacing_mm": torch.tensor(pixel, dtype=torch.float64),
        }
        if (mask := view["mask"]) is not None:
            out[f"{self.name}_mask"] = tube_masks(inside, mask["patch"], mask["ratio"], mask["count"], mask["seed"])
        return out

    def _matrix(
        self, place: SectorPlace, pixel_mm: tuple[float, float] | None, view: Mapping[str, Any]
    ) -> tuple[np.ndarray, tuple[float, float]]:
        """Return the map from (x, y, 1) of the view to (row, column) in pixels, and the pixel of the view in mm."""
        unit = np.ones(2) if pixel_mm is None else np.asarray(pixel_mm, dtype=np.float64)
        low, high = np.asarray(place.low) * unit, np.asarray(place.high) * unit
        extent = high - low
        wanted = np.asarray(self.size, dtype=np.float64)
        room = extent / wanted
        side = wanted * (room.max() if self.fit == "pad" else room.min()) * view["scale"]
        centre = np.where(side < extent, low + side / 2 + np.asarray(view["centre"]) * (extent - side), (low + high) / 2)
        mirrored = -1.0 if view["flip"] else 1.0
        matrix = np.array([[0.0, side[0] / 2, centre[0]], [mirrored * side[1] / 2, 0.0, centre[1]]])
        # Turning the picture by an angle about the apex shows, at each point, what lay at the point turned back.
        angle = math.radians(view["tilt_deg"])
        back = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) / view["depth"]
        apex = np.asarray(place.apex) * unit
        matrix[:, 2] -= apex
        matrix = back @ matrix
        matrix[:, 2] += apex
        pixel = side / wanted / view["depth"]
        return matrix / unit[:, None], (float("nan"), float("nan")) if pixel_mm is None else (float(pixel[0]), float(pixel[1]))

    def _intensities_(
        self,
        x: Tensor,
        inside: Tensor,
        stats: Mapping[str, float],
        matrix: np.ndarray,
        place: SectorPlace,
        view: Mapping[str, Any],
    ) -> None:
        """Change raw intensities in place, as a scanner's knobs do: they end at its black and its white."""
        if not (view["gain"] or view["tgc"] or view["gamma"] or view["speckle"]):
            return
        missing = [name for name in ("std", "min", "max") if name not in stats]
        if missing:
            raise RequestError(
                f"no statistics {', '.join(missing)} of an item; gain, tgc, gamma and speckle need them; write the store again"
            )
        low, high = stats["min"], stats["max"]
        if view["speckle"] is not None:
            generator = torch.Generator(device=x.device).manual_seed(view["speckle"]["seed"])
            noise = torch.randn((len(x), 1, *x.shape[2:]), generator=generator, device=x.device)
            noise = gaussian_blur(noise, SPECKLE_PIXELS)
            noise = noise / _blur_gain(SPECKLE_PIXELS)
            x.sub_(low).mul_(noise.mul_(view["speckle"]["std"]).add_(1).clamp_min_(0)).add_(low)
        if view["gamma"] is not None and view["gamma"] != 1 and high > low:
            x.sub_(low).div_(high - low).clamp_(0, 1).pow_(view["gamma"]).mul_(high - low).add_(low)
        if view["gain"]:
            x.add_(view["gain"] * stats["std"])
        if view["tgc"]:
            x.add_(_far(matrix, place, self.size).to(x) * (view["tgc"] * stats["std"]))
        x.clamp_(low, high)


@dataclass(frozen=True)
class SectorPlace:
    """Where a sector lies in its picture, in pixels from the outer corner.

    Args:
        low: First row and column.
        high: Row and column after the last.
        apex: Row and column where the beams meet; the middle of the upper border where they do not.
    """

    low: tuple[float, float]
    high: tuple[float, float]
    apex: tuple[float, float]


def sector_place(sector: np.ndarray) -> SectorPlace:
    """Return the box and the apex of a sector (H, W) bool; of the whole picture where nothing is inside.

    The apex is where the straight lines through the left and the right border meet, each fitted over the rows from the top to
    where the sector is widest. Borders that are parallel, or meet far above (a linear probe) or below, have none.
    """
    rows = np.flatnonzero(sector.any(axis=1))
    height, width = sector.shape
    if len(rows) == 0:
        return SectorPlace((0.0, 0.0), (float(height), float(width)), (0.0, width / 2))
    columns = np.flatnonzero(sector.any(axis=0))
    top, bottom = float(rows[0]), float(rows[-1] + 1)
    first, last = float(columns[0]), float(columns[-1] + 1)
    present = sector[rows]
    left = np.argmax(present, axis=1).astype(np.float64)
    right = width - np.argmax(present[:, ::-1], axis=1).astype(np.float64)
    fallback = SectorPlace((top, first), (bottom, last), (top, float(left[0] + right[0]) / 2))
    ends = [int(np.argmin(left)), int(np.argmax(right))]
    if min(ends) < 4:
        return fallback
    tall = bottom - top
    lines = [_line(rows[: end + 1] + 0.5, border[: end + 1]) for end, border in zip(ends, (left, right))]
    if max(away for _, _, away in lines) > STRAIGHT * tall:
        return fallback
    (slope_left, at_left, _), (slope_right, at_right, _) = lines
    if slope_right - slope_left < 1e-3:
        return fallback
    row = (at_left - at_right) / (slope_right - slope_left)
    if not top - FAR_APEX * tall <= row <= top + tall / 2:
        return fallback
    return SectorPlace((top, first), (bottom, last), (float(row), float(slope_left * row + at_left)))


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Return slope, intercept and root mean square distance of the straight line through points."""
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept), float(np.sqrt(np.mean((slope * x + intercept - y) ** 2)))


def tube_masks(sector: Tensor, patch: Sequence[int], ratio: float, count: int, seed: int) -> Tensor:
    """Draw tube masks: patterns of patches that hold for all tubelets of a clip.

    Exactly `int(ratio * N)` of N patches are hidden. Those shown are drawn among patches at least half of which lie inside the
    sector; only where there are too few, others are shown too.

    Args:
        sector: (H, W) bool.
        patch: (h, w) pixels of a patch.
        ratio: Hidden share.
        count: Number of masks (M).
        seed: Seed; the order of patches is drawn on the CPU, so that devices agree.

    Returns:
        (M, H / h, W / w) bool, True = hidden.
    """
    share = F.avg_pool2d(sector[None, None].float(), tuple(patch))[0, 0]
    order = counter_rng(seed, "tube").random((count, share.numel())).astype(np.float32)
    score = torch.from_numpy(order).to(sector.device) + (share.flatten() >= 0.5)
    shown = score.topk(share.numel() - int(ratio * share.numel()), dim=1).indices
    hidden = torch.ones_like(score, dtype=torch.bool).scatter_(1, shown, False)
    return hidden.reshape(count, *share.shape)


def _far(matrix: np.ndarray, place: SectorPlace, size: tuple[int, int]) -> Tensor:
    """Return how far from the apex each pixel of a view lies, (H, W): -1 at the apex, 1 at the lower end of the sector."""
    y, x = (torch.arange(n, dtype=torch.float64).add_(0.5) * (2 / n) - 1 for n in size)
    row = matrix[0, 0] * x[None, :] + matrix[0, 1] * y[:, None] + (matrix[0, 2] - place.apex[0])
    column = matrix[1, 0] * x[None, :] + matrix[1, 1] * y[:, None] + (matrix[1, 2] - place.apex[1])
    reach = max(place.high[0] - place.apex[0], 1.0)
    return (2 * torch.hypot(row, column) / reach - 1).clamp_(-1, 1).float()


def _blur_gain(sigma: float) -> float:
    """Return the standard deviation that `gaussian_blur` leaves of white noise of standard deviation 1."""
    places = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    weights = np.exp(-0.5 * (places / sigma) ** 2)
    return float(((weights / weights.sum()) ** 2).sum())


def _timing(frames: Any, fps: Any, clip_seconds: Any) -> tuple[int, float]:
    """Return frames and frames per second from two of the three."""
    if sum(value is not None for value in (frames, fps, clip_seconds)) != 2:
        raise RequestError(
            "frames, fps, clip_seconds: give two of the three, for instance frames: 32 and fps: 16.7; change the view"
        )
    seconds = None if clip_seconds is None else arguments.number("clip_seconds", clip_seconds, above=0)
    rate = None if fps is None else arguments.number("fps", fps, above=0)
    if frames is None:
        assert seconds is not None and rate is not None
        return max(1, round(rate * seconds)), rate
    n = int(arguments.number("frames", frames, whole=True, low=1))
    if rate is None:
        assert seconds is not None
        rate = n / seconds
    return n, rate


def _mask_options(value: Any, size: tuple[int, int]) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not {"ratio", "patch"} <= set(value):
        raise RequestError(
            f"mask: found {value!r}; accepted is {{ratio: 0.9, patch: 16, count: 1}}, or null; change mask of the view"
        )
    arguments.known_keys("mask", value, ("ratio", "patch", "count"))
    ratio = arguments.number("mask.ratio", value["ratio"], low=0, high=1)
    patch = arguments.pair("mask.patch", value["patch"], whole=True, low=1)
    if any(n % p for n, p in zip(size, patch)):
        raise RequestError(f"mask.patch: {list(patch)} does not divide the size {list(size)}; change mask.patch or size")
    if ratio == 1:
        raise RequestError("mask.ratio: found 1, which hides everything; accepted is 0 <= ratio < 1; lower it")
    return {
        "ratio": ratio,
        "patch": list(patch),
        "count": int(arguments.number("mask.count", value.get("count", 1), whole=True, low=1)),
    }
