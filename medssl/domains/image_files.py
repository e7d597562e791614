"""Read PNG, JPEG, TIFF, BMP and still GIF files into arrays that keep their 8 to 16 bits, floats included.

Resolution in dots per inch says how large a picture is printed: it is never taken for spacing. TIFF is read by tifffile
where it is installed (extra `wsi`), else by Pillow; 16-bit colour PNG, which Pillow cuts to 8 bits, by SimpleITK.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from medssl.archive.headers.tiff_structure import check_structure
from medssl.domains.lzw import LZW, lzw_intact
from medssl.domains.planar import RawPlanar, check_size, finite, narrow, os_fault, quiet_decoders
from medssl.errors import ImageError

MM_PER = {
    "m": 1e3,
    "cm": 10.0,
    "mm": 1.0,
    "um": 1e-3,
    "\u00b5m": 1e-3,
    "\u03bcm": 1e-3,
    "micron": 1e-3,
    "microns": 1e-3,
    "nm": 1e-6,
}
MAX_CHANNELS = 64
MAX_XML = 4 << 20


def read_image_file(path: Path) -> RawPlanar:
    """Read one image file.

    An alpha channel is not an image channel: transparent pixels are not valid, and alpha is dropped.

    Args:
        path: PNG, JPEG, TIFF, BMP or a GIF of one frame, told by content.

    Returns:
        (C, H, W) with C channels as stored; grey in one channel, colour in three.

    Raises:
        ImageError: `unreadable`, `truncated`, `unsupported_pixels` or of the operating system.
    """
    quiet_decoders()
    try:
        with open(path, "rb") as handle:
            head = handle.read(32)
    except OSError as err:
        raise os_fault(err) from err
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote text of the file; what matters of them is checked here
            if head.startswith(b"\x89PNG") and len(head) >= 26 and head[24] == 16 and head[25] in (2, 4, 6):
                raw = _read_deep_png(path, head)
            elif head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                raw = _read_tiff(path)
            else:
                raw = _read_pillow(path)
    except ImageError:
        raise
    except MemoryError as err:
        raise ImageError("unsupported_pixels", "the image does not fit into memory; leave it out") from err
    except Exception as err:  # decoders raise many classes on damaged files, with texts that may quote it
        reason = "truncated" if "truncated" in str(err) else "unreadable"
        raise ImageError(reason, f"an image could not be decoded ({type(err).__name__}); copy it again from its source") from err
    finite(raw)
    return raw


def _read_pillow(path: Path) -> RawPlanar:
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # `check_size` is stricter and raises our own error
    try:
        with Image.open(path) as picture:
            check_size(picture.height, picture.width, picture.height * picture.width * 4)
            n_frames = int(getattr(picture, "n_frames", 1))
            if n_frames > 1:
                raise ImageError("unsupported_pixels", f"{n_frames} frames in an image file; one image is needed; split it")
            lossy = picture.format == "JPEG"
            return pillow_planar(picture, lossy=lossy)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def pillow_planar(picture: Any, *, lossy: bool = False) -> RawPlanar:
    """Return a Pillow image as (C, H, W)."""
    mode = picture.mode
    if mode == "P":
        mode = "RGBA" if "transparency" in picture.info else "RGB"
        picture = picture.convert(mode)
    elif mode in ("1", "La", "LA", "RGBa"):
        mode = {"1": "L", "La": "LA", "RGBa": "RGBA"}.get(mode, mode)
        picture = picture.convert(mode)
    elif mode == "YCbCr":
        mode, picture = "RGB", picture.convert("RGB")
    elif mode not in ("L", "RGB", "RGBA", "I", "F") and not mode.startswith("I;16"):
        raise ImageError("unsupported_pixels", "a colour model other than grey and RGB; export the image as grey or RGB")
    raw = _planar(np.asarray(picture), alpha=mode in ("LA", "RGBA"))
    if lossy:
        raw.flag("lossy")
    return raw


def _planar(array: np.ndarray, *, alpha: bool = False) -> RawPlanar:
    """Turn (H, W) or (H, W, S) into channels first; the last sample is alpha where told so."""
    array = array[..., None] if array.ndim == 2 else array
    transparent = None
    if alpha:
        transparent = array[..., -1] == 0
        array = array[..., :-1]
    array, flags = narrow(array)
    raw = RawPlanar(np.moveaxis(array, -1, 0), flags=list(flags))
    if transparent is not None:
        raw.exclude(transparent)
    return raw


def _read_deep_png(path: Path, head: bytes) -> RawPlanar:
    import SimpleITK as sitk

    if head[25] == 4:
        raise ImageError("unsupported_pixels", "16-bit grey PNG with alpha; export it without alpha")
    width, height = (int.from_bytes(head[start : start + 4], "big") for start in (16, 20))
    check_size(height, width, height * width * 8)
    sitk.ProcessObject.GlobalWarningDisplayOff()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("PNGImageIO")
    reader.SetFileName(str(path))
    return _planar(sitk.GetArrayFromImage(reader.Execute()), alpha=head[25] == 6)


def _read_tiff(path: Path) -> RawPlanar:
    check_structure(path)
    try:
        import tifffile
    except ImportError:
        return _read_pillow(path)
    try:
        with tifffile.TiffFile(path) as tif:
            return _tiff_planar(tif)
    except ImageError:
        raise
    except Exception:  # a codec that tifffile lacks without imagecodecs, or a damaged file: Pillow has the last word
        return _read_pillow(path)


def _tiff_planar(tif: Any) -> RawPlanar:
    from tifffile import PHOTOMETRIC

    if not tif.series:
        raise ImageError("unreadable", "a TIFF without images; copy it again from its source")
    series = tif.series[0]
    page = series.keyframe
    axes = {axis: size for axis, size in zip(series.axes, series.shape) if size > 1 or axis in "YX"}
    others = "".join(axis for axis in axes if axis not in "YXCSIQ")
    if others or "Y" not in axes or "X" not in axes:
        what = ", ".join(f"{axes[axis]} along {axis}" for axis in others) or "no rows and columns"
        raise ImageError("unsupported_pixels", f"a TIFF stack ({what}); one field with its channels is needed; split it first")
    n_channels = int(np.prod([size for axis, size in axes.items() if axis not in "YX"], dtype=np.int64))
    check_size(axes["Y"], axes["X"], axes["Y"] * axes["X"] * n_channels * series.dtype.itemsize)
    if n_channels > MAX_CHANNELS:
        raise ImageError(
            "unsupported_pixels", f"{n_channels} images in a TIFF; at most {MAX_CHANNELS} channels are accepted; split it"
        )
    if int(page.compression) == LZW and page.fillorder == 1 and not all(map(lzw_intact, _segments(tif, series))):
        raise ImageError("unreadable", "a TIFF whose LZW stream is damaged; copy the file again from its source")
    array = series.asarray().reshape(tuple(axes.values()))
    order = [name for name in axes if name not in "YX"]
    array = array.transpose([list(axes).index(name) for name in ["Y", "X", *order]])
    array = array.reshape(axes["Y"], axes["X"], n_channels)
    if page.photometric == PHOTOMETRIC.PALETTE and page.colormap is not None and n_channels == 1:
        table = np.asarray(page.colormap, dtype=np.uint16)
        for factor in (256, 257):  # both are ways to write 8-bit colours into the 16-bit table
            if table.dtype == np.uint16 and not (table % factor).any():
                table = (table // factor).astype(np.uint8)
        array = np.moveaxis(table[:, array[..., 0]], 0, -1)
    elif page.photometric == PHOTOMETRIC.MINISWHITE and array.dtype.kind in "bu":
        array = ~array if array.dtype == bool else ((1 << page.bitspersample) - 1 - array.astype(np.int64)).astype(array.dtype)
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    alpha = "S" in axes and bool(page.extrasamples) and int(page.extrasamples[-1]) in (1, 2)
    raw = _planar(array, alpha=alpha)
    if tif.is_ome:
        raw.spacing_mm, raw.facts["ome"] = ome_spacing(tif.ome_metadata), True
        raw.channels = ome_channels(tif.ome_metadata, len(raw.array))
    elif tif.is_imagej:
        raw.spacing_mm = _imagej_spacing(tif, page)
    if {"I", "Q"} & set(axes):
        raw.flag("channels_assumed")
    if int(page.compression) in (6, 7, 33003, 33004, 33005, 34712):
        raw.flag("lossy")
    return raw


def _segments(tif: Any, series: Any) -> Iterator[bytes]:
    """Yield the compressed strips or tiles of all pages."""
    for page in series.pages:
        for place, count in zip(page.dataoffsets, page.databytecounts) if page is not None else ():
            tif.filehandle.seek(place)
            yield tif.filehandle.read(count)


def _ome(text: str | None) -> ElementTree.Element | None:
    """Return the Pixels element of an OME-XML text, or None; a document type could define entities and is not parsed."""
    if not text or len(text) > MAX_XML or "<!" in text.replace("<!--", ""):
        return None
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError):
        return None
    return next((element for element in root.iter() if element.tag.endswith("}Pixels") or element.tag == "Pixels"), None)


def ome_spacing(text: str | None) -> tuple[float, float] | None:
    """Return (row step, column step) in mm from PhysicalSizeY and PhysicalSizeX of an OME-XML text."""
    pixels = _ome(text)
    if pixels is None:
        return None
    steps = []
    for axis in "YX":
        unit = MM_PER.get(pixels.get(f"PhysicalSize{axis}Unit", "um"))
        try:
            value = float(pixels.get(f"PhysicalSize{axis}", ""))
        except ValueError:
            return None
        if unit is None or not 0 < value < 1e9:
            return None
        steps.append(value * unit)
    return steps[0], steps[1]


def ome_channels(text: str | None, n: int) -> tuple[str, ...]:
    """Return the Name of each of n channels of an OME-XML text as it stands there, or nothing."""
    pixels = _ome(text)
    if pixels is None:
        return ()
    names = [element.get("Name", "") for element in pixels if element.tag.split("}")[-1] == "Channel"]
    return tuple(names) if len(names) == n and any(names) else ()


def _imagej_spacing(tif: Any, page: Any) -> tuple[float, float] | None:
    unit = str((tif.imagej_metadata or {}).get("unit", ""))
    unit = re.sub(r"\\u00b5|\u03bc", "\u00b5", unit, flags=re.IGNORECASE)
    steps = []
    for name in ("YResolution", "XResolution"):
        tag = page.tags.get(name)
        if tag is None or unit not in MM_PER or not all(tag.value):
            return None
        pixels, per = tag.value
        steps.append(per / pixels * MM_PER[unit])
    return steps[0], steps[1]
