"""Turn scanned files into series rows: group, judge, name with pseudonymous ids."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np

from medssl.archive.dicom_header import LOSSY_SYNTAXES, find_decoder, syntax_name
from medssl.archive.dicom_series import SliceGroup, role_of, split_series
from medssl.archive.ids import IdKey, is_placeholder
from medssl.archive.table import SeriesRow

MODALITIES = frozenset("CT MR CR DX RF MG US IVUS XA PT NM SM GM XC OT SC SEG RTDOSE ES OP OCT BI ECG".split())  # noqa: SIM905
DOMAINS = {"CT": "ct", "MR": "mri", "CR": "xray", "DX": "xray", "US": "ultrasound", "SM": "wsi", "GM": "microscopy"}
VOLUME_DOMAINS = ("ct", "mri")
VENDORS = {
    "ge": ("ge medical", "ge health", "general electric"),
    "siemens": ("siemens",),
    "philips": ("philips", "picker", "marconi"),
    "canon": ("canon", "toshiba"),
    "hitachi": ("hitachi", "fujifilm"),
    "united_imaging": ("uih", "united imaging"),
}
REGIONS = {
    "head": ("head", "brain", "skull", "neuro", "orbit", "sinus", "iac", "pituitary", "face"),
    "neck": ("neck", "carotid", "thyroid"),
    "chest": ("chest", "thorax", "lung", "heart", "cardiac", "coronary"),
    "abdomen": ("abdomen", "liver", "kidney", "pancreas", "abdo"),
    "pelvis": ("pelvis", "prostate", "bladder", "uterus", "rectum"),
    "breast": ("breast", "mamma"),
    "spine": ("spine", "lspine", "cspine", "tspine"),
    "limb": ("knee", "shoulder", "hip", "ankle", "foot", "hand", "wrist", "elbow", "leg", "arm", "extremity", "femur"),
    "whole_body": ("wholebody", "whole body"),
}
PLANES = {0: "sagittal", 1: "coronal", 2: "axial"}
PHOTOMETRICS = frozenset({"MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"})


@dataclass
class Placed:
    """Where one scanned file ended up.

    Args:
        path: Source path (private).
        digest: Digest of its bytes (private).
        series_id: Its series, or None.
        place: Its position in the series' file order, or None for files that belong to no series.
        reason: Why it is not used, or None.
    """

    path: str
    digest: str
    series_id: str | None = None
    place: int | None = None
    reason: str | None = None


@dataclass
class Grouped:
    """The outcome of `build_series`: rows, and one `Placed` per scanned file."""

    series: list[SeriesRow] = field(default_factory=list)
    files: list[Placed] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    uids: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What the user said about a file: site, split, patient where a table names one, and the modality of files that do not say."""

    site: str = "unknown"
    split: str = "unknown"
    patient: str | None = None
    modality: str = "unknown"


def build_series(rows: Sequence[Mapping[str, Any]], choices: Mapping[str, Choice], key: IdKey) -> Grouped:
    """Build series rows from scan rows.

    Args:
        rows: Rows of `scan.SCAN_COLUMNS`, one per file.
        choices: path -> what the user said about it.
        key: The owner's key.

    Returns:
        Rows sorted by series id; every file of `rows` is placed exactly once.
    """
    out = Grouped()
    placed = {row["path"]: Placed(row["path"], row["digest"], reason=row["reason"]) for row in rows}
    headers = {row["path"]: json.loads(row["header"]) for row in rows if row["kind"] != "other"}
    sizes = {row["path"]: int(row["size"]) for row in rows}
    _mark_duplicates(rows, placed)
    sidecars = {row["path"]: headers[row["path"]] for row in rows if row["kind"] == "sidecar"}
    taken: set[str] = set()
    dicom: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: str(row["path"])):
        path = row["path"]
        if placed[path].reason is not None:
            continue
        if row["kind"] == "volume":
            _add_volume(out, path, headers[path], sizes, placed, choices, key, sidecars, taken)
        elif row["kind"] == "dicom":
            header, folder = headers[path], str(PurePath(path).parent)
            study = header.get("study_uid") or header.get("series_uid") or folder
            dicom[(study, header.get("series_uid") or folder)].append(path)
    shared = _shared_patients(headers[path] for paths in dicom.values() for path in paths)
    conflicts = _conflicting_uids(headers[path] for paths in dicom.values() for path in paths)
    for (study, series), paths in dicom.items():
        _add_dicom(out, study, series, paths, headers, sizes, placed, choices, key, shared, conflicts, taken)
    out.series.sort(key=lambda row: row.series_id)
    out.files = [placed[row["path"]] for row in rows]
    return out


