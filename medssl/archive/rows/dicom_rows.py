"""Rows of DICOM objects: slices become volumes, multi-frame files their volumes or clips, every projection image is a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from medssl.archive.headers.decoders import find_decoder
from medssl.archive.headers.dicom_header import LOSSY_SYNTAXES, syntax_name
from medssl.archive.headers.dicom_series import SliceGeometry, SliceGroup, split_series
from medssl.archive.headers.image_scale import (
    REGION_TYPES,
    TISSUE_2D,
    frame_step,
    planar_spacing,
    region_spacing,
    regions_fit,
    us_regions,
)
from medssl.archive.ids import IdKey, is_placeholder
from medssl.archive.rows.attributes import PROJECTIONS, VARYING, attributes, twin_key, varying
from medssl.archive.rows.base import (
    UNITLESS,
    Group,
    Placed,
    Scanned,
    canonical,
    common_choice,
    domain_of,
    patient_of,
    place,
    unique,
)
from medssl.archive.rows.file_rows import add_associated
from medssl.archive.rows.roles import modality_of, role_of
from medssl.archive.table import SeriesRow

VOLUME_DOMAINS = ("ct", "mri")
EITHER_SYNTAXES = frozenset({"jpeg2000", "htj2k", "other"})
"""Transfer syntaxes that may or may not lose something."""
PLANAR_DOMAINS = ("xray", "ultrasound", "microscopy")
MONOCHROME = frozenset({"MONOCHROME1", "MONOCHROME2"})
COLOUR = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"})
PHOTOMETRICS = MONOCHROME | COLOUR | {"PALETTE COLOR"}
_NOWHERE = SliceGeometry(np.arange(1), None, None)


@dataclass(frozen=True)
class _Piece:
    """What becomes one row: files, what of them, their headers, the geometry."""

    members: Sequence[Scanned]
    headers: Sequence[Mapping[str, Any]]
    group: SliceGroup
    name: str
    part: Mapping[str, Any] | None = None
    shape: tuple[int, int, int] | None = None


def add_dicom(
    out: Group, files: Sequence[Scanned], placed: Mapping[str, Placed], key: IdKey, shared: Set[tuple[str, str]], taken: set[str]
) -> None:
    """Add the rows of the DICOM objects of one series.

    Args:
        out: Gets the rows.
        files: Usable files of one SeriesInstanceUID.
        placed: Gets their places.
        key: The owner's key.
        shared: (issuer, PatientID) of people who differ.
        taken: Series ids given so far.
    """
    # By what headers say as far as that goes: the order must not change when pixels do.
    files = sorted(
        files, key=lambda file: (file.header.get("instance_number") or 0, file.header.get("sop_instance_uid") or "", file.digest)
    )
    head, folder = files[0].header, str(PurePath(files[0].path).parent)
    series = head.get("series_uid") or folder
    study = head.get("study_uid") or series
    for piece in _pieces(files):
        members, first = piece.members, piece.headers[0]
        choice = common_choice(file.choice for file in members)
        who = (first.get("issuer") or "", first.get("patient_id") or "")
        patient, unknown = patient_of(
            key,
            choice,
            placeholder=is_placeholder(who[1]) or who in shared,
            issuer=who[0] or choice.site,
            value=who[1],
            fallback=f"study {study}",
        )
        flags = list(piece.group.flags)
        if unknown:
            flags.append("patient_unknown")
        if who in shared:
            flags.append("patient_shared")
        if any(file.conflict for file in members):
            flags.append("uid_conflict")
        row = SeriesRow(
            series_id=unique(key.make("series", study, f"{series} {piece.name}"), key, taken),
            study_id=key.make("study", "", study),
            patient_id=patient,
            n_files=len(members),
            bytes=sum(file.size for file in members),
            site=choice.site,
            split=choice.split,
            pair_group=_pair_group(first, members, key),
            scanner_id=_scanner(first, key),
            **_describe(piece, flags),
        )
        private = {
            "study_uid": first.get("study_uid"),
            "series_uid": first.get("series_uid"),
            "mrn": first.get("patient_id"),
            "issuer": first.get("issuer"),
            "accession": first.get("accession"),
            "study_date": first.get("study_date"),
            **_instances(first, members, key),
        }
        place(out, row, members, placed, key, private, piece.part)
        slide = first.get("slide")
        if row.kind == "slide" and slide:
            add_associated(out, row, slide.get("associated", ()), members, placed, key)


def _pieces(files: Sequence[Scanned]) -> list[_Piece]:
    """Cut a series into what becomes rows."""
    pieces: list[_Piece] = []
    stacks: list[Scanned] = []
    slides: list[Scanned] = []
    for file in files:
        domain = domain_of(modality_of(file.header))
        if domain == "wsi":
            slides.append(file)
        elif domain in VOLUME_DOMAINS and file.header.get("parts"):
            pieces += _frames(file)
        elif domain in VOLUME_DOMAINS and int(file.header.get("n_frames") or 1) == 1:
            stacks.append(file)
        else:
            pieces.append(_Piece([file], [file.header], SliceGroup((0,), _NOWHERE), _own_name(file)))
    if slides:
        pieces.append(_Piece(slides, [file.header for file in slides], SliceGroup((0,), _NOWHERE), "slide"))
    groups = split_series([file.header for file in stacks]) if stacks else []
    for group in groups:
        members = [stacks[i] for i in group.indices]
        # Names the volume within its series by what it is, not by how many siblings were found so far.
        name = "" if len(groups) == 1 else _part(members[0].header, group)
        pieces.append(_Piece(members, [file.header for file in members], group, name))
    return pieces


def _frames(file: Scanned) -> list[_Piece]:
    """Return the volumes of a multi-frame file (see `multiframe.describe_multiframe`)."""
    pieces = []
    for k, part in enumerate(file.header["parts"]):
        geometry = SliceGeometry(
            np.arange(part["shape"][2]),
            None if part["affine"] is None else np.array(part["affine"]),
            None if part["spacing_mm"] is None else tuple(part["spacing_mm"]),
            part["step_mm"],
            part["step_cv"],
            part["max_gap_mm"],
            part["tilt_deg"],
            tuple(part["faults"]),
        )
        group = SliceGroup(
            (0,),
            geometry,
            tuple(part["flags"]),
            part["split_by"],
            part["volume_index"],
            part["n_volumes"],
            tuple(part.get("varying", ())),
        )
        header = {**file.header, **part.get("first", {})}
        pieces.append(_Piece([file], [header], group, f"{_own_name(file)} {k}", {"frames": part["frames"]}, tuple(part["shape"])))
    return pieces


def _own_name(file: Scanned) -> str:
    """Return what names one object of a series: its UID, with its content where another has the same."""
    uid = str(file.header.get("sop_instance_uid") or file.digest)
    return f"{uid} {file.digest}" if file.conflict else uid


def _pair_group(header: Mapping[str, Any], members: Sequence[Scanned], key: IdKey) -> str | None:
    """Return what rows share that are one image in two forms: twins of one exposure, or one UID with two contents."""
    uid = next((file.header.get("sop_instance_uid") for file in members if file.conflict), None)
    if uid is not None:
        return key.make("pair", "uid", str(uid))
    twin = twin_key(header, modality_of(header))
    return None if twin is None else key.make("pair", "twin", twin)


def _instances(header: Mapping[str, Any], members: Sequence[Scanned], key: IdKey) -> dict[str, Any]:
    """Return the private columns by which `twins.join_twins` finds the image that a projection was made from."""
    uid = header.get("sop_instance_uid")
    if len(members) != 1 or not uid or modality_of(header) not in PROJECTIONS:
        return {}
    sources = [key.make("pair", "uid", str(source)) for source in header.get("source_images") or ()]
    return {"instance": key.make("pair", "uid", str(uid)), "made_from": " ".join(sources) or None}


def _scanner(header: Mapping[str, Any], key: IdKey) -> str | None:
    parts = [str(header.get(name) or "") for name in ("manufacturer", "model", "serial")]
    return key.make("scanner", "", " ".join(parts)) if any(parts) else None


def _describe(piece: _Piece, flags: list[str]) -> dict[str, Any]:
    headers, group, first = piece.headers, piece.group, piece.headers[0]
    modality = modality_of(first)
    domain = domain_of(modality)
    role = role_of(first.get("image_type", ()), first.get("sop_class_uid", ""))
    syntax = syntax_name(first["syntax"])
    lossy = _lossy(first, syntax)
    known = attributes(headers, modality)
    flags.extend(known.pop("flags"))
    flags.extend(varying(headers) if piece.part is None else (f"varying_{name}" for name in group.varying if name in VARYING))
    if lossy:
        flags.append("lossy")
    if any(header.get("prefix_only") for header in headers):
        flags.append("prefix_only")
    if role == "source" and "DERIVED" in first.get("image_type", ()):
        flags.append("derived")
    if role == "screenshot":
        known["privacy_flags"] = (*known["privacy_flags"], "screenshot")
    units = "unknown"
    if domain == "ct":
        units = "HU" if _is_hu(headers) and role in ("source", "reformat") else "unknown"
    elif domain in UNITLESS:
        units = "arbitrary"
    reason = dicom_fault(headers, group, role)
    extent = {} if domain == "wsi" else _extent(piece, domain)
    flags.extend(extent.pop("flags", ()))
    photometric = first.get("photometric", "unknown")
    signed = "int" if first.get("pixel_representation") else "uint"
    steps = group.geometry if group.geometry.spacing_mm else None
    found = {
        **known,
        "modality": modality,
        "domain": domain,
        "role": role,
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
    }
    if domain == "wsi":
        return {**found, **_slide(first)}
    return {**found, **extent}


def _lossy(header: Mapping[str, Any], syntax: str) -> bool | None:
    """Return whether pixels were ever compressed with loss; None where neither tag nor syntax says so."""
    if header.get("lossy") == "01" or syntax in LOSSY_SYNTAXES:
        return True
    return None if header.get("lossy") != "00" and syntax in EITHER_SYNTAXES else False


def _extent(piece: _Piece, domain: str) -> dict[str, Any]:
    """Return kind, shape, spacing and, for clips, the time between frames."""
    first, group = piece.headers[0], piece.group
    rows, columns = int(first["rows"]), int(first["columns"])
    frames = int(first.get("n_frames") or 1)
    if domain in VOLUME_DOMAINS:
        if first.get("mosaic"):
            rows, columns = first["mosaic"]["tile"]
        shape = piece.shape or group.geometry.shape(columns, rows)
        geometry: dict[str, Any] = {"shape": shape}
        if group.geometry.affine is not None:
            geometry = {**canonical(group.geometry.affine, shape, 2), "spacing_source": "header"}
        return {"kind": "volume" if shape[2] > 1 else "image", "n_slices": shape[2], **geometry}
    found: dict[str, Any] = {"n_slices": frames, "shape": (rows, columns), "kind": "image", "flags": []}
    spacing, found["spacing_source"] = None, "unknown"
    if domain in ("xray", "microscopy"):
        spacing, found["spacing_source"] = planar_spacing(first)
    elif domain == "ultrasound":
        regions = us_regions(first)
        found["n_regions"] = len(regions)
        found["region_types"] = tuple(name for name in REGION_TYPES if any(region.kind == name for region in regions))
        if not regions_fit(regions, rows, columns):
            found["flags"].append("region_outside")
        elif (spacing := region_spacing(regions)) is not None:
            found["spacing_source"] = "region"
    if spacing is not None:
        found["spacing_mm"] = spacing
        found["extent_mm"] = (round(rows * spacing[0], 3), round(columns * spacing[1], 3))
    if frames > 1:
        found["kind"], found["shape"] = "cine", (frames, rows, columns)
        found["fps_source"], step, flags = frame_step(first, frames)
        found["frame_time_ms"] = None if step is None else round(step, 6)
        found["flags"] += flags
    return found


def _slide(header: Mapping[str, Any]) -> dict[str, Any]:
    slide = header.get("slide")
    if not slide:
        return {
            "kind": "slide",
            "shape": (int(header["rows"]), int(header["columns"])),
            "status": "rejected",
            "reason": "no_decoder",
        }
    return {"kind": "slide", "shape": tuple(slide["shape"]), "mpp": slide["mpp"], "spacing_mm": slide["spacing_mm"]}


def dicom_fault(headers: Sequence[Mapping[str, Any]], group: SliceGroup, role: str) -> str | None:
    """Return the first reason for which these objects cannot become an image of their domain, or None."""
    first = headers[0]
    modality = modality_of(first)
    domain = domain_of(modality)
    if role in ("screenshot", "localiser", "derived_map", "report"):
        return role
    if domain not in (*VOLUME_DOMAINS, *PLANAR_DOMAINS, "wsi"):
        return "no_domain"
    if domain != "wsi" and any(find_decoder(syntax) == "none" for syntax in {header["syntax"] for header in headers}):
        return "no_decoder"
    if domain in PLANAR_DOMAINS:
        return _planar_fault(first, domain)
    if domain == "wsi":
        return None
    if "MOSAIC" in first.get("image_type", ()) and not first.get("mosaic"):
        return "mosaic"
    if first.get("samples_per_pixel", 1) != 1:
        return "not_scalar"
    if first.get("photometric", "MONOCHROME2") != "MONOCHROME2":
        return "photometric"
    if any(header.get("bits_allocated") not in (8, 16, 32) for header in headers):
        return "unsupported_pixels"
    if modality == "CT" and not _is_hu(headers):
        return "not_hu"
    if int(first.get("n_frames") or 1) > 1 and not first.get("parts"):
        return "multiframe"
    return group.geometry.faults[0] if group.geometry.faults else None


def _planar_fault(header: Mapping[str, Any], domain: str) -> str | None:
    """Return the reason for which the reader of a planar domain would refuse this object, or None."""
    samples, photometric = header.get("samples_per_pixel", 1), header.get("photometric", "MONOCHROME2")
    if header.get("bits_allocated") not in (8, 16, 32) or samples not in (1, 3) or (samples == 3) != (photometric in COLOUR):
        return "unsupported_pixels"
    if photometric not in PHOTOMETRICS:
        return "photometric"
    if domain == "ultrasound":
        regions = us_regions(header)
        fit = regions_fit(regions, int(header["rows"]), int(header["columns"]))
        return "no_tissue" if regions and fit and not any(region.kind == TISSUE_2D for region in regions) else None
    if int(header.get("n_frames") or 1) > 1:
        return "multiframe"
    return "not_scalar" if domain == "xray" and photometric not in MONOCHROME else None


def _is_hu(headers: Sequence[Mapping[str, Any]]) -> bool:
    return {header.get("rescale_type") for header in headers} <= {None, "HU"}


def _part(first: Mapping[str, Any], group: SliceGroup) -> str:
    orientation = [round(float(value), 1) + 0.0 for value in first.get("orientation") or ()]
    return f"{first.get('rows')}x{first.get('columns')} {orientation} {group.split_by} {group.volume_index}"
