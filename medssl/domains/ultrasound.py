"""Ultrasound clips and stills: real frame times, the tissue image alone, grey where colour carries nothing.

What is kept as valid is the tissue region of SequenceOfUltrasoundRegions, or the part of the picture that moves, without colour
Doppler; everything else (banner, rulers, ECG, logos) is set to 0. That reduces burned-in text; it does not remove identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.headers.dicom_extras import read_planar_header
from medssl.archive.headers.image_scale import TISSUE_2D, Region, frame_times, heart_rate, region_spacing, regions_fit, us_regions
from medssl.domains.base import named
from medssl.domains.dicom_planar import read_planar_dicom
from medssl.domains.image_files import read_image_file
from medssl.domains.planar import RawPlanar, all_valid, build_planar, content_of, equal_channels, luma, narrow, one_file
from medssl.domains.video_files import read_gif_file, read_video_file
from medssl.errors import ImageError, RequestError
from medssl.types import Sample

MODALITIES = ("US", "IVUS")
STILL = 1.5
"""Standard deviation over time, in 8-bit grey levels, up to which a pixel counts as standing still: compression alone makes 1."""
FAINT = 0.3
"""The same, up to which a pixel beside moving tissue stands still: shadows in a sector flicker that little, screens do not."""
FAINT_SHARE = 0.6
"""Share of the picture beyond the moving tissue that may flicker so; where more does, it is the noise of a recorder."""
CODEC_BLOCK = 8
PART = 0.02
"""Share of the largest moving part that another one must have to be tissue beyond a shadow."""
PART_WIDTH = 4
"""A part so many times as wide as high is a strip, as an ECG is."""
MOTION_FRAMES = 64
"""Frames, spread over the clip, that are enough to see what moves."""
JOIN = 40
"""Gaps up to this fraction of the picture's shorter side are bridged on either side."""
TINT_BINS = 32
SATURATED = 40
"""Difference from the picture's own tint, in 8-bit levels, above which a pixel is coloured on purpose."""
COLOUR_SHARE = 0.002
"""Share of the tissue that must be coloured for colour to carry something."""
MIN_TISSUE = 0.02
"""Share of the picture that must remain as tissue."""


class Ultrasound:
    """Reads ultrasound: DICOM, video files, GIF, and single pictures.

    Args:
        sector: Find the tissue region and set everything outside it to 0 and not valid.
        doppler: `drop`: pixels of a colour Doppler box are not valid and the image is grey. `keep`: they stay, in RGB where
            colour carries something.
    """

    name = "ultrasound"
    version = 2
    kinds = ("image", "clip")

    def __init__(self, sector: bool = True, doppler: str = "drop") -> None:
        if doppler not in ("drop", "keep"):
            raise RequestError(f"ultrasound: doppler is {doppler!r}; accepted: drop, keep")
        self.sector = bool(sector)
        self.doppler = doppler

    def params(self) -> dict[str, Any]:
        """Return the arguments."""
        return {"sector": self.sector, "doppler": self.doppler}

    def read(self, files: Sequence[Path], *, series_id: str, part: Mapping[str, Any] | None = None) -> Sample:
        """Read one clip, or one still as an image.

        Raises:
            ImageError: Another modality (`no_domain`), no tissue image (`no_tissue`), or a file that cannot be used.
        """
        try:
            raw, regions = _read(one_file(files), part)
            _finish(raw, regions, sector=self.sector, keep_colour=self.doppler == "keep")
            return build_planar(raw, all_valid(raw.array, raw.valid), series_id=series_id, domain=self.name)
        except ImageError as err:
            raise named(err, series_id) from err

    def foreground(self, sample: Sample) -> np.ndarray:
        """Return the tissue, (H, W) bool."""
        return all_valid(sample.image, sample.valid)


