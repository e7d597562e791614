"""What decodes a compressed transfer syntax on this machine."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from medssl.archive.headers.dicom_header import COMPRESSED, ITK_SYNTAXES, UNCOMPRESSED, syntax_name

_CODECS = {
    "jpeg_baseline": "JPEG8",
    "jpeg_extended": "JPEG8",
    "jpeg_lossless": "JPEG8",
    "jpeg_ls": "JPEGLS",
    "jpeg_ls_near": "JPEGLS",
    "jpeg2000_lossless": "JPEG2K",
    "jpeg2000": "JPEG2K",
    "htj2k_lossless": "HTJ2K",
    "htj2k": "HTJ2K",
}
"""Syntax name -> codec of imagecodecs."""
_WAVELETS = frozenset({"jpeg2000_lossless", "jpeg2000", "htj2k_lossless", "htj2k"})


@cache
def decoders(syntax: str) -> tuple[str, ...]:
    """Return what decodes a transfer syntax here, best first: `pydicom`, `openjpeg`, `imagecodecs`, `itk`.

    Args:
        syntax: Transfer syntax UID.
    """
    if syntax in UNCOMPRESSED:
        return ("pydicom",)
    if syntax not in COMPRESSED:
        return ()
    name = syntax_name(syntax)
    found = []
    if _pydicom(syntax):
        found.append("pydicom")
    if name in _WAVELETS and find_spec("openjpeg") is not None:
        found.append("openjpeg")
    if name in _CODECS and _imagecodecs(_CODECS[name]):
        found.append("imagecodecs")
    if name in ITK_SYNTAXES or name == "jpeg_ls_near":  # the GDCM inside SimpleITK
        found.append("itk")
    if name == "jpeg_extended" and "pydicom" in found and len(found) > 1:
        found.append(found.pop(0))  # mostly 12 bits, which the plug-in (Pillow) refuses
    return tuple(found)


def find_decoder(syntax: str) -> str:
    """Return the first of `decoders`, or `none`."""
    return next(iter(decoders(syntax)), "none")


def _pydicom(syntax: str) -> bool:
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    try:
        return bool(get_decoder(UID(syntax)).is_available)
    except NotImplementedError:
        return False


def _imagecodecs(codec: str) -> bool:
    if find_spec("imagecodecs") is None:
        return False
    import imagecodecs

    return bool(getattr(getattr(imagecodecs, codec, None), "available", False))