def _mark_duplicates(rows: Sequence[Mapping[str, Any]], placed: Mapping[str, Placed]) -> None:
    first: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: str(row["path"])):
        if row["reason"] is None and row["kind"] in ("dicom", "volume"):
            if row["digest"] in first:
                placed[row["path"]].reason = "duplicate"
            first.setdefault(row["digest"], row["path"])


def _shared_patients(headers: Iterable[Mapping[str, Any]]) -> set[tuple[str, str]]:
    """Return (issuer, PatientID) that stand for people of different sex or date of birth."""
    sexes, births = defaultdict(set), defaultdict(set)
    for header in headers:
        who = (header.get("issuer") or "", header.get("patient_id") or "")
        if header.get("sex") in ("M", "F"):
            sexes[who].add(header["sex"])
        if header.get("birth_date"):
            births[who].add(header["birth_date"])
    return {who for table in (sexes, births) for who, values in table.items() if len(values) > 1}


def _conflicting_uids(headers: Iterable[Mapping[str, Any]]) -> set[str]:
    counts = Counter(header.get("sop_instance_uid") or "" for header in headers)
    return {uid for uid, n in counts.items() if n > 1 and uid}


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
    out: Grouped,
    path: str,
    header: Mapping[str, Any],
    sizes: Mapping[str, int],
    placed: Mapping[str, Placed],
    choices: Mapping[str, Choice],
    key: IdKey,
    sidecars: Mapping[str, Mapping[str, Any]],
    taken: set[str],
) -> None:
    choice = choices.get(path, Choice())
    members = [path, *(name for name in header["data_files"] if name in placed)]
    identity = placed[path].digest  # covers detached data files
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
    stem = path[: -len("".join(PurePath(path).suffixes[-2:]))] if path.endswith(".gz") else path.rpartition(".")[0]
    sidecar = sidecars.get(f"{stem}.json", {})
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
        vendor=_vendor(str(sidecar.get("Manufacturer", ""))),
        field_strength_t=_number(sidecar.get("MagneticFieldStrength")),
        n_files=len(members),
        bytes=sum(sizes[name] for name in members),
        site=choice.site,
        split=choice.split,
        quality_flags=tuple(flags),
        status="rejected" if reason else ("flagged" if flags else "ok"),
        reason=reason,
        **geometry,
    )
    _place(out, row, members, placed, key)


def _add_dicom(
    out: Grouped,
    study: str,
    series: str,
    paths: list[str],
    headers: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, int],
    placed: Mapping[str, Placed],
    choices: Mapping[str, Choice],
    key: IdKey,
    shared: set[tuple[str, str]],
    conflicts: set[str],
    taken: set[str],
) -> None:
    paths = sorted(paths, key=lambda path: (headers[path].get("instance_number") or 0, placed[path].digest))
    slices = [headers[path] for path in paths]
    groups = split_series(slices)
    for group in groups:
        members = [paths[i] for i in group.indices]
        first = headers[members[0]]
        choice = _common(choices.get(path, Choice()) for path in members)
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
        if any(headers[path].get("sop_instance_uid") in conflicts for path in members):
            flags.append("uid_conflict")
        # Names the volume within its series by what it is, not by how many siblings were found so far.
        part = "" if len(groups) == 1 else _part(first, group)
        row = SeriesRow(
            series_id=_unique(key.make("series", study, f"{series} {part}"), key, taken),
            study_id=key.make("study", "", study),
            patient_id=patient,
            n_files=len(members),
            bytes=sum(sizes[path] for path in members),
            site=choice.site,
            split=choice.split,
            **_describe([headers[path] for path in members], group, flags),
        )
        out.uids[row.series_id] = json.dumps({"study": study, "series": series})
        _place(out, row, members, placed, key)


