"""What a file is, told from its first bytes, and the headers of the single-file volume formats.

Nothing here decodes voxels. Sizes that the header promises are compared with the bytes that are there, so that a cut
file is found when it is indexed and not when it is cached.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import ImageError

HEAD_BYTES = 4096
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
"""LPS to RAS, and back."""

DICOM_KINDS = ("dicom", "dicom_wsi")
VOLUME_KINDS = ("nifti", "nifti_gz", "nrrd", "metaimage")
IMAGE_KINDS = ("png", "jpeg", "tiff", "gif", "bmp")
VIDEO_KINDS = ("avi", "mp4", "mpeg_ps", "mpeg_es", "mpeg_ts", "mkv", "asf")
CONTAINER_KINDS = ("zip", "tar", "gzip", "bzip2", "xz")
KINDS: dict[str, str] = {
    "dicom": "DICOM, with or without preamble",
    "dicom_wsi": "DICOM whose class is VL Whole Slide Microscopy",
    "dicomdir": "DICOM directory: no pixels, a hint at most",
    "nifti": "NIfTI-1 or NIfTI-2, one file or the header of a pair",
    "nifti_gz": "the same, compressed",
    "nrrd": "NRRD, or NHDR with detached data",
    "metaimage": "MHA, or MHD with detached data",
    "png": "PNG or APNG",
    "jpeg": "JPEG; also the start of a MIRAX slide",
    "tiff": "TIFF or BigTIFF: `image_headers` tells slides, OME-TIFF and plain ones apart by their tags",
    "gif": "GIF, one picture or several",
    "bmp": "Windows bitmap",
    "avi": "AVI",
    "mp4": "MP4 or QuickTime",
    "mpeg_ps": "MPEG program stream",
    "mpeg_es": "MPEG-1 or MPEG-2 video without a container",
    "mpeg_ts": "MPEG transport stream",
    "mkv": "Matroska or WebM",
    "asf": "ASF (WMV)",
    "zip": "zip",
    "tar": "tar",
    "gzip": "gzip of something else than NIfTI (a tar, a single file)",
    "bzip2": "bzip2",
    "xz": "xz",
    "sidecar": "JSON of a converter such as dcm2niix",
    "image": "an image format that has no reader",
    "empty": "no bytes",
    "other": "none of these",
}
"""Everything that `sniff` returns."""

_SIGNATURES = (
    (b"\x89PNG\r\n", "png"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0\x08\0\0\0", "tiff"),
    (b"MM\0+\0\x08\0\0", "tiff"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"\0\0\x01\xba", "mpeg_ps"),
    (b"\0\0\x01\xb3", "mpeg_es"),
    (b"\x1aE\xdf\xa3", "mkv"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x8bJXL", "image"),  # JPEG XL in a box file starts as JPEG 2000 does
    (b"\0\0\0\x0cJXL ", "image"),
    (b"\xff\x0a", "image"),
    (b"\0\0\0\x0cjP", "image"),
    (b"\xff\x4f\xff\x51", "image"),
    (b"ZISRAWFILE", "image"),
)
_STILL_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis", b"jp2 ", b"jpx ", b"jxl ")
_QUICKTIME_BOXES = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_UID = re.compile(rb"[0-9.]+")
_KIND_OF_CLASS = {b"1.2.840.10008.1.3.10": "dicomdir", b"1.2.840.10008.5.1.4.1.1.77.1.6": "dicom_wsi"}
_NRRD_TYPES = {
    "signed char": "i1", "int8": "i1", "int8_t": "i1",
    "uchar": "u1", "unsigned char": "u1", "uint8": "u1", "uint8_t": "u1",
    "short": "i2", "short int": "i2", "signed short": "i2", "signed short int": "i2", "int16": "i2", "int16_t": "i2",
    "ushort": "u2", "unsigned short": "u2", "unsigned short int": "u2", "uint16": "u2", "uint16_t": "u2",
    "int": "i4", "signed int": "i4", "int32": "i4", "int32_t": "i4",
    "uint": "u4", "unsigned int": "u4", "uint32": "u4", "uint32_t": "u4",
    "longlong": "i8", "long long": "i8", "long long int": "i8", "int64": "i8", "int64_t": "i8",
    "ulonglong": "u8", "unsigned long long": "u8", "uint64": "u8", "uint64_t": "u8",
    "float": "f4", "double": "f8",
}  # fmt: skip
MAX_INFLATED_BYTES = 1 << 28
"""Where the length of compressed voxels is in doubt, so much is inflated to see; bombs inflate to more than anybody can wait for."""
MAX_NRRD_LINE = 512
"""ITK writes faulty lines of an NRRD header into fixed buffers for its message: 1,000 characters end the process."""
MAX_TEXT_HEADER = 1 << 20
MAX_META_TEXT = 255
"""ITK reads Name and Comment into fixed buffers: 300 characters end the process."""
_META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip


@dataclass(frozen=True)
class VolumeHeader:
    """The header of a NIfTI, NRRD or MetaImage file.

    Args:
        format: `nifti`, `nrrd` or `metaimage`.
        shape: Array size as stored, trailing axes of length one removed.
        dtype: Stored type, for instance `int16`; `rgb` for structured ones.
        affine: Voxel centre index of the stored axes to RAS+ mm, or None when spacing is missing.
        slice_axis: Stored axis along which slices lie, when the header says so.
        flags: Quality flags.
        reason: Why the volume cannot be used, or None.
        data_files: Names of detached data files, relative to the header's folder.
    """

    format: str
    shape: tuple[int, ...]
    dtype: str
    affine: np.ndarray | None
    slice_axis: int | None = None
    flags: tuple[str, ...] = ()
    reason: str | None = None
    data_files: tuple[str, ...] = ()


def sniff(head: bytes) -> str:
    """Tell a file's kind from its first bytes, never from its name.

    Returns:
        A key of `KINDS`.
    """
    if not head:
        return "empty"
    if head[128:132] == b"DICM":
        return _dicom_kind(head)
    if head[:7] == b"NRRD000":
        return "nrrd"
    if _is_nifti(head):
        return "nifti"
    if head[:2] == b"\x1f\x8b":
        return "nifti_gz" if _is_nifti(inflate(head, 540)) else "gzip"
    for signature, kind in _SIGNATURES:
        if head.startswith(signature):
            return kind
    if head[:4] == b"RIFF":
        return {b"AVI ": "avi", b"WEBP": "image"}.get(head[8:12], "other")
    if head[4:8] == b"ftyp":
        return "image" if head[8:12] in _STILL_BRANDS else "mp4"
    # QuickTime before 2001 has no `ftyp`; its first box has a size of its own, 1 (64 bits follow) or 8 and more.
    if head[4:8] in _QUICKTIME_BOXES and len(head) >= 16 and (head[:4] == b"\0\0\0\1" or head[:4] >= b"\0\0\0\x08"):
        return "mp4"
    if _is_bmp(head):
        return "bmp"
    if is_tar(head):
        return "tar"
    text = head[:1024]
    if b"NDims" in text and (b"ElementType" in head or b"ElementDataFile" in head or b"ObjectType" in text):
        return "metaimage"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{":
        return "sidecar" if b'"Modality"' in head else "other"
    if len(head) > 376 and head[0] == head[188] == head[376] == 0x47:
        return "mpeg_ts"
    # DICOM without a preamble starts with a data element of group 0002 or 0008, in either byte order.
    if len(head) >= 8 and (head[:2] in (b"\x02\0", b"\x08\0") or head[:2] in (b"\0\x02", b"\0\x08")) and _plausible(head):
        return _dicom_kind(head)
    return "other"


def _dicom_kind(head: bytes) -> str:
    """Look for MediaStorageSOPClassUID (0002,0002) or SOPClassUID (0008,0016), in both byte orders and VR forms."""
    for tag in (b"\x02\0\x02\0", b"\x08\0\x16\0", b"\0\x02\0\x02", b"\0\x08\0\x16"):
        place = head.find(tag)
        # Tag, VR and length take eight bytes in every form that can hold a UID; what follows it is no digit.
        uid = _UID.match(head, place + 8) if place >= 0 else None
        if uid is not None and uid.group() in _KIND_OF_CLASS:
            return _KIND_OF_CLASS[uid.group()]
    return "dicom"


def _is_bmp(head: bytes) -> bool:
    if head[:2] != b"BM" or len(head) < 26:
        return False
    offset, header = struct.unpack_from("<II", head, 10)
    return header in (12, 40, 52, 56, 64, 108, 124) and 14 + header <= offset < 1 << 20


def is_tar(head: bytes) -> bool:
    """Return whether a block starts a tar archive: the checksum of its header fits (POSIX, GNU and the old form alike)."""
    if len(head) < 512 or not head[0]:
        return False
    try:
        stated = int(head[148:156].strip(b" \0") or b"x", 8)
    except ValueError:
        return False
    # The checksum counts its own field as spaces; some old writers summed signed bytes.
    block = np.frombuffer(head[:148] + b" " * 8 + head[156:512], np.uint8)
    return stated in (int(block.sum(dtype=np.int64)), int(block.view(np.int8).sum(dtype=np.int64)))


def _plausible(head: bytes) -> bool:
    order = "<" if head[1] == 0 else ">"
    element, length = struct.unpack_from(f"{order}HI", head, 2)
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    return bool(element < 0x3000 and (explicit or length < 65536))


def _is_nifti(head: bytes) -> bool:
    if len(head) < 348:
        return False
    if head[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c"):
        return head[344:347] in (b"n+1", b"ni1")
    return head[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") and head[4:7] in (b"n+2", b"ni2")


def inflate(data: bytes, n: int) -> bytes:
    """Return up to n bytes of what a gzip stream starts with; less when the stream is damaged."""
    try:
        return zlib.decompressobj(31).decompress(data, n)
    except zlib.error:
        return b""


def read_volume_header(path: Path, kind: str, head: bytes) -> VolumeHeader:
    """Read the header of a file that `sniff` called `nifti`, `nifti_gz`, `nrrd` or `metaimage`.

    Args:
        path: The file.
        kind: What `sniff` returned.
        head: Its first `HEAD_BYTES` bytes.

    Raises:
        ImageError: The header cannot be parsed (`unreadable`) or data are missing (`truncated`).
    """
    try:
        if kind in ("nifti", "nifti_gz"):
            return _nifti(path, kind, head)
        return _nrrd(path) if kind == "nrrd" else _metaimage(path)
    except (ValueError, KeyError, IndexError, struct.error, OverflowError) as err:
        if isinstance(err, ImageError):
            raise
        raise ImageError("unreadable", f"{kind} header cannot be parsed ({type(err).__name__}); write the file again") from err


def parse_nifti(head: bytes) -> Any:
    """Return nibabel's header object for the first bytes of an uncompressed NIfTI-1 or NIfTI-2 file."""
    import nibabel as nib

    two = head[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c")
    if len(head) < (540 if two else 348):
        raise ValueError("too short")
    # Header extensions stay unread: they may be longer than `head`, and nothing in them is needed.
    return nib.Nifti2Header(head[:540], check=False) if two else nib.Nifti1Header(head[:348], check=False)


def nifti_geometry(header: Any) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Return the affine in RAS+ mm (None when spacing is missing) and flags.

    The choice between sform, qform and bare voxel sizes is nibabel's. The header's length unit is honoured: nibabel
    leaves metres and micrometres as they are.
    """
    flags: list[str] = []
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except Exception:  # nibabel raises its own HeaderDataError for impossible quaternions
        return None, ()
    if int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0:
        flags.append("orientation_unknown")
    if int(header["sform_code"]) <= 0:
        zooms = np.asarray(header["pixdim"], dtype=np.float64)[1:4]
        if not np.all(np.isfinite(zooms)) or np.any(zooms == 0):
            return None, tuple(flags)
    scale = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)
    if scale != 1.0:
        affine[:3] *= scale
        flags.append("units_converted")
    return _usable(affine), tuple(flags)


def _usable(affine: np.ndarray) -> np.ndarray | None:
    """Return the affine if it is finite and its axes have lengths, else None."""
    with np.errstate(over="ignore", invalid="ignore"):  # 1e200 mm is finite, its square is not
        columns = np.linalg.norm(affine[:3, :3], axis=0)
    return affine if np.all(np.isfinite(affine)) and np.all(np.isfinite(columns)) and np.all(columns > 0) else None


def _nifti(path: Path, kind: str, head: bytes) -> VolumeHeader:
    header = parse_nifti(inflate(head, 1024) if kind == "nifti_gz" else head)
    shape = squeeze_shape(tuple(int(n) for n in header.get_data_shape()))
    try:
        dtype = np.dtype(header.get_data_dtype())
    except Exception as err:
        raise ImageError(
            "unreadable", f"NIfTI data type code {int(header['datatype'])} is not known; write the file again"
        ) from err
    if any(n <= 0 for n in shape):
        raise ImageError("unreadable", f"NIfTI header with size {shape}; sizes are 1 or more; write the file again")
    scalar = dtype.kind in "iuf" and dtype.itemsize <= 8
    affine, flags = nifti_geometry(header)
    if bytes(header["magic"].tobytes())[:2] == b"ni":
        raise ImageError("unsupported_format", "NIfTI header with a separate .img file; store it as one .nii or .nii.gz")
    expected = int(header["vox_offset"]) + int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
    if kind == "nifti_gz":
        _check_gzip(path, expected)
    else:
        _check_size(os.path.getsize(path), expected)
    slice_axis = header.get_dim_info()[2]
    reason = volume_fault(shape, affine) if scalar else "not_scalar"
    return VolumeHeader("nifti", shape, str(dtype) if scalar else "rgb", affine, slice_axis, flags, reason)


def squeeze_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape without axes of length one behind the third."""
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def volume_fault(shape: tuple[int, ...], affine: np.ndarray | None) -> str | None:
    """Return the reason for which a scalar volume of this shape and affine cannot be used, or None."""
    if len(shape) != 3:
        return "not_3d"
    if min(shape) < 2:
        return "single_slice"
    if affine is None:
        return "no_spacing"
    return None if is_orthogonal(affine) else "bad_orientation"


def is_orthogonal(affine: np.ndarray, tolerance: float = 0.01) -> bool:
    """Return whether the axes are perpendicular within about half a degree (cosine at most `tolerance`)."""
    columns = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = np.abs(columns.T @ columns - np.eye(3))
    return bool(np.max(cosines) <= tolerance)


def _check_size(size: int, expected: int) -> None:
    if size < expected:
        raise ImageError("truncated", f"{size} bytes where the header promises {expected}; copy the file again from its source")


def _check_gzip(path: Path, expected: int) -> None:
    """Compare the length in the gzip trailer with the header; only where they differ, inflate to find the truth."""
    if _gzip_length(path) == expected % 2**32:
        return
    import gzip

    size, enough = 0, min(expected, MAX_INFLATED_BYTES)
    with contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile), gzip.open(path, "rb") as stream:
        while size < enough and (block := stream.read(1 << 20)):
            size += len(block)
    _check_size(size, enough)


