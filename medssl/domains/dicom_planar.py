"""Read DICOM images that are no volume: radiographs and ultrasound, one frame or many, grey, palette or colour.

Stored words are cut to BitsStored (older files keep an overlay in the unused bits; 60xx overlays are never drawn), padding is
marked, the modality LUT or rescale is applied exactly, and MONOCHROME1 is turned round so that bright means what it means in
MONOCHROME2. The window or VOI LUT is found out and reported; it is applied only when asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.headers.dicom_header import COMPRESSED, LOSSY_SYNTAXES, UNCOMPRESSED, find_decoder, syntax_name
from medssl.archive.headers.dicom_raw import BoundedFile
from medssl.archive.reasons import SERIES_REASONS
from medssl.archive.rows.roles import modality_of
from medssl.domains.planar import check_size, frame_indices, os_fault, quiet_decoders
from medssl.errors import ImageError

COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
LEAST = 2
"""Frames that a damaged cine must have before the damage."""


@dataclass
class PlanarPixels:
    """The decoded frames of one DICOM file.

    Args:
        frames: (T, C, H, W) uint8, int16, uint16, wider integers or float64: after the modality LUT, with MONOCHROME1 inverted.
        header: The pydicom data set, without pixels.
        modality: Of the closed list of the index, or `unknown`.
        n_frames: Frames of the file, of which `frames` holds those asked for.
        valid: (H, W) bool, False = padding in every frame; None when everything is valid.
        inverted: Whether values were turned round.
        window: (low, high) in the values of `frames` that the first window or VOI LUT maps to black and white; None without one.
        flags: Quality flags.
    """

    frames: np.ndarray
    header: Any
    n_frames: int
    modality: str = "unknown"
    valid: np.ndarray | None = None
    inverted: bool = False
    window: tuple[float, float] | None = None
    flags: list[str] = field(default_factory=list)


def read_planar_dicom(
    path: Path,
    part: Mapping[str, Any] | None = None,
    *,
    modalities: Sequence[str],
    domain: str,
    voi: bool = False,
    prefix: bool = False,
) -> PlanarPixels:
    """Read frames of one DICOM file.

    Args:
        path: The file.
        part: Which frames; None reads all.
        modalities: DICOM modalities that the domain takes; a file that states none is taken.
        domain: Name of the domain, for messages.
        voi: Apply the VOI LUT or window; frames become float64.
        prefix: Where a file of several frames is cut short, or a frame cannot be decoded, use the frames before, at least two, and flag
            `prefix_only`.

    Raises:
        ImageError: `no_domain`, `no_decoder`, `truncated`, `unreadable`, `unsupported_pixels`, `photometric`, `not_image`.
    """
    quiet_decoders()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's warnings quote values of the header
        try:
            return _read(path, part, modalities, domain, voi, prefix)
        except ImageError:
            raise
        except MemoryError as err:
            raise ImageError("unsupported_pixels", "the image does not fit into memory; leave it out") from err
        except OSError as err:
            raise os_fault(err) from err
        except Exception as err:  # pydicom and its decoders raise many classes on damaged files
            raise ImageError(
                "unreadable", f"a DICOM image could not be decoded ({type(err).__name__}); copy it again from its source"
            ) from err


def _read(
    path: Path, part: Mapping[str, Any] | None, modalities: Sequence[str], domain: str, voi: bool, prefix: bool
) -> PlanarPixels:
    header = _open(path)
    modality = modality_of({"modality": text(header, "Modality") or "unknown", "sop_class_uid": text(header, "SOPClassUID")})
    if modality != "unknown" and modality not in modalities:
        raise ImageError(
            "no_domain",
            f"another modality in the domain {domain}, which takes {', '.join(modalities)}; change the recipe's query",
        )
    rows, columns = whole(header, "Rows"), whole(header, "Columns")
    if "PixelData" not in header or rows is None or columns is None:
        raise ImageError("not_image", "a DICOM object without integer pixels; leave it out")
    samples, allocated = whole(header, "SamplesPerPixel") or 1, whole(header, "BitsAllocated") or 0
    photometric = text(header, "PhotometricInterpretation") or "MONOCHROME2"
    if allocated not in (8, 16, 32) or samples not in (1, 3) or (samples == 3) != (photometric in COLOUR):
        raise ImageError("unsupported_pixels", f"{samples} samples of {allocated} bits with this colour model have no reader")
    if photometric not in (*COLOUR, *MONOCHROME, "PALETTE COLOR"):
        raise ImageError("photometric", f"{SERIES_REASONS['photometric']} or colour; leave it out or convert it")
    n_frames = max(1, whole(header, "NumberOfFrames") or 1)
    header.NumberOfFrames = n_frames  # a malformed count would make pydicom raise
    indices = frame_indices(part, n_frames)
    check_size(rows, columns, rows * columns * samples * (allocated // 8) * len(indices))
    syntax = str(header.file_meta.TransferSyntaxUID)
    stated = rows * columns * samples * n_frames * (allocated // 8)
    stated = stated * 2 // 3 if photometric == "YBR_FULL_422" else stated
    pixels = PlanarPixels(np.empty(0), header, n_frames, modality)
    if syntax in UNCOMPRESSED and len(header.PixelData) < stated:
        there = len(header.PixelData) * n_frames // stated
        indices = [index for index in indices if index < there]
        if not prefix or len(indices) < LEAST:
            raise ImageError("truncated", "fewer bytes than pixels; copy the file again from its source")
        header.NumberOfFrames = there
        pixels.flags.append("prefix_only")
    if text(header, "LossyImageCompression") == "01" or syntax_name(syntax) in LOSSY_SYNTAXES:
        pixels.flags.append("lossy")
    words = _decode(path, header, syntax, indices, prefix)
    if len(words) < len(indices):
        pixels.flags.append("prefix_only")
    if words.shape[1:3] != (rows, columns) or len(words) > len(indices):
        raise ImageError("unreadable", "frames decode to another size than the header states; copy the file again")
    if photometric == "PALETTE COLOR":
        pixels.frames = _palette(words, header).transpose(0, 3, 1, 2)
    elif samples == 3:
        pixels.frames = words.transpose(0, 3, 1, 2)
    else:
        _grey(pixels, words, photometric, voi)
    for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"):
        if name in header:
            del header[name]
    return pixels


def _open(path: Path) -> Any:
    import pydicom

    with BoundedFile(path) as handle:
        header = pydicom.dcmread(handle, force=True)
    if not getattr(header, "file_meta", None):
        header.file_meta = pydicom.dataset.FileMetaDataset()
    if "TransferSyntaxUID" not in header.file_meta:
        implicit, little = header.original_encoding
        name = "implicit_le" if implicit else ("explicit_le" if little else "explicit_be")
        header.file_meta.TransferSyntaxUID = pydicom.uid.UID(next(uid for uid, known in UNCOMPRESSED.items() if known == name))
    return header


def _decode(path: Path, header: Any, syntax: str, indices: list[int], prefix: bool) -> np.ndarray:
    """Return (T, H, W) or (T, H, W, 3) stored words; YBR becomes RGB. With `prefix`, those before the first damaged frame."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    from medssl._compat.pydicom_frames import decoded_frames

    by = find_decoder(syntax) if syntax in UNCOMPRESSED or syntax in COMPRESSED else "none"
    if by == "none":
        raise ImageError(
            "no_decoder",
            f'no decoder for {syntax_name(syntax)} pixels; install the extra with `pip install "medssl[dicom]"`, then index again',
        )
    if by == "itk":
        return _decode_itk(path, header, indices)
    decoder = get_decoder(UID(syntax))
    frames, done = None, 0
    try:
        for frame in decoded_frames(decoder, header, indices):
            if frames is None:
                frames = np.empty((len(indices), *frame.shape), dtype=frame.dtype)
            frames[done] = frame
            done += 1
            if done == len(indices):
                break
    except MemoryError:
        raise
    except Exception:  # decoders raise many classes on damaged frames
        if not prefix or done < LEAST:
            raise
    if frames is None or (done < len(indices) and not (prefix and done >= LEAST)):
        raise ImageError("truncated", "fewer frames than the header states; copy the file again from its source")
    return frames[:done]


