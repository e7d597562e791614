"""Tiny slides: pyramids in tiled TIFF, OME-TIFF, Aperio-like SVS and DICOM, painted from a function of level-0 coordinates."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

Paint = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(w + 1,) and (h + 1,) level-0 coordinates of the edges of pixels -> (h, w, 3) uint8."""
WHITE = 240


def texture(xe: np.ndarray, ye: np.ndarray) -> np.ndarray:
    """Smooth colours without background, so that interpolation changes little."""
    x, y = (xe[:-1] + xe[1:]) / 2, ((ye[:-1] + ye[1:]) / 2)[:, None]
    return np.stack(
        [
            150 + 60 * np.sin(x / 97) * np.cos(y / 131),
            100 + 50 * np.cos(x / 151 + y / 113),
            160 + 40 * np.sin((x + y) / 171) + 0 * x * y,
        ],
        axis=-1,
    ).astype(np.uint8)


def square(left: float, top: float, side: float) -> Paint:
    """Black square on white 255; a pixel's value is the exact share of its area."""

    def share(edges: np.ndarray, start: float) -> np.ndarray:
        inside = np.clip(edges, start, start + side)
        return np.diff(inside) / np.diff(edges)

    def paint(xe: np.ndarray, ye: np.ndarray) -> np.ndarray:
        cover = share(ye, top)[:, None] * share(xe, left)[None]
        return np.repeat(np.rint(255 * (1 - cover)).astype(np.uint8)[..., None], 3, axis=-1)

    return paint


def blobs(*discs: tuple[float, float, float], colour: tuple[int, int, int] = (190, 90, 160), hole: float = 0.0) -> Paint:
    """Stained discs (x, y, radius) on glass; `hole` is the share of the radius that is glass again."""

    def paint(xe: np.ndarray, ye: np.ndarray) -> np.ndarray:
        x, y = (xe[:-1] + xe[1:]) / 2, ((ye[:-1] + ye[1:]) / 2)[:, None]
        out = np.full((len(ye) - 1, len(xe) - 1, 3), WHITE, dtype=np.uint8)
        for cx, cy, radius in discs:
            distance = np.hypot(x - cx, y - cy)
            out[(distance < radius) & (distance >= hole * radius)] = colour
        return out

    return paint


def _segments(
    paint: Paint, size: tuple[int, int], factor: float, tile: int, box: tuple[float, float, float, float] | None
) -> Iterator[bytes]:
    white = zlib.compress(bytes([255]) * (3 * tile * tile), 1)
    for top in range(0, size[1], tile):
        for left in range(0, size[0], tile):
            x, y, reach = left * factor, top * factor, tile * factor
            if box is not None and (x >= box[2] or y >= box[3] or x + reach <= box[0] or y + reach <= box[1]):
                yield white
            else:
                pixels = paint((left + np.arange(tile + 1)) * factor, (top + np.arange(tile + 1)) * factor)
                yield zlib.compress(pixels.tobytes(), 1)


def level_sizes(size: tuple[int, int], factors: Sequence[float]) -> list[tuple[int, int]]:
    return [(round(size[0] / factor), round(size[1] / factor)) for factor in factors]


def write_pyramid(
    path: Path,
    paint: Paint = texture,
    *,
    size: tuple[int, int] = (2048, 1536),
    factors: Sequence[float] = (1.0, 4.0, 16.0),
    mpp: float | None = 0.25,
    tile: int = 256,
    box: tuple[float, float, float, float] | None = None,
) -> Path:
    """Generic tiled TIFF, deflate. Outside `box` (left, top, right, bottom) it is white without painting, so that it may be huge."""
    with tifffile.TiffWriter(path) as tif:
        for level, ((width, height), factor) in enumerate(zip(level_sizes(size, factors), factors)):
            resolution: dict[str, Any] = {}
            if mpp is not None:
                resolution = {"resolution": (1e4 / (mpp * factor),) * 2, "resolutionunit": "CENTIMETER"}
            tif.write(
                _segments(paint, (width, height), factor, tile, box),
                shape=(height, width, 3),
                dtype=np.uint8,
                tile=(tile, tile),
                compression="zlib",
                photometric="rgb",
                subfiletype=1 if level else 0,
                metadata=None,
                software=False,
                **resolution,
            )
    return path


def whole(paint: Paint, size: tuple[int, int], factor: float = 1.0) -> np.ndarray:
    return paint(np.arange(size[0] + 1) * factor, np.arange(size[1] + 1) * factor)


