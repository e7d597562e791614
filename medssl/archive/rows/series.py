"""Turn the scanned files of one group into series rows."""

from __future__ import annotations

from collections.abc import Sequence, Set

from medssl.archive.ids import IdKey
from medssl.archive.rows.base import Group, Placed, Scanned
from medssl.archive.rows.dicom_rows import add_dicom
from medssl.archive.rows.file_rows import add_picture, add_volume


def build_group(files: Sequence[Scanned], key: IdKey, shared: Set[tuple[str, str]] = frozenset()) -> Group:
    """Build the series of files that may belong together: one DICOM series, or one file with its sidecar and data.

    Args:
        files: Files of one group, in any order.
        key: The owner's key.
        shared: (issuer, PatientID) that stand for people who differ.

    Returns:
        Every file of `files` is placed exactly once.
    """
    out = Group()
    files = sorted(files, key=lambda file: file.path)
    placed = {file.path: Placed(file.path, file.digest, file.header.get("sop_instance_uid"), reason=file.reason) for file in files}
    data = {name for file in files for name in file.header.get("data_files", ())}
    usable = [file for file in files if file.reason is None and file.path not in data]
    sidecar = next((file.header for file in files if file.kind == "sidecar"), {})
    taken: set[str] = set()
    for file in usable:
        if file.kind == "volume":
            add_volume(out, file, _data_of(file, files), placed, key, sidecar, taken)
        elif file.kind == "image":
            add_picture(out, file, _data_of(file, files), placed, key, taken)
    dicom = [file for file in usable if file.kind == "dicom"]
    if dicom:
        add_dicom(out, dicom, placed, key, shared, taken)
    out.files = list(placed.values())
    return out


def _data_of(file: Scanned, files: Sequence[Scanned]) -> list[Scanned]:
    """Return the detached data files that a header names, as far as they were seen."""
    names = file.header.get("data_files", ())
    return [other for other in files if other.path in names]