def _decode_itk(path: Path, header: Any, indices: list[int]) -> np.ndarray:
    import SimpleITK as sitk

    sitk.ProcessObject.GlobalWarningDisplayOff()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    array: np.ndarray = sitk.GetArrayFromImage(reader.Execute())
    if number(header, "RescaleSlope", 1.0) != 1.0 or number(header, "RescaleIntercept", 0.0) != 0.0:
        # GDCM has applied them; the words are wanted.
        array = np.rint((array - number(header, "RescaleIntercept", 0.0)) / number(header, "RescaleSlope", 1.0)).astype(np.int32)
    grey = (whole(header, "SamplesPerPixel") or 1) == 1
    array = array[None] if array.ndim == (2 if grey else 3) else array
    return array[indices]


def _palette(words: np.ndarray, header: Any) -> np.ndarray:
    """Return (T, H, W, 3): 8 bits where the 16-bit tables of old machines hold no more than that."""
    from pydicom.pixels import apply_color_lut

    colours: np.ndarray = apply_color_lut(words, header)
    if colours.dtype == np.uint16:
        first = int(header.RedPaletteColorLookupTableDescriptor[1])
        count = int(header.RedPaletteColorLookupTableDescriptor[0]) or 65536
        # Read through pydicom, because tables may be segmented.
        table = apply_color_lut(np.arange(first, first + count).astype(np.int32), header)
        for factor in (256, 257):
            if not (table % factor).any():
                return (colours // factor).astype(np.uint8)
    return colours


def stored_range(header: Any) -> tuple[int, int]:
    """Return the lowest and the highest word that BitsStored and PixelRepresentation allow."""
    bits = whole(header, "BitsStored") or whole(header, "BitsAllocated") or 16
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if whole(header, "PixelRepresentation") else (0, (1 << bits) - 1)


def _grey(pixels: PlanarPixels, words: np.ndarray, photometric: str, voi: bool) -> None:
    """Fill in frames, padding, window and inversion of single-sample words (T, H, W)."""
    header = pixels.header
    padding = _padding(words, header)
    if padding is not None and padding.any():
        pixels.valid = np.logical_not(padding.all(axis=0))
        pixels.flags.append("padding")
    words = _used_bits(words, header)
    values, (low, high) = modality_values(words, header)
    window = voi_window(header)
    if voi and window is not None:
        from pydicom.pixels import apply_voi_lut

        values = apply_voi_lut(values, header).astype(np.float64)
        table = header.get("VOILUTSequence")
        if table:
            low, high = 0.0, float((1 << int(table[0].LUTDescriptor[2])) - 1)
        window = (low, high)
    pixels.inverted = _is_inverted(header, photometric)
    if pixels.inverted:
        values = invert(values, low, high)
        window = None if window is None else (low + high - window[1], low + high - window[0])
    pixels.frames, pixels.window = values[:, None], window


def invert(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return low + high - values in the same type."""
    if values.dtype.kind == "f":
        return (low + high) - values
    total = int(low) + int(high)
    if values.dtype.itemsize <= 2:
        return (np.int32(total) - values.astype(np.int32)).astype(values.dtype)
    return total - values.astype(np.int64)


def _is_inverted(header: Any, photometric: str) -> bool:
    """Return whether larger words mean darker, less dense.

    For images made to be looked at, the photometric interpretation says so. Raw detector images (FOR PROCESSING) are
    MONOCHROME2 whichever way they run: for them PixelIntensityRelationshipSign tells whether words grow with the beam.
    """
    sign = whole(header, "PixelIntensityRelationshipSign")
    if text(header, "PresentationIntentType") == "FOR PROCESSING" and sign in (1, -1):
        return sign == 1
    return photometric == "MONOCHROME1"


def _padding(words: np.ndarray, header: Any) -> np.ndarray | None:
    value = _word(header, "PixelPaddingValue")
    if value is None:
        return None
    limit = _word(header, "PixelPaddingRangeLimit")
    low, high = sorted((value, value if limit is None else limit))
    return (words >= low) & (words <= high)


def _word(header: Any, keyword: str) -> int | None:
    """Return a US or SS value as the pixel representation reads it, whichever of the two was written."""
    value = whole(header, keyword)
    allocated = whole(header, "BitsAllocated") or 16
    if value is None:
        return None
    value &= (1 << allocated) - 1
    if whole(header, "PixelRepresentation") and value >> (allocated - 1):
        value -= 1 << allocated
    return value


def _used_bits(words: np.ndarray, header: Any) -> np.ndarray:
    """Return words without the bits above HighBit and below the stored ones."""
    allocated = words.dtype.itemsize * 8
    bits = whole(header, "BitsStored") or allocated
    top = whole(header, "HighBit")
    native = str(header.file_meta.TransferSyntaxUID) in UNCOMPRESSED
    # Codecs deliver values, not words: a high bit elsewhere has a meaning in uncompressed files only.
    top = bits - 1 if top is None or not native or not bits - 1 <= top < allocated else top
    if bits >= allocated or words.dtype.kind not in "iu":
        return words
    return (words << (allocated - 1 - top)) >> (allocated - bits)


def modality_values(words: np.ndarray, header: Any) -> tuple[np.ndarray, tuple[float, float]]:
    """Apply the modality LUT or rescale slope and intercept, exactly on integers.

    Returns:
        The values, and the lowest and highest value that the stored range maps to.
    """
    low, high = stored_range(header)
    table = header.get("ModalityLUTSequence")
    if table:
        from pydicom.pixels import apply_modality_lut

        return apply_modality_lut(words, header), (0.0, float((1 << int(table[0].LUTDescriptor[2])) - 1))
    slope, intercept = number(header, "RescaleSlope", 1.0), number(header, "RescaleIntercept", 0.0)
    if slope in (0.0, 1.0) and intercept == 0.0:
        return words, (float(low), float(high))
    ends = sorted((low * slope + intercept, high * slope + intercept))
    if slope.is_integer() and intercept.is_integer() and max(abs(ends[0]), abs(ends[1])) < 2**53:
        return words.astype(np.int64) * int(slope) + int(intercept), (ends[0], ends[1])
    return words.astype(np.float64) * slope + intercept, (ends[0], ends[1])


def voi_window(header: Any) -> tuple[float, float] | None:
    """Return the values that the first VOI LUT or window shows as black and as white, or None.

    Reference: DICOM PS3.3 C.11.2.1: a linear window of centre c and width w runs from c - 0.5 - (w - 1) / 2 to
    c - 0.5 + (w - 1) / 2, a LINEAR_EXACT one from c - w / 2 to c + w / 2; a sigmoid is described by the latter.
    """
    table = header.get("VOILUTSequence")
    if table:
        try:
            count, first, _ = (int(value) for value in table[0].LUTDescriptor)
        except (AttributeError, TypeError, ValueError):
            return None
        return float(first), float(first + (count or 65536) - 1)
    centre, width = number(header, "WindowCenter"), number(header, "WindowWidth")
    if centre is None or width is None:
        return None
    function = text(header, "VOILUTFunction") or "LINEAR"
    if function == "LINEAR":
        return None if width < 1 else (centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2)
    return None if width <= 0 else (centre - width / 2, centre + width / 2)


def text(header: Any, keyword: str) -> str:
    """Return the first value of a text element, stripped and in capitals; empty when absent or malformed."""
    try:
        value = header.get(keyword)
    except Exception:  # pydicom converts on access, and raises what the conversion raises
        return ""
    if value is None:
        return ""
    if not isinstance(value, str) and hasattr(value, "__iter__"):
        value = next(iter(value), "")
    return str(value).strip(" \0").upper()


def numbers(header: Any, keyword: str) -> tuple[float, ...]:
    """Return the finite numbers of an element; empty when it is absent or any of them is malformed."""
    try:
        value = header.get(keyword)
        values = (
            []
            if value is None or value == ""
            else (value if hasattr(value, "__iter__") and not isinstance(value, str) else [value])
        )
        found = tuple(float(item) for item in values)
    except Exception:
        return ()
    return found if all(np.isfinite(item) for item in found) else ()


def number(header: Any, keyword: str, default: Any = None) -> Any:
    """Return the first number of an element, or the default."""
    found = numbers(header, keyword)
    return found[0] if found else default


def whole(header: Any, keyword: str) -> int | None:
    """Return the first number of an element when it is whole, or None."""
    value = number(header, keyword)
    return int(value) if value is not None and value == int(value) else None
