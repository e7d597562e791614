"""Three ways to read a rectangle of one level: OpenSlide, tifffile, Pillow. A backend is an open file; it is never pickled.

Legend: W, H in pixels; x to the right, y down; sizes are (width, height), arrays (height, width, channels).
"""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from medssl.archive.headers.slide_headers import PLANAR_PIXELS, TIFF_MAGIC, open_tiff, picture_size, tiff_slide, unreadable
from medssl.archive.headers.tiff_structure import check_structure
from medssl.domains.lzw import LZW, lzw_intact
from medssl.errors import ImageError, RequestError

BACKENDS = ("openslide", "tifffile", "pillow")
DECODED_BYTES = 64 << 20
"""Of decoded tiles that an open tifffile slide keeps: neighbouring tiles of a grid that is not the file's share them."""
SEGMENT_BYTES = 1 << 29
"""A strip or tile larger than this, decoded, is refused: it would be decoded whole for every region."""


class RegionError(Exception):
    """A region that could not be decoded; the handle must not be used again."""


class Backend(Protocol):
    """An open slide.

    Args:
        name: Of `BACKENDS`.
        version: Version of the library.
        dimensions: (W, H) of each level, the finest first.
        downsamples: Of each level, in level-0 pixels; never rounded.
        properties: In OpenSlide's names.
        form: Of `archive.slide_headers.FORMATS`, or `other`.
        associated: Names and sizes (W, H) of associated images.
        icc: ICC profile of the main image, or None.
    """

    name: str
    version: str
    dimensions: tuple[tuple[int, int], ...]
    downsamples: tuple[float, ...]
    properties: Mapping[str, str]
    form: str
    associated: tuple[tuple[str, tuple[int, int] | None], ...]
    icc: bytes | None

    def read(self, level: int, x: int, y: int, width: int, height: int) -> tuple[np.ndarray, tuple[float, float]]:
        """Read a rectangle that lies inside the level.

        Args:
            level: Level.
            x: Left column, in pixels of the level.
            y: Top row, in pixels of the level.
            width: Columns.
            height: Rows.

        Returns:
            (height, width, 3 or 4) uint8, the fourth channel being alpha, and where its corner really lies, in pixels of the
            level.

        Raises:
            RegionError: It cannot be decoded.
        """
        ...


def missing_extra(package: str) -> RequestError:
    """Return the error for a package of the extra `wsi` that is not installed."""
    return RequestError(f'slides need {package}, which is not installed; pip install "medssl[wsi]"')


class OpenSlideBackend:
    """OpenSlide: the formats of scanners, and generic tiled TIFF."""

    name = "openslide"

    def __init__(self, path: Path, cache: Any = None) -> None:
        try:
            import openslide
        except ImportError as err:
            raise missing_extra("openslide-python and openslide-bin") from err
        self._error = openslide.OpenSlideError
        try:
            self._slide = openslide.OpenSlide(str(path))
        except openslide.OpenSlideError as err:
            raise unreadable(err) from err
        if cache is not None:
            self._slide.set_cache(cache)
        self.version = f"{openslide.__version__}/{openslide.__library_version__}"
        self.dimensions = tuple(self._slide.level_dimensions)
        self.downsamples = tuple(self._slide.level_downsamples)
        try:
            self.properties: Mapping[str, str] = dict(self._slide.properties)
        except KeyError as err:  # a property that is none after all
            raise unreadable(err) from err
        self.form = self.properties.get("openslide.vendor", "other")
        self.associated = tuple((name, picture_size(self.properties, name)) for name in self._slide.associated_images)
        self.icc = _profile(self._slide)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> tuple[np.ndarray, tuple[float, float]]:
        """Read a rectangle; see `Backend`."""
        # OpenSlide takes whole level-0 pixels; where the downsample is no whole number, it shifts by the rest itself.
        factor = self.downsamples[level]
        place = (round(x * factor), round(y * factor))
        try:
            pixels = np.asarray(self._slide.read_region(place, level, (width, height)))
        except self._error as err:
            raise RegionError(type(err).__name__) from err
        return pixels, (place[0] / factor, place[1] / factor)