def _gzip_length(path: Path) -> int:
    """Return what the last four bytes of a file say: the length of a gzip stream of one member, modulo 4 GB."""
    with open(path, "rb") as handle:
        handle.seek(-4, os.SEEK_END)
        return int.from_bytes(handle.read(4), "little")


def _fields(path: Path, separator: str, end: str) -> tuple[dict[str, str], int]:
    """Read `key <separator> value` lines up to the end marker; return them and the offset of the data behind."""
    fields: dict[str, str] = {}
    with open(path, "rb") as handle:
        while line := handle.readline(65536):
            text = line.decode("latin-1").strip()
            if end == "" and text == "":
                break
            key, found, value = text.partition(separator)
            if found and not text.startswith("#"):
                fields.setdefault(key.strip(), value.lstrip("=").strip())
            if end and key.strip() == end:
                break
            if handle.tell() > MAX_TEXT_HEADER:
                raise ValueError("header longer than 1 MiB")
        return fields, handle.tell()


def _check_nrrd_lines(path: Path) -> None:
    """Refuse lines that end ITK; comments, `content` and key/value pairs may be as long as they like."""
    with open(path, "rb") as handle:
        while (line := handle.readline(MAX_TEXT_HEADER)) not in (b"", b"\n", b"\r\n") and handle.tell() <= MAX_TEXT_HEADER:
            if len(line) > MAX_NRRD_LINE and not line.startswith((b"#", b"content:")) and b":=" not in line[:MAX_NRRD_LINE]:
                raise ImageError(
                    "unreadable", f"an NRRD header line of more than {MAX_NRRD_LINE} characters, which ends ITK; shorten it"
                )


