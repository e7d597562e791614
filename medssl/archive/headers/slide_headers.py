"""The header of a whole-slide image: sizes of its levels, micrometres per pixel, maker, associated images. No pixel is decoded.

OpenSlide comes first; tifffile takes OME-TIFF pyramids (of which OpenSlide sees the finest level only) and what OpenSlide does not
know. Text of the file is never returned: names are mapped to closed lists, because descriptions hold users, dates and file names.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from medssl.errors import ImageError

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OTHER_MAGIC = (b"SQLite format 3\0", b"ZISRAWFILE")
_NAMED_FORMATS = (".mrxs", ".vms", ".vmu")
"""Formats whose first file is a picture or a text and says nothing: OpenSlide itself goes by their names."""
DICOM_WSI = b"1.2.840.10008.5.1.4.1.1.77.1.6"
MIN_MPP, MAX_MPP = 0.05, 20.0
"""Micrometres per pixel outside (0.05, 20] are a printer's resolution or a slip of units, not a microscope."""
PLANAR_PIXELS = 100_000_000
"""A tiled TIFF of one level is a picture up to here (`domains.planar.MAX_PIXELS`) and a slide above."""
MAX_XML = 4 << 20

VENDORS = {
    "aperio": "aperio",
    "hamamatsu": "hamamatsu",
    "leica": "leica",
    "mirax": "3dhistech",
    "philips": "philips",
    "sakura": "sakura",
    "trestle": "trestle",
    "ventana": "ventana",
    "zeiss": "zeiss",
    "huron": "huron",
}
"""OpenSlide's vendor -> ours; formats without a maker (generic TIFF, OME-TIFF, DICOM) are `unknown`, others `other`."""
FORMATS = (*VENDORS, "dicom", "generic-tiff", "ome-tiff")
ROLES = {"label": "label", "macro": "overview", "overview": "overview", "thumbnail": "thumbnail"}
"""Name of an associated image -> its role; every other name is `other`."""
MPP_SOURCES = ("user_table", "user", "header", "vendor", "resolution", "objective")
"""Where micrometres per pixel come from, in the order in which they are trusted; `objective` is an estimate."""
_VENDOR_MPP = (
    ("aperio.MPP", "aperio.MPP", 1.0),
    ("mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X", "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_Y", 1.0),
    ("ventana.ScanRes", "ventana.ScanRes", 1.0),
)
_UNITS_UM = {"": 1.0, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "in": 25400.0, "inch": 25400.0}
_LOSSY_TIFF = {6, 7, 22610, 33003, 33005, 33007, 34712, 34892}


@dataclass(frozen=True)
class Mpp:
    """Micrometres per pixel of the finest level.

    Args:
        x: Between columns.
        y: Between rows.
        source: One of `MPP_SOURCES`.
    """

    x: float
    y: float
    source: str

    @property
    def mean(self) -> float:
        """Mean of both axes."""
        return (self.x + self.y) / 2


def mpp_plausible(value: float) -> bool:
    """Return whether a number can be a microscope's micrometres per pixel."""
    return MIN_MPP < value <= MAX_MPP


def mpp_of(properties: Mapping[str, str]) -> Mpp | None:
    """Return micrometres per pixel from a slide's properties, in OpenSlide's names, by the order of trust.

    The order: `openslide.mpp-x/y`, the maker's own key, the TIFF resolution with its unit, 10 / objective as an estimate.
    Values that no microscope has are passed over.
    """
    for x_key, y_key, factor, source in [
        ("openslide.mpp-x", "openslide.mpp-y", 1.0, "header"),
        *[(*keys, "vendor") for keys in _VENDOR_MPP],
    ]:
        found = _pair(_number(properties.get(x_key)), _number(properties.get(y_key)), factor, source)
        if found:
            return found
    per_unit = {"centimeter": 1e4, "inch": 25400.0}.get(properties.get("tiff.ResolutionUnit", "").lower())
    x, y = _number(properties.get("tiff.XResolution")), _number(properties.get("tiff.YResolution"))
    if per_unit and x and y:
        found = _pair(per_unit / x, per_unit / y, 1.0, "resolution")
        if found:
            return found
    objective = objective_of(properties)
    return _pair(10.0 / objective, 10.0 / objective, 1.0, "objective") if objective else None


def objective_of(properties: Mapping[str, str]) -> float | None:
    """Return the power of the objective, or None."""
    for key in ("openslide.objective-power", "aperio.AppMag"):
        value = _number(properties.get(key))
        if value is not None and 0.5 <= value <= 200:
            return value
    return None