def _profile(slide: Any) -> bytes | None:
    profile = slide.color_profile
    return None if profile is None else bytes(profile.tobytes())


class TiffBackend:
    """tifffile: OME-TIFF pyramids in SubIFDs, and tiled TIFF; decodes only the tiles that a region touches."""

    name = "tifffile"

    def __init__(self, path: Path) -> None:
        try:
            import tifffile
        except ImportError as err:
            raise missing_extra("tifffile and imagecodecs") from err
        self._lock = threading.Lock()
        self._decoded: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._decoded_bytes = 0
        self.version = str(tifffile.__version__)
        try:
            self._file = open_tiff(path)
            found = tiff_slide(self._file)
        except Exception as err:  # tifffile's exceptions have no common base and may quote the file
            raise unreadable(err) from err
        if found is None:
            self._file.close()
            raise ImageError(
                "unsupported_pixels", "a TIFF other than one 8-bit RGB image; slides are RGB; read it with the domain microscopy"
            )
        self._pages = found.pages
        self.dimensions: tuple[tuple[int, int], ...] = tuple(found.dimensions)
        self.downsamples: tuple[float, ...] = tuple(found.downsamples)
        self.properties: Mapping[str, str] = found.properties
        self.form = found.form
        self.associated: tuple[tuple[str, tuple[int, int] | None], ...] = tuple(found.associated)
        tag = self._pages[0].tags.get("InterColorProfile")
        self.icc = None if tag is None else bytes(tag.value)
        if any(math.prod(page.chunks) > SEGMENT_BYTES for page in self._pages):
            self._file.close()
            raise ImageError("unsupported_pixels", "a TIFF in one huge strip; slides are read in tiles; convert it to tiled TIFF")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> tuple[np.ndarray, tuple[float, float]]:
        """Read a rectangle; see `Backend`."""
        page = self._pages[level]
        rows, columns = page.chunks[:2]
        out = np.full((height, width, int(page.samplesperpixel)), 255, dtype=np.uint8)
        for row in range(y // rows, -(-(y + height) // rows)):
            for column in range(x // columns, -(-(x + width) // columns)):
                tile = self._segment(level, row * -(-int(page.imagewidth) // columns) + column)
                if tile is None:
                    continue
                top, left = row * rows, column * columns
                y0, y1 = max(y, top), min(y + height, top + tile.shape[0])
                x0, x1 = max(x, left), min(x + width, left + tile.shape[1])
                if y1 > y0 and x1 > x0:
                    out[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
        return out, (float(x), float(y))

    def _segment(self, level: int, index: int) -> np.ndarray | None:
        """Return a decoded tile or strip (h, w, S); None where the file stores none."""
        with self._lock:
            tile = self._decoded.get((level, index))
            if tile is not None:
                self._decoded.move_to_end((level, index))
                return tile
            page = self._pages[level]
            if not page.databytecounts[index]:
                return None
            try:
                handle = page.parent.filehandle
                handle.seek(page.dataoffsets[index])
                data = handle.read(page.databytecounts[index])
                if int(page.compression) == LZW and page.fillorder == 1 and not lzw_intact(data):
                    raise ValueError("a damaged stream")
                decoded = page.decode(data, index, jpegtables=page.jpegtables)[0]
            except Exception as err:  # each codec has its own exception
                raise RegionError(type(err).__name__) from err
            if decoded is None:
                return None
            tile = np.ascontiguousarray(decoded[0])
            self._decoded[level, index] = tile
            self._decoded_bytes += tile.nbytes
            while self._decoded_bytes > DECODED_BYTES and len(self._decoded) > 1:
                self._decoded_bytes -= self._decoded.popitem(last=False)[1].nbytes
            return tile


class PillowBackend:
    """Pillow: a region of interest in PNG, JPEG or plain TIFF. Its resolution is never believed: it is a printer's."""

    name = "pillow"

    def __init__(self, path: Path) -> None:
        import PIL
        from PIL import Image

        self.version = str(PIL.__version__)
        logging.getLogger("PIL").setLevel(logging.WARNING)  # its debug messages quote the tags of the file
        try:
            with warnings.catch_warnings(), Image.open(path) as picture:
                warnings.simplefilter("ignore")  # they may quote text of the file
                if picture.width * picture.height > PLANAR_PIXELS:
                    raise ImageError(
                        "too_large",
                        f"{picture.width * picture.height / 1e6:.0f} megapixels in one picture; at most {PLANAR_PIXELS // 10**6} are "
                        "read whole; convert it to a tiled pyramid",
                    )
                self.icc = picture.info.get("icc_profile")
                wanted = "RGBA" if "A" in picture.getbands() or "transparency" in picture.info else "RGB"
                if picture.mode not in ("L", "LA", "P", "PA", "RGB", "RGBA", "1", "YCbCr"):
                    raise ImageError("unsupported_pixels", f"a picture of mode {picture.mode}; 8-bit colour or grey is accepted")
                self._array = np.asarray(picture.convert(wanted))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as err:
            if isinstance(err, ImageError):
                raise
            raise unreadable(err) from err
        self.dimensions: tuple[tuple[int, int], ...] = ((self._array.shape[1], self._array.shape[0]),)
        self.downsamples: tuple[float, ...] = (1.0,)
        self.properties: Mapping[str, str] = {}
        self.form = "picture"
        self.associated: tuple[tuple[str, tuple[int, int] | None], ...] = ()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> tuple[np.ndarray, tuple[float, float]]:
        """Read a rectangle; see `Backend`."""
        return self._array[y : y + height, x : x + width], (float(x), float(y))


def open_backend(path: Path, name: str, cache: Any = None) -> Backend:
    """Open a slide.

    Args:
        path: The file.
        name: Of `BACKENDS`, or `auto`: OpenSlide; tifffile for pyramids of which OpenSlide sees one level, and for tiled TIFF that
            it does not know; Pillow for plain pictures.
        cache: An `openslide.OpenSlideCache` to share, or None.

    Raises:
        ImageError: `vanished`, `permission`, `empty`, `unreadable` and others of the chosen backend.
    """
    # OpenSlide gives one error for a missing file and for a format that it does not know.
    try:
        with open(path, "rb") as handle:
            head = handle.read(32)
    except OSError as err:
        reason = {FileNotFoundError: "vanished", PermissionError: "permission"}.get(type(err), "io_error")
        raise ImageError(reason, f"the slide could not be read ({err.strerror}); check that it is there and readable") from err
    if not head:
        raise ImageError("empty", "the file has no bytes; copy it again from its source")
    if head.startswith(TIFF_MAGIC):
        check_structure(path)
    if name == "openslide":
        return OpenSlideBackend(path, cache)
    if name == "tifffile":
        return TiffBackend(path)
    if name == "pillow":
        return PillowBackend(path)
    if name != "auto":
        raise RequestError(f"unknown backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    return _choose(path, head, cache)


def _choose(path: Path, head: bytes, cache: Any) -> Backend:
    first: ImageError | None = None
    found: Backend | None = None
    try:
        found = OpenSlideBackend(path, cache)
    except ImageError as err:
        first = err
    tiff = head.startswith(TIFF_MAGIC)
    if tiff and (found is None or (found.form == "generic-tiff" and len(found.dimensions) == 1)):
        try:
            other = TiffBackend(path)
        except ImageError as err:
            first = first or err
        else:
            if found is None and not other._pages[0].is_tiled and len(other.dimensions) == 1:
                return PillowBackend(path)  # a plain picture, whose resolution tags say nothing
            if found is None or len(other.dimensions) > 1 or other.form == "ome-tiff":
                return other
    if found is not None:
        return found
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"BM")) or tiff:
        try:
            return PillowBackend(path)
        except ImageError as err:
            if not tiff:
                raise
            raise first or err from err
    raise ImageError("unsupported_format", "not a slide that OpenSlide, tifffile or Pillow reads; convert it to pyramidal OME-TIFF")