def _vectors(text: str) -> np.ndarray:
    rows = [part.strip(" ()") for part in text.replace(") (", ")|(").replace(")(", ")|(").split("|")]
    return np.array([[float(value) for value in row.split(",")] for row in rows if row and row != "none"])


def _nrrd(path: Path) -> VolumeHeader:
    _check_nrrd_lines(path)
    fields, offset = _fields(path, ":", "")
    fields = {key.lower(): value for key, value in fields.items()}
    shape = tuple(int(n) for n in fields["sizes"].split())
    dtype = _NRRD_TYPES.get(fields["type"].lower())
    kinds = fields.get("kinds", "").lower().split()
    if len(shape) > 3 and any(kind.endswith(("vector", "color", "matrix")) or kind in ("list", "rgb-color") for kind in kinds):
        return VolumeHeader("nrrd", shape, dtype or "other", None, reason="not_scalar" if "list" not in kinds else "not_3d")
    affine, flags = _nrrd_geometry(fields)
    data = fields.get("data file", fields.get("datafile", ""))
    names = tuple(data.split()[:1]) if data and not data.startswith("LIST") else ()
    if dtype is None or data.startswith("LIST") or "%" in data:
        return VolumeHeader("nrrd", shape, dtype or "other", affine, flags=flags, reason="unsupported_pixels")
    header = VolumeHeader(
        "nrrd", shape, str(np.dtype(dtype)), affine, flags=flags, reason=volume_fault(shape, affine), data_files=names
    )
    if names:
        file, offset = _beside(path, names[0]), 0
    else:
        file = path
    expected = int(np.prod([int(n) for n in shape], dtype=object)) * np.dtype(dtype).itemsize
    encoding = fields.get("encoding", "raw").lower()
    if encoding == "raw":
        _check_size(os.path.getsize(file) - offset, expected)
    elif encoding in ("gzip", "gz") and not names:
        _check_inner_gzip(file, offset, expected)
    return header