def _pair(x: float | None, y: float | None, factor: float, source: str) -> Mpp | None:
    if x is None or y is None or not (mpp_plausible(x * factor) and mpp_plausible(y * factor)):
        return None
    return Mpp(x * factor, y * factor, source)


def _number(text: str | None) -> float | None:
    try:
        value = float(str(text).strip())
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def looks_like_slide(path: Path, head: bytes) -> bool:
    """Return whether a file may be a slide, from its first bytes (and the names of the formats that need it)."""
    if head.startswith((*TIFF_MAGIC, *_OTHER_MAGIC)):
        return True
    if head[128:132] == b"DICM":
        return DICOM_WSI in head
    return path.suffix.lower() in _NAMED_FORMATS


def companions(path: Path) -> list[Path]:
    """Return the other files that a slide of several files consists of: those in the folder of a MIRAX slide's name."""
    folder = path.with_suffix("")
    if path.suffix.lower() != ".mrxs" or not folder.is_dir():
        return []
    return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_file())


def named_slide_header(path: Path, head: bytes) -> dict[str, Any] | None:
    """Return the header of a MIRAX slide, whose first file is a JPEG and says nothing, or None for any other name.

    Raises:
        ImageError: `no_decoder` without OpenSlide, `truncated` where its folder of data is not there, else as `slide_header`.
    """
    if path.suffix.lower() != ".mrxs":
        return None
    if not companions(path):
        raise ImageError("truncated", "a MIRAX slide without the folder of its data; copy both again from their source")
    found = slide_header(path, head)
    if found is not None:
        return found
    import importlib.util

    if importlib.util.find_spec("openslide") is None:
        raise ImageError("no_decoder", 'MIRAX slides need the extra wsi: `pip install "medssl[wsi]"`, then index again')
    raise ImageError("unreadable", "a MIRAX slide that OpenSlide does not recognise; copy it again from its source")


def slide_header(path: Path, head: bytes) -> dict[str, Any] | None:
    """Return the header of a slide, or None for a file that is none.

    Args:
        path: The file; of a DICOM slide, any file of the series, whose folder OpenSlide searches for the others.
        head: Its first bytes, 4096 of them.

    Returns:
        `kind` ("slide"), `format` (of `FORMATS`), `shape` [H, W] of the finest level, `level_dimensions` [[W, H], ...],
        `level_downsamples`, `mpp` (mean of both axes) with `mpp_xy` and `mpp_source` or None, `spacing_mm` [rows, columns] or
        None, `objective`, `vendor`, `dtype`, `bits`, `photometric`, `lossy` (None when unknown), `associated`
        [{`role`, `shape`, `member`}] for label, overview, thumbnail and others (`member` None where the name is not of the closed
        list), `flags`, `privacy_flags`, `reason`.

    Raises:
        ImageError: A slide's format whose header cannot be parsed (`unreadable`), or data are missing (`truncated`).
    """
    if not looks_like_slide(path, head):
        return None
    found = _by_openslide(path)
    if head.startswith(TIFF_MAGIC) and (
        found is None or (found["format"] == "generic-tiff" and len(found["level_dimensions"]) == 1)
    ):
        other = _by_tifffile(path)
        if other is not None:
            found = other
    if found is None or (found["format"] == "generic-tiff" and not _is_slide(found["level_dimensions"])):
        return None
    if head.startswith(TIFF_MAGIC):
        found["lossy"] = check_tiff(path)
    return found


def _is_slide(level_dimensions: Sequence[Sequence[int]]) -> bool:
    width, height = level_dimensions[0]
    return len(level_dimensions) > 1 or width * height > PLANAR_PIXELS


def _by_openslide(path: Path) -> dict[str, Any] | None:
    try:
        import openslide
    except ImportError:
        return None
    vendor = openslide.OpenSlide.detect_format(str(path))
    if vendor is None:
        return None
    try:
        with openslide.OpenSlide(str(path)) as slide:
            properties = dict(slide.properties)
            dimensions = [list(size) for size in slide.level_dimensions]
            downsamples = list(slide.level_downsamples)
            associated = [(name, picture_size(properties, name)) for name in slide.associated_images]
    except (openslide.OpenSlideError, KeyError) as err:  # KeyError: a property that is none after all
        raise unreadable(err) from err
    name = vendor if vendor in FORMATS else "other"
    return _header(name, dimensions, downsamples, mpp_of(properties), objective_of(properties), associated)


