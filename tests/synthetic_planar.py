"""Tiny radiographs, ultrasound loops, pictures and videos for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SOP_CLASSES = {
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
    "US": "1.2.840.10008.5.1.4.1.1.3.1",
}
SYNTAXES = {"explicit": "1.2.840.10008.1.2.1", "rle": "1.2.840.10008.1.2.5", "big": "1.2.840.10008.1.2.2"}


def radiograph(shape: tuple[int, int] = (60, 48), *, bits: int = 12, seed: int = 0) -> np.ndarray:
    """Return an asymmetric (H, W) uint16 image that uses most of its bits, without a flat line at its border."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    body = np.exp(-((x - 0.2) ** 2) * 2 - (y + 0.1) ** 2)
    top = (1 << bits) - 1
    ribs = 0.12 * (1 + np.sin(9 * y + 2 * x) * np.cos(7 * x))
    return np.clip((body * 0.7 + ribs) * top + rng.normal(0, top / 200, shape), 0, top).astype(np.uint16)


def write_planar_dicom(
    path: Path,
    frames: np.ndarray,
    *,
    modality: str = "DX",
    photometric: str | None = None,
    bits_stored: int | None = None,
    syntax: str = "explicit",
    **extra: Any,
) -> Path:
    """Write stored words as one DICOM file.

    Args:
        path: The file.
        frames: (H, W) grey, (T, H, W) grey, (H, W, 3) or (T, H, W, 3) colour, uint8, uint16 or int16.
        modality: `CR`, `DX` or `US`.
        photometric: MONOCHROME2 or RGB by default.
        bits_stored: All bits by default.
        syntax: A key of `SYNTAXES`.
        extra: Keyword -> value; None deletes.
    """
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID, generate_uid

    colour = frames.shape[-1] == 3 and frames.ndim >= 3
    grid = frames.shape[-3:-1] if colour else frames.shape[-2:]
    n = int(np.prod(frames.shape)) // int(np.prod(grid)) // (3 if colour else 1)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(SOP_CLASSES[modality])
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    meta.TransferSyntaxUID = UID(SYNTAXES["explicit" if syntax == "rle" else syntax])
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID = generate_uid(entropy_srcs=["planar", "study"])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=["planar", "series"])
    ds.PatientID, ds.PatientName, ds.Modality = "P0007", "Phantom^Seven", modality
    ds.Rows, ds.Columns = int(grid[0]), int(grid[1])
    ds.SamplesPerPixel = 3 if colour else 1
    ds.PhotometricInterpretation = photometric or ("RGB" if colour else "MONOCHROME2")
    if colour:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = frames.dtype.itemsize * 8
    ds.BitsStored = bits_stored or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(frames.dtype.kind == "i")
    if n > 1:
        ds.NumberOfFrames = n
    stored = frames.astype(frames.dtype.newbyteorder(">")) if syntax == "big" else frames
    ds.PixelData = np.ascontiguousarray(stored).tobytes()
    ds["PixelData"].VR = "OB" if frames.dtype.itemsize == 1 else "OW"
    for keyword, value in extra.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    if syntax == "rle":
        ds.compress(UID(SYNTAXES["rle"]), frames, encoding_plugin="pydicom")
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
    return path


def us_region(
    box: tuple[int, int, int, int], *, space: int = 1, data: int = 1, delta_cm: tuple[float, float] | None = (0.04, 0.05)
) -> Any:
    """Return an item of SequenceOfUltrasoundRegions: box is row start and stop, column start and stop, half-open."""
    from pydicom.dataset import Dataset

    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType, item.RegionFlags = space, data, 0
    item.RegionLocationMinY0, item.RegionLocationMaxY1 = box[0], box[1] - 1
    item.RegionLocationMinX0, item.RegionLocationMaxX1 = box[2], box[3] - 1
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = 3 if delta_cm else 0
    if delta_cm:
        item.PhysicalDeltaY, item.PhysicalDeltaX = delta_cm
    return item


def fan(shape: tuple[int, int] = (120, 160)) -> np.ndarray:
    """Return a sector (H, W) bool: apex near the top middle, 35 degrees to either side."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    y, x = y - 4, x - shape[1] * 0.5
    reach = np.hypot(x, y)
    inside: np.ndarray = (np.abs(np.arctan2(x, y)) < np.deg2rad(35)) & (reach < shape[0] * 0.8) & (y > 0)
    return inside


def us_loop(n_frames: int = 12, shape: tuple[int, int] = (120, 160), *, seed: int = 0) -> np.ndarray:
    """Return (T, H, W) uint8: speckle that changes inside `fan`, a standing banner with text, a ruler, and a moving ECG strip."""
    rng = np.random.default_rng(seed)
    frames = np.zeros((n_frames, *shape), dtype=np.uint8)
    sector = fan(shape)
    for t, frame in enumerate(frames):
        speckle = 60 + 40 * np.sin(t / 2) * np.ones(shape) + rng.normal(0, 18, shape)
        frame[sector] = np.clip(speckle, 5, 250).astype(np.uint8)[sector]
        trace = shape[0] - 6 + np.rint(2 * np.sin(np.arange(30) / 3 + t)).astype(int)
        frame[trace, np.arange(5, 35)] = 200
    text = rng.random((5, 40)) < 0.5
    frames[:, 2:7, 2:42] = np.where(text, 255, 0)
    frames[:, ::10, shape[1] - 3 :] = 180
    return frames


def write_video(path: Path, frames: np.ndarray, *, fps: Any = 25, codec: str = "mpeg4", pixels: str = "yuv420p") -> Path:
    """Write (T, H, W, 3) uint8 RGB frames; the suffix names the container."""
    import av

    with av.open(str(path), mode="w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pixels
        stream.bit_rate = 4_000_000
        for array in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_gif(path: Path, frames: Sequence[np.ndarray], durations_ms: Sequence[int]) -> Path:
    """Write grey (H, W) uint8 frames."""
    from PIL import Image

    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=list(durations_ms), loop=0)
    return path
