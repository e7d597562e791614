"""Decode one slice or frame of a DICOM file to its stored values, whatever the transfer syntax."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.headers.decoders import decoders
from medssl.archive.headers.dicom_header import UNCOMPRESSED, Header, syntax_name
from medssl.archive.headers.dicom_raw import BoundedFile
from medssl.domains.volume_stack import scaler
from medssl.errors import ImageError

_END_OF_JPEG = b"\xff\xd9"
Pixels = tuple[np.ndarray, bool]
"""(rows, columns) values, and whether slope and intercept are applied already."""


def load_slice(path: Path, header: Header, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode one slice and apply its slope and intercept.

    Args:
        path: The file.
        header: Its header; `frame` is the number of a frame in a compressed multi-frame file and `frame_spans` where its
            frames lie (see `frame_spans`). In an uncompressed one `pixel_offset` points to the frame.
        shape: Rows and columns expected.

    Returns:
        Values (rows, columns), and True where a voxel is padding, or None.

    Raises:
        ImageError: `no_decoder`, or `unreadable` when every decoder fails.
    """
    pixels, scaled = stored_values(path, header)
    if pixels.shape != shape:
        raise ImageError("unreadable", "a slice decodes to another size than its header states; copy it again")
    limits = padding_limits(header)
    slope, intercept = float(header.get("slope", 1.0)), float(header.get("intercept", 0.0))
    if scaled:
        if limits is None:
            return pixels, None
        low, high = sorted(limit * slope + intercept for limit in limits)
        return pixels, (pixels >= low) & (pixels <= high)
    invalid = None if limits is None else (pixels >= limits[0]) & (pixels <= limits[1])
    bits, allocated = int(header.get("bits_stored") or 0), int(header["bits_allocated"])
    if 0 < bits < allocated and pixels.dtype.itemsize * 8 == allocated and pixels.dtype.kind in "iu":
        shift = allocated - bits
        pixels = (pixels << shift) >> shift
    return scaler(slope, intercept)(pixels), invalid


