"""Turn the scanned files of one group into series rows: split, judge, name with pseudonymous ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np

from medssl.archive.attributes import MODALITIES, attributes, pixel_spacing_2d, twin_key, vendor
from medssl.archive.dicom_header import LOSSY_SYNTAXES, find_decoder, syntax_name
from medssl.archive.dicom_series import SliceGroup, split_series
from medssl.archive.ids import IdKey, is_placeholder
from medssl.archive.roles import role_of, sop_kind, sop_modality
from medssl.archive.table import SeriesRow

DOMAINS = {"CT": "ct", "MR": "mri", "CR": "xray", "DX": "xray", "US": "ultrasound", "SM": "wsi", "GM": "microscopy"}
VOLUME_DOMAINS = ("ct", "mri")
PLANAR_DOMAINS = ("xray", "ultrasound")
PLANES = {0: "sagittal", 1: "coronal", 2: "axial"}
PHOTOMETRICS = frozenset({"MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"})


@dataclass
class Placed:
    """Where one scanned file ended up.

    Args:
        path: Source path, as text (private).
        digest: Digest of it (private).
        sop_uid: Instance UID (private).
        series_id: Its series, or None.
        place: Its position in the series' file order, or None for files that belong to no series.
        reason: Why it is not used, or None.
    """

    path: str
    digest: str
    sop_uid: str | None = None
    series_id: str | None = None
    place: int | None = None
    reason: str | None = None


@dataclass
class Group:
    """What became of the files of one group.

    Args:
        series: Rows of `series.parquet`.
        private: One row of `table.PRIVATE_SERIES_COLUMNS` for each of them.
        files: One `Placed` for each file.
    """

    series: list[SeriesRow] = field(default_factory=list)
    private: list[dict[str, Any]] = field(default_factory=list)
    files: list[Placed] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """What the user said about a file: site, split, patient where a table names one, and the modality of files that do not say."""

    site: str = "unknown"
    split: str = "unknown"
    patient: str | None = None
    modality: str = "unknown"


@dataclass(frozen=True)
class Scanned:
    """One scanned file with its whole header.

    Args:
        path: Source path, as text.
        size: Bytes.
        kind: `dicom`, `volume`, `sidecar` or `other`.
        reason: Why it cannot be used, or None.
        digest: Its digest.
        header: Header values.
        conflict: Another file with other content has the same instance UID.
        choice: What the user said about it.
    """

    path: str
    size: int
    kind: str
    reason: str | None
    digest: str
    header: Mapping[str, Any]
    conflict: bool = False
    choice: Choice = field(default_factory=Choice)


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
    usable = [file for file in files if file.reason is None]
    sidecar = next((file.header for file in files if file.kind == "sidecar"), {})
    taken: set[str] = set()
    for file in usable:
        if file.kind == "volume":
            _add_volume(
                out, file, [other for other in files if other.path in file.header["data_files"]], placed, key, sidecar, taken
            )
        elif file.kind == "image":
            _add_planar(out, file, placed, key, taken)
    dicom = [file for file in usable if file.kind == "dicom"]
    if dicom:
        _add_dicom(out, dicom, placed, key, shared, taken)
    out.files = list(placed.values())
    return out


def _canonical(affine: np.ndarray, shape: Sequence[int], slice_axis: int | None) -> dict[str, Any]:
    """Return shape, spacing, extent, slice axis, plane and stored axis codes of a volume with this affine."""
    from nibabel import orientations

    change = orientations.io_orientation(affine)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    where = [int(axis) for axis in np.argsort(change[:, 0])]
    canonical_shape = tuple(int(shape[axis]) for axis in where)
    canonical_spacing = tuple(round(float(spacing[axis]), 6) for axis in where)
    axis = None if slice_axis is None else int(change[slice_axis, 0])
    return {
        "shape": canonical_shape,
        "spacing_mm": canonical_spacing,
        "extent_mm": tuple(round(n * s, 3) for n, s in zip(canonical_shape, canonical_spacing)),
        "slice_axis": axis,
        "plane": "unknown" if axis is None else PLANES[axis],
        "orientation": "".join(str(code) for code in orientations.aff2axcodes(affine)),
    }


def _add_volume(
    out: Group,
    file: Scanned,
    data: Sequence[Scanned],
    placed: Mapping[str, Placed],
    key: IdKey,
    sidecar: Mapping[str, Any],
    taken: set[str],
) -> None:
    header, choice = file.header, file.choice
    members = [file, *data]
    identity = file.digest  # covers detached data files
    series_id = _unique(key.make("series", "file", identity), key, taken)
    flags = list(header["flags"])
    patient, unknown = _patient(key, choice, placeholder=True, issuer=choice.site, value="", fallback=f"file {identity}")
    if unknown:
        flags.append("patient_unknown")
    affine = None if header["affine"] is None else np.array(header["affine"])
    shape = tuple(header["shape"])
    geometry: dict[str, Any] = {"shape": shape}
    if affine is not None and len(shape) == 3:
        geometry = _canonical(affine, shape, header["slice_axis"])
    modality = str(sidecar.get("Modality", choice.modality)).upper()
    modality = modality if modality in MODALITIES else ("other" if "Modality" in sidecar else "unknown")
    reason = header["reason"]
    row = SeriesRow(
        series_id=series_id,
        study_id=key.make("study", "file", identity),
        patient_id=patient,
        modality=modality,
        domain="unknown" if modality == "unknown" else DOMAINS.get(modality, "other"),
        kind="volume_4d" if len(shape) > 3 else ("image" if len(shape) < 3 else "volume"),
        n_slices=None if geometry.get("slice_axis") is None else geometry["shape"][geometry["slice_axis"]],
        dtype=header["dtype"],
        vendor=vendor(sidecar.get("Manufacturer")),
        field_strength_t=_number(sidecar.get("MagneticFieldStrength")),
        n_files=len(members),
        bytes=sum(member.size for member in members),
        site=choice.site,
        split=choice.split,
        quality_flags=tuple(flags),
        status="rejected" if reason else ("flagged" if flags else "ok"),
        reason=reason,
        **geometry,
    )
    _place(out, row, members, placed, key)


def _add_planar(out: Group, file: Scanned, placed: Mapping[str, Placed], key: IdKey, taken: set[str]) -> None:
    """Add an image, a clip or a slide that is one file and says nothing of a patient."""
    header, choice = file.header, file.choice
    flags = [*header.get("flags", ())]
    patient, unknown = _patient(key, choice, placeholder=True, issuer=choice.site, value="", fallback=f"file {file.digest}")
    if unknown:
        flags.append("patient_unknown")
    kind = header["kind"]
    modality = "SM" if kind == "slide" and choice.modality == "unknown" else choice.modality
    spacing = header.get("spacing_mm")
    reason = header.get("reason")
    row = SeriesRow(
        series_id=_unique(key.make("series", "file", file.digest), key, taken),
        study_id=key.make("study", "file", file.digest),
        patient_id=patient,
        modality=modality,
        domain="unknown" if modality == "unknown" else DOMAINS.get(modality, "other"),
        kind=kind,
        shape=tuple(header["shape"]),
        spacing_mm=None if spacing is None else tuple(spacing),
        spacing_source="unknown" if spacing is None else "header",
        mpp=header.get("mpp"),
        frame_time_ms=header.get("frame_time_ms"),
        fps_source=header.get("fps_source") or "unknown",
        dtype=header.get("dtype") or "unknown",
        bits=header.get("bits"),
        photometric=header.get("photometric") or "unknown",
        n_slices=None,
        bytes=file.size,
        site=choice.site,
        split=choice.split,
        quality_flags=tuple(dict.fromkeys(flags)),
        privacy_flags=tuple(header.get("privacy_flags", ())),
        status="rejected" if reason else ("flagged" if flags else "ok"),
        reason=reason,
    )
    _place(out, row, [file], placed, key)


def _add_dicom(
    out: Group, files: Sequence[Scanned], placed: Mapping[str, Placed], key: IdKey, shared: Set[tuple[str, str]], taken: set[str]
) -> None:
    files = sorted(files, key=lambda file: (file.header.get("instance_number") or 0, file.digest))
    head, folder = files[0].header, str(PurePath(files[0].path).parent)
    series = head.get("series_uid") or folder
    study = head.get("study_uid") or series
    groups = split_series([file.header for file in files])
    for group in groups:
        members = [files[i] for i in group.indices]
        first = members[0].header
        choice = _common(file.choice for file in members)
        who = (first.get("issuer") or "", first.get("patient_id") or "")
        patient, unknown = _patient(
            key,
            choice,
            placeholder=is_placeholder(who[1]) or who in shared,
            issuer=who[0] or choice.site,
            value=who[1],
            fallback=f"study {study}",
        )
        flags = list(group.flags)
        if unknown:
            flags.append("patient_unknown")
        if who in shared:
            flags.append("patient_shared")
        if any(file.conflict for file in members):
            flags.append("uid_conflict")
        # Names the volume within its series by what it is, not by how many siblings were found so far.
        part = "" if len(groups) == 1 else _part(first, group)
        row = SeriesRow(
            series_id=_unique(key.make("series", study, f"{series} {part}"), key, taken),
            study_id=key.make("study", "", study),
            patient_id=patient,
            n_files=len(members),
            bytes=sum(file.size for file in members),
            site=choice.site,
            split=choice.split,
            pair_group=_pair_group(first, members, key),
            scanner_id=_scanner(first, key),
            **_describe([file.header for file in members], group, flags),
        )
        private = {
            "study_uid": first.get("study_uid"),
            "series_uid": first.get("series_uid"),
            "mrn": first.get("patient_id"),
            "issuer": first.get("issuer"),
            "accession": first.get("accession"),
            "study_date": first.get("study_date"),
        }
        _place(out, row, members, placed, key, private)


def _pair_group(header: Mapping[str, Any], members: Sequence[Scanned], key: IdKey) -> str | None:
    """Return what rows share that are one image in two forms: twins of one exposure, or one UID with two contents."""
    uid = next((file.header.get("sop_instance_uid") for file in members if file.conflict), None)
    if uid is not None:
        return key.make("pair", "uid", str(uid))
    twin = twin_key(header, _modality(header))
    return None if twin is None else key.make("pair", "twin", twin)


def _scanner(header: Mapping[str, Any], key: IdKey) -> str | None:
    parts = [str(header.get(name) or "") for name in ("manufacturer", "model", "serial")]
    return key.make("scanner", "", " ".join(parts)) if any(parts) else None


def _describe(headers: list[Mapping[str, Any]], group: SliceGroup, flags: list[str]) -> dict[str, Any]:
    first = headers[0]
    modality = _modality(first)
    role = role_of(first.get("image_type", ()), first.get("sop_class_uid", ""))
    syntax = syntax_name(first["syntax"])
    lossy = first.get("lossy") == "01" or syntax in LOSSY_SYNTAXES
    known = attributes(headers, modality)
    flags.extend(known.pop("flags"))
    if lossy:
        flags.append("lossy")
    if role == "source" and "DERIVED" in first.get("image_type", ()):
        flags.append("derived")
    if role == "screenshot":
        known["privacy_flags"] = (*known["privacy_flags"], "screenshot")
    reason = dicom_fault(headers, group, role)
    frames = int(first.get("n_frames") or 1)
    geometry: dict[str, Any] = {"shape": (int(first["columns"]), int(first["rows"]), max(len(headers), frames))}
    if group.geometry.affine is not None:
        shape = group.geometry.shape(int(first["columns"]), int(first["rows"]))
        geometry = {**_canonical(group.geometry.affine, shape, 2), "spacing_source": "header"}
    domain = DOMAINS.get(modality, "unknown" if modality == "unknown" else "other")
    units = "unknown"
    if domain == "ct":
        units = "HU" if _is_hu(headers) and role in ("source", "reformat") else "unknown"
    elif domain == "mri":
        units = "arbitrary"
    kind = "volume"
    if frames > 1:
        kind = "cine" if domain == "ultrasound" else "volume"
    elif len(headers) == 1:
        kind = "image"
    if kind == "image" and domain in PLANAR_DOMAINS:
        spacing, source = pixel_spacing_2d(first)
        geometry = {"shape": (int(first["rows"]), int(first["columns"])), "spacing_mm": spacing, "spacing_source": source}
    photometric = first.get("photometric", "unknown")
    signed = "int" if first.get("pixel_representation") else "uint"
    steps = group.geometry if group.geometry.spacing_mm else None
    return {
        **known,
        "modality": modality,
        "domain": domain,
        "kind": kind,
        "role": role,
        "n_slices": len(headers),
        "n_volumes": group.n_volumes,
        "volume_index": group.volume_index,
        "volume_axis": group.split_by or "none",
        "slice_thickness_mm": first.get("slice_thickness"),
        "slice_step_mm": round(steps.step_mm, 6) if steps else None,
        "step_cv": round(steps.step_cv, 6) if steps else None,
        "max_gap_mm": round(steps.max_gap_mm, 6) if steps else None,
        "tilt_deg": round(steps.tilt_deg, 4) if steps else None,
        "dtype": f"{signed}{first['bits_allocated']}" if first.get("bits_allocated") in (8, 16, 32) else "unknown",
        "bits": first.get("bits_stored"),
        "photometric": photometric if photometric in PHOTOMETRICS else "other",
        "transfer_syntax": syntax,
        "lossy": lossy,
        "units": units,
        "quality_flags": tuple(dict.fromkeys(flags)),
        "status": "rejected" if reason else ("flagged" if flags else "ok"),
        "reason": reason,
        **geometry,
    }


def _modality(header: Mapping[str, Any]) -> str:
    """Return the modality; what the object is (its SOP class) comes before what its Modality tag says."""
    stated = str(header.get("modality", "unknown")).upper()
    stated = stated if stated in MODALITIES else "unknown" if stated == "UNKNOWN" else "other"
    uid = header.get("sop_class_uid", "")
    if sop_kind(uid) in ("report", "rt", "waveform", "presentation", "document"):
        return stated if stated in ("SR", "RTDOSE", "ECG") else "other"
    by_class = sop_modality(uid)
    if by_class is None or stated == by_class or {stated, by_class} <= {"CR", "DX"}:
        return stated
    return by_class if by_class != "OT" else "other"


def dicom_fault(headers: Sequence[Mapping[str, Any]], group: SliceGroup, role: str) -> str | None:
    """Return the first reason for which these slices cannot become a volume, or None."""
    first = headers[0]
    modality = str(first.get("modality", ""))
    if role in ("screenshot", "localiser", "derived_map"):
        return role
    if DOMAINS.get(modality) not in VOLUME_DOMAINS:
        return "no_domain"
    if any(int(header.get("n_frames") or 1) > 1 for header in headers):
        return "multiframe"
    if "MOSAIC" in first.get("image_type", ()):
        return "mosaic"
    if first.get("samples_per_pixel", 1) != 1:
        return "not_scalar"
    if first.get("photometric", "MONOCHROME2") != "MONOCHROME2":
        return "photometric"
    if any(header.get("bits_allocated") not in (8, 16, 32) for header in headers):
        return "unsupported_pixels"
    if any(find_decoder(syntax) == "none" for syntax in {header["syntax"] for header in headers}):
        return "no_decoder"
    if modality == "CT" and not _is_hu(headers):
        return "not_hu"
    return group.geometry.faults[0] if group.geometry.faults else None


def _is_hu(headers: Sequence[Mapping[str, Any]]) -> bool:
    return {header.get("rescale_type") for header in headers} <= {None, "HU"}


def _part(first: Mapping[str, Any], group: SliceGroup) -> str:
    orientation = [round(float(value), 1) + 0.0 for value in first.get("orientation") or ()]
    return f"{first.get('rows')}x{first.get('columns')} {orientation} {group.split_by} {group.volume_index}"


def _patient(key: IdKey, choice: Choice, *, placeholder: bool, issuer: str, value: str, fallback: str) -> tuple[str, bool]:
    """Return the patient id, and whether it is only a stand-in."""
    if choice.patient is not None:
        return key.make("patient", choice.site, choice.patient), False
    if placeholder:
        return key.make("patient", "unknown", fallback), True
    return key.make("patient", issuer, value), False


def _common(choices: Iterable[Choice]) -> Choice:
    """Return the choice all files of a series share; what they disagree on is unknown."""
    found = set(choices)
    if len(found) == 1:
        return found.pop()
    sites, splits, patients = ({getattr(choice, name) for choice in found} for name in ("site", "split", "patient"))
    return Choice(
        sites.pop() if len(sites) == 1 else "unknown",
        splits.pop() if len(splits) == 1 else "unknown",
        patients.pop() if len(patients) == 1 else None,
    )


def _unique(series_id: str, key: IdKey, taken: set[str]) -> str:
    n, wanted = 1, series_id
    while series_id in taken:
        n += 1
        series_id = key.make("series", "again", f"{wanted} {n}")
    taken.add(series_id)
    return series_id


def _place(
    out: Group,
    row: SeriesRow,
    members: Sequence[Scanned],
    placed: Mapping[str, Placed],
    key: IdKey,
    private: Mapping[str, Any] | None = None,
) -> None:
    out.series.append(row)
    tag = key.make("source", "", " ".join(member.digest for member in members))
    out.private.append({"series_id": row.series_id, "source_tag": tag, **(private or {})})
    for place, member in enumerate(members):
        file = placed[member.path]
        file.series_id, file.place, file.reason = row.series_id, place, row.reason


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def as_record(row: SeriesRow) -> dict[str, Any]:
    """Return a row as JSON-able values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(row).items()}
