"""A slide: its sizes, its micrometres per pixel, and RGB regions at an exact scale.

Legend: level-0 pixels are those of the finest level; x to the right, y down; s = target mpp / mpp of level 0, a float; d = downsample
of a level, a float (scanners state 3.9998; cutting it to 3 would change the size of every region by a third).
"""

from __future__ import annotations

import csv
import functools
import io
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.headers.slide_headers import ROLES, VENDORS, Mpp, mpp_of, mpp_plausible, objective_of
from medssl.domains.slides.backends import Backend, RegionError
from medssl.domains.slides.handles import HANDLES
from medssl.errors import ImageError, RequestError

LEVEL_TOLERANCE = 0.02
"""A level this much coarser than wanted is still taken; more would blur (TRIDENT takes 10 %)."""
NATIVE_TOLERANCE = 1 / 16
"""A region that differs from whole pixels of a level by less than this, in pixels over its whole width, is not resampled."""
BLOCK = 4096
"""Largest edge of what is read from a level at once."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlideInfo:
    """What is known about a slide without decoding it.

    Args:
        width: Of level 0.
        height: Of level 0.
        level_dimensions: (W, H) of each level.
        level_downsamples: Of each level, never rounded.
        mpp_x: Micrometres between columns of level 0.
        mpp_y: Micrometres between rows of level 0.
        mpp_source: Of `archive.slide_headers.MPP_SOURCES`; `objective` is an estimate.
        objective: Power of the objective, for display only: magnification is not resolution.
        vendor: Closed list.
        channels: 3.
        backend: Of `slides.backends.BACKENDS`.
        backend_version: Version of the library.
        icc: ICC profile, or None.
        quickhash: OpenSlide's content hash, or None; as private as a file's digest.
        associated: Roles of associated images: label, overview, thumbnail, other. They may show a name and are never read here.
    """

    width: int
    height: int
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    mpp_x: float
    mpp_y: float
    mpp_source: str
    objective: float | None
    vendor: str
    channels: int
    backend: str
    backend_version: str
    icc: bytes | None
    quickhash: str | None
    associated: tuple[str, ...]

    @property
    def mpp(self) -> float:
        """Mean of both axes."""
        return (self.mpp_x + self.mpp_y) / 2


@dataclass(frozen=True)
class Region:
    """A region at an exact scale.

    Args:
        image: (H, W, 3) uint8, white where the slide has nothing; may be a view.
        valid: (H, W) bool, False outside the slide and where the scanner left it transparent; None when all is valid.
        native: Whether pixels are the file's own, without resampling.
    """

    image: np.ndarray
    valid: np.ndarray | None
    native: bool


def read_mpp_table(path: Path) -> dict[str, float]:
    """Read a table of micrometres per pixel that the user trusts more than the files.

    Args:
        path: CSV with the columns `slide` (a series id, or a file's name) and `mpp`.

    Raises:
        RequestError: Other columns, numbers that no microscope has, or one slide with two values.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            rows, columns = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise RequestError(f"mpp_csv {path}: cannot be read ({type(err).__name__}); a CSV with the columns slide,mpp") from err
    if not {"slide", "mpp"} <= set(columns):
        raise RequestError(f"mpp_csv {path}: columns slide and mpp are needed; found {len(columns)} others")
    table: dict[str, float] = {}
    for number, row in enumerate(rows, start=2):
        try:
            value = float(row["mpp"])
        except (TypeError, ValueError):
            value = math.nan
        _check_mpp(value, f"mpp_csv {path}, line {number}")
        if table.setdefault(row["slide"], value) != value:
            raise RequestError(f"mpp_csv {path}, line {number}: a slide has two values; keep one")
    return table


def _check_mpp(value: float, where: str) -> None:
    if not mpp_plausible(value):
        raise RequestError(f"{where}: {value:g} micrometres per pixel; numbers above 0.05 up to 20 are accepted")


class Slide:
    """A slide that opens itself when it is read, in whatever process that is; picklable.

    Args:
        path: The file.
        mpp: Micrometres per pixel of level 0 if the file is wrong or does not say.
        mpp_table: See `read_mpp_table`; wins over everything else.
        backend: `auto`, `openslide`, `tifffile` or `pillow`.
        icc: Convert colours to sRGB where the slide has an ICC profile.
        slide_id: A name to look up in the table and to use in messages, best the series id; the file's name is tried as well.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        mpp: float | None = None,
        mpp_table: Mapping[str, float] | None = None,
        backend: str = "auto",
        icc: bool = False,
        slide_id: str = "",
    ) -> None:
        self.path, self.backend, self.icc, self.slide_id = Path(path), backend, icc, slide_id
        table = mpp_table or {}
        self._mpp: Mpp | None = None
        value = table.get(slide_id, table.get(self.path.name))
        if value is not None:
            _check_mpp(value, "mpp of the table")
            self._mpp = Mpp(value, value, "user_table")
        elif mpp is not None:
            _check_mpp(mpp, "mpp")
            self._mpp = Mpp(mpp, mpp, "user")
        self._info: SlideInfo | None = None

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let this process's handle go; reading opens it again."""
        HANDLES.drop(self.path, self.backend)

    @property
    def name(self) -> str:
        """How messages call the slide: never by its path."""
        return f"series {self.slide_id}" if self.slide_id else "the slide"

    @property
    def info(self) -> SlideInfo:
        """Sizes and scale.

        Raises:
            ImageError: It cannot be opened, or nobody says what its micrometres per pixel are (`no_spacing`).
        """
        if self._info is None:
            self._info = self._read_info(HANDLES.get(self.path, self.backend))
            logger.debug("%s: opened with %s", self.name, self._info.backend)
        return self._info

    def _read_info(self, handle: Backend) -> SlideInfo:
        mpp = self._mpp or mpp_of(handle.properties)
        if mpp is None:
            raise ImageError(
                "no_spacing",
                f"{self.name}: the file does not state micrometres per pixel, and nothing is guessed; give them in a CSV with the "
                "columns slide,mpp (mpp_csv=FILE), or one value for all slides (slide_mpp=VALUE)",
            )
        if mpp.source == "objective":
            logger.warning(
                "%s: %.4g micrometres per pixel were estimated as 10 / objective; give mpp_csv if known", self.name, mpp.x
            )
        width, height = handle.dimensions[0]
        form = handle.form
        return SlideInfo(
            width=width,
            height=height,
            level_dimensions=handle.dimensions,
            level_downsamples=handle.downsamples,
            mpp_x=mpp.x,
            mpp_y=mpp.y,
            mpp_source=mpp.source,
            objective=objective_of(handle.properties),
            vendor=VENDORS.get(form, "unknown"),
            channels=3,
            backend=handle.name,
            backend_version=handle.version,
            icc=handle.icc,
            quickhash=handle.properties.get("openslide.quickhash-1"),
            associated=tuple(ROLES.get(name.lower(), "other") for name, _ in handle.associated),
        )

    def scale(self, mpp: float) -> tuple[float, float]:
        """Return s along x and y: level-0 pixels per pixel at `mpp`."""
        return mpp / self.info.mpp_x, mpp / self.info.mpp_y

    def level_for(self, mpp: float) -> int:
        """Return the coarsest level that is not coarser than `mpp`, but for `LEVEL_TOLERANCE`."""
        limit = min(self.scale(mpp)) * (1 + LEVEL_TOLERANCE)
        fitting = [k for k, d in enumerate(self.info.level_downsamples) if d <= limit]
        return max(fitting, key=lambda k: self.info.level_downsamples[k], default=0)

    def read(self, x: float, y: float, size: tuple[int, int], mpp: float) -> Region:
        """Read a region at an exact scale; outside the slide it is white.

        A region that cannot be decoded is read once more from level 0 with a new handle, because a handle that met an error is
        dead.

        Args:
            x: Left edge in level-0 pixels.
            y: Upper edge in level-0 pixels.
            size: (width, height) of the result, in pixels at `mpp`.
            mpp: Micrometres per pixel of the result.

        Raises:
            ImageError: `unreadable` after both tries.
        """
        level = self.level_for(mpp)
        for attempt in (level, 0):
            try:
                return self._read(x, y, size, self.scale(mpp), attempt)
            except RegionError as err:
                HANDLES.drop(self.path, self.backend)
                fault = err
        raise ImageError("unreadable", f"{self.name}: a region cannot be decoded ({fault}); copy the slide again from its source")

    def read_level(self, level: int, x: float, y: float, size: tuple[int, int]) -> Region:
        """Read a region of a level in its own pixels.

        Args:
            level: Level.
            x: Left edge in pixels of the level.
            y: Upper edge in pixels of the level.
            size: (width, height) in pixels of the level.

        Raises:
            ImageError: `unreadable`.
        """
        d = self.info.level_downsamples[level]
        try:
            return self._read(x * d, y * d, size, (d, d), level)
        except RegionError as err:
            HANDLES.drop(self.path, self.backend)
            raise ImageError(
                "unreadable", f"{self.name}: a region cannot be decoded ({err}); copy the slide from its source"
            ) from err

    def _read(self, x: float, y: float, size: tuple[int, int], scale: tuple[float, float], level: int) -> Region:
        handle = HANDLES.get(self.path, self.backend)
        d = handle.downsamples[level]
        bounds = handle.dimensions[level]
        start = (x / d, y / d)
        field = (size[0] * scale[0] / d, size[1] * scale[1] / d)
        if _whole(start, field, size):
            corner = (round(start[0]), round(start[1]))
            if corner[0] >= 0 and corner[1] >= 0 and corner[0] + size[0] <= bounds[0] and corner[1] + size[1] <= bounds[1]:
                pixels, _ = handle.read(level, *corner, *size)
                return Region(*self._opaque(pixels, handle), native=True)
        ratio = (field[0] / size[0], field[1] / size[1])
        # Coarse pixels of a wide region come from huge fine ones: large results are put together from blocks.
        step = (max(1, int(BLOCK / ratio[0])), max(1, int(BLOCK / ratio[1])))
        if size[0] <= step[0] and size[1] <= step[1]:
            return Region(*self._resampled(handle, level, start, field, size), native=False)
        image = np.empty((size[1], size[0], 3), dtype=np.uint8)
        valid = np.ones((size[1], size[0]), dtype=bool)
        for top in range(0, size[1], step[1]):
            for left in range(0, size[0], step[0]):
                part = (min(step[0], size[0] - left), min(step[1], size[1] - top))
                where = (start[0] + left * ratio[0], start[1] + top * ratio[1])
                span = (part[0] * ratio[0], part[1] * ratio[1])
                window = (slice(top, top + part[1]), slice(left, left + part[0]))
                image[window], mask = self._resampled(handle, level, where, span, part)
                if mask is not None:
                    valid[window] = mask
        return Region(image, None if valid.all() else valid, native=False)

    def _resampled(
        self, handle: Backend, level: int, start: tuple[float, float], field: tuple[float, float], size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Read what lies around a box of a level, in floats, and resize exactly that box, antialiased."""
        from PIL import Image

        bounds = handle.dimensions[level]
        # The filter looks a little beyond the box, so that neighbouring regions meet without a seam.
        margin = [math.ceil(f / n) + 1 for f, n in zip(field, size)]
        low = [math.floor(c) - m for c, m in zip(start, margin)]
        high = [math.ceil(c + f) + m for c, f, m in zip(start, field, margin)]
        # Beyond the slide there is only what the box itself covers, as white.
        low = [max(value, min(0, math.floor(c))) for value, c in zip(low, start)]
        high = [min(value, max(n, math.ceil(c + f))) for value, n, c, f in zip(high, bounds, start, field)]
        inside_low = [min(max(value, 0), n) for value, n in zip(low, bounds)]
        inside_high = [min(max(value, 0), n) for value, n in zip(high, bounds)]
        width, height = inside_high[0] - inside_low[0], inside_high[1] - inside_low[1]
        if width <= 0 or height <= 0:
            return np.full((size[1], size[0], 3), 255, dtype=np.uint8), np.zeros((size[1], size[0]), dtype=bool)
        pixels, corner = handle.read(level, inside_low[0], inside_low[1], width, height)
        origin = [corner[k] - (inside_low[k] - low[k]) for k in range(2)]
        image, mask = self._opaque(pixels, handle)
        if (inside_low, inside_high) != (low, high):
            canvas = np.full((high[1] - low[1], high[0] - low[0], 3), 255, dtype=np.uint8)
            cover = np.zeros(canvas.shape[:2], dtype=bool)
            place = tuple(slice(inside_low[k] - low[k], inside_high[k] - low[k]) for k in (1, 0))
            canvas[place], cover[place] = image, True if mask is None else mask
            image, mask = canvas, cover
        box = _fit(start, field, origin, (image.shape[1], image.shape[0]))
        small = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BILINEAR, box=box))
        if mask is None:
            return small, None
        share = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR, box=box)
        valid = np.asarray(share) > 127
        return small, None if valid.all() else valid

    def _opaque(self, pixels: np.ndarray, handle: Backend) -> tuple[np.ndarray, np.ndarray | None]:
        """Return RGB over white, and where the slide has content; MIRAX pads with transparent black."""
        mask = None
        if pixels.shape[2] == 4:
            alpha = pixels[..., 3]
            image = pixels[..., :3]
            if not _all_opaque(pixels):
                a = alpha[..., None].astype(np.float32) / 255
                image = np.rint(image * a + 255 * (1 - a)).astype(np.uint8)
                mask = alpha > 127
        else:
            image = pixels
        if self.icc and handle.icc is not None:
            image = _to_srgb(image, handle.icc)
        return image, mask

    def overview(self, mpp: float) -> np.ndarray:
        """Return the whole slide at a coarse scale as (H, W, 3) uint8; the last row and column may reach beyond it, in white."""
        sx, sy = self.scale(mpp)
        size = (max(1, math.ceil(self.info.width / sx)), max(1, math.ceil(self.info.height / sy)))
        return np.ascontiguousarray(self.read(0, 0, size, mpp).image)


def open_slide(path: Path | str, mpp: float | None = None, backend: str = "auto", **options: Any) -> Slide:
    """Return a slide and check that it opens and has a scale; see `Slide` for the arguments.

    Raises:
        ImageError: It cannot be opened, or has no micrometres per pixel.
    """
    slide = Slide(path, mpp=mpp, backend=backend, **options)
    _ = slide.info
    return slide


def _all_opaque(pixels: np.ndarray) -> bool:
    """Return whether alpha is 255 everywhere: the "and" of all pixels as 32-bit words takes a fifth of the minimum's time."""
    if not pixels.flags.c_contiguous:
        return bool(pixels[..., 3].min() == 255)
    return int(np.bitwise_and.reduce(pixels.view("<u4"), axis=None)) >> 24 == 255


def _whole(start: tuple[float, float], field: tuple[float, float], size: tuple[int, int]) -> bool:
    apart = [abs(f - n) for f, n in zip(field, size)] + [abs(c - round(c)) for c in start]
    return max(apart) <= NATIVE_TOLERANCE


def _fit(
    start: tuple[float, float], field: tuple[float, float], origin: list[float], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Return the box within what was read; rounding of the corner may push it out by a fraction of a pixel."""
    low = [max(0.0, c - o) for c, o in zip(start, origin)]
    high = [min(float(n), c + f - o) for n, c, f, o in zip(size, start, field, origin)]
    return (low[0], low[1], high[0], high[1])


@functools.lru_cache(maxsize=8)
def _srgb_transform(profile: bytes) -> Any:
    """Return Pillow's transform from a profile to sRGB; building it takes longer than a tile."""
    from PIL import ImageCms

    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "RGB", "RGB")


def _to_srgb(image: np.ndarray, profile: bytes) -> np.ndarray:
    from PIL import Image, ImageCms

    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(ImageCms.applyTransform(picture, _srgb_transform(profile)))