def padding_limits(header: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the lowest and highest raw word that means padding, or None.

    Zero is honoured in CT only: MR scanners state it although air around the patient is measured as zero too.
    """
    value = header.get("padding")
    if value is None or (value == 0 and header.get("modality") != "CT"):
        return None
    words = [int(value), int(header.get("padding_limit") or value)]
    if header.get("pixel_representation") and int(header["bits_allocated"]) == 16:
        words = [(word ^ 0x8000) - 0x8000 for word in words]
    return min(words), max(words)


def stored_values(path: Path, header: Header) -> Pixels:
    """Return the stored values of one slice or frame, through the first decoder that can.

    Raises:
        ImageError: See `load_slice`.
    """
    names = decoders(header["syntax"])
    if not names:
        raise ImageError(
            "no_decoder",
            f"no decoder for {syntax_name(header['syntax'])} pixels; install the extra with "
            '`pip install "medssl[dicom]"`, then index again',
        )
    failure: Exception | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's warnings quote values of the header
        for name in names:
            try:
                return _DECODERS[name](path, header)
            except OSError:
                raise
            except Exception as err:  # decoders raise many classes on damaged streams
                failure = failure or err
    if isinstance(failure, ImageError):
        raise failure
    raise ImageError(
        "unreadable", f"a slice could not be decoded ({type(failure).__name__}); copy it again from its source"
    ) from failure


def _shape(header: Header) -> tuple[int, int]:
    return int(header["rows"]), int(header["columns"])


def _dtype(header: Header, order: str = "<") -> np.dtype[Any]:
    return np.dtype(f"{order}{'i' if header.get('pixel_representation') else 'u'}{int(header['bits_allocated']) // 8}")


def _as_stored(pixels: np.ndarray, header: Header) -> np.ndarray:
    """Give decoded words the signedness that the header states: codecs know words only."""
    want = "i" if header.get("pixel_representation") else "u"
    if pixels.dtype.kind in "iu" and pixels.dtype.kind != want:
        pixels = pixels.view(f"{want}{pixels.dtype.itemsize}")
    return pixels


def _pydicom(path: Path, header: Header) -> Pixels:
    if header["syntax"] in UNCOMPRESSED:
        return _native(path, header), False
    from pydicom.encaps import encapsulate
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    frame = _frame_bytes(path, header)
    pixels, _ = get_decoder(UID(header["syntax"])).as_array(
        encapsulate([frame], has_bot=False),
        index=0,
        raw=True,
        rows=int(header["rows"]),
        columns=int(header["columns"]),
        number_of_frames=1,
        samples_per_pixel=1,
        bits_allocated=int(header["bits_allocated"]),
        bits_stored=int(header.get("bits_stored") or header["bits_allocated"]),
        pixel_representation=int(header.get("pixel_representation") or 0),
        photometric_interpretation=header.get("photometric", "MONOCHROME2"),
        pixel_keyword="PixelData",
    )
    return np.asarray(pixels), False


def _native(path: Path, header: Header) -> np.ndarray:
    big = UNCOMPRESSED[header["syntax"]] == "explicit_be"
    if header["pixel_offset"] is None or header["pixel_length"] is None or (big and header["bits_allocated"] == 8):
        # Deflated, or bytes that may be swapped in pairs: pydicom knows the cases.
        return _whole_file(path, header)
    dtype = _dtype(header, ">" if big else "<")
    rows, columns = _shape(header)
    size = rows * columns * dtype.itemsize
    with open(path, "rb") as handle:
        handle.seek(header["pixel_offset"])
        data = handle.read(min(size, header["pixel_length"]))
    if len(data) < size:
        raise ImageError("truncated", "a slice has fewer bytes than pixels; copy the series again from its source")
    return np.frombuffer(data, dtype=dtype).reshape(rows, columns).astype(dtype.newbyteorder("="), copy=False)


def _whole_file(path: Path, header: Header) -> np.ndarray:
    import pydicom

    with BoundedFile(path) as handle:
        dataset = pydicom.dcmread(handle, force=True)
    if not getattr(dataset, "file_meta", None) or "TransferSyntaxUID" not in dataset.file_meta:
        if not hasattr(dataset, "file_meta"):
            dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(header["syntax"])
    pixels = np.asarray(dataset.pixel_array)
    return pixels[int(header.get("frame", 0))] if pixels.ndim == 3 else pixels


def _openjpeg(path: Path, header: Header) -> Pixels:
    import openjpeg

    decode: Callable[[bytes], np.ndarray] = vars(openjpeg)["decode"]
    return _as_stored(np.asarray(decode(_frame_bytes(path, header))), header), False


def _imagecodecs(path: Path, header: Header) -> Pixels:
    import imagecodecs

    name = syntax_name(header["syntax"])
    decode: Callable[[bytes], np.ndarray]
    if name.startswith("jpeg_ls"):
        decode = imagecodecs.jpegls_decode
    elif name.startswith("jpeg2000"):
        decode = imagecodecs.jpeg2k_decode
    elif name.startswith("htj2k"):
        decode = imagecodecs.htj2k_decode
    else:
        decode = imagecodecs.jpeg8_decode
    pixels = np.asarray(decode(_frame_bytes(path, header)))
    return _as_stored(pixels, header), False


def _itk(path: Path, header: Header) -> Pixels:
    import SimpleITK as sitk

    if header.get("photometric", "MONOCHROME2") != "MONOCHROME2":
        raise ImageError("photometric", 'GDCM inverts such values; install another decoder with `pip install "medssl[dicom]"`')
    sitk.ProcessObject.GlobalWarningDisplayOff()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    array: np.ndarray = sitk.GetArrayFromImage(reader.Execute())
    if array.ndim == 3:
        array = array[int(header.get("frame", 0))]
    return array, True


_DECODERS: dict[str, Callable[[Path, Header], Pixels]] = {
    "pydicom": _pydicom,
    "openjpeg": _openjpeg,
    "imagecodecs": _imagecodecs,
    "itk": _itk,
}

Span = list[tuple[int, int]]
"""Offset and length of each fragment of a frame."""


def _frame_bytes(path: Path, header: Header) -> bytes:
    spans = header.get("frame_spans")
    if spans is None:
        spans = frame_spans(path, header, int(header.get("n_frames") or 1))
    with open(path, "rb") as handle:
        parts = []
        for offset, length in spans[int(header.get("frame", 0))]:
            handle.seek(offset)
            parts.append(handle.read(length))
    return b"".join(parts)


def frame_spans(path: Path, header: Header, n_frames: int) -> list[Span]:
    """Find the fragments of each frame of encapsulated pixels; only their headers are read.

    Fragments are given to frames one to one where there are as many, else by the offset table, else by the end-of-image
    marks of JPEG.

    Raises:
        ImageError: `truncated` or `unreadable`: they do not add up to the frames stated.
    """
    if header["pixel_offset"] is None:
        raise ImageError("unreadable", "compressed pixels that cannot be found; copy the file again from its source")
    fragments: Span = []
    with open(path, "rb") as handle:
        handle.seek(header["pixel_offset"])
        table = b""
        while True:
            head = handle.read(8)
            if len(head) < 8:
                break  # some writers leave the final delimiter out
            group, element, length = struct.unpack("<HHI", head)
            if (group, element) != (0xFFFE, 0xE000):
                break
            start = handle.tell()
            if start == header["pixel_offset"] + 8:
                table = handle.read(length)
            else:
                fragments.append((start, length))
            handle.seek(start + length)
        if handle.seek(0, 2) < sum(fragments[-1]) if fragments else True:
            raise ImageError("truncated", "compressed pixels end early; copy the file again from its source")
        if len(fragments) == n_frames:
            return [[fragment] for fragment in fragments]
        if n_frames == 1:
            return [fragments]
        if len(table) == 4 * n_frames:
            return _by_table(fragments, struct.unpack(f"<{n_frames}I", table))
        spans: list[Span] = [[]]
        for offset, length in fragments:
            spans[-1].append((offset, length))
            handle.seek(offset + max(0, length - 10))
            if _END_OF_JPEG in handle.read(min(length, 10)):
                spans.append([])
    spans = [span for span in spans if span]
    if len(spans) != n_frames:
        raise ImageError("unreadable", "compressed fragments that cannot be told apart; write the file with an offset table")
    return spans


def _by_table(fragments: Span, table: tuple[int, ...]) -> list[Span]:
    first = fragments[0][0] - 8
    starts = [first + offset for offset in table]
    spans: list[Span] = [[] for _ in starts]
    for offset, length in fragments:
        k = int(np.searchsorted(starts, offset - 8, side="right")) - 1
        spans[max(k, 0)].append((offset, length))
    if not all(spans):
        raise ImageError("unreadable", "an offset table that misses frames; copy the file again from its source")
    return spans