def frames_at(times_ms: Sequence[float], fps: float, *, start_ms: float = 0.0, count: int | None = None) -> np.ndarray:
    """Return which frames show a clip at a rate: for each wanted time the frame nearest to it, the earlier one of two.

    Args:
        times_ms: Start of each frame, rising.
        fps: Wanted frames per second; a rate above the clip's own repeats frames.
        start_ms: Time of the first one.
        count: At most so many; None goes on to the end of the clip.

    Returns:
        (N,) int64 frame numbers; fewer than `count` where the clip ends.

    Raises:
        RequestError: The rate is not above 0.
    """
    if not fps > 0:
        raise RequestError(f"fps is {fps}; a rate above 0 is needed")
    times = np.asarray(times_ms, dtype=np.float64)
    # The last frame lasts as long as the others do on average; a billionth forgives rounding.
    step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1000 / fps
    n = max(0, int(np.ceil((times[-1] + step - start_ms) * fps / 1000 - 1e-9)))
    wanted = start_ms + np.arange(n if count is None else min(n, count)) * (1000 / fps)
    right = np.clip(np.searchsorted(times, wanted), 1, max(1, len(times) - 1))
    if len(times) == 1:
        return np.zeros(len(wanted), dtype=np.int64)
    left = right - 1
    # A billionth of a step decides ties that floating point would toss up.
    nearer = times[right] - wanted < wanted - times[left] - 1e-9 * step
    frames: np.ndarray = np.where(nearer, right, left).astype(np.int64)
    return frames


def _read(path: Path, part: Mapping[str, Any] | None) -> tuple[RawPlanar, list[Region]]:
    found = content_of(path)
    if found == "dicom":
        return _dicom(path, part)
    if found == "video":
        return read_video_file(path, part), []
    if found == "gif":
        return read_gif_file(path, part), []
    if part is not None:
        raise ImageError("unsupported_format", "a single picture has no parts; index the archive again")
    raw = read_image_file(path)
    if len(raw.array) not in (1, 3):
        raise ImageError("unsupported_pixels", f"{len(raw.array)} channels; ultrasound is grey or RGB; leave it out")
    raw.channels, raw.spacing_mm, raw.facts = (), None, {}
    return raw, []


def _dicom(path: Path, part: Mapping[str, Any] | None) -> tuple[RawPlanar, list[Region]]:
    pixels = read_planar_dicom(path, part, modalities=MODALITIES, domain="ultrasound", prefix=True)
    header = read_planar_header(path)
    array, flags = narrow(pixels.frames)
    raw = RawPlanar(array, kind="clip", valid=pixels.valid, modality="US", flags=[*pixels.flags, *flags])
    if len(array) == 1:
        raw.array, raw.kind = array[0], "image"
    else:
        times, raw.facts["fps_source"], time_flags = frame_times(header, pixels.n_frames)
        raw.flags += time_flags
        if times is not None:
            chosen = [
                times[index]
                for start, stop in (part or {"frames": [[0, pixels.n_frames]]})["frames"]
                for index in range(start, stop)
            ][: len(array)]  # a damaged cine has fewer than its header says
            raw.frame_times_ms = tuple(float(f"{time - chosen[0]:.9g}") for time in chosen)
    if (rate := heart_rate(header)) is not None:
        raw.facts["heart_rate"] = rate
    regions = us_regions(header)
    raw.facts["n_regions"] = float(len(regions))
    if not regions_fit(regions, *raw.array.shape[-2:]):
        raw.flag("region_outside")
        return raw, []
    return raw, regions


def _finish(raw: RawPlanar, regions: list[Region], *, sector: bool, keep_colour: bool) -> None:
    """Find the tissue, drop colour and other regions, make grey what carries no colour, and blank the rest."""
    tissue = [region for region in regions if region.kind == TISSUE_2D]
    if regions and not tissue:
        raise ImageError("no_tissue", "ultrasound regions without a two-dimensional tissue image; leave it out")
    raw.spacing_mm = region_spacing(regions)
    frames = raw.array if raw.kind == "clip" else raw.array[None]
    box = region_mask(regions, frames.shape[-2:]) if regions else None
    coloured = coloured_pixels(frames, box) if frames.shape[1] == 3 and not equal_channels(frames) else None
    grey = luma(frames) if frames.shape[1] == 3 else frames
    mask, raw.facts["sector_source"] = sector_mask(grey[:, 0], box) if sector else (box, "none")
    if sector and mask is None and raw.kind == "clip":
        raw.flag("sector_unknown")
    inside = np.ones(frames.shape[-2:], dtype=bool) if mask is None else mask
    doppler = None
    if coloured is not None:
        share = float(coloured[inside].mean()) if inside.any() else 0.0
        raw.facts["colour_share"] = share
        if share >= COLOUR_SHARE:
            doppler = colour_box(coloured & inside)
            raw.flag("colour_doppler")
    if keep_colour and doppler is not None:
        doppler = None
    else:
        frames = grey
    if sector:
        inside = inside if doppler is None else inside & ~doppler
        if inside.mean() < MIN_TISSUE:
            raise ImageError("no_tissue", f"{inside.mean():.1%} of the picture is tissue without colour; leave it out")
        if not inside.all():
            frames = np.where(inside, frames, frames.dtype.type(0))
            raw.exclude(~inside)
        raw.facts["sector_fraction"] = float(inside.mean())
    elif doppler is not None:
        raw.exclude(doppler)
    raw.array = frames if raw.kind == "clip" else frames[0]