def picture_size(properties: Mapping[str, str], name: str) -> tuple[int, int] | None:
    """Return (W, H) of an associated image from OpenSlide's properties, without decoding it."""
    size = [properties.get(f"openslide.associated.{name}.{side}") for side in ("width", "height")]
    return None if None in size else (int(size[0] or 0), int(size[1] or 0))


def unreadable(err: Exception) -> ImageError:
    """Return the error for a slide that a reader recognised and could not open; its own text may name the file."""
    return ImageError("unreadable", f"the slide cannot be opened ({type(err).__name__}); copy it again from its source")


def _header(
    form: str,
    dimensions: Sequence[Sequence[int]],
    downsamples: Sequence[float],
    mpp: Mpp | None,
    objective: float | None,
    associated: Sequence[tuple[str, tuple[int, int] | None]],
) -> dict[str, Any]:
    flags = []
    if mpp is None:
        flags.append("mpp_missing")
    elif mpp.source == "objective":
        flags.append("mpp_estimated")
    if len(dimensions) == 1:
        flags.append("single_level")
    pictures = [
        {
            "role": ROLES.get(name.lower(), "other"),
            "member": name if name.lower() in ROLES else None,
            "shape": None if size is None else [size[1], size[0]],
        }
        for name, size in associated
    ]
    private = any(picture["role"] != "thumbnail" for picture in pictures)
    return {
        "kind": "slide",
        "format": form,
        "shape": [int(dimensions[0][1]), int(dimensions[0][0])],
        "level_dimensions": [[int(width), int(height)] for width, height in dimensions],
        "level_downsamples": [float(value) for value in downsamples],
        "mpp": None if mpp is None else mpp.mean,
        "mpp_xy": None if mpp is None else [mpp.x, mpp.y],
        "mpp_source": None if mpp is None else mpp.source,
        "spacing_mm": None if mpp is None else [mpp.y / 1000, mpp.x / 1000],
        "objective": objective,
        "vendor": VENDORS.get(form, "unknown" if form in FORMATS else "other"),
        "dtype": "uint8",
        "bits": 8,
        "photometric": "RGB",
        "lossy": None,
        "associated": pictures,
        "flags": flags,
        "privacy_flags": ["label_image"] if private else [],
        "reason": None,
    }


def open_tiff(path: Path) -> Any:
    """Open a file with tifffile, whose log is silenced for good: its messages name the file.

    Raises:
        ImportError: tifffile is not installed.
    """
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
    return tifffile.TiffFile(path)


# --- TIFF, by tifffile -------------------------------------------------------------------------------------------------------


@dataclass
class TiffSlide:
    """The pyramid of a TIFF file, as tifffile sees it.

    Args:
        pages: One page per level, the finest first.
        properties: In OpenSlide's names, only those that say something about scale.
        form: `aperio`, `ome-tiff` or `generic-tiff`.
        associated: Name and (W, H) of associated images.
    """

    pages: list[Any]
    properties: dict[str, str]
    form: str
    associated: list[tuple[str, tuple[int, int]]]

    @property
    def dimensions(self) -> list[tuple[int, int]]:
        """(W, H) of each level."""
        return [(int(page.imagewidth), int(page.imagelength)) for page in self.pages]

    @property
    def downsamples(self) -> list[float]:
        """Of each level: the mean of both axes, as OpenSlide defines it."""
        width, height = self.dimensions[0]
        return [(width / w + height / h) / 2 for w, h in self.dimensions]


def tiff_slide(tif: Any) -> TiffSlide | None:
    """Return the pyramid of an open `tifffile.TiffFile`: 8-bit colour, interleaved; None when it has none such.

    SubIFDs of OME-TIFF count as levels, and so do reduced images that follow the first page.
    """
    # The largest series: label and macro images are series of their own.
    series = max(tif.series, key=lambda one: int(one.keyframe.imagewidth) * int(one.keyframe.imagelength))
    first = series.levels[0].keyframe
    if not _colour(first):
        return None
    shape = (first.imagewidth, first.imagelength)
    if series.axes not in ("YXS", "SYX") and len(series.pages) > 1:
        return None  # a stack or several channels: microscopy
    pages = [level.keyframe for level in series.levels if _colour(level.keyframe)]
    if len(pages) == 1:
        pages += [page for page in tif.pages if _reduced(page, shape)]
    pages.sort(key=lambda page: -int(page.imagewidth))
    form = "ome-tiff" if tif.is_ome else ("aperio" if tif.is_svs else "generic-tiff")
    return TiffSlide(pages, _tiff_properties(tif, first, form), form, _tiff_associated(tif) if form == "aperio" else [])