def _check_inner_gzip(path: Path, offset: int, expected: int) -> None:
    if _gzip_length(path) == expected % 2**32:
        return
    size, enough = 0, min(expected, MAX_INFLATED_BYTES)
    stream = zlib.decompressobj(31)
    with open(path, "rb") as handle, contextlib.suppress(zlib.error):
        handle.seek(offset)
        while size < enough and (block := stream.unconsumed_tail or handle.read(1 << 16)):
            size += len(stream.decompress(block, 1 << 20))
    _check_size(size, enough)


def _nrrd_geometry(fields: dict[str, str]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    space = fields.get("space", "").lower()
    signs = {
        "": (-1, -1, 1), "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
        "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1), "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
    }.get(space, (-1, -1, 1))  # fmt: skip
    affine = np.eye(4)
    if "space directions" in fields:
        directions = _vectors(fields["space directions"])
        if directions.shape != (3, 3):
            return None, ()
        affine[:3, :3] = directions.T
        if "space origin" in fields:
            affine[:3, 3] = _vectors(fields["space origin"])[0]
        flags: tuple[str, ...] = ()
    elif "spacings" in fields:
        spacings = [float(value) for value in fields["spacings"].split()][:3]
        if len(spacings) < 3:
            return None, ()
        affine[:3, :3] = np.diag(spacings)
        flags = ("orientation_unknown",)
    else:
        return None, ()
    return _usable(affine * np.array([*signs, 1.0])[:, None]), flags


def _metaimage(path: Path) -> VolumeHeader:
    fields, offset = _fields(path, "=", "ElementDataFile")
    if any(len(fields.get(name, "")) > MAX_META_TEXT for name in ("Name", "Comment")):
        raise ImageError("unreadable", f"a MetaImage text of more than {MAX_META_TEXT} characters, which ends ITK; shorten it")
    ndim = int(fields["NDims"])
    shape = tuple(int(n) for n in fields["DimSize"].split())[:ndim]
    dtype = _META_TYPES.get(fields["ElementType"])
    if int(fields.get("ElementNumberOfChannels", "1")) != 1:
        return VolumeHeader("metaimage", shape, dtype or "other", None, reason="not_scalar")
    data = fields["ElementDataFile"]
    if dtype is None or data.startswith("LIST") or "%" in data:
        return VolumeHeader("metaimage", shape, dtype or "other", None, reason="unsupported_pixels")
    affine: np.ndarray | None = None
    spacing = fields.get("ElementSpacing", fields.get("ElementSize"))
    if ndim == 3 and spacing is not None:
        sizes = np.array([float(value) for value in spacing.split()])
        matrix = fields.get("TransformMatrix", fields.get("Orientation", fields.get("Rotation", "1 0 0 0 1 0 0 0 1")))
        origin = fields.get("Offset", fields.get("Origin", fields.get("Position", "0 0 0")))
        # MetaImage lists one direction per row of text: the columns of the direction matrix.
        columns = np.array([float(value) for value in matrix.split()]).reshape(3, 3).T
        affine = np.eye(4)
        with np.errstate(over="ignore", invalid="ignore"):
            affine[:3, :3] = columns * sizes
        affine[:3, 3] = [float(value) for value in origin.split()]
        affine = _usable(affine * np.diag(FLIP)[:, None]) if np.all(sizes > 0) else None
    local = data.upper() == "LOCAL"
    header = VolumeHeader(
        "metaimage",
        squeeze_shape(shape),
        str(np.dtype(dtype)),
        affine,
        flags=() if "TransformMatrix" in fields or "Orientation" in fields else ("orientation_unknown",),
        reason=volume_fault(squeeze_shape(shape), affine),
        data_files=() if local else (data,),
    )
    file = path if local else _beside(path, data)
    size = os.path.getsize(file) - (offset if local else 0)
    if fields.get("CompressedData", "False").lower() == "true":
        _check_size(size, int(fields.get("CompressedDataSize", "1")))
    else:
        _check_size(size, int(np.prod([int(n) for n in shape], dtype=object)) * np.dtype(dtype).itemsize)
    return header


def _beside(path: Path, name: str) -> Path:
    file = path.parent / name
    if not file.is_file():
        raise ImageError("truncated", "the data file that the header names is missing; put it beside the header")
    return file