def region_mask(regions: Sequence[Region], shape: tuple[int, ...]) -> np.ndarray:
    """Return the pixels (H, W) of tissue regions that no other region covers."""
    mask = np.zeros(shape, dtype=bool)
    for region in regions:
        if region.kind == TISSUE_2D:
            mask[region.box[0] : region.box[1], region.box[2] : region.box[3]] = True
    for region in regions:
        if region.kind != TISSUE_2D:
            mask[region.box[0] : region.box[1], region.box[2] : region.box[3]] = False
    return mask


def sector_mask(frames: np.ndarray, box: np.ndarray | None = None) -> tuple[np.ndarray | None, str]:
    """Return the sector of a clip: the part of the picture that moves.

    Banners, rulers and logos stand still. Inside the region box where there is one, what moves is joined over small gaps; the
    largest connected component is tissue, and so are other solid ones beside or above it (the near field beyond a shadow or an
    effusion), but not a strip or what lies below, as a moving ECG does. Shadows that flicker faintly and touch it belong to it. The
    convex hull of all that is the sector. A still, or a clip in which nothing moves, has the region box alone: brightness cannot
    tell a shadowed part of the sector from the screen around it.

    Reference: DISCOVR card, section 2.

    Args:
        frames: (T, H, W) grey.
        box: (H, W) bool, where the sector may lie.

    Returns:
        (H, W) bool or None when nothing is known, and `motion`, `regions` or `none`.
    """
    from scipy import ndimage
    from skimage.morphology import convex_hull_image

    fallback = (box, "none" if box is None else "regions")
    if len(frames) < 2:
        return fallback
    scale = 1.0 if frames.dtype == np.uint8 else max(1.0, float(frames.max())) / 255
    shown = frames[:: max(1, len(frames) // MOTION_FRAMES)]
    # What is black more often than not is no tissue: compression rings around the sector, most of it cut off at black.
    lit = np.count_nonzero(shown > shown.min(), axis=0) * 2 >= len(shown)
    deviation = _deviation(shown) / scale
    deviation[~lit] /= 2
    if box is not None:
        deviation[~box] = 0
    # Opening takes off characters, thin graphics and noise; closing joins tissue on both sides of a dark chamber.
    moving, flickering = (
        ndimage.binary_opening(found, np.ones((3, 3), dtype=bool)) for found in (deviation > STILL, (deviation > FAINT) & lit)
    )
    reach = max(1, min(moving.shape) // JOIN)
    joined = ndimage.binary_closing(np.pad(moving, reach), iterations=reach)[reach:-reach, reach:-reach]
    tissue, other = _moving_parts(joined)
    if not tissue.any():
        return fallback
    hull: np.ndarray = convex_hull_image(tissue)
    beyond = ~hull if box is None else box & ~hull
    if beyond.any() and flickering[beyond].mean() <= FAINT_SHARE:
        # Compression makes what is near a moving trace flicker too.
        apart = ndimage.binary_dilation(other, iterations=CODEC_BLOCK) if other.any() else other
        hull = convex_hull_image(ndimage.binary_propagation(tissue, mask=tissue | (flickering & ~apart)))
    hull = hull if box is None else hull & box
    return (hull, "motion") if hull.mean() >= MIN_TISSUE else fallback


def _moving_parts(joined: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest connected part with the solid ones beside or above it (see `sector_mask`), and the other parts."""
    from scipy import ndimage

    labels, n = ndimage.label(joined)
    if n == 0:
        return joined, joined
    sizes = np.bincount(labels.ravel())[1:]
    places = ndimage.find_objects(labels)
    largest = int(np.argmax(sizes))
    kept = labels == 1 + largest
    bottom = places[largest][0].stop
    for number, (size, (rows, columns)) in enumerate(zip(sizes, places)):
        high, wide = rows.stop - rows.start, columns.stop - columns.start
        if size >= PART * sizes[largest] and wide < PART_WIDTH * high and 2 * size > high * wide and rows.stop <= bottom:
            kept |= labels == 1 + number
    return kept, joined & ~kept


def _deviation(frames: np.ndarray) -> np.ndarray:
    """Return the standard deviation over time (H, W) as float32, frame by frame."""
    first = frames[0].astype(np.float32)  # shifting by a frame keeps the squares small enough for float32
    total, squares = np.zeros_like(first), np.zeros_like(first)
    for frame in frames:
        value = frame - first
        total += value
        squares += value * value
    n = len(frames)
    deviation: np.ndarray = np.sqrt(np.maximum(squares / n - (total / n) ** 2, 0))
    return deviation


def coloured_pixels(frames: np.ndarray, box: np.ndarray | None = None) -> np.ndarray:
    """Return the pixels (H, W) that are coloured on purpose in some frame: colour Doppler, not a tint.

    A tinted map gives every grey level one colour. The tint is the median colour of each grey level over the darker and the
    brighter half of the picture; what differs from it by more than `SATURATED` is coloured.

    Args:
        frames: (T, 3, H, W).
        box: (H, W) bool, where to look.
    """
    scale = 1.0 if frames.dtype == np.uint8 else max(1.0, float(frames.max())) / 255
    within = np.ones(frames.shape[-2:], dtype=bool) if box is None else box
    grid = (slice(None, None, max(1, len(frames) // 8)), slice(None), slice(None, None, 2), slice(None, None, 2))
    level, warm, cool = _colour(frames[grid], scale)
    seen = np.broadcast_to(within[::2, ::2], level.shape) & (level > 0)
    tint = np.zeros((2, TINT_BINS), dtype=np.float32)
    for k in range(TINT_BINS):
        these = seen & (level == k)
        if these.any():
            tint[0, k], tint[1, k] = np.median(warm[these]), np.median(cool[these])
    found = np.zeros(within.shape, dtype=bool)
    for frame in frames:
        level, warm, cool = _colour(frame[None], scale)
        apart = np.abs(warm - tint[0][level]) + np.abs(cool - tint[1][level])
        found |= (apart > SATURATED)[0]
    found &= within
    return found


def _colour(frames: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the grey level in bins, red minus green and blue minus green of (T, 3, H, W), in 8-bit levels."""
    red, green, blue = (frames[:, k].astype(np.float32) / scale for k in range(3))
    level = np.clip((0.299 * red + 0.587 * green + 0.114 * blue) * (TINT_BINS / 256), 0, TINT_BINS - 1).astype(np.intp)
    return level, red - green, blue - green


def colour_box(coloured: np.ndarray) -> np.ndarray:
    """Return the convex hull of each sizeable group of coloured pixels, one pixel wider.

    The hull of what was coloured at any time is the Doppler box as far as flow filled it; groups are joined over gaps of
    about a fiftieth of the picture, and specks are left in.
    """
    from scipy import ndimage
    from skimage.morphology import convex_hull_image

    reach = max(1, min(coloured.shape) // 50)
    joined = ndimage.binary_dilation(coloured, iterations=reach)
    labels, n = ndimage.label(joined)
    found = np.zeros(coloured.shape, dtype=bool)
    for k in range(1, n + 1):
        group = coloured & (labels == k)
        if np.count_nonzero(group) >= COLOUR_SHARE / 10 * coloured.size:
            found |= convex_hull_image(group)
    return np.asarray(ndimage.binary_dilation(found, iterations=1)) if found.any() else found | coloured