def _colour(page: Any) -> bool:
    interleaved = int(page.samplesperpixel) in (3, 4) and int(page.planarconfig) == 1 and page.imagewidth > 0 < page.imagelength
    return bool(str(page.dtype) == "uint8" and interleaved and int(page.photometric) in (2, 6))


def _reduced(page: Any, shape: tuple[int, int]) -> bool:
    """Return whether a page is a smaller copy of the first: reduced, tiled, of its proportions within two pixels."""
    if not _colour(page) or not page.is_tiled or not page.is_reduced or page.imagewidth >= shape[0]:
        return False
    ratio = shape[0] / page.imagewidth
    return bool(abs(shape[1] / ratio - page.imagelength) <= 2)


def _tiff_properties(tif: Any, page: Any, form: str) -> dict[str, str]:
    found: dict[str, str] = {}
    if form == "aperio":
        # "Aperio Image Library ... |AppMag = 20|MPP = 0.4990|...": only these two keys are looked at.
        for key, value in re.findall(r"\|\s*(MPP|AppMag)\s*=\s*([0-9.]+)", page.description or ""):
            found[f"aperio.{key}"] = value
    if form == "ome-tiff":
        size = _ome_mpp(tif.ome_metadata or "")
        if size is not None:
            found["openslide.mpp-x"], found["openslide.mpp-y"] = (repr(value) for value in size)
        return found  # the resolution tags of OME-TIFF repeat or contradict the XML, which is what its format asks to read
    unit = page.tags.get("ResolutionUnit")
    for axis in ("X", "Y"):
        tag = page.tags.get(f"{axis}Resolution")
        if tag is not None and isinstance(tag.value, tuple) and tag.value[1]:
            found[f"tiff.{axis}Resolution"] = repr(tag.value[0] / tag.value[1])
    if unit is not None:
        found["tiff.ResolutionUnit"] = {2: "inch", 3: "centimeter"}.get(int(unit.value), "none")
    return found


def _ome_mpp(xml: str) -> tuple[float, float] | None:
    if not xml or len(xml) > MAX_XML:
        return None
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return None
    best: tuple[int, tuple[float, float]] | None = None
    for pixels in root.iter():
        if not pixels.tag.endswith("}Pixels"):
            continue
        values = [_number(pixels.get(f"PhysicalSize{axis}")) for axis in "XY"]
        factors = [_UNITS_UM.get(pixels.get(f"PhysicalSize{axis}Unit", "")) for axis in "XY"]
        if None in values or None in factors:
            continue
        area = int(pixels.get("SizeX", "0")) * int(pixels.get("SizeY", "0"))
        size = (float(values[0] or 0) * float(factors[0] or 0), float(values[1] or 0) * float(factors[1] or 0))
        if best is None or area > best[0]:
            best = (area, size)
    return None if best is None else best[1]


def _tiff_associated(tif: Any) -> list[tuple[str, tuple[int, int]]]:
    """Return the stripped pages of an Aperio file, told by the first words of their descriptions."""
    found = []
    for number, page in enumerate(tif.pages):
        if page.is_tiled:
            continue
        words = (page.description or "").split("\n")[-1].split()
        name = "thumbnail" if number == 1 else (words[0].lower() if words else "other")
        found.append((name if name in ROLES else "other", (int(page.imagewidth), int(page.imagelength))))
    return found


def _by_tifffile(path: Path) -> dict[str, Any] | None:
    try:
        with open_tiff(path) as tif:
            slide = tiff_slide(tif)
    except Exception:  # not installed, or not a TIFF that it can parse; its exceptions quote the file
        return None
    if slide is None or (slide.form != "aperio" and not _is_slide(slide.dimensions)):
        return None
    mpp, objective = mpp_of(slide.properties), objective_of(slide.properties)
    return _header(slide.form, slide.dimensions, slide.downsamples, mpp, objective, slide.associated)


def check_tiff(path: Path) -> bool | None:
    """Compare the data that the first page promises with the file's size; return whether its compression is lossy.

    Raises:
        ImageError: `truncated`.
    """
    try:
        with open_tiff(path) as tif:
            page: Any = tif.pages[0]
            end = max((start + count for start, count in zip(page.dataoffsets, page.databytecounts) if count), default=0)
            lossy = int(page.compression) in _LOSSY_TIFF
    except Exception:  # not installed; or OpenSlide opened it, and what tifffile says against it does not count
        return None
    if end > path.stat().st_size:
        raise ImageError("truncated", "the slide ends before its last tile; copy it again from its source")
    return lossy