def write_ome(path: Path, paint: Paint = texture, *, size: tuple[int, int] = (2048, 1536), mpp: float | None = 0.25) -> Path:
    """OME-TIFF with its pyramid in SubIFDs."""
    metadata: dict[str, Any] = {"axes": "YXS"}
    if mpp is not None:
        metadata |= {"PhysicalSizeX": mpp * 1000, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": mpp, "PhysicalSizeYUnit": "µm"}
    with tifffile.TiffWriter(path, ome=True) as tif:
        options: dict[str, Any] = {"tile": (256, 256), "compression": "zlib", "photometric": "rgb"}
        tif.write(whole(paint, size), subifds=2, metadata=metadata, **options)
        for factor in (4.0, 16.0):
            (level,) = level_sizes(size, [factor])
            tif.write(whole(paint, level, factor), subfiletype=1, **options)
    return path


def write_svs(
    path: Path, paint: Paint = texture, *, size: tuple[int, int] = (1024, 768), properties: str = "|AppMag = 40|MPP = 0.2520"
) -> Path:
    """Aperio-like: JPEG tiles, thumbnail, half-size level, label and macro; the description holds a name and a date."""
    text = f"Aperio Image Library v11.2.1 \r\n{size[0]}x{size[1]} [0,0 {size[0]}x{size[1]}] (240x240) JPEG/RGB Q=90"
    who = "|User = Doe^Jane|Date = 12/29/09|Filename = doe_jane"
    tiled: dict[str, Any] = {"tile": (240, 240), "compression": "jpeg", "compressionargs": {"level": 95}, "photometric": "rgb"}
    plain: dict[str, Any] = {"photometric": "rgb", "rowsperstrip": 16, "metadata": None}
    with tifffile.TiffWriter(path) as tif:
        tif.write(whole(paint, size), description=text + who + properties, metadata=None, **tiled)
        tif.write(whole(paint, (128, 96), 8.0), description=text + " -> 128x96", **plain)
        half = (size[0] // 2, size[1] // 2)
        tif.write(whole(paint, half, 2.0), description=text + who + properties, metadata=None, **tiled)
        tif.write(
            np.full((60, 50, 3), 7, np.uint8), description="Aperio Image Library v11.2.1 \r\nlabel 50x60", subfiletype=1, **plain
        )
        tif.write(
            np.full((40, 90, 3), 9, np.uint8), description="Aperio Image Library v11.2.1 \r\nmacro 90x40", subfiletype=9, **plain
        )
    return path


def damage(path: Path, page: int, tiles: Sequence[int]) -> Path:
    """Overwrite the data of some tiles of a page with zeros, which no codec takes."""
    with tifffile.TiffFile(path) as tif:
        found: Any = tif.pages[page]
        places = [(found.dataoffsets[k], found.databytecounts[k]) for k in tiles]
    with open(path, "r+b") as handle:
        for offset, count in places:
            handle.seek(offset)
            handle.write(bytes(count))
    return path


def write_dicom_wsi(
    path: Path,
    paint: Paint = texture,
    *,
    size: tuple[int, int] = (384, 256),
    mpp: float = 0.5,
    tile: int = 128,
    factor: float = 1.0,
) -> Path:
    """One level of a DICOM slide: JPEG frames, TILED_FULL."""
    from io import BytesIO

    from PIL import Image
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["slide", path.name])
    meta.TransferSyntaxUID = JPEGBaseline8Bit
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID = generate_uid(entropy_srcs=["study"])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=["series"])
    ds.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame"])
    ds.Modality, ds.PatientName, ds.PatientID = "SM", "Doe^Jane", "12345"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    columns, rows = -(-size[0] // tile), -(-size[1] // tile)
    ds.NumberOfFrames = columns * rows
    ds.Rows = ds.Columns = tile
    ds.TotalPixelMatrixColumns, ds.TotalPixelMatrixRows = size
    ds.TotalPixelMatrixFocalPlanes, ds.NumberOfOpticalPaths = 1, 1
    ds.DimensionOrganizationType = "TILED_FULL"
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "YBR_FULL_422", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.ImagedVolumeWidth, ds.ImagedVolumeHeight, ds.ImagedVolumeDepth = size[0] * mpp / 1000, size[1] * mpp / 1000, 1.0
    measures, shared, optical = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [mpp / 1000, mpp / 1000], 0.001
    shared.PixelMeasuresSequence = [measures]
    ds.SharedFunctionalGroupsSequence = [shared]
    optical.OpticalPathIdentifier, optical.ObjectiveLensPower = "1", 20
    ds.OpticalPathSequence = [optical]
    frames = []
    for row in range(rows):
        for column in range(columns):
            edges = np.arange(tile + 1)
            picture = BytesIO()
            Image.fromarray(paint((column * tile + edges) * factor, (row * tile + edges) * factor)).save(
                picture, "JPEG", quality=95
            )
            frames.append(picture.getvalue())
    ds.PixelData = encapsulate(frames)
    ds["PixelData"].VR = "OB"
    ds.save_as(path, enforce_file_format=True)
    return path