def _describe(headers: list[Mapping[str, Any]], group: SliceGroup, flags: list[str]) -> dict[str, Any]:
    first = headers[0]
    modality = str(first.get("modality", "unknown")).upper()
    modality = modality if modality in MODALITIES or modality == "UNKNOWN" else "other"
    modality = "unknown" if modality == "UNKNOWN" else modality
    role = role_of(first.get("image_type", ()), first.get("sop_class_uid", ""))
    syntax = syntax_name(first["syntax"])
    lossy = first.get("lossy") == "01" or syntax in LOSSY_SYNTAXES
    if lossy:
        flags.append("lossy")
    if role == "source" and "DERIVED" in first.get("image_type", ()):
        flags.append("derived")
    reason = dicom_fault(headers, group, role)
    frames = int(first.get("n_frames") or 1)
    geometry: dict[str, Any] = {"shape": (int(first["columns"]), int(first["rows"]), max(len(headers), frames))}
    if group.geometry.affine is not None:
        geometry = _canonical(group.geometry.affine, group.geometry.shape(int(first["columns"]), int(first["rows"])), 2)
    domain = DOMAINS.get(modality, "unknown" if modality == "unknown" else "other")
    units = "unknown"
    if domain == "ct":
        units = "HU" if _is_hu(headers) else "unknown"
    elif domain == "mri":
        units = "arbitrary"
    kind = "volume"
    if frames > 1:
        kind = "cine" if domain == "ultrasound" else "volume"
    elif len(headers) == 1:
        kind = "image"
    photometric = first.get("photometric", "unknown")
    signed = "int" if first.get("pixel_representation") else "uint"
    steps = group.geometry if group.geometry.spacing_mm else None
    return {
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
        "vendor": _vendor(first.get("manufacturer", "")),
        "field_strength_t": first.get("field_strength"),
        "kvp": first.get("kvp"),
        "tr": first.get("repetition_time"),
        "te": first.get("echo_time"),
        "ti": first.get("inversion_time"),
        **_region(first.get("body_part", "")),
        "sex": first["sex"] if first.get("sex") in ("F", "M", "O") else "unknown",
        "quality_flags": tuple(dict.fromkeys(flags)),
        "status": "rejected" if reason else ("flagged" if flags else "ok"),
        "reason": reason,
        **geometry,
    }


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


def _place(out: Grouped, row: SeriesRow, members: Sequence[str], placed: Mapping[str, Placed], key: IdKey) -> None:
    out.series.append(row)
    for place, path in enumerate(members):
        placed[path].series_id, placed[path].place, placed[path].reason = row.series_id, place, row.reason
    out.tags[row.series_id] = key.make("source", "", " ".join(placed[path].digest for path in members))


def _vendor(text: str) -> str:
    low = text.lower()
    if not low.strip():
        return "unknown"
    return next((name for name, parts in VENDORS.items() if low.startswith(parts) or any(p in low for p in parts)), "other")


def _region(text: str) -> dict[str, Any]:
    low = text.lower()
    if not low.strip():
        return {}
    found = tuple(name for name, parts in REGIONS.items() if any(part in low for part in parts))
    return {"body_region": found or ("other",), "body_region_source": "tag"}


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def as_record(row: SeriesRow) -> dict[str, Any]:
    """Return a row as JSON-able values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(row).items()}
